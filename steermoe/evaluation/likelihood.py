"""How likely given continuations of given prompts are, each under its own plan. Nothing is sampled.

Shapes: B pairs and S columns of a batch.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steermoe.discovery.embedder_hf import batches
from steermoe.errors import GenerationError, SteeringError
from steermoe.evaluation.teacher_forcing import BATCH_TOKENS, padded, require_decoder
from steermoe.models.loading import LoadedModel, input_device
from steermoe.routing.positions import NOWHERE, SEGMENTS
from steermoe.routing.tracker import Window
from steermoe.steering.handle import SteeringHandle, steer
from steermoe.steering.plans import SteeringPlan

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a prompt and of its continuation."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        logprob: log-likelihood of all its tokens given the prompt, in nats.
        tokens: the number of its tokens.
        greedy: whether each token is the likeliest one.
    """

    logprob: float
    tokens: int
    greedy: bool

    @property
    def per_token(self) -> float:
        return self.logprob / self.tokens


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its continuation, cut where the prompt ends; spaces there go to the continuation.

    Raises:
        GenerationError: the continuation adds no token.
    """
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + continuation)["input_ids"]
    if len(whole) <= len(before):
        raise GenerationError(f"the continuation {continuation!r:.60} adds no token to its prompt: give a longer one")
    return before, whole[len(before) :]


def likelihoods(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    plans: Sequence[SteeringPlan | None] | SteeringPlan | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda pairs: None,
) -> list[Likelihood]:
    """The likelihood of each continuation; its first token counts as the first generated one, in any batch.

    With positions `generated` the first token's own likelihood does not change, because the prompt's last token decides
    it; `last-prompt` steers that one too.

    Args:
        loaded: the model; no steering may be attached to it.
        pairs: of each text, the tokens of its prompt and of its continuation, at least one of each.
        plans: one per pair, or one for all; None for no steering.
        batch_tokens: tokens of a forward pass.
        progress: called with the number of pairs done since the last call.

    Raises:
        SteeringError: a plan does not fit the model, follows tags, or none steers a token. UnsupportedModel: an
            encoder-decoder.
    """
    require_decoder(loaded)
    own = list(plans) if isinstance(plans, Sequence) else [plans] * len(pairs)
    for plan in own:
        if plan is not None and plan.positions in SEGMENTS:
            raise SteeringError(
                f"positions '{plan.positions}' follow tags of an answer, which given continuations do not have: use "
                "all, last-prompt, generated or prompt"
            )
    found: list[Likelihood | None] = [None] * len(pairs)
    lengths = [len(prompt) + len(rest) for prompt, rest in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)

    def read_all(handle: SteeringHandle | None) -> None:
        for numbers in batches(order, lengths, batch_tokens):
            read = _read(loaded, [pairs[i] for i in numbers], handle, [own[i] for i in numbers])
            for i, one in zip(numbers, read, strict=True):
                found[i] = one
            progress(len(numbers))

    if any(own):
        with steer(loaded.model, rows=[next(plan for plan in own if plan)]) as handle:
            read_all(handle)
    else:
        read_all(None)
    return [one for one in found if one is not None]


def _read(
    loaded: LoadedModel, pairs: Sequence[Pair], handle: SteeringHandle | None, plans: Sequence[SteeringPlan | None]
) -> list[Likelihood]:
    """One batch; the last token of each text is scored but not read."""
    model: Any = loaded.model
    read = [[*prompt, *rest][:-1] for prompt, rest in pairs]
    ids, mask = padded(read, input_device(model))
    if handle is not None:
        handle.set(rows=plans)
        handle.expect(
            Window(len(ids), ids.shape[1], 0, ids.shape[1], mask.bool(), index=_numbered(pairs, mask.cpu()), ids=ids)
        )
    kept = ids.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1  # logits over a vocabulary are costly
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **fewer).logits
    missing = ids.shape[1] - logits.shape[1]
    found = []
    for row, (prompt, rest) in zip(logits, pairs, strict=True):
        first = len(prompt) - 1 - missing
        scored = row[first : first + len(rest)].float()
        targets = torch.tensor(rest, device=scored.device)
        lost = F.cross_entropy(scored, targets, reduction="sum")
        found.append(Likelihood(-float(lost), len(rest), bool((scored.argmax(-1) == targets).all())))
    return found


def _numbered(pairs: Sequence[Pair], mask: Tensor) -> Tensor:
    """[B, S], 0 for the first token of a continuation, negative in its prompt, NOWHERE in the padding."""
    begins = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    return torch.where(mask.bool(), torch.arange(mask.shape[1]) - begins, NOWHERE)
