"""Read texts from a folder, a file or stdin, one after the other. Bad records are reported and skipped.

Ids are stable: the file's path below the corpus, plus ":17" for the record that begins in line 17 (in Parquet and
Arrow row 17, in a JSON document object 17). A text's label is the named field, else in a folder the first part of the
path (a subfolder, or the stem of a file of records), else "".
"""

import json
import os
import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from steermoe.discovery import records
from steermoe.discovery.opening import (
    BROKEN,
    check_encoding,
    open_text,
    suffix_of,
    uncompressed,
    undecoded,
)
from steermoe.discovery.records import MISSING, ColumnTable, value_of
from steermoe.discovery.store import Text, is_store
from steermoe.errors import CorpusError

KEPT_PROBLEMS = 1000
"""At most this many problems are kept verbatim; all are counted."""
MOST_SHOWN = 200
"""Characters of a file's own text in a message."""
STDIN = "-"
HIDDEN = "hidden"
"""The kind of a file whose name begins with a dot."""


@dataclass(frozen=True)
class BadRecord:
    """A record that can't be used: its file, its line or row (None for a whole file), and why."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.reason}"


class Corpus:
    """Texts on disk, read lazily and as often as they are iterated over.

    Args:
        path: a folder, read recursively in the order of names; or one file: .txt (one text per file), .jsonl, .ndjson,
            .json, .csv, .tsv, .parquet or .arrow, all but the last two also as .gz, .bz2, .xz or .zst; or "-" for JSON
            on stdin. Links to folders are followed; each folder is read once. Other files, hidden ones and folders that
            steermoe wrote are not read. In a folder, .json is read if it is an array of objects. A folder that
            `datasets` saved gives its records.
        text_field: the field or column with the text, "a.b" for field b in field a; a list of texts is one text, joined
            by newlines.
        label_field: the one with its known domain; if it is empty the label is "".
        include: patterns like "*.py", for names of files or their paths below the corpus. Only such files are read;
            those of other kinds as one text per file.
        encoding: of texts, JSON and CSV; None is UTF-8, or UTF-16 or UTF-32 if the file begins with its mark.

    Attributes:
        problems: the first thousand of the last pass. num_problems: how many there were.
        num_read: files that the last pass read.
        not_read: how many files of each kind it did not read, by their ending; `HIDDEN` for hidden ones.

    Raises:
        CorpusError: there is no such path or encoding, or the path is a file of another kind. While reading: there is
            no usable text, a table has no text column, or a file or folder can't be read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        text_field: str = "text",
        label_field: str | None = None,
        include: Sequence[str] = (),
        encoding: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.text_field = text_field
        self.label_field = label_field
        self.include = tuple(include)
        self.encoding = encoding
        check_encoding(encoding)
        self._reset()
        self._is_stdin = str(path) == STDIN
        self._kept_stdin: Path | None = None
        if self._is_stdin:
            return
        try:
            self.path.stat()
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"no corpus at '{path}' ({getattr(error, 'strerror', error)}): give a folder of texts, or a file "
                f"({', '.join(READERS)})"
            ) from error
        if not self.path.is_dir() and self._kind(self.path.name, self.path.name) is None:
            raise CorpusError(self._why_not_read())

    def _why_not_read(self) -> str:
        """Why a single file is not read."""
        if self.include:
            return f"'{self.path}' does not match --include {self._patterns}: leave that out"
        fix = f"--include '{self.path.name}' reads it as one text"
        if uncompressed(self.path.name) != self.path.name or self.path.suffix.lower() in ARCHIVES:
            fix = "unpack it first"
        return f"'{self.path}' is not a corpus: expected a folder, or a file ending in {', '.join(READERS)}; {fix}"

    @property
    def _patterns(self) -> str:
        return ", ".join(map(repr, self.include))

    def _reset(self) -> None:
        self.problems: list[BadRecord] = []
        self.num_problems = self.num_read = 0
        self.not_read: Counter[str] = Counter()

    @property
    def num_ignored(self) -> int:
        """Files of other kinds that the last pass ignored."""
        return self.not_read.total() - self.not_read[HIDDEN]

    def __iter__(self) -> Iterator[Text]:
        self._reset()
        found = False
        for file, name, kind in self._files():
            self.num_read += 1
            for text in self._read(file, name, kind):
                found = True
                yield text
        if not found:
            others = f", files of other kinds: {self.num_ignored}" if self.num_ignored else ""
            if self.include and not self.num_read and not self.problems:
                raise CorpusError(f"no file in '{self.path}' matches --include {self._patterns}: change the pattern")
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            what = "stdin" if self._is_stdin else f"'{self.path}'"
            raise CorpusError(f"{what} contains no texts ({', '.join(READERS)} are read{others}){first}")

    def _read(self, file: Path, name: str, kind: str) -> Iterator[Text]:
        """The texts of one file; what makes the rest of it unreadable is reported."""
        try:
            yield from READERS[kind](self, file, name)
        except UnicodeError as error:
            reason = _one_line(str(error))
            self._report(name, None, f"is not text of its encoding ({reason}): --encoding names another")
        except BROKEN as error:
            self._report(name, None, f"is damaged or cut short ({_one_line(str(error))})")
        except OSError as error:
            if error.errno is None:  # a compressed file is no such file
                self._report(name, None, f"is damaged or not {file.suffix} ({_one_line(str(error))})")
            else:
                raise CorpusError(f"can't read '{error.filename or file}': {error.strerror or error}") from error

    # ---- which files ----

    def _files(self) -> Iterator[tuple[Path, str, str]]:
        """Each file, its path below the corpus, and the ending that says how it is read."""
        if self._is_stdin:
            yield self._stdin(), "stdin", ".jsonl"
            return
        if not self.path.is_dir():
            kind = self._kind(self.path.name, self.path.name)
            assert kind is not None
            yield self.path, self.path.name, kind
            return
        seen = set()
        try:
            for folder, subfolders, names in os.walk(self.path, onerror=_raise, followlinks=True):
                place = Path(folder).resolve()
                if place in seen or (place != self.path.resolve() and _is_output(Path(folder))):
                    subfolders.clear()  # a link back into the corpus, or what steermoe wrote
                    continue
                seen.add(place)
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                yield from self._files_in(Path(folder), sorted(names))
        except OSError as error:
            raise CorpusError(f"can't read '{error.filename or self.path}': {error.strerror or error}") from error

    def _files_in(self, folder: Path, names: list[str]) -> Iterator[tuple[Path, str, str]]:
        saved = self._saved_files(folder, names)
        for name in names:
            file = folder / name
            path = _as_unicode(file.relative_to(self.path).as_posix())
            if saved is not None and name not in saved:
                continue
            if name.startswith("."):
                self.not_read[HIDDEN] += 1
                continue
            kind = self._kind(name, path)
            if kind == ".json" and not self.include and not self._is_array(file):
                kind = None
            if kind is None:
                self.not_read[suffix_of(name) or "without ending"] += 1
            elif file.is_file():
                yield file, path, kind
            else:
                self._report(path, None, "is a broken link or not a regular file")

    def _saved_files(self, folder: Path, names: list[str]) -> list[str] | None:
        """The files with the records of a folder that `datasets` saved; None for other folders."""
        if "dataset_dict.json" in names:
            return []
        if not {"state.json", "dataset_info.json"} <= set(names):
            return None
        path = _as_unicode(folder.relative_to(self.path).as_posix())
        try:
            state = json.loads((folder / "state.json").read_bytes())
            listed = [str(entry["filename"]) for entry in state["_data_files"]]
            has_selection = bool(state.get("_indices_data_files"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._report(path, None, f"its state.json is damaged ({error!r:.100}): save the dataset again")
            return []
        if has_selection:
            self._report(path, None, "was saved with a selection of rows: call flatten_indices() and save it again")
            return []
        for missing in sorted(set(listed) - set(names)):
            self._report(path, None, f"lacks its file {missing!r:.100}: save the dataset again")
        return listed

    def _kind(self, name: str, path: str) -> str | None:
        """The ending that says how a file is read; None if it isn't."""
        if self.include and not any(fnmatchcase(name, like) or fnmatchcase(path, like) for like in self.include):
            return None
        kind = suffix_of(name)
        if kind in COLUMN_FILES and uncompressed(name) != name:
            return None
        if kind in READERS:
            return kind
        return ".txt" if self.include else None

    def _is_array(self, file: Path) -> bool:
        """Whether a .json file holds records, and not the settings of some program."""
        if not file.is_file():
            return True  # it will be reported
        try:
            with open_text(file, self.encoding, None) as stream:
                start = stream.read(records.SNIFFED).lstrip("\ufeff \t\r\n")
        except (OSError, UnicodeError, *BROKEN):
            return True
        return start.startswith("[") and start[1:].lstrip().startswith("{")

    def _stdin(self) -> Path:
        """A file with what stdin holds, since a corpus is read several times."""
        if self._kept_stdin is None:
            try:
                with tempfile.NamedTemporaryFile(prefix="steermoe-", suffix=".jsonl", delete=False) as kept:
                    self._kept_stdin = Path(kept.name)
                    weakref.finalize(self, self._kept_stdin.unlink, missing_ok=True)
                    if sys.stdin is not None:
                        shutil.copyfileobj(sys.stdin.buffer, kept)
            except (OSError, ValueError) as error:
                raise CorpusError(f"can't read stdin: {getattr(error, 'strerror', None) or error}") from error
        return self._kept_stdin

    def _report(self, name: str, line: int | None, reason: str) -> None:
        self.num_problems += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(BadRecord(name, line, reason))

    def _default_label(self, name: str, *, is_record: bool) -> str:
        first, _, rest = name.partition("/")
        if self._is_stdin or not self.path.is_dir():
            return ""
        if rest:
            return first
        return Path(uncompressed(first)).stem if is_record else ""

    # ---- one reader per kind of file ----

    def read_text(self, file: Path, name: str) -> Iterator[Text]:
        with open_text(file, self.encoding, None) as stream:
            text = stream.read()
        if wrong := undecoded(text, self.encoding):
            self._report(name, None, wrong)
        elif text.strip():
            yield Text(name, text, self._default_label(name, is_record=False))
        else:
            self._report(name, None, "is empty")

    def read_lines(self, file: Path, name: str) -> Iterator[Text]:
        with open_text(file, self.encoding, "\n") as stream:
            is_document = records.is_document(stream.read(records.SNIFFED))
        if is_document:
            yield from self.read_document(file, name)
            return
        with open_text(file, self.encoding, "\n") as stream:
            for number, item in records.json_lines(stream, self.encoding):
                yield from self._from_item(name, number, item)

    def read_document(self, file: Path, name: str) -> Iterator[Text]:
        with open_text(file, self.encoding, "\n") as stream:
            for number, item in records.json_document(stream, self.encoding):
                yield from self._from_item(name, number, item)

    def read_table(self, file: Path, name: str) -> Iterator[Text]:
        usual = "\t" if suffix_of(name) == ".tsv" else ","
        with open_text(file, self.encoding, None) as stream:
            first = next((line for line in iter(lambda: stream.readline(records.SNIFFED), "") if line.strip()), "")
        if wrong := undecoded(first, self.encoding):
            self._report(name, None, wrong)
            return
        first = first.removeprefix("\ufeff").strip("\r\n")
        named = records.named_delimiter(first)
        delimiter = named or records.delimiter_of(first, usual, self.text_field)
        with open_text(file, self.encoding, "") as stream:
            header: list[str] = []
            for line, row in records.table_rows(stream, delimiter):
                if isinstance(row, str):
                    self._report(name, line, row)
                elif named:
                    named = ""  # the line that names it
                elif not header:
                    header = row
                    self._check_columns(file, header)
                elif len(row) != len(header):
                    self._report(name, line, f"has {len(row)} columns, expected {len(header)}")
                else:
                    yield from self._from_record(name, line, dict(zip(header, row, strict=True)))
            if not header:
                self._report(name, None, "is empty")

    def read_columns(self, file: Path, name: str) -> Iterator[Text]:
        table = ColumnTable(file)
        fields = [field for field in (self.text_field, self.label_field) if field is not None]
        try:
            for number, item in table.read(fields, lambda columns: self._check_columns(file, columns, nested=True)):
                yield from self._from_item(name, number, item)
        except CorpusError:
            raise
        except Exception as error:  # a damaged file can make pyarrow raise anything
            if isinstance(error, OSError) and error.errno is not None:
                raise
            kind = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
            reason = _one_line(str(error)) or type(error).__name__
            self._report(name, None, f"is damaged or not {kind} ({reason})")

    def _check_columns(self, file: Path, columns: list[str], *, nested: bool = False) -> None:
        for field, option in ((self.text_field, "--text-field"), (self.label_field, "--label-field")):
            if field is None:
                continue
            column = records.column_of(field, columns) if nested else field
            if column not in columns:
                raise CorpusError(
                    f"'{file}' has no column '{field}', it has {', '.join(map(repr, columns)) or 'none'}: pass {option}"
                )
            if columns.count(column) > 1:
                raise CorpusError(f"'{file}' has several columns '{field}': rename all but one, or pass {option}")

    def _from_item(self, name: str, line: int | None, item: dict[str, Any] | str) -> Iterator[Text]:
        if isinstance(item, str):
            self._report(name, line, item)
        else:
            yield from self._from_record(name, line, item)

    def _from_record(self, name: str, line: int | None, record: dict[str, Any]) -> Iterator[Text]:
        text = _joined(value_of(record, self.text_field))
        label, given = self._default_label(name, is_record=True), None
        if self.label_field is not None:
            given = value_of(record, self.label_field)
            label = "" if given is None else str(given)
        if wrong := self._what_is_wrong(record, text, given, label):
            self._report(name, line, wrong)
        else:
            yield Text(f"{name}:{line}", text, label)

    def _what_is_wrong(self, record: dict[str, Any], text: Any, given: Any, label: str) -> str:
        """Why a record can't be used; "" if it can."""
        fields = _one_line(", ".join(map(str, record))) or "nothing"
        for option, field, value in (
            ("--text-field", self.text_field, text),
            ("--label-field", self.label_field, given),
        ):
            if value is MISSING:
                return f"no field '{field}' (it has {fields}): {option} names the field"
        if isinstance(text, dict):
            return _has_parts(self.text_field, text, "--text-field")
        if not isinstance(text, str):
            return f"field '{self.text_field}' is {type(text).__name__}, expected text"
        if not text.strip():
            return f"field '{self.text_field}' is empty"
        if isinstance(given, dict):
            return _has_parts(str(self.label_field), given, "--label-field")
        for name, value in ((self.text_field, text), (self.label_field, label)):
            if not _is_unicode(value):
                return f"field '{name}' {undecoded(value, self.encoding) or 'is not UTF-8'}"
        return ""


def _one_line(text: str) -> str:
    """The beginning of a text from a file, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."


def _joined(value: Any) -> Any:
    """A list of texts as one text."""
    is_list = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
    return "\n".join(value) if is_list else value


def _has_parts(field: str, value: dict[str, Any], option: str) -> str:
    """What is wrong with a field that holds fields."""
    example = _one_line(f"{option} {field}.{next(iter(value), 'name')}")
    return f"field '{field}' holds fields: name one of them, for example {example}"


def _is_output(folder: Path) -> bool:
    """Whether steermoe wrote a folder: embeddings, or a report."""
    return is_store(folder) or all((folder / name).is_file() for name in ("report.json", "clusters.csv"))


def _raise(error: OSError) -> None:
    raise error


def _as_unicode(path: str) -> str:
    """The path, with bytes that are not UTF-8 escaped: ids go into JSON files."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: broken input can leave lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
"""Files that hold files."""
COLUMN_FILES = (".parquet", ".arrow")
"""Files that can't be compressed as a whole."""
READERS: dict[str, Callable[[Corpus, Path, str], Iterator[Text]]] = {
    ".txt": Corpus.read_text,
    ".jsonl": Corpus.read_lines,
    ".ndjson": Corpus.read_lines,
    ".json": Corpus.read_document,
    ".csv": Corpus.read_table,
    ".tsv": Corpus.read_table,
    ".parquet": Corpus.read_columns,
    ".arrow": Corpus.read_columns,
}
