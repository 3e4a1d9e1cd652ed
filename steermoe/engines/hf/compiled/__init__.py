"""One decode step of a model compiled ahead of time: what it is, how it is made and kept, and how it is run.

What is computed comes from transformers' own code alone; `rewrites` replaces products of few rows by faster ones, and
`steering.editing_graph` puts every row's steering into the graph.
"""
