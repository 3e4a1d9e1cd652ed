"""Read texts from a folder, a file or stdin, one after the other. Bad records are reported and skipped.

Ids are stable: the file's path below the corpus, plus ":17" for the record that begins in line 17 (in Parquet and
Arrow row 17, in a JSON document object 17). A text's label is the named field, else in a folder the first part of the
path (a subfolder, or the stem of a file of records), else "".
"""

import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steermoe.discovery.formats import ARCHIVES, ENDINGS, READERS, TEXT, Fields, one_line
from steermoe.discovery.opening import BROKEN, check_encoding, open_text, uncompressed, undecoded
from steermoe.discovery.records import MISSING, value_of
from steermoe.discovery.store import Text
from steermoe.discovery.walking import HIDDEN, File, Walk, kind_of
from steermoe.errors import CorpusError

KEPT_PROBLEMS = 1000
"""At most this many problems are kept verbatim; all are counted."""
STDIN = "-"


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
                f"({', '.join(ENDINGS)})"
            ) from error
        if not self.path.is_dir() and kind_of(self.path.name, self.path.name, self.include) is None:
            raise CorpusError(self._why_not_read())

    def _why_not_read(self) -> str:
        """Why a single file is not read."""
        if self.include:
            return f"'{self.path}' does not match --include {self._patterns}: leave that out"
        fix = f"--include '{self.path.name}' reads it as one text"
        if uncompressed(self.path.name) != self.path.name or self.path.suffix.lower() in ARCHIVES:
            fix = "unpack it first"
        return f"'{self.path}' is not a corpus: expected a folder, or a file ending in {', '.join(ENDINGS)}; {fix}"

    @property
    def _patterns(self) -> str:
        return ", ".join(map(repr, self.include))

    def _reset(self) -> None:
        self.problems: list[BadRecord] = []
        self.num_problems = self.num_read = 0
        self._walk = Walk(self.path, self.include, self.encoding)

    @property
    def not_read(self) -> Counter[str]:
        return self._walk.not_read

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
            raise CorpusError(f"{what} contains no texts ({', '.join(ENDINGS)} are read{others}){first}")

    def _read(self, file: Path, name: str, kind: str) -> Iterator[Text]:
        """The texts of one file; what makes the rest of it unreadable is reported."""
        try:
            yield from self._from_text(file, name) if kind == TEXT else self._from_records(file, name, kind)
        except UnicodeError as error:
            reason = one_line(str(error))
            self._report(name, None, f"is not text of its encoding ({reason}): --encoding names another")
        except BROKEN as error:
            self._report(name, None, f"is damaged or cut short ({one_line(str(error))})")
        except OSError as error:
            if error.errno is None:  # a compressed file is no such file
                self._report(name, None, f"is damaged or not {file.suffix} ({one_line(str(error))})")
            else:
                raise CorpusError(f"can't read '{error.filename or file}': {error.strerror or error}") from error

    def _files(self) -> Iterator[File]:
        """Each file, its path below the corpus, and the ending that says how it is read."""
        if self._is_stdin:
            yield self._stdin(), "stdin", ".jsonl"
        elif self.path.is_dir():
            yield from self._walk.files(lambda name, reason: self._report(name, None, reason))
        else:
            kind = kind_of(self.path.name, self.path.name, self.include)
            assert kind is not None
            yield self.path, self.path.name, kind

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

    # ---- texts ----

    def _from_text(self, file: Path, name: str) -> Iterator[Text]:
        with open_text(file, self.encoding, None) as stream:
            text = stream.read()
        if wrong := undecoded(text, self.encoding):
            self._report(name, None, wrong)
        elif text.strip():
            yield Text(name, text, self._default_label(name, is_record=False))
        else:
            self._report(name, None, "is empty")

    def _from_records(self, file: Path, name: str, kind: str) -> Iterator[Text]:
        for line, record in READERS[kind](file, Fields(self.text_field, self.label_field, self.encoding)):
            if isinstance(record, str):
                self._report(name, line, record)
            else:
                yield from self._from_record(name, line, record)

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
        fields = one_line(", ".join(map(str, record))) or "nothing"
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


def _joined(value: Any) -> Any:
    """A list of texts as one text."""
    is_list = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
    return "\n".join(value) if is_list else value


def _has_parts(field: str, value: dict[str, Any], option: str) -> str:
    """What is wrong with a field that holds fields."""
    example = one_line(f"{option} {field}.{next(iter(value), 'name')}")
    return f"field '{field}' holds fields: name one of them, for example {example}"


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: broken input can leave lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
