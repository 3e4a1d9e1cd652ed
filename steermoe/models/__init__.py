"""Models: found, described, loaded, quantised; GGUF files; the default model."""
