"""GGUF files: read their headers, and export checkpoints to them. Needs no llama.cpp."""
