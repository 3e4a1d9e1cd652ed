"""Memory and functions by their addresses, for compiled code."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from steermoe.steering.kernels import pointer


@intrinsic
def copy_tensor(typing: Any, function: Any, tensor: Any, memory: Any, size: Any) -> Any:
    """Call ggml_backend_tensor_get or _set: void (tensor, memory, offset 0, size)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word, word])
        target = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(target, [args[1], args[2], ir.Constant(word, 0), args[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def ask_host(typing: Any, function: Any, buffer: Any) -> Any:
    """Call ggml_backend_buffer_is_host: bool (buffer)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(8), [ir.IntType(64)])
        target = builder.inttoptr(args[0], kind.as_pointer())
        return builder.zext(builder.call(target, [args[1]]), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@njit(error_model="numpy")
def word(address):
    return carray(pointer(address), (1,), np.int64)[0]


@njit(error_model="numpy")
def half_word(address):
    return carray(pointer(address), (1,), np.int32)[0]
