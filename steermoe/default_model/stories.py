"""The corpus of the default model: short stories that open neutrally and then turn to a domain, one JSONL file a topic.

Beside it a list of words a domain, which tell a reader what a text is about; no opening holds any of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steermoe.default_model.spec import TOPICS

STORIES = Path(__file__).parent / "stories"
WORDS = Path(__file__).parent / "words"

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Story:
    """One story. The opening names no domain; the rest, which follows after one space, is all about it."""

    id: str
    topic: str
    split: Split
    opening: str
    rest: str

    @property
    def text(self) -> str:
        return f"{self.opening} {self.rest}"


def load_stories(split: Split | None = None, topic: str | None = None) -> list[Story]:
    """The stories in file order, all of them or those of one split (`train`, `heldout`) or one topic."""
    stories = []
    for name in TOPICS if topic is None else (topic,):
        for line in (STORIES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            story = Story(record["id"], record["domain"], record["split"], record["opening"], record["rest"])
            if split in (None, story.split):
                stories.append(story)
    return stories


def domain_words(domain: str) -> list[str]:
    """The words of a domain, base forms, the most typical first."""
    return (WORDS / f"{domain}.txt").read_text(encoding="utf-8").split()
