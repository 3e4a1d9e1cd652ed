"""The default model: what it is made of, how it is assembled, and the recipe that trained it.

`spec` holds its numbers, `stories` its corpus, `base` fetches the dense model that it grows from, `assemble` puts
base and trained part together, `train` makes the trained part. It knows nothing about steering: what comes
out is a plain `GraniteMoeSharedForCausalLM` checkpoint that transformers loads without any code of ours.
"""
