"""SteerMoE's rankings: how much more often each expert is chosen for one behaviour than for another.

The shape is that of `activations/*.pkl` in github.com/adobe-research/SteerMoE (2509.09660), as its notebooks write it:
a table of pandas with a row for each expert and, among others, the columns `layer`, `expert` and `risk_diff`, sorted by
`risk_diff_abs`. Layers are numbered in the order of the model's routers.
"""

from steermoe.errors import VectorError
from steermoe.vectors.formats.cells import Cells
from steermoe.vectors.formats.pickles import read_table
from steermoe.vectors.vector import MAX_EXPERTS, MAX_LAYERS

COLUMNS = ("layer", "expert", "risk_diff")


def read_ranking(name: str, content: bytes) -> Cells:
    """The risk differences of a pickled ranking; the pickle is read, never run.

    Args:
        name: the file, for messages.
        content: its bytes.

    Raises:
        VectorError: it is something else, or does not hold one number for each expert of each layer.
    """
    columns = read_table(name, content, COLUMNS)
    layers, experts = (columns[column].tolist() for column in COLUMNS[:2])
    for column, numbers, end in (("layer", layers, MAX_LAYERS), ("expert", experts, MAX_EXPERTS)):
        if wrong := [number for number in numbers if not 0 <= number < end or number != int(number)]:
            raise VectorError(
                f"'{name}': its column {column} has {wrong[0]}, expected whole numbers from 0 to {end - 1}"
            )
    places = [(int(layer), int(expert)) for layer, expert in zip(layers, experts, strict=True)]
    weights = dict(zip(places, map(float, columns[COLUMNS[2]].tolist()), strict=True))
    size = 1 + max((expert for _, expert in places), default=-1)
    rows = sorted({layer for layer, _ in places})
    if not places or len(weights) != len(places) or len(places) != len(rows) * size:
        raise VectorError(
            f"'{name}' has {len(places)} rows for {len(rows)} layers, expected one for each of {size} experts of each"
        )
    return Cells(weights, tuple(rows), size, by_router=True)
