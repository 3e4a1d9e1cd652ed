"""Steering: plans, how users write them, and the edits of router logits that carry them out."""
