"""Vectors by the rules of other papers: which experts a domain has, and what is done to their logits.

No rule needs an edit of its own: each is one of the three formulas, with an expert vector that holds the rule's
experts, and a strength. The vector keeps both, so that `generate` and all else steer as the paper does.

Shapes: B texts, L MoE layers, N experts per layer, k experts chosen per token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from steermoe.discovery.contrast import activation_rate, risk_difference, strongest
from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.discovery.labelled import CREATED_BY, routing_by_domain, vector_info
from steermoe.discovery.packaged import NEUTRAL, Language, packaged_texts
from steermoe.discovery.packaged_vectors import MAX_TOKENS
from steermoe.discovery.token_weights import WeighedChoices, weigh_choices
from steermoe.errors import VectorError
from steermoe.models.default.stories import domain_words
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.formats.cells import ACTIVATED, DEACTIVATED
from steermoe.vectors.vector import SteeringVector

PeerRule: TypeAlias = Literal["steermoe", "dsmoe", "safex"]
Rule: TypeAlias = Literal["paper", "steermoe", "dsmoe", "safex"]
"""`paper` is that of Shchukin (2024), which the other functions of this room follow."""
PEERS: tuple[PeerRule, ...] = get_args(PeerRule)
PAPERS = {"steermoe": "SteerMoE, 2509.09660", "dsmoe": "DSMoE, 2604.05267", "safex": "SAFEx, 2506.17368"}
COMPARING: tuple[PeerRule, ...] = ("steermoe", "safex")
"""The rules that compare a domain's texts with others."""

DSMOE_EXPERTS, DSMOE_STRENGTH = 10, 0.10
"""N and s of DSMoE."""
RESAMPLES, SEED = 20, 0
"""How often SAFEx's rule draws as many texts as there are, with replacement; the paper gives no number."""


@dataclass(frozen=True, eq=False)
class Routing:
    """How a set of texts is routed.

    Attributes:
        frequency: F [B, L, N] of its texts.
        tokens: [B], the tokens of each.
        top_k: experts per token.
    """

    frequency: Tensor
    tokens: Tensor
    top_k: int

    def rate(self, rows: Tensor | None = None) -> Tensor:
        """Share of the tokens that choose each expert, [L, N]; of the texts in `rows`, which may repeat."""
        if rows is None:
            return activation_rate(self.frequency, self.tokens, self.top_k)
        return activation_rate(self.frequency[rows], self.tokens[rows], self.top_k)


def default_experts(rule: PeerRule, shape: RoutingShape) -> int:
    """How many experts a rule takes over all layers by default: DSMoE's 10, or as many as one token uses."""
    return DSMOE_EXPERTS if rule == "dsmoe" else sum(router.top_k for router in shape.routers)


# ---- the rules ----


def steermoe_experts(difference: Tensor, top_k: int, count: int) -> Tensor:
    """The expert vector of SteerMoE's rule [L, N]: 1 to activate, `DEACTIVATED` to deactivate, else 0.

    Those with the largest risk differences are activated, at most k in a layer, and those with the smallest ones
    deactivated, so that k are left in each layer.

    Args:
        difference: the risk difference [L, N].
        top_k: k.
        count: the most experts of either kind, over all layers.
    """
    experts = torch.zeros_like(difference)
    rows = range(len(difference))
    for least, value, most in ((False, 1.0, top_k), (True, DEACTIVATED, difference.shape[1] - top_k)):
        for row, expert, _ in strongest(difference, rows, count, least=least):
            if int((experts[row] == value).sum()) < most:
                experts[row, expert] = value
    return experts


def dsmoe_scores(choices: WeighedChoices) -> Tensor:
    """DSMoE's score of each expert [L, N]: (choices for heavy tokens - choices for light ones) x its share of all."""
    share = choices.total.double() / choices.total.sum().clamp(min=1)
    return (choices.heavy - choices.light).double() * share


def dsmoe_experts(scores: Tensor, count: int) -> Tensor:
    """The expert vector of DSMoE's rule [L, N]: 1 for the `count` experts of all layers with the best scores."""
    best = scores.flatten().sort(descending=True, stable=True).indices[:count]
    experts = torch.zeros(scores.numel())
    experts[best] = 1.0
    return experts.view(scores.shape)


def stable_experts(routing: Routing, count: int) -> Tensor:
    """Which experts are among the `count` most active ones of all layers in every resample of texts, bool [L, N]."""
    texts = len(routing.tokens)
    draws = np.random.default_rng(SEED).integers(texts, size=(RESAMPLES, texts))
    stable = torch.ones(routing.frequency.shape[1:], dtype=torch.bool)
    for rows in torch.from_numpy(draws):
        rate = routing.rate(rows)
        best = rate.flatten().sort(descending=True, stable=True).indices[:count]
        among = torch.zeros(rate.numel(), dtype=torch.bool)
        among[best] = True
        stable &= among.view(rate.shape) & (rate > 0)
    return stable


def safex_experts(own: Routing, others: Routing, count: int) -> Tensor:
    """The expert vector of SAFEx's rule [L, N]: the mean F of experts that are stable for these texts, not for others.

    SAFEx compares groups of prompts in this way; it masks the experts, as a large negative strength does.
    """
    is_own = stable_experts(own, count) & ~stable_experts(others, count)
    return own.frequency.mean(0).where(is_own, 0.0)


# ---- vectors ----


def vectors_by_rule(
    source: RoutingSource,
    rule: PeerRule,
    domains: Mapping[str, Sequence[str]],
    others: Sequence[str] = (),
    *,
    experts: int | None = None,
    max_tokens: int = 512,
    progress: TextProgress | None = None,
) -> list[SteeringVector]:
    """A vector of each domain by the rule of another paper, with the formula and strength that make it that rule.

    Args:
        source: the model, with no steering attached.
        rule: whose.
        domains: domain -> its texts.
        others: texts of no domain. A domain is compared with these and with the texts of all other domains.
        experts: how many experts the rule takes over all layers; see `default_experts`.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        VectorError: no texts or nothing to compare them with, one without tokens, no expert that the rule takes; with
            dsmoe, a model that gives no gradients.
    """
    check_comparable(rule, len(domains), bool(others))
    count = default_experts(rule, source.shape) if experts is None else experts
    made = []
    if rule == "dsmoe":
        for domain, texts in domains.items():
            choices = weigh_choices(source, texts, max_tokens=max_tokens, progress=progress)
            chosen = dsmoe_experts(dsmoe_scores(choices), count)
            made.append(_vector(source, rule, domain, chosen, texts, choices.tokens))
        return made
    sets = {**domains, "": others} if others else dict(domains)
    read = routing_by_domain(source, sets, max_tokens=max_tokens, progress=progress)
    top_k = source.shape.top_k
    for domain, texts in domains.items():
        own = Routing(*read[domain], top_k)
        rest = _together([read[name] for name in sets if name != domain], top_k)
        if rule == "steermoe":
            chosen = steermoe_experts(risk_difference(own.rate(), rest.rate()), top_k, count)
        else:
            chosen = safex_experts(own, rest, count)
        made.append(_vector(source, rule, domain, chosen, texts, own.tokens))
    return made


def _together(sets: Sequence[tuple[Tensor, Tensor]], top_k: int) -> Routing:
    """Several sets of texts as one."""
    return Routing(torch.cat([frequency for frequency, _ in sets]), torch.cat([tokens for _, tokens in sets]), top_k)


def check_comparable(rule: PeerRule, domains: int, has_others: bool) -> None:
    """Raise VectorError if a rule has nothing to compare texts with, or other texts would have no effect on it."""
    if rule in COMPARING and domains < 2 and not has_others:
        raise VectorError(
            f"--rule {rule} compares texts with others: name them with --against, or give the --texts of a second "
            "domain"
        )
    if rule not in COMPARING and has_others:
        raise VectorError(f"--rule {rule} compares texts with no others: leave out --against")


def _vector(
    source: RoutingSource, rule: PeerRule, domain: str, experts: Tensor, texts: Sequence[str], tokens: Tensor
) -> SteeringVector:
    if not (experts > 0).any():
        raise VectorError(
            f"'{domain}': --rule {rule} finds no expert of its own in these texts: give more of them, or another "
            "number of --experts"
        )
    settings: dict[PeerRule, dict[str, Any]] = {
        "steermoe": {"formula": "zero_max_scaled", "scale": "magnitude", "strength": ACTIVATED},
        "dsmoe": {"formula": "additive", "scale": "magnitude", "strength": math.log1p(DSMOE_STRENGTH)},
        "safex": {},
    }
    info = replace(
        vector_info(source, texts, tokens, f"{CREATED_BY} --rule {rule} ({PAPERS[rule]})"),
        title=f"{domain}, by the rule of {PAPERS[rule].split(',')[0]} from {len(texts)} texts",
        **settings[rule],
    )
    return SteeringVector(domain, None, source.shape.layers, weights=experts.float(), info=info)


def packaged_by_rule(
    source: RoutingSource,
    rule: PeerRule,
    language: Language = "en",
    *,
    experts: int | None = None,
    progress: TextProgress | None = None,
) -> list[SteeringVector]:
    """As `vectors_by_rule`, of every packaged domain, compared with the other domains and the neutral texts."""
    domains, others = _packaged(rule, language)
    made = vectors_by_rule(source, rule, domains, others, experts=experts, max_tokens=MAX_TOKENS, progress=progress)
    words = {domain: () if language == "ru" else tuple(domain_words(domain)) for domain in domains}
    return [replace(v, info=replace(v.info, keywords=words[v.domain], licence="Apache-2.0")) for v in made]


def count_texts(rule: PeerRule, language: Language) -> int:
    """How many texts `packaged_by_rule` reads."""
    domains, others = _packaged(rule, language)
    return sum(map(len, domains.values())) + len(others)


def _packaged(rule: PeerRule, language: Language) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of the domains, and the neutral ones if the rule compares."""
    domains = packaged_texts(language)
    neutral = domains.pop(NEUTRAL)
    return domains, neutral if rule in COMPARING else []
