"""Maps of a discovery: PNGs with matplotlib, and a page with hover texts with plotly. Needs the extra `discover`.

Shapes: B texts.
"""

import html
import itertools
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.discovery.discover import Discovery, most_common
from steermoe.errors import SteerMoEError
from steermoe.figures import drawable
from steermoe.files import atomic_path, why_not_written

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D00", "#332288", "#882255")
"""Distinct to colour-blind readers (Okabe and Ito 2008, and three darker ones). After the last, the shape changes."""
GREY = "#9a9a9a"
SHAPES = (("o", "circle"), ("^", "triangle-up"), ("s", "square"), ("D", "diamond"), ("P", "cross"), ("X", "x"))
"""Names in matplotlib and in plotly."""
DOTS_PER_INCH = 150
WEBGL_FROM = 2000
"""From this many points on the GPU draws them; as single SVG shapes they would stall the browser."""
EXCERPT, EXCERPT_WIDTH = 240, 60
"""Characters of a text in the hover (half as many if there are many points), and of one line of it."""
NO_CLUSTER, NO_SOURCE, OTHER_SOURCES = "in no cluster", "source unknown", "{} other sources"
SMALL_GROUP = 4
"""In lines of text: a group that is no higher has its name above it."""
FARTHEST_NAME = 3
"""In lines of text: how far a name moves up to find room."""
FEW_POINTS, MANY_POINTS = 300, 20_000
MOST_NAMED = 30
"""At most this many clusters or sources, the largest, are named in the legend, and on the map where there is room."""
LONGEST_NAME, TITLE_WIDTH = 28, 70
"""In characters: a longer name is cut, a longer title wraps."""

PLOTLY = {
    "displaylogo": False,
    "scrollZoom": True,
    # plotly's button "Share chart ..." would send the texts to its vendor
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d"],
}
"""The page's buttons."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>html, body, body > div {{ height: 100%; margin: 0; background: #fff; overflow: hidden; }}</style>
</head>
<body>
{figure}
</body>
</html>
"""


@dataclass(frozen=True, eq=False)
class Group:
    """Points of one colour and shape.

    Attributes:
        rows: its texts, ascending.
        style: number of its colour and shape; None for the rest, which is grey and small.
    """

    name: str
    rows: NDArray[np.int64]
    style: int | None

    @property
    def short(self) -> str:
        """Its name for maps and legends: short, and without control characters, which fonts lack."""
        name = drawable(self.name)
        if len(name) <= LONGEST_NAME:
            return name
        half = (LONGEST_NAME - 3) // 2
        return f"{name[:half]}...{name[-half:]}"  # paths and addresses often begin alike

    @property
    def colour(self) -> str:
        return GREY if self.style is None else COLOURS[self.style % len(COLOURS)]

    def shape(self, library: int) -> str:
        """The name of its shape in matplotlib (0) or plotly (1)."""
        return SHAPES[0 if self.style is None else self.style // len(COLOURS) % len(SHAPES)][library]


def cluster_groups(discovery: Discovery) -> list[Group]:
    """Noise first, so that it is drawn under the rest; then the clusters."""
    labels = discovery.clustering.labels
    found = [Group(c.name, np.flatnonzero(labels == c.number), c.number) for c in discovery.clusters]
    return [*_rest(NO_CLUSTER, np.flatnonzero(labels < 0)), *found]


def source_groups(discovery: Discovery) -> list[Group]:
    """Texts without a known label first; then the labels, the most frequent first. Empty if no label is known.

    A label looks like the cluster in which it is the most frequent, so that the two maps can be compared. If there are
    more labels than the eye can keep apart, the rarest are one group.
    """
    labels = np.array(discovery.embedded.labels, dtype=object)
    names = [name for name in most_common(discovery.embedded.labels) if name]
    styles: dict[str, int] = {}
    for cluster in discovery.clusters:
        if cluster.labels:
            styles.setdefault(next(iter(cluster.labels)), cluster.number)
    unused = (style for style in itertools.count() if style not in set(styles.values()))
    for name in names:
        if name not in styles:
            styles[name] = next(unused)
    found = [Group(name, np.flatnonzero(labels == name), styles[name]) for name in names[:MOST_NAMED]]
    if not names:
        return []
    rare = set(names[MOST_NAMED:])
    others = np.flatnonzero([label in rare for label in labels])
    unknown = _rest(NO_SOURCE, np.flatnonzero(labels == ""))
    return [*unknown, *_rest(OTHER_SOURCES.format(len(rare)), others), *found]


def _rest(name: str, rows: NDArray[np.int64]) -> list[Group]:
    return [Group(name, rows, None)] if len(rows) else []


# ---- PNG ----


def draw_map(discovery: Discovery, groups: Sequence[Group], title: str, path: Path) -> None:
    """Draw the map as a PNG, each group's name at the median of its points. The file is written whole or not at all.

    Raises:
        SteerMoEError: matplotlib is missing, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SteerMoEError(f"drawing needs matplotlib ({error}): pip install 'steermoe[discover]'") from error

    places_B2 = discovery.clustering.map_B2
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots()
    area = float(np.interp(len(places_B2), [FEW_POINTS, MANY_POINTS], [26, 3]))
    styled = [group for group in groups if group.style is not None]
    handles, labels = [], []
    for group in groups:
        x, y = places_B2[group.rows].T
        dots = axes.scatter(
            x,
            y,
            s=area if group.style is not None else area / 3,
            c=group.colour,
            marker=group.shape(0),
            linewidths=0,
            alpha=0.8 if group.style is not None else 0.5,
        )
        if group not in styled[MOST_NAMED:]:
            handles.append(dots)
            labels.append(f" {group.short} ({len(group.rows):,})")  # matplotlib hides what begins with an underscore
    axes.set_title("\n".join(textwrap.wrap(drawable(title), TITLE_WIDTH)), parse_math=False)
    axes.margins(0.1)  # room for names at the edges
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.spines[:].set_color("#cccccc")
    legend = figure.legend(
        handles,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        markerscale=max(1.0, (30 / area) ** 0.5),
        title=f"and {len(styled) - MOST_NAMED} smaller ones" if len(styled) > MOST_NAMED else None,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
        _name_places(axes, styled[:MOST_NAMED], places_B2)
        _save(figure, path)


def _name_places(axes: Any, groups: Sequence[Group], places_B2: NDArray[np.float32]) -> None:
    """Write each group's name where its points are; a name that would hide its points or another name moves up.

    A name without room near its points, or inside the frame, is in the legend only; larger groups come first.
    """
    from matplotlib.patheffects import withStroke

    taken: list[tuple[float, float, float]] = []
    figure = axes.figure
    figure.draw_without_rendering()  # the layout fixes the scale of data units to pixels
    line = 15 * figure.dpi / 72
    frame = axes.get_window_extent()
    spots = [(group, *_spot(axes.transData.transform(places_B2[group.rows]), line)) for group in groups]
    for group, x, lowest in sorted(spots, key=lambda spot: (-len(spot[0].rows), spot[2])):
        half = 0.3 * line * len(group.short) + 2
        x = min(max(x, frame.x0 + half), max(frame.x1 - half, frame.x0 + half))
        heights = (lowest + step * line / 2 for step in range(2 * FARTHEST_NAME + 1))
        y = next((y for y in heights if not _covers(taken, x, y, half, line)), None)
        if y is None or y + line / 2 > frame.y1:
            continue
        taken.append((x, y, half))
        axes.annotate(
            group.short,
            axes.transData.inverted().transform((x, y)),
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
            color="#222222",
            annotation_clip=False,
            parse_math=False,
            path_effects=[withStroke(linewidth=3, foreground="white", alpha=0.85)],
        )


def _covers(taken: Sequence[tuple[float, float, float]], x: float, y: float, half: float, line: float) -> bool:
    """Whether a name at (x, y) would cover one of those that are written already."""
    return any(abs(y - other_y) < line and abs(x - other_x) < half + other for other_x, other_y, other in taken)


def _spot(points: NDArray[np.float64], line: float) -> tuple[float, float]:
    """Where a group's name goes, in pixels: among its points, or above them if they are only a few lines high."""
    x, y = np.median(points, axis=0)
    top = float(points[:, 1].max())
    return float(x), float(y) if top - points[:, 1].min() > SMALL_GROUP * line else top + line


def _save(figure: Any, path: Path) -> None:
    try:
        with atomic_path(path) as partial:
            figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise SteerMoEError(
            f"can't write the picture '{path}': {why_not_written(error)}; name another folder"
        ) from error


# ---- page ----


def write_map(discovery: Discovery, title: str, path: Path) -> None:
    """Write the map as a page that works offline: hovering over a point shows its text.

    Raises:
        SteerMoEError: plotly is missing. OSError: the file can't be written.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise SteerMoEError(f"the map page needs plotly ({error}): pip install 'steermoe[discover]'") from error

    figure = go.Figure(layout=_layout(title))
    by_cluster, by_source = cluster_groups(discovery), source_groups(discovery)
    hovers = _hovers(discovery)
    for group in (*by_cluster, *by_source):
        figure.add_trace(_trace(group, discovery.clustering.map_B2, hovers))
    for trace in figure.data[len(by_cluster) :]:
        trace.visible = False
    if by_source:
        shown = [True] * len(by_cluster) + [False] * len(by_source)
        figure.update_layout(updatemenus=[_buttons(shown)])
    content = figure.to_html(include_plotlyjs=True, full_html=False, include_mathjax=False, config=PLOTLY)
    with atomic_path(path) as partial:
        partial.write_text(PAGE.format(title=html.escape(drawable(title)), figure=content), encoding="utf-8")


def _trace(group: Group, places_B2: NDArray[np.float32], hovers: Sequence[str]) -> Any:
    import plotly.graph_objects as go

    kind = go.Scattergl if len(places_B2) >= WEBGL_FROM else go.Scatter
    x, y = places_B2[group.rows].astype(float).round(3).T
    size = float(np.interp(len(places_B2), [FEW_POINTS, MANY_POINTS], [9, 4]))
    return kind(
        x=x.tolist(),  # as lists: plotly would write arrays in base64, which nobody can read or search
        y=y.tolist(),
        mode="markers",
        name=f"{_marked(group.short)} ({len(group.rows):,})",
        marker={
            "color": group.colour,
            "symbol": group.shape(1),
            "size": size if group.style is not None else 0.6 * size,
            "opacity": 0.8 if group.style is not None else 0.5,
        },
        hovertext=[hovers[row] for row in group.rows],
        hoverinfo="text",
    )


def _hovers(discovery: Discovery) -> list[str]:
    """What the hover shows of each text: id, cluster, source and its beginning, in plotly's subset of HTML."""
    hovers = []
    length = EXCERPT if len(discovery.embedded) < WEBGL_FROM else EXCERPT // 2  # 40,000 texts are 30 MB even then
    for text, label in zip(discovery.embedded.texts, discovery.clustering.labels, strict=True):
        lines = [
            f"<b>{_marked(text.id)}</b>",
            f"cluster: {_marked(discovery.name_of(int(label)) or NO_CLUSTER)}",
            *([f"source: {_marked(text.label)}"] if text.label else []),
            *map(_marked, textwrap.wrap(excerpt(text.text, length), EXCERPT_WIDTH)),
        ]
        hovers.append("<br>".join(lines))
    return hovers


def excerpt(text: str, length: int) -> str:
    """The beginning of a text on one line, cut between words if there are any."""
    beginning = " ".join(text[: 2 * length].split())
    if len(beginning) <= length:
        return beginning
    words, _, last = beginning[:length].rpartition(" ")
    return f"{words if words and len(last) < length / 4 else beginning[:length]} ..."


def _marked(text: str) -> str:
    """Text for plotly, escaped so that none of it is taken as HTML. Plotly knows no entity for quotes."""
    return html.escape(drawable(text), quote=False)


def _layout(title: str) -> dict[str, Any]:
    axis = {
        "showgrid": False,
        "zeroline": False,
        "showticklabels": False,
        "ticks": "",
        "linecolor": "#cccccc",
        "mirror": True,
    }
    return {
        "title": {"text": _marked(title), "x": 0.02, "xanchor": "left"},
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 40, "r": 20, "t": 70, "b": 40},
        "legend": {"itemsizing": "constant"},
        "hoverlabel": {"align": "left", "bgcolor": "#ffffff", "font": {"color": "#222222"}},
        "hovermode": "closest",
        "dragmode": "pan",
        "xaxis": {**axis, "title": {"text": "UMAP 1"}},
        "yaxis": {**axis, "title": {"text": "UMAP 2"}, "scaleanchor": "x"},
    }


def _buttons(shown: Sequence[bool]) -> dict[str, Any]:
    """Two buttons that show the clusters' traces or the sources'."""
    choices = (("colour by cluster", list(shown)), ("colour by source", [not is_shown for is_shown in shown]))
    return {
        "type": "buttons",
        "direction": "right",
        "x": 1.0,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "buttons": [
            {"label": label, "method": "restyle", "args": [{"visible": visible}]} for label, visible in choices
        ],
    }
