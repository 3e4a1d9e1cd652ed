"""A folder of its own for the code that checkpoints bring, which transformers copies and imports as a package."""

import sys
from pathlib import Path

import pytest

PACKAGE = "transformers_modules"


def keep_modules_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let transformers use this folder, whatever an earlier test of the process has imported from another one."""
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    patch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        patch.delitem(sys.modules, name)
