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


def read_stories(folder: Path, topics: tuple[str, ...] = TOPICS) -> list[TrainingStory]:
    """The stories of a folder in file order; a topic may have no file."""
    stories = []
    for path in (folder / f"{name}.jsonl" for name in topics):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            stories.append(
                TrainingStory(record["id"], record["domain"], record["split"], record["opening"], record["rest"])
            )
    return stories


def load_stories(split: Split | None = None, topic: str | None = None) -> list[TrainingStory]:
    """The stories in file order: all of them, or those of one split (`train`, `heldout`) or topic."""
    stories = read_stories(DATA, TOPICS if topic is None else (topic,))
    return [story for story in stories if split in (None, story.split)]


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
