"""Plugins for other programs, found by their entry points: `llm` and Inspect. Nothing else imports this room."""
