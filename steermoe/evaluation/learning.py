"""Learn an expert vector: E starts as the frequencies of a domain's texts, and gradient steps change its numbers.

A step reads a few texts of the domain and a few neutral ones with formula (4). It makes the domain's tokens likelier,
and keeps the damage to the neutral texts within a budget by a price of damage that follows it (a Lagrange multiplier).
Gradients reach E through the weights of the experts that were chosen. An expert that no token chooses gets none, so E
only learns about experts that some tokens choose; to start from frequencies makes the domain's own experts be chosen.

Shapes: T tokens of a batch, S scored ones, L MoE layers, N experts per layer, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steermoe import formulas
from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.discovery.labelled import CREATED_BY, routing_by_domain, vector_info
from steermoe.discovery.packaged_vectors import cut_to_steer
from steermoe.discovery.token_weights import frozen
from steermoe.errors import GenerationError, VectorError, count_of, reason
from steermoe.evaluation.calibration import calibrate, check_budget
from steermoe.evaluation.teacher_forcing import PROMPT_TOKENS, TeacherForcing, padded, require_decoder
from steermoe.models.loading import LoadedModel, input_device
from steermoe.models.quantization import is_quantized
from steermoe.routing.intercept import intercept
from steermoe.routing.routers import Router, find_routers, language_model
from steermoe.steering.plans import plan_for
from steermoe.vectors.vector import SteeringVector

TAIL = 0.1
"""The share of tokens, those with the most KL, whose mean stands for the 95th percentile in gradients."""
PRICE_RATE, LEAST_PRICE = 0.3, 0.05
"""How fast the price of damage follows the budget, and the lowest one, in nats of likelihood per nat of damage."""
MOST_EXCESS = 3.0
"""More damage beyond the budget than this, in budgets, raises the price no faster."""
COARSE = 0.05
"""Relative precision of strengths that are only compared."""
HELD_BACK = 4
"""Every this many-th text of the domain is not learned from: it shows whether learning helped."""


@dataclass(frozen=True)
class LearningSettings:
    """How a vector is learned.

    Attributes:
        budget: the damage that the domain's likelihood is bought with: 95th percentile of KL per token, in nats.
        steps: gradient steps.
        texts: of the domain, and neutral ones, in a step.
        max_tokens: tokens read of each; the first `PROMPT_TOKENS` are not steered.
        rate: of a step, as a share of the largest number of c E at the start.
        neutral: the most neutral texts that are read.
        keep_better: the vector is that at the start if learning does not help the texts that were held back.
    """

    budget: float = 1.0
    steps: int = 40
    texts: int = 4
    max_tokens: int = 64
    rate: float = 0.05
    neutral: int = 16
    keep_better: bool = True


@dataclass(frozen=True)
class Learned:
    """A learned vector, and whether learning helped.

    Attributes:
        vector: with formula (4) and the strength that spends the budget.
        gain, gain_at_start: nats per token by which the domain's texts that were held back became likelier, with the
            learned numbers and with those at the start, each at the strength that spends the budget.
    """

    vector: SteeringVector
    gain: float
    gain_at_start: float

    @property
    def helped(self) -> bool:
        """Whether the learned numbers are better than those at the start."""
        return self.gain > self.gain_at_start


def learn(
    loaded: LoadedModel,
    start: SteeringVector,
    texts: Sequence[str],
    neutral: Sequence[str],
    settings: LearningSettings | None = None,
    *,
    progress: Callable[[int, int], None] = lambda steps, tokens: None,
) -> Learned:
    """Learn E of one domain; the model's weights stay as they are.

    Args:
        loaded: the model; no steering may be attached to it.
        start: the vector to start from, such as one of `vectors_from_labelled`.
        texts: of the domain.
        neutral: texts that are not about it.
        settings: by default those of `LearningSettings`.
        progress: called with the steps and tokens done since the last call.

    Raises:
        VectorError: a quantised model, one that gives no gradients, or too few texts. GenerationError: texts that are
            too short. SteeringError: an impossible budget. UnsupportedModel: an encoder-decoder.
    """
    settings = settings or LearningSettings()
    check_learnable(loaded)
    check_budget(settings.budget)
    if len(texts) < 2:
        raise VectorError(
            f"'{start.domain}' has {len(texts)} text to learn from: give 2 or more, and better a few dozen"
        )
    held, own = list(texts[::HELD_BACK]), [text for i, text in enumerate(texts) if i % HELD_BACK]
    few = neutral[: settings.neutral]
    on_neutral = TeacherForcing(loaded, few, max_tokens=settings.max_tokens)
    on_held = TeacherForcing(loaded, held[: settings.neutral], max_tokens=settings.max_tokens)
    first = _Candidate.of(start, on_held, on_neutral, settings.budget)
    largest = float((first.strength * start.experts).abs().max())
    steps = _Steps(loaded, (own, few), first.strength * start.experts, largest, settings)
    with frozen(loaded.model):
        for number in range(settings.steps):
            progress(1, steps.take(number))
    info = replace(
        start.info,
        title=f"{start.domain}, learned from {count_of(len(texts), 'text')} within {settings.budget:g} nats",
        created_by=f"{start.info.created_by} --rule learned",
    )
    weights = steps.experts() / first.strength
    found = replace(start, frequency=None, baseline=None, relative=False, weights=weights, info=info)
    last = _Candidate.of(found, on_held, on_neutral, settings.budget)
    is_kept = settings.keep_better and last.gain <= first.gain
    return Learned((first if is_kept else last).vector, last.gain, first.gain)


def starting_vectors(
    source: RoutingSource,
    domains: Mapping[str, Sequence[str]],
    neutral: Sequence[str],
    *,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> list[SteeringVector]:
    """A vector of each domain to start from: its mean routing where that exceeds that of all domains and neutral texts.

    Args:
        source: the model, with no steering attached.
        domains: domain -> its texts.
        neutral: texts that are not about any of them.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        VectorError: no texts, a text without tokens, or routers that treat a domain's texts like all others.
    """
    corpora = {**domains, "": neutral}  # no domain has that name
    read = routing_by_domain(source, corpora, max_tokens=max_tokens, progress=progress)
    baseline = torch.stack([frequency.mean(0) for frequency, _ in read.values()]).mean(0)
    made = []
    for domain, texts in domains.items():
        frequency, tokens = read[domain]
        info = vector_info(source, texts, tokens, CREATED_BY)
        layers = source.shape.layers
        vector = SteeringVector(domain, frequency.mean(0), layers, baseline=baseline, relative=True, info=info)
        made.append(cut_to_steer(vector, 1 / len(read))[0])
    return made


def check_learnable(loaded: RoutingSource) -> LoadedModel:
    """The model itself, if it gives gradients.

    Raises:
        VectorError: it runs in llama.cpp, or is quantised. UnsupportedModel: an encoder-decoder.
    """
    if not isinstance(loaded, LoadedModel):
        raise VectorError(
            f"{loaded.shape.name} runs in llama.cpp, which has no gradients to learn from, as --rule learned does: use "
            "--engine hf, or another rule"
        )
    require_decoder(loaded)
    if is_quantized(loaded.model):
        raise VectorError(
            f"{loaded.name} is quantised, which leaves no gradients to learn from, as --rule learned does: load it "
            "unquantised, or use another rule"
        )
    return loaded


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A vector at the strength that spends the budget on neutral texts, and what texts of its domain gain there."""

    vector: SteeringVector
    strength: float
    gain: float

    @classmethod
    def of(cls, vector: SteeringVector, own: TeacherForcing, neutral: TeacherForcing, budget: float) -> "_Candidate":
        plan = plan_for(vector, 1.0, formula="max_scaled", scale="magnitude")
        found = calibrate(
            lambda strength: neutral.compare(replace(plan, strength=strength)).kl_p95, budget, tolerance=COARSE
        )
        figures = own.compare(replace(plan, strength=found.strength))
        info = replace(
            vector.info,
            formula="max_scaled",
            scale="magnitude",
            strength=found.strength,
            safe_range=found.safe_range,
            damage=found.damage,
        )
        return cls(replace(vector, info=info), found.strength, figures.nats_unsteered - figures.nats)


# ---- gradient steps ----


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts of one step.

    Attributes:
        ids, mask: [B, C] of C columns. scored: [B, C-1], columns whose prediction counts. steered: [B, C].
        targets: [S]. unsteered: log-probabilities [S, V] without steering, in the model's own type.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor
    steered: Tensor
    targets: Tensor
    unsteered: Tensor | None


class _Steps:
    """Gradient steps on c E, by Adam with a rate that falls to 0.

    Args:
        loaded: the model. texts: of the domain, and neutral ones. experts: c E at the start [L, N].
        largest: its largest number. settings: how.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: tuple[Sequence[str], Sequence[str]],
        experts: Tensor,
        largest: float,
        settings: LearningSettings,
    ) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model
        self._settings = settings
        self._rows = [row.clone().to(loaded.device).requires_grad_() for row in experts]
        self._adam = torch.optim.Adam(self._rows, lr=settings.rate * largest, betas=(0.9, 0.98))
        self._rate = settings.rate * largest
        self._price = 1.0
        self._own = self._batches(texts[0], keeps_unsteered=False)
        self._neutral = self._batches(texts[1], keeps_unsteered=True)

    def take(self, number: int) -> int:
        """Take the `number`-th step; returns how many tokens it read.

        Raises:
            VectorError: the model gives no gradients.
        """
        own, neutral = (batches[number % len(batches)] for batches in (self._own, self._neutral))
        budget = self._settings.budget
        self._adam.zero_grad()
        try:
            loss = F.cross_entropy(self._read(own), own.targets)
            loss.backward()
            log_SV = self._read(neutral).log_softmax(-1)
            assert neutral.unsteered is not None
            kl_S = (log_SV.exp() * (log_SV - neutral.unsteered.float())).sum(-1)
            tail = kl_S.topk(max(1, math.ceil(TAIL * len(kl_S)))).values.mean()
            (self._price * tail).backward()
        except (RuntimeError, NotImplementedError) as error:  # what a model's kernels raise that have no gradient
            raise VectorError(
                f"{self._loaded.name} gives no gradients to learn from, as --rule learned does ({reason(error)}): use "
                "another rule"
            ) from error
        self._leave_out_idle_layers(number)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * (1 - number / self._settings.steps)
        self._adam.step()
        excess = (tail.item() - budget) / budget
        self._price = max(LEAST_PRICE, self._price * math.exp(PRICE_RATE * min(excess, MOST_EXCESS)))
        return int(own.mask.sum() + neutral.mask.sum())

    def experts(self) -> Tensor:
        """Returns c E as it is now, [L, N]."""
        return torch.stack([row.detach().float().cpu() for row in self._rows])

    def _leave_out_idle_layers(self, number: int) -> None:
        """After the first step, stop learning about the layers before the first one that has any effect: cheaper."""
        if number:
            return
        for row in self._rows:
            if row.grad is not None and row.grad.any():
                return
            row.requires_grad_(False)
            row.grad = None
        raise VectorError(
            f"{self._loaded.name}: no expert's weight changes what it predicts here, so nothing can be learned: use "
            "another rule"
        )

    def _read(self, batch: _Batch, *, steered: bool = True) -> Tensor:
        """Logits [S, V] of the scored columns, float32."""
        with ExitStack() as stack:
            if steered:
                stack.enter_context(_pushed(self._model, self._rows, batch.steered))
            logits = self._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return logits[:, :-1][batch.scored].float()

    def _batches(self, texts: Sequence[str], *, keeps_unsteered: bool) -> list[_Batch]:
        """All texts that are long enough, `settings.texts` at a time.

        Raises:
            GenerationError: none is.
        """
        encoded = [self._loaded.tokenizer(text)["input_ids"][: self._settings.max_tokens] for text in texts]
        usable = [ids for ids in encoded if len(ids) > PROMPT_TOKENS + 1]
        if not usable:
            raise GenerationError(f"no text to learn from has more than {PROMPT_TOKENS + 1} tokens: give longer ones")
        found = []
        for first in range(0, len(usable), self._settings.texts):
            ids, mask = padded(usable[first : first + self._settings.texts], input_device(self._model))
            is_read = mask.bool()
            steered = is_read.clone()
            steered[:, :PROMPT_TOKENS] = False
            scored = steered[:, :-1] & is_read[:, 1:]
            batch = _Batch(ids, mask, scored, steered, ids[:, 1:][scored], None)
            if keeps_unsteered:
                with torch.no_grad():
                    log_SV = self._read(batch, steered=False).log_softmax(-1)
                batch = replace(batch, unsteered=log_SV.to(self._model.dtype))
            found.append(batch)
        return found


class _Push:
    """Applies formula (4) to one router's logits, with gradients for its row of c E. A `LogitsEditor`."""

    def __init__(self, router: Router, row: Tensor, steered: Tensor) -> None:
        self._router = router
        self._row = row
        self._steered_T1 = steered.flatten()[:, None]

    def active(self) -> bool:
        return True

    def edit(self, logits: Tensor) -> Tensor:
        flat = logits.reshape(-1, logits.shape[-1])
        if len(flat) != len(self._steered_T1):
            raise VectorError(
                f"router '{self._router.name}' saw {len(flat)} tokens where the batch has {len(self._steered_T1)}: "
                "--rule learned can't tell which to steer; use another rule"
            )
        push = F.pad(self._row, (0, self._router.num_experts - len(self._row))).to(flat.device)
        own = flat[:, : self._router.num_experts].float()
        pushed = formulas.apply("max_scaled", own, push, push > 0, "magnitude")
        pushed = pushed.where(self._steered_T1.to(flat.device), own).to(flat.dtype)
        return torch.cat([pushed, flat[:, self._router.num_experts :]], -1).view_as(logits)

    def runs(self) -> int:
        return 1

    def observe(self, output: Any) -> None:
        """Nothing to keep."""


@contextmanager
def _pushed(model: Any, rows: Sequence[Tensor], steered: Tensor) -> Iterator[None]:
    """Push the logits of all routers while a model runs."""
    inner = language_model(model)
    with ExitStack() as undo:
        for router, row in zip(find_routers(inner), rows, strict=True):
            undo.callback(intercept(inner, router, _Push(router, row, steered)))
        yield
