"""Read texts from a folder, JSONL, CSV or Parquet, one after the other. Bad records are told and skipped, not fatal.

Ids are stable: the file's path below the corpus, and ":17" for its 17th line or row. A text's label is the field that
was named, else in a folder the first part of the path (a subfolder, or the stem of a file of records), else "".
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steermoe.discovery.store import Text
from steermoe.errors import CorpusError

KEPT_PROBLEMS = 1000
"""So many problems are kept word for word; all are counted."""


@dataclass(frozen=True)
class Problem:
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
        path: a folder, read recursively in the order of names, or one file: .txt (one text a file), .jsonl, .ndjson,
            .csv, .tsv or .parquet. Other files of a folder are left alone, hidden ones too.
        text_field: the field or column with the text.
        label_field: the one with its known domain.

    Attributes:
        problems: of the last pass, the first thousand. num_problems: how many there were.

    Raises:
        CorpusError: there is no such path, or it is a file of another kind. While reading: no usable text at all, a
            table without the text column, a file that can't be read.
    """

    def __init__(self, path: Path | str, *, text_field: str = "text", label_field: str | None = None) -> None:
        self.path = Path(path)
        self.text_field = text_field
        self.label_field = label_field
        self.problems: list[Problem] = []
        self.num_problems = 0
        if not self.path.exists():
            raise CorpusError(f"no corpus at '{path}': give a folder of texts, or a file ({', '.join(READERS)})")
        if self.path.is_file() and self.path.suffix.lower() not in READERS:
            raise CorpusError(f"'{path}' is no corpus: expected a folder, or a file ending in {', '.join(READERS)}")

    def __iter__(self) -> Iterator[Text]:
        self.problems, self.num_problems = [], 0
        found = False
        for file, name in self._files():
            reader = READERS[file.suffix.lower()]
            try:
                for text in reader(self, file, name):
                    found = True
                    yield text
            except OSError as error:
                raise CorpusError(f"can't read '{file}': {error.strerror or error}") from error
        if not found:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise CorpusError(f"'{self.path}' holds no texts ({', '.join(READERS)} are read){first}")

    def _files(self) -> Iterator[tuple[Path, str]]:
        if self.path.is_file():
            yield self.path, self.path.name
            return
        for folder, subfolders, names in os.walk(self.path):  # does not follow links to folders, so it ends
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                file = Path(folder) / name
                if not name.startswith(".") and file.suffix.lower() in READERS:
                    yield file, file.relative_to(self.path).as_posix()

    def _report(self, name: str, line: int | None, reason: str) -> None:
        self.num_problems += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(Problem(name, line, reason))

    def _default_label(self, name: str, *, is_record: bool) -> str:
        first, _, rest = name.partition("/")
        if self.path.is_file():
            return ""
        if rest:
            return first
        return Path(first).stem if is_record else ""

    # ---- one reader a kind of file ----

    def read_text(self, file: Path, name: str) -> Iterator[Text]:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self._report(name, None, f"is not UTF-8 (byte {error.start})")
            return
        if text.strip():
            yield Text(name, text, self._default_label(name, is_record=False))
        else:
            self._report(name, None, "is empty")

    def read_lines(self, file: Path, name: str) -> Iterator[Text]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    self._report(name, number, f"is not UTF-8 (byte {error.start})")
                except (ValueError, RecursionError) as error:
                    self._report(name, number, f"is not JSON ({error})")
                else:
                    if isinstance(record, dict):
                        yield from self._from_record(name, number, record)
                    else:
                        self._report(name, number, f"is no JSON object but {type(record).__name__}")

    def read_table(self, file: Path, name: str) -> Iterator[Text]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter)
            header: list[str] = []
            try:
                header = next(rows, [])
                self._check_columns(file, header)
                for row in rows:
                    if not row:
                        continue
                    if len(row) != len(header):
                        self._report(name, rows.line_num, f"has {len(row)} columns, expected {len(header)}")
                    else:
                        yield from self._from_record(name, rows.line_num, dict(zip(header, row, strict=True)))
            except csv.Error as error:
                self._report(name, rows.line_num, f"is not CSV ({error}); the rest of the file is left out")

    def read_parquet(self, file: Path, name: str) -> Iterator[Text]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise CorpusError(f"Parquet files need pyarrow ({error}): pip install 'steermoe[parquet]'") from error
        try:
            with parquet.ParquetFile(file) as table:
                self._check_columns(file, table.schema_arrow.names)
                columns = [field for field in (self.text_field, self.label_field) if field is not None]
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=columns):
                    for record in batch.to_pylist():
                        number += 1
                        yield from self._from_record(name, number, record)
        except ArrowException as error:
            self._report(name, None, f"is not Parquet ({str(error).splitlines()[0]})")

    def _check_columns(self, file: Path, columns: list[str]) -> None:
        for field, option in ((self.text_field, "--text-field"), (self.label_field, "--label-field")):
            if field is not None and field not in columns:
                raise CorpusError(
                    f"'{file}' has no column '{field}', it has {', '.join(map(repr, columns)) or 'none'}: pass {option}"
                )

    def _from_record(self, name: str, line: int, record: dict[str, Any]) -> Iterator[Text]:
        text = record.get(self.text_field)
        label = record.get(self.label_field) if self.label_field is not None else None
        if self.text_field not in record:
            fields = ", ".join(map(str, record)) or "nothing"
            self._report(name, line, f"no field '{self.text_field}' (it has {fields})")
        elif not isinstance(text, str):
            self._report(name, line, f"field '{self.text_field}' is {type(text).__name__}, expected text")
        elif not text.strip():
            self._report(name, line, f"field '{self.text_field}' is empty")
        elif not _is_unicode(text):
            self._report(name, line, f"field '{self.text_field}' is not UTF-8")
        elif self.label_field is not None and not isinstance(label, str | int | float):
            self._report(name, line, f"field '{self.label_field}' is missing or no text")
        else:
            given = self._default_label(name, is_record=True) if label is None else str(label)
            yield Text(f"{name}:{line}", text, given)


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: no half surrogates, which broken input leaves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


READERS: dict[str, Callable[[Corpus, Path, str], Iterator[Text]]] = {
    ".txt": Corpus.read_text,
    ".jsonl": Corpus.read_lines,
    ".ndjson": Corpus.read_lines,
    ".csv": Corpus.read_table,
    ".tsv": Corpus.read_table,
    ".parquet": Corpus.read_parquet,
}
