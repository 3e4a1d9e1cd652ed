"""Public names exist, and heavy libraries are loaded only when they are needed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import steermoe
from recipes.distributions import wheel_problems
from tests.support.minimum_versions import lowest, requirements

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


def test_completing_needs_nothing_heavy(monkeypatch):
    for name, value in {"_STEERMOE_COMPLETE": "complete_bash", "COMP_WORDS": "steermoe gen", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert loaded_after(RUN.format(arguments=[])) == set()


def test_the_subprocess_would_notice():
    assert loaded_after("import numpy") == {"numpy"}


def test_python_m_steermoe_is_the_command_line():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "steermoe", *arguments], capture_output=True, text=True, check=False
        )

    assert run("--version").stdout == f"steermoe {steermoe.__version__}\n"
    assert run("--help").stdout.startswith("Usage: steermoe [OPTIONS]")
    wrong = run("vectors", "show", "no-such-domain")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("steermoe: ")


def test_the_wheel_is_complete(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed: make install")
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"steermoe/{path.relative_to(root / 'steermoe')}" for path in (root / "steermoe").rglob("*.py")}
    vectors = {f"steermoe/{path.relative_to(root)}" for path in (root / "steering_vectors").rglob("*.safetensors")}
    assert vectors
    assert {"steermoe/py.typed"} | sources | vectors <= names
    assert wheel_problems(names) == []


def test_every_lower_bound_is_the_same_everywhere():
    versions = lowest(requirements())
    assert {"torch", "transformers", "pytest", "hatchling", "ray"} <= versions.keys()


@pytest.mark.parametrize("wrong", [["torch"], ["torch<3"], ["torch>=2.7", "torch>=2.8"]])
def test_a_package_without_one_lower_bound_is_refused(wrong):
    with pytest.raises(ValueError, match="lower bound"):
        lowest(wrong)
