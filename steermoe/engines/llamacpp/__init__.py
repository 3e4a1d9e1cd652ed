"""The llama.cpp engine: quantised models of GGUF files, steered inside llama.cpp's own graph.

Only `engine`, `context` and `tokenizer` import llama_cpp; the rest runs where it is not installed.
"""
