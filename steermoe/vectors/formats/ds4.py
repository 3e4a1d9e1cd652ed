"""ds4's maps for DeepSeek V4: which of 43 x 256 experts to promote (above 0) and to suppress (below 0).

The shape is that of `dir-steering/tools/build_expert_steering.py` in github.com/antirez/ds4, which writes two files:
NAME.f32, 43 x 256 numbers of float32, little-endian, layer by layer, without a header; and NAME.json with "format":
"ds4-expert-steering-v1", "shape" and, for each layer, the experts to activate and to deactivate. ds4 puts the score of
a promoted expert above the largest one and that of a suppressed one below the smallest, as SteerMoE does.
"""

from typing import Any

from steermoe.errors import VectorError, shown
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.formats.cells import Cells, toggled
from steermoe.vectors.formats.content import whole_number

LAYERS, EXPERTS = 43, 256
BYTES = 4 * LAYERS * EXPERTS
FORMAT = "ds4-expert-steering-v1"


def read_ds4(name: str, content: bytes, shape: RoutingShape | None = None) -> Cells:
    """The experts of a .f32 file.

    Maps whose numbers are all 1, 0 or -1, as ds4 builds them, steer as in ds4; other numbers become weights.

    Args:
        name: the file, for messages.
        content: its bytes.
        shape: the model that it is for, if it may have other sizes than DeepSeek V4 Flash.

    Raises:
        VectorError: another size.
    """
    import numpy as np

    layers, experts = LAYERS, EXPERTS
    if shape is not None and len(content) != BYTES:
        layers, experts = shape.layers[-1] + 1, shape.num_experts
    if len(content) != 4 * layers * experts:
        raise VectorError(
            f"'{name}' has {len(content)} bytes, expected {4 * layers * experts}: {layers} x {experts} numbers of "
            "float32, as of ds4"
        )
    matrix = np.frombuffer(content, "<f4").reshape(layers, experts)
    places = [(int(layer), int(expert)) for layer, expert in zip(*np.nonzero(matrix), strict=True)]
    weights = {place: float(matrix[place]) for place in places}
    if all(weight in (1.0, -1.0) for weight in weights.values()):
        cells = toggled(_lists(weights, 1.0), _lists(weights, -1.0))
        return Cells(cells.weights, tuple(range(layers)), experts, formula=cells.formula, strength=cells.strength)
    return Cells(weights, tuple(range(layers)), experts)


def _lists(weights: dict[tuple[int, int], float], wanted: float) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for (layer, expert), weight in weights.items():
        if weight == wanted:
            found.setdefault(layer, []).append(expert)
    return found


def is_report(content: Any) -> bool:
    """Whether JSON is what ds4 writes beside a map."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_ds4_report(name: str, content: Any) -> Cells:
    """The experts of the JSON beside a .f32 file.

    Raises:
        VectorError: it has another shape.
    """
    if not is_report(content):
        raise VectorError(f'\'{name}\' is not a report of ds4: expected "format": "{FORMAT}"')
    size, report = content.get("shape"), content.get("layer_report")
    if not (isinstance(size, list) and len(size) == 2 and isinstance(report, list) and report):
        raise VectorError(f"'{name}': expected a shape [{LAYERS}, {EXPERTS}] and a layer_report, as of ds4")
    layers, experts = (whole_number(name, number, "a number of its shape") for number in size)
    lists: dict[str, dict[int, list[int]]] = {"activate": {}, "deactivate": {}}
    for entry in report:
        if not isinstance(entry, dict):
            raise VectorError(f"'{name}': an entry of layer_report is {shown(entry)}, expected an object")
        layer = whole_number(name, entry.get("layer"), "a layer")
        if layer in lists["activate"]:
            raise VectorError(f"'{name}': layer {layer} is there twice in layer_report, expected each once: keep one")
        for kind, found in lists.items():
            listed = entry.get(kind, [])
            if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
                raise VectorError(f"'{name}': {kind} of layer {layer} is {shown(listed)}, expected a list of experts")
            found[layer] = [whole_number(name, one.get("expert"), f"an expert of layer {layer}") for one in listed]
    cells = toggled(lists["activate"], lists["deactivate"])
    if layers > 2**16:
        raise VectorError(f"'{name}' has a shape of {layers} layers, expected {LAYERS}")
    return Cells(cells.weights, tuple(range(layers)), experts, formula=cells.formula, strength=cells.strength)
