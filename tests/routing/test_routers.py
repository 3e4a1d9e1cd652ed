"""Which modules are routers, and what their shapes say."""

import copy

import pytest
import torch
from torch import nn

from steermoe.errors import UnsupportedModel
from steermoe.routing.recording import record_routing
from steermoe.routing.routers import find_routers, shape_of
from steermoe.steering.handle import attach, steer
from tests.support import steering_models as steering
from tests.support import tiny_models as tiny


@pytest.mark.parametrize(
    ("family", "experts", "blanks"), [("longcat_flash", 10, 2), ("zaya", 9, 1), ("inkling", 8, 0), ("mixtral", 8, 0)]
)
def test_columns_without_an_expert(family, experts, blanks):
    shapes = {(router.num_experts, router.shape.blanks) for router in find_routers(tiny.build(family))}
    assert shapes == {(experts, blanks)}


class TrainedCopy(nn.Module):
    """As PEFT wraps a module of `modules_to_save`: the original beside a trained copy per adapter."""

    def __init__(self, module: nn.Module, *adapters: str) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({adapter: copy.deepcopy(module) for adapter in adapters})
        self._active_adapter: str | list[str] = [adapters[0]]
        self._disable_adapters = False

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    def forward(self, *args, **kwargs):
        (active,) = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        is_trained = not self._disable_adapters and active in self.modules_to_save
        return (self.modules_to_save[active] if is_trained else self.original_module)(*args, **kwargs)


def wrapped(make, part, *adapters):
    """A model in each of whose blocks PEFT trains the router, or the whole block, with other weights per adapter."""
    model = make()
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == part:
            copies = TrainedCopy(module, *adapters)
            for weight in copies.modules_to_save.parameters():
                nn.init.normal_(weight, std=0.5)
            setattr(model.get_submodule(name.rpartition(".")[0]), part, copies)
    return model


MAKERS = {
    "mixtral": (lambda: steering.build("mixtral"), "gate"),
    "mixtral's blocks": (lambda: steering.build("mixtral"), "mlp"),
    "remote code": (lambda: tiny.stand_in(tiny.MoEGate), "gate"),
    "a linear gate": (lambda: tiny.stand_in(lambda: nn.Linear(tiny.HIDDEN, tiny.EXPERTS, bias=False)), "gate"),
}


@pytest.mark.parametrize(("make", "part"), MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("active", [["one"], "two", ["unknown"], None])
def test_of_a_trained_router_the_active_copy_is_steered(make, part, active):
    """`None` switches the adapters off."""
    model = wrapped(make, part, "one", "two")
    for module in model.modules():
        if isinstance(module, TrainedCopy):
            module._disable_adapters = active is None
            module._active_adapter = active or ["one"]
    used = active if isinstance(active, str) else (active or [None])[0]
    expected = f"modules_to_save.{used}" if used in ("one", "two") else "original_module"
    routers = find_routers(model)
    assert [router.layer for router in routers] == [0, 1]
    assert all(f".{expected}" in router.name for router in routers)
    assert shape_of(model).routers == shape_of(make()).routers

    ids = torch.randint(3, 100, (1, 7), generator=torch.Generator().manual_seed(0))
    with record_routing(model) as record, torch.no_grad():
        model(input_ids=ids)
        record.frequency()
        record.reset()
        with steer(model, steering.vector_for(model, 1), 20.0, positions="all") as handle:
            model(input_ids=ids)
    handle.verify()
    assert handle.report().vector_share == pytest.approx(0.5)  # one of the two places of every token
    assert (record.counts[:, :, 1] == 7).all()
    assert steering.traces(model) == []


def test_two_routers_in_one_layer_are_told():
    model = tiny.stand_in(tiny.MoEGate)
    model.layers[1]["mlp"].teacher_gate = tiny.MoEGate()
    message = r"two routers in layer 1, 'layers\.1\.mlp\.gate' and 'layers\.1\.mlp\.teacher_gate'"
    for use in (
        lambda: find_routers(model),
        lambda: attach(model, steering.plan_for_experts(tiny.stand_in(tiny.MoEGate))),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            use()
