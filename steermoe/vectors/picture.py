"""Pictures of steering vectors. Needs the extra `plot`."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.figures import MAX_TICKS, drawable, figure_class, save

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.vectors.vector import SteeringVector

TITLE_WIDTH = 90
"""Characters after which a title wraps."""


def draw_vector(vector: "SteeringVector", path: Path) -> None:
    """Draw the frequencies before the threshold and the expert vector E after it, as Fig. 5 of Shchukin (2024), as PNG.

    A vector without frequencies, such as a mixture, gets one panel. The file is written whole or not at all.

    Raises:
        SteerMoEError: matplotlib is missing, or the file can't be written.
    """
    Figure = figure_class()
    panels: list[tuple[str, Tensor]] = [(f"expert vector E, {_cut(vector)}", vector.experts)]
    if vector.frequency is not None:
        panels.insert(0, ("frequency F, before the threshold", vector.frequency))
    are_wide = vector.num_experts > 3 * vector.num_layers
    rows, columns = (len(panels), 1) if are_wide else (1, len(panels))
    figure = Figure(figsize=(10.5, 3 * rows + 1) if are_wide else (5.2 * columns + 1, 5.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    largest = max(float(matrix.abs().max()) for _, matrix in panels) or 1.0
    lowest = -largest if bool((vector.experts < 0).any()) else 0.0
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(
            matrix.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if lowest else "viridis",
            vmin=lowest,
            vmax=largest,
        )
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
        axis.label_outer()
        every = -(-vector.num_layers // MAX_TICKS)
        axis.set_yticks(range(0, vector.num_layers, every), [str(layer) for layer in vector.layers[::every]])
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(
        image, ax=figure.axes, label="weight" if vector.weights is not None else "share of the layer's choices"
    )
    figure.suptitle(_title(vector), parse_math=False)
    save(figure, path)


def _cut(vector: "SteeringVector") -> str:
    if vector.weights is not None:
        return "as given"
    return f"above {vector.threshold:g} {'x the baseline' if vector.relative else f'/ {vector.num_experts}'}"


def _title(vector: "SteeringVector") -> str:
    title = f"{vector.domain}: {vector.info.title}" if vector.info.title else vector.domain
    title = f"{title} ({vector.info.model})" if vector.info.model else title
    plain = drawable(title)
    return "\n".join(textwrap.wrap(plain, TITLE_WIDTH))
