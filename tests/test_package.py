"""Public names exist, and heavy libraries are loaded only when they are needed."""

import subprocess
import sys

import pytest

import steermoe

HEAVY = ("torch", "transformers", "sklearn", "umap", "matplotlib", "vllm", "numpy")

REPORT = "import sys; print(' '.join(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)"
RUN = """
import sys
from steermoe.cli.app import main
sys.argv = ["steermoe", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
"""


def loaded_after(code: str) -> set[str]:
    """The heavy libraries that a new Python process has loaded after it ran the code."""
    script = f"{code}\n{REPORT.format(heavy=HEAVY)}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n")[-2].split())


def test_all_is_sorted_and_complete():
    assert steermoe.__all__ == sorted(steermoe.__all__)
    assert set(steermoe.__all__) == set(steermoe._HOME)


@pytest.mark.parametrize("name", steermoe.__all__)
def test_public_names_load(name):
    assert getattr(steermoe, name) is not None
    assert name in dir(steermoe)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'steermoe' has no attribute 'nonsense'"):
        _ = steermoe.nonsense


@pytest.mark.parametrize(
    "code",
    [
        "import steermoe",
        *(
            RUN.format(arguments=arguments)
            for arguments in (
                ["--help"],
                ["--version"],
                ["generate", "--help"],
                ["vectors", "show", "--help"],
                ["nope"],
            )
        ),
    ],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded_after(code) == set()


@pytest.mark.parametrize("arguments", [["vectors", "list"], ["models", "list"], ["vectors", "show", "no-such-domain"]])
def test_listing_needs_no_torch(arguments):
    assert loaded_after(RUN.format(arguments=arguments)) <= {"numpy"}  # safetensors reads headers with it


def test_the_subprocess_would_notice():
    assert loaded_after("import numpy") == {"numpy"}
