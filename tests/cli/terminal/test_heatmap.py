"""The map of a vector in a terminal: each cell where and as dark as it should be, at any width."""

import pytest
import torch

from steermoe.cli.terminal import heatmap
from steermoe.vectors.vector import SteeringVector, VectorInfo


def lines_of(vector: SteeringVector, width: int = 80, ascii_only: bool = False) -> list[str]:
    return heatmap.draw(vector, width, ascii_only).plain.split("\n")


def weighted(*rows: list[float], **fields) -> SteeringVector:
    return SteeringVector("mix", None, tuple(range(10, 10 + len(rows))), weights=torch.tensor(rows), **fields)


def wide(experts: int, layers: int = 2) -> SteeringVector:
    """The last expert of each layer has half of it all."""
    frequency = torch.full((layers, experts), 0.5 / (experts - 1))
    frequency[:, -1] = 0.5
    return SteeringVector("wide", frequency, tuple(range(layers)))


def test_whole_picture():
    vector = weighted([0.0, 0.1, 0.15, 0.25, 0.35, 0.5, -1.0, 0.0], [0.0] * 8)
    assert lines_of(vector, 20) == [
        "layer 0   4",
        "   10 ·░░▒▓█▽·",
        "   11 ········",
        "· 0   ░ to 0.2   ▒ to 0.3   ▓ to 0.4   █ to 0.5   ▽ below 0",
        "6 of 16 experts are in the vector",
    ]


def test_ascii():
    vector = weighted([0.0, 0.1, 0.15, 0.25, 0.35, 0.5, -1.0, 0.0])
    assert lines_of(vector, 20, ascii_only=True)[1] == "   10 .::*%#-."
    assert "".join(lines_of(vector, 20, ascii_only=True)).isascii()


def test_colours_follow_the_levels():
    text = heatmap.draw(weighted([0.0, 0.1, 0.5]), 12)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.end - span.start == 1}
    assert (styles["░"], styles["█"]) == ("cyan", "red")


@pytest.mark.parametrize(
    ("experts", "width", "cells", "share"),
    [
        (8, 80, 16, 1),
        (37, 80, 74, 1),
        (38, 80, 38, 1),
        (64, 80, 64, 1),
        (64, 160, 128, 1),
        (128, 80, 64, 2),
        (256, 80, 64, 4),
    ],
)
def test_width(experts, width, cells, share):
    lines = lines_of(wide(experts), width)
    assert all(len(line) <= width for line in lines)
    assert [len(line) for line in lines[1:3]] == [6 + cells] * 2
    assert all(line.endswith("█") for line in lines[1:3])  # the largest survives folding
    assert (f"each column shows the largest of {share} neighbours" in lines[-1]) == (share > 1)


def test_a_very_narrow_terminal_still_gets_a_map():
    assert lines_of(wide(256), 1)[1].endswith("█")


@pytest.mark.parametrize("experts", [8, 18, 64, 100, 128, 256, 384])
@pytest.mark.parametrize("width", [80, 160])
def test_scale_numbers_stand_above_their_experts(experts, width):
    lines = lines_of(wide(experts), width)
    cell = 2 if 2 * experts <= width - 6 else 1
    share = -(-experts // (width - 6))
    numbers = [int(number) for number in lines[0].split()[1:]]
    assert numbers[0] == 0
    assert len(numbers) > 1
    for number in numbers:
        column = 6 + number // share * cell
        assert lines[0][column:].startswith(str(number))


def test_rows_are_named_by_decoder_layer():
    vector = SteeringVector("x", torch.full((3, 2), 0.5), (3, 27, 100))
    assert [line.split()[0] for line in lines_of(vector)[1:4]] == ["3", "27", "100"]


@pytest.mark.parametrize(
    ("vector", "legend"),
    [
        (wide(20).with_threshold(1.5), "· up to 1.5/20 = 0.075   █ to 0.5"),
        (wide(20).with_threshold(11), "· up to 11/20 = 0.55"),
        (
            SteeringVector("x", wide(20).frequency, (0, 1), 1.1, torch.full((2, 20), 0.05), relative=True),
            "· up to 1.1 x the baseline   █ to 0.5",
        ),
        (weighted([0.0, 0.5]), "· 0   █ to 0.5"),
    ],
)
def test_legend(vector, legend):
    assert legend in lines_of(vector)


def test_legend_knows_the_largest_frequency():
    vector = weighted([0.0, 0.5], info=VectorInfo(top_k=4))
    assert lines_of(vector)[-1] == "1 of 2 experts is in the vector; no frequency exceeds 1/k = 0.25"
