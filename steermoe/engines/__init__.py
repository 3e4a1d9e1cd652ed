"""Engines run requests: `base` is their common vocabulary, each other file the only importer of its library."""
