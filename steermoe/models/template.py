"""What a checkpoint's tokenizer says about chats, read without loading it: its template, and the tags around thinking.

Imports no transformers. A template is Jinja source; nothing here runs it.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from steermoe.models.gguf.header import read_header

MAX_BYTES = 2**26
"""Larger files are not read: the largest tokenizers have half of that."""
CHANNELS = ("<|channel|>analysis<|message|>", "<|end|>")
"""How GPT-OSS begins and ends a message of its thinking."""
MARKS = ("<|channel|>", "<|message|>")
WORD = "think|thought|reason"
PAIRS = (
    (re.compile(rf"<(/?)((?:[a-z][\w.-]*[:_])?(?:{WORD})\w*)>", re.IGNORECASE), "<{}>", "</{}>"),
    (re.compile(rf"\[(/?)((?:{WORD})\w*)\]", re.IGNORECASE), "[{}]", "[/{}]"),
    (re.compile(rf"◁(/?)((?:{WORD})\w*)▷", re.IGNORECASE), "◁{}▷", "◁/{}▷"),
)
"""Tags like those of HTML: with the name in between, which the closing one repeats after a slash."""
BEGINS_AND_ENDS = re.compile(rf"<\|(?:start|begin)_((?:of_)?(?:{WORD})\w*)\|>", re.IGNORECASE)
"""Tags like those of Cohere: <|START_THINKING|> and <|END_THINKING|>."""


def chat_template(path: Path | str) -> str | None:
    """The chat template of a checkpoint folder or GGUF file; None if it has none that can be read.

    Of several, it is the one called `default`, else the first.

    Raises:
        ModelError: a GGUF file that is damaged, or none.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return _text(read_header(path)[0].get("tokenizer.chat_template"))
    if source := _read(path / "chat_template.jinja"):
        return source
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _json(path / name).get("chat_template")
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default") or next(iter(named.values()), None)
        if template := _text(found):
            return template
    return None


def added_tokens(path: Path | str) -> frozenset[str]:
    """The tokens that a checkpoint folder's tokenizer adds to its vocabulary, special or not; none if it says nothing.

    A GGUF file has them in its vocabulary, which is not read.
    """
    config = _json(Path(path) / "tokenizer_config.json").get("added_tokens_decoder")
    entries = list(config.values()) if isinstance(config, dict) else []
    if not entries:
        found = _json(Path(path) / "tokenizer.json").get("added_tokens")
        entries = found if isinstance(found, list) else []
    contents = (entry.get("content") for entry in entries if isinstance(entry, dict))
    return frozenset(content for content in contents if isinstance(content, str) and content)


def has_tokenizer(path: Path | str) -> bool:
    """Whether a checkpoint folder has a file that a tokenizer is loaded from."""
    patterns = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
    return any(found.is_file() for pattern in patterns for found in Path(path).glob(pattern))


def think_tags(template: str | None, special_tokens: Collection[str]) -> tuple[str, str] | None:
    """The texts between which a model thinks, such as <think> and </think>; None if it has none.

    Args:
        template: the chat template.
        special_tokens: the tokens that the tokenizer adds to its vocabulary, special or not.

    Returns:
        the text that begins the thinking and the one that ends it. Of several pairs it is the one whose tags are tokens
        of their own, else the one that the template names first.
    """
    source = template or ""
    if all(mark in source or mark in special_tokens for mark in MARKS) and "analysis" in source:
        return CHANNELS
    named = _pairs(source)
    return next(
        (pair for pair in (*named, *_pairs("\n".join(sorted(special_tokens)))) if set(pair) <= set(special_tokens)),
        next(iter(named), None),
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    """The pairs of tags of which a text holds the closing one, in the order of their names' first places.

    Templates need not open the thinking: some models do so themselves.
    """
    found: dict[tuple[str, str], int] = {}
    for pattern, opening, closing in PAIRS:
        for match in pattern.finditer(text):
            pair = opening.format(match[2]), closing.format(match[2])
            if pair[1] in text:
                found.setdefault(pair, match.start())
    for match in BEGINS_AND_ENDS.finditer(text):
        end = "<|END_" if match[0][2].isupper() else "<|end_"
        pair = match[0], f"{end}{match[1]}|>"
        if pair[1] in text:
            found.setdefault(pair, match.start())
    return sorted(found, key=lambda pair: found[pair])


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _read(path: Path) -> str | None:
    """The text of a file; None if it is missing, too large, or can't be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        return _text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    try:
        found = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
