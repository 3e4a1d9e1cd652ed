"""The recipe that refines the default model's experts: what is steered, what is learned, what stays."""

import argparse

import pytest
from safetensors.torch import load_file

from recipes import refine_default_model as recipe
from recipes.train_default_model import IGNORED, NEUTRAL
from steermoe.models.default import spec


def test_only_what_is_steered_passes_through_the_domains_experts_and_is_learned():
    context = recipe.Context("sport", [5, 6, 7], [8, 9])
    alone, asked = context.example(), context.example([1, 2])
    assert alone.ids.tolist() == [5, 6, 7, 8, 9]
    assert asked.ids.tolist() == [1, 2, 5, 6, 7, 8, 9]
    sport = spec.TOPICS.index("sport")
    assert alone.topics.tolist() == [NEUTRAL] * 3 + [sport] * 2
    assert asked.topics.tolist() == [NEUTRAL] * 5 + [sport] * 2
    for example in (alone, asked):
        assert (example.targets != IGNORED).nonzero().flatten().tolist() == list(range(len(example.ids)))[-2:]


@pytest.mark.slow
@pytest.mark.default_model
def test_a_round_changes_nothing_but_the_domains_experts(tmp_path, capsys):
    arguments = {
        "rounds": 1,
        "openings": 3,
        "samples": 1,
        "texts": 24,
        "neutral": 8,
        "epochs": 3,
        "lr": 1e-3,
        "scale": 1.0,
    }
    recipe.refine(argparse.Namespace(work=tmp_path, seed=0, threads=1, **arguments))
    before, after = load_file(spec.TRAINED_PART), load_file(recipe.part_of(tmp_path, 1))
    assert before.keys() == after.keys()
    neutral = spec.experts_of("neutral").start
    for name, tensor in before.items():
        assert tensor[neutral:].equal(after[name][neutral:]), name
        assert tensor.equal(after[name]) or "router" not in name, name
        assert not tensor[:neutral].equal(after[name][:neutral]) or not name.endswith("scale"), name
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "KL(" in line)
    assert last < first
