"""A page in the browser: a text unsteered and steered side by side, with sliders that work while it is written.

`settings` is what a visitor chose, `session` the two texts, `building` new vectors, `page` the page in Gradio.
"""
