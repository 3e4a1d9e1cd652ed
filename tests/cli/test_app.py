"""The error boundary: one line and the right exit code, whatever is typed, planted into files or wrong with streams."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from steermoe.cli import app as cli
from steermoe.cli.terminal import console
from steermoe.errors import ModelError, SteerMoEError, VectorError
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import VectorInfo
from tests.support import planted

LONG = "n" * 300


def steermoe(*arguments: Any, shell: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; `shell` are redirections."""
    command = [sys.executable, "-m", "steermoe", *map(str, arguments)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    options = {"capture_output": True, "encoding": "utf-8", "errors": "surrogateescape", "timeout": 100} | options
    return subprocess.run(command, check=False, **options)


# ---- errors of ours, of usage, of the system ----


@pytest.fixture
def fails(run, monkeypatch):
    """Runs `vectors list` with an error in it."""

    def run_with(error: BaseException) -> Any:
        def raise_it(*_: Any) -> None:
            raise error

        monkeypatch.setattr("steermoe.vectors.library.find_vectors", raise_it)
        return run("vectors", "list")

    return run_with


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("no [/x] here"), "no [/x] here"),
        (SteerMoEError("can't load it:\n  Traceback\n\n  of many lines\n"), "can't load it: Traceback of many lines"),
        (VectorError("'\x1b]0;t\x07\u202e'"), "'\\x1b]0;t\\x07\\u202e'"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n"), "can't use 'n': File name too long; most disks"),
        (OSError(errno.EROFS, "Read-only file system", b"n"), "can't use 'n': Read-only file system; name a file"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (MemoryError(), "there is not enough memory"),
        (EOFError("no more data"), "unexpected EOFError: no more data (a bug: please report it"),
        (ZeroDivisionError("x\ny"), "unexpected ZeroDivisionError: x y (a bug: please report it"),
    ],
)
def test_any_error_is_one_line(fails, error, line):
    code, out, err = fails(error)
    assert (code, out) == (1, "")
    assert err.lstrip("\n").startswith(f"steermoe: {line}")
    assert len(err.strip("\n").splitlines()) == 1


def test_ctrl_c_is_130(fails):
    assert fails(KeyboardInterrupt())[::2] == (130, "\nsteermoe: interrupted\n")


def test_a_traceback_only_on_request(fails, monkeypatch):
    monkeypatch.setenv("STEERMOE_TRACEBACK", "1")
    err = fails(ZeroDivisionError("x"))[2]
    assert "raise error" in err
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--seed", "x"], "for '--seed': ... valid integer ... 'x'"),
        (["generate", "--seed", "[/x]"], "valid integer ... '[/x]' ... (see `steermoe generate --help`)"),
        (["generate", "--engine", "x\n"], "'--engine': 'x\\n' is not one of 'auto', 'hf', 'llamacpp', 'vllm' (see"),
        (["generate", "--nope\x1b"], "No such option: --nope"),
        (
            ["batch", "p.txt", "-o", "s", "--batch-size", str(2**63)],
            f"{2**63} is too large: expected at most {2**63 - 1}",
        ),
        (["batch", "p.txt", "-o", "s", "--samples", "9" * 5000], "'--samples': "),
        (["batch", "p.txt", "-o", "s", "--batch-size", "-1"], "for '--batch-size': ... -1"),
        (["embed", "c", "-o", "e", "--max-tokens", str(2**70)], f"for '--max-tokens': ... {2**70} ... {2**31 - 1}"),
        (["models", "export", "--gguf", "x"], "'--gguf': 'x' is not one of 'q8_0'"),
        (["batch", "p.txt"], "Missing option '--output'"),
        (["batch"], "Missing argument 'PROMPTS'"),
        (["vectors", "nope"], "No such command 'nope' (see `steermoe vectors --help`)"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (["generate", f"--{'a' * 5000}"], "No such option: --aaa ... aaa... (see"),
    ],
)
def test_wrong_usage_is_one_line_with_the_value(run, arguments, message):
    """All parts of `message` are there: typer's versions put them in a different order."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert [part for part in message.split(" ... ") if part not in err] == []
    assert err.startswith("steermoe: ")
    assert err.count("\n") == 1
    assert len(err) < 600
    assert not planted.harm_in(err)


@pytest.mark.parametrize("arguments", [[], ["vectors"], ["models"]])
def test_without_a_command_the_help_is_shown(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"Usage: {' '.join(['steermoe', *arguments])} [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "-m", LONG],
        ["generate", "x", "-m", f"{LONG}.gguf"],
        ["batch", LONG, "-o", "s.jsonl"],
        ["embed", LONG, "-o", "e"],
        ["vectors", "show", f"{LONG}.safetensors"],
        ["vectors", "check", LONG],
        ["vectors", "list", "--vectors", LONG],
        ["vectors", "import", LONG, "-d", "x"],
        ["vectors", "mix", "sport", "food", "-o", LONG],
        ["vectors", "discover", LONG, "-o", "r"],
        ["vectors", "build", "--texts", f"a={LONG}"],
        ["models", "inspect", LONG],
        ["models", "inspect", "--texts", LONG],
    ],
)
def test_names_that_are_too_long(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("steermoe: ")
    assert err.count("\n") == 1
    assert "bug" not in err


# ---- what files hold ----


@pytest.fixture
def planted_vectors(bare_search_path, make_vector) -> Path:
    """A vector for each planted text, which is its title, keyword, model, architecture, licence and part."""
    for number, text in enumerate(planted.MARKUP + planted.CONTROLS + planted.DIRECTIONS + planted.UNSEEN):
        names = dict.fromkeys(("title", "model", "architecture", "licence", "created_by"), text)
        info = VectorInfo(**names, keywords=(text,), parts=(text,), top_k=2, strength=4.0)
        write_vector(make_vector(f"v{number:02}", info=info), Path("vectors", "tiny", f"v{number:02}.safetensors"))
    return bare_search_path


def test_titles_keywords_and_models_of_files(run, planted_vectors):
    listed = run("vectors", "list", "--vectors", "vectors")
    outputs = [listed, run("vectors", "list", "--vectors", "vectors", "--json")]
    for file in sorted(Path("vectors", "tiny").iterdir()):
        outputs += [run("vectors", "show", file), run("vectors", "show", file, "--json"), run("vectors", "check", file)]
    for code, out, err in outputs:
        assert (code, err) == (0, "")
        assert not planted.harm_in(out)
    rows = listed.out.splitlines()[1:]
    assert len(rows) == len(list(Path("vectors", "tiny").iterdir()))
    for text, row in zip(planted.MARKUP, rows, strict=False):
        assert row.count(text) == 2


@pytest.mark.parametrize("text", planted.ALL)
def test_clusters_domains_and_lines_of_files(run, monkeypatch, capsys, text):
    """What commands print from reports, evaluations and files of prompts."""
    from steermoe.batch.jobs import Problem
    from steermoe.cli import batch, evaluate
    from steermoe.cli.vectors import discover

    cluster = {"number": 0, "name": text, "size": 2, "keywords": [{"word": text}], "labels": {text: 2}}
    discover._print_clusters({"adjusted_rand": 1.0, "clusters": [cluster], "noise": 0, "texts": 2})
    monkeypatch.setattr("steermoe.evaluation.report.table_rows", lambda summary: [[text] * 9])
    evaluate._print({})
    batch._ProblemPrinter()(Problem(1, f"has an unknown field '{text}'"))
    out, err = capsys.readouterr()
    assert not planted.harm_in(out + err)
    assert len(out.splitlines()) == 6
    problem = console.line(f"skipped line 1: has an unknown field '{text}'")
    assert err == f"steermoe: {problem}\n"
    assert out.count(console.line(text)) >= 12


def test_the_same_in_a_terminal(planted_vectors):
    for arguments in (("list", "--vectors", "vectors"), ("show", "v00", "--vectors", "vectors")):
        out = in_a_terminal("vectors", *arguments)
        assert "[/x]" in out
        assert not planted.harm_in(out, terminal=True)


def test_a_spinner_shows_the_name_of_a_model_as_it_is(tmp_path):
    out = in_a_terminal("vectors", "check", "sport", "-m", f"{tmp_path}/[/x][bold]\u202e")
    assert "[/x][bold]" in out
    assert "Traceback" not in out
    assert "bug" not in out
    assert not planted.harm_in(out, terminal=True)


def in_a_terminal(*arguments: str) -> str:
    """What the command line prints into a terminal, on both streams."""
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "steermoe", *arguments]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment):
        os.close(its)
        parts = []
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:  # Linux: the other side is closed
            pass
    os.close(ours)
    return b"".join(parts).decode()


# ---- prompts that are not UTF-8 ----


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_prompt_that_is_not_utf_8(command, locale):
    environment = {**os.environ, "LC_ALL": locale}
    wrong = "Жила".encode("cp1251")
    piped = steermoe(command, "-", input=wrong, env=environment, encoding=None, errors=None)
    given = steermoe(command, os.fsdecode(wrong), env=environment)
    for result, name in ((piped, b"stdin"), (given, "the prompt")):
        assert (result.returncode, len(result.stdout)) == (1, 0)
        err = result.stderr.decode() if isinstance(result.stderr, bytes) else result.stderr
        start = name.decode() if isinstance(name, bytes) else name
        assert err.startswith(f"steermoe: {start} is not UTF-8 (")
        assert "at byte 0): convert it" in err
        assert err.count("\n") == 1


# ---- streams, folders, Ctrl-C ----


@pytest.mark.parametrize(
    ("arguments", "shell", "code", "message"),
    [
        (["vectors", "list"], ">&-", 1, "stdout is closed"),
        (["--help"], ">&-", 1, "stdout is closed"),
        (["generate", "-"], "<&-", 1, "stdin is closed: pipe a text into it"),
        (["batch", "-", "-o", "s.jsonl"], "<&-", 1, "stdin is closed"),
        (["vectors", "list"], "<&- >&- 2>&-", 1, None),
        (["vectors", "list"], "2>&-", 0, None),
        (["vectors", "show", "nope"], "2>&-", 1, None),
        (["vectors", "list"], ">/dev/full", 1, "can't write the answer to stdout: No space left on device"),
        (["vectors", "list", "--json"], ">/dev/full", 1, "can't write the answer to stdout"),
        (["vectors", "show", "sport"], ">/dev/full", 1, "can't write the answer to stdout"),
        (["--help"], ">/dev/full", 1, "can't write the answer to stdout"),
        (["--version"], ">/dev/full", 1, "can't write the answer to stdout"),
        (["vectors", "show", "nope"], "2>/dev/full", 1, None),
        (["models", "list"], "2>/dev/full", 0, None),
        (["vectors"], "2>/dev/full", 2, None),
    ],
)
def test_closed_and_full_streams(tmp_path, arguments, shell, code, message):
    result = steermoe(*arguments, shell=shell, cwd=tmp_path)
    assert result.returncode == code
    if message is None:
        assert result.stderr == ""
    else:
        assert result.stderr.startswith("steermoe: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--help", "models list", "models list --json", "vectors show sport"])
def test_a_reader_that_has_enough(arguments):
    result = steermoe(*arguments.split(), shell="| true")
    assert result.stderr == ""


ODD_SIZES = ["0", "-5", "\u00b2", "x", "\x1b[2J", "9" * 5000]


@pytest.mark.parametrize(("name", "size"), [(n, size) for n in ("COLUMNS", "LINES") for size in ODD_SIZES])
def test_odd_sizes_of_the_terminal_are_forgotten(monkeypatch, name, size):
    monkeypatch.setenv(name, size)
    console.forget_odd_sizes()
    assert name not in os.environ


def test_odd_sizes_of_the_terminal_lose_nothing():
    usual, *odd = (
        steermoe("vectors", "list", env={**os.environ, "COLUMNS": columns, "LINES": lines})
        for columns, lines in (("80", "25"), ("0", "-5"), ("9" * 5000, "9" * 5000))
    )
    assert len(usual.stdout.splitlines()) > 8
    for result in odd:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.split() == usual.stdout.split()


def test_a_deleted_working_folder(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    script = 'rmdir "$0"; exec "$@"'
    for arguments, code, err in ((["vectors", "list"], 1, "the working folder no longer exists"), (["--help"], 0, "")):
        folder.mkdir(exist_ok=True)
        command = ["sh", "-c", script, str(folder), sys.executable, "-m", "steermoe", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert err in done.stderr
        assert done.stderr.count("\n") == (code != 0)


def test_no_home_and_no_entry_of_the_user(run, monkeypatch, tmp_path):
    def no_entry(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    for name in [name for name in os.environ if re.match(r"HOME|XDG_|STEERMOE_|LOGNAME|USER", name)]:
        monkeypatch.delenv(name)
    assert run("vectors", "list").code == 0
    for arguments in (("models", "inspect"), ("models", "pull"), ("generate", "x")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert err == "steermoe: there is no home folder for the cache: set HOME, or STEERMOE_CACHE to a folder\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.3, 0.6])
def test_ctrl_c_while_modules_are_imported(seconds):
    """Python itself takes some time before it can catch anything, so the clock starts with its first module."""
    script = "import sys; print(flush=True); sys.argv[0] = 'steermoe'; from steermoe.__main__ import main; main()"
    command = [sys.executable, "-c", script, "models", "inspect", "--texts", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    if process.returncode == -signal.SIGABRT and "pybind11::error_already_set" in err:
        return  # torch's own C++ code was importing a module, and ends the process for any exception there
    assert "Traceback" not in err
    assert process.returncode in (130, 1), err  # 1 if it ended before the signal
    assert err.strip().startswith("steermoe: ")


def test_ctrl_c_in_code_that_is_made_from_a_string(tmp_path):
    """Python ends by the signal then, as if nobody had handled it, unless it is made to forget it."""
    (tmp_path / "interrupted.py").write_text(
        "from steermoe.cli import app\nfrom steermoe.vectors import library\n"
        "library.find_vectors = lambda folder: exec('raise KeyboardInterrupt')\napp.main()\n"
    )
    search = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "interrupted", "vectors", "list"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"\nsteermoe: interrupted\n")


# ---- random command lines ----


def _commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """The options of every command."""
    names = [name for one in group.params for name in (*one.opts, *one.secondary_opts)]
    found = {path: [name for name in names if name.startswith("-") and "completion" not in name]}
    for name, command in getattr(group, "commands", {}).items():
        found |= _commands(command, (*path, name))
    return found


COMMANDS = _commands(get_command(cli.app))
NUMBERS = st.integers().map(str) | st.floats().map(str) | st.sampled_from(["1e400", str(2**63), "-1", "9" * 5000, "٣"])
NAMES = st.sampled_from(["sport", "sport=0.5", "x.jsonl", "x.gguf", "x.safetensors", "tiny", "-", "", ".", LONG])
TEXT = (st.text(st.characters(), max_size=8) | st.sampled_from(planted.ALL)).map(
    lambda text: re.sub("[/\0]", "", re.sub("[\ud800-\udfff]", "\udcff", text))
)
"""As the system can pass it; without slashes, so that files stay in the working folder."""
VALUES = NUMBERS | NAMES | TEXT


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with options that it has, values, and things that fit nowhere."""
    path = draw(st.sampled_from(sorted(COMMANDS)))
    words = list(path)
    for _ in range(draw(st.integers(0, 5))):
        option = draw(st.sampled_from(COMMANDS[path] + ["--"]))
        words += draw(st.sampled_from([[option], [option, draw(VALUES)], [f"{option}={draw(VALUES)}"], [draw(VALUES)]]))
    return words


@pytest.fixture
def no_models(monkeypatch, bare_search_path, make_vector):
    """Models are found, but none is loaded or downloaded; `sport` and a few files are in the working folder."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("this test loads no model")

    for name in (
        "steermoe.engines.auto.open_engine",
        "steermoe.engines.auto.require_vllm",
        "steermoe.models.loading.load",
        "steermoe.models.default.pull.pull",
        "steermoe.models.description.describe",
        "steermoe.cli.loading.pull_if_needed",
        "steermoe.batch.cluster.connected",
    ):
        monkeypatch.setattr(name, refuse)
    write_vector(make_vector("sport"), Path("steering_vectors", "tiny", "sport.safetensors"))
    Path("x.jsonl").write_text('{"text": "A dog.", "prompt": "A dog."}\n')
    Path("x.safetensors").write_bytes(b"\x00" * 20)
    Path("x.gguf").write_bytes(b"GGUF")
    Path("tiny").mkdir()


@pytest.mark.fuzz
@given(words=command_lines(), searched=TEXT)
def test_random_command_lines(run, no_models, words, searched):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERMOE_VECTORS", searched)
        code, out, err = run(*words)
    assert code in (0, 1, 2)
    assert "Traceback" not in err
    assert "(a bug" not in err
    assert not planted.harm_in(out + err)
    if code == 1 and not err:
        assert json.loads(out)["ok"] is False  # `vectors check --json`, whose answer has the errors
    elif code and not err.startswith("Usage: "):
        assert err.startswith("steermoe: ")
        assert all(line.startswith("steermoe: ") for line in err.splitlines())
        assert code != 2 or err.count("\n") == 1


def test_typer_still_has_the_error_of_wrong_usage():
    assert cli.UsageError.__name__ == "UsageError"
    assert issubclass(typer.BadParameter, cli.UsageError)
