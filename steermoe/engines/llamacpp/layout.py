"""ggml's own functions through ctypes, and the layout of its tensors, found from tensors that ggml makes.

The callback reads and writes tensors by address. Their layout is not part of ggml's interface and changes between
versions, so it is looked up at run time. Knows no models; `engine` passes in the library.
"""

import ctypes
import struct
from typing import Any

from steermoe.engines.llamacpp.callback import TensorLayout
from steermoe.errors import ModelError

F32 = 0
"""GGML_TYPE_F32."""
NAME = b"ffn_moe_layout"
ROWS, COLUMNS = 7, 5
MEMORY, ALIGNMENT = 1 << 20, 64
MARK_FUNCTION, MARK_DATA = 0x1122334455667788, 0x1020304050607080
"""Numbers that are unlikely to appear anywhere else."""


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (ctypes.c_void_p, [_InitParams]),
    "ggml_free": (None, [ctypes.c_void_p]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_new_tensor_2d": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_set_name": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "ggml_get_data": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_soft_max": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_sigmoid": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]),
    "ggml_map_custom1": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p],
    ),
}


def function(library: ctypes.CDLL, name: str) -> Any:
    """A function of ggml, ready to be called.

    Raises:
        ModelError: the library has no function of that name.
    """
    try:
        found = getattr(library, name)
    except AttributeError as error:
        raise ModelError(
            f"this llama.cpp has no {name}: install a llama-cpp-python that steermoe was tested with"
        ) from error
    if name in SIGNATURES:
        found.restype, found.argtypes = SIGNATURES[name]
    return found


def address(library: ctypes.CDLL, name: str) -> int:
    """The address of a ggml function."""
    return ctypes.cast(function(library, name), ctypes.c_void_p).value or 0


def find_layout(library: ctypes.CDLL) -> TensorLayout:
    """Make a few tensors and find where ggml put their known values.

    Raises:
        ModelError: a value is not where tensors of any known version have it.
    """
    room = ctypes.create_string_buffer(MEMORY + ALIGNMENT)  # zeros: leftovers in used memory could look like an address
    start = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    context = function(library, "ggml_init")(_InitParams(MEMORY, start, False))
    if not context:
        raise ModelError("ggml could not be started: out of memory?")
    try:
        return _find_in(library, context)
    finally:
        function(library, "ggml_free")(context)


def _find_in(library: ctypes.CDLL, context: int) -> TensorLayout:
    size = function(library, "ggml_tensor_overhead")()
    tensor = function(library, "ggml_new_tensor_2d")(context, F32, ROWS, COLUMNS)
    function(library, "ggml_set_name")(tensor, NAME)
    data = function(library, "ggml_get_data")(tensor)
    softmax = function(library, "ggml_soft_max")(context, tensor)
    sigmoid = function(library, "ggml_sigmoid")(context, tensor)
    custom = function(library, "ggml_map_custom1")(context, tensor, MARK_FUNCTION, 1, MARK_DATA)

    def content(of: int) -> bytes:
        return bytes((ctypes.c_char * size).from_address(of))

    def place(what: str, of: int, *wanted: int) -> int:
        pattern = struct.pack(f"={len(wanted)}Q", *wanted)
        there = content(of)
        if there.count(pattern) != 1:
            raise ModelError(f"this ggml's tensors do not have {what} where they should: its version is not known here")
        return there.find(pattern)

    def number(of: int, offset: int) -> int:
        return ctypes.c_int32.from_address(of + offset).value

    name = content(tensor).find(NAME)
    ne = place("sizes", tensor, ROWS, COLUMNS, 1, 1)
    nb = place("strides", tensor, 4, 4 * ROWS, 4 * ROWS * COLUMNS, 4 * ROWS * COLUMNS)
    params = place("parameters", custom, MARK_FUNCTION)
    op = params - 4
    if name < 0 or name % 8 or place("parameters", custom, MARK_DATA) != params + 16 or op < nb + 32:
        raise ModelError("names or operations are elsewhere in this ggml's tensors: its version is not known here")
    return TensorLayout(
        name=name,
        op=op,
        op_params=params,
        src=place("sources", softmax, tensor),
        data=place("data", tensor, data),
        ne=ne,
        nb=nb,
        buffer=ne - 8,
        op_custom=number(custom, op),
        op_softmax=number(softmax, op),
        op_unary=number(sigmoid, op),
        unary_sigmoid=number(sigmoid, params),
    )
