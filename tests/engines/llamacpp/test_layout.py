"""Where things stand in the tensors of the installed ggml."""

import ctypes

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

import llama_cpp

from steermoe.engines.llamacpp import layout as ggml
from steermoe.errors import ModelError

LIBRARY = llama_cpp.llama_cpp._lib


def test_layout_is_consistent():
    layout = ggml.find_layout(LIBRARY)
    assert layout.buffer < layout.ne < layout.nb < layout.op < layout.op_params < layout.src < layout.data < layout.name
    assert len({layout.op_custom, layout.op_softmax, layout.op_unary}) == 3


def test_functions_that_are_missing():
    with pytest.raises(ModelError, match=r"this llama.cpp has no ggml_nonsense"):
        ggml.function(LIBRARY, "ggml_nonsense")
    assert ggml.address(LIBRARY, "ggml_backend_tensor_get") != ggml.address(LIBRARY, "ggml_backend_tensor_set")


def test_an_unknown_layout_is_an_error(monkeypatch):
    real = ggml.function

    def other(library, name):
        return (lambda tensor: 12345) if name == "ggml_get_data" else real(library, name)

    monkeypatch.setattr(ggml, "function", other)
    with pytest.raises(ModelError, match="its version is not known here"):
        ggml.find_layout(LIBRARY)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
