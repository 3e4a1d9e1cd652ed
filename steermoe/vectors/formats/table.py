"""A plain table: one line per expert, with the columns layer, expert and weight, separated by commas."""

import csv
import io
import re

from steermoe.errors import VectorError, shown
from steermoe.vectors.formats.cells import Cells
from steermoe.vectors.formats.content import whole_number
from steermoe.vectors.vector import SteeringVector

COLUMNS = ("layer", "expert", "weight")
HEADER = re.compile(r"\s*\"?layer\"?\s*[,;\t]", re.IGNORECASE)
MAX_LINES = 2**21


def read_csv(name: str, text: str) -> Cells:
    """The weights of a table; its first line names the columns, of which it may have others too.

    If it has a line for each expert of each layer, it says itself how many there are, unless a model does.

    Args:
        name: the file, for messages.
        text: its content; semicolons or tabs may take the place of commas.

    Raises:
        VectorError: a column is missing, a line does not hold its numbers, or two lines are about one expert.
    """
    first = text.lstrip().split("\n", 1)[0]
    sign = next((sign for sign in (",", ";", "\t") if sign in first), ",")
    rows = csv.reader(io.StringIO(text.lstrip()), delimiter=sign)
    weights: dict[tuple[int, int], float] = {}
    try:
        names = [cell.strip().lower() for cell in next(rows, [])]
        if missing := [column for column in COLUMNS if column not in names]:
            raise VectorError(
                f"'{name}' has no column {missing[0]}: its first line is {shown(first)}, expected {','.join(COLUMNS)}"
            )
        if twice := [column for column in COLUMNS if names.count(column) > 1]:
            raise VectorError(f"'{name}' has several columns {twice[0]}, expected {','.join(COLUMNS)}: keep one")
        places = [names.index(column) for column in COLUMNS]
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            line = f"line {rows.line_num}"
            if len(row) <= max(places):
                raise VectorError(
                    f"'{name}', {line}: {shown(sign.join(row))} lacks cells, expected {','.join(COLUMNS)}"
                )
            layer, expert = (
                whole_number(name, row[place].strip(), f"{line}, the {what}")
                for what, place in zip(COLUMNS[:2], places[:2], strict=True)
            )
            if (layer, expert) in weights:
                raise VectorError(f"'{name}', {line}: expert {expert} of layer {layer} is there twice: keep one line")
            weights[layer, expert] = _weight(name, line, row[places[2]])
            if len(weights) > MAX_LINES:
                raise VectorError(
                    f"'{name}' has more than {MAX_LINES:,} lines, which no model has: it is something else"
                )
    except csv.Error as error:
        raise VectorError(f"'{name}', line {rows.line_num} is not a line of CSV ({error})") from error
    if not weights:
        raise VectorError(f"'{name}' has no lines below its first one: expected one per expert")
    layers = {layer for layer, _ in weights}
    experts = 1 + max(expert for _, expert in weights)
    return Cells(weights, experts=experts if len(weights) == len(layers) * experts else None, is_guess=True)


def _weight(name: str, line: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise VectorError(
            f"'{name}', {line}: weight {shown(text)} is not a number, expected one such as 0.5"
        ) from error


def write_csv(vector: SteeringVector) -> bytes:
    """The table of a vector, with a line for each expert of each layer."""
    lines = [",".join(COLUMNS)]
    for layer, row in zip(vector.layers, vector.experts.tolist(), strict=True):
        lines += [f"{layer},{expert},{weight!r}" for expert, weight in enumerate(row)]
    return ("\n".join(lines) + "\n").encode()
