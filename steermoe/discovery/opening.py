"""Open the files of a corpus: their kind, compression and encoding. Knows no records and no fields."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from steermoe.errors import CorpusError

UTF_8 = "utf-8"
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BROKEN = (EOFError, zlib.error, lzma.LZMAError)
"""What a damaged compressed file raises, besides `OSError` without a number."""


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise CorpusError(f"'{path}': .zst files need pyarrow ({error}): pip install 'steermoe[parquet]'") from error
    return io.BufferedReader(cast(Any, _Readable(pyarrow.input_stream(str(path), compression="zstd"))))


class _Readable(io.RawIOBase):
    """A stream of pyarrow as Python's own readers expect one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


def uncompressed(name: str) -> str:
    """A file's name without the ending of its compression."""
    return name[: -len(ending)] if (ending := Path(name).suffix).lower() in COMPRESSED else name


def suffix_of(name: str) -> str:
    """The ending that says what kind of file it is, in lower case: ".jsonl" of "a.JSONL.gz"."""
    return Path(uncompressed(name)).suffix.lower()


UNDECODED = re.compile("[\udc80-\udcff]")
"""What bytes become that are not of the encoding."""


def open_text(path: Path, encoding: str | None, newline: str | None) -> IO[str]:
    """A text file, unpacked and decoded.

    Args:
        path: the file.
        encoding: its encoding; None is UTF-8, or what its byte order mark says.
        newline: as in `open`.

    Bytes that are not of the encoding become lone surrogates, except in UTF-16 and UTF-32, where they raise a
    `UnicodeError`.
    """
    opener = COMPRESSED.get(path.suffix.lower())
    raw: Any = path.open("rb") if opener is None else opener(path)
    try:
        buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
        found = encoding or UTF_8
        if codecs.lookup(found).name == UTF_8:
            head = buffered.peek(4)[:4]
            found = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), UTF_8)
        errors = "strict" if codecs.lookup(found).name.startswith(("utf-16", "utf-32")) else "surrogateescape"
        return io.TextIOWrapper(buffered, encoding=found, errors=errors, newline=newline)
    except BaseException:
        raw.close()
        raise


def check_encoding(encoding: str | None) -> None:
    """Refuse an encoding that does not exist, or that is not one of text.

    Raises:
        CorpusError: there is no such encoding.
    """
    try:
        "text".encode(encoding or UTF_8)
    except (LookupError, ValueError) as error:
        raise CorpusError(
            f"there is no encoding '{encoding}': name one that Python knows, such as utf-16, cp1251 or latin-1"
        ) from error
    if encoding == "":
        raise CorpusError("the encoding is empty: name one, such as utf-16, cp1251 or latin-1")


def undecoded(text: str, encoding: str | None) -> str:
    """Why a text that `open_text` read is not of its encoding; "" if it is."""
    found = UNDECODED.search(text)
    if found is None and (encoding is not None or "\0" not in text):
        return ""
    if found is None:
        return "contains NUL bytes: if it is UTF-16 without its mark, read it with --encoding utf-16-le"
    if encoding is not None and codecs.lookup(encoding).name != UTF_8:
        return f"is not {encoding}: --encoding names another encoding"
    byte = len(text[: found.start()].encode("utf-8", "surrogatepass"))
    return f"is not UTF-8 (byte {byte}): --encoding names another encoding, such as cp1251 or latin-1"
