"""Steering vectors: what they are, their files, where they are found."""
