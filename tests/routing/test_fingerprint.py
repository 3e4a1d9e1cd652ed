"""The fingerprint of routers: the same for each copy of the same gates, another for other gates."""

import struct
from io import BytesIO

import pytest
import torch

from steermoe.routing.fingerprint import DIGITS, RUN, RUNS, fingerprint, places, read_numbers
from steermoe.routing.routers import find_routers, fingerprint_of, shape_of
from tests.support import tiny_models as tiny


@pytest.mark.parametrize("count", [1, 15, 16, 17, 255, 256, 257, 300, 4096, 128 * 2048])
def test_the_places_reach_from_the_first_number_to_the_last(count):
    found = places(count)
    assert len(found) == min(count, RUN * RUNS)
    assert (found[0], found[-1]) == (0, count - 1)
    assert list(found) == sorted(set(found))


def test_numbers_are_rounded_as_torch_rounds_them():
    generator = torch.Generator().manual_seed(0)
    numbers = [*torch.randn(4096, generator=generator).tolist(), 0.0, -0.0, 1.00390625, 1.01171875, float("inf")]
    gate = (1, len(numbers))
    assert fingerprint([(gate, numbers)]) == fingerprint([(gate, torch.tensor(numbers).bfloat16().tolist())])


def test_a_float16_copy_of_bfloat16_has_the_same():
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(4096, generator=generator) * 10.0 ** -torch.arange(4096).remainder(7)).bfloat16()
    assert (numbers.half().bfloat16() != numbers).any()  # the tiny ones
    copies = {fingerprint([((1, 4096), copy.tolist())]) for copy in (numbers, numbers.float(), numbers.half())}
    assert len(copies) == 1


def test_what_it_depends_on():
    numbers = [float(number) for number in range(8)]
    one = fingerprint([((2, 4), numbers)])
    assert len(one) == DIGITS
    others = [
        fingerprint([((4, 2), numbers)]),
        fingerprint([((2, 4), numbers[::-1])]),
        fingerprint([((2, 4), numbers)] * 2),
        fingerprint([((2, 4), [*numbers[:-1], 7.0625])]),
    ]
    assert len({one, *others}) == 5
    assert fingerprint([]) == ""


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_only_the_runs_are_read_from_a_file(kind, count):
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    content = b"head" + numbers.view(torch.uint8).numpy().tobytes()
    assert read_numbers(BytesIO(content), kind, count, 4) == numbers[list(places(count))].float().tolist()
    with pytest.raises(struct.error):
        read_numbers(BytesIO(content[:-1]), kind, count, 4)
    with pytest.raises(KeyError):
        read_numbers(BytesIO(content), "F8_E4M3", count, 4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoeshared", "zaya"])
def test_a_model_has_its_own_in_any_type(family):
    model, other = tiny.build(family), tiny.build(family, seed=1)
    one = shape_of(model).fingerprint
    assert len(one) == DIGITS
    assert one != shape_of(other).fingerprint
    assert shape_of(model.bfloat16()).fingerprint == one
    assert shape_of(model, sizes_only=True).fingerprint == ""


def test_numbers_that_are_nowhere_or_quantised_have_none():
    with torch.device("meta"):
        assert shape_of(tiny.build("mixtral")).fingerprint == ""
    model = tiny.build("mixtral")
    gate = find_routers(model)[0].module
    gate.weight = torch.nn.Parameter(gate.weight.to(torch.int8), requires_grad=False)
    assert fingerprint_of(find_routers(model)) == ""
