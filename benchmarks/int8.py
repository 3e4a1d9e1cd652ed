"""What `--quantize int8` costs: the default model reads the same held-out stories with its own weights and in int8.

    python benchmarks/int8.py [--texts 40] [--dtype bfloat16]

Prints the perplexity of both, the mean KL divergence per token in nats, how often the most likely token is the same,
and for what share of (token, layer) the chosen experts are the same.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from steermoe.models import loading
from steermoe.models.default.stories import load_stories
from steermoe.models.quantization import quantize_model
from steermoe.routing.routers import chosen_experts, find_routers


def read(loaded: loading.LoadedModel, texts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities [S, V] and sorted chosen experts [R, S, k] of each text."""
    routers = find_routers(loaded.model)
    chosen: dict[int, Tensor] = {}
    hooks = [
        router.module.register_forward_hook(
            lambda module, args, output, number=number, router=router: chosen.update(
                {number: chosen_experts(router, output)}
            )
        )
        for number, router in enumerate(routers)
    ]
    with torch.inference_mode():
        for ids in texts:
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].float()
            experts = torch.stack([chosen[number] for number in range(len(routers))])
            yield logits.log_softmax(-1), experts.sort(-1).values
    for hook in hooks:
        hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    loaded = loading.load(None, dtype=options.dtype)
    stories = load_stories("heldout")
    stories = stories[:: max(1, len(stories) // options.texts)][: options.texts]
    texts = [loaded.tokenizer(f"{story.opening} {story.rest}")["input_ids"] for story in stories]
    before = [(log_SV.half(), experts) for log_SV, experts in read(loaded, texts)]
    quantize_model(loaded.model)
    tokens = own = other = kl = same_token = same_set = sets = 0.0
    for ids, (log_SV, experts), (after_SV, after) in zip(texts, before, read(loaded, texts), strict=True):
        log_SV, following = log_SV.float(), torch.tensor(ids[1:])[:, None]
        tokens += len(ids) - 1
        own -= float(log_SV[:-1].gather(1, following).sum())
        other -= float(after_SV[:-1].gather(1, following).sum())
        kl += float((log_SV.exp() * (log_SV - after_SV)).sum(-1)[:-1].sum())
        same_token += int((log_SV.argmax(-1) == after_SV.argmax(-1))[:-1].sum())
        same_set += int((experts == after).all(-1).sum())
        sets += experts[..., 0].numel()
    print(f"{len(texts)} texts, {tokens:.0f} tokens")
    print(f"perplexity {torch.tensor(own / tokens).exp():.2f}, int8 {torch.tensor(other / tokens).exp():.2f}")
    print(
        f"KL {kl / tokens:.4f} nats; same most likely token {same_token / tokens:.1%}; same experts "
        f"{same_set / sets:.1%}"
    )


if __name__ == "__main__":
    main()
