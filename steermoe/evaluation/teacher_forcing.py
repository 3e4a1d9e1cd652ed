"""How steering changes a model's predictions on given texts: divergence, perplexity, routing. Nothing is sampled.

The model reads each text (teacher forcing). The first tokens are its prompt and are not steered; the rest is treated as
if it were being generated, and its predictions are compared with the unsteered model's.

Shapes: B texts and S columns of a batch, T scored tokens of it, V vocabulary, C router calls, k experts per token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steermoe.discovery.embedder_hf import batches
from steermoe.engines.request import Completion
from steermoe.errors import GenerationError, UnsupportedModel, count_of
from steermoe.models.loading import LoadedModel, input_device
from steermoe.routing.recording import watch_choices
from steermoe.steering.handle import steer
from steermoe.steering.plans import SteeringPlan

PROMPT_TOKENS = 16
MAX_TOKENS = 112
BATCH_TOKENS = 1024
"""Tokens per forward pass: their logits over the whole vocabulary must fit in memory twice."""


@dataclass(frozen=True)
class TextFigures:
    """The effect of a plan on some texts, over all scored tokens.

    Attributes:
        kl_mean, kl_p95: mean and 95th percentile of KL(steered || unsteered) per token, in nats.
        nats, nats_unsteered: mean negative log-likelihood of the texts' own tokens; perplexity is its exponential.
        vector_share: share of the steered tokens' top-k slots that went to the vector's experts.
        jaccard: intersection over union of the experts chosen with and without steering, mean over tokens and layers.
        steered: share of all tokens, including the prompt, that were steered.
        tokens: scored tokens.
    """

    kl_mean: float
    kl_p95: float
    nats: float
    nats_unsteered: float
    vector_share: float
    jaccard: float
    steered: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts of similar length with the unsteered model's predictions for them.

    Attributes:
        ids, mask: [B, S]. scored: [B, S-1], true where the column's prediction counts. targets: [T].
        logits: [T, V] in the model's own dtype, so that a caller with many plans computes them once.
        chosen: [C, T, k], the experts that each router chose; None if they can't be separated by token.
    """

    ids: Tensor
    mask: Tensor
    scored: Tensor
    targets: Tensor
    logits: Tensor
    chosen: Tensor | None


class TeacherForcing:
    """Texts on which plans are compared with the unsteered model, whose predictions are computed once and kept.

    These take 2 bytes x vocabulary per scored token in bfloat16: 100 KB for 49,152 entries, 250 MB for 2,500 tokens.

    Args:
        loaded: the model; no steering may be attached to it.
        texts: what to read; texts that are too short are left out.
        prompt_tokens: tokens at the beginning of each that are not steered.
        max_tokens: tokens read of each, at most.

    Raises:
        GenerationError: no text is long enough. UnsupportedModel: an encoder-decoder.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[str],
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        require_decoder(loaded)
        self._model: Any = loaded.model
        self.prompt_tokens = prompt_tokens
        encoded = [loaded.tokenizer(text)["input_ids"][:max_tokens] for text in texts]
        usable = sorted((ids for ids in encoded if len(ids) > prompt_tokens + 1), key=len)
        if not usable:
            raise GenerationError(
                f"none of {count_of(len(texts), 'text')} has more than {prompt_tokens + 1} tokens: "
                "give longer texts to measure on"
            )
        cut = batches(range(len(usable)), list(map(len, usable)), BATCH_TOKENS)
        self._batches = [self._unsteered([usable[i] for i in numbers]) for numbers in cut]
        self.tokens = sum(len(batch.targets) for batch in self._batches)
        nats = [F.cross_entropy(batch.logits.float(), batch.targets, reduction="sum") for batch in self._batches]
        self.nats = float(torch.stack(nats).sum()) / self.tokens

    def compare(self, plan: SteeringPlan) -> TextFigures:
        """Read the texts with steering.

        Raises:
            SteeringError: the plan does not fit the model, or steers none of the tokens.
        """
        with steer(self._model, rows=[plan]) as handle:
            handle.set(prompt_length=self.prompt_tokens)
            read = self._compared()
            report = handle.report()
        return replace(read, vector_share=report.vector_share, steered=report.tokens_steered / report.tokens_seen)

    def compare_as_is(self, wanted: Tensor) -> TextFigures:
        """Read the texts with the model as it is now: with other weights than before, or steered by somebody else.

        Args:
            wanted: of each router, whether a column is one of the vector's experts [C, W].

        Returns:
            figures whose `vector_share` is that of the scored tokens; NaN if choices can't be separated by token.
        """
        return self._compared(wanted)

    def _compared(self, wanted: Tensor | None = None) -> TextFigures:
        """What the model does now, beside what it did at first."""
        kl, losses, overlaps, hits = [], [], [], []
        for batch in self._batches:
            logits_TV, chosen = self._read(batch.ids, batch.mask, batch.scored)
            log_TV, base_TV = logits_TV.float().log_softmax(-1), batch.logits.float().log_softmax(-1)
            kl.append((log_TV.exp() * (log_TV - base_TV)).sum(-1))
            losses.append(F.nll_loss(log_TV, batch.targets, reduction="sum"))
            if chosen is not None and batch.chosen is not None:
                overlaps.append(_jaccard(chosen, batch.chosen).flatten())
            if chosen is not None and wanted is not None:
                hits.append(wanted.to(chosen.device).gather(1, chosen.flatten(1).long()).flatten().float())
        kl_T = torch.cat(kl)
        return TextFigures(
            kl_mean=float(kl_T.mean()),
            kl_p95=float(kl_T.quantile(0.95)),
            nats=float(torch.stack(losses).sum()) / self.tokens,
            nats_unsteered=self.nats,
            vector_share=float(torch.cat(hits).mean()) if hits else float("nan"),
            jaccard=float(torch.cat(overlaps).mean()) if overlaps else float("nan"),
            steered=1.0,
            tokens=self.tokens,
        )

    def popularity(self, experts: int) -> Tensor:
        """How often each expert is chosen without steering, as shares of a layer's choices [C, experts].

        Raises:
            UnsupportedModel: its choices can't be separated by token.
        """
        chosen = [batch.chosen for batch in self._batches if batch.chosen is not None]
        if not chosen:
            raise UnsupportedModel("which experts are popular can't be measured: the routers' choices are not by token")
        counts = [torch.bincount(row.flatten().long(), minlength=experts) for row in torch.cat(chosen, 1)]
        found = torch.stack(counts).float()
        return found / found.sum(1, keepdim=True)

    def largest_difference(self, plan: SteeringPlan) -> float:
        """The largest difference of any scored logit that a plan makes; 0 means bit-identical."""
        with steer(self._model, rows=[plan]) as handle:
            handle.set(prompt_length=self.prompt_tokens)
            read = [self._read(batch.ids, batch.mask, batch.scored)[0] for batch in self._batches]
        return max(
            float((logits.float() - batch.logits.float()).abs().max())
            for logits, batch in zip(read, self._batches, strict=True)
        )

    def _unsteered(self, texts: Sequence[Sequence[int]]) -> _Batch:
        ids, mask = padded(texts, input_device(self._model))
        scored = mask[:, 1:].bool()
        scored[:, : self.prompt_tokens] = False
        logits, chosen = self._read(ids, mask, scored)
        return _Batch(ids, mask, scored, ids[:, 1:][scored], logits, chosen)

    def _read(self, ids: Tensor, mask: Tensor, scored: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [T, V] of the scored columns, and the experts chosen for them [C, T, k], if known by token."""
        with torch.inference_mode(), watch_choices(self._model) as chosen:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][scored]
        rows, columns = ids.shape
        if len({tensor.shape for tensor in chosen}) != 1 or len(chosen[0]) != rows * columns:
            return logits, None
        kept = [tensor.view(rows, columns, -1)[:, :-1][scored] for tensor in chosen]
        return logits, torch.stack(kept).to(torch.int16)


def require_decoder(loaded: LoadedModel) -> None:
    if loaded.model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{loaded.name} is an encoder-decoder, which does not continue a text: damage and likelihood are measured "
            "on models that do"
        )


def continuation_nats(loaded: LoadedModel, completions: Sequence[Completion]) -> list[float | None]:
    """Mean negative log-likelihood per token, in nats, of each continuation given its prompt, without steering.

    Gibberish is far above what the model itself generates, a loop far below. None for an empty continuation.

    Raises:
        UnsupportedModel: an encoder-decoder.
    """
    require_decoder(loaded)
    model: Any = loaded.model
    prompts = [loaded.tokenizer(done.request.prompt, split_special_tokens=True)["input_ids"] for done in completions]
    texts = [[*prompt, *done.token_ids] for prompt, done in zip(prompts, completions, strict=True)]
    found: list[float | None] = [None] * len(completions)
    order = sorted((i for i, done in enumerate(completions) if done.token_ids), key=lambda i: len(texts[i]))
    for numbers in batches(order, list(map(len, texts)), BATCH_TOKENS):
        ids, mask = padded([texts[i] for i in numbers], loaded.device)
        first = min(len(prompts[i]) for i in numbers) - 1
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, first:-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, first + 1 :].flatten(), reduction="none")
        for i, row in zip(numbers, losses.view(len(numbers), -1).tolist(), strict=True):
            own = row[len(prompts[i]) - 1 - first : len(texts[i]) - 1 - first]
            found[i] = sum(own) / len(own)
    return found


def padded(texts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, S], padded on the right."""
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
    return ids, mask


def _jaccard(chosen: Tensor, before: Tensor) -> Tensor:
    """[C, T], intersection over union of two choices [C, T, k], each of distinct experts."""
    common = (chosen[..., :, None] == before[..., None, :]).any(-1).sum(-1)
    return common / (2 * chosen.shape[-1] - common)
