"""What many tests share: a tiny random model, vectors that fit it, an empty search path, and the command line."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub must fail at once, not wait
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

from steermoe.vectors import library
from steermoe.vectors.vector import SteeringVector, VectorInfo

torch.set_num_threads(1)

SLOW_INPUTS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW_INPUTS
)
settings.register_profile("long", max_examples=100_000, deadline=None, suppress_health_check=SLOW_INPUTS)
settings.load_profile("quick")
"""Tests marked `fuzz`; `make fuzz` chooses `long`."""

LAYERS, EXPERTS, TOP_K = 3, 8, 2
"""Sizes of the tiny model."""


class Result(NamedTuple):
    """The outcome of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Mixtral of a few thousand weights and a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    vocabulary = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        bos_token_id=None,
        eos_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path):
    """The tiny checkpoint as `steermoe.models.loading.load` loads it."""
    from steermoe.models import loading

    return loading.load(tiny_checkpoint, dtype="float32")


@pytest.fixture
def make_vector() -> Callable[..., SteeringVector]:
    """Makes vectors for the tiny model: in each layer expert 0 gets half of the choices, the others share the rest."""

    def make(domain="sport", layers: Sequence[int] = range(LAYERS), experts=EXPERTS, **fields) -> SteeringVector:
        frequency = torch.full((len(layers), experts), 0.5 / (experts - 1))
        frequency[:, 0] = 0.5
        fields.setdefault("info", VectorInfo(model="tiny-mixtral", architecture="mixtral", top_k=TOP_K, strength=4.0))
        return SteeringVector(domain, frequency, tuple(layers), **fields)

    return make


@pytest.fixture
def bare_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with no vectors anywhere on the search path. Returns the folder."""
    import platformdirs

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("STEERMOE_VECTORS", raising=False)
    monkeypatch.setattr(platformdirs, "user_data_path", lambda name: tmp_path / "user-data" / name)
    monkeypatch.setattr(library, "packaged_vectors", lambda: tmp_path / "packaged")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `steermoe` with arguments, as its console script does, including the error boundary."""
    from steermoe.cli import app

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr("sys.argv", ["steermoe", *map(str, arguments)])
        capsys.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, instead of only their pixels."""
    pytest.importorskip("matplotlib")
    from steermoe import figures

    saved: list[Any] = []
    save = figures.save

    def keep(figure: Any, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    for module in ("steermoe.discovery.health", "steermoe.vectors.picture"):
        monkeypatch.setattr(f"{module}.save", keep)
    return saved


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in for the Hub, which huggingface_hub uses in this process, with an empty cache and a token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from tests.support.hub import serve

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # `steermoe` sets a variable for it, which the library reads when it is imported
    with serve() as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        changes = {
            "ENDPOINT": served.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{served.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("steermoe.vectors.hub._found", {})
        monkeypatch.setattr("steermoe.models.checkpoint._answered", set())
        yield served
    if had_bars:
        enable_progress_bars()
