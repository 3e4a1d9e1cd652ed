"""One engine for many clients at once: OpenAI's and Ollama's protocols, each request steered on its own."""
