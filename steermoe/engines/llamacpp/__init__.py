"""The llama.cpp engine: quantised models in GGUF files, steered inside llama.cpp's own graph.

Only `engine`, `context` and `tokenizer` import llama_cpp; the rest runs without it.
"""
