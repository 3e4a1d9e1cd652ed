"""Steered logits in the router's own type: nothing becomes infinite that was not."""

import pytest
import torch

from steermoe.steering.narrowing import narrowed

INFINITE = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_types_are_only_converted(dtype):
    steered = torch.tensor([[6e10, -6e10, 0.1, INFINITE]])
    assert torch.equal(narrowed(steered, dtype), steered.to(dtype))


def test_float16_ends_at_its_largest_number():
    steered = torch.tensor([[6e10, -6e10, 0.1, 65504.0, INFINITE, -INFINITE]])
    expected = [[65504.0, -65504.0, 0.0999755859375, 65504.0, INFINITE, -INFINITE]]
    assert narrowed(steered, torch.float16).tolist() == expected
