"""A text from a GGUF file needs neither torch nor transformers, which take longer to import than all else."""

import subprocess
import sys

import pytest
import torch

from tests.support import tiny_ggufs

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector

SLOW_TO_IMPORT = ("torch", "transformers", "sklearn", "scipy.optimize", "sympy")
RUN = """
import sys
from steermoe.cli.app import main
sys.argv = ["steermoe", *{arguments!r}]
try:
    main()
finally:
    print(sorted({slow!r} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    frequency = torch.full((tiny_ggufs.LAYERS, tiny_ggufs.EXPERTS), 0.1 / tiny_ggufs.EXPERTS)
    frequency[:, 5] += 0.9
    for domain in ("dogs", "cats"):
        vector = SteeringVector(domain, frequency, tuple(range(tiny_ggufs.LAYERS)), threshold=1.0)
        write_vector(vector, folder / f"{domain}.safetensors")
    return tiny_ggufs.write(tiny_ggufs.build("mixtral"), folder)


@pytest.mark.parametrize(
    "steering",
    [
        ["--domain", "dogs"],
        ["--domain", "dogs=0.5", "--domain", "cats", "--schedule", "decay:9", "--positions", "last-prompt"],
        ["--domain", "dogs", "--force", "0:3", "--json"],
        ["--domain", "none"],
    ],
    ids=["domain", "mixture", "lists", "unsteered"],
)
def test_generate_loads_no_torch(model, steering):
    given = ["generate", "in the an", "--model", str(model), "--vectors", str(model.parent), "--any-model", *steering]
    code = RUN.format(arguments=[*given, "--max-new-tokens", "3"], slow=set(SLOW_TO_IMPORT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "in the an" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"
