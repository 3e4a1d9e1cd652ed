"""Corpora of every kind: what is read, ids and labels, and how bad records are reported."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

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
