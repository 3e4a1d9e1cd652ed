"""Split a file into records: lines of JSON, whole JSON documents, tables, Parquet and Arrow. Knows no corpus.

Each reader yields where a record begins (its line, or its row) and the record, or in its place why there is none.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from steermoe.discovery.opening import undecoded
from steermoe.errors import CorpusError, reason

Item = tuple[int | None, dict[str, Any] | str]
"""A line or row, with its record or with the reason why it can't be used."""

MAX_FIELD = 100_000_000
"""Characters of a CSV field or a JSON record: a quote that is never closed must not fill the memory."""
SNIFFED = 1 << 16
"""Characters that are read to see which kind of JSON a file contains."""
DELIMITERS = ",;\t|"


# ---- JSON ----


def is_document(head: str) -> bool:
    """Whether JSON is one document, an array of objects or objects over several lines, by its beginning."""
    start = head.lstrip("\ufeff \t\r\n")
    if start.startswith("["):
        return start[1:].lstrip()[:1] in ("{", "]", "")
    first, _, _ = start.partition("\n")
    if not first.startswith("{") or _is_json(first):
        return False
    try:
        json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return False
    return True


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(lines: IO[str], encoding: str | None) -> Iterator[Item]:
    """A record per line that isn't blank."""
    for number, content in enumerate(lines, 1):
        line = content.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, undecoded(line, encoding) or f"is not JSON ({reason(error, 200)})"
        else:
            yield number, undecoded(line, encoding) or _as_record(record)


def _as_record(record: Any) -> dict[str, Any] | str:
    return record if isinstance(record, dict) else f"is not a JSON object but {type(record).__name__}"


BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")
"""What separates the records of a document."""


def json_document(stream: IO[str], encoding: str | None) -> Iterator[Item]:
    """The objects of an array, or objects one after the other, with their numbers in place of lines.

    A part that is not JSON ends the file.
    """
    decoder, buffer, size = json.JSONDecoder(), "", SNIFFED
    place, number, is_end = 0, 1, False
    while True:
        place = BETWEEN.match(buffer, place).end()  # type: ignore[union-attr]
        if place < len(buffer):
            try:
                record, end = decoder.raw_decode(buffer, place)
            except (ValueError, RecursionError) as error:
                if is_end or not _may_continue(error, buffer, place):
                    yield number, undecoded(buffer[place:], encoding) or f"is not JSON ({reason(error, 200)})"
                    return
            else:
                yield number, undecoded(buffer[place:end], encoding) or _as_record(record)
                place, number, size = end, number + 1, SNIFFED
                continue
        elif is_end:
            return
        more = stream.read(size)
        buffer, place, is_end, size = buffer[place:] + more, 0, not more, 2 * size


def _may_continue(error: Exception, buffer: str, place: int) -> bool:
    """Whether JSON is wrong only because more of it has to be read."""
    if not isinstance(error, json.JSONDecodeError) or len(buffer) - place > MAX_FIELD:
        return False
    return "Unterminated" in error.msg or error.pos > len(buffer) - 16


# ---- tables of text ----


def delimiter_of(header: str, usual: str, field: str) -> str:
    """What separates the columns of a table: what makes `field` a column, else what makes the most columns."""

    def columns(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            return []

    candidates = sorted(DELIMITERS, key=lambda delimiter: delimiter != usual)
    if fitting := [delimiter for delimiter in candidates if field in columns(delimiter)]:
        return fitting[0]
    return max(candidates, key=lambda delimiter: len(columns(delimiter)))


def named_delimiter(first: str) -> str:
    """The delimiter that a first line such as "sep=;" names, which Excel writes and reads; "" if it names none."""
    return first[4:] if len(first) == 5 and first.lower().startswith("sep=") else ""


def table_rows(lines: IO[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The rows of CSV that aren't blank, each with the line where it begins, or why they can't be read."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader continues with the next line
            yield line, f"is not CSV ({error})"
        else:
            if row:
                yield line, row


# ---- Parquet and Arrow ----


class ColumnTable:
    """A file of columns: Parquet, or Arrow as stream or file.

    Args:
        path: the file.

    Raises:
        CorpusError: pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise CorpusError(
                f"Parquet and Arrow files need pyarrow ({error}): pip install 'steermoe[parquet]'"
            ) from error
        self._path = path

    def read(self, fields: list[str], check: Any) -> Iterator[Item]:
        """The rows, with only the columns that `fields` name; `check` is called with the names of all columns."""
        with self._open() as table:
            names = table.schema_arrow.names if self._is_parquet else table.schema.names
            check(names)
            columns = list(dict.fromkeys(column_of(field, names) for field in fields))
            number = 0
            for batch in self._batches(table, columns):
                if not self._is_parquet:
                    batch.validate(full=True)  # Arrow is used as it lies in the file, so places in it could be wrong
                for cells in zip(*(batch.column(name) for name in columns), strict=True):
                    number += 1
                    try:
                        record = {name: cell.as_py() for name, cell in zip(columns, cells, strict=True)}
                    except UnicodeDecodeError as error:
                        yield number, f"is not UTF-8 (byte {error.start})"
                    else:
                        yield number, record

    @property
    def _is_parquet(self) -> bool:
        return self._path.suffix.lower() == ".parquet"

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import ipc, parquet

        if self._is_parquet:
            return parquet.ParquetFile(self._path)
        try:
            return ipc.open_stream(pyarrow.memory_map(str(self._path)))
        except pyarrow.ArrowInvalid:
            return ipc.open_file(pyarrow.memory_map(str(self._path)))

    def _batches(self, table: Any, columns: list[str]) -> Iterator[Any]:
        if self._is_parquet:
            yield from table.iter_batches(batch_size=1024, columns=columns)
        elif hasattr(table, "num_record_batches"):
            yield from (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            yield from table


def column_of(field: str, names: list[str]) -> str:
    """The column that a field is in: the field itself, or for "meta.name" the column "meta"."""
    return field if field in names else field.partition(".")[0]


MISSING = object()


def value_of(record: dict[str, Any], field: str) -> Any:
    """A record's field; "meta.name" is the field "name" in "meta", unless a field has that name. `MISSING` if none."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value
