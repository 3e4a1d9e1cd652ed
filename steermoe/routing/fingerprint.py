"""The fingerprint of a checkpoint's routers: which checkpoint a vector was built for, whatever that is called.

It is the same for every copy that holds the same gates, in float32 or bfloat16, as a folder or a GGUF file, loaded or
not: of each gate, 256 numbers are rounded to bfloat16 and hashed. Knows no kinds of files; imports no torch.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO

RUN, RUNS = 16, 16
"""Numbers that lie side by side, and how many such runs are spread over a gate: few places to read on a disk."""
DIGITS = 16
"""Hexadecimal digits of a fingerprint."""
FORMATS = {"F32": "f", "F16": "e", "BF16": "H"}
"""The types of numbers that are read from files, as struct's; bfloat16, which it lacks, is half of a float32."""
TINY = 111 << 23
"""Smaller numbers, below 2**-16, count as 0: below 2**-17 float16 rounds those of bfloat16."""


def starts(count: int) -> tuple[int, ...]:
    """Where the runs of a gate of `count` numbers begin, evenly spread from its first number to its last."""
    if count <= RUN * RUNS:
        return tuple(range(0, count, RUN))
    return tuple(number * (count - RUN) // (RUNS - 1) for number in range(RUNS))


def places(count: int) -> tuple[int, ...]:
    """The places of all numbers that are hashed, of `count` in a gate."""
    return tuple(place for start in starts(count) for place in range(start, min(start + RUN, count)))


def read_numbers(file: BinaryIO, kind: str, count: int, start: int) -> list[float]:
    """The numbers at the `places` of a gate in a file.

    Args:
        file: open; only the runs are read.
        kind: type of the numbers, one of `FORMATS`.
        count: how many the gate has.
        start: its first byte.

    Raises:
        KeyError: another type. struct.error: the file is cut off.
    """
    form, numbers = FORMATS[kind], []
    size = struct.calcsize(form)
    for first in starts(count):
        length = min(RUN, count - first)
        file.seek(start + first * size)
        found = struct.unpack(f"<{length}{form}", file.read(length * size))
        if kind == "BF16":
            found = struct.unpack(f"<{length}f", struct.pack(f"<{length}I", *(bits << 16 for bits in found)))
        numbers += found
    return numbers


def fingerprint(gates: Iterable[tuple[tuple[int, int], Sequence[float]]]) -> str:
    """The fingerprint of a model: 16 hexadecimal digits; "" if it has no gates.

    Args:
        gates: in the order of the layers, the shape [N, H] of each gate and the numbers at its `places`.
    """
    digest, count = hashlib.sha256(), 0
    for shape, numbers in gates:
        count += 1
        digest.update(f"{shape[0]}x{shape[1]}".encode())
        digest.update(_bfloat16(numbers))
    return digest.hexdigest()[:DIGITS] if count else ""


def _bfloat16(numbers: Sequence[float]) -> bytes:
    """Numbers as bfloat16, rounded to the nearest as torch does, ties to even; tiny ones are 0."""
    bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *numbers))
    rounded = (0 if one & 0x7FFFFFFF < TINY else (one + 0x7FFF + (one >> 16 & 1)) >> 16 & 0xFFFF for one in bits)
    return struct.pack(f"<{len(numbers)}H", *rounded)
