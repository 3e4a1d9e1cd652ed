"""What is lost where only a router's choice can be moved: `models bake --choice-only` beside formula (3).

c E is added to the scores that a router chooses by, and the weights of the chosen experts stay as they are. Formula (3)
adds it to the logits, from which both follow. Both are measured on the same texts, at the same strength, for all
tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steermoe.errors import ModelError
from steermoe.evaluation.teacher_forcing import TeacherForcing, TextFigures
from steermoe.models.loading import LoadedModel
from steermoe.routing.biases import bias_of, changed
from steermoe.routing.routers import find_routers, language_model
from steermoe.steering.banks import banks_for
from steermoe.steering.handle import steer
from steermoe.steering.plans import SteeringPlan


def compare_with_choice_only(
    loaded: LoadedModel, plan: SteeringPlan, texts: Sequence[str]
) -> tuple[TextFigures, TextFigures]:
    """The figures of formula (3), and of choice-only, on texts.

    Args:
        loaded: a model whose routers have a bias on scores; no steering may be attached to it.
        plan: what can be baked (`steering.baking`).
        texts: as for `TeacherForcing`.

    Raises:
        ModelError: its routers have no such bias. Otherwise as `TeacherForcing`.
    """
    forcing = TeacherForcing(loaded, texts)
    banks = banks_for(loaded.shape, [plan])
    wanted_CW = torch.stack([bank.wanted[0] for bank in banks])
    with steer(loaded.model, rows=[plan]):
        additive = forcing.compare_as_is(wanted_CW)
    with choosing_by(loaded.model, [bank.push[0] for bank in banks]):
        return additive, forcing.compare_as_is(wanted_CW)


@contextmanager
def choosing_by(model: nn.Module, pushes: Sequence[Tensor]) -> Iterator[None]:
    """A model whose routers choose by scores plus c E, one push [N] for each, while the block runs.

    Raises:
        ModelError: a router has no bias on scores.
    """
    inner = language_model(model)
    tensors = dict(inner.named_parameters()) | dict(inner.named_buffers())
    biases = [bias_of(inner, router, "choice") for router in find_routers(inner)]
    if None in biases:
        raise ModelError(f"the routers of {type(inner).__name__} have no bias on scores: their choice can't be moved")
    own = [tensors[bias.name] for bias in biases if bias is not None]
    before = [bias.detach().clone() for bias in own]
    try:
        with torch.no_grad():
            for bias, push in zip(own, pushes, strict=True):
                bias.copy_(changed(bias.detach(), push))
        yield
    finally:
        with torch.no_grad():
            for bias, original in zip(own, before, strict=True):
                bias.copy_(original)
