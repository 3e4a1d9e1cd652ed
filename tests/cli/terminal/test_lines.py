"""Lines typed at a terminal, and the file of what was typed before."""

import io
import stat

import platformdirs
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from steermoe.cli.terminal import lines


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_state_path", lambda name: tmp_path / "state" / name)
    return tmp_path / "state" / "steermoe"


@pytest.fixture
def typing(state, monkeypatch):
    """What is typed; the output goes nowhere."""
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **options: DummyOutput())
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def test_lines_are_typed_and_remembered_for_their_owner_alone(typing, state):
    typing.send_text("Hello\rtwo\x1b\rlines\r/domain sport\r\x04")
    assert list(lines.typed(lambda: "> ")) == ["Hello", "two\nlines", "/domain sport"]
    file = state / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "+Hello" in file.read_text()


def test_ctrl_c_twice_ends_the_chat_and_once_does_not(typing, capsys):
    typing.send_text("half a line\x03")
    found = lines.typed(lambda: "> ")
    typing.send_text("Hello\r\x03\x03never read\r")
    assert list(found) == ["Hello"]
    assert capsys.readouterr().err.count("Ctrl-C again, or Ctrl-D, ends the chat") == 2


def test_without_a_place_for_the_history_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(platformdirs, "user_state_path", lambda name: tmp_path / "file" / name)
    assert lines.history_file() is None


def test_lines_from_a_pipe(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"Hello\r\n\ncaf\xe9\nlast"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert list(lines.piped()) == ["Hello", "", "caf\udce9", "last"]
