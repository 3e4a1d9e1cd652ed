"""Published models at their true numbers of layers, experts and choices: steered as computed by hand, else untouched.

Most bring their own code, which is re-created in `tests/support/remote_code/` and loaded from a checkpoint.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steermoe import SteeringVector, VectorInfo, attach, find_routers, plan_for, record_routing, steer
from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.models.loading import LoadedModel
from steermoe.routing.routers import Router
from tests.support import published
from tests.support.limits import within
from tests.support.published import PUBLISHED, Published
from tests.support.remote_modules import keep_modules_in

TOLERANCE = 1e-4
"""Float noise."""
ROUNDED = 0.9
"""Share of choices that agree where logits are bfloat16, of which many tie."""
STRENGTH = 2.0
FORCED, BANNED = (3,), (0, 1, 5, 60)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of its own for the code of checkpoints, which transformers copies."""
    with pytest.MonkeyPatch.context() as patch:
        keep_modules_in(tmp_path_factory.mktemp("modules"), patch)
        yield


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model with its routers, some inputs, and its output for them without steering."""

    published: Published
    loaded: LoadedModel
    model: nn.Module
    routers: list[Router]
    inputs: Tensor
    plain: Tensor

    @property
    def vector(self) -> SteeringVector:
        """In each layer, two experts with different weights, other ones than in the layer before."""
        weights = torch.zeros(len(self.routers), self.published.experts)
        for row in range(len(weights)):
            weights[row, (7 * row + 1) % self.published.experts] = 0.5
            weights[row, (7 * row + 5) % self.published.experts] = 0.3
        layers = tuple(router.layer for router in self.routers)
        return SteeringVector("test", None, layers, weights=weights, info=VectorInfo(formula="additive"))


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, modules: None) -> Case:
    model = PUBLISHED[request.param]
    loaded = published.load(model, tmp_path_factory.mktemp("tiny") / model.name)
    inputs = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(1))
    return Case(model, loaded, loaded.model, find_routers(loaded.model), inputs, run_once(loaded.model, inputs))


@torch.no_grad()
def run_once(model: Any, inputs: Tensor) -> Tensor:
    return model(inputs, use_cache=False).logits


# ---- a router by hand ----


def route(model: Published, module: Any, hidden: Tensor, expert_vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a router does with its own weights after an additive edit: its logits, and the experts and their weights."""
    gate = getattr(module, "classifier", module).weight
    flat = hidden.flatten(0, -2)
    logits = flat.float() @ gate.float().T if model.wide_logits else flat @ gate.T
    logits = logits + STRENGTH * expert_vector.to(logits.dtype)
    scores = logits.softmax(-1) if model.scoring == "softmax" else 1 / (1 + (-logits).exp())
    bias = getattr(module, "e_score_correction_bias", torch.zeros(model.experts))
    order = (scores + bias).sort(-1, descending=True).indices
    chosen = order[:, : model.top_k]
    weights = torch.stack([row[places] for row, places in zip(scores, chosen, strict=True)])
    if model.normalises:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, chosen, weights * model.scale


@contextmanager
def by_hand(case: Case, model: nn.Module, vector: SteeringVector) -> Iterator[list[Tensor]]:
    """Replaces the routers; yields what each of them chose, filled while the model runs."""
    chosen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        for router, expert_vector in zip(case.routers, vector.experts, strict=True):
            module = model.get_submodule(router.name)

            def forward(hidden: Tensor, module: Any = module, expert_vector: Tensor = expert_vector) -> Any:
                logits, experts, weights = route(case.published, module, hidden, expert_vector)
                chosen.append(experts)
                if case.published.router == "MoEGate":  # indices first, without logits
                    return (experts, weights, None) if case.published.code == "gigachat" else (experts, weights)
                return logits, weights, experts

            patch.setattr(module, "forward", forward)
        yield chosen


def counts_of(case: Case, chosen: list[Tensor]) -> Tensor:
    """[B, L, N]."""
    rows = [nn.functional.one_hot(experts, case.published.experts).sum(1) for experts in chosen]
    return torch.stack([row.view(*case.inputs.shape, -1).sum(1) for row in rows], 1)


# ---- tests ----


def test_routers_are_the_published_ones(case: Case) -> None:
    model = case.published
    assert [router.layer for router in case.routers] == list(model.layers)
    assert {type(router.module).__name__ for router in case.routers} == {model.router}
    shapes = {(router.num_experts, router.width, router.top_k, router.blanks) for router in case.routers}
    assert shapes == {(model.experts, model.experts, model.top_k, model.blanks)}
    assert type(case.model).__name__ == model.config["architectures"][0]
    assert type(case.model).__module__.startswith("transformers_modules" if model.code else "transformers.models")


@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_describes_the_whole_model_without_weights(name: str, tmp_path: Path, run: Any, modules: None) -> None:
    """With the widths of the published model, so that the number of its parameters shows that all sizes are right."""
    model = PUBLISHED[name]
    folder = published.write_config(model, tmp_path / name)
    trust = ["--trust-remote-code"] * bool(model.code)
    with within(20, 2 << 30):
        code, out, err = run("models", "inspect", folder, *trust, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    parameters, memory, cache = (record.pop(name) for name in ("parameters", "memory", "cache_per_1000_tokens"))
    assert abs(parameters / 1e9 / model.parameters - 1) < 0.01
    assert memory["float32"] == 2 * memory["bfloat16"] >= 4 * parameters  # transformers gives longcat's blanks rows too
    assert memory["bfloat16"] > memory["int8"] > parameters
    assert cache == (2 * 2 * 28 * 8 * 128 * 1000 if name == "GigaChat-20B-A3B-instruct" else None)  # others' is latent
    assert record == {
        "name": name,
        "baked": None,
        "compiled_steps": [],
        "architecture": model.config["model_type"],
        "model_class": model.config["architectures"][0],
        "layers": model.config.get("num_hidden_layers", 2 * model.config.get("num_layers", 0)),
        "moe_layers": list(model.layers),
        "experts": [model.experts],
        "top_k": [model.top_k],
        "scoring": model.scoring,
        "shared_experts": model.shared_experts,
        "router_class": model.router,
        "steerable": True,
        "reason": "its routers' logits are changed before top-k",
        "fingerprint": "",
        "tokenizer": False,
        "chat_template": False,
        "think_tags": None,
        "vectors": [],
        "next": "",
    }


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.code])
@pytest.mark.parametrize("command", [("models", "inspect"), ("generate", "The dog", "--model")], ids="-".join)
def test_own_code_needs_consent(name: str, command: tuple[str, ...], tmp_path: Path, run: Any) -> None:
    folder = published.write_tiny(PUBLISHED[name], tmp_path / name)
    code, out, err = run(*command, folder)
    assert (code, out) == (1, "")
    assert err == f"steermoe: '{name}' brings its own model code: pass --trust-remote-code if you trust it\n"


def test_steering_equals_routing_by_hand(case: Case) -> None:
    with by_hand(case, case.model, case.vector) as chosen:
        expected = run_once(case.model, case.inputs)
    plan = plan_for(case.vector, STRENGTH, positions="all")
    with record_routing(case.model) as record, steer(case.model, rows=[plan, plan]) as handle:
        steered = run_once(case.model, case.inputs)
        handle.verify()
    assert record.counts is not None
    assert torch.equal(record.counts, counts_of(case, chosen))
    assert (steered - case.plain).abs().max() > 100 * (steered - expected).abs().max()
    torch.testing.assert_close(steered, expected, rtol=0, atol=TOLERANCE)


def test_what_is_not_steered_stays_the_same_to_the_bit(case: Case) -> None:
    with steer(case.model, case.vector, 0.0, positions="all"):
        assert torch.equal(run_once(case.model, case.inputs), case.plain)
    handle = attach(case.model, plan_for(case.vector, STRENGTH, positions="all"))
    assert not torch.equal(run_once(case.model, case.inputs), case.plain)
    handle.remove()
    assert torch.equal(run_once(case.model, case.inputs), case.plain)


def test_bfloat16_weights_are_steered_in_the_published_dtype_of_logits(case: Case) -> None:
    """float32 logits from bfloat16 weights where the model's code says so: rounded ones would choose others."""
    model = copy.deepcopy(case.model).bfloat16()
    with by_hand(case, model, case.vector) as chosen:
        run_once(model, case.inputs)
    with record_routing(model) as record, steer(model, case.vector, STRENGTH, positions="all"):
        run_once(model, case.inputs)
    assert record.counts is not None
    first = counts_of(case, chosen)[:, 0]  # of inputs that are the same to the bit
    same = torch.minimum(record.counts[:, 0], first).sum() / first.sum()
    assert same == 1 if case.published.wide_logits else same > ROUNDED


@contextmanager
def adverse_biases(case: Case) -> Iterator[None]:
    """Correction biases, where there are any, that favour the banned experts and disfavour the forced ones."""
    before = copy.deepcopy(case.model.state_dict())
    for name, tensor in [*case.model.named_parameters(), *case.model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data[list(FORCED)], tensor.data[list(BANNED)] = -8.0, 8.0
    yield
    case.model.load_state_dict(before)


@pytest.mark.parametrize("strength", [None, 25.0])
def test_lists_hold_whatever_the_biases(case: Case, strength: float | None) -> None:
    force, ban = ([(router.layer, n) for router in case.routers for n in experts] for experts in (FORCED, BANNED))
    vector = None if strength is None else case.vector
    with (
        adverse_biases(case),
        record_routing(case.model) as record,
        steer(case.model, vector, strength, force=tuple(force), ban=tuple(ban), positions="all") as handle,
    ):
        output = run_once(case.model, case.inputs)
        report = handle.report()
        handle.verify()
    assert output.isfinite().all()
    assert record.counts is not None
    assert record.counts[:, :, FORCED].eq(case.inputs.shape[1]).all()
    assert record.counts[:, :, BANNED].eq(0).all()
    places = case.inputs.numel() * len(case.routers)
    assert (report.forced_hits, report.forced_places) == (places, places)
    assert (report.banned_hits, report.banned_places) == (0, places * len(BANNED))


# ---- texts ----

PROMPTS = ("The dog ran", "A cat", "It rains")
GREEDY = Sampling(6, min_new_tokens=6, do_sample=False)


def test_engine_writes_the_texts_that_the_model_writes(case: Case) -> None:
    """Also in batches: each text depends on nothing but its own tokens."""
    engine = HFEngine(case.loaded, compiled=False)
    requests = [Request(prompt, None, GREEDY) for prompt in PROMPTS]
    ids = [engine.encode(request) for request in requests]
    expected = []
    for prompt in ids:
        tokens = torch.tensor([prompt])
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        written = case.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)  # type: ignore[operator]
        expected.append(tuple(written[0, len(prompt) :].tolist()))
    assert [done.token_ids for done in engine.generate(requests)] == expected
    rolling = complete(engine.decoder(2), requests, ids)
    assert [done.token_ids for done in rolling] == expected
