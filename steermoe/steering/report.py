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
        slots: all top-k slots of the steered tokens, in all routers that were steered.
    """

    router_calls: int = 0
    tokens_seen: int = 0
    tokens_steered: int = 0
    hits: int = 0
    slots: int = 0

    @property
    def vector_share(self) -> float:
        """Share of the steered tokens' top-k slots that went to experts of their vector, 0 to 1; 0 without slots."""
        return self.hits / self.slots if self.slots else 0.0

    def __add__(self, other: "SteeringReport") -> "SteeringReport":
        return SteeringReport(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __repr__(self) -> str:
        return f"SteeringReport({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    def as_dict(self) -> dict[str, float]:
        """What users read: the share instead of the counts behind it."""
        return {
            "router_calls": self.router_calls,
            "tokens_seen": self.tokens_seen,
            "tokens_steered": self.tokens_steered,
            "vector_share": self.vector_share,
        }
