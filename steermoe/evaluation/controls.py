"""More controls of steering: away from the domain, with random vectors, with popular experts.

They need no texts of their own kind: what counts is by how much the domain's held-out texts become likelier (lift), and
for a few of them whether stories reach the domain.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from steermoe.evaluation.bootstrap import bootstrap
from steermoe.evaluation.judge import Judge
from steermoe.evaluation.protocol import Condition
from steermoe.evaluation.results import StoryRecord

RANDOM_DRAWS = 20
"""Random vectors whose lift is measured: if the true vector exceeds all, its rank has a probability below 5%."""
RANDOM_STORIES = 2
"""Random vectors with which stories are generated too."""


class Runs(Protocol):
    """What runs conditions; `evaluate.Evaluation` does."""

    def stories(self, condition: Condition, /) -> list[StoryRecord]: ...

    def damage(self, condition: Condition, /) -> dict[str, float]: ...

    def lift(self, condition: Condition, /) -> float: ...


def more_controls(
    runs: Runs,
    judge: Judge,
    unsteered: Sequence[StoryRecord],
    steered: Mapping[str, Condition],
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The controls of each domain.

    Args:
        runs: runs conditions.
        judge: which texts are about a domain.
        unsteered: stories to compare with.
        steered: the condition of each domain that the controls belong to.
        notify: called with a short description of each step.

    Returns:
        for each domain: `true`, `negative`, `random` and `popular`, each with its lift and damage (lists by draw for
        `random`) and, apart from `negative`, with `raised`: the difference of success to unsteered stories.
    """
    found = []
    for domain, condition in steered.items():
        usual = judge.success(unsteered, domain)

        def measured(one: Condition) -> dict[str, float]:
            return {"lift": runs.lift(one), "kl_p95": runs.damage(one)["kl_p95"]}

        def raised(ones: Sequence[Condition], domain: str = domain, usual: Any = usual) -> dict[str, Any] | None:
            gains = [judge.success(runs.stories(one), domain) - usual for one in ones]
            interval = bootstrap(sum(gains[1:], gains[0]) / len(gains))
            return interval.as_dict() if interval else None

        notify(f"{domain}: steering away, popular experts")
        away = replace(condition, kind="negative", strength=-condition.strength)
        often = replace(condition, kind="popular")
        draws = [replace(condition, kind="random", draw=draw) for draw in range(RANDOM_DRAWS)]
        record: dict[str, Any] = {
            "domain": domain,
            "true": {**measured(condition), "raised": raised([condition])},
            "negative": measured(away),
            "popular": {**measured(often), "raised": raised([often])},
        }
        drawn = []
        for one in draws:
            notify(f"{domain}: random vector {one.draw + 1} of {RANDOM_DRAWS}")
            drawn.append(measured(one))
        record["random"] = {name: [one[name] for one in drawn] for name in ("lift", "kl_p95")}
        record["random"]["raised"] = raised(draws[:RANDOM_STORIES])
        found.append(record)
    return found


def complaints_of(controls: Sequence[Mapping[str, Any]]) -> list[str]:
    """What did not come out as it should."""
    found = []
    for one in controls:
        domain, true = one["domain"], one["true"]
        if one["negative"]["lift"] >= 0:
            found.append(f"{domain}: steering away does not make its own texts less likely")
        if (as_good := sum(lift >= true["lift"] for lift in one["random"]["lift"])) > 0:
            found.append(f"{domain}: {as_good} of {len(one['random']['lift'])} random vectors lift its texts as much")
        if one["popular"]["lift"] >= true["lift"]:
            found.append(f"{domain}: popular experts lift its texts as much as its own")
    return found
