"""Text that is safe to print: running text, single lines, JSON, spinners, progress, and a stderr that is full."""

import io
import json
import re
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.cli.terminal import console, tables
from tests.support import planted

ANY_TEXT = st.text(st.characters()) | st.lists(st.sampled_from(planted.ALL)).map("".join)
ANY_JSON = st.recursive(
    ANY_TEXT | st.integers() | st.none(), lambda some: st.lists(some) | st.dictionaries(ANY_TEXT, some)
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain", "plain"),
        ("[/x] [news] :smile:", "[/x] [news] :smile:"),
        ("a\nb", "a b"),
        ("  a:\n\n   b\r\n", "a: b"),
        ("a\tb", "a b"),
        ("\n", ""),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("spo\u200brt", "spo\\u200brt"),
        ("spo\u200drt", "spo\\u200drt"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("中文 é ё", "中文 é ё"),
    ],
)
def test_a_line(text, shown):
    assert console.line(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\tb", "a\n\tb"),
        ("\x1b[31mred", "[31mred"),
        ("\u202ex\u2069", "x"),
        ("a\u200bb", "a\u200bb"),
        ("\ud800", ""),
    ],
)
def test_running_text(text, shown):
    assert console.printable(text) == shown


@pytest.mark.fuzz
@given(ANY_TEXT)
def test_no_text_does_harm(text):
    shown = console.line(text)
    assert len(shown.splitlines()) <= 1
    assert not planted.harm_in(shown + console.printable(text))
    assert console.line(shown) == shown


@pytest.mark.fuzz
@given(
    st.recursive(ANY_TEXT | st.integers() | st.none(), lambda some: st.lists(some) | st.dictionaries(ANY_TEXT, some))
)
def test_json_is_one_harmless_line_with_the_same_values(record):
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        console.write_json(record)
    written = stream.getvalue()
    assert written.endswith("\n")
    assert len(written.splitlines()) == 1
    assert not planted.harm_in(written[:-1])
    if not re.search(r"\\ud[89ab]..\\ud[c-f]..", written):  # two halves that stand side by side become one character
        assert json.loads(written) == json.loads(json.dumps(record))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251"])
def test_json_on_a_stream_without_utf_8_is_ascii(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    console.write_json({"text": "é 中文 \U0001f415"})
    assert json.loads(stream.buffer.getvalue()) == {"text": "é 中文 \U0001f415"}


@pytest.fixture
def terminal(monkeypatch):
    """Call it, and both consoles write to a terminal of 100 columns; then call its result for what they wrote."""

    def start():
        monkeypatch.setenv("TERM", "xterm")
        streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
        for name, one in (("stdout", console.out), ("stderr", console.err)):
            monkeypatch.setattr(streams[name], "isatty", lambda: True)
            monkeypatch.setattr(sys, name, streams[name])
            monkeypatch.setattr(one, "_force_terminal", True)
            monkeypatch.setattr(one, "is_interactive", True)
            monkeypatch.setattr(one, "_width", 100)
        return lambda: tuple(stream.getvalue() for stream in streams.values())

    return start


@pytest.mark.parametrize("text", planted.ALL)
def test_progress_and_notes_show_text_as_it_is(terminal, text):
    written = terminal()
    with console.counting(f"Embedding {text}", "texts", 2) as advance:
        advance(1, 10)
    console.note(f"skipped {text}", "dim")
    _, err = written()
    assert not planted.harm_in(err, terminal=True)
    for what in (f"Embedding {text}", f"skipped {text}"):
        assert console.line(what) in planted.COLOURS.sub("", err)


def test_a_spinner_shows_text_as_it_is(terminal):
    text = " ".join(planted.ALL)
    written = terminal()
    with console.working(f"Loading {text}") as show:
        time.sleep(0.2)  # a few frames
        show(f"Reading {text}")
        time.sleep(0.2)
    _, err = written()
    assert not planted.harm_in(err, terminal=True)
    shown = "".join(planted.COLOURS.sub("", err).split())
    for what in (f"Loading {text}", f"Reading {text}"):
        assert "".join(console.line(what).split()) in shown


@pytest.mark.parametrize("text", planted.ALL)
def test_tables_and_cards_of_a_terminal_show_text_as_it_is(terminal, text):
    written = terminal()
    tables.print_table(("name", text), [("a", text), (text, "b")])
    tables.print_facts({"title": text, text: "x"})
    console.heading(text)
    out, _ = written()
    assert not planted.harm_in(out, terminal=True)
    shown = console.line(text).strip()
    assert planted.COLOURS.sub("", out).count(shown) >= 6


class Full(io.StringIO):
    """A stream without room."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_full_stderr_costs_nothing_but_its_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Full())
    console.note("lost")
    with console.working("Loading ..."):
        console.write("kept\n")
    assert capsys.readouterr().out == "kept\n"


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    console.note("lost")


def test_errors_of_stdout_are_told_from_those_of_files():
    stream = console.Stdout(Full())
    for act in (lambda: stream.write("x"), lambda: console.Stdout(io.TextIOWrapper(FullBytes())).flush()):
        with pytest.raises(console.StdoutError) as caught:
            act()
        assert isinstance(caught.value.__cause__, OSError)
        assert not isinstance(caught.value, OSError)


class FullBytes(io.RawIOBase):
    def writable(self):
        return True

    def flush(self):
        if not self.closed:
            raise OSError(28, "No space left on device")

    def close(self):
        pass
