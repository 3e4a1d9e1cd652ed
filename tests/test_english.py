"""Words that must not return to documents, comments, docstrings and messages, each with its replacement.

Knows only so much of Python and Markdown as it needs to ignore identifiers of other libraries, and in documents quoted
texts of models and quoted output of commands.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "steering_vectors/README.md")
FILES = sorted(
    {
        *(path for name in (*DOCUMENTS, "Makefile", "pyproject.toml") if (path := ROOT / name).is_file()),
        *(ROOT / "docs").rglob("*.md"),
        *(path for folder in ("steermoe", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")),
    }
)

STORY_WORDS = r"(?:stor(?:y|ies)|texts?|prompts?|openings?)"

BANNED = {
    # a text is generated
    r"told": "generated (a text); reported, printed, passed (a fact)",
    r"tells": "generates (a text); says, shows, distinguishes",
    r"tellers?": "worker",
    r"telling": "generating",
    rf"tell (?:(?:a|an|the|each|every|all|many|more|same|its|their|of) )+(?:[\w-]+ )?{STORY_WORDS}": "generate",
    r"what to tell": "what to generate",
    r"tell\((?!\))": "generate(, write( or report(",
    # a count is named
    r"so many": "at most N; N; how many (name the thing)",
    # an interrupted run resumes
    r"(?:go|goes|going|gone|went) on (?:with|where|from)": "resumes, continues",
    r"ha(?:s|ve|d) gone on": "resumed, continued",
    # devices
    r"processors?": "CPU",
    r"accelerators?": "GPU, device",
    r"machine code": "compiled kernel",
    r"copies of (?:the|a|an|its|each|every) (?:[\w-]+ )?model": "data-parallel replicas",
    r"divid(?:e|es|ed|ing) the layers": "pipeline-parallel stages",
    # phrases that no engineer would write
    r"(?:can(?:no|')t|can not|to|could not|couldn't) be had": "is not available",
    r"likewise": "as well, in the same way (or repeat the noun)",
    r"see there": "name the place: as in `function`",
    r"by (?:itself|themselves)": "automatically, alone",
    r"in (?:other|any|such|whatever|different) company": "in a different batch",
    r"what (?:the )?steering did": "steering report",
}
"""Patterns, and what to write instead. A space matches any gap, also a line break."""

ALLOWED = (
    "torch.accelerator",
    "io_processor",
    "input_processor",
    "logits_processor",
    "platform.processor",
    "InputProcessor",
    "LogitsProcessor",
    "LogitsProcessorList",
    "RepetitionPenaltyLogitsProcessor",
    "AutoProcessor",
)
"""Identifiers of other libraries."""

GAP = r"(?:\s|#|>)+"
BEGINNING, END = r"(?-i:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))", r"(?-i:(?<![A-Za-z])|(?![a-z]))"
"""Word boundaries, also within `snake_case` and `CamelCase`."""
SEARCHES = [
    (re.compile(rf"{BEGINNING}(?:{word.replace(' ', GAP)}){END}", re.IGNORECASE), instead)
    for word, instead in BANNED.items()
]
NAMES = re.compile(
    rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(ALLOWED, key=len, reverse=True)))})(?!\w)|\btest_\w+|\.tell\(\)"
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"^>.*$", re.MULTILINE)


class Hit(NamedTuple):
    line: int
    word: str
    instead: str


def hits(text: str, is_document: bool) -> list[Hit]:
    """The banned words of a text, in order, except in identifiers of other libraries.

    Args:
        is_document: Markdown, where quoted texts and the output of commands are ignored.
    """
    if is_document:
        text = QUOTED.sub(_blank, FENCED.sub(_without_output, text))
    text = NAMES.sub(_blank, text)
    return sorted(
        Hit(text.count("\n", 0, found.start()) + 1, re.sub(GAP, " ", found.group()), instead)
        for search, instead in SEARCHES
        for found in search.finditer(text)
    )


def _blank(found: re.Match[str]) -> str:
    """A blank of the same length and with the same line breaks."""
    return re.sub(r"[^\n]", "_", found.group())


def _without_output(block: re.Match[str]) -> str:
    """A code block with the output of its commands blanked: a whole `text` block; in a session, lines without `$`."""
    language, code = block.groups()
    if language == "text":
        return _blank(block)
    if language == "console" and re.search(r"^\$ ", code, re.MULTILINE):
        return re.sub(r"^(?!\$ |```).+$", _blank, block.group(), flags=re.MULTILINE)
    return block.group()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plain_english(path):
    name = path.relative_to(ROOT).as_posix()
    found = hits(path.read_text(encoding="utf-8"), path.suffix == ".md")
    if found:
        lines = (f"{name}:{hit.line}: not '{hit.word}' but: {hit.instead}" for hit in found)
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The story is told again; a teller tells it.", ["told", "teller", "tells"]),
        ("Tell the same story, and tell every prompt.", ["Tell the same story", "tell every prompt"]),
        ("def tell(self, stories): EngineTeller, MOST_TOLD", ["tell(", "Teller", "TOLD"]),
        ("file.tell() can't tell them apart", []),
        ("A file is gone\n    # on with where it\n# goes on where it was.", ["gone on with", "goes on where"]),
        (
            "On processors so many_rows, processor_ratio, Accelerator",
            ["processors", "so many", "processor", "Accelerator"],
        ),
        ("torch.accelerator.is_available(), LogitsProcessorList, logits_processor, accelerate", []),
        ("coprocessor, retold, toldest", []),
        ("Copies of a Mixture-of-Experts model", ["Copies of a Mixture-of-Experts model"]),
        ("It can't be had, likewise; see there by itself.", ["can't be had", "likewise", "see there", "by itself"]),
    ],
)
def test_words_are_found(text, words):
    assert sorted(hit.word for hit in hits(text, is_document=False)) == sorted(words)


def test_line_numbers_are_those_of_the_file():
    assert [hit.line for hit in hits("one\ntwo, told\n\nso\nmany", is_document=False)] == [2, 4]


def test_quotations_in_documents_are_ignored():
    text = (
        "> He told her so.\n\n```text\ntold\n```\n\n```console\n$ steermoe generate  # told\n He told her.\n```\n\n"
        "```console\n# told again\n```\n"
    )
    assert [hit.line for hit in hits(text, is_document=True)] == [8, 13]
