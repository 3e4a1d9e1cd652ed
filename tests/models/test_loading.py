"""Loading, describing and pulling models: what is found, and what is rejected in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request
from steermoe.errors import CompatibilityError, ModelError, UnsupportedModel
from steermoe.models import checkpoint, loading
from steermoe.models.default import assemble, base, pull, spec
from steermoe.models.description import describe
from steermoe.vectors.vector import VectorInfo
from tests.support import tiny_ggufs
from tests.support.remote_modules import keep_modules_in


def config_folder(folder: Path, config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


# ---- load ----


def test_load(tiny_checkpoint, tiny_model):
    assert (tiny_model.name, tiny_model.context_length) == ("tiny-mixtral", 256)
    assert not tiny_model.model.training
    assert tiny_model.model.dtype == torch.float32
    assert tiny_model.tokenizer.pad_token_id == tiny_model.tokenizer.eos_token_id == 0
    assert tiny_model.tokenizer.decode(tiny_model.tokenizer("Grüße, 体育!")["input_ids"]) == "Grüße, 体育!"


def test_load_in_another_dtype(tiny_checkpoint):
    assert loading.load(tiny_checkpoint, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["meta", "meta:0"])
def test_a_device_without_weights(tiny_checkpoint, device_map):
    with pytest.raises(ModelError, match=f"device_map '{device_map}' keeps no weights.*: use auto or cpu"):
        loading.load(tiny_checkpoint, device_map=device_map)


@pytest.mark.parametrize("dtype", ["float", "int8", "float64", "float8_e4m3fn", "nonsense", "nn"])
def test_unknown_dtypes(tiny_checkpoint, dtype):
    if dtype == "float":  # torch's second name for float32
        assert loading.load(tiny_checkpoint, dtype=dtype).model.dtype == torch.float32
        return
    with pytest.raises(ModelError, match=f"dtype '{dtype}' is unknown: use auto, float32"):
        loading.load(tiny_checkpoint, dtype=dtype)


def test_a_dense_model_is_rejected(tmp_path, tiny_checkpoint):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "dense"
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_checkpoint / name).read_bytes())
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no router to steer: it is a dense model"):
        loading.load(folder)


@pytest.mark.parametrize("use", [loading.load, describe])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./none", "no model at './none'"),
        ("/none", "no model at '/none'"),
        ("a/b/c", "no model at 'a/b/c'"),
        ("none.gguf", "no GGUF file 'none.gguf'"),
        ("empty", "folder 'empty' contains no model: it has no config.json"),
        ("no-org/no-model", "can't find 'no-org/no-model', neither as a folder nor on the hub"),
        ("garbage", "can't load 'garbage'"),
        ("untyped", "can't load 'untyped'"),
        ("unknown", "can't load 'unknown'"),
        ("crooked", "can't load 'crooked'"),
    ],
)
def test_what_cannot_be_found_or_read(tmp_path, monkeypatch, use, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    config_folder(tmp_path / "garbage", "no json")
    config_folder(tmp_path / "untyped", {})
    config_folder(tmp_path / "unknown", {"model_type": "no_such_type"})
    config_folder(tmp_path / "crooked", {**TINY_LLAMA, "hidden_size": "wide"})
    with pytest.raises(ModelError, match=message) as error:
        use(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_is_cut_off(tmp_path, tiny_checkpoint, name):
    shutil.copytree(tiny_checkpoint, tmp_path / "half")
    whole = (tiny_checkpoint / name).read_bytes()
    (tmp_path / "half" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="can't load 'half'"):
        loading.load(tmp_path / "half")


def test_a_checkpoint_without_weights_for_a_router(tmp_path, tiny_checkpoint):
    """As if its code asked for another number of layers: transformers would fill them with random numbers."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "half"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 2}))
    with pytest.raises(
        ModelError, match=r"'half' has no weights for 2 of its routers, such as 'model\.layers\.3\."
    ) as error:
        loading.load(folder)
    assert "\n" not in str(error.value)


def test_remote_code_needs_consent(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    folder = config_folder(tmp_path / "remote", config)
    (folder / "code.py").write_text("raise RuntimeError('it was run')")
    with pytest.raises(
        ModelError, match="'remote' brings its own model code: pass --trust-remote-code if you trust it"
    ):
        describe(folder)


OLD_CODE = """
from transformers import PreTrainedConfig
BROKEN
class Config(PreTrainedConfig):
    model_type = "mine"
"""


@pytest.mark.parametrize(
    ("broken", "lacks"),
    [
        ("from transformers.utils import is_no_longer_there", "lacks is_no_longer_there"),
        ("import transformers.no_longer_there", "lacks transformers.no_longer_there"),
        ("import transformers\ntransformers.no_longer_there()", "lacks no_longer_there"),
        ("PreTrainedConfig.no_longer_there()", "has no attribute 'no_longer_there'"),
    ],
)
@pytest.mark.parametrize("version", ["4.39.3", None])
def test_outdated_remote_code_names_the_version_that_runs_it(tmp_path, monkeypatch, broken, lacks, version):
    keep_modules_in(tmp_path / "modules", monkeypatch)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    folder = config_folder(tmp_path / "remote", config | ({"transformers_version": version} if version else {}))
    (folder / "code.py").write_text(OLD_CODE.replace("BROKEN", broken))
    runs = rf"transformers {version} runs \(its config.json says so\)" if version else "an older transformers runs"
    for use in (describe, loading.load):
        with pytest.raises(
            ModelError, match=rf"'remote' brings its own model code, which {runs} and 5.* does not"
        ) as error:
            use(folder, trust_remote_code=True)
        assert lacks in str(error.value)
        assert "\n" not in str(error.value)


# ---- describe ----


def test_describe(tiny_checkpoint, tiny_model):
    description = describe(tiny_checkpoint)
    assert description.as_dict() == {
        "name": "tiny-mixtral",
        "architecture": "mixtral",
        "model_class": "MixtralForCausalLM",
        "layers": 3,
        "moe_layers": (0, 1, 2),
        "experts": (8,),
        "top_k": (2,),
        "scoring": "softmax",
        "shared_experts": False,
        "router_class": "MixtralTopKRouter",
        "parameters": sum(parameter.numel() for parameter in tiny_model.model.parameters()),
        "steerable": True,
        "reason": "its routers' logits are changed before top-k",
        "fingerprint": tiny_model.shape.fingerprint,
        "baked": None,
        "memory": {
            "float32": 4 * sum(parameter.numel() for parameter in tiny_model.model.parameters()),
            "bfloat16": 2 * sum(parameter.numel() for parameter in tiny_model.model.parameters()),
            "int8": description.memory["int8"],
        },
        "cache_per_1000_tokens": 3 * 2 * 8 * 2 * 1000,
        "tokenizer": True,
        "chat_template": False,
        "think_tags": None,
    }


@pytest.mark.parametrize(("family", "scoring"), [("mixtral", ""), ("deepseek_v3", "sigmoid")])
def test_describe_a_gguf_that_only_llama_cpp_runs(tmp_path, family, scoring):
    """Transformers makes a dense Llama of the first, and does not know the second."""
    loaded = tiny_ggufs.build(family)
    found = describe(tiny_ggufs.write(loaded, tmp_path))
    assert found.steerable
    assert (found.shape.routers, found.shape.fingerprint) == (loaded.shape.routers, loaded.shape.fingerprint)
    assert (found.scoring, found.shared_experts) == (scoring, family == "deepseek_v3")
    assert set(found.memory) == {"file"}
    assert found.parameters == pytest.approx(sum(each.numel() for each in loaded.model.parameters()), rel=0.01)
    assert found.reason.endswith("in llama.cpp only")


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 9,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 2,
    "v_head_dim": 2,
}


def test_describe_a_model_with_dense_layers_and_shared_experts(tmp_path):
    description = describe(config_folder(tmp_path / "deepseek", DEEPSEEK))
    assert (description.layers, description.moe_layers) == (4, (1, 2, 3))
    assert (description.experts, description.top_k, description.scoring) == ((8,), (3,), "sigmoid")
    assert description.shared_experts


def test_describe_a_dense_model(tmp_path):
    description = describe(config_folder(tmp_path / "dense", TINY_LLAMA))
    assert (description.steerable, description.moe_layers, description.router_class) == (False, (), "")
    assert "dense model" in description.reason


def test_describe_allocates_no_weights(tmp_path):
    huge = {**DEEPSEEK, "hidden_size": 8192, "intermediate_size": 2**20, "vocab_size": 2**20}
    assert describe(config_folder(tmp_path / "huge", huge)).parameters > 2**33


def test_the_description_knows_which_vectors_fit(tiny_checkpoint, make_vector):
    description = describe(tiny_checkpoint)
    info = VectorInfo.of(description.shape)
    assert (info.model, info.architecture, info.top_k) == ("tiny-mixtral", "mixtral", 2)
    make_vector(info=info).check_fits(description.shape)
    with pytest.raises(CompatibilityError, match="'sport' has 4x8 experts, tiny-mixtral has 3x8"):
        make_vector(layers=range(4)).check_fits(description.shape)


# ---- the default model ----


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a trained part of a few bytes."""
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    trained = tmp_path / "trained_part.safetensors"
    trained.write_bytes(b"trained")
    monkeypatch.setattr(spec, "TRAINED_PART", trained)
    return tmp_path / "cache"


def fake_assemble(source, folder):
    folder.mkdir()
    (folder / "config.json").write_text(str(source))
    (folder / "model.safetensors").write_bytes(b"weights")


def test_pull_once(cache, monkeypatch):
    monkeypatch.setattr(assemble, "assemble", fake_assemble)
    assert not pull.is_pulled()
    folder = pull.pull("first")
    assert folder.parent == cache / "models"
    assert pull.is_pulled()
    assert pull.pull("second") == folder
    assert (folder / "config.json").read_text() == "first"
    pull.pull("third", force=True)
    assert (folder / "config.json").read_text() == "third"
    assert list(folder.parent.iterdir()) == [folder]


def test_another_trained_part_is_another_folder(cache):
    before = pull.default_model_folder()
    spec.TRAINED_PART.write_bytes(b"trained longer")
    assert pull.default_model_folder() != before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("no base"), OSError(28, "No space left on device")])
def test_a_pull_that_fails_leaves_what_was_there(cache, monkeypatch, error):
    monkeypatch.setattr(assemble, "assemble", fake_assemble)
    folder = pull.pull("first")

    def fail(source, folder):
        fake_assemble(source, folder)
        raise error

    monkeypatch.setattr(assemble, "assemble", fail)
    with pytest.raises((KeyboardInterrupt, ModelError)):
        pull.pull("second", force=True)
    assert (folder / "config.json").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]


def test_pull_fetches_the_base_if_none_is_given(cache, monkeypatch):
    monkeypatch.setattr(assemble, "assemble", fake_assemble)
    monkeypatch.setattr(base, "fetch", lambda folder: folder / "fetched.gguf")
    assert (pull.pull() / "config.json").read_text().endswith("fetched.gguf")


def test_the_default_model_is_not_here_yet(cache):
    for use in (loading.load, describe):
        for name in (None, "smollm2-moe"):
            with pytest.raises(ModelError, match="run `steermoe models pull`"):
                use(name)


def test_a_package_without_its_trained_part(cache):
    spec.TRAINED_PART.unlink()
    with pytest.raises(ModelError, match=r"can't read the trained part '.*': install steermoe again"):
        pull.is_pulled()


def test_cache_that_cannot_be_written(cache, monkeypatch):
    cache.write_text("a file")
    with pytest.raises(ModelError, match=r"can't write the model to .*set STEERMOE_CACHE to another folder"):
        pull.pull("base")


def test_repeatable_dtype(tiny_checkpoint, tmp_path, monkeypatch):
    """float32 for small models on a CPU."""
    assert checkpoint.repeatable_dtype(tiny_checkpoint) == "float32"
    assert checkpoint.repeatable_dtype("an/id-on-the-hub") == "auto"
    with pytest.raises(ModelError, match="contains no model"):
        checkpoint.repeatable_dtype(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SMALL_CHECKPOINT_BYTES", 10)
        assert checkpoint.repeatable_dtype(tiny_checkpoint) == "auto"
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert checkpoint.repeatable_dtype(tiny_checkpoint) == "auto"


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(20), b"GGUF\3\0\0\0" + b"\xff" * 16])
def test_a_damaged_gguf_file_never_reaches_transformers(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    for use in (loading.load, describe):
        with pytest.raises(ModelError, match=r"bad.gguf' is not a GGUF file or is cut off"):
            use(tmp_path / "bad.gguf")


OLD_MODEL = """
from transformers import MixtralConfig, MixtralForCausalLM
class Config(MixtralConfig):
    model_type = "mine"
class Model(MixtralForCausalLM):
    config_class = Config
    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            past_key_values.get_usable_length(1)
        return super().forward(*args, **kwargs)
"""


def test_remote_code_that_is_outdated_where_it_generates(tmp_path, tiny_checkpoint, tiny_model, monkeypatch):
    """It can still be loaded, for what needs no cache, such as embedding texts."""
    from safetensors.torch import save_file

    keep_modules_in(tmp_path / "modules", monkeypatch)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "remote"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.39.3"}))
    (folder / "code.py").write_text(OLD_MODEL)
    # transformers renames the weights of its own families only
    save_file(tiny_model.model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    engine = HFEngine(loading.load(folder, trust_remote_code=True))
    for use in (lambda: engine.generate([Request("a")]), lambda: engine.decoder(2)):
        with pytest.raises(ModelError, match=r"which transformers 4\.39\.3 runs .*no attribute 'get_usable_length'"):
            use()
