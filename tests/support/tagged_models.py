"""Tiny chat models: a tokenizer with think and tool-call tags, weights that like to write them, plans for them."""

from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerFast

from steermoe.engines.request import Completion, Request, Sampling
from steermoe.models.loading import LoadedModel
from steermoe.routing.shape import RoutingShape
from steermoe.steering.plans import SteeringPlan
from tests.support import tiny_ggufs
from tests.support.vllm_engines import vector

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n"
    "{% endif %}"
)
PROMPTS = (
    "A dog ran home.",
    "It rained <think>",
    "Two<think>x</think>sisters",
    "At <tool_call>noon",
    "So: <think>on<tool_call>x",
)
"""Texts that begin outside, inside and after thinking, and inside a tool call."""


def chat_tokenizer(tags: Sequence[str] = TAGS) -> PreTrainedTokenizerFast:
    """Bytes, a few words, and the tags, each as one token that is no special one, as in Qwen3."""
    tokenizer = tiny_ggufs.byte_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def talkative(model: nn.Module) -> None:
    """Let a random model write tags often: their rows of the head are larger than others."""
    tokenizer = chat_tokenizer()
    head = model.get_output_embeddings().weight.data
    with torch.no_grad():
        for tag in TAGS:
            head[tokenizer.convert_tokens_to_ids(tag)] *= 2.5


def build(family: str = "mixtral") -> LoadedModel:
    loaded = tiny_ggufs.build(family, chat_tokenizer())
    talkative(loaded.model)
    return loaded


def plans_of_every_position(model: nn.Module | RoutingShape) -> dict[str, SteeringPlan | None]:
    """Every position that follows tags or the last prompt token, every schedule, and what they are compared with."""
    sport, food = vector(model, 1, 3), vector(model, 6, domain="food")
    return {
        "unsteered": None,
        "generated": SteeringPlan(sport, 4.0),
        "all": SteeringPlan(sport, 4.0, positions="all"),
        "last-prompt": SteeringPlan(sport, 4.0, positions="last-prompt"),
        "last-prompt, first": SteeringPlan(food, 4.0, positions="last-prompt", schedule="first:3"),
        "thinking": SteeringPlan(sport, 4.0, positions="thinking"),
        "answer": SteeringPlan(sport, 4.0, positions="answer"),
        "answer, decay": SteeringPlan(food, 5.0, "additive", positions="answer", schedule="decay:6"),
        "thinking, window": SteeringPlan(food, 4.0, positions="thinking", schedule="window:1-4"),
        "answer, after": SteeringPlan(sport, 4.0, positions="answer", schedule="after:2"),
        "tool-calls": SteeringPlan(food, 4.0, positions="tool-calls"),
        "first": SteeringPlan(sport, 4.0, schedule="first:5"),
        "after": SteeringPlan(sport, 4.0, schedule="after:4"),
        "own tags": SteeringPlan(sport, 4.0, positions="answer", think_tags=("<tool_call>", "</tool_call>")),
        "lists": SteeringPlan(positions="answer", force=((0, 2),), ban=((1, 5),)),
    }


def requests(plans: Sequence[SteeringPlan | None], tokens: int = 24) -> list[Request]:
    """A text per plan and prompt; nothing ends one early."""
    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return [Request(prompt, plan, sampling) for plan in plans for prompt in PROMPTS]


def places(completion: Completion, prompt: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Where each token of a text is: "prompt", "tag", "call tag", "thinking", "answer" or "tool-calls".

    Read off the text as a whole; the tests' own reading, for tags of one token that are well nested or not.
    """
    opens_think, closes_think, opens_call, closes_call = map(tokenizer.convert_tokens_to_ids, TAGS)
    found, thinks, calls = [], False, False
    for number, token in enumerate([*prompt, *completion.token_ids]):
        if calls:
            where = "tag" if token == closes_call else "tool-calls"
            calls = token != closes_call
        elif token == opens_call:
            where, calls = "call tag", True
        elif token == closes_think:
            where, thinks = "tag", False
        elif token == opens_think and not thinks:
            where, thinks = "tag", True
        else:
            where = "thinking" if thinks else "answer"
        found.append("prompt" if number < len(prompt) else where)
    return found


def steered(plan: SteeringPlan, places: Sequence[str]) -> int:
    """How many of the tokens that the model reads a plan steers, by the tests' own reading of a text."""
    inside = {"thinking", "answer", "tool-calls"}
    first = places.index(next(place for place in places if place != "prompt"))
    count, found = 0, 0
    for number, place in enumerate(places[:-1]):
        if plan.positions in inside:
            is_meant, at = place == plan.positions, count
        elif plan.positions == "all" and number < first:
            is_meant, at = True, -1
        else:
            at = number - first + (plan.positions == "last-prompt")
            is_meant = at >= 0 and place not in ("call tag", "tool-calls")
        count += is_meant
        found += is_meant and float(plan.schedule.factor(torch.tensor([at]))[0]) > 0
    return found
