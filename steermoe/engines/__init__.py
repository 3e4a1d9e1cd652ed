"""Engines run requests: `request` and `engine` are their vocabulary; only an engine's folder imports its library."""
