"""Read the table in a pickle of pandas without unpickling it: nothing that the file names is imported or called.

A pickle is a program for a small stack machine. This runs the part of it that a table of numbers needs, and where the
program would call something, it only notes the name and the arguments (`Made`). Tables, columns and arrays are then
recognised by these notes. Whatever else the program asks for is an error. Time and memory are bounded by its length.

The notes are those of pandas 1.3 and newer, and of numpy 1 and 2, in the pickle protocols 2 to 5; with pandas 3 the
names of columns are in a buffer of pyarrow's.
"""

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from steermoe.errors import VectorError, quoted, reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_STEPS = 2**21
"""Of the program; the largest published table needs 30,000."""
MAX_COLUMNS = 1024
ROOMS = ("numpy", "pandas", "pyarrow")
"""Libraries whose names may be noted."""
OTHERS = (
    *("builtins.slice", "builtins.bytearray", "__builtin__.slice", "__builtin__.bytearray"),
    "_codecs.encode",
)
DTYPE = re.compile("[fiub][1248]")
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONSTANTS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
"""Steps that put what they carry on the stack."""
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error)
"""What a program that was changed makes the readers raise."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False, repr=False)
class Made:
    """Stands for what the program would have made.

    Attributes:
        name: of the function or class, such as "pandas.core.frame.DataFrame".
        args: what it would have been called with; None for the function or class itself.
        state: what the result would have been given afterwards.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


class _Refused(Exception):
    """The program asks for something that a table does not need."""


_MARK = object()


class _Machine:
    """Runs the program."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(CONSTANTS, self._push),
            **dict.fromkeys(VALUES, self._push),
            **{name: partial(self._push_empty, make) for name, make in EMPTY.items()},
            **{name: partial(self._tuple, size) for name, size in TUPLES.items()},
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._keep),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda place: self._push(self.memo[place])),
            "MEMOIZE": lambda _: self._keep(len(self.memo)),
            "MARK": lambda _: self._push(_MARK),
            "TUPLE": lambda _: self._push(tuple(self._marked())),
            "APPEND": lambda _: self._append([self._pop()]),
            "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set_items([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set_items(self._marked()),
            "GLOBAL": lambda names: self._named(*names.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._named(*[self._pop(), self._pop()][::-1]),
            "NEWOBJ": lambda _: self._call(),
            "REDUCE": lambda _: self._call(),
            "BUILD": lambda _: self._build(),
        }

    def run(self, content: bytes) -> Any:
        """What the program ends with."""
        for number, (step, value, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            if number >= MAX_STEPS:
                raise _Refused(f"more than {MAX_STEPS:,} steps")
            if step.name == "STOP":
                return self._pop()
            if step.name not in self._steps:
                raise _Refused(f"the step {step.name}")
            self._steps[step.name](VALUES.get(step.name, value))
        raise _Refused("no end")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_empty(self, make: Callable[[], Any], _: Any) -> None:
        self.stack.append(make())

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _Refused("a mark in the wrong place")
        return value

    def _keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def _marked(self) -> list[Any]:
        """What lies above the last mark."""
        values: list[Any] = []
        while self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def _tuple(self, size: int, _: Any) -> None:
        self._push(tuple([self._pop() for _ in range(size)][::-1]))

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _Refused("items of what is no list")
        target += values

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in values[::2]):
            raise _Refused("entries whose names are no text")
        target.update(zip(values[::2], values[1::2], strict=True))

    def _named(self, room: Any, name: Any) -> None:
        if not isinstance(room, str) or not isinstance(name, str):
            raise _Refused("a name that is no text")
        full = f"{room}.{name}"
        if full not in OTHERS and room.split(".")[0] not in ROOMS:
            raise _Refused(f"'{quoted(full)}'")
        self._push(Made(full))

    def _call(self) -> None:
        args, what = self._pop(), self._pop()
        if not isinstance(what, Made) or what.args is not None or not isinstance(args, tuple):
            raise _Refused("a call of what has no name")
        self._push(Made(what.name, args))

    def _build(self) -> None:
        state, target = self._pop(), self.stack[-1]
        if not isinstance(target, Made) or target.args is None:
            raise _Refused("a state for what has none")
        target.state = state


def read_table(name: str, content: bytes, columns: tuple[str, ...]) -> dict[str, "NDArray[Any]"]:
    """Columns of numbers out of a table that pandas pickled.

    Args:
        name: the file, for messages.
        content: its bytes.
        columns: the names of the columns.

    Returns:
        each one's numbers, [rows].

    Raises:
        VectorError: it is no such table, lacks a column, or asks for anything else.
    """
    try:
        table = _Machine().run(content)
    except _Refused as error:
        raise VectorError(
            f"'{name}' is a pickle that asks for {error}: expected a table of pandas and nothing else, which is read "
            "without running it; save it as CSV with the columns layer, expert and weight"
        ) from error
    except DAMAGE as error:
        raise VectorError(f"'{name}' is a damaged pickle ({reason(error, 200)}): get it again") from error
    try:
        found = _columns(table, columns)
    except (*DAMAGE, RecursionError) as error:
        raise VectorError(
            f"'{name}' is a pickle, but not of a table as pandas 1.3 and newer write it: save it again with such a "
            "pandas, or as CSV with the columns layer, expert and weight"
        ) from error
    if missing := [column for column in columns if column not in found]:
        raise VectorError(f"'{name}' has no column {missing[0]} of numbers: expected {', '.join(columns)}")
    return found


# ---- what the notes stand for; each raises if they stand for something else ----


def _made(value: Any, ending: str) -> Made:
    if not isinstance(value, Made) or not value.name.endswith(f".{ending}") or value.args is None:
        raise TypeError
    return value


def _columns(table: Any, wanted: tuple[str, ...]) -> dict[str, "NDArray[Any]"]:
    manager = _made(_made(table, "DataFrame").state["_mgr"], "BlockManager")
    assert manager.args is not None
    blocks, axes = manager.args
    if len(blocks) > MAX_COLUMNS:
        raise ValueError
    names = _names(axes[0])
    found: dict[str, NDArray[Any]] = {}
    for block in blocks:
        values, places, _ = _made(block, "_unpickle_block").args or ()
        numbers = _places(places)
        mine = {number: names[number] for number in numbers if names[number] in wanted}
        if not mine:
            continue
        if not isinstance(values, Made) or not values.name.endswith(("._frombuffer", "._reconstruct")):
            continue  # texts, or numbers with gaps
        matrix = _array(values)
        if matrix.ndim != 2 or len(matrix) != len(numbers):
            raise ValueError
        found |= {mine[number]: matrix[row] for row, number in enumerate(numbers) if number in mine}
    if len({len(column) for column in found.values()}) > 1:
        raise ValueError
    return found


def _places(value: Any) -> list[int]:
    """Which columns a block holds."""
    if isinstance(value, Made) and value.name.endswith(".slice"):
        start, stop, step = value.args or ()
        places = range(start, stop, step or 1)
        if len(places) > MAX_COLUMNS:
            raise ValueError
        return list(places)
    if isinstance(value, Made) and value.name.endswith(".BlockPlacement"):
        return _places((value.args or ())[0])
    return [int(place) for place in _array(value)[:MAX_COLUMNS]]


def _names(index: Any) -> list[str]:
    """The names of all columns."""
    _, fields = _made(index, "_new_Index").args or ()
    data = fields["data"]
    if isinstance(data, Made) and data.name.endswith(".ArrowStringArray"):
        return _arrow_texts(data.state["_pa_array"])
    if isinstance(data, Made) and data.name.split(".")[0] == "pandas":  # an array of texts around one of numpy's
        data = data.state["_ndarray"] if isinstance(data.state, dict) else data.state[1]
    names = _made(data, "_reconstruct").state[4]
    if not isinstance(names, list) or len(names) > MAX_COLUMNS or not all(isinstance(name, str) for name in names):
        raise ValueError
    return names


def _arrow_texts(array: Any) -> list[str]:
    """The texts of an array of pyarrow's, from the places where they begin and end in its buffer."""
    if isinstance(array, Made) and array.name.endswith(".chunked_array"):
        ((array,), *_) = array.args or ()
    ((kind, length, _, offset, buffers, *_),) = _made(array, "_restore_array").args or ()
    if not 0 < length <= MAX_COLUMNS or offset:
        raise ValueError
    _, ends, text = (
        b"" if buffer is None else _bytes((_made(buffer, "py_buffer").args or ())[0]) for buffer in buffers
    )
    is_large = (_made(kind, "type_for_alias").args or ())[0].startswith("large")
    places = struct.unpack_from(f"<{length + 1}{'q' if is_large else 'i'}", ends)
    if places[0] < 0 or places[-1] > len(text) or any(start > end for start, end in pairwise(places)):
        raise ValueError
    return [text[start:end].decode() for start, end in pairwise(places)]


def _bytes(value: Any) -> bytes:
    """Bytes as every protocol writes them: those before 3 have only text, those before 5 no bytearray."""
    if isinstance(value, Made) and value.name.endswith(".bytearray"):
        (value,) = value.args or (b"",)
    if isinstance(value, Made):
        text, encoding = _made(value, "encode").args or ()
        if encoding != "latin1":
            raise ValueError
        value = text.encode("latin1")
    if not isinstance(value, bytes | bytearray):
        raise TypeError
    return bytes(value)


def _array(value: Any) -> "NDArray[Any]":
    """An array of numbers, whose size must be that of its bytes."""
    import numpy as np

    if not isinstance(value, Made) or value.args is None:
        raise TypeError
    if value.name.endswith("._frombuffer"):
        content, dtype, shape, order = value.args
    else:
        _, shape, dtype, is_fortran, content = _made(value, "_reconstruct").state
        order = "F" if is_fortran else "C"
    content, kind = _bytes(content), _dtype(dtype)
    most = max(len(content), MAX_COLUMNS)  # an array without rows has no bytes
    if len(shape) not in (1, 2) or not all(type(size) is int and 0 <= size <= most for size in shape):
        raise ValueError
    if order not in ("C", "F"):
        raise ValueError
    if math.prod(shape) * kind.itemsize != len(content):
        raise ValueError
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _dtype(value: Any) -> Any:
    import numpy as np

    made = _made(value, "dtype")
    kind = (made.args or ("",))[0]
    if not isinstance(kind, str) or not DTYPE.fullmatch(kind):
        raise ValueError
    order = made.state[1] if isinstance(made.state, tuple) else "="
    if order not in ("<", ">", "=", "|"):
        raise ValueError
    return np.dtype(f"{order}{kind}")
