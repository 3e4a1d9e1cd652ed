"""Which experts become part of a vector: the options of `steermoe vectors build` that choose a rule and adjust it."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steermoe.cli.vectors import learned

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource, TextProgress
    from steermoe.discovery.labelled import Contrast
    from steermoe.discovery.rules import PeerRule
    from steermoe.vectors.vector import SteeringVector

RULE_FIELDS = ("rule", "experts", "budget", "steps")
"""The fields of `Selection` that also choose among the packaged texts' experts."""
RULE_OPTIONS = {
    "paper": ("threshold", "relative", "min_difference", "lists"),
    "stable": ("threshold", "relative"),
    "learned": ("budget", "steps"),
}
"""The fields of `Selection` that have an effect on each rule; on the other papers' it is `experts`."""


@dataclass(frozen=True)
class Selection:
    """Which experts become part of a vector.

    Raises:
        BadParameter: options that have no effect on the rule. SteeringError: an impossible budget.
    """

    rule: Annotated[
        Literal["paper", "stable", "learned", "steermoe", "dsmoe", "safex"],
        typer.Option(
            help="Which rule: paper is that of this method; stable keeps the experts that hold when its texts are "
            "resampled; learned improves the numbers by gradients; steermoe, dsmoe and safex are other papers', with "
            "their formula and strength."
        ),
    ] = "paper"
    experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With another paper's rule: how many experts it takes, over all layers. Default: 10 for dsmoe, else "
            "as many as a token uses.",
        ),
    ] = None

    budget: Annotated[
        float,
        typer.Option(
            help="With --rule learned: the damage to neutral texts to learn within, 95th percentile of the KL per "
            "token, in nats."
        ),
    ] = 1.0
    steps: Annotated[int, typer.Option(min=1, help="With --rule learned: the number of gradient steps.")] = 40
    threshold: Annotated[
        float, typer.Option(min=0, help="Keep experts whose frequency exceeds this many times the usual one.")
    ] = 3.0
    relative: Annotated[
        bool | None,
        typer.Option(
            "--relative/--absolute",
            help="Usual frequency: the mean of all domains, or 1/N as in the paper. Default: the mean, if there are "
            "more than 3 domains.",
        ),
    ] = None
    min_difference: Annotated[
        float,
        typer.Option(min=0, max=1, help="With --against: keep experts whose frequency is higher by more than this."),
    ] = 0.1
    lists: Annotated[
        int, typer.Option(min=0, help="With --against: length of the lists of experts to force and to ban.")
    ] = 10

    def __post_init__(self) -> None:
        if self.rule == "learned":
            from steermoe.evaluation.calibration import check_budget

            check_budget(self.budget)
        if self.rule in RULE_OPTIONS and self.experts is not None:
            raise typer.BadParameter("--experts is for another paper's rule: name one with --rule, or leave it out")
        used = [f"--{name.replace('_', '-')}" for name in (*RULE_OPTIONS.get(self.rule, ()), "rule", "experts")]
        if unused := [option for option in changed_options(self) if option not in used]:
            is_for_learning = unused[0].removeprefix("--") in RULE_OPTIONS["learned"]
            raise typer.BadParameter(
                f"{unused[0]} is for --rule learned: name it, or leave {unused[0]} out"
                if is_for_learning
                else f"{unused[0]} has no effect on --rule {self.rule}: leave it out"
                + ("" if self.rule in RULE_OPTIONS else ", or use --experts")
            )

    @property
    def peer(self) -> "PeerRule | None":
        """The rule, if it is another paper's."""
        from steermoe.discovery.rules import PEERS

        return next((rule for rule in PEERS if rule == self.rule), None)

    @property
    def learning(self) -> learned.Options:
        """How a vector is learned."""
        return learned.Options(self.budget, self.steps)

    def changed(self) -> list[str]:
        """The options in use that only this method's own rule has."""
        return [option for option in changed_options(self) if option.removeprefix("--") not in RULE_FIELDS]

    def check_comparable(self, domains: int, has_others: bool) -> None:
        """Refuse texts that the rule can't use, before a model is loaded."""
        from steermoe.discovery.rules import check_comparable
        from steermoe.errors import VectorError

        if self.rule == "stable" and has_others:
            raise typer.BadParameter("--rule stable compares domains with each other: leave out --against")
        if self.peer is None:
            return
        try:
            check_comparable(self.peer, domains, has_others)
        except VectorError as error:
            raise typer.BadParameter(str(error)) from error

    def vectors(
        self,
        loaded: "RoutingSource",
        corpora: dict[str, list[str]],
        others: list[str] | None,
        max_tokens: int,
        progress: "TextProgress",
    ) -> "tuple[list[SteeringVector], list[Contrast]]":
        """A vector per domain; with `others` and this method's rule, also the contrasts that the vectors come from."""
        from steermoe.discovery import labelled, rules, stable

        if self.peer is not None:
            return rules.vectors_by_rule(
                loaded,
                self.peer,
                corpora,
                others or (),
                experts=self.experts,
                max_tokens=max_tokens,
                progress=progress,
            ), []
        if others is None:
            threshold, relative = self.threshold, self.relative
            build = stable.stable_vectors if self.rule == "stable" else labelled.vectors_from_labelled
            return build(
                loaded, corpora, threshold=threshold, relative=relative, max_tokens=max_tokens, progress=progress
            ), []
        made = labelled.contrasts(
            loaded,
            corpora,
            others,
            min_difference=self.min_difference,
            count=self.lists,
            max_tokens=max_tokens,
            progress=progress,
        )
        return [contrast.vector for contrast in made], made


def changed_options(options: Any) -> list[str]:
    """The options of a group that are not at their default, as they are written on the command line."""
    return [f"--{f.name.replace('_', '-')}" for f in fields(options) if getattr(options, f.name) != f.default]
