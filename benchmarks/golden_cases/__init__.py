"""The cases of golden.py. A section is a function of an empty folder, in which it runs, and a GGUF file or None; it
gives names with functions that run a case and return what JSON can hold. Of steermoe it may use only the command line
and the exported names, so that the same cases run before and after modules move.
"""

from golden_cases import commands, library, tiny

SECTIONS = {
    "tiny": tiny.tiny,
    "compiled": tiny.compiled,
    "hf": library.hf,
    "cli": commands.cli_section,
    "batch": commands.batch_section,
    "vectors": commands.vectors,
    "evaluation": commands.evaluation,
    "llamacpp": commands.llamacpp,
    "vllm": commands.vllm,
}
NO_DEFAULT_MODEL = {"tiny", "compiled", "llamacpp"}
"""Sections that run without it."""
LIBRARIES = {"evaluation": ("sklearn", "matplotlib"), "llamacpp": ("llama_cpp", "numba"), "vllm": ("vllm",)}
"""What a section needs besides steermoe's own dependencies."""
