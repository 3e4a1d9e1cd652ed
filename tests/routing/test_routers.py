"""Which modules are routers, and what their shapes say."""

import pytest

from steermoe.routing.routers import find_routers
from tests.support import tiny_models


@pytest.mark.parametrize(
    ("family", "experts", "blanks"), [("longcat_flash", 10, 2), ("zaya", 9, 1), ("inkling", 8, 0), ("mixtral", 8, 0)]
)
def test_columns_without_an_expert(family, experts, blanks):
    shapes = {(router.num_experts, router.shape.blanks) for router in find_routers(tiny_models.build(family))}
    assert shapes == {(experts, blanks)}
