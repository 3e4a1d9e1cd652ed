"""The steering report: counts that add up. Knows no model and no plan."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, repr=False)
class SteeringReport:
    """What was steered. Reports of parts add up to the report of the whole: `sum(reports, SteeringReport())`.

    Attributes:
        router_calls: calls of a router whose logits were changed.
        tokens_seen: tokens that the model processed, prompt included. Padding, the filler in rows that ended before
            their neighbours, and tokens computed again for lack of a cache are not counted; drafts of assisted
            decoding are.
        tokens_steered: those of them that were steered.
        hits: top-k slots of the steered tokens that went to experts that their plans raise or force.
        slots: all top-k slots of the steered tokens, in all MoE layers, steered or not.
        forced_hits: places of forced experts that they took. An expert has a place in each steered token's choice.
        forced_places: all places of forced experts, over the steered tokens and their plans' lists.
        banned_hits: places of banned experts that they took.
        banned_places: all places of banned experts.
    """

    router_calls: int = 0
    tokens_seen: int = 0
    tokens_steered: int = 0
    hits: int = 0
    slots: int = 0
    forced_hits: int = 0
    forced_places: int = 0
    banned_hits: int = 0
    banned_places: int = 0

    @property
    def vector_share(self) -> float:
        """Share of the steered tokens' slots that went to experts of their vector, 0 to 1; 0 without slots.

        Of the slots of all MoE layers, so that a vector that steers half of them reaches at most 0.5.
        """
        return self.hits / self.slots if self.slots else 0.0

    @property
    def forced_share(self) -> float:
        """Share of the places of forced experts that they took, 0 to 1; it should be 1. 1 without such places."""
        return self.forced_hits / self.forced_places if self.forced_places else 1.0

    @property
    def banned_share(self) -> float:
        """Share of the places of banned experts that they took, 0 to 1; it should be 0."""
        return self.banned_hits / self.banned_places if self.banned_places else 0.0

    def __add__(self, other: "SteeringReport") -> "SteeringReport":
        return SteeringReport(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __repr__(self) -> str:
        return f"SteeringReport({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, float]:
        """What users read: shares instead of the counts behind them; those of lists only if there were any."""
        shares = {
            "forced_share": self.forced_share if self.forced_places else None,
            "banned_share": self.banned_share if self.banned_places else None,
        }
        return {
            "router_calls": self.router_calls,
            "tokens_seen": self.tokens_seen,
            "tokens_steered": self.tokens_steered,
            "vector_share": self.vector_share,
            **{name: share for name, share in shares.items() if share is not None},
        }
