"""What the benchmarks of the default model share: continuing openings in batches, and figures of the texts."""

import math
from collections.abc import Sequence

import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.evaluation.words import distinct_words, word_pattern
from steermoe.models.loading import LoadedModel
from steermoe.steering.plans import SteeringPlan

WORDS_FOR_SUCCESS = 3


def continue_openings(
    loaded: LoadedModel,
    prompts: Sequence[str],
    plan: SteeringPlan | None,
    tokens: int = 120,
    batch: int = 50,
    seed: int = 0,
) -> list[Completion]:
    """One continuation per opening; each opening has its own seed, the same for all plans, so plans can be paired."""
    engine = HFEngine(loaded)
    requests = [
        Request(prompt, plan, Sampling(max_new_tokens=tokens, temperature=0.7, seed=seed * 1000 + number))
        for number, prompt in enumerate(prompts)
    ]
    return [done for i in range(0, len(requests), batch) for done in engine.generate(requests[i : i + batch])]


def success_rate(texts: Sequence[str], words: Sequence[str]) -> float:
    """Share of texts that contain at least three different words of a domain."""
    pattern = word_pattern(words)
    return sum(len(distinct_words(text, pattern)) >= WORDS_FOR_SUCCESS for text in texts) / len(texts)


def repeated_4grams(completions: Sequence[Completion]) -> float:
    """Share of 4-grams of tokens that occurred earlier in the same text, mean over texts."""
    shares = []
    for completion in completions:
        ids = completion.token_ids
        grams = [ids[i : i + 4] for i in range(len(ids) - 3)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


def negative_log_likelihood(model: torch.nn.Module, loaded: LoadedModel, completions: Sequence[Completion]) -> float:
    """Mean nats per token of the continuations under `model` given their prompts; all tokens have the same weight."""
    total, count = 0.0, 0
    for completion in completions:
        if not completion.token_ids:
            continue
        prompt = loaded.tokenizer(completion.request.prompt)["input_ids"]
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=ids, logits_to_keep=len(completion.token_ids) + 1).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum")
        total, count = total + losses.item(), count + len(completion.token_ids)
    return total / count


def perplexity(model: torch.nn.Module, loaded: LoadedModel, texts: Sequence[str]) -> float:
    """Of whole texts, without an end token; all tokens but each text's first have the same weight."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)
