"""Every family of the installed transformers, tiny and random: steered as the formulas say, else untouched.

Then the routers that transformers does not have: remote code, quantised and wrapped gates, kernels that bypass them.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from steermoe import (
    SteeringPlan,
    SteeringVector,
    VectorInfo,
    attach,
    find_routers,
    list_families,
    plan_for,
    record_routing,
    steer,
)
from steermoe.errors import SteeringError, UnsupportedModel
from steermoe.formulas import FORMULAS, SCALES, Formula, Scale
from steermoe.routing.families import UNKNOWN_REASON, Family
from steermoe.routing.routers import Router
from steermoe.steering.handle import SteeringHandle
from tests.support.tiny_models import (
    CORRECTION,
    EXPERTS,
    FIRST_WORD,
    HIDDEN,
    TOP_K,
    MoEGate,
    StandInBlock,
    build,
    run,
    stand_in,
    tokens,
)

FAMILIES = {family.family: family for family in list_families()}
STEERABLE = [family.family for family in FAMILIES.values() if family.steerable]
NOT_STEERABLE = {"doge": "product keys"}
"""Families that can't be steered, with part of the reason; a new one fails the tests until somebody looks at it."""
NOT_TEXT = {"vitpose_backbone": "experts for kinds of bodies in images"}
"""Families whose configuration mentions experts, but which generate no text."""

STRENGTH = 4.0
NEW_TOKENS = 5
SPECIAL_TOKENS = list(range(FIRST_WORD))
PROMPT = 5
"""Tokens of the prompt where a test sets the prompt length itself."""
TOLERANCE = 1e-4
"""Float noise. Outputs are about 1, steering changes them by 0.05 to 5, two ways to one result differ by up to 2e-5."""

MORE_THAN_EXPERTS_COMPETE = {"longcat_flash": 2, "zaya": 1}
"""Columns that compete with the experts for a place in the top-k: experts that do nothing, and a skip of the layer."""
CALLS_NO_GATE = {"longcat_flash": "reads its classifier's weight without calling the classifier"}
INDICES_UNSEEN = {
    "jetmoe": "sorts the tokens by expert before it passes them on",
    "nllb_moe": "passes a mask of first choices (which transformers 5.23 reads as indices: only experts 0 and 1 run)",
    "llama4": "passes every token to every expert, times 0 where it was not chosen",
    "zaya": "passes the tokens that skip a layer to expert 0, times 0",
}
"""Families whose experts are not given the indices that the router chose: these can't be checked from outside."""
LISTS_REFUSED = {"nllb_moe": "runs experts 0 and 1, whatever its router chooses"}
"""Families in which no expert can be forced or banned (`test_selection.py`)."""
NO_CACHE = {"openai_privacy_filter": "classifies tokens, reading both ways"}
KINDS = {
    "mixtral": "softmax, then top-k",
    "gpt_oss": "a bias on the logits; top-k, then softmax",
    "deepseek_v3": "sigmoid, correction bias, groups",
    "hunyuan_v1_moe": "a linear layer inside the router",
    "llama4": "the router is a linear layer",
    "dbrx": "the router returns only logits",
    "jetmoe": "the router sorts tokens",
    "inkling": "columns that do not compete",
    "longcat_flash": "experts that do nothing",
    "zaya": "a small network in front of the logits",
    "switch_transformers": "encoder and decoder",
}
"""One family for each kind of router, to test all formulas on."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its routers, some inputs, and its output for them without steering."""

    family: str
    model: nn.Module
    routers: list[Router]
    inputs: dict[str, Tensor]
    plain: Tensor

    @classmethod
    def of(cls, model: nn.Module, family: str = "") -> "Case":
        inputs = tokens(model, rows=2)
        return cls(family, model, find_routers(model), inputs, run(model, inputs))

    @property
    def vector(self) -> SteeringVector:
        """Two experts per layer, with different weights, and different ones in each layer."""
        weights = torch.zeros(len(self.routers), EXPERTS)
        for row in range(len(weights)):
            weights[row, (1 + row) % EXPERTS] = 0.5
            weights[row, (5 + 2 * row) % EXPERTS] = 0.3
        info = VectorInfo(formula="zero_max_scaled")
        return SteeringVector("test", None, tuple(router.layer for router in self.routers), weights=weights, info=info)

    def steered(self, vector: SteeringVector | None = None, strength: float = STRENGTH, **plan: Any) -> Tensor:
        with steer(self.model, vector or self.vector, strength, **({"positions": "all"} | plan)):
            return run(self.model, self.inputs)


@pytest.fixture(scope="module", params=STEERABLE)
def case(request: pytest.FixtureRequest) -> Case:
    return Case.of(build(request.param), request.param)


# ---- an independent reference ----
#
# steermoe changes the output of a router's linear map. The reference leaves the map alone and changes its input: moved
# along the pseudo-inverse of the weight, the input yields the steered logits, and the router's own code does everything
# else. The new logits come from the formulas of the paper, one number at a time.


def by_the_paper(z: list[float], e: list[float], c: float, formula: Formula, scale: Scale) -> list[float]:
    """Equations (3) to (5) for one token."""
    top = max(z) if scale == "paper" else abs(max(z))
    if formula == "additive":
        return [zi + c * ei for zi, ei in zip(z, e, strict=True)]
    if formula == "zero_max_scaled":
        z = [0.0 if ei > 0 else zi for zi, ei in zip(z, e, strict=True)]
    return [zi + top * c * ei for zi, ei in zip(z, e, strict=True)]


def move_input(
    owner: nn.Module, expert_vector: list[float], formulate: Callable[..., list[float]]
) -> Callable[..., Any]:
    """A forward pre-hook that moves the input to where `owner`'s weight yields the steered logits.

    It computes in float64, since the pseudo-inverse amplifies noise.
    """
    weight, bias = (None if p is None else p.detach().double() for p in (owner.weight, getattr(owner, "bias", None)))
    way_back = torch.linalg.pinv(weight.T)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].double()
        logits = F.linear(hidden, weight, bias)
        competing = logits.flatten(0, -2)[:, : len(expert_vector)]
        steered = torch.tensor([formulate(row, expert_vector) for row in competing.tolist()], dtype=torch.float64)
        change = F.pad(steered - competing, (0, logits.shape[-1] - len(expert_vector)))
        return ((hidden + (change @ way_back).view_as(hidden)).to(args[0].dtype), *args[1:])

    return hook


def last_linear(router: nn.Module) -> nn.Module:
    """The module with the weight of a router's logits."""
    return [router, *(module for module in router.modules() if isinstance(module, nn.Linear))][-1]


def reference(
    case: Case,
    strength: float = STRENGTH,
    formula: Formula = "zero_max_scaled",
    scale: Scale = "magnitude",
    owner_of: Callable[[nn.Module], nn.Module] = last_linear,
) -> Tensor:
    """The model's output when its routers get inputs that yield the steered logits."""
    calls: list[nn.Module] = []
    with ExitStack() as stack:
        for router, experts in zip(case.routers, case.vector.experts.tolist(), strict=True):
            owner = owner_of(router.module)
            host = router.module if case.family in CALLS_NO_GATE else owner
            experts += [0.0] * MORE_THAN_EXPERTS_COMPETE.get(case.family, 0)
            hook = move_input(owner, experts, lambda z, e: by_the_paper(z, e, strength, formula, scale))
            stack.callback(host.register_forward_pre_hook(hook).remove)
            stack.callback(host.register_forward_hook(lambda module, args, output: calls.append(module)).remove)
        output = run(case.model, case.inputs)
    assert len(calls) == len(case.routers)
    return output


# ---- every family ----


def test_routers_are_the_declared_ones(case: Case) -> None:
    competing = EXPERTS + MORE_THAN_EXPERTS_COMPETE.get(case.family, 0)
    assert {type(router.module).__name__ for router in case.routers} <= set(FAMILIES[case.family].routers)
    assert {router.num_experts for router in case.routers} == {competing}
    assert {router.top_k for router in case.routers} <= {1, TOP_K}
    assert len({router.layer for router in case.routers}) == len(case.routers)


def test_strength_zero_changes_nothing(case: Case) -> None:
    assert torch.equal(case.steered(strength=0.0), case.plain)


def test_equals_the_reference(case: Case) -> None:
    steered = case.steered()
    assert (steered - case.plain).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(steered, reference(case), rtol=0, atol=TOLERANCE)


def test_removal_leaves_nothing_behind(case: Case) -> None:
    handle = attach(case.model, plan_for(case.vector, STRENGTH, positions="all"))
    assert not torch.equal(run(case.model, case.inputs), case.plain)
    handle.remove()
    handle.remove()
    assert torch.equal(run(case.model, case.inputs), case.plain)
    for module in case.model.modules():
        assert not {"forward", "_old_forward", "generate"} & set(vars(module))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def strongest_together(model: nn.Module, router: Router) -> list[int]:
    """Experts that can win all top-k slots of a token if their logits are large enough.

    A sigmoid ends at 1 however large the logit, and groups win or lose as a whole: beyond that, the correction biases
    decide. So these are the experts with the largest biases of one group: the group where those sum to the most.
    """
    biases = torch.zeros(router.width)
    for owner in (model.get_submodule(router.name.rpartition(".")[0]), router.module):
        for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
            if CORRECTION.search(name):
                biases = tensor.detach().flatten()
    groups = getattr(router.module, "num_group", None) or 1
    per_group = biases[: EXPERTS // groups * groups].view(groups, -1).topk(router.top_k)
    best = int(per_group.values.sum(-1).argmax())
    return (per_group.indices[best] + best * EXPERTS // groups).tolist()


def test_large_strength_takes_every_place(case: Case) -> None:
    boosted = [strongest_together(case.model, router) for router in case.routers]
    weights = torch.zeros(len(boosted), EXPERTS)
    for row, experts in enumerate(boosted):
        weights[row, experts] = 1 / len(experts)
    info = VectorInfo(formula="zero_max_scaled")
    vector = SteeringVector("test", weights, tuple(router.layer for router in case.routers), info=info)
    with record_routing(case.model) as record:
        case.steered(vector, 1e4)
    assert record.counts is not None
    for row, experts in enumerate(boosted):
        others = [n for n in range(record.counts.shape[-1]) if n not in experts]
        assert record.counts[:, row, others].sum() == 0
        assert record.counts[:, row, experts].eq(case.inputs["input_ids"].shape[1]).all()


def test_recorded_choice_is_what_the_experts_are_given(case: Case) -> None:
    if case.family in INDICES_UNSEEN:
        pytest.skip(f"{case.family} {INDICES_UNSEEN[case.family]}")
    given: dict[str, Tensor] = {}

    def on_experts(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[name] = next(
                value
                for value in (*args, *kwargs.values())
                if isinstance(value, Tensor) and not value.is_floating_point()
            )

        return hook

    with record_routing(case.model) as record, ExitStack() as stack:
        for router in case.routers:
            experts = case.model.get_submodule(router.name.rpartition(".")[0]).experts
            stack.callback(experts.register_forward_pre_hook(on_experts(router.name), with_kwargs=True).remove)
        run(case.model, case.inputs)
    assert record.counts is not None
    for row, router in enumerate(case.routers):
        indices = given[router.name]
        if indices.shape[-1] == router.top_k:
            indices = F.one_hot(indices, router.num_experts).sum(-2)
        assert torch.equal(record.counts[:, row], indices.view(len(record.counts), -1, router.num_experts).sum(1))


def left_padded(case: Case, lengths: Sequence[int]) -> dict[str, Tensor]:
    """A batch as `generate` makes it from prompts of different lengths."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    padding = 0
    inputs = {name: ids.where(mask.bool(), padding) for name, ids in tokens(case.model, len(lengths), width).items()}
    masks = {name.replace("input_ids", "attention_mask"): mask for name in inputs}
    if "position_ids" in inspect.signature(case.model.forward).parameters:
        masks["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs | masks


def test_mixed_batch_keeps_rows_apart(case: Case) -> None:
    lengths = (9, 6, 4)
    batch = left_padded(case, lengths)
    other = SteeringVector("other", None, case.vector.layers, weights=case.vector.experts.roll(3, -1))
    plans = [
        plan_for(case.vector, STRENGTH, positions="all"),
        None,
        SteeringPlan(other, 2.0, formula="max_scaled", positions="all"),
    ]
    plain = run(case.model, batch)
    with steer(case.model, rows=plans):
        mixed = run(case.model, batch)
    torch.testing.assert_close(mixed[1, -6:], plain[1, -6:], rtol=0, atol=TOLERANCE)
    for row, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
        alone = {name: value[row : row + 1, -length:] for name, value in batch.items()}
        with steer(case.model, rows=[plan]):
            expected = run(case.model, alone)
        torch.testing.assert_close(mixed[row, -length:], expected[0], rtol=0, atol=TOLERANCE)
        assert plan is None or (mixed[row, -length:] - plain[row, -length:]).abs().max() > 10 * TOLERANCE


def test_cached_equals_uncached(case: Case) -> None:
    if case.family in NO_CACHE:
        pytest.skip(f"{case.family} {NO_CACHE[case.family]}")
    if case.model.can_generate():
        cached, uncached = (generate(case, use_cache) for use_cache in (True, False))
        assert torch.equal(cached[0], uncached[0])
        torch.testing.assert_close(cached[1], uncached[1], rtol=0, atol=TOLERANCE)
    else:  # a text model without a head
        torch.testing.assert_close(token_by_token(case), all_at_once(case), rtol=0, atol=TOLERANCE)


def generate(case: Case, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits that they were chosen from."""
    new = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": use_cache, "suppress_tokens": SPECIAL_TOKENS}
    with steer(case.model, case.vector, STRENGTH) as handle:
        output = case.model.generate(**case.inputs, **new, return_dict_in_generate=True, output_logits=True)
    last_is_never_read = NEW_TOKENS - 1
    assert handle.report().tokens_steered == len(output.sequences) * last_is_never_read
    return output.sequences, torch.stack(output.logits)


@torch.no_grad()
def token_by_token(case: Case) -> Tensor:
    ids = case.inputs["input_ids"]
    with steer(case.model, case.vector, STRENGTH):
        output = case.model(ids[:, :PROMPT], use_cache=True)
        states = [output.last_hidden_state]
        for column in range(PROMPT, ids.shape[1]):
            output = case.model(ids[:, [column]], past_key_values=output.past_key_values, use_cache=True)
            states.append(output.last_hidden_state)
    return torch.cat(states, 1)


def all_at_once(case: Case) -> Tensor:
    with steer(case.model, case.vector, STRENGTH) as handle:
        handle.set(prompt_length=PROMPT)
        output = run(case.model, case.inputs)
    assert not torch.equal(output[:, PROMPT:], case.plain[:, PROMPT:])
    return output


def test_experts_implementations_agree(case: Case) -> None:
    if not case.model._can_set_experts_implementation():
        pytest.skip(f"{case.family} has only one implementation of its experts")
    expected = case.steered()
    batch = left_padded(case, (9, 6))
    plan = plan_for(case.vector, STRENGTH, positions="all")
    try:
        for implementation in ("batched_mm", "grouped_mm"):
            case.model.set_experts_implementation(implementation)
            assert case.model.get_experts_implementation()[""] == implementation
            torch.testing.assert_close(case.steered(), expected, rtol=0, atol=TOLERANCE)
            if implementation == "batched_mm":
                # computes each token separately, so other rows can't even change its last bit
                plain = run(case.model, batch)
                with steer(case.model, rows=[plan, None]):
                    assert torch.equal(run(case.model, batch)[1, -6:], plain[1, -6:])
    finally:
        case.model.set_experts_implementation("eager")


# ---- lists of experts to force and to ban ----

ADVERSE = [0.0, 1.0, 8.0]
"""Correction biases against the lists: 0 leaves those of the tiny models, real checkpoints have up to 12."""


def set_biases(model: nn.Module, wanted: Sequence[int], unwanted: Sequence[int], size: float) -> bool:
    """Random correction biases of this size, lowest for the experts in `wanted` and highest for those in `unwanted`.

    Returns:
        whether the model has any.
    """
    generator, found = torch.Generator().manual_seed(0), False
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if CORRECTION.search(name) or name.endswith("balancing_biases"):
            biases = torch.randn(tensor.shape, generator=generator) * size
            biases[..., list(unwanted)] = 2 * size + biases[..., list(unwanted)].abs()
            biases[..., list(wanted)] = -2 * size - biases[..., list(wanted)].abs()
            with torch.no_grad():
                tensor.copy_(biases)
            found = True
    return found


@pytest.fixture
def listable(case: Case) -> Case:
    """A case whose experts can be forced and banned."""
    if case.family in LISTS_REFUSED:
        pytest.skip(f"{case.family} {LISTS_REFUSED[case.family]}")
    return case


@pytest.fixture
def adverse(listable: Case) -> Iterator[Callable[..., None]]:
    """Sets the case's biases; they are as before when the test ends. Without biases, size 0 is all there is to test."""
    case = listable
    before: dict[str, Tensor] = {}

    def set_them(wanted: Sequence[int], unwanted: Sequence[int], size: float) -> None:
        if not size:
            return
        named = [*case.model.named_parameters(), *case.model.named_buffers()]
        before.update((name, tensor.detach().clone()) for name, tensor in named)
        if not set_biases(case.model, wanted, unwanted, size):
            before.clear()
            pytest.skip("some families have no correction biases")

    yield set_them
    with torch.no_grad():
        for name, tensor in [*case.model.named_parameters(), *case.model.named_buffers()]:
            if name in before:
                tensor.copy_(before[name])


def check_lists(case: Case, handle: SteeringHandle, counts: Tensor, forced: list[int], banned: list[int]) -> None:
    """Every token chose the forced experts and no banned one, by counts [B, L, N], and the report says the same."""
    tokens_of_text = case.inputs["input_ids"].shape[1]
    for expert in forced:
        assert counts[:, :, expert].eq(tokens_of_text).all()
    for expert in banned:
        assert counts[:, :, expert].eq(0).all()
    report = handle.report()
    places = tokens_of_text * len(counts) * len(case.routers)
    assert (report.forced_hits, report.forced_places) == (places * len(forced),) * 2
    assert (report.banned_hits, report.banned_places) == (0, places * len(banned))
    handle.verify()


@pytest.mark.parametrize("size", ADVERSE)
@pytest.mark.parametrize("strength", [0.0, 25.0, 1e4])
def test_forced_experts_are_always_chosen(case: Case, adverse: Any, size: float, strength: float) -> None:
    """One of each group where all places can be forced; the vector lifts others."""
    forced = [2, EXPERTS - 3][: min(router.top_k for router in case.routers)]
    adverse(forced, [], size)
    force = tuple((router.layer, expert) for router in case.routers for expert in forced)
    vector = case.vector if strength else None
    with record_routing(case.model) as record:
        with steer(case.model, vector, strength or None, force=force, positions="all") as handle:
            output = run(case.model, case.inputs)
        assert record.counts is not None
        check_lists(case, handle, record.counts, forced, [])
    assert output.isfinite().all()


@pytest.mark.parametrize("size", ADVERSE)
@pytest.mark.parametrize("strength", [0.0, 25.0, 1e4])
def test_banned_experts_are_never_chosen(case: Case, adverse: Any, size: float, strength: float) -> None:
    """As many as can be banned; what is left lies in two groups where a token may use only one."""
    left = [2, EXPERTS - 3]
    banned = [expert for expert in range(EXPERTS) if expert not in left]
    adverse([], banned, size)
    ban = tuple((router.layer, expert) for router in case.routers for expert in banned)
    vector = case.vector if strength else None
    with record_routing(case.model) as record:
        with steer(case.model, vector, strength or None, ban=ban, positions="all") as handle:
            output = run(case.model, case.inputs)
        assert record.counts is not None
        check_lists(case, handle, record.counts, [], banned)
    assert output.isfinite().all()


def test_lists_leave_other_rows_alone(listable: Case) -> None:
    """A row without lists beside one that has them, with a vector and without, to the last bit where rows can be."""
    case = listable
    batch = left_padded(case, (9, 9))
    listed = tuple((router.layer, 2) for router in case.routers)
    with steer(case.model, rows=[plan_for(case.vector, STRENGTH, positions="all"), None]):
        expected = run(case.model, batch)
    with steer(case.model, rows=[plan_for(None, force=listed, positions="all"), None]):
        other = run(case.model, batch)
    plain = run(case.model, batch)
    torch.testing.assert_close(other[1], plain[1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(other[1], expected[1], rtol=0, atol=TOLERANCE)
    assert (other[0] - plain[0]).abs().max() > 10 * TOLERANCE


# ---- every formula on each kind of router ----


@pytest.fixture(scope="module", params=[family for family in KINDS if family in FAMILIES])
def kind(request: pytest.FixtureRequest) -> Case:
    return Case.of(build(request.param), request.param)


WAYS = [(formula, scale) for formula in FORMULAS for scale in SCALES]
KEEPS_LOW_LOGITS = ("zero_max_scaled", "magnitude", -1.5)
"""Departs from the paper, so that steering away never raises a logit: `test_formulas.py` covers it."""


@pytest.mark.parametrize(
    ("formula", "scale", "strength"),
    [(*way, strength) for way in WAYS for strength in (1.5, -1.5) if (*way, strength) != KEEPS_LOW_LOGITS],
)
def test_formula_equals_the_reference(kind: Case, formula: Formula, scale: Scale, strength: float) -> None:
    steered = kind.steered(strength=strength, formula=formula, scale=scale)
    torch.testing.assert_close(steered, reference(kind, strength, formula, scale), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("formula", "scale"), WAYS)
def test_formula_equals_the_reference_where_all_logits_are_negative(formula: Formula, scale: Scale) -> None:
    model = build("gpt_oss")
    with torch.no_grad():
        for router in find_routers(model):
            router.module.bias -= 20
    case = Case.of(model, "gpt_oss")
    torch.testing.assert_close(
        case.steered(formula=formula, scale=scale), reference(case, STRENGTH, formula, scale), rtol=0, atol=TOLERANCE
    )


# ---- which families there are ----


def test_families_without_steering_are_known() -> None:
    not_steerable = {name: family.reason for name, family in FAMILIES.items() if not family.steerable}
    assert not_steerable.keys() <= NOT_STEERABLE.keys()
    for name, reason in not_steerable.items():
        assert NOT_STEERABLE[name] in reason
        with pytest.raises(UnsupportedModel, match=reason):
            find_routers(build(name))


def test_no_family_is_missed() -> None:
    """Configurations are an independent source: `list_families` reads the modelling code."""
    folder = Path(transformers.__file__).parent / "models"
    field = re.compile(r"^    (num_experts|num_local_experts|n_routed_experts|moe_num_experts): ", re.MULTILINE)
    declaring = {path.parent.name for path in folder.glob("*/configuration_*.py") if field.search(path.read_text())}
    assert declaring - FAMILIES.keys() == NOT_TEXT.keys()


def test_listing_families_is_light() -> None:
    program = (
        "import sys; from steermoe.routing.families import list_families; assert len(list_families()) > 50; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


TEXT = "class NewModel:\n    embed = nn.Embedding(config.vocab_size, 8)\n\n"
EXPERTS_CODE = "@use_experts_implementation\nclass NewExperts(nn.Module):\n    pass\n\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TEXT, None),
        (TEXT + EXPERTS_CODE + "class NewTopKRouter:\n    pass\n", Family("new", True, "", ("NewTopKRouter",))),
        (
            TEXT + EXPERTS_CODE + "class NewHashRouter:\n    pass\n",
            Family("new", False, "its routers are hash tables, which have no logits", ()),
        ),
        (TEXT + EXPERTS_CODE + "class NewOracle:\n    pass\n", Family("new", False, UNKNOWN_REASON, ())),
        (
            TEXT + EXPERTS_CODE + 'class NewOracle:\n    pass\n_can_record_outputs = {"router_logits": NewOracle}\n',
            Family("new", True, "", ("NewOracle",)),
        ),
        (
            TEXT + "class NewBlock:\n    def __init__(self, config):\n"
            "        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)\n",
            Family("new", True, "", ("Linear",)),
        ),
        (TEXT + "class NewVisionExperts:\n    pass\nclass NewVisionRouter:\n    pass\n", None),
        (TEXT + "class NewDensityRouter:\n    expert = None\n", None),
        (EXPERTS_CODE + "class NewImageModel:\n    pass\n", None),
        (TEXT + "num_experts = 1\n", None),
    ],
    ids=["dense", "router", "hash", "unknown", "recorded", "linear", "vision", "density", "no text", "left over"],
)
def test_new_family_is_listed(tmp_path: Path, source: str, expected: Family | None) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "modeling_new.py").write_text(source)
    assert list_families(tmp_path) == ([expected] if expected else [])


# ---- routers that transformers does not have ----


class ReluctantLinear(nn.Linear):
    """Stands in for a quantised layer: no torch function that steermoe catches multiplies its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("...h,nh->...n", hidden, self.weight)


class AdaptedLinear(nn.Module):
    """A linear layer with a low-rank adapter, as PEFT wraps it; its last map has as many columns as the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = HIDDEN, EXPERTS
        self.base_layer = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.lora_A = nn.Linear(HIDDEN, 4, bias=False)
        self.lora_B = nn.Linear(4, EXPERTS, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


class WrappingRouter(nn.Module):
    """A router whose gate is a layer of its own, of whatever kind."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = gate

    @property
    def weight(self) -> Tensor:
        return self.gate.weight

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.gate(hidden).flatten(0, -2).sigmoid().topk(self.top_k)
        return indices, weights


FOREIGN_GATES: dict[str, Callable[[], nn.Module]] = {
    "GigaChat's MoEGate": MoEGate,
    "plain linear": lambda: nn.Linear(HIDDEN, EXPERTS, bias=False),
    "quantised linear": lambda: ReluctantLinear(HIDDEN, EXPERTS, bias=False),
    "adapted linear": AdaptedLinear,
    "router with a linear": lambda: WrappingRouter(nn.Linear(HIDDEN, EXPERTS)),
    "router with a quantised linear": lambda: WrappingRouter(ReluctantLinear(HIDDEN, EXPERTS, bias=False)),
    "router with an adapted linear": lambda: WrappingRouter(AdaptedLinear()),
}


@pytest.mark.parametrize("name", FOREIGN_GATES)
def test_foreign_gate_equals_the_reference(name: str) -> None:
    case = Case.of(stand_in(FOREIGN_GATES[name]))
    assert [router.name for router in case.routers] == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    assert [(router.num_experts, router.top_k) for router in case.routers] == [(EXPERTS, TOP_K)] * 2
    steered = case.steered()
    assert (steered - case.plain).abs().max() > 10 * TOLERANCE
    expected = reference(case, owner_of=lambda router: getattr(router, "gate", router))
    torch.testing.assert_close(steered, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(run(case.model, case.inputs), case.plain)


@contextmanager
def counting(case: Case) -> Iterator[Tensor]:
    """Counts [B, L, N] of the experts that stand-in blocks run in one call, filled at the end."""
    rows = len(case.inputs["input_ids"])
    counts = torch.zeros(rows, len(case.routers), EXPERTS, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        for number, router in enumerate(case.routers):
            block = case.model.get_submodule(router.name.rpartition(".")[0])

            def route(hidden: Tensor, number: int = number, route: Any = block.route) -> tuple[Tensor, Tensor]:
                indices, weights = route(hidden)
                counts[:, number] = F.one_hot(indices, EXPERTS).view(rows, -1, EXPERTS).sum(1)
                return indices, weights

            patch.setattr(block, "route", route)
        yield counts


@pytest.mark.parametrize("name", FOREIGN_GATES)
def test_foreign_gate_keeps_to_lists(name: str) -> None:
    """With logits so large that sigmoids and softmaxes tie."""
    case = Case.of(stand_in(FOREIGN_GATES[name]))
    with torch.no_grad():
        for router in case.routers:
            for parameter in router.module.parameters():
                parameter *= 100
    forced, banned = [2], [0, 1, 3, 6]
    force, ban = (tuple((router.layer, n) for router in case.routers for n in named) for named in (forced, banned))
    with (
        counting(case) as counts,
        steer(case.model, case.vector, 25.0, force=force, ban=ban, positions="all") as handle,
    ):
        run(case.model, case.inputs)
    check_lists(case, handle, counts, forced, banned)


class SortingMoEGate(MoEGate):
    """Takes the first of all experts in order."""

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, indices = torch.sort(self.logits(hidden_BSH.flatten(0, -2)).sigmoid(), descending=True)
        return indices[:, : self.top_k], weights[:, : self.top_k], None


class OrderingMoEGate(MoEGate):
    """Takes the first of all experts in order, without their weights."""

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, None]:
        weights = self.logits(hidden_BSH.flatten(0, -2)).sigmoid()
        indices = weights.argsort(-1, descending=True)[:, : self.top_k]
        return indices, weights.gather(1, indices), None


class CountingMoEGate(MoEGate):
    """Chooses by an operation that steermoe does not catch."""

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = self.logits(hidden_BSH.flatten(0, -2)).sigmoid()
        places = [scores.kthvalue(EXPERTS - place, -1, keepdim=True).indices for place in range(self.top_k)]
        indices = torch.cat(places, -1)
        return indices, scores.gather(1, indices), None


@pytest.mark.parametrize("make_gate", [SortingMoEGate, OrderingMoEGate])
def test_routers_that_sort_keep_to_lists(make_gate: type[MoEGate]) -> None:
    case = Case.of(stand_in(make_gate))
    with torch.no_grad():
        for router in case.routers:
            router.module.weight *= 100  # sigmoids of 1 tie
    force, ban = (tuple((router.layer, n) for router in case.routers) for n in (2, 3))
    with counting(case) as counts, steer(case.model, force=force, ban=ban, positions="all") as handle:
        run(case.model, case.inputs)
    check_lists(case, handle, counts, [2], [3])


@pytest.mark.parametrize("lists", [{"force": ((0, 4),)}, {"ban": ((0, 1),)}], ids=str)
def test_a_router_that_chooses_in_another_way_is_an_error(lists: dict[str, Any]) -> None:
    case = Case.of(stand_in(CountingMoEGate))
    with pytest.raises(
        SteeringError, match=r"router 'layers\.0\.mlp\.gate' \(CountingMoEGate\) chooses its experts in a way"
    ):
        case.steered(**lists)
    assert torch.equal(run(case.model, case.inputs), case.plain)


class LateMoEGate(MoEGate):
    """Does not return what it chose."""

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, None]:
        indices, weights, _ = super().forward(hidden_BSH)
        return torch.arange(self.top_k).expand_as(indices), weights, None


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"force": ((0, 4),)}, "left out a forced expert in 100.0% of its places"),
        ({"ban": ((0, 1),)}, "chose a banned expert in 100.0% of its places"),
    ],
)
def test_a_choice_that_does_not_keep_to_lists_is_an_error(lists: dict[str, Any], message: str) -> None:
    case = Case.of(stand_in(LateMoEGate))
    with pytest.raises(SteeringError, match=f"router 'layers.0.mlp.gate' {message}"):
        case.steered(**lists)


class TwiceMoEGate(MoEGate):
    """Computes its logits twice."""

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return (super().logits(hidden_TH) + super().logits(hidden_TH)) / 2


class UncaughtMoEGate(MoEGate):
    """Computes its logits by an operation that steermoe does not catch."""

    def logits(self, hidden_TH: Tensor) -> Tensor:
        return torch.einsum("th,nh->tn", hidden_TH, self.weight)


class TwiceCallingRouter(WrappingRouter):
    """Calls its quantised gate twice."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.gate(hidden)
        return super().forward(hidden)


class InterruptibleRouter(WrappingRouter):
    """Fails after its gate has run, as a call that runs out of memory does."""

    fails = False

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output = super().forward(hidden)
        if self.fails:
            raise MemoryError
        return output


@pytest.mark.parametrize("linear", [nn.Linear, ReluctantLinear])
def test_failed_call_does_not_spoil_the_next(linear: type[nn.Linear]) -> None:
    case = Case.of(stand_in(lambda: InterruptibleRouter(linear(HIDDEN, EXPERTS, bias=False))))
    expected = case.steered()
    handle = attach(case.model, plan_for(case.vector, STRENGTH, positions="all"))
    case.routers[0].module.fails = True
    with pytest.raises(MemoryError):
        run(case.model, case.inputs)
    case.routers[0].module.fails = False
    assert torch.equal(run(case.model, case.inputs), expected)
    handle.remove()
    assert torch.equal(run(case.model, case.inputs), case.plain)


class FusedBlock(StandInBlock):
    """Reads the gate's weight itself, as fused kernels do: the gate never runs."""

    def route(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = self.gate.logits(hidden_BSH.flatten(0, -2)).softmax(-1).topk(TOP_K)
        return indices, weights


@pytest.mark.parametrize(
    ("make_gate", "make_block", "message"),
    [
        (TwiceMoEGate, StandInBlock, "2 times"),
        (UncaughtMoEGate, StandInBlock, "0 times"),
        (lambda: TwiceCallingRouter(ReluctantLinear(HIDDEN, EXPERTS, bias=False)), StandInBlock, "2 times"),
        (MoEGate, FusedBlock, "2 of 2 routers"),
    ],
    ids=["twice", "uncaught", "quantised twice", "never"],
)
def test_router_that_is_not_steered_raises(make_gate: Any, make_block: Any, message: str) -> None:
    case = Case.of(stand_in(make_gate, make_block))
    with pytest.raises(SteeringError, match=message):
        case.steered()
    assert torch.equal(run(case.model, case.inputs), case.plain)


class Mxfp4GptOssMLP(nn.Module):
    """Like the block that transformers uses for MXFP4 weights: computes the logits from the router's weight itself."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.router = original.router
        self.experts = original.experts

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_BSH.flatten(0, -2)
        logits = F.linear(flat, self.router.weight, self.router.bias)
        top, indices = logits.topk(self.router.top_k)
        return self.experts(flat, indices, top.softmax(-1)).view_as(hidden_BSH), logits


def test_mxfp4_block_is_steered_though_its_router_never_runs() -> None:
    usual, fused = Case.of(build("gpt_oss"), "gpt_oss"), build("gpt_oss")
    for layer in fused.model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp)
    case = Case.of(fused)
    torch.testing.assert_close(case.plain, usual.plain, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.steered(), usual.steered(), rtol=0, atol=TOLERANCE)
    with record_routing(fused) as record, record_routing(usual.model) as expected:
        run(fused, case.inputs)
        run(usual.model, usual.inputs)
    assert record.counts is not None
    assert torch.equal(record.counts, expected.counts)


def test_jetmoe_attention_routers_stay_as_they_are() -> None:
    case = Case.of(build("jetmoe"), "jetmoe")
    gatings = {name for name, module in case.model.named_modules() if type(module).__name__ == "JetMoeTopKGating"}
    assert {router.name for router in case.routers} < gatings
    # of layer 0: nothing before it is steered
    attention = next(name for name in sorted(gatings) if "attention" in name)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        hook = case.model.get_submodule(attention).register_forward_hook(
            lambda module, args, output: seen.append(output[-1])
        )
        stack.callback(hook.remove)
        run(case.model, case.inputs)
        case.steered(strength=100.0)
    assert torch.equal(seen[0], seen[1])


def test_jetmoe_choice_is_read_for_any_number_of_tokens() -> None:
    model = build("jetmoe")
    # as many top-k slots as experts: weights by slot look like logits by expert
    inputs = tokens(model, length=EXPERTS // TOP_K)
    with record_routing(model) as record:
        run(model, inputs)
    assert record.counts is not None
    assert record.counts.sum(-1).eq(EXPERTS).all()


# ---- other libraries' wrappers ----


class CountingHook(ModelHook):
    """An accelerate hook that shows that it is still called."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("first_removed", ["ours", "theirs"])
def test_accelerate_hooks_work_together_with_ours(first: str, first_removed: str) -> None:
    case = Case.of(build("mixtral"), "mixtral")
    modules = [router.module for router in case.routers]
    expected = case.steered()
    hook = CountingHook()
    add: dict[str, Callable[[], Any]] = {
        "ours": lambda: attach(case.model, plan_for(case.vector, STRENGTH, positions="all")),
        "theirs": lambda: [add_hook_to_module(module, hook) for module in modules],
    }
    added = {name: add[name]() for name in sorted(add, key=lambda name: name != first)}
    remove: dict[str, Callable[[], Any]] = {
        "ours": added["ours"].remove,
        "theirs": lambda: [remove_hook_from_module(module) for module in modules],
    }

    def outcome() -> tuple[bool, bool, bool]:
        """Whether the model is steered, is as it was, and whether accelerate's hook runs."""
        hook.calls = 0
        output = run(case.model, case.inputs)
        return torch.equal(output, expected), torch.equal(output, case.plain), hook.calls == len(modules)

    assert outcome() == (True, False, True)
    remove[first_removed]()
    assert outcome() == ((False, True, True) if first_removed == "ours" else (True, False, False))
    remove["ours" if first_removed == "theirs" else "theirs"]()
    assert outcome() == (False, True, False)
    for module in modules:
        assert "_old_forward" not in vars(module)
        assert module.forward.__func__ is type(module).forward


def test_model_offloaded_by_accelerate_is_steered() -> None:
    case = Case.of(build("mixtral"), "mixtral")
    expected = case.steered()
    cpu_offload(case.model, execution_device=torch.device("cpu"))
    assert next(case.model.parameters()).device.type == "meta"
    assert torch.equal(case.steered(), expected)
    assert torch.equal(run(case.model, case.inputs), case.plain)
