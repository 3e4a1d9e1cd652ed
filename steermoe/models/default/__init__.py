"""The default model: what it consists of and how it is assembled.

`spec` has its numbers, `stories` its corpus; `base` fetches the dense model that it grows from, `assemble` joins base
and trained part, `pull` keeps the result in the cache. It knows nothing about steering: the result is a plain
`GraniteMoeSharedForCausalLM` checkpoint that transformers loads without any code of ours.
"""
