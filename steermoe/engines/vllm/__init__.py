"""The vLLM engine: `wire`, `spec` and `steps` know no vLLM; `plugin`, `engine` and `server` are its only importers."""
