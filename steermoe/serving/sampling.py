"""How requests say how their tokens are drawn, in the words of OpenAI's and Ollama's protocols."""

import secrets
from dataclasses import replace

from steermoe.engines.request import MOST_PENALTY, MOST_SCALING, PenalisedSampling, Sampling
from steermoe.serving.fields import Fields

LARGEST_SEED = 2**63 - 1
LARGEST_TOP_K = 2**31 - 1


def sampling_of(
    fields: Fields,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition: str = "repetition_penalty",
) -> Sampling:
    """The sampling of a request; a request without a seed gets a random one.

    Args:
        fields: of the request.
        new_tokens: the most that it may generate.
        temperature: if the request gives none; 0 takes the likeliest token.
        top_p: if the request gives none.
        top_k: if the request gives none; 0 for all tokens.
        repetition: the name of the repetition penalty.

    Raises:
        Refused: a value of the wrong type or out of range.
    """
    heat = fields.number("temperature", 0, 100, temperature)
    presence = fields.number("presence_penalty", -MOST_PENALTY, MOST_PENALTY, 0)
    frequency = fields.number("frequency_penalty", -MOST_PENALTY, MOST_PENALTY, 0)
    seed = fields.whole("seed", -LARGEST_SEED - 1, LARGEST_SEED, secrets.randbelow(2**53))
    plain = Sampling(
        max_new_tokens=new_tokens,
        min_new_tokens=fields.whole("min_tokens", 0, new_tokens, 0),
        do_sample=heat > 0,
        temperature=max(heat, 1 / MOST_SCALING) if heat > 0 else 1.0,
        top_p=fields.number("top_p", 0, 1, top_p, above=True),
        top_k=max(0, fields.whole("top_k", -1, LARGEST_TOP_K, top_k)),
        min_p=fields.number("min_p", 0, 1, 0),
        repetition_penalty=fields.number(repetition, 0, 100, 1, above=True),
        seed=seed % (LARGEST_SEED + 1),
    )
    if not presence and not frequency:
        return plain
    return PenalisedSampling(**vars(plain), presence_penalty=presence, frequency_penalty=frequency)


def samples(sampling: Sampling, number: int) -> list[Sampling]:
    """As many as there are texts of one prompt, each with a seed of its own, the first with the one that was asked."""
    return [replace(sampling, seed=(sampling.seed + i) % (LARGEST_SEED + 1)) for i in range(number)]
