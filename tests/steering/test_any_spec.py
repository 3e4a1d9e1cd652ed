"""Any specs, as options, as JSON lines of a batch, as fields and model names of a server: a plan, or an error of ours.

What a plan that was accepted does to logits is finite, in every type and by every formula.
"""

import json
from contextlib import closing

import pytest
import torch
import typer
from hypothesis import example, given
from hypothesis import strategies as st

from steermoe.batch import jobs
from steermoe.batch.jobs import BatchSettings, Problem, PromptFile
from steermoe.cli.app import app
from steermoe.engines.vllm.spec import packed
from steermoe.engines.vllm.wire import pack, unpack
from steermoe.errors import SteerMoEError
from steermoe.routing.positions import POSITIONS
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.asked import spec_of_name
from steermoe.steering.banks import Bank
from steermoe.steering.editing import Editor, RowLayout, Step, Tally
from steermoe.steering.editing_graph import Edits, edit
from steermoe.steering.limits import LARGEST, MOST_STRENGTH
from steermoe.steering.narrowing import narrowed
from steermoe.steering.resolver import PlanResolver, check_spec
from steermoe.steering.spec import NAMES, SteeringSpec
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector

LAYERS, EXPERTS, TOKENS = 2, 4, 3
SHAPE = RoutingShape("of the fuzz", (), tuple(RouterShape(layer, EXPERTS, EXPERTS, 2) for layer in range(LAYERS)))
USAGE_ERROR = typer.BadParameter.__base__
"""Of the click that typer uses, which may be its own."""
LONGEST = 1000
"""Characters of a message."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors with weights of every size that a file can hold."""
    found = tmp_path_factory.mktemp("vectors")
    for domain, weight in (("sport", 0.5), ("heavy", 3e5), ("huge", 1e38), ("faint", 1e-30)):
        weights = torch.zeros(LAYERS, EXPERTS)
        weights[:, :2] = torch.tensor([weight, -weight])
        write_vector(
            SteeringVector(domain, None, tuple(range(LAYERS)), weights=weights), found / f"{domain}.safetensors"
        )
    return found


@pytest.fixture(scope="module")
def resolver(folder):
    return PlanResolver(SHAPE, folder)


@pytest.fixture(scope="module")
def remote(folder):
    return PlanResolver(SHAPE, folder, watch=True, names_only=True)


# ---- what users might write ----

whole = st.one_of(
    st.integers(0, 5).map(str),
    st.sampled_from(["9" * 20, "9" * 5000, "0" * 30 + "1", str(LARGEST), str(LARGEST + 1), "-1", "", "1.5", "\u0663"]),
)
number = st.one_of(
    st.floats().map(repr),
    st.integers(-(10**6), 10**6).map(str),
    st.sampled_from(["1e6", "-1e6", "1e39", "1e300", "1e-320", "9" * 400, "nan", "much", "0x10", "1_0", "", " 2"]),
)
text = st.text(max_size=12)
domain = st.one_of(
    st.sampled_from(["sport", "heavy", "huge", "faint", "none", "nosuch", "a" * 5000, "../x", "x.safetensors", "\0"]),
    text,
)
weighted = st.builds("{}={}".format, domain, number) | domain
mixture = st.lists(weighted, max_size=4).map("+".join)
schedule = st.one_of(
    st.just("constant"),
    st.builds("decay:{}".format, whole),
    st.builds("window:{}-{}".format, whole, whole),
    st.builds("{}:{}".format, st.sampled_from(["first", "after"]), whole),
    text,
)
layers = whole | st.builds("{}-{}".format, whole, whole) | text
expert = st.builds("{}:{}".format, whole, whole) | text
one_of_names = st.sampled_from(["additive", "max_scaled", "zero_max_scaled", "magnitude", "paper", *POSITIONS])
option = {
    "domain": mixture,
    "strength": number,
    "formula": one_of_names | text,
    "scale": one_of_names | text,
    "positions": one_of_names | text,
    "schedule": schedule,
    "layers": layers,
    "force": expert,
    "ban": expert,
    "think_tags": st.tuples(text, text) | text,
    "active_experts": st.builds(str, whole) | st.integers(1, 4).map(str) | text,
}
json_number = st.integers() | st.floats() | st.sampled_from([10**30, -(10**30), 1e300, 2**31])
anything = st.recursive(
    st.none() | st.booleans() | json_number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
field = {
    **{name: value | anything for name, value in option.items()},
    "think_tags": st.lists(text, max_size=3) | anything,
    "active_experts": st.integers(-1, 5) | json_number | anything,
    "domain": mixture | st.dictionaries(domain, json_number, max_size=3) | st.lists(weighted, max_size=3) | anything,
    "strength": json_number | anything,
    "layers": layers | st.lists(st.integers(-2, 10**12), max_size=3) | anything,
    "force": st.lists(expert | st.lists(st.integers(-2, 10**12), max_size=3), max_size=3) | anything,
    "ban": st.lists(expert | st.lists(st.integers(-2, 10**12), max_size=3), max_size=3) | anything,
}
fields = st.fixed_dictionaries({}, optional=field)
of_sampling = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "meta": anything,
        "domains": st.lists(weighted | anything, max_size=3) | anything,
        "samples": st.integers(0, 3) | json_number | anything,
        **dict.fromkeys(jobs.SAMPLING_FIELDS, json_number | anything),
    },
)


# ---- what must hold of the outcome ----


def check_message(error):
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < LONGEST


def check_effects(plan):
    """What the plan does to logits of every size and type is finite; its factors are 0 to 1."""
    if plan is None:
        return
    assert abs(plan.strength) <= MOST_STRENGTH
    factor_T = plan.factor(torch.tensor([-(2**31), -1, 0, 1, 40, 2**31, 2**40]))
    assert bool(((factor_T >= 0) & (factor_T <= 1)).all())
    assert unpack(pack(plan)).as_dict() == {**plan.as_dict(), "force": lists(plan.force), "ban": lists(plan.ban)}
    for number, router in enumerate(SHAPE.routers):
        bank = Bank.of(router, number, [plan])
        edits = Edits.of([plan], [bank], [0] * TOKENS, torch.ones(TOKENS))
        for size in (1e-3, 30.0, 6e4):
            logits = torch.tensor([[1.0, -1.0, 0.5, -0.1]] * TOKENS) * size
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                own = logits.to(dtype)
                for found in edited(router, bank, plan, own, edits):
                    assert found.dtype == dtype
                    assert bool(found.isfinite().all()), (plan.as_dict(), own, found)
                    check_weights(plan, router, own, found)


def check_weights(plan, router, own, found):
    """Scores of the chosen experts can be divided by their sum, unless a ban leaves only experts that score 0 anyway.

    That a banned expert is not chosen is the selection's affair: its logit may round to another one's.
    """
    banned = [expert for layer, expert in plan.ban if layer == router.layer]
    logits, experts = (
        found.float().index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf).topk(router.top_k)
    )
    scores = logits.sigmoid()
    divides = (scores / scores.sum(-1, keepdim=True)).isfinite()
    if banned:
        divides |= own.float().sigmoid().gather(-1, experts).sum(-1, keepdim=True) == 0
    assert bool(divides.all()), (plan.as_dict(), own, found)


def edited(router, bank, plan, logits, edits):
    """The logits by each of torch's editors: all tokens alike, each by its own plan, and in a compiled step."""
    editor = Editor("r", router, Tally())
    editor.bank = bank
    for step in (
        Step(TOKENS, None, plan=plan),
        Step(TOKENS, None, layout=RowLayout.of([plan], [0] * TOKENS, torch.ones(TOKENS, 1))),
    ):
        editor.step = step
        yield editor.edit(logits)
    yield narrowed(edit(logits.float(), 0, edits.tensors()), logits.dtype)


def lists(pairs):
    return [list(pair) for pair in sorted(pairs)]


# ---- the three sides ----


@pytest.mark.fuzz
@given(
    options=st.lists(st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), option[name])), max_size=6)
)
def test_options(resolver, folder, options):
    command = typer.main.get_command(app).commands["generate"]
    arguments = []
    for name, value in options:
        flag = f"--{name.replace('_', '-')}"
        arguments += [f"{flag}={value}"] if isinstance(value, str) else [flag, *value]
    try:
        parsed = command.make_context("generate", arguments).params
    except USAGE_ERROR:
        return
    spec = SteeringSpec(**{name: parsed[name] for name in NAMES})
    try:
        plan = resolver.plan(spec)
    except SteerMoEError as error:
        check_message(error)
        return
    check_spec(spec, folder)
    check_effects(plan)


@pytest.mark.fuzz
@given(steering=fields, others=of_sampling, extra=st.dictionaries(text, anything, max_size=1))
def test_json_lines(resolver, tmp_path, monkeypatch, steering, others, extra):
    monkeypatch.setattr(jobs, "MOST_STORIES", 16)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x", **steering, **others, **extra}) + '\n{"prompt": "y"}\n')
    with closing(PromptFile(path)) as file:
        first, second = file.jobs(BatchSettings())
    assert second[0].prompt == "y"
    if isinstance(first, Problem):
        check_message(first)
        return
    assert 1 <= len(first) <= jobs.MOST_STORIES
    for job in first:
        json.dumps([job.id, job.meta], allow_nan=False, ensure_ascii=False).encode()
        try:
            plan = resolver.plan(job.steering)
        except SteerMoEError as error:
            check_message(error)
        else:
            check_effects(plan)


@pytest.mark.fuzz
@given(steering=fields | anything, is_text=st.booleans())
@example(steering={"ban": ["0:0", "0:2"]}, is_text=False)
def test_fields_of_the_server(remote, steering, is_text):
    try:
        data = packed(remote, json.dumps(steering) if is_text else steering)
    except SteerMoEError as error:
        check_message(error)
        return
    check_effects(None if data is None else unpack(data))


@pytest.mark.fuzz
@given(after=st.lists(weighted, max_size=4).map(",".join) | text)
def test_names_of_models(remote, after):
    try:
        found = spec_of_name(f"tiny:{after}", ["tiny"])
        data = None if found is None else packed(remote, found[1])
    except SteerMoEError as error:
        check_message(error)
        return
    check_effects(None if data is None else unpack(data))
