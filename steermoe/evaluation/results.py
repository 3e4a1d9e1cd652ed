"""The folder of an evaluation: one file per condition, complete or absent, so that a killed run resumes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steermoe.errors import SteerMoEError
from steermoe.files import atomic_path

SETTINGS, SUMMARY = "settings.json", "evaluation.json"
STORIES = "stories"
ON_TEXTS = "forced"
"""Subfolder of what was measured on given texts, by teacher forcing."""


@dataclass(frozen=True)
class StoryRecord:
    """One continuation as it is stored, without what can be computed from its text.

    Attributes:
        opening: number of its opening. seed: number of its seed, 0 to `EvaluationSettings.seeds` - 1.
        nats: mean negative log-likelihood per token under the unsteered model; None for a text without tokens.
        vector_shares: for each vector of the evaluation, the share of the text's top-k slots that its experts got.
        entropy: of the experts' use, over log N, mean over layers; None for a text without tokens.
    """

    opening: int
    seed: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    nats: float | None
    vector_shares: dict[str, float]
    entropy: float | None


class ResultFolder:
    """Reads and writes the results of what was run.

    Args:
        path: the folder; created if necessary.
        settings: everything that makes results comparable. A folder that was begun with other settings is rejected.

    Raises:
        SteerMoEError: other settings, a damaged file, or a folder that can't be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))
        try:
            for part in (STORIES, ON_TEXTS):
                (path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SteerMoEError(f"can't write to '{path}': {error.strerror}; name another folder with -o") from error
        if (path / SETTINGS).exists():
            begun = self.read_json(SETTINGS)
            if differing := sorted(k for k in begun.keys() | settings.keys() if begun.get(k) != settings.get(k)):
                name = differing[0]
                raise SteerMoEError(
                    f"'{path}' was begun with other settings ({', '.join(differing)}: {_short(begun.get(name))}, now "
                    f"{_short(settings.get(name))}): use the same ones to resume, or name another folder with -o"
                )
        else:
            self.write_json(SETTINGS, settings)

    def stories(self, name: str, generate: Callable[[], Sequence[StoryRecord]]) -> list[StoryRecord]:
        """The stories of a condition: read if they are stored, else generated and stored."""
        file = self.path / STORIES / f"{name}.jsonl"
        if not file.exists():
            self._write(file, "".join(json.dumps(asdict(story), ensure_ascii=False) + "\n" for story in generate()))
        try:
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            return [StoryRecord(**{**record, "token_ids": tuple(record["token_ids"])}) for record in records]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SteerMoEError(f"'{file}' is damaged ({error!r}): delete it and run again") from error

    def on_texts(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured on texts under a name: read if it is stored, else measured and stored."""
        file = f"{ON_TEXTS}/{name}.json"
        if not (self.path / file).exists():
            self.write_json(file, measure())
        found: dict[str, Any] = self.read_json(file)
        return found

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SteerMoEError(f"'{self.path / name}' is damaged ({error}): delete it and run again") from error

    def write_json(self, name: str, value: Any) -> None:
        self._write(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        self._write(self.path / name, content)

    def _write(self, file: Path, content: str) -> None:
        try:
            with atomic_path(file) as partial:
                partial.write_text(content, encoding="utf-8")
        except OSError as error:
            raise SteerMoEError(f"can't write '{file}': {error.strerror}; make room or name another folder") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
