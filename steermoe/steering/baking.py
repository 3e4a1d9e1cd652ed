"""Which steering a constant bias in a model's routers carries out: formula (3), for all tokens alike."""

from collections.abc import Sequence

from torch import Tensor

from steermoe.errors import SteeringError
from steermoe.routing.shape import RoutingShape
from steermoe.steering.banks import banks_for
from steermoe.steering.plans import DEFAULT_FORMULA, SteeringPlan
from steermoe.steering.spec import SteeringSpec


def spec_to_bake(domain: Sequence[str], strength: float | None, layers: str | None = None) -> SteeringSpec:
    """The only steering that can be baked, for some domains."""
    return SteeringSpec(tuple(domain), strength, formula="additive", positions="all", layers=layers)


def pushes_of(shape: RoutingShape, plan: SteeringPlan) -> list[Tensor]:
    """What a plan adds to the logits of each router, c E, [N] each.

    Raises:
        SteeringError: a constant bias can't carry it out. CompatibilityError: it does not fit the model.
    """
    plain = SteeringPlan(
        plan.vector, plan.strength, formula="additive", scale=plan.scale, positions="all", layers=plan.layers
    )
    if plan.vector is None or plan != plain:
        raise SteeringError(
            "only formula additive with a constant strength at all positions can be baked, without experts to force or "
            "ban or a number of active ones: leave the rest out, or steer the model while it runs"
        )
    if not plan.strength:
        raise SteeringError("strength 0 steers nothing, so there is nothing to bake: give another one with --strength")
    return [bank.push[0] for bank in banks_for(shape, [plan])]


def check_strength(spec: SteeringSpec, plan: SteeringPlan) -> None:
    """Make sure that a strength was given, or that the vector was calibrated for formula (3).

    Raises:
        SteeringError: neither.
    """
    vector = plan.vector
    if spec.strength is not None or vector is None:
        return
    strength, formula = vector.info.strength, vector.info.formula or DEFAULT_FORMULA
    if strength is None or formula != "additive":
        how = "is not calibrated" if strength is None else f"is calibrated for formula {formula}"
        raise SteeringError(
            f"vector '{vector.domain}' {how}, baking uses additive: give --strength, or find it with `steermoe "
            "calibrate --formula additive`"
        )
