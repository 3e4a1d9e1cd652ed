"""Steering: plans, what a user writes of them, and the edits of logits that carry them out."""
