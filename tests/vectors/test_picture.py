"""The picture of a vector: what is drawn in it, and that it is written whole or not at all."""

import sys

import pytest
import torch

from steermoe import figures
from steermoe.errors import SteerMoEError
from steermoe.vectors import picture
from steermoe.vectors.vector import SteeringVector, VectorInfo

PNG = b"\x89PNG\r\n\x1a\n"


def panels(figure):
    """The axes that show a matrix, without the colour bar."""
    return [axes for axes in figure.axes if axes.images]


def test_frequencies_and_expert_vector(tmp_path, make_vector, drawn):
    vector = make_vector(layers=(2, 5, 7), info=VectorInfo(title="Sports", model="tiny"))
    picture.draw_vector(vector, tmp_path / "sport.png")
    (before, after) = panels(drawn[0])
    assert torch.equal(torch.tensor(before.images[0].get_array()), vector.frequency)
    assert torch.equal(torch.tensor(after.images[0].get_array()), vector.experts)
    assert before.images[0].get_clim() == after.images[0].get_clim() == (0, 0.5)
    assert (before.get_xlabel(), before.get_ylabel()) == ("expert", "layer")
    assert [label.get_text() for label in before.get_yticklabels()] == ["2", "5", "7"]
    assert drawn[0].get_suptitle() == "sport: Sports (tiny)"
    assert "above 3 / 8" in after.get_title()
    assert len(drawn[0].axes) == 3  # the third is the colour bar
    assert (tmp_path / "sport.png").read_bytes().startswith(PNG)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_mixture_has_one_panel_with_a_scale_around_zero(tmp_path, drawn):
    vector = SteeringVector("mix", None, (0, 1), weights=torch.tensor([[0.0, -0.5], [0.25, 0.0]]))
    picture.draw_vector(vector, tmp_path / "mix.png")
    (only,) = panels(drawn[0])
    assert only.images[0].get_clim() == (-0.5, 0.5)


@pytest.mark.parametrize(("layers", "experts", "rows"), [(15, 18, 1), (27, 64, 1), (58, 256, 2)])
def test_wide_matrices_are_stacked(tmp_path, make_vector, drawn, layers, experts, rows):
    picture.draw_vector(make_vector(layers=range(layers), experts=experts), tmp_path / "x.png")
    first, second = panels(drawn[0])
    is_below = second.get_position().y1 <= first.get_position().y0
    assert is_below == (rows == 2)
    assert len(first.get_yticks()) <= figures.MAX_TICKS


@pytest.mark.parametrize("title", ["$x_{", "a\nb\x1b[31m", "体育", "100% \\alpha"])
def test_any_title_can_be_drawn(tmp_path, make_vector, drawn, title):
    picture.draw_vector(make_vector(info=VectorInfo(title=title)), tmp_path / "x.png")
    assert "\x1b" not in drawn[0].get_suptitle()
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_an_empty_expert_vector_can_be_drawn(tmp_path, make_vector, drawn):
    picture.draw_vector(make_vector().with_threshold(100), tmp_path / "x.png")
    assert len(panels(drawn[0])) == 2


def test_a_missing_folder(tmp_path, make_vector):
    pytest.importorskip("matplotlib")
    with pytest.raises(SteerMoEError, match=r"can't write the picture .*No such file or directory"):
        picture.draw_vector(make_vector(), tmp_path / "none" / "x.png")


def test_matplotlib_is_missing(tmp_path, make_vector, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SteerMoEError, match=r"pip install 'steermoe\[plot\]'"):
        picture.draw_vector(make_vector(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
