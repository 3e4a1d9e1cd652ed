"""Steering vectors: what follows from their frequencies, what is rejected, and mixtures."""

import numpy as np
import pytest
import torch

from steermoe.errors import CompatibilityError, VectorError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector, VectorInfo, format_layers

FREQUENCY = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1]])
BASELINE = torch.tensor([[0.7, 0.1, 0.05, 0.15], [0.1, 0.4, 0.3, 0.2]])


def vector(domain="sport", frequency=FREQUENCY, layers=(5, 6), **fields):
    return SteeringVector(domain, frequency, layers, **fields)


@pytest.mark.parametrize(
    ("threshold", "relative", "expected"),
    [
        (0.0, False, FREQUENCY.tolist()),
        (1.0, False, [[0.7, 0, 0, 0], [0.4, 0.4, 0, 0]]),
        (2.0, False, [[0.7, 0, 0, 0], [0, 0, 0, 0]]),  # mean 0.25: 0.4 is below 2 x 0.25
        (0.4, False, [[0.7, 0, 0, 0], [0.4, 0.4, 0, 0]]),  # 0.1 is exactly 0.4 x 0.25 and not above it
        (1.5, True, [[0, 0, 0.1, 0], [0.4, 0, 0, 0]]),
    ],
)
def test_experts_are_the_frequencies_above_the_threshold(threshold, relative, expected):
    cut = vector(baseline=BASELINE).with_threshold(threshold, relative)
    torch.testing.assert_close(cut.experts, torch.tensor(expected, dtype=torch.float32))


def test_paper_threshold_is_the_default():
    assert vector().threshold == 3
    assert not vector().experts.any()  # 3 x 0.25 is more than any of them


def test_weights_are_taken_as_they_are():
    weights = torch.tensor([[0.0, -2.0], [0.5, 0.0]])
    assert torch.equal(SteeringVector("mix", None, (0, 1), weights=weights).experts, weights)


@pytest.mark.parametrize("fields", [{}, {"relative": True}, {"threshold": 1e300}, {"weights": -FREQUENCY}])
def test_arrays_are_taken_as_tensors_are(fields):
    fields = {"frequency": FREQUENCY, "baseline": BASELINE, "threshold": 1.2, **fields}
    given = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    of_tensors, of_arrays = vector(**fields), vector(**given)
    assert of_arrays.expert_array.dtype == np.float32
    assert of_arrays.expert_array.tobytes() == of_tensors.experts.numpy().tobytes()
    assert torch.equal(of_arrays.experts, of_tensors.experts)
    assert of_arrays.largest == of_tensors.largest
    assert torch.equal(of_arrays.frequency, FREQUENCY)
    assert of_arrays.frequency is of_arrays.frequency


def test_shape_and_chosen_experts():
    chosen = vector(threshold=1.0).chosen()
    assert (vector().num_layers, vector().num_experts) == (2, 4)
    assert {layer: list(experts) for layer, experts in chosen.items()} == {5: [0], 6: [0, 1]}
    assert chosen[5][0] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frequency": None}, "neither frequencies nor weights"),
        ({"relative": True}, "store the corpus baseline"),
        ({"threshold": -1.0}, "threshold -1.0 must be a finite number"),
        ({"threshold": float("nan")}, "threshold nan must be"),
        ({"threshold": float("inf")}, "threshold inf must be"),
        ({"layers": (5,)}, r"shape \[2, 4\], expected 1 layers"),
        ({"layers": (6, 5)}, r"layers \(6, 5\) must be one or more, increasing"),
        ({"layers": (5, 5)}, "increasing"),
        ({"layers": (-1, 5)}, "from 0 on"),
        ({"layers": (), "frequency": torch.zeros(0, 4)}, "one or more"),
        ({"frequency": torch.ones(2, 1)}, r"shape \[2, 1\]"),
        ({"frequency": torch.ones(2)}, r"shape \[2\]"),
        ({"frequency": FREQUENCY * float("nan")}, "NaN or infinity"),
        ({"frequency": torch.tensor([[1.5, -0.5], [0.5, 0.5]])}, "contains -0.5, but frequencies are never negative"),
        ({"frequency": FREQUENCY * 2}, "row 0 of frequency sums to 2, expected 1"),
        ({"baseline": BASELINE * 0.5}, "row 0 of baseline sums to 0.5"),
        ({"baseline": torch.full((2, 2), 0.5)}, "different shapes"),
        ({"weights": torch.full((2, 4), float("inf"))}, "weights contains NaN or infinity"),
    ],
)
def test_invalid_fields_are_rejected(fields, message):
    with pytest.raises(VectorError, match=message) as error:
        vector(**fields)
    assert "sport" in str(error.value)


def test_a_mixture_has_no_frequencies_to_cut():
    with pytest.raises(VectorError, match="no frequencies to threshold"):
        mix([(vector(threshold=1.0), 0.5)]).with_threshold(1.0)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("title", 7, "text"),
        ("keywords", "team", "a tuple of texts"),
        ("keywords", (1,), "a tuple of texts"),
        ("top_k", 0, "a whole number over 0"),
        ("texts", 1.5, "a whole number over 0"),
        ("tokens", True, "a whole number over 0"),
        ("formula", "cubic", "additive or max_scaled or zero_max_scaled"),
        ("scale", "huge", "magnitude or paper"),
        ("strength", "4", "a finite number"),
        ("strength", float("nan"), "a finite number"),
        ("damage", float("inf"), "a finite number"),
        ("safe_range", (2.0, 1.0), "the smaller first"),
        ("safe_range", (1.0,), "two finite numbers"),
    ],
)
def test_info_of_the_wrong_kind_is_rejected(field, value, expected):
    with pytest.raises(VectorError, match=f"a vector's {field} is .*, expected .*{expected}"):
        VectorInfo(**{field: value})


def shape(name, layers, widths, architecture):
    routers = tuple(RouterShape(layer, width, width, 1) for layer, width in zip(layers, widths, strict=True))
    return RoutingShape(name, (architecture,) if architecture else (), routers)


@pytest.mark.parametrize(
    ("layers", "widths", "architecture", "message"),
    [
        ([5, 6, 7], [4, 4, 4], "", "'sport' has 2x4 experts, other has 3x4: it was built for tiny"),
        ([5, 6], [2, 2], "", "'sport' has 2x4 experts, other has 2x2"),
        ([5, 6], [4, 3], "", "'sport' has 2x4 experts, other has 2x3 or 4"),
        ([5, 6], [64, 64], "", "'sport' has 2x4 experts, other has 2x64"),
        ([5, 6], [5, 5], "", "'sport' has 2x4 experts, other has 2x5"),
        ([0, 1], [4, 4], "", "is for decoder layers 5-6, other has routers in 0-1"),
        ([5, 6], [4, 4], "qwen3_moe", "is for mixtral models, other is qwen3_moe"),
    ],
)
def test_a_foreign_model_is_rejected(layers, widths, architecture, message):
    sport = vector(info=VectorInfo(model="tiny", architecture="mixtral"))
    with pytest.raises(CompatibilityError, match=message) as error:
        sport.check_fits(shape("other", layers, widths, architecture))
    assert "steermoe vectors build" in str(error.value)


@pytest.mark.parametrize(("experts", "pruned"), [(128, 96), (64, 48), (256, 192)])
def test_a_vector_of_a_pruned_model_does_not_fit_the_full_one(experts, pruned):
    built = SteeringVector("sport", torch.full((2, pruned), 1 / pruned), (5, 6))
    with pytest.raises(CompatibilityError, match=f"2x{pruned} experts, full has 2x{experts}"):
        built.check_fits(shape("full", [5, 6], [experts] * 2, ""))
    built.check_fits(shape("pruned", [5, 6], [pruned] * 2, ""))


@pytest.mark.parametrize(("columns", "blanks", "fits"), [(4, 0, True), (6, 2, True), (4, 1, True), (6, 1, False)])
def test_columns_without_an_expert_may_be_left_out(columns, blanks, fits):
    """Such as longcat's zero experts, which the authors' matrices don't have."""
    routers = tuple(RouterShape(layer, columns, columns, 1, blanks) for layer in (5, 6))
    built, same = vector(info=VectorInfo(architecture="mixtral")), RoutingShape("same", ("mixtral",), routers)
    if fits:
        built.check_fits(same)
    else:
        with pytest.raises(CompatibilityError, match="2x4 experts, same has 2x6"):
            built.check_fits(same)


@pytest.mark.parametrize(
    ("layers", "text"), [((3,), "3"), ((3, 4, 5), "3-5"), ((0, 2, 4), "0, 2, 4"), ((0, 1, 3), "0, 1, 3")]
)
def test_layers_as_text(layers, text):
    assert format_layers(layers) == text


# ---- mixtures ----


def test_mixture_is_the_weighted_sum():
    sport, food = vector(threshold=1.0), vector("food", FREQUENCY.flip(1), threshold=1.0)
    mixed = mix([(sport, 0.5), (food, -2.0)])
    expected = [[0.35, 0, 0, -1.4], [0.2, 0.2, -0.8, -0.8]]
    torch.testing.assert_close(mixed.experts, torch.tensor(expected))
    assert (mixed.domain, mixed.layers) == ("sport+food", (5, 6))


def test_mixture_names_its_parts():
    sport = vector(info=VectorInfo(keywords=("team",), strength=4.0, formula="additive", model="tiny", top_k=2))
    food = vector("food", info=VectorInfo(keywords=("soup",), strength=1.0))
    mixed = mix([(sport, 0.5), (food, 1.0)])
    assert mixed.info.strength == pytest.approx((0.5 * 4 + 1.0 * 1) / 1.5)
    assert mix([(sport, 0.5), (sport, 0.25)]).info.strength == pytest.approx(8)  # as the larger part alone
    assert (mixed.info.keywords, mixed.info.formula, mixed.info.top_k) == (("team", "soup"), "additive", 2)
    assert mixed.info.title == "0.5 sport + 1 food"
    assert mix([(sport, 1.0), (food, -1.0)]).info.keywords == ("team",)  # domains steered away from give no keywords
    assert mix([(sport, 1.0), (vector("law"), 1.0)]).info.strength is None
    assert mixed.info.parts == ("sport=0.5", "food=1")


def test_mixture_sums_what_is_known_about_all_parts():
    sport = vector(info=VectorInfo(texts=3, tokens=40, licence="MIT"))
    food = vector("food", info=VectorInfo(texts=2, licence="MIT"))
    mixed = mix([(sport, 0.5), (food, 1.0)])
    assert (mixed.info.texts, mixed.info.tokens, mixed.info.licence) == (5, None, "MIT")
    assert mix([(sport, 0.5), (vector("law"), 1.0)]).info.licence == ""


def test_mixture_of_one():
    sport = vector(threshold=1.0, info=VectorInfo(strength=4.0))
    same = mix([(sport, 1.0)])
    assert same.domain == "sport"
    assert torch.equal(same.frequency, sport.frequency)
    assert mix([(sport, 1.0)], "mine").domain == "mine"
    assert torch.equal(mix([(sport, 0.5)]).experts, 0.5 * sport.experts)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], VectorError, "at least one"),
        ([(vector(), 0.0)], VectorError, "mixture sport=0 must be finite and not all 0"),
        ([(vector(), float("nan"))], VectorError, "sport=nan must be finite"),
        ([(vector(), float("inf")), (vector("food"), 1.0)], VectorError, "sport=inf, food=1"),
        ([(vector(), 1.0), (vector("food", layers=(0, 1)), 1.0)], CompatibilityError, "the model of 'sport'"),
        (
            [(vector(), 1.0), (vector("food", torch.full((2, 2), 0.5)), 1.0)],
            CompatibilityError,
            "'food' has 2 experts per layer, 'sport' has 4",
        ),
    ],
)
def test_invalid_mixtures(parts, error, message):
    with pytest.raises(error, match=message):
        mix(parts)
