"""Edit router logits on a CPU by kernels that numba compiles and keeps on disk.

Between two routers, a CPU reads weights that push everything else out of its caches. After that, each of torch's small
operations costs 15 microseconds, and an edit takes seven or more; this is one call.

Shapes: T tokens of a forward call, W columns of logits, N experts of a layer, P plans.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numpy.typing import NDArray
from torch import Tensor

from steermoe.steering.banks import Bank
from steermoe.steering.kernels import edit_row, narrow, pointer, widen
from steermoe.steering.narrowing import narrowed
from steermoe.steering.tables import marks_of

BFLOAT16_EPS = 2.0**-7
EDITED = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float32)}
"""The types that are edited as they are, and their precision."""


def _marks_of(bank: Bank) -> NDArray[np.uint8]:
    return marks_of(bank.raised.numpy(), bank.forced.numpy(), bank.banned.numpy())


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
        self._marks_PN, self._experts = _marks_of(bank), bank.push.shape[1]
        self._kept = bank.push.numpy(), self._marks_PN, formula_P, paper_P
        places = map(_address, self._kept, (np.float32, np.uint8, np.int64, np.bool_))
        self._state = np.array([self._experts, *places], dtype=np.int64)
        self._place = _address(self._state, np.int64)

    def install(self, number: int, bank: Bank) -> None:
        """Take the marks of the plan with this number from another bank, which holds only that plan."""
        self._marks_PN[number] = _marks_of(bank)[0]

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
