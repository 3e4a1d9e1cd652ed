"""Find, describe, load and quantise models; GGUF files; the default model."""
