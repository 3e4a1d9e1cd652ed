"""What steering did, as counts that add up."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SteeringReport:
    """What steering did.

    Attributes:
        router_calls: calls of a router whose logits were changed.
        tokens_seen: tokens that the model processed, prompt included. Padding is not counted, nor what fills a row that
            ended before its neighbours, nor what is computed again where there is no cache; drafts of assisted
            decoding are.
        tokens_steered: those of them that were steered.
        vector_share: share of the steered tokens' top-k slots that went to experts of their vector, 0 to 1.
    """

    router_calls: int
    tokens_seen: int
    tokens_steered: int
    vector_share: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _sum(reports: Sequence[SteeringReport]) -> SteeringReport:
    steered = sum(report.tokens_steered for report in reports)
    return SteeringReport(
        router_calls=sum(report.router_calls for report in reports),
        tokens_seen=sum(report.tokens_seen for report in reports),
        tokens_steered=steered,
        vector_share=sum(report.vector_share * report.tokens_steered for report in reports) / max(1, steered),
    )
