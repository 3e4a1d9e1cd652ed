"""The files that a corpus consists of, by their endings: how each kind gives its records. Knows no folders.

A reader yields pairs: the line (in Parquet and Arrow the row, in a JSON document the object) and its record, or what is
wrong with it as text; the line is None for what concerns the whole file.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from steermoe.discovery import records
from steermoe.discovery.opening import open_text, suffix_of, undecoded
from steermoe.discovery.records import ColumnTable
from steermoe.errors import CorpusError

MOST_SHOWN = 200
"""Characters of a file's own text in a message."""

Record = tuple[int | None, dict[str, Any] | str]


class Fields(NamedTuple):
    """What is read of a record: the fields or columns of its text and of its label, if that is read; its encoding."""

    text: str
    label: str | None
    encoding: str | None


def one_line(text: str) -> str:
    """The beginning of a text from a file, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}..."


def read_lines(file: Path, fields: Fields) -> Iterator[Record]:
    """Of JSON lines, or of a JSON document in spite of the file's name."""
    with open_text(file, fields.encoding, "\n") as stream:
        is_document = records.is_document(stream.read(records.SNIFFED))
    if is_document:
        yield from read_document(file, fields)
        return
    with open_text(file, fields.encoding, "\n") as stream:
        yield from records.json_lines(stream, fields.encoding)


def read_document(file: Path, fields: Fields) -> Iterator[Record]:
    """Of a JSON document."""
    with open_text(file, fields.encoding, "\n") as stream:
        yield from records.json_document(stream, fields.encoding)


def read_table(file: Path, fields: Fields) -> Iterator[Record]:
    """Of a CSV file, whatever its delimiter.

    Raises:
        CorpusError: it has no such column, or several.
    """
    usual = "\t" if suffix_of(file.name) == ".tsv" else ","
    with open_text(file, fields.encoding, None) as stream:
        first = next((line for line in iter(lambda: stream.readline(records.SNIFFED), "") if line.strip()), "")
    if wrong := undecoded(first, fields.encoding):
        yield None, wrong
        return
    first = first.removeprefix("\ufeff").strip("\r\n")
    named = records.named_delimiter(first)
    delimiter = named or records.delimiter_of(first, usual, fields.text)
    with open_text(file, fields.encoding, "") as stream:
        header: list[str] = []
        for line, row in records.table_rows(stream, delimiter):
            if isinstance(row, str):
                yield line, row
            elif named:
                named = ""  # the line that names it
            elif not header:
                header = row
                _check_columns(file, header, fields)
            elif len(row) != len(header):
                yield line, f"has {len(row)} columns, expected {len(header)}"
            else:
                yield line, dict(zip(header, row, strict=True))
        if not header:
            yield None, "is empty"


def read_columns(file: Path, fields: Fields) -> Iterator[Record]:
    """Of Parquet or Arrow.

    Raises:
        CorpusError: it has no such column, or several.
    """
    table = ColumnTable(file)
    wanted = [field for field in (fields.text, fields.label) if field is not None]
    try:
        yield from table.read(wanted, lambda columns: _check_columns(file, columns, fields, nested=True))
    except CorpusError:
        raise
    except Exception as error:  # a damaged file can make pyarrow raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
        yield None, f"is damaged or not {kind} ({one_line(str(error)) or type(error).__name__})"


def _check_columns(file: Path, columns: list[str], fields: Fields, *, nested: bool = False) -> None:
    for field, option in ((fields.text, "--text-field"), (fields.label, "--label-field")):
        if field is None:
            continue
        column = records.column_of(field, columns) if nested else field
        if column not in columns:
            raise CorpusError(
                f"'{file}' has no column '{field}', it has {', '.join(map(repr, columns)) or 'none'}: pass {option}"
            )
        if columns.count(column) > 1:
            raise CorpusError(f"'{file}' has several columns '{field}': rename all but one, or pass {option}")


ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
"""Files that hold files."""
COLUMN_FILES = (".parquet", ".arrow")
"""Files that can't be compressed as a whole."""
READERS: dict[str, Callable[[Path, Fields], Iterator[Record]]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_document,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_columns,
    ".arrow": read_columns,
}
"""The readers of files that hold records."""
TEXT = ".txt"
"""The ending of a file that is one text."""
ENDINGS = (TEXT, *READERS)
"""Of all files that are read."""
