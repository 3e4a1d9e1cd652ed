"""GGUF files: what one says of itself, and how a checkpoint becomes one. Needs no llama.cpp."""
