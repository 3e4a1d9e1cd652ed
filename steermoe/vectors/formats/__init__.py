"""Vectors in the files of other tools: one module per tool, which reads and, where it can, writes its shape of file."""
