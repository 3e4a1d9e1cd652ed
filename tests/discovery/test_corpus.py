"""Corpora of every kind: what is read, ids and labels, and how bad records are reported."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.discovery.corpus import Corpus
from steermoe.errors import CorpusError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(corpus):
    return [(text.id, text.text, text.label) for text in corpus]


def test_a_folder_is_read_in_order_with_labels_from_its_paths(tmp_path):
    write(tmp_path / "b.txt", "loose")
    write(tmp_path / "sport" / "deep" / "a.txt", "goal")
    write(tmp_path / "food.jsonl", '{"text": "pan"}\n\n{"text": "salt"}\n')
    write(tmp_path / "notes.md", "not read")
    write(tmp_path / ".hidden.txt", "not read")
    write(tmp_path / ".git" / "a.txt", "not read")
    (tmp_path / "sport" / "loop").symlink_to(tmp_path)
    corpus = Corpus(tmp_path)
    assert (
        rows(corpus)
        == rows(corpus)
        == [
            ("b.txt", "loose", ""),
            ("food.jsonl:1", "pan", "food"),
            ("food.jsonl:3", "salt", "food"),
            ("sport/deep/a.txt", "goal", "sport"),
        ]
    )
    assert (corpus.num_ignored, corpus.num_problems) == (1, 0)


def test_links_are_followed_once_and_broken_ones_reported(tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", "goal")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("sport", "twice"):
        (corpus / name).symlink_to(tmp_path / "elsewhere")
    (corpus / "gone.txt").symlink_to(tmp_path / "none.txt")
    os.mkfifo(corpus / "pipe.txt")  # opening it would block forever
    read = Corpus(corpus)
    assert rows(read) == [("sport/a.txt", "goal", "sport")]
    assert [problem.file for problem in read.problems] == ["gone.txt", "pipe.txt"]


def test_ids_can_always_be_written(tmp_path):
    write(tmp_path / os.fsdecode(b"caf\xe9.txt"), "coffee")
    assert rows(Corpus(tmp_path)) == [("caf\\xe9.txt", "coffee", "")]


def test_tables_of_all_kinds_give_the_same_texts(tmp_path):
    import pandas as pd

    table = pd.DataFrame({"body": ["a goal,\nscored", "a pan"], "kind": ["sport", "food"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "t.parquet")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    for ending in ("csv", "tsv", "parquet", "jsonl"):
        corpus = Corpus(tmp_path / f"t.{ending}", text_field="body", label_field="kind")
        assert [(text.text, text.label) for text in corpus] == [("a goal,\nscored", "sport"), ("a pan", "food")]
        assert corpus.num_problems == 0


def test_byte_order_mark_and_numbers_as_labels(tmp_path):
    path = write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"text": "a", "n": 3}\n{"text": "b", "n": null}\n')
    assert rows(Corpus(path, label_field="n")) == [("t.jsonl:1", "a", "3"), ("t.jsonl:2", "b", "")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "x"}', r"no field 'kind' \(it has text\)"),
        ('{"text": "x", "kind": "\\udc00"}', "'kind' is not UTF-8"),
    ],
)
def test_bad_labels_are_reported_and_skipped(tmp_path, line, reason):
    corpus = Corpus(write(tmp_path / "t.jsonl", f'{line}\n{{"text": "y", "kind": "a"}}\n'), label_field="kind")
    assert rows(corpus) == [("t.jsonl:2", "y", "a")]
    assert corpus.num_problems == 1
    with pytest.raises(AssertionError, match=rf"^t\.jsonl:1: .*{reason}"):
        raise AssertionError(str(corpus.problems[0]))


def test_line_numbers_in_a_table_are_where_rows_begin(tmp_path):
    content = '\ntext,n\n"two\nlines",1\n\n"quo"te,2\nlast,3\n'
    corpus = Corpus(write(tmp_path / "t.csv", content))
    assert [(text.id, text.text) for text in corpus] == [("t.csv:3", "two\nlines"), ("t.csv:7", "last")]
    assert [problem.line for problem in corpus.problems] == [6]


def test_a_quote_that_is_never_closed_is_reported(tmp_path):
    corpus = Corpus(write(tmp_path / "t.csv", 'text\ngood\n"open\nswallowed\n'))
    assert [text.text for text in corpus] == ["good"]
    assert [str(problem) for problem in corpus.problems] == ["t.csv:3: is not CSV (unexpected end of data)"]


def test_bad_cells_in_parquet_are_reported_and_skipped(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    data = pa.array([b"good", b"\xff", None, b"too"], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(4, data.buffers()[1], data.buffers()[2], data.buffers()[0])})
    parquet.write_table(table, tmp_path / "t.parquet")
    corpus = Corpus(tmp_path)
    assert rows(corpus) == [("t.parquet:1", "good", "t"), ("t.parquet:4", "too", "t")]
    assert [str(problem).split(" (")[0] for problem in corpus.problems] == [
        "t.parquet:2: is not UTF-8",
        "t.parquet:3: field 'text' is NoneType, expected text",
    ]


def test_damaged_parquet_is_reported(tmp_path):
    import pandas as pd

    pd.DataFrame({"text": ["a goal"] * 1000}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", content[:8] + b"\xff" * 20 + content[28:])
    write(tmp_path / "b.txt", "good")
    corpus = Corpus(tmp_path)
    assert [text.id for text in corpus] == ["b.txt"]
    assert [problem.file for problem in corpus.problems] == ["a.parquet"]


def test_an_unlistable_folder_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "sport" / "a.txt", "x")
    listing = os.scandir

    def scandir(path):
        if Path(path).name == "sport":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match=r"can't read '.*sport': Permission denied"):
        list(Corpus(tmp_path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object but list"),
        ('{"body": "x", "kind": 1}', r"no field 'text' \(it has body, kind\)"),
        ('{"text": 3}', "field 'text' is int, expected text"),
        ('{"text": null}', "field 'text' is NoneType"),
        ('{"text": "  "}', "field 'text' is empty"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        ('{"text": "\\ud800"}', "is not UTF-8"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=str,
)
def test_bad_lines_are_reported_and_skipped(tmp_path, line, reason):
    content = b'{"text": "good"}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"text": "too"}\n'
    corpus = Corpus(write(tmp_path / "t.jsonl", content))
    assert [text.text for text in corpus] == ["good", "too"]
    assert corpus.num_problems == 1
    with pytest.raises(AssertionError, match=rf"^t\.jsonl:2: .*{reason}"):
        raise AssertionError(str(corpus.problems[0]))


def test_bad_rows_and_files_are_reported(tmp_path):
    write(tmp_path / "a.csv", b'text,kind\ngood,1\nonly\n"open quote\nlasts, until the end\n')
    write(tmp_path / "b.csv", b"text,kind\n\xff,2\n" + b"x" * 200_000 + b",3\n")
    write(tmp_path / "c.txt", b"\xff\xfe")
    write(tmp_path / "d.txt", b" \n")
    write(tmp_path / "e.parquet", b"PAR1 no")
    corpus = Corpus(tmp_path)
    assert [text.id for text in corpus] == ["a.csv:2", "b.csv:3"]
    reported = [str(problem) for problem in corpus.problems]
    assert [line.split(": ")[0] for line in reported] == [
        "a.csv:3",
        "a.csv:4",
        "b.csv:2",
        "c.txt",
        "d.txt",
        "e.parquet",
    ]
    assert list(corpus)  # once more, without counting problems twice
    assert corpus.num_problems == 6


def test_a_missing_column_lists_the_existing_ones(tmp_path):
    path = write(tmp_path / "t.csv", "body,kind\na,b\n")
    with pytest.raises(CorpusError, match=r"no column 'text', it has 'body', 'kind': pass --text-field"):
        list(Corpus(path))
    with pytest.raises(CorpusError, match="pass --label-field"):
        list(Corpus(path, text_field="body", label_field="domain"))
    with pytest.raises(CorpusError, match="several columns 'text'"):
        list(Corpus(write(tmp_path / "twice.csv", "text,text\na,b\n")))


def test_empty_corpora_are_errors(tmp_path):
    with pytest.raises(CorpusError, match="contains no texts"):
        list(Corpus(tmp_path))
    write(tmp_path / "t.jsonl", '{"body": 1}\n')
    with pytest.raises(CorpusError, match=r"the first problem: t\.jsonl:1: no field 'text' .*--text-field"):
        list(Corpus(tmp_path))
    write(tmp_path / "t.jsonl", "")
    write(tmp_path / "a.pdf", "x")
    with pytest.raises(CorpusError, match="files of other kinds: 1"):
        list(Corpus(tmp_path))
    with pytest.raises(CorpusError, match="no corpus at"):
        Corpus(tmp_path / "none")
    with pytest.raises(CorpusError, match="expected a folder, or a file ending in"):
        Corpus(write(tmp_path / "a.pdf", "x"))


RECORDS = [{"text": "a goal", "kind": "sport"}, {"text": "a pan", "kind": "food"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def texts_of(path, **options):
    corpus = Corpus(path, label_field="kind", **options)
    found = [(text.text, text.label) for text in corpus]
    assert [str(problem) for problem in corpus.problems] == []
    return found


def zstd(content):
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps(RECORDS).encode()),
        ("t.json", json.dumps(RECORDS, indent=1).encode()),
        ("t.json", json.dumps(RECORDS[0]).encode() + json.dumps(RECORDS[1]).encode()),
        ("t.jsonl", json.dumps(RECORDS).encode()),
        ("t.jsonl", json.dumps(RECORDS, indent=1).encode()),
        ("t.jsonl", "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()),
        ("t.JSONL.GZ", gzip.compress(LINES.encode(), mtime=0)),
        ("t.jsonl.gz", gzip.compress(LINES[:20].encode(), mtime=0) + gzip.compress(LINES[20:].encode(), mtime=0)),
        ("t.jsonl.bz2", bz2.compress(LINES.encode())),
        ("t.jsonl.xz", lzma.compress(LINES.encode())),
        ("t.jsonl.zst", zstd(LINES.encode())),
        ("t.jsonl.zst", zstd(LINES[:20].encode()) + zstd(LINES[20:].encode())),
        ("t.jsonl", LINES.encode("utf-16")),
        ("t.jsonl", codecs.BOM_UTF32_BE + LINES.encode("utf-32-be")),
        ("t.csv", b"text,kind\na goal,sport\na pan,food\n"),
        ("t.csv", b'"text";"kind"\r\na goal;sport\r\na pan;food\r\n'),
        ("t.csv", b"\n\xef\xbb\xbftext\tkind\na goal\tsport\na pan\tfood\n"[1:]),
        ("t.tsv", b"kind|text\nsport|a goal\nfood|a pan\n"),
        ("t.csv.gz", gzip.compress(b"text,kind\na goal,sport\na pan,food\n", mtime=0)),
        ("t.csv", "text;kind\na goal;sport\na pan;food\n".encode("utf-16")),
    ],
    ids=str,
)
def test_formats_that_people_have(tmp_path, name, content):
    assert texts_of(write(tmp_path / name, content)) == [("a goal", "sport"), ("a pan", "food")]


def test_every_object_of_a_document_has_an_id(tmp_path):
    content = f"[{json.dumps(RECORDS[0])}, 3, {json.dumps(RECORDS[1])}, {{broken"
    corpus = Corpus(write(tmp_path / "t.json", content))
    assert [text.id for text in corpus] == ["t.json:1", "t.json:3"]
    assert [str(problem).split(" (")[0] for problem in corpus.problems] == [
        "t.json:2: is not a JSON object but int",
        "t.json:4: is not JSON",
    ]


@pytest.mark.parametrize("content", ["", "[", "[1]", '{"a": ', "nothing", '["\ud800'.replace("\ud800", "x")])
def test_documents_without_records(tmp_path, content):
    with pytest.raises(CorpusError, match="contains no texts"):
        list(Corpus(write(tmp_path / "t.json", content)))


def test_long_documents_stream(tmp_path):
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        file.writelines(json.dumps({"text": "word " * 200}) + "," for _ in range(5_000))
        file.write('{"text": "last"}]')
    tracemalloc.start()
    last = [text.text for text in Corpus(path) if len(text.text) < 9]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last == ["last"]
    assert peak < 2_000_000


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow"])
def test_nested_fields_and_lists_of_texts(tmp_path, ending):
    records = [{"body": {"parts": ["a goal", "scored"]}, "meta": {"set": {"name": "Wikipedia (en)"}}}]
    path = tmp_path / f"t.{ending}"
    if ending == "jsonl":
        write(path, json.dumps(records[0]))
    else:
        write_columns(path, records)
    read = {"text_field": "body.parts", "label_field": "meta.set.name"}
    assert rows(Corpus(path, **read)) == [(f"t.{ending}:1", "a goal\nscored", "Wikipedia (en)")]
    corpus = Corpus(path, text_field="body.parts", label_field="meta")
    with pytest.raises(CorpusError, match=r"field 'meta' holds fields: name one .* --label-field meta\.set"):
        list(corpus)
    with pytest.raises(CorpusError, match=r"field 'body' holds fields: name one .* --text-field body\.parts"):
        list(Corpus(path, text_field="body"))
    with pytest.raises(CorpusError, match=r"meta\.none"):
        list(Corpus(path, text_field="body.parts", label_field="meta.none"))


def write_columns(path, records):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def test_a_field_with_a_dot_in_its_name(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "x", "meta.kind": "sport", "meta": {"kind": "food"}}')
    assert rows(Corpus(path, label_field="meta.kind")) == [("t.jsonl:1", "x", "sport")]


def test_arrow_files_and_damaged_ones(tmp_path):
    import pyarrow as pa

    table = pa.table({"text": ["a goal", "a pan"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write(tmp_path / "b.arrow", b"ARROW1 no")
    corpus = Corpus(tmp_path)
    assert [text.text for text in corpus] == ["a goal", "a pan"]
    assert [str(problem).split(" (")[0] for problem in corpus.problems] == ["b.arrow: is damaged or not Arrow"]


def saved_dataset(folder, records, **state):
    write_columns(folder / "data-00000-of-00001.arrow", records)
    write_columns(folder / "cache-123.arrow", [{"text": "of an earlier step"}])
    write(folder / "dataset_info.json", '[{"text": "no record"}]')
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], **state}
    write(folder / "state.json", json.dumps(state))


def test_folders_that_datasets_saved(tmp_path):
    saved_dataset(tmp_path / "one", [{"text": "a goal"}])
    corpus = Corpus(tmp_path / "one")
    assert [text.text for text in corpus] == ["a goal"]
    assert (corpus.num_problems, corpus.not_read) == (0, {})
    for split in ("test", "train"):
        saved_dataset(tmp_path / "both" / split, [{"text": split}])
    write(tmp_path / "both" / "dataset_dict.json", '{"splits": ["train", "test"]}')
    corpus = Corpus(tmp_path / "both")
    assert [(text.text, text.label) for text in corpus] == [("test", "test"), ("train", "train")]
    assert (corpus.num_problems, corpus.not_read) == (0, {})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "saved with a selection of rows: call flatten_indices"),
        ({"_data_files": [{"filename": "../../secret.arrow"}]}, r"lacks its file '\.\./\.\./secret\.arrow'"),
        ({"_data_files": 3}, r"its state\.json is damaged"),
        ({"_data_files": None}, r"its state\.json is damaged"),
    ],
)
def test_saved_folders_that_cannot_be_read(tmp_path, state, message):
    saved_dataset(tmp_path / "corpus" / "one", [{"text": "a goal"}], **state)
    write_columns(tmp_path / "secret.arrow", [{"text": "not of the corpus"}])
    with pytest.raises(CorpusError, match=message):
        list(Corpus(tmp_path / "corpus"))


def test_unread_files_are_counted_by_kind(tmp_path):
    for name in (
        "a.txt",
        "b.md",
        "c.md",
        "d.PY",
        "Makefile",
        ".hidden.txt",
        "e.pdf.gz",
        "settings.json",
        "f.parquet.gz",
    ):
        write(tmp_path / name, "{}")
    corpus = Corpus(tmp_path)
    assert [text.id for text in corpus] == ["a.txt"]
    assert corpus.not_read == {
        **{".md": 2, ".py": 1, "without ending": 1, "hidden": 1, ".pdf": 1, ".json": 1, ".parquet": 1}
    }
    assert (corpus.num_read, corpus.num_ignored) == (1, 7)


def test_text_that_holds_nul_bytes_is_no_text(tmp_path):
    """UTF-16 without its mark would be read as a text of letters and zeros."""
    write(tmp_path / "a.txt", "a goal".encode("utf-16-le"))
    write(tmp_path / "b.jsonl", '{"text": "b"}\n'.encode("utf-16-le"))
    write(tmp_path / "c.csv", "text,label\nc,d\n".encode("utf-16-be"))
    write(tmp_path / "good.jsonl", '{"text": "a\\u0000b"}\n')
    corpus = Corpus(tmp_path)
    assert rows(corpus) == [("good.jsonl:1", "a\0b", "good")]
    expected = "contains NUL bytes: if it is UTF-16 without its mark, read it with --encoding utf-16-le"
    assert {problem.reason for problem in corpus.problems} == {expected}
    assert {problem.file for problem in corpus.problems} == {"a.txt", "b.jsonl", "c.csv"}
    assert rows(Corpus(tmp_path / "a.txt", encoding="utf-16-le")) == [("a.txt", "a goal", "")]


@pytest.mark.parametrize("content", ["sep=;\r\ntext;label\r\na, b;c\r\n", "\ufeffSep=;\ntext;label\na, b;c\n"])
def test_a_table_may_name_its_delimiter(tmp_path, content):
    path = write(tmp_path / "t.csv", content)
    assert rows(Corpus(path, label_field="label")) == [("t.csv:3", "a, b", "c")]


def test_patterns_that_match_nothing_are_named(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(CorpusError, match=r"a\.txt' does not match --include '\*\.py': leave that out$"):
        Corpus(path, include=["*.py"])
    with pytest.raises(CorpusError, match=r"no file in .* matches --include '\*\.py', 'b': change the pattern$"):
        list(Corpus(tmp_path, include=["*.py", "b"]))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.parquet.gz", "a.tgz"])
def test_an_archive_is_to_be_unpacked(tmp_path, name):
    with pytest.raises(CorpusError, match=r"is not a corpus: .*; unpack it first$"):
        Corpus(write(tmp_path / name, b"PK"))


def test_include_chooses_files_of_any_kind(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "src" / "b.py", "print()")
    write(tmp_path / "src" / "c.jsonl", '{"text": "record"}')
    write(tmp_path / "docs" / "d.md.gz", gzip.compress(b"# Title"))
    corpus = Corpus(tmp_path, include=["*.py", "docs/*", "c.*"])
    assert rows(corpus) == [
        ("docs/d.md.gz", "# Title", "docs"),
        ("src/b.py", "print()", "src"),
        ("src/c.jsonl:1", "record", "src"),
    ]
    assert corpus.not_read == {".txt": 1}
    path = write(tmp_path / "README.md", "# Title")
    with pytest.raises(CorpusError, match=r"--include 'README\.md' reads it as one text"):
        Corpus(path)
    assert rows(Corpus(path, include=["README.md"])) == [("README.md", "# Title", "")]


def test_what_steermoe_wrote_is_not_read(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "emb" / "meta.json", "{}")
    write(tmp_path / "emb" / "texts-00000.jsonl", '{"text": "embedded"}')
    write(tmp_path / "report" / "report.json", "{}")
    write(tmp_path / "report" / "clusters.csv", "id\n1\n")
    write(tmp_path / "report" / "embeddings" / "texts-00000.jsonl", '{"text": "embedded"}')
    assert [text.id for text in Corpus(tmp_path)] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "encoding", "text"),
    [
        ("текст".encode("cp1251"), "cp1251", "текст"),
        ("текст".encode("koi8-r"), "KOI8-R", "текст"),
        ("日本語".encode("shift_jis"), "shift_jis", "日本語"),
        ("été".encode("utf-16-le"), "utf-16-le", "été"),
        ("été".encode("utf-8-sig"), "utf8", "été"),
    ],
)
@pytest.mark.parametrize("form", ["{}.txt", "{}.csv", "{}.jsonl"])
def test_encodings(tmp_path, content, encoding, text, form):
    before, after = {"{}.txt": ("", ""), "{}.csv": ("text\n", "\n"), "{}.jsonl": ('{"text": "', '"}\n')}[form]
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    content = mark + before.encode(encoding) + content.removeprefix(mark) + after.encode(encoding)
    (read,) = Corpus(write(tmp_path / form.format("t"), content), encoding=encoding)
    assert read.text == text


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.jsonl"])
def test_a_wrong_encoding_names_the_option(tmp_path, name):
    before = b"" if name == "t.jsonl" else b"text\n"
    path = write(tmp_path / name, before + '{"text": "мир"}'.encode("cp1251"))
    with pytest.raises(CorpusError, match=r"is not UTF-8 \(byte \d+\): --encoding names another encoding") as caught:
        list(Corpus(path))
    assert "\n" not in str(caught.value)
    odd = write(tmp_path / name, b"\xff\xfet\x00e")
    with pytest.raises(CorpusError, match="is not text of its encoding"):
        list(Corpus(odd))


@pytest.mark.parametrize("encoding", ["nope", "hex", "rot13", "a\0b", "undefined"])
def test_encodings_that_are_none(tmp_path, encoding):
    with pytest.raises(CorpusError, match="there is no encoding"):
        Corpus(write(tmp_path / "a.txt", "x"), encoding=encoding)
    with pytest.raises(CorpusError, match="the encoding is empty"):
        Corpus(tmp_path, encoding="")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("part", [0, 1, 40, -3])
def test_damaged_packed_files_are_reported(tmp_path, ending, part):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[ending]
    content = pack("".join(f'{{"text": "number {n} {hash(str(n))}"}}\n' for n in range(2000)).encode())
    write(tmp_path / f"t.jsonl.{ending}", content[:part] if part else b"no such file")
    write(tmp_path / "z.txt", "good")
    corpus = Corpus(tmp_path)
    assert [text.id for text in corpus][-1] == "z.txt"
    assert corpus.num_problems >= 1
    assert all("\n" not in str(problem) for problem in corpus.problems)


def test_zst_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match=r"\.zst files need pyarrow .*pip install 'steermoe\[parquet\]'"):
        list(Corpus(write(tmp_path / "t.jsonl.zst", b"x")))


def test_stdin_is_read_as_often_as_needed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    corpus = Corpus("-", label_field="kind")
    assert rows(corpus) == rows(corpus) == [("stdin:1", "a goal", "sport"), ("stdin:2", "a pan", "food")]
    kept = corpus._kept_stdin
    assert kept.is_file()
    del corpus
    assert not kept.exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"plain text")))
    with pytest.raises(CorpusError, match=r"stdin contains no texts .* stdin:1: is not JSON"):
        list(Corpus("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CorpusError, match="stdin contains no texts"):
        list(Corpus("-"))


def columns_bytes(ending):
    import pyarrow as pa
    from pyarrow import parquet

    table, sink = pa.Table.from_pylist([{**record, "meta": {"n": 1}} for record in RECORDS]), pa.BufferOutputStream()
    if ending == "parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "txt": b"a goal",
    "jsonl": LINES.encode(),
    "json": json.dumps(RECORDS, indent=1).encode(),
    "csv": b'text,kind\n"a goal",sport\n',
    "parquet": columns_bytes("parquet"),
    "arrow": columns_bytes("arrow"),
    "jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "jsonl.xz": lzma.compress(LINES.encode()),
    "jsonl.zst": zstd(LINES.encode()),
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.mark.fuzz
@given(
    ending=st.sampled_from(sorted(CONTENTS)),
    place=st.integers(0, 10**6),
    piece=st.binary(max_size=12) | st.sampled_from([b"[" * 99, b'{"', b"\xff\xfe", b"\0\0\xfe\xff", b"\r", b"\\ud800"]),
    cut=st.integers(0, 30),
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_field": st.sampled_from(["kind", "meta.n"]),
            "encoding": st.sampled_from(["utf-16", "cp1251"]),
        },
    ),
)
def test_any_damage_of_a_file_is_reported_in_one_line(fuzzed, ending, place, piece, cut, options):
    content = CONTENTS[ending]
    place %= len(content) + 1
    path = fuzzed / f"t.{ending}"
    path.write_bytes(content[:place] + piece + content[place + cut :])
    corpus = Corpus(path, **options)
    try:
        texts = list(corpus)
    except CorpusError as error:
        problems = [str(error)]
    else:
        problems = [str(problem) for problem in corpus.problems]
        assert len({text.id for text in texts}) == len(texts)
        assert all(text.text.strip() and text.text.encode() and text.label.encode() is not None for text in texts)
    assert all("\n" not in problem for problem in problems)


def test_large_files_stream(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "word " * 200}) + "\n"
    with path.open("w") as file:
        file.writelines(line for _ in range(20_000))
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    count = sum(1 for _ in Corpus(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000
