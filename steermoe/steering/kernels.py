"""Edit the logits of one token on a CPU, by kernels that numba compiles into others. Imports no torch.

They do what `formulas` does, and the tests hold them to that.

numba keeps kernels of other files that have these functions compiled in, and does not notice when this file changes:
after a change here, delete the __pycache__ folders.

Shapes: N experts of a layer.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from steermoe.formulas import BAN_DEPTH, FLOAT32_EPS, FLOOR, FORCE_MARGIN, FORMULAS, LOWEST
from steermoe.steering.tables import BANNED, FORCED, RAISED

ADDITIVE, MAX_SCALED, ZERO_MAX_SCALED = (FORMULAS.index(name) for name in ("additive", "max_scaled", "zero_max_scaled"))


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """The address as a pointer, for carray."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(cache=True, error_model="numpy")
def edit_row(z_N, push_N, marks_N, formula, paper, factor, eps=FLOAT32_EPS):
    """Steer one token's logits in place, as `steermoe.formulas` does.

    Args:
        z_N: logits, float32.
        push_N: c E, float32.
        marks_N: RAISED, FORCED and BANNED, uint8.
        formula: its number in FORMULAS.
        paper: whether the scale is `paper` and not `magnitude`.
        factor: multiplies the push.
        eps: the precision of the type that the logits are rounded to afterwards.
    """
    largest = np.float32(-np.inf)
    listed = np.uint8(0)
    for n in range(len(z_N)):
        largest = max(largest, z_N[n])
        listed |= marks_N[n]
    scale = largest if paper else abs(largest)
    top, some_sank = np.float32(-np.inf), False
    for n in range(len(z_N)):
        push, before = push_N[n] * factor, z_N[n]
        if formula == ADDITIVE:
            z_N[n] += push
        elif formula == MAX_SCALED:
            z_N[n] += scale * push
        else:
            steered = (np.float32(0) if marks_N[n] & RAISED else z_N[n]) + scale * push
            if not paper and push < 0:
                steered = min(steered, z_N[n])
            z_N[n] = steered
        top = max(top, z_N[n])
        some_sank |= z_N[n] < np.float32(FLOOR) and z_N[n] < before
    if top < np.float32(LOWEST) and top < largest:
        for n in range(len(z_N)):
            z_N[n] = (z_N[n] - top) + np.float32(LOWEST)
    if some_sank:
        for n in range(len(z_N)):
            if z_N[n] < np.float32(FLOOR):
                z_N[n] = np.float32(FLOOR)
    if listed & FORCED:
        top = z_N.max()
        top += max(np.float32(FORCE_MARGIN), abs(top) * np.float32(eps))
        for n in range(len(z_N)):
            if marks_N[n] & FORCED:
                z_N[n] = top
    if listed & BANNED:
        bottom = z_N.min()
        bottom -= max(np.float32(FORCE_MARGIN), abs(bottom) * np.float32(eps))
        bottom = min(bottom, z_N.max() - np.float32(BAN_DEPTH))
        for n in range(len(z_N)):
            if marks_N[n] & BANNED:
                z_N[n] = bottom


@njit(cache=True, error_model="numpy")
def widen(bits_N, z_N):
    """Bits of bfloat16 to float32."""
    wide_N = z_N.view(np.uint32)
    for n in range(len(z_N)):
        wide_N[n] = np.uint32(bits_N[n]) << np.uint32(16)


@njit(cache=True, error_model="numpy")
def narrow(z_N, bits_N):
    """float32 to bits of bfloat16, rounded to the nearest, ties to even."""
    wide_N = z_N.view(np.uint32)
    for n in range(len(z_N)):
        half = np.uint32(0x7FFF) + ((wide_N[n] >> np.uint32(16)) & np.uint32(1))
        bits_N[n] = np.uint32(0x7FC0) if np.isnan(z_N[n]) else (wide_N[n] + half) >> np.uint32(16)
