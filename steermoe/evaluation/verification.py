"""Does steering do on this machine what it says? Real checks of one model, which `steermoe verify` runs and prints.

Nothing here needs a vector of the model: experts are chosen at random, with a fixed seed.

Shapes: T tokens, L MoE layers, N experts of a layer.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steermoe.engines.decoding import complete
from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.errors import SteerMoEError, reason
from steermoe.formulas import FLOOR, FORMULAS, LOWEST, SCALES, Formula, Scale
from steermoe.models.loading import LoadedModel
from steermoe.routing.routers import find_routers, language_model
from steermoe.steering.editing import Editor
from steermoe.steering.handle import attach
from steermoe.steering.plans import SteeringPlan
from steermoe.vectors.vector import SteeringVector

PROMPT = "Once upon a time there was a brown dog named Milo who lived by the river."
TOKENS = 16
"""Of most texts that are generated."""
RELATIVE_ERROR = 1e-5
"""Of a steered logit in float32, relative to the largest logit and push of its token."""
LOGPROB_ERROR = 1e-3
"""Nats, in float32, between two ways to compute the same token."""
NARROW_KL = {"bfloat16": 0.05, "float16": 0.02}
"""Nats per token, KL(float32 || type) of steered texts: what rounding may cost."""
COMPILED_ERROR = 0.05
"""Nats per token, on average, in the model's own type."""
SLOWEST = 0.7
"""Steered speed over unsteered, below which something is wrong; docs/speed.md has what to expect."""
STEP_SECONDS = 5e-3
"""What steering may always take of a step: in tiny models that is most of their time."""
PAIRS = 3
"""Of steered and unsteered texts that the speed is measured on."""
STRENGTHS = (2.0, -1.5)
STRONG = 8.0
"""Enough for the vector's experts to be chosen: experts whose routers are equal, as in the default model, then do not
compete for the last slot, where rounding would decide."""


@dataclass(frozen=True)
class Check:
    """One check and how it went.

    Attributes:
        name: what was checked.
        passed: None if it could not run here.
        found: what was measured, or why it could not run.
        expected: the bound; "" if it could not run.
        seconds: how long it took.
    """

    name: str
    passed: bool | None
    found: str
    expected: str
    seconds: float


Outcome = tuple[bool | None, str, str]
"""`Check.passed`, `found`, `expected`."""


class Verification:
    """The checks of one model.

    Args:
        loaded: the model in float32.
        narrow: loads the same model in another type, by its name; None of it may be shared with `loaded`.
        own: loads it as `generate` does.
    """

    def __init__(
        self, loaded: LoadedModel, narrow: Callable[[str], LoadedModel], own: Callable[[], LoadedModel]
    ) -> None:
        self.loaded = loaded
        self._narrow, self._load_own = narrow, own
        self._engine = HFEngine(loaded, compiled=False)
        self._vector = random_vector(loaded, 0)

    def run(self) -> Iterator[Check]:
        """All checks, each as soon as it is done."""
        checks: list[tuple[str, Callable[[], Outcome]]] = [
            ("strength 0 changes no bit", self.strength_0),
            *(
                (f"formula {formula}, scale {scale}", lambda f=formula, s=scale: self.formula(f, s))
                for formula in FORMULAS
                for scale in SCALES[: 1 if formula == "additive" else None]
            ),
            ("forced and banned experts", self.lists),
            ("cached and uncached steps agree", self.cache),
            ("texts together are the texts alone", self.rows),
            *((f"in {name}", lambda n=name: self.narrow(n)) for name in NARROW_KL),
            ("compiled steps", self.compiled),
            ("speed, steered over unsteered", self.speed),
        ]
        for name, check in checks:
            started = time.perf_counter()
            try:
                passed, found, expected = check()
            except (SteerMoEError, RuntimeError, NotImplementedError, ValueError) as error:
                passed, found, expected = False, reason(error), "no error"
            yield Check(name, passed, found, expected, time.perf_counter() - started)

    @cached_property
    def _own(self) -> LoadedModel:
        """As `generate` loads it."""
        return self._load_own()

    def strength_0(self) -> Outcome:
        ids = self._ids()
        before = self._logits(ids)
        with_plan = self._logits(ids, SteeringPlan(self._vector, 0.0, positions="all"))
        difference = float((before - with_plan).abs().max())
        return difference == 0, f"largest difference {difference:g}", "0"

    def formula(self, formula: Formula, scale: Scale) -> Outcome:
        """Each router's logits, as edited while the model runs, against the equation in float64."""
        largest, edits = 0.0, 0
        for strength in STRENGTHS:
            plan = SteeringPlan(self._vector, strength, formula, scale, positions="all")
            for number, before, after in self._edited(plan):
                wanted = equation(formula, scale, before.double().cpu(), self._vector.experts[number], strength)
                size = before.double().abs().cpu().amax(-1, keepdim=True) * (1 + abs(strength)) + abs(strength)
                plain = (wanted.amax(-1) >= LOWEST) & (wanted.amin(-1) >= FLOOR)  # others are lifted, see `bound`
                largest = max([largest, *((after.double().cpu() - wanted) / size).abs().amax(-1)[plain].tolist()])
                edits += 1
        if not edits:
            return False, "no router's logits were edited", "edits in every layer"
        return largest <= RELATIVE_ERROR, f"relative error {largest:.1e} of {edits} edits", f"<= {RELATIVE_ERROR:g}"

    def lists(self) -> Outcome:
        """A forced expert gets every steered token, a banned one none."""
        layers = [router.layer for router in self.loaded.shape.routers]
        most = min(router.num_experts for router in self.loaded.shape.routers)
        if most < 2:
            return None, "a router with a single expert", ""
        plan = SteeringPlan(
            force=tuple((layer, most - 1) for layer in layers),
            ban=tuple((layer, 0) for layer in layers),
        )
        trace = self._generate([Request(PROMPT, plan, self._greedy(), trace=True)])[0].trace
        assert trace is not None
        chosen = trace.chosen[: TOKENS - 1]  # the last token is not read
        forced = float((chosen == most - 1).any(-1).mean())
        banned = float((chosen == 0).any(-1).mean())
        return forced == 1 and banned == 0, f"forced {forced:.0%}, banned {banned:.0%}", "100% and 0%"

    def cache(self) -> Outcome:
        plan = SteeringPlan(self._vector, STRONG, positions="all")
        return self._against_one_pass(self._generate([Request(PROMPT, plan, self._greedy(), logprobs=0)])[0], plan)

    def rows(self) -> Outcome:
        """Four texts with different steering, as one batch and as rows that come and go, against each alone."""
        other = random_vector(self.loaded, 1)
        plans = (
            None,
            SteeringPlan(self._vector, 2.0),
            SteeringPlan(other, 1.0, "zero_max_scaled", positions="all"),
            SteeringPlan(other, -1.0, "additive", schedule="decay:8"),  # type: ignore[arg-type]
        )
        prompts = (PROMPT, "The two sisters met at the station.", "Dear Ines,", PROMPT)
        requests = [
            Request(prompt, plan, Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS, seed=seed))
            for seed, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))
        ]
        alone = [self._generate([request])[0].token_ids for request in requests]
        together = [one.token_ids for one in self._generate(requests)]
        encoded = [self._engine.encode(request) for request in requests]
        rolling = [one.token_ids for one in complete(self._engine.decoder(len(requests)), requests, encoded)]
        equal = sum(a == b == c for a, b, c in zip(alone, together, rolling, strict=True))
        return equal == len(requests), f"{equal} of {len(requests)} texts equal", "all"

    def narrow(self, name: str) -> Outcome:
        """What rounding to another type changes in a steered text."""
        plan = SteeringPlan(self._vector, 2.0, positions="all")
        ids = self._ids()
        wanted = self._logits(ids, plan).float().cpu().log_softmax(-1)
        found = _logits(self._narrow(name), ids, plan).float().cpu().log_softmax(-1)
        if not bool(found.isfinite().all()):
            return False, "logits that are not finite", "finite ones"
        kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        return kl <= NARROW_KL[name], f"KL {kl:.4f} nats per token", f"<= {NARROW_KL[name]:g}"

    def compiled(self) -> Outcome:
        """Compiled steps against plain ones, in the model's own type."""
        own = self._own
        engine = HFEngine(own)
        steps = engine.compiled_steps()
        if steps is None or not steps.serves(1):
            return None, "none for this model (steermoe models compile)", ""
        plan = SteeringPlan(self._vector, STRONG, positions="all")
        done = engine.generate([Request(PROMPT, plan, self._greedy(), logprobs=0)])[0]
        return self._against_one_pass(done, plan, own, COMPILED_ERROR)

    def speed(self) -> Outcome:
        own = self._own
        engine = HFEngine(own)
        sampling = Sampling(max_new_tokens=2 * TOKENS, min_new_tokens=2 * TOKENS)

        def seconds(plan: SteeringPlan | None) -> float:
            started = time.perf_counter()
            engine.generate([Request(PROMPT, plan, sampling)])
            return time.perf_counter() - started

        plan = SteeringPlan(self._vector, 1e-6)
        seconds(None), seconds(plan)
        pairs = [(seconds(None), seconds(plan)) for _ in range(PAIRS)]
        ratio = statistics.median(plain / steered for plain, steered in pairs)
        tokens = sampling.max_new_tokens
        rate = tokens / statistics.median(steered for _, steered in pairs)
        added = statistics.median(steered - plain for plain, steered in pairs) / tokens
        found = f"{ratio:.2f} at {rate:.0f} tokens/s, {1e3 * added:.1f} ms more a token"
        expected = f">= {SLOWEST:g}, or at most {1e3 * STEP_SECONDS:g} ms"
        return ratio >= SLOWEST or added <= STEP_SECONDS, found, expected

    def _greedy(self) -> Sampling:
        return Sampling(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self._engine.generate(requests)

    def _ids(self) -> list[int]:
        return self._engine.encode(Request(PROMPT))

    def _logits(self, ids: Sequence[int], plan: SteeringPlan | None = None) -> Tensor:
        return _logits(self.loaded, ids, plan)

    def _against_one_pass(
        self, done: Completion, plan: SteeringPlan, loaded: LoadedModel | None = None, bound: float = 0.0
    ) -> Outcome:
        """The log-probabilities of generated tokens against those of one pass over the whole text.

        Without a bound: the largest difference, in float32. With one: the mean difference.
        """
        loaded = loaded or self.loaded
        assert done.scores is not None
        prompt = self._engine.encode(done.request)
        logits = _logits(loaded, [*prompt, *done.token_ids], plan).float().cpu()
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        once = logprobs.gather(-1, torch.tensor(done.token_ids)[:, None])[:, 0]
        apart = (once - torch.tensor([score.logprob for score in done.scores])).abs()
        if bound:
            return float(apart.mean()) <= bound, f"mean difference {float(apart.mean()):.4f} nats", f"<= {bound:g}"
        largest = float(apart.max())
        return largest <= LOGPROB_ERROR, f"largest difference {largest:.1e} nats", f"<= {LOGPROB_ERROR:g}"

    def _edited(self, plan: SteeringPlan) -> list[tuple[int, Tensor, Tensor]]:
        """Each router's number with its logits before and after the edit [T, N], in one pass over the prompt."""
        seen: list[tuple[int, Tensor, Tensor]] = []
        handle = attach(self.loaded.model, plan)
        try:
            for number, editor in enumerate(handle.editors):
                _watch(editor, number, seen)
            _forward(self.loaded, self._ids())
        finally:
            handle.remove()
        return seen


def _watch(editor: Editor, number: int, seen: list[tuple[int, Tensor, Tensor]]) -> None:
    """Let an editor note what it was given and what it gave, as [T, N]."""
    original = editor.edit

    def edit(logits: Tensor) -> Tensor:
        edited = original(logits)
        columns = logits.shape[-1]
        seen.append((number, logits.detach().reshape(-1, columns).clone(), edited.detach().reshape(-1, columns)))
        return edited

    editor.edit = edit  # type: ignore[method-assign]


def equation(formula: Formula, scale: Scale, logits_TN: Tensor, experts_N: Tensor, strength: float) -> Tensor:
    """Equations (3) to (5) of Shchukin (2024), written down once more and apart from `formulas`, in float64 [T, N].

    With a negative strength and `magnitude`, (5) never raises a logit (`formulas.zero_max_scaled`).
    """
    experts_N = torch.nn.functional.pad(experts_N.double(), (0, logits_TN.shape[-1] - len(experts_N)))
    if formula == "additive":
        return logits_TN + strength * experts_N
    largest = logits_TN.max(-1, keepdim=True).values
    push = (largest.abs() if scale == "magnitude" else largest) * strength * experts_N
    if formula == "max_scaled":
        return logits_TN + push
    replaced = torch.where(experts_N > 0, push, logits_TN + push)
    return torch.minimum(replaced, logits_TN) if scale == "magnitude" and strength < 0 else replaced


def random_vector(loaded: LoadedModel, seed: int) -> SteeringVector:
    """Half a weight on two random experts of each layer, or on one of few."""
    generator = torch.Generator().manual_seed(seed)
    routers = loaded.shape.routers
    weights = torch.zeros(len(routers), max(router.num_experts for router in routers))
    for row, router in zip(weights, routers, strict=True):
        row[torch.randperm(router.num_experts, generator=generator)[: min(2, router.num_experts // 2)]] = 0.5
    return SteeringVector(f"random{seed}", None, tuple(router.layer for router in routers), weights=weights)


def _logits(loaded: LoadedModel, ids: Sequence[int], plan: SteeringPlan | None = None) -> Tensor:
    """Of one pass without a cache, [T, V]."""
    if plan is None:
        return _forward(loaded, ids)
    handle = attach(loaded.model, plan)
    try:
        return _forward(loaded, ids)
    finally:
        handle.remove()


def _forward(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    model: Any = loaded.model
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False).logits[0]


def facts(loaded: LoadedModel) -> dict[str, str]:
    """What a maintainer wants to know: versions, the machine, the model."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("steermoe", "torch", "transformers", "tokenizers", "safetensors", "numpy", "vllm", "llama-cpp-python")
    device = loaded.device
    gpu = "none" if device.type != "cuda" else torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    routers = find_routers(language_model(loaded.model))
    return {
        "versions": ", ".join(f"{package} {of(package)}" for package in packages if of(package) != "not installed"),
        "python": f"{platform.python_version()}, {platform.platform()}",
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {capability}, {torch.get_num_threads()} threads",
        "gpu": gpu if torch.version.cuda is None else f"{gpu}, CUDA {torch.version.cuda}",
        "model": f"{loaded.name}, {type(loaded.model).__name__}, {len(routers)} MoE layers on {device}",
        "fingerprint": loaded.shape.fingerprint or "unknown",
    }


def summary(checks: Sequence[Check]) -> tuple[int, int, int]:
    """How many passed, failed and could not run."""
    return (
        sum(check.passed is True for check in checks),
        sum(check.passed is False for check in checks),
        sum(check.passed is None for check in checks),
    )
