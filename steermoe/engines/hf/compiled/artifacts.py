"""Compile a model's decode step, keep it on disk, and find it again: a few MB per step, without the weights.

An artifact belongs to one configuration, dtype, CPU, thread count, version of torch and transformers, and to the code
that is traced into it. All of that determines its name, so that a stale one is never found. It is used only if it
computes what the model computes, and faster.

Shapes: as in `step`.
"""

import hashlib
import json
import logging
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steermoe import formulas
from steermoe.engines.hf import cache as caches
from steermoe.engines.hf.cache import empty_cache, rows_can_change
from steermoe.engines.hf.compiled import choices, rewrites
from steermoe.engines.hf.compiled import step as steps
from steermoe.engines.hf.compiled.choices import OwnChoices
from steermoe.engines.hf.compiled.records import (
    COMPILERS,
    SCRATCH,
    Record,
    compiler,
    read_record,
    turn_to_compile,
    whereabouts,
    write_record,
)
from steermoe.engines.hf.compiled.rewrites import REWRITES
from steermoe.engines.hf.compiled.step import DecodeStep
from steermoe.errors import GenerationError, ModelError, SteerMoEError, TraceError, reason
from steermoe.files import cache_folder
from steermoe.models import quantization
from steermoe.routing import architectures, intercept, marks, routers, selection, wrapping
from steermoe.steering import editing_graph, narrowing
from steermoe.steering.editing_graph import Edits

logger = logging.getLogger(__name__)

Kind = Literal["one", "many"]
"""A step for a single row, or for two or more rows."""
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST_COLUMNS, MOST_ROWS = 1 << 20, 1 << 10
"""The most columns and rows that a step is compiled for."""
EXAMPLE_ROWS: dict[Kind, int] = {"one": 1, "many": 3}
CHECK_ROWS: dict[Kind, int] = {"one": 1, "many": 16}
PROMPT, CHECK_STEPS, TIMED_STEPS = 24, 4, 8
TOLERANCE = {torch.float32: 1e-4}
"""How far logits may be from the model's own, relative to their norm."""
SHORT_TOLERANCE = 0.05
"""The same for shorter types, where rounding alone exceeds that."""

SAME_CHOICES = 0.99
"""The share of a step's choices that must follow from its logits; rounding decides between equals."""

PROGRAM, FACTS = "step.pt2", "facts.json"

TRACED: tuple[ModuleType, ...] = (
    architectures,
    caches,
    choices,
    formulas,
    editing_graph,
    intercept,
    marks,
    narrowing,
    quantization,
    rewrites,
    routers,
    selection,
    steps,
    wrapping,
    sys.modules[__name__],
)
"""Modules whose code or constants end up in a compiled step, or decide how it is compiled."""
VERSIONED = frozenset({"torch", "transformers", *sys.stdlib_module_names})
"""Packages that a version stands for instead; the standard library is not traced."""


@dataclass(frozen=True)
class Facts:
    """What was measured when a step was compiled.

    Attributes:
        kind: "one" or "many" rows.
        seconds: how long compiling took.
        error: the difference of its logits from the model's own, relative to their norm.
        speedup: over the model's own step, at 1 or 16 rows.
        traces: whether the choices that its routers make follow from the logits that it returns.
    """

    kind: Kind
    seconds: float
    error: float
    speedup: float
    traces: bool

    @property
    def pays(self) -> bool:
        return self.speedup > 1


class CompiledStep:
    """A compiled step on a model's weights, which it uses without copying them; `traces` as in `Facts`."""

    def __init__(self, program: Path, weights: dict[str, Tensor], traces: bool = False) -> None:
        self.traces = traces
        self._run = torch._inductor.aoti_load_package(str(program))
        names = self._run.get_constant_fqns()
        constants = {name: weights[name] for name in names}
        self._run.load_constants(constants, check_full_update=True, user_managed=True)

    def __call__(
        self,
        tokens_B1: Tensor,
        positions_B1: Tensor,
        mask_BC: Tensor,
        column_1: Tensor,
        states: list[Tensor],
        edits: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `DecodeStep.forward`.

        Raises:
            GenerationError: a tensor is not contiguous. The program ignores strides and would compute nonsense.
        """
        given = (tokens_B1, positions_B1, mask_BC, column_1, *states, *edits)
        for number, tensor in enumerate(given):
            if not tensor.is_contiguous():
                raise GenerationError(
                    f"input {number} of the compiled step, {list(tensor.shape)}, has strides {tensor.stride()}, but "
                    "must be contiguous: please report it, and generate with --no-compiled-steps"
                )
        logits_BV, chosen_RBk, logits_RBW = self._run(tokens_B1, positions_B1, mask_BC, column_1, states, edits)
        return logits_BV, chosen_RBk, logits_RBW


def find_step(model: PreTrainedModel, kind: Kind) -> CompiledStep | None:
    """The compiled step of a model, if there is one and it pays off."""
    if model.device.type != "cpu":
        return None
    folder = folder_of(model, kind)
    facts = _facts_in(folder)
    if facts is None or not facts.pays:
        return None
    try:
        return CompiledStep(folder / PROGRAM, _weights(model), facts.traces)
    except (OSError, RuntimeError) as error:
        _warn_damaged(folder, error)
        return None


def facts_of(model: PreTrainedModel, kind: Kind) -> Facts | None:
    """What was measured of a model's compiled step; None if there is none."""
    return _facts_in(folder_of(model, kind))


def _facts_in(folder: Path) -> Facts | None:
    try:
        facts = Facts(**json.loads((folder / FACTS).read_text()))
        numbers = (facts.seconds, facts.error, facts.speedup)
        are_numbers = all(type(number) in (int, float) for number in numbers)
        if facts.kind not in KINDS or not are_numbers or type(facts.traces) is not bool:
            raise ValueError(f"it says {facts}")
    except OSError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        _warn_damaged(folder, error)
        return None
    return facts


def _warn_damaged(folder: Path, error: BaseException) -> None:
    text = "the compiled step in '%s' is damaged (%s): `steermoe models compile` makes it anew"
    logger.warning(text, folder, reason(error))


OLDEST_TORCH = (2, 13)
"""Earlier ones can't export attention over a cache whose length varies."""


def torch_is_too_old() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Why a model's step can't be compiled here, or None."""
    if model.device.type != "cpu":
        return f"it is on '{model.device.type}': steps are compiled for CPUs"
    if not rows_can_change(model):
        return "its cache is more than keys and values per token"
    if not any(map(shutil.which, COMPILERS)):
        return "there is no C++ compiler: install g++ or clang++"
    if torch_is_too_old():
        return f"torch {torch.__version__} can't export it: install torch {'.'.join(map(str, OLDEST_TORCH))} or newer"
    return None


def compile_step(model: PreTrainedModel, kind: Kind, *, wait: bool = True) -> Facts:
    """Compile a model's step, check it, time it and keep it. Takes about a minute and a gigabyte of memory.

    Args:
        model: in memory, on the CPU.
        kind: for one row, or for many.
        wait: wait for another process that compiles a step, instead of giving up.

    Raises:
        ModelError: it can't be compiled or kept, or computes something else; then nothing is kept but a record of that.
    """
    name = type(model).__name__
    if why := why_not_compiled(model):
        raise ModelError(f"the step of {name} is not compiled: {why}")
    target = folder_of(model, kind)
    with _writing(target.parent), turn_to_compile(target.parent, wait=wait) as held:
        if held is False:
            raise ModelError(f"the step of {name} is not compiled: another process compiles a step now")
        before = read_record(target)
        attempts = 1 if before is None or before.state != "compiling" else before.attempts + 1
        about = (whereabouts(str(model.config.name_or_path)), str(model.dtype).removeprefix("torch."), kind)
        record = Record(*about, attempts=attempts, compiler=compiler())
        write_record(target, record)
        try:
            facts = _make_step(model, kind, target)
        except ModelError as error:
            write_record(target, replace(record, state="failed", reason=reason(error)))
            raise
        write_record(target, replace(record, state="compiled", speedup=facts.speedup))
    return facts


def _make_step(model: PreTrainedModel, kind: Kind, target: Path) -> Facts:
    name, started = type(model).__name__, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns about its own internals
                _compile(model, kind, made / PROGRAM)
            step = CompiledStep(made / PROGRAM, _weights(model))
        except SteerMoEError:
            raise
        except Exception as error:  # export and inductor raise anything for what they can't compile
            text = f"{type(error).__name__}: {reason(error)}"
            raise ModelError(f"the step of {name} can't be compiled: {text}") from error
        seconds = time.perf_counter() - started
        off, speedup, traces = _compare(model, step, CHECK_ROWS[kind])
        limit = TOLERANCE.get(model.dtype, SHORT_TOLERANCE)
        if not off <= limit:
            raise ModelError(f"the compiled step of {name} is off by {off:.1e} (at most {limit:.0e}): it is not kept")
        facts = Facts(kind, round(seconds, 1), off, round(speedup, 2), traces)
        (made / FACTS).write_text(json.dumps(asdict(facts)))
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)
    return facts


@contextmanager
def _writing(parent: Path) -> Iterator[None]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ModelError(
            f"can't write the compiled step to '{parent}': {error.strerror}; set STEERMOE_CACHE to another folder"
        ) from error


def folder_of(model: PreTrainedModel, kind: Kind) -> Path:
    """Where a model's compiled step is, or would be."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(name, None)
    weights = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in _weights(model).items()]
    facts = {
        "kind": kind,
        "class": type(model).__name__,
        "config": config,
        "attention": model.config._attn_implementation,
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest(),
        "versions": [version(package) for package in ("torch", "transformers")],
        "code": _code_version(model),
        "cpu": [platform.machine(), sorted(torch.cpu.get_capabilities().items())],
        "threads": torch.get_num_threads(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "compiled" / f"{model.config.model_type}-{kind}-{digest[:16]}"


def _code_version(model: nn.Module) -> str:
    """A hash of the code that is traced into a step: ours, and the model's unless it is in `VERSIONED`."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in VERSIONED}
    modules = {name: sys.modules.get(name) for name in names} | {module.__name__: module for module in TRACED}
    digest = hashlib.sha256()
    for _, module in sorted(modules.items()):
        if file := getattr(module, "__file__", None):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model that a step reads, by their names in it; tied weights under each of their names."""
    named: Iterable[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {f"model.{name}": tensor.detach() for name, tensor in named}


# ---- compiling ----


def _compile(model: PreTrainedModel, kind: Kind, program: Path) -> None:
    step = DecodeStep(model)
    inputs = _inputs(step, _states(model, EXAMPLE_ROWS[kind], PROMPT), EXAMPLE_ROWS[kind], PROMPT - 1)
    with torch.no_grad(), step.traceable():
        exported = torch.export.export(step, inputs, dynamic_shapes=_dynamic(inputs, kind), strict=False)
    exported = exported.run_decompositions(REWRITES)
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(program), inductor_configs={"aot_inductor.package_constants_in_so": False}
    )


def _dynamic(inputs: tuple[Any, ...], kind: Kind) -> tuple[Any, ...]:
    columns = torch.export.Dim("columns", min=2, max=MOST_COLUMNS)
    rows = {} if kind == "one" else {0: torch.export.Dim("rows", min=2, max=MOST_ROWS)}
    second = {dim + 1: size for dim, size in rows.items()}
    *_, states, edits = inputs
    of_edits = [second if tensor.dim() == 3 else rows for tensor in edits]
    return rows, rows, {**rows, 1: columns}, {}, [{**rows, 2: columns} for _ in states], of_edits


def _states(model: PreTrainedModel, rows: int, columns: int) -> list[Tensor]:
    """Keys and values of every layer, random ones."""
    cache = empty_cache(model)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    return [torch.randn(rows, t.shape[1], columns, t.shape[3], dtype=t.dtype) for t in _states_in(cache)]


def _states_in(cache: Any) -> list[Tensor]:
    """Keys and values of each layer that has any, in turn."""
    return [tensor for layer in cache.layers if hasattr(layer, "keys") for tensor in (layer.keys, layer.values)]


def _inputs(step: DecodeStep, states: list[Tensor], rows: int, column: int) -> tuple[Any, ...]:
    columns = states[0].shape[2]
    edits = Edits.none(len(step.routers), rows, step.routers[0].num_experts)
    return (
        torch.zeros(rows, 1, dtype=torch.long),
        torch.full((rows, 1), column),
        (torch.arange(columns) <= column).long().expand(rows, -1).contiguous(),
        torch.tensor([column]),
        states,
        list(edits.tensors()),
    )


# ---- checking ----


@torch.inference_mode()
def _compare(model: PreTrainedModel, step: CompiledStep, rows: int) -> tuple[float, float, bool]:
    """The relative error of a compiled step's logits against the model's own, its speedup, and whether it traces."""
    config: Any = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    cache, kept = empty_cache(model), empty_cache(model, forgets=False)
    for empty in (cache, kept):
        model(input_ids=ids, past_key_values=empty, use_cache=True)
    total = PROMPT + CHECK_STEPS + TIMED_STEPS
    states = [nn.functional.pad(tensor, (0, 0, 0, total - PROMPT)).contiguous() for tensor in _states_in(kept)]
    traced = DecodeStep(model)
    token = ids[:, -1:].contiguous()
    own_choices = OwnChoices(model)
    same: list[float] = []
    errors: list[float] = []
    own: list[float] = []
    compiled: list[float] = []
    for column in range(PROMPT, total):
        inputs = _inputs(traced, states, rows, column)
        started = time.perf_counter()
        own_BV = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].float()
        between = time.perf_counter()
        logits_BV, chosen_RBk, logits_RBW = step(token, *inputs[1:])
        own.append(between - started)
        compiled.append(time.perf_counter() - between)
        errors.append(float((logits_BV - own_BV).norm() / own_BV.norm()))
        same.append(_same(own_choices, logits_RBW, chosen_RBk))
        token = own_BV.argmax(-1, keepdim=True)
    return max(errors), median(own) / median(compiled), fmean(same) >= SAME_CHOICES


def _same(own_choices: OwnChoices, logits_RBW: Tensor, chosen_RBk: Tensor) -> float:
    """The share of an unsteered step's choices that its routers make too, given its logits."""
    try:
        found = own_choices.of(logits_RBW).sort(-1).values
    except TraceError:
        return 0.0
    return float((found == chosen_RBk.sort(-1).values).all(-1).float().mean())
