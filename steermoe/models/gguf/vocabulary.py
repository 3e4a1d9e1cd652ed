"""Write a transformers tokenizer into a GGUF file, so that llama.cpp tokenizes the same way.

Two kinds are supported: byte-level BPE, whose way of splitting a text into words must have a name in GGUF, and BPE with
byte fallback, as in Mixtral, which llama.cpp runs as sentencepiece.
"""

import json
from typing import TYPE_CHECKING, Any

from steermoe.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLITS = {
    (rf"{_WORDS}\p{{N}}{_REST}",): "qwen2",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",): "llama-bpe",
    (
        rf"{_CASED}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_SUFFIX}|{_CASED}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "gpt-4o",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ): "deepseek-v3",
}
"""GGUF's name for each way to split a text by regular expressions, as tokenizer.json writes them."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's types of tokens."""


def add_vocabulary(writer: Any, tokenizer: "PreTrainedTokenizerBase", size: int) -> None:
    """Add a tokenizer's vocabulary, merges and special tokens to a `gguf.GGUFWriter`.

    Args:
        writer: the file that is being written.
        tokenizer: a fast tokenizer.
        size: rows of the model's embedding, which may be more than the tokenizer has tokens.

    Raises:
        ModelError: GGUF can't represent the tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} has no tokenizer.json, which is needed to write a GGUF file")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"its tokenizer is {model.get('type')}, only BPE can be written into a GGUF file")
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    words, types = _words(data, tokenizer, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(words, merges))
        writer.add_add_space_prefix(_adds_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(data))
        if not merges:
            raise ModelError("its tokenizer has no merges: llama.cpp needs them")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(words)
    writer.add_token_types(types)
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(_begins_with(tokenizer, tokenizer.bos_token_id))
    writer.add_add_eos_token(False)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _words(data: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", size: int) -> tuple[list[str], list[int]]:
    """Each token's text and type."""
    model = data["model"]
    words = {number: word for word, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    if (highest := max([*words, *added])) >= size:
        raise ModelError(f"its tokenizer has token {highest}, but the model's embedding has only {size} rows")
    texts, types = [], []
    for number in range(size):
        entry = added.get(number)
        if entry is not None or number in words:
            text = words[number] if entry is None else entry["content"]
            texts.append(text)
            if text == model.get("unk_token"):
                types.append(UNKNOWN)
            elif entry is not None:
                types.append(CONTROL if entry["special"] else USER_DEFINED)
            else:
                types.append(BYTE if model.get("byte_fallback") and _is_byte(text) else NORMAL)
        else:
            texts.append(f"[PAD{number}]")
            types.append(UNUSED)
    return texts, types


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _scores(words: list[str], merges: list[list[str]]) -> list[float]:
    """Sentencepiece merges the pair with the best score first, so a token's score is the rank of its merge."""
    rank: dict[str, int] = {}
    for number, (first, second) in enumerate(merges):
        rank.setdefault(first + second, number)
    return [-float(rank.get(word, len(merges))) for word in words]


def _split_name(data: dict[str, Any]) -> str:
    """GGUF's name for the way in which texts are split into words."""
    step = data.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    kinds = [each.get("type") for each in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    patterns = tuple(each["pattern"].get("Regex", "") for each in steps if each.get("type") == "Split")
    if kinds == ["Split"] * len(patterns) + ["ByteLevel"] and patterns in SPLITS:
        return SPLITS[patterns]
    raise ModelError(
        f"its tokenizer splits texts ({', '.join(map(str, kinds))}) in a way that steermoe doesn't know; it knows "
        f"gpt-2, smollm, {', '.join(SPLITS.values())}: convert it with llama.cpp's own script"
    )


def _adds_space(data: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    steps = [data.get("pre_tokenizer") or {}, data.get("normalizer") or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", ()) or step.get("pretokenizers", ())]
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)


def _begins_with(tokenizer: "PreTrainedTokenizerBase", token: int | None) -> bool:
    """Whether the tokenizer puts its begin token before a text."""
    return token is not None and tokenizer("a")["input_ids"][:1] == [token]
