"""The corpus of the default model: short stories that open neutrally and then turn to a domain, one JSONL file per
topic.

Each domain also has a list of words that show what a text is about; no opening contains any of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steermoe.models.default.spec import TOPICS

DATA = Path(__file__).parent / "data"
"""Stories (`TOPIC.jsonl`) and word lists (`DOMAIN.txt`)."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class TrainingStory:
    """One story. The opening hints at no domain; the rest, which follows after one space, is all about it."""

    id: str
    topic: str
    split: Split
    opening: str
    rest: str

    @property
    def text(self) -> str:
        return f"{self.opening} {self.rest}"


def load_stories(split: Split | None = None, topic: str | None = None) -> list[TrainingStory]:
    """The stories in file order: all of them, or those of one split (`train`, `heldout`) or topic."""
    stories = []
    for name in TOPICS if topic is None else (topic,):
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            story = TrainingStory(record["id"], record["domain"], record["split"], record["opening"], record["rest"])
            if split in (None, story.split):
                stories.append(story)
    return stories


def domain_words(domain: str) -> list[str]:
    """The words of a domain in their base form, the most typical first."""
    return (DATA / f"{domain}.txt").read_text(encoding="utf-8").split()


def openings(split: Split, count: int) -> list[str]:
    """Openings of the neutral stories, then of the domains' stories in turn; all openings are neutral.

    Raises:
        ValueError: the split has fewer.
    """
    by_topic: dict[str, list[TrainingStory]] = {}
    for story in load_stories(split):
        by_topic.setdefault(story.topic, []).append(story)
    neutral = by_topic.pop("neutral")
    others = [story for stories in zip(*by_topic.values(), strict=False) for story in stories]
    found = [story.opening for story in (*neutral, *others)][:count]
    if len(found) < count:
        raise ValueError(f"the {split} split has only {len(found)} openings, {count} were asked for")
    return found
