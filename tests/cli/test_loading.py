"""Large modules are imported without the garbage collector, which is back afterwards."""

import gc
import sys

import pytest

from steermoe.cli.loading import _import

SEES = "import gc\nWAS_ON = gc.isenabled()\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module, and gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name, content):
        (tmp_path / f"{name}.py").write_text(content)
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)
    gc.unfreeze()


def test_nothing_is_collected_while_a_module_comes(module):
    name = module("comes_without_collector", SEES)
    gc.unfreeze()
    _import(name)
    assert not sys.modules[name].WAS_ON
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    _import(name)  # it is there: what has come since may be garbage
    assert gc.get_freeze_count() == 0


def test_the_collector_is_back_after_an_error(module):
    with pytest.raises(ValueError, match="broken"):
        _import(module("breaks_without_collector", "raise ValueError('broken')"))
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off(module):
    gc.disable()
    try:
        _import(module("comes_to_no_collector", SEES))
        assert not gc.isenabled()
    finally:
        gc.enable()
