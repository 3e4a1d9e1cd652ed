"""GGUF export: each family's weights under their GGUF names, the tokenizer, the settings, and what is rejected."""

import re

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steermoe.errors import ModelError
from steermoe.models.gguf.export import FAMILIES, QUANTIZATIONS, export_gguf
from steermoe.models.gguf.header import read_gguf
from steermoe.models.gguf.vocabulary import SPLITS
from steermoe.models.loading import LoadedModel
from tests.support import tiny_ggufs, tiny_models


def read(path):
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def numbers(tensor):
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))


def test_every_family_is_tested():
    assert set(tiny_ggufs.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", tiny_ggufs.FAMILIES)
def test_family(family, tmp_path):
    loaded = tiny_ggufs.build(family)
    path = tiny_ggufs.write(loaded, tmp_path)
    fields, tensors = read(path)
    arch = fields["general.architecture"]
    assert arch == FAMILIES[family].architecture
    assert fields[f"{arch}.block_count"] == tiny_ggufs.LAYERS
    assert (fields[f"{arch}.expert_count"], fields[f"{arch}.expert_used_count"]) == (8, 2)
    assert fields["steermoe.model_type"] == family
    total = sum(tensor.n_elements for tensor in tensors.values())
    held = sum(value.numel() for name, value in loaded.model.state_dict().items())
    assert total == held  # nothing lost, nothing twice
    routers = [value for name, value in loaded.model.state_dict().items() if re.search(r"(gate|router)\.weight$", name)]
    for layer, router in enumerate(r for r in routers if r.shape[0] == 8):
        assert torch.equal(numbers(tensors[f"blk.{layer}.ffn_gate_inp.weight"]), router)
    found = read_gguf(path)
    assert found.layers == (0, 1)
    assert (found.architecture, found.model_type, found.context_length) == (arch, family, 256)
    assert found.node == {"gpt_oss": "ffn_moe_probs"}.get(family, "ffn_moe_logits")
    assert found.chooses_by_logits == (family != "deepseek_v3")


def test_experts_gates_and_ups(tmp_path):
    loaded = tiny_ggufs.build("qwen2_moe")
    _, tensors = read(tiny_ggufs.write(loaded, tmp_path))
    fused = loaded.model.model.layers[1].mlp.experts.gate_up_proj
    gate, up = (numbers(tensors[f"blk.1.ffn_{name}_exps.weight"]) for name in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up], 1), fused)


def test_gpt_oss_gates_and_ups_alternate(tmp_path):
    loaded = tiny_ggufs.build("gpt_oss")
    _, tensors = read(tiny_ggufs.write(loaded, tmp_path))
    experts = loaded.model.model.layers[0].mlp.experts
    assert torch.equal(numbers(tensors["blk.0.ffn_up_exps.weight"]), experts.gate_up_proj[:, :, 1::2].transpose(1, 2))
    assert torch.equal(numbers(tensors["blk.0.ffn_gate_exps.bias"]), experts.gate_up_proj_bias[:, ::2])
    assert torch.equal(numbers(tensors["blk.0.ffn_down_exps.weight"]), experts.down_proj.transpose(1, 2))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizations(quantization, tmp_path):
    loaded = tiny_ggufs.build("granitemoe", intermediate_size=64)
    _, tensors = read(tiny_ggufs.write(loaded, tmp_path, quantization))
    worst = {"f32": 0, "bf16": 2**-8, "q8_0": 2**-6, "q4_1": 2**-2}[quantization]
    weight = loaded.model.model.layers[0].self_attn.v_proj.weight
    stored = tensors["blk.0.attn_v.weight"]
    assert stored.tensor_type.name.lower() == quantization
    assert (numbers(stored) - weight).abs().max() <= worst * weight.abs().max()
    assert tensors["token_embd.weight"].tensor_type.name.lower() == {"q4_1": "q8_0"}.get(quantization, quantization)
    kept = {"blk.0.ffn_gate_inp.weight", "blk.0.attn_norm.weight", "output_norm.weight"}
    assert {tensors[name].tensor_type.name for name in kept} == {"F32"}


def test_rows_that_do_not_divide_into_blocks_stay_float32(tmp_path):
    _, tensors = read(tiny_ggufs.write(tiny_ggufs.build("mixtral", intermediate_size=40), tmp_path, "q8_0"))
    assert tensors["blk.0.ffn_down_exps.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("phimoe", {}, r"is phimoe: steermoe exports deepseek_v2, .* convert_hf_to_gguf"),
        ("olmoe", {"norm_topk_prob": True}, "olmoe only without norm_topk_prob"),
        ("mixtral", {"sliding_window": 16}, "attention window is 16 tokens"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}, "groups of experts"),
        ("mixtral", {"rope_parameters": tiny_models.ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("mixtral", {"vocab_size": 100}, "embedding has only 100 rows"),
    ],
)
def test_what_is_rejected(family, overrides, message, tmp_path):
    loaded = tiny_ggufs.build(family, **overrides)
    with pytest.raises(ModelError, match=message):
        tiny_ggufs.write(loaded, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_without_a_name_is_rejected(tmp_path):
    loaded = tiny_ggufs.build("mixtral")
    loaded.model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"weight 'mlp.extra.weight' has no name"):
        tiny_ggufs.write(loaded, tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"can't write .* No such file"):
        export_gguf(tiny_ggufs.build("mixtral"), tmp_path / "no" / "x.gguf", "f32")


# ---- tokenizers ----


def test_byte_level_words(tmp_path):
    loaded = tiny_ggufs.build("mixtral")
    fields, _ = read(tiny_ggufs.write(loaded, tmp_path))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    words = fields["tokenizer.ggml.tokens"]
    assert len(words) == 420
    assert [words[i] for i in loaded.tokenizer("the ab")["input_ids"]] == ["the", "Ġa", "b"]
    assert words[-1] == "[PAD419]"
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.merges"][:2] == ["t h", "th e"]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_pieces_with_bytes(tmp_path):
    loaded = tiny_ggufs.build("mixtral", tiny_ggufs.piece_tokenizer())
    fields, _ = read(tiny_ggufs.write(loaded, tmp_path))
    words, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert scores[words.index("th")] > scores[words.index("▁th")] > scores[words.index("▁the")]
    assert fields["tokenizer.ggml.token_type"][3:5] == [2, 6]


@pytest.mark.parametrize(("patterns", "name"), SPLITS.items(), ids=SPLITS.values())
def test_named_splits(patterns, name, tmp_path):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    split = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fields, _ = read(tiny_ggufs.write(tiny_ggufs.build("mixtral", tiny_ggufs.byte_tokenizer(split)), tmp_path))
    assert fields["tokenizer.ggml.pre"] == name


def test_tokenizers_that_have_no_name(tmp_path):
    odd = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    with pytest.raises(ModelError, match=r"splits texts \(Whitespace, ByteLevel\)"):
        tiny_ggufs.write(tiny_ggufs.build("mixtral", tiny_ggufs.byte_tokenizer(odd)), tmp_path)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a")))
    with pytest.raises(ModelError, match="is WordLevel, only BPE"):
        tiny_ggufs.write(tiny_ggufs.build("mixtral", words), tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer.json"):
        tiny_ggufs.write(LoadedModel("x", tiny_ggufs.build("mixtral").model, object()), tmp_path)
