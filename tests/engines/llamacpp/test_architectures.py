"""Every architecture of the installed llama.cpp that routes tokens to experts: steered as in numpy, else untouched.

The architectures are those in llama.cpp's own library, and their files are written from what its loader asks for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

from steermoe.models.gguf.bake import READS_CHOICE_BIAS

ENDS = "llama.cpp ends the process: "
NO_TINY_SIZES = f"{ENDS}GGML_ASSERT"
EXCEPTIONS = {
    # they draft tokens for another model, and need one
    "dflash": "can't be written: DFlash model requires 'target_layers'",
    "eagle3": "can't be written: EAGLE3 model requires 'extract_layers'",
    "gemma4-assistant": "can't be written: Gemma 4 assistant requires embedding_length_out",
    # it switches adapters, which a file must bring
    "graniteswitch": "can't be written: graniteswitch: adapter token id arrays",
    # their graphs need sizes that were not found
    "deepseek4": NO_TINY_SIZES,
    "dots3note": NO_TINY_SIZES,
    "glm5-next": NO_TINY_SIZES,
    # the loader takes routers, but the graph has none
    "refact": "it computes no node ffn_moe_logits",
    # they embed texts and write none, so there are no logits of tokens
    "llama-embed": "steering changes nothing",
    "nomic-bert-moe": "steering changes nothing",
    # the gguf package lists a router, the loader takes none
    "deci": "no routers",
}
"""What can't be written or steered, with the beginning of the problem; all else must be. One that works fails the test,
so that the list stays true."""

ROUTING = {name for key, name in MODEL_ARCH_NAMES.items() if MODEL_TENSOR.FFN_GATE_INP in MODEL_TENSORS[key]}
DENSE = set(MODEL_ARCH_NAMES.values()) - ROUTING
"""What the gguf package says of architectures; it does not know the newest ones."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each architecture, by name: `tests.support.architectures` says what the facts are."""
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    program = [sys.executable, "-m", "tests.support.architectures", str(tmp_path_factory.mktemp("architectures"))]
    done = subprocess.run(program, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=True)
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    return {fact.pop("architecture"): fact for fact in facts}


def problem_of(name: str, fact: dict[str, Any]) -> str:
    """What is wrong with an architecture that routes or may route; "" if nothing."""
    problem = str(fact.get("problem", "no routers" if name in ROUTING and not fact else ""))
    return "" if name in DENSE and problem.startswith(("can't be written", ENDS)) else problem


def test_the_list_is_that_of_the_library(found: dict[str, dict[str, Any]]) -> None:
    """As far as the gguf package knows it."""
    assert set(MODEL_ARCH_NAMES.values()) - found.keys() <= {"mmproj", "clip"}
    assert len(found) > 100


def test_all_that_route_are_steered_or_known_not_to_be(found: dict[str, dict[str, Any]]) -> None:
    problems = {name: problem for name, fact in found.items() if (problem := problem_of(name, fact))}
    assert problems.keys() == EXCEPTIONS.keys(), problems
    for name, reason in EXCEPTIONS.items():
        assert problems[name].startswith(reason), (name, problems[name])


def test_no_router_is_missed(found: dict[str, dict[str, Any]]) -> None:
    """What the gguf package says to route does, and so does GigaChat-20B-A3B's architecture."""
    steered = {name for name, fact in found.items() if fact.get("layers")}
    assert ROUTING - steered - EXCEPTIONS.keys() == set()
    assert "deepseek" in steered
    assert {fact["node"] for fact in found.values() if "node" in fact} >= {"ffn_moe_logits", "ffn_moe_probs"}
    assert any(fact.get("biased") for fact in found.values())


def test_where_steering_can_be_baked(found: dict[str, dict[str, Any]]) -> None:
    """By formula (3) only where files have the bias anyway; a bias on scores is added where llama.cpp reads one."""
    assert {name for name, fact in found.items() if fact.get("biased")} == READS_CHOICE_BIAS
    assert {name for name, fact in found.items() if fact.get("logits_biased")} == {"gpt-oss"}
