"""Lists of experts where a router's choice alone does not decide which experts run; `test_conformance.py` has the rest.

Shapes: B rows, S tokens of a row, N experts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from steermoe import attach, find_routers, plan_for, steer
from steermoe.errors import SteeringError
from steermoe.routing.routers import Router
from tests.support.tiny_models import build, run, tokens

CAPACITY = 2
"""How many tokens of a row an expert takes; others are dropped."""


def block_of(model: Any, router: Router) -> Any:
    return model.get_submodule(router.name.rpartition(".")[0])


@pytest.mark.parametrize("lists", [{"force": (3,)}, {"ban": (3,)}], ids=str)
def test_lists_that_decide_nothing_are_refused(lists: dict[str, tuple[int, ...]]) -> None:
    model = build("nllb_moe")
    (layer, *_) = (router.layer for router in find_routers(model))
    plan = plan_for(None, positions="all", **{name: ((layer, *experts),) for name, experts in lists.items()})
    with pytest.raises(SteeringError, match=rf"layer {layer} can't be forced or banned: transformers runs experts 0"):
        attach(model, plan)


def test_the_family_that_is_refused_still_runs_two_experts() -> None:
    model, ran = build("nllb_moe"), set()
    for router in find_routers(model):
        for name, expert in block_of(model, router).experts.items():
            expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    run(model, tokens(model, rows=2))
    assert ran == {"expert_0", "expert_1"}, "transformers has mended NLLB-MoE: take it out of NO_LISTS"


@pytest.fixture(scope="module")
def switch() -> Any:
    """A model whose experts soon are full."""
    model = build("switch_transformers")
    for router in find_routers(model):
        router.module.expert_capacity = CAPACITY
    return model


def run_marks(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Which experts each layer runs for which token, bool [B, S, N], and the model's output."""
    found, hooks = [], []
    rows, length = inputs["input_ids"].shape
    for router in find_routers(model):

        def keep(_: Any, args: tuple[Tensor, ...]) -> None:
            found.append(args[1].bool().view(rows, length, -1))

        hooks.append(block_of(model, router).experts.register_forward_pre_hook(keep))
    output = run(model, inputs)
    for hook in hooks:
        hook.remove()
    return found, output


@pytest.mark.parametrize("beside", [(), (None,)], ids=["alone", "beside an unsteered row"])
def test_a_forced_expert_runs_for_every_token_of_a_long_row(switch: Any, beside: tuple[None, ...]) -> None:
    inputs = tokens(switch, rows=1 + len(beside))
    plain, usual = run_marks(switch, inputs)
    assert any(not bool(marks.any(-1).all()) for marks in plain), "some token must be dropped, or this shows nothing"
    force = tuple((router.layer, 3) for router in find_routers(switch))
    with steer(switch, rows=[plan_for(None, force=force, positions="all"), *beside]) as handle:
        steered, output = run_marks(switch, inputs)
    for marks, before in zip(steered, plain, strict=True):
        assert bool(marks[0, :, 3].all())
        assert int(marks[0].sum()) == len(marks[0])
        assert torch.equal(marks[1:], before[1:])
    torch.testing.assert_close(output[1:], usual[1:], rtol=0, atol=1e-5)
    report = handle.report()
    assert report.forced_hits == report.forced_places == inputs["input_ids"].shape[1] * len(steered)


def test_bans_leave_the_capacity_as_it_is(switch: Any) -> None:
    inputs = tokens(switch, rows=2)
    ban = tuple((router.layer, expert) for router in find_routers(switch) for expert in (0, 1, 2))
    with steer(switch, ban=ban, positions="all"):
        steered, _ = run_marks(switch, inputs)
    for marks in steered:
        assert not bool(marks[..., :3].any())
        assert int(marks.sum(1).max()) == CAPACITY


def test_a_router_that_drops_tokens_in_another_way_is_an_error() -> None:
    model = build("mixtral")
    for router in find_routers(model):
        router.module.expert_capacity = CAPACITY
    with (
        pytest.raises(SteeringError, match=r"drops tokens from experts that are full in a way that steermoe does not"),
        steer(model, force=((0, 3),), positions="all"),
    ):
        run(model, tokens(model))
