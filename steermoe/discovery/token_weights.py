"""Which tokens of texts weigh most for a model, by gradients, and which experts it chooses for them, as DSMoE counts.

After the code that its authors published (2604.05267). Knows nothing of vectors.

Shapes: T tokens of a text, L MoE layers, N experts per layer, k experts chosen per token, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.errors import VectorError, reason
from steermoe.models.loading import LoadedModel
from steermoe.routing.recording import watch_choices
from steermoe.routing.routers import find_routers

PERCENTILE = 15.0
"""Tokens up to this percentile of the weights of all tokens weigh little."""
_WORDS = """
a about after all also am an and any are as at be because been before being between both but by can could did do does
down each few for from had has have he her here hers him his how i if in into is it its just may me might more most
must my no nor not of off on once only or other our out over own same shall she should so some such than that the
their them then there these they this those through to too under until up us very was we were what when where which
while who whom why will with would you your а без бы был была были было быть в во вот для до его ее её если есть еще
ещё же за и из или им их к как ко когда кто ли мы на не ни но о об он она они от по под при с со так там то тот у уже
что чтобы эта это этот я
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
"""English and Russian words that weigh little wherever they stand; the authors take NLTK's list of English ones."""


@dataclass(frozen=True, eq=False)
class WeighedChoices:
    """How often each expert was chosen, [L, N] int64, over the tokens of some texts.

    Attributes:
        heavy: for tokens that weigh much. light: for those that weigh little. total: for all.
        tokens: of each text.
    """

    heavy: Tensor
    light: Tensor
    total: Tensor
    tokens: Tensor


def weigh_choices(
    source: RoutingSource, texts: Sequence[str], *, max_tokens: int = 512, progress: TextProgress | None = None
) -> WeighedChoices:
    """Count the choices of experts apart for tokens that weigh much and little.

    A token weighs as much as the norm of gradient x embedding, where the gradient is that of the text's mean loss per
    token. Punctuation, function words, and tokens up to the 15th percentile weigh little; white space neither.

    Args:
        source: the model, with no steering attached.
        texts: texts of any length.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        VectorError: no texts, one without tokens, or a model that gives no gradients.
    """
    if not isinstance(source, LoadedModel):
        raise VectorError(
            f"{source.shape.name} runs in llama.cpp, which has no gradients to weigh tokens by, as --rule dsmoe does: "
            "use --engine hf, or another rule"
        )
    if not texts:
        raise VectorError("no texts were given")
    words, weights, choices, lengths = [], [], [], []
    with frozen(source.model):
        for number, text in enumerate(texts):
            ids = source.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
            if not ids:
                raise VectorError(f"text {number} has no tokens: leave it out")
            weight_T, chosen_LTk = _read(source, ids)
            words += [source.tokenizer.decode([one], skip_special_tokens=True).strip() for one in ids]
            weights.append(weight_T)
            choices.append(chosen_LTk)
            lengths.append(len(ids))
            if progress is not None:
                progress(1, len(ids))
    heavy_T, light_T = heavy_and_light(words, torch.cat(weights))
    chosen_LTk, experts = torch.cat(choices, 1), source.shape.num_experts
    return WeighedChoices(
        count_choices(chosen_LTk[:, heavy_T], experts),
        count_choices(chosen_LTk[:, light_T], experts),
        count_choices(chosen_LTk, experts),
        torch.tensor(lengths),
    )


def heavy_and_light(words: Sequence[str], weight_T: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens weigh much and which little, bool [T] each; white space, "", is neither.

    Args:
        words: the text of each token, without white space.
        weight_T: its weight.
    """
    is_word_T = torch.tensor([bool(word) for word in words])
    if not is_word_T.any():
        return is_word_T, is_word_T
    bar = torch.quantile(weight_T[is_word_T].double(), PERCENTILE / 100)
    says_little_T = torch.tensor(
        [word.lower() in FUNCTION_WORDS or not any(char.isalnum() for char in word) for word in words]
    )
    light_T = is_word_T & (says_little_T | (weight_T.double() <= bar))
    return is_word_T & ~light_T, light_T


def count_choices(chosen_LTk: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, [L, N] int64; a choice beyond the N experts, of none, does not count."""
    flat = chosen_LTk.flatten(1).long()
    counts = torch.zeros(len(flat), experts, dtype=torch.int64)
    return counts.scatter_add_(1, flat.clamp(max=experts - 1), (flat < experts).long())


def _read(source: LoadedModel, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The weight of each token [T], and the experts that were chosen for it [L, T, k]."""
    model: Any = source.model
    row = torch.tensor([ids], device=source.device)
    try:
        with torch.enable_grad(), watch_choices(model) as chosen:
            embedded = model.get_input_embeddings()(row).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, row[0, 1:].to(logits.device), reduction="sum") / max(1, len(logits))
            (gradient,) = torch.autograd.grad(loss, embedded)
    except Exception as error:  # a model's own code, and every backend's: what they raise has no common type
        raise VectorError(
            f"{source.shape.name} gives no gradients to weigh tokens by, as --rule dsmoe does ({reason(error)}): use "
            "another rule"
        ) from error
    routers = find_routers(model)
    if len(chosen) != len(routers) or any(len(one) != len(ids) for one in chosen):
        raise VectorError(
            f"{source.shape.name} does not route token by token, one call a layer, as --rule dsmoe counts: use another "
            "rule"
        )
    width, none = max(one.shape[1] for one in chosen), source.shape.num_experts
    padded = [
        F.pad(one.where(one < router.num_experts, none), (0, width - one.shape[1]), value=none)
        for one, router in zip(chosen, routers, strict=True)
    ]
    weight_T = (gradient * embedded.detach())[0].float().norm(dim=-1).cpu()
    return weight_T, torch.stack(padded).to(torch.int32)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Keep no gradients for a model's weights: only those of its inputs are wanted."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
