"""Pictures of steering vectors and of routing load. matplotlib comes with the extra `plot`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import SteerMoEError
from steermoe.library import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.discovery.health import RoutingHealth
    from steermoe.vectors import SteeringVector

DOTS_PER_INCH = 150
MAX_TICKS = 24
LEAST_LOAD = 1e-9
"""Below every load but 0, so that only experts that are never used get the colour of what lies under the scale."""


def draw_vector(vector: "SteeringVector", path: Path) -> None:
    """Draw frequencies before the threshold and the expert vector E after it, as Fig. 5 of Shchukin (2024), into a PNG.

    A vector without frequencies, such as a mixture, makes one panel. The file appears complete or not at all.

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


def draw_health(health: "RoutingHealth", path: Path) -> None:
    """Draw each layer's load as a heat map, N f with balance in the middle, and beside it loss and evenness.

    Experts that are never used are black; grey is where a layer has fewer experts than others.

    Raises:
        SteerMoEError: matplotlib is missing, or the file can't be written.
    """
    Figure = figure_class()
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    numbers = [layer.layer for layer in health.layers]
    experts = max(len(layer.load) for layer in health.layers)
    load = [
        [len(layer.load) * f for f in layer.load] + [float("nan")] * (experts - len(layer.load))
        for layer in health.layers
    ]
    size = 9 + min(experts, 256) / 32, 4.5 + min(len(numbers), 64) / 30
    figure = Figure(figsize=size, layout="constrained")
    heat, loss, even = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1, 1))
    largest = max(2.0, *(layer.max_to_mean for layer in health.layers))
    image = heat.imshow(
        load,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["RdBu_r"].with_extremes(under="black", bad="lightgrey"),
        norm=TwoSlopeNorm(1.0, vmin=LEAST_LOAD, vmax=largest),
    )
    bar = figure.colorbar(image, ax=heat, extend="min", label="load, as a multiple of balance (black: never used)")
    ticks = [LEAST_LOAD, 0.5, 1.0, *(float(tick) for tick in bar.get_ticks() if 1.2 < tick <= largest)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" if tick > LEAST_LOAD else "0" for tick in ticks])
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    heat.xaxis.get_major_locator().set_params(integer=True)
    every = -(-len(numbers) // MAX_TICKS)
    rows = range(len(numbers))
    heat.set_yticks(rows[::every], [str(number) for number in numbers[::every]])
    loss.barh(rows, [layer.balance_loss for layer in health.layers], color="#4477aa")
    loss.axvline(1.0, color="black", linewidth=0.8)
    loss.set_xlabel("balance loss\n(1 = balanced)")
    even.barh(rows, [layer.evenness for layer in health.layers], color="#228833")
    even.set_xlim(0, 1)
    even.set_xlabel("entropy / log N\n(1 = balanced)")
    title = f"{health.model}: {health.tokens:,} tokens of {health.texts:,} texts"
    figure.suptitle("".join(char if char.isprintable() else " " for char in title), parse_math=False)
    save(figure, path)


def check_matplotlib() -> None:
    """Refuse before long work whose picture could not be drawn.

    Raises:
        SteerMoEError: matplotlib is missing.
    """
    figure_class()


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SteerMoEError(f"drawing needs matplotlib ({error}): pip install 'steermoe[plot]'") from error
    return Figure


def _cut(vector: "SteeringVector") -> str:
    if vector.weights is not None:
        return "as given"
    return f"above {vector.threshold:g} {'x the baseline' if vector.relative else f'/ {vector.num_experts}'}"


def _title(vector: "SteeringVector") -> str:
    title = f"{vector.domain}: {vector.info.title}" if vector.info.title else vector.domain
    title = f"{title} ({vector.info.model})" if vector.info.model else title
    return "".join(char if char.isprintable() else " " for char in title)


def save(figure: Any, path: Path) -> None:
    import warnings

    try:
        with warnings.catch_warnings(), atomic_path(path) as partial:
            warnings.filterwarnings("ignore", message="Glyph")  # a title in a script that the font lacks gets boxes
            figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise SteerMoEError(f"can't write the picture '{path}': {error.strerror}; name another file") from error
