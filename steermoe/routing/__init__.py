"""Where a model routes: its architecture, its routers, their logits, and which experts they choose."""
