"""Build steering vectors from texts: each text's routing embedding, and their mean as a domain's vector.

Shapes: B texts, L MoE layers, N experts a layer.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from steermoe.errors import VectorError
from steermoe.models import LoadedModel
from steermoe.recording import record_routing
from steermoe.routers import find_routers
from steermoe.vectors import DEFAULT_THRESHOLD, SteeringVector, VectorInfo


def routing_embeddings(
    loaded: LoadedModel, texts: Sequence[str], *, max_tokens: int = 512, batch: int = 8
) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen on each text (Shchukin 2024).

    Args:
        loaded: the model with its tokenizer.
        texts: texts of any length.
        max_tokens: only so many tokens of each are read.
        batch: texts a forward pass; similar lengths go together, padding is not counted.

    Returns:
        F [B, L, N] float32, each row summing to 1, and the number of tokens read of each text [B].

    Raises:
        VectorError: a text without tokens.
    """
    inner, tokenizer = loaded.model.base_model, loaded.tokenizer
    token_ids = [tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in texts]
    lengths = [len(ids) for ids in token_ids]
    if not texts or not min(lengths):
        raise VectorError(f"text {lengths.index(0)} has no tokens: leave it out" if texts else "no texts were given")
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    embeddings: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.inference_mode(), record_routing(inner) as record:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = lengths[chosen[-1]]
            padded = [token_ids[i] + [tokenizer.pad_token_id] * (width - lengths[i]) for i in chosen]
            real = [[1] * lengths[i] + [0] * (width - lengths[i]) for i in chosen]
            record.reset()
            device = loaded.model.device
            inner(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(real, device=device),
                use_cache=False,
            )
            for i, embedding in zip(chosen, record.frequency(), strict=True):
                embeddings[i] = embedding
    return torch.stack(embeddings), torch.tensor(lengths)


def vector_from_texts(
    loaded: LoadedModel,
    domain: str,
    texts: Sequence[str],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    keywords: Sequence[str] = (),
    max_tokens: int = 512,
) -> SteeringVector:
    """The steering vector of a domain: the mean routing embedding of its texts, cut at `threshold` times 1/N.

    Args:
        loaded: the model that the vector is for.
        domain: its name, such as "sport".
        texts: texts of the domain, some dozens at least.
        threshold: the paper takes 3.
        keywords: words of the domain, to highlight in comparisons.
        max_tokens: tokens read of each text.

    Raises:
        VectorError: no texts, or an empty one.
    """
    frequencies, tokens = routing_embeddings(loaded, texts, max_tokens=max_tokens)
    routers = find_routers(loaded.model)
    info = VectorInfo(
        keywords=tuple(keywords),
        model=loaded.name,
        architecture=loaded.model.config.model_type,
        top_k=routers[0].top_k,
        texts=len(texts),
        tokens=int(tokens.sum()),
        corpus_sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        created_by="steermoe.vector_from_texts",
    )
    layers = tuple(router.layer for router in routers)
    return SteeringVector(domain, frequencies.mean(0), layers, threshold=threshold, info=info)
