"""Which files of a folder are read: in the order of names, without hidden ones and what steermoe wrote."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from steermoe.discovery import records
from steermoe.discovery.formats import COLUMN_FILES, ENDINGS, TEXT
from steermoe.discovery.opening import BROKEN, open_text, suffix_of, uncompressed
from steermoe.discovery.store import is_store
from steermoe.errors import CorpusError

HIDDEN = "hidden"
"""The kind of a file whose name begins with a dot."""

Report = Callable[[str, str], None]
File = tuple[Path, str, str]
"""A file, its path below the corpus, and the ending that says how it is read."""


class Walk:
    """The files of a folder, in one pass.

    Args:
        path: the folder.
        include: as in `Corpus`.
        encoding: as in `Corpus`.

    Attributes:
        not_read: how many files of each kind were not read, by their ending; `HIDDEN` for hidden ones.
    """

    def __init__(self, path: Path, include: Sequence[str], encoding: str | None) -> None:
        self._path, self._include, self._encoding = path, include, encoding
        self.not_read: Counter[str] = Counter()

    def files(self, report: Report) -> Iterator[File]:
        """Each file that is read.

        Args:
            report: called with the path of a file or folder that can't be read, and why.

        Raises:
            CorpusError: a folder can't be read.
        """
        seen = set()
        try:
            for folder, subfolders, names in os.walk(self._path, onerror=_raise, followlinks=True):
                place = Path(folder).resolve()
                if place in seen or (place != self._path.resolve() and _is_output(Path(folder))):
                    subfolders.clear()  # a link back into the corpus, or what steermoe wrote
                    continue
                seen.add(place)
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                yield from self._files_in(Path(folder), sorted(names), report)
        except OSError as error:
            raise CorpusError(f"can't read '{error.filename or self._path}': {error.strerror or error}") from error

    def _files_in(self, folder: Path, names: list[str], report: Report) -> Iterator[File]:
        saved = self._saved_files(folder, names, report)
        for name in names:
            file = folder / name
            path = _as_unicode(file.relative_to(self._path).as_posix())
            if saved is not None and name not in saved:
                continue
            if name.startswith("."):
                self.not_read[HIDDEN] += 1
                continue
            kind = kind_of(name, path, self._include)
            if kind == ".json" and not self._include and not self._is_array(file):
                kind = None
            if kind is None:
                self.not_read[suffix_of(name) or "without ending"] += 1
            elif file.is_file():
                yield file, path, kind
            else:
                report(path, "is a broken link or not a regular file")

    def _saved_files(self, folder: Path, names: list[str], report: Report) -> list[str] | None:
        """The files with the records of a folder that `datasets` saved; None for other folders."""
        if "dataset_dict.json" in names:
            return []
        if not {"state.json", "dataset_info.json"} <= set(names):
            return None
        path = _as_unicode(folder.relative_to(self._path).as_posix())
        try:
            state = json.loads((folder / "state.json").read_bytes())
            listed = [str(entry["filename"]) for entry in state["_data_files"]]
            has_selection = bool(state.get("_indices_data_files"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            report(path, f"its state.json is damaged ({error!r:.100}): save the dataset again")
            return []
        if has_selection:
            report(path, "was saved with a selection of rows: call flatten_indices() and save it again")
            return []
        for missing in sorted(set(listed) - set(names)):
            report(path, f"lacks its file {missing!r:.100}: save the dataset again")
        return listed

    def _is_array(self, file: Path) -> bool:
        """Whether a .json file holds records, and not the settings of some program."""
        if not file.is_file():
            return True  # it will be reported
        try:
            with open_text(file, self._encoding, None) as stream:
                start = stream.read(records.SNIFFED).lstrip("\ufeff \t\r\n")
        except (OSError, UnicodeError, *BROKEN):
            return True
        return start.startswith("[") and start[1:].lstrip().startswith("{")


def kind_of(name: str, path: str, include: Sequence[str]) -> str | None:
    """The ending that says how a file is read; None if it isn't.

    Args:
        name: the file's own.
        path: its path below the corpus.
        include: as in `Corpus`.
    """
    if include and not any(fnmatchcase(name, like) or fnmatchcase(path, like) for like in include):
        return None
    kind = suffix_of(name)
    if kind in COLUMN_FILES and uncompressed(name) != name:
        return None
    if kind in ENDINGS:
        return kind
    return TEXT if include else None


def _is_output(folder: Path) -> bool:
    """Whether steermoe wrote a folder: embeddings, or a report."""
    return is_store(folder) or all((folder / name).is_file() for name in ("report.json", "clusters.csv"))


def _raise(error: OSError) -> None:
    raise error


def _as_unicode(path: str) -> str:
    """The path, with bytes that are not UTF-8 escaped: ids go into JSON files."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
