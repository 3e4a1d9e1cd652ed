"""One decode step of a model compiled ahead of time: what it is, how it is made and kept, and how it is run.

Only `transformers`' own code says what is computed; `rewrites` says how the products of few rows are, `edits` puts the
steering of every row into the graph.
"""
