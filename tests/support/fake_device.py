"""A GPU that is not there: tensors say that they are on `cuda`, and whatever waits for their numbers is noted.

Torch's FakeTensorMode computes shapes, types and devices of such tensors without numbers, and raises where devices mix
or a shape depends on numbers. Tensors on the CPU stay real, so that what is decided there is decided as ever. A number
that comes from the device is 0, or False.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten
CAPABILITY = (9, 0)
"""The compute capability that the GPU says it has."""


class Wait(NamedTuple):
    """The host waits until the device has computed everything that it was given.

    Attributes:
        what: "number" (`item`, `bool`, `float`), "numbers" (`cpu`, `tolist`), "mask" (an index of bools), or "sent":
            a copy to the device that is not `non_blocking`.
        package: who asked for it: steermoe or another library.
        function: the file and the function in it.
    """

    what: str
    package: str
    function: str


class FakeDevice:
    """While inside, devices other than the CPU have tensors without numbers.

    Attributes:
        waits: in their order.
        truths: what the next bools from the device are, in place of False.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.truths: list[bool] = []
        self._fake = FakeTensorMode()
        self._undo = ExitStack()

    def __enter__(self) -> "FakeDevice":
        with ExitStack() as undo:
            for name, method in METHODS.items():
                undo.enter_context(mock.patch.object(FakeTensor, name, method))
            undo.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=CAPABILITY))
            undo.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False))
            undo.enter_context(self._fake)
            undo.enter_context(_Watch(self._fake, self))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    @contextmanager
    def waiting(self) -> Iterator[Counter[tuple[str, str, str]]]:
        """Count the waits inside, once it is over."""
        found: Counter[tuple[str, str, str]] = Counter()
        before = len(self.waits)
        yield found
        found.update(self.waits[before:])


class _Watch(TorchDispatchMode):
    """Runs what concerns a device other than the CPU with fake tensors, and everything else for real."""

    def __init__(self, fake: FakeTensorMode, device: FakeDevice) -> None:
        super().__init__()
        self._fake, self._device = fake, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        is_sent = target is not None and torch.device(target).type != "cpu"
        if not is_sent and not any(isinstance(one, FakeTensor) for one in tree_iter((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "prim":  # of what device a tensor is
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode, operations arrive in one piece
                return func.decompose(*args, **kwargs)
        if what := _wait(func, args, kwargs):
            self._device.waits.append(Wait(what, *_asked_by()))
        if func is aten._local_scalar_dense.default:
            return self._number(args[0].dtype)
        if func is aten._to_copy.default and target is not None and not is_sent:
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[0].device.type == "cpu":
            with unset_fake_temporarily():
                return args[0].zero_()
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        return func(*args, **kwargs)

    def _number(self, dtype: torch.dtype) -> bool | int | float:
        if dtype == torch.bool:
            return self._device.truths.pop(0) if self._device.truths else False
        return 0.0 if dtype.is_floating_point else 0

    def _faked(self, one: Tensor) -> Tensor:
        return one if isinstance(one, FakeTensor) else self._fake.from_tensor(one, static_shapes=True)


def _wait(func: Any, args: Any, kwargs: Any) -> str:
    """What the host waits for in an operation; "" if it goes on."""
    if func is aten._local_scalar_dense.default:
        return "number"
    if func in (aten._to_copy.default, aten.copy_.default):
        if func is aten.copy_.default:
            source, target, goes_on = args[1].device, args[0].device, len(args) > 2 and args[2]
        else:
            source, goes_on = args[0].device, kwargs.get("non_blocking", False)
            target = torch.device(kwargs.get("device") or source)
        if "cpu" not in (source.type, target.type) or source == target:
            return ""
        return "numbers" if target.type == "cpu" else "" if goes_on else "sent"
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            return "mask"
        return "sent" if any(one.device.type == "cpu" for one in indices) else ""
    return ""


LIBRARIES = ("steermoe", "transformers", "accelerate")


def _asked_by() -> tuple[str, str]:
    """The innermost function of a library outside of torch: its package, its file and its name."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in LIBRARIES:
            code = frame.f_code
            return package, f"{Path(code.co_filename).name}:{code.co_qualname}"
        frame = frame.f_back
    return "", ""


# ---- methods whose own code asks for CUDA, which torch's builds for CPUs do not have ----


def _getitem(tensor: Tensor, index: Any) -> Tensor:
    view, found = _view(tensor, index)
    return aten.index.Tensor(view, found) if found else view


def _setitem(tensor: Tensor, index: Any, value: Any) -> None:
    view, found = _view(tensor, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=view.dtype, device=view.device)
    if found:
        aten.index_put_.default(view, found, value)
    else:
        aten.copy_.default(view, value)


def _view(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The part of a tensor that numbers, slices, None and ... say, and the tensors by which that is indexed."""
    parts = list(index) if isinstance(index, tuple) else [index]
    for place, part in enumerate(parts):
        if part is Ellipsis:
            rest = [one for one in parts if one is not None and one is not Ellipsis]
            parts[place : place + 1] = [slice(None)] * (tensor.dim() - len(rest))
            break
    view, dim = aten.alias.default(tensor), 0
    found: list[Tensor | None] = []
    for part in parts:
        if part is None:
            view = view.unsqueeze(dim)
        elif isinstance(part, slice):
            start, stop, step = part.indices(view.shape[dim])
            view = aten.slice.Tensor(view, dim, start, stop, step)
        elif isinstance(part, int):
            view = view.select(dim, part)
            continue
        else:
            own = part if isinstance(part, Tensor) else torch.tensor(part, device=tensor.device)
            found += [*[None] * (dim - len(found)), own]
            dim += own.dim() if own.dtype == torch.bool else 1
            continue
        dim += 1
    return view, found


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return aten.copy_.default(tensor, source, non_blocking)


def _contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return aten.contiguous.default(tensor, memory_format=memory_format)


def _number(tensor: Tensor) -> Any:
    return aten._local_scalar_dense.default(tensor)


METHODS: dict[str, Callable[..., Any]] = {
    "__bool__": _number,
    "__float__": _number,
    "__getitem__": _getitem,
    "__index__": _number,
    "__int__": lambda tensor: int(_number(tensor)),
    "__invert__": lambda tensor: aten.bitwise_not.default(tensor),
    "__setitem__": _setitem,
    "contiguous": _contiguous,
    "copy_": _copy,
    "data_ptr": lambda tensor: id(tensor),
    "item": _number,
    "nonzero": lambda tensor: aten.nonzero.default(tensor),
    "tolist": lambda tensor: tensor.cpu().tolist(),
}
