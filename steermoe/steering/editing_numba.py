"""Edit router logits on a CPU by kernels that numba compiles and keeps on disk.

Between two routers, a CPU reads weights that push everything else out of its caches. After that, each of torch's small
operations costs 15 microseconds, and an edit takes seven or more; this is one call. It does what `formulas` does, and
the tests hold it to that.

numba keeps kernels of other files that have these functions compiled in, and does not notice when this file changes:
after a change here, delete the __pycache__ folders.

Shapes: T tokens of a forward call, W columns of logits, N experts of a layer, P plans.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from steermoe.formulas import BAN_DEPTH, FLOAT32_EPS, FLOOR, FORCE_MARGIN, FORMULAS, LOWEST
from steermoe.steering.banks import Bank
from steermoe.steering.narrowing import narrowed

RAISED, FORCED, BANNED = 1, 2, 4
"""Bits of a plan's marks: where E > 0, and the experts to force and to ban."""
BFLOAT16_EPS = 2.0**-7
EDITED = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float32)}
"""The types that are edited as they are, and their precision."""
ADDITIVE, MAX_SCALED, ZERO_MAX_SCALED = (FORMULAS.index(name) for name in ("additive", "max_scaled", "zero_max_scaled"))


def marks_of(bank: Bank) -> NDArray[np.uint8]:
    """[P, N]: which experts are raised, forced and banned, as bits."""
    listed = ((bank.raised, RAISED), (bank.forced, FORCED), (bank.banned, BANNED))
    bits = [marks.numpy().astype(np.uint8) * np.uint8(bit) for marks, bit in listed]
    return bits[0] | bits[1] | bits[2]


class TokenPlans:
    """Which plan each token of a forward call follows.

    Args:
        plan_T: its number, int64.
        factor_T: the factor for its strength, float32; the logits of a token with factor 0 keep their bits.
    """

    def __init__(self, plan_T: NDArray[np.int64], factor_T: NDArray[np.float32]) -> None:
        self._kept = plan_T, factor_T
        self.places = _address(plan_T, np.int64), _address(factor_T, np.float32), len(plan_T)


class LayerEditor:
    """Edits the logits of one layer.

    Args:
        bank: its plans, on the CPU. `push` is read at each call, the marks only now and by `install`.
        formula_P: the number of each plan's formula in FORMULAS, for all layers.
        paper_P: whether its scale is `paper`, for all layers.
    """

    def __init__(self, bank: Bank, formula_P: NDArray[np.int64], paper_P: NDArray[np.bool_]) -> None:
        self._marks_PN, self._experts = marks_of(bank), bank.push.shape[1]
        self._kept = bank.push.numpy(), self._marks_PN, formula_P, paper_P
        places = map(_address, self._kept, (np.float32, np.uint8, np.int64, np.bool_))
        self._state = np.array([self._experts, *places], dtype=np.int64)
        self._place = _address(self._state, np.int64)

    def install(self, number: int, bank: Bank) -> None:
        """Take the marks of the plan with this number from another bank, which holds only that plan."""
        self._marks_PN[number] = marks_of(bank)[0]

    def edit(self, logits: Tensor, tokens: TokenPlans) -> Tensor:
        """Logits [T or more, W], computed in float32, as a new tensor of the same type.

        Rows beyond T and columns beyond N keep their bits.

        Raises:
            ValueError: fewer rows than T, or fewer columns than N.
        """
        rows, columns = logits.shape
        if rows < tokens.places[2] or columns < self._experts:
            raise ValueError(
                f"logits of shape {rows} x {columns} for {tokens.places[2]} tokens, {self._experts} experts"
            )
        dtype = logits.dtype
        if dtype in EDITED:
            steered = logits.clone(memory_format=torch.contiguous_format)
            _edit(steered.data_ptr(), columns, EDITED[dtype], self._place, *tokens.places)
            return steered
        steered = logits.to(torch.float32, memory_format=torch.contiguous_format)
        _edit(steered.data_ptr(), columns, torch.finfo(dtype).eps, self._place, *tokens.places)
        return narrowed(steered, dtype)


def _address(array: NDArray[Any], dtype: Any) -> int:
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"an array of {array.dtype}, expected a contiguous one of {np.dtype(dtype)}")
    return int(array.__array_interface__["data"][0])


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


@njit(types.void(*[types.int64] * 2, types.float64, *[types.int64] * 4), cache=True, error_model="numpy")
def _edit(logits, columns, eps, layer, plans, factors, tokens):
    """In place. Arguments are addresses: unpacking an array that Python passes costs more than steering it.

    The logits are bfloat16 if `eps` is its precision, else float32, whatever they are rounded to afterwards.
    """
    state = carray(pointer(layer), (5,), np.int64)
    experts = state[0]
    plan_T = carray(pointer(plans), (tokens,), np.int64)
    factor_T = carray(pointer(factors), (tokens,), np.float32)
    row_N = np.empty(experts, np.float32)
    for t in range(tokens):
        if factor_T[t] == 0:
            continue
        number = plan_T[t]
        push_N = carray(pointer(state[1] + 4 * number * experts), (experts,), np.float32)
        marks_N = carray(pointer(state[2] + number * experts), (experts,), np.uint8)
        formula = carray(pointer(state[3] + 8 * number), (1,), np.int64)[0]
        paper = carray(pointer(state[4] + number), (1,), np.uint8)[0] != 0
        if eps == BFLOAT16_EPS:
            z_N = carray(pointer(logits + 2 * t * columns), (experts,), np.uint16)
            widen(z_N, row_N)
            edit_row(row_N, push_N, marks_N, formula, paper, factor_T[t], eps)
            narrow(row_N, z_N)
        else:
            z_N = carray(pointer(logits + 4 * t * columns), (experts,), np.float32)
            edit_row(z_N, push_N, marks_N, formula, paper, factor_T[t], eps)
