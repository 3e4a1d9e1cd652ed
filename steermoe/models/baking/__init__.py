"""Steer a checkpoint or a GGUF file for good, and take the steering out again."""
