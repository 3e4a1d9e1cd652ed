"""Where a cluster's vector is cut: thin vectors are lowered until they steer, others and fixed thresholds stay."""

import pytest
import torch

from steermoe.discovery.cutting import cut, thinness, threshold_of
from steermoe.vectors.vector import SteeringVector

LAYERS, EXPERTS, HOT = 30, 18, (14, 15)


def hot_pair(ratio, own=0.32, reached=0, **fields) -> SteeringVector:
    """Two experts get a share `own` of every layer, `ratio` times their share of the corpus; in `reached` layers more.

    That is how a good cluster that is a third of its corpus looks: no expert can exceed the baseline three times by
    much, though the same two stand out everywhere.
    """
    frequency = torch.full((LAYERS, EXPERTS), (1 - 2 * own) / (EXPERTS - 2))
    frequency[:, HOT] = own
    ratios = torch.full((LAYERS, 1), float(ratio))
    ratios[:reached] = 3.2
    baseline = torch.zeros(LAYERS, EXPERTS)
    baseline[:, HOT] = (own / ratios).expand(-1, 2)
    others = [expert for expert in range(EXPERTS) if expert not in HOT]
    baseline[:, others] = ((1 - 2 * own / ratios) / (EXPERTS - 2)).expand(-1, EXPERTS - 2)
    fields = {"baseline": baseline, "relative": True} | fields
    return SteeringVector("game", frequency, tuple(range(LAYERS)), **fields)


def layers_of(vector) -> int:
    return int((vector.experts > 0).any(-1).sum())


def test_a_vector_that_reaches_one_layer_is_cut_lower():
    thin = hot_pair(2.3, reached=1)
    assert layers_of(thin) == 1
    found, remark = cut(thin, 0.16, adapt=True)
    assert layers_of(found) == LAYERS
    assert (found.threshold, found.relative) == (2.0, True)
    assert found.chosen()[LAYERS - 1].keys() == set(HOT)
    assert remark == (
        "cut at 2 x the baseline, since 3 x the baseline reaches 1 of 30 layers that set its texts apart; "
        "this reaches 30"
    )


@pytest.mark.parametrize(("ratio", "threshold"), [(2.8, 2.5), (2.1, 2.0), (1.7, 1.5)])
def test_the_highest_threshold_that_is_enough(ratio, threshold):
    found, _ = cut(hot_pair(ratio, reached=2), 0.2, adapt=True)
    assert found.threshold == threshold
    assert layers_of(found) == LAYERS


@pytest.mark.parametrize("reached", [15, 30])
def test_a_vector_that_reaches_half_of_the_layers_stays(reached):
    vector = hot_pair(2.3, reached=reached)
    assert cut(vector, 0.2, adapt=True) == (vector, "")


def test_a_threshold_that_was_asked_for_stays():
    thin = hot_pair(2.3, reached=1)
    assert cut(thin, 0.2, adapt=False) == (thin, "")


def test_nothing_above_the_baseline_is_cut_at_the_mean_as_before():
    found, remark = cut(hot_pair(2.3), 0.2, adapt=True)
    assert (found.threshold, found.relative, layers_of(found)) == (3.0, False, LAYERS)
    assert remark == "no expert's share exceeds 3 x the baseline; cut at 3 / 18 instead"


def test_a_cut_at_the_mean_that_misses_what_sets_the_texts_apart_is_lowered():
    vector = hot_pair(2.3, own=0.12)  # 2.2 / 18: not above 3 / 18
    found, remark = cut(vector, 0.2, adapt=True)
    assert (found.threshold, found.relative, layers_of(found)) == (2.0, True, LAYERS)
    assert "since 3 x the baseline reaches 0 of 30 layers" in remark
    absolute, _ = cut(hot_pair(2.3, own=0.12, relative=False), 0.2, adapt=True)
    assert (absolute.threshold, absolute.relative, layers_of(absolute)) == (2.0, False, LAYERS)


def test_texts_that_nothing_sets_apart_have_no_lower_cut():
    vector = hot_pair(1.2, own=0.12)
    found, remark = cut(vector, 0.5, adapt=True)
    assert found is None
    assert remark.startswith("no vector: no expert's share exceeds 3 x the baseline (with 50% of all texts it can't")


def test_a_warning_for_vectors_whose_threshold_stays():
    assert thinness(hot_pair(2.3, reached=1)) == (
        "it reaches 1 of 30 layers that set its texts apart, and may steer next to nothing: "
        "a --threshold below 3 reaches more"
    )
    assert thinness(hot_pair(2.3, reached=15)) == ""
    assert thinness(hot_pair(2.3, threshold=2.0)) == ""
    assert thinness(hot_pair(2.3, baseline=None, relative=False)) == ""


def test_threshold_of():
    assert threshold_of(hot_pair(2.0)) == "3 x the baseline"
    assert threshold_of(hot_pair(2.0, relative=False, threshold=1.5)) == "1.5 / 18"
