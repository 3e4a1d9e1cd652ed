"""Tiny random models of the families that can be exported, as transformers models and as GGUF files."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steermoe.models.gguf.export import export_gguf
from steermoe.models.loading import LoadedModel
from tests.support import tiny_models

VOCABULARY = 320
LAYERS, EXPERTS, TOP_K = tiny_models.LAYERS, tiny_models.EXPERTS, tiny_models.TOP_K
PLAIN = {"rope_parameters": tiny_models.ROPE}
OVERRIDES = {
    "deepseek_v2": {"topk_method": "greedy", "n_group": None, "topk_group": None},
    "gpt_oss": PLAIN,
    "mixtral": {"sliding_window": None},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen2_moe": {"norm_topk_prob": False},
}
"""What llama.cpp requires."""
FAMILIES = (
    "granitemoe",
    "granitemoeshared",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
)
SPECIAL = ["<pad>", "<s>", "</s>"]
WORDS = ("th", "the", "in", "an", "Ġa", "Ġthe")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("Ġ", "the"))


def byte_tokenizer(split=None) -> PreTrainedTokenizerFast:
    """Bytes and a few longer words, as in byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*SPECIAL, *alphabet, *WORDS])}
    tokenizer = Tokenizer(models.BPE(words, list(MERGES)))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a marked space and bytes for the rest, as in Mixtral's tokenizer."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "th", "▁th", "▁the"]
    words = list(dict.fromkeys(words))
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def build(family: str, tokenizer: PreTrainedTokenizerFast | None = None, **overrides) -> LoadedModel:
    """A tiny random model with a tokenizer."""
    sizes = {"vocab_size": 420, **OVERRIDES.get(family, {}), **overrides}
    model = tiny_models.build(family, **sizes)
    model.generation_config.pad_token_id = 0
    return LoadedModel(f"tiny-{family}", model, tokenizer or byte_tokenizer())


def write(loaded: LoadedModel, folder: Path, quantization="f32") -> Path:
    return export_gguf(loaded, folder / f"{loaded.name}-{quantization}.gguf", quantization)
