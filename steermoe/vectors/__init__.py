"""Steering vectors: what they are, how they are stored, where they are found."""
