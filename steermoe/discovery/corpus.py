"""Read texts from a folder, JSONL, CSV or Parquet, one after the other. Bad records are reported and skipped.

Ids are stable: the file's path below the corpus, plus ":17" for the record that begins in line 17 (in Parquet: row 17).
A text's label is the named field, else in a folder the first part of the path (a subfolder, or the stem of a file of
records), else "".
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.discovery.store import Text
from steermoe.errors import CorpusError

if TYPE_CHECKING:
    from _csv import Reader as _CsvReader

KEPT_PROBLEMS = 1000
"""At most this many problems are kept verbatim; all are counted."""
MAX_FIELD = 100_000_000
"""Characters of a CSV field: a quote that is never closed must not fill the memory with the rest of the file."""


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
        path: a folder, read recursively in the order of names, or one file: .txt (one text per file), .jsonl, .ndjson,
            .csv, .tsv or .parquet. Other files and hidden files in a folder are ignored. Links to folders are followed;
            each folder is read once.
        text_field: the field or column with the text.
        label_field: the one with its known domain; if it is empty the label is "".

    Attributes:
        problems: the first thousand of the last pass. num_problems: how many there were.
        num_ignored: files of other kinds that the last pass ignored.

    Raises:
        CorpusError: there is no such path, or it is a file of another kind. While reading: there is no usable text, a
            table has no text column, or a file or folder can't be read.
    """

    def __init__(self, path: Path | str, *, text_field: str = "text", label_field: str | None = None) -> None:
        self.path = Path(path)
        self.text_field = text_field
        self.label_field = label_field
        self.problems: list[BadRecord] = []
        self.num_problems = 0
        self.num_ignored = 0
        try:
            self.path.stat()
        except OSError as error:
            raise CorpusError(
                f"no corpus at '{path}' ({error.strerror}): give a folder of texts, or a file ({', '.join(READERS)})"
            ) from error
        if self.path.is_file() and self.path.suffix.lower() not in READERS:
            raise CorpusError(f"'{path}' is not a corpus: expected a folder, or a file ending in {', '.join(READERS)}")

    def __iter__(self) -> Iterator[Text]:
        self.problems, self.num_problems, self.num_ignored = [], 0, 0
        found = False
        try:
            for file, name in self._files():
                for text in READERS[file.suffix.lower()](self, file, name):
                    found = True
                    yield text
        except OSError as error:
            raise CorpusError(f"can't read '{error.filename or self.path}': {error.strerror or error}") from error
        if not found:
            others = f", files of other kinds: {self.num_ignored}" if self.num_ignored else ""
            first = f"; the first problem: {self.problems[0]} (--text-field names the field)" if self.problems else ""
            raise CorpusError(f"'{self.path}' contains no texts ({', '.join(READERS)} are read{others}){first}")

    def _files(self) -> Iterator[tuple[Path, str]]:
        if self.path.is_file():
            yield self.path, self.path.name
            return
        seen = set()
        for folder, subfolders, names in os.walk(self.path, onerror=_raise, followlinks=True):
            place = Path(folder).resolve()
            if place in seen:  # a link back into the corpus
                subfolders.clear()
                continue
            seen.add(place)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                file = Path(folder) / name
                path = _as_unicode(file.relative_to(self.path).as_posix())
                if file.suffix.lower() not in READERS:
                    self.num_ignored += 1
                elif file.is_file():
                    yield file, path
                else:
                    self._report(path, None, "is a broken link or not a regular file")

    def _report(self, name: str, line: int | None, reason: str) -> None:
        self.num_problems += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(BadRecord(name, line, reason))

    def _default_label(self, name: str, *, is_record: bool) -> str:
        first, _, rest = name.partition("/")
        if self.path.is_file():
            return ""
        if rest:
            return first
        return Path(first).stem if is_record else ""

    # ---- one reader per kind of file ----

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
                        self._report(name, number, f"is not a JSON object but {type(record).__name__}")

    def read_table(self, file: Path, name: str) -> Iterator[Text]:
        csv.field_size_limit(MAX_FIELD)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            header: list[str] = []
            for line, row in self._rows(name, csv.reader(lines, delimiter=delimiter, strict=True)):
                if not header:
                    header = row
                    self._check_columns(file, header)
                elif len(row) != len(header):
                    self._report(name, line, f"has {len(row)} columns, expected {len(header)}")
                else:
                    yield from self._from_record(name, line, dict(zip(header, row, strict=True)))
            if not header:
                self._report(name, None, "is empty")

    def _rows(self, name: str, reader: "_CsvReader") -> Iterator[tuple[int, list[str]]]:
        """The rows that can be parsed and aren't blank, each with the line where it begins."""
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader continues with the next line
                self._report(name, line, f"is not CSV ({error})")
            else:
                if row:
                    yield line, row

    def read_parquet(self, file: Path, name: str) -> Iterator[Text]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise CorpusError(f"Parquet files need pyarrow ({error}): pip install 'steermoe[parquet]'") from error
        try:
            with parquet.ParquetFile(file) as table:
                self._check_columns(file, table.schema_arrow.names)
                columns = list(dict.fromkeys(filter(None, (self.text_field, self.label_field))))
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=columns):
                    for cells in zip(*(batch[column] for column in columns), strict=True):
                        number += 1
                        try:
                            record = {column: cell.as_py() for column, cell in zip(columns, cells, strict=True)}
                        except UnicodeDecodeError as error:
                            self._report(name, number, f"is not UTF-8 (byte {error.start})")
                        else:
                            yield from self._from_record(name, number, record)
        except (ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._report(name, None, f"is damaged or not Parquet ({str(error).splitlines()[0]})")

    def _check_columns(self, file: Path, columns: list[str]) -> None:
        for field, option in ((self.text_field, "--text-field"), (self.label_field, "--label-field")):
            if field is not None and field not in columns:
                raise CorpusError(
                    f"'{file}' has no column '{field}', it has {', '.join(map(repr, columns)) or 'none'}: pass {option}"
                )
            if columns.count(field or "") > 1:
                raise CorpusError(f"'{file}' has several columns '{field}': rename all but one, or pass {option}")

    def _from_record(self, name: str, line: int, record: dict[str, Any]) -> Iterator[Text]:
        text = record.get(self.text_field)
        label = self._default_label(name, is_record=True)
        if self.label_field is not None:
            given = record.get(self.label_field)
            label = "" if given is None else str(given)
        if self.text_field not in record:
            fields = ", ".join(map(str, record)) or "nothing"
            self._report(name, line, f"no field '{self.text_field}' (it has {fields})")
        elif not isinstance(text, str):
            self._report(name, line, f"field '{self.text_field}' is {type(text).__name__}, expected text")
        elif not text.strip():
            self._report(name, line, f"field '{self.text_field}' is empty")
        elif not _is_unicode(text):
            self._report(name, line, f"field '{self.text_field}' is not UTF-8")
        elif self.label_field is not None and self.label_field not in record:
            self._report(name, line, f"no field '{self.label_field}' (it has {', '.join(map(str, record))})")
        elif not _is_unicode(label):
            self._report(name, line, f"field '{self.label_field}' is not UTF-8")
        else:
            yield Text(f"{name}:{line}", text, label)


MAX_LABELS = 8
"""The most labels that the message about a missing domain names."""


def read_domains(
    sources: Mapping[str, Path],
    against: Path | None = None,
    *,
    text_field: str = "text",
    label_field: str | None = None,
    on_read: Callable[[Corpus], None] = lambda corpus: None,
) -> tuple[dict[str, list[str]], list[str]]:
    """Each domain's texts, and the others. A path that is named several times is read once.

    Args:
        sources: domain -> where its texts are.
        against: where other texts are.
        text_field: the field or column with the text.
        label_field: take only records in which this field is the domain's name; of the others, those of no domain.
        on_read: called with each corpus that was read, to tell of its problems.

    Raises:
        CorpusError: one can't be read, or holds no text of the label that is wanted.
    """
    places = [*sources.values(), *([against] if against is not None else [])]
    corpora = {place: Corpus(place, text_field=text_field, label_field=label_field) for place in places}
    read = {place: list(corpus) for place, corpus in corpora.items()}
    for corpus in corpora.values():
        on_read(corpus)
    if label_field is None:
        texts = {place: [text.text for text in found] for place, found in read.items()}
        return {domain: texts[place] for domain, place in sources.items()}, texts[against] if against else []
    own = {domain: _of_label(place, read[place], label_field, domain) for domain, place in sources.items()}
    return own, _of_no_domain(against, read[against], label_field, list(sources)) if against else []


def _of_label(path: Path, texts: list[Text], label_field: str, domain: str) -> list[str]:
    if found := [text.text for text in texts if text.label.lower() == domain]:
        return found
    labels = sorted({text.label for text in texts})
    more = ", ..." if len(labels) > MAX_LABELS else ""
    raise CorpusError(
        f"'{path}' has no text whose '{label_field}' is '{domain}', there are "
        f"{', '.join(map(repr, labels[:MAX_LABELS]))}{more}: name the domain as one of them, or leave out --label-field"
    )


def _of_no_domain(path: Path, texts: list[Text], label_field: str, domains: list[str]) -> list[str]:
    if found := [text.text for text in texts if text.label.lower() not in domains]:
        return found
    raise CorpusError(f"--against '{path}' has only texts whose '{label_field}' is {', '.join(domains)}: give others")


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


READERS: dict[str, Callable[[Corpus, Path, str], Iterator[Text]]] = {
    ".txt": Corpus.read_text,
    ".jsonl": Corpus.read_lines,
    ".ndjson": Corpus.read_lines,
    ".csv": Corpus.read_table,
    ".tsv": Corpus.read_table,
    ".parquet": Corpus.read_parquet,
}
