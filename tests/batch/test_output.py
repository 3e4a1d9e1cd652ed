"""The file of stories: lines cut short, foreign files, full disks, order, two runs at once."""

import errno
import json
import logging
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.batch import output
from steermoe.batch.output import ErrorFile, StoryFile, check_apart
from steermoe.errors import BatchError


def record(key: int, **more) -> dict:
    return {"job": f"{key:016x}", "text": "Ein Hund \U0001f415\n", **more}


def line(key: int) -> bytes:
    return json.dumps(record(key), ensure_ascii=False).encode() + b"\n"


def keys_in(path: Path) -> list[int]:
    return [int(json.loads(content)["job"], 16) for content in path.read_bytes().splitlines()]


def test_append_and_find_again(tmp_path):
    path = tmp_path / "s.jsonl"
    with StoryFile(path) as stories:
        assert list(stories.records()) == []
        stories.begin()
        stories.append(record(1))
        stories.append(record(2))
    assert path.read_bytes() == line(1) + line(2)
    with StoryFile(path) as stories:
        assert list(stories.records()) == [(1, record(1)), (2, record(2))]
        stories.begin()
        stories.append(record(3))
    assert keys_in(path) == [1, 2, 3]


@pytest.mark.parametrize("cut", range(1, len(line(2)) + 1))
def test_a_last_line_cut_short_anywhere_is_removed(tmp_path, cut):
    path = tmp_path / "s.jsonl"
    path.write_bytes((line(1) + line(2))[:-cut] or b"")
    with StoryFile(path) as stories:
        found = [int(story["job"], 16) for _, story in stories.records()]
        assert found == ([1, 2] if cut == 1 else [1])  # only its line end was missing
        stories.begin()
        stories.append(record(3))
    assert keys_in(path) == [*found, 3]


@pytest.mark.parametrize(
    "tail", [b"\0" * 40, b"\0" * 40 + b"\n", line(2)[:20] + b"\0" * 9, line(2)[:20] + b"\n", b"{", b"\n"]
)
def test_the_remains_of_a_crash_are_removed(tmp_path, tail):
    path = tmp_path / "s.jsonl"
    path.write_bytes(line(1) + tail)
    with StoryFile(path) as stories:
        assert [number for number, _ in stories.records()] == [1]
        stories.begin()
    assert path.read_bytes() == line(1)


@pytest.mark.parametrize(
    "content",
    [b"my diary\n", b"my diary", line(1) + b"my diary\n", line(1)[:20] + b"\n" + line(2), b'{"prompt": "x"}\n', b"[1]"],
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, content):
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    with StoryFile(path) as stories, pytest.raises(BatchError, match=r"line \d of .* is not a story: name another"):
        list(stories.records())
    assert path.read_bytes() == content


def test_overwrite_waits_for_begin(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"my diary\n")
    with StoryFile(path, overwrite=True) as stories:
        assert list(stories.records()) == []
        assert path.read_bytes() == b"my diary\n"
        stories.begin()
        stories.append(record(1))
    assert path.read_bytes() == line(1)


def test_a_new_file_that_stays_empty_is_removed(tmp_path):
    for was_there in (False, True):
        path = tmp_path / f"{was_there}.jsonl"
        if was_there:
            path.touch()
        with StoryFile(path):
            assert path.exists()
        assert path.exists() == was_there


def test_two_runs_on_one_file(tmp_path):
    with StoryFile(tmp_path / "s.jsonl"), pytest.raises(BatchError, match="being written by another run"):
        StoryFile(tmp_path / "s.jsonl")
    StoryFile(tmp_path / "s.jsonl").close()


@pytest.mark.parametrize("name", ["no-such-folder/s.jsonl", "."])
def test_places_that_cannot_be_written(tmp_path, name):
    with pytest.raises(BatchError, match=r"can't write .*; name another file"):
        StoryFile(tmp_path / name)
    with pytest.raises(BatchError, match="can't write the errors"):
        ErrorFile(tmp_path / name)


def test_full_device():
    with StoryFile(Path("/dev/full")) as stories:
        assert list(stories.records()) == []
        stories.begin()
        with pytest.raises(BatchError, match=r"can't write '/dev/full': No space left on device$"):
            stories.append(record(1))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_story_that_fits_only_partly_leaves_no_trace(tmp_path, monkeypatch, error):
    path = tmp_path / "s.jsonl"
    write = os.write
    with StoryFile(path) as stories:
        stories.append(record(1))
        calls = []

        def fill(fd, content):
            calls.append(1)
            if len(calls) > 1:
                raise error
            return write(fd, content[:7])

        monkeypatch.setattr(output.os, "write", fill)
        expected = BatchError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            stories.append(record(2))
        monkeypatch.undo()
        assert expected is KeyboardInterrupt or "are complete: make room and run again" in str(caught.value)
        assert path.read_bytes() == line(1)
        stories.append(record(3))
    assert keys_in(path) == [1, 3]


def test_the_file_is_synced_now_and_then(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(output.os, "fsync", synced.append)
    with StoryFile(tmp_path / "s.jsonl") as stories:
        stories.append(record(1))
        assert not synced
        monkeypatch.setattr(output, "SYNC_SECONDS", 0.0)
        stories.append(record(2))
        assert len(synced) == 1


def test_sort(tmp_path):
    path = tmp_path / "s.jsonl"
    with StoryFile(path) as stories:
        for key in (3, 9, 1, 8, 2):
            stories.append(record(key))
        stories.sort(lambda key: key if key < 5 else -1)
    assert keys_in(path) == [9, 8, 1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.jsonl"]


def test_sort_without_room_leaves_the_file(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "s.jsonl"
    with StoryFile(path) as stories:
        for key in (2, 1):
            stories.append(record(key))
        monkeypatch.setattr(output.os, "fsync", full)
        with pytest.raises(BatchError, match=r"complete, but there is no room to sort it .*No space left"):
            stories.sort(lambda key: key)
    assert keys_in(path) == [2, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.jsonl"]


def test_sort_follows_no_planted_link(tmp_path):
    path, victim = tmp_path / "s.jsonl", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".s.jsonl.sorting").symlink_to(victim)
    with StoryFile(path) as stories:
        for key in (2, 1):
            stories.append(record(key))
        stories.sort(lambda key: key)
    assert keys_in(path) == [1, 2]
    assert victim.read_text() == "precious"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.jsonl", "victim"]


def test_a_link_stays_a_link_when_its_file_is_sorted(tmp_path):
    (tmp_path / "disk").mkdir()
    path, real = tmp_path / "s.jsonl", tmp_path / "disk" / "real.jsonl"
    path.symlink_to(real)
    with StoryFile(path) as stories:
        for key in (2, 1):
            stories.append(record(key))
        stories.sort(lambda key: key)
    assert path.is_symlink()
    assert keys_in(real) == [1, 2]
    assert [entry.name for entry in real.parent.iterdir()] == ["real.jsonl"]


def test_the_copy_of_a_sort_that_was_killed_is_removed(tmp_path):
    path = tmp_path / "s.jsonl"
    (tmp_path / ".s.jsonl.sorting").write_bytes(line(1))
    with StoryFile(path) as stories:
        stories.begin()
        stories.append(record(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.jsonl"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_stories(tmp_path, umask, mode):
    path = tmp_path / "s.jsonl"
    before = os.umask(umask)
    try:
        with StoryFile(path) as stories:
            for key in (2, 1):
                stories.append(record(key))
            stories.sort(lambda key: key)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


# ---- other programs ----


def replace_it(path):
    (path.parent / "new").write_bytes(line(1))
    (path.parent / "new").replace(path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (replace_it, "was replaced by another program"),
        (lambda path: path.unlink(), "was removed by another program"),
        (lambda path: path.write_bytes(b""), "was changed from .* to 0 bytes by another program"),
        (lambda path: path.write_bytes(line(1) + b"\n"), "was changed from .* bytes by another program"),
    ],
    ids=["replaced", "removed", "emptied", "saved in an editor"],
)
@pytest.mark.parametrize("then", ["append", "sync", "sort", "begin"])
def test_a_file_that_another_program_changes_ends_the_run(tmp_path, change, what, then):
    path = tmp_path / "s.jsonl"
    with StoryFile(path) as stories:
        stories.begin()
        stories.append(record(3))
        stories.append(record(1))
        change(path)
        changed = path.read_bytes() if path.exists() else None
        use = {
            "append": lambda: stories.append(record(2)),
            "sync": stories.sync,
            "sort": lambda: stories.sort(lambda key: key),
            "begin": stories.begin,
        }
        with pytest.raises(BatchError, match=f"{what} during the run: .* run again") as error:
            use[then]()
        assert "\n" not in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == changed


def test_a_new_file_that_another_program_put_there_is_not_removed(tmp_path):
    path = tmp_path / "s.jsonl"
    with StoryFile(path):
        path.unlink()
        path.touch()
    assert path.exists()


def test_a_file_that_is_replaced_before_it_is_locked_is_opened_again(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    lock, seen = output.lock, []

    def late(fd):
        if not seen:
            replace_it(path)
        seen.append(fd)
        return lock(fd)

    monkeypatch.setattr(output, "lock", late)
    with StoryFile(path) as stories:
        assert [story["job"] for _, story in stories.records()] == [record(1)["job"]]
    assert len(seen) == 2


def test_file_systems_without_locks_get_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def no_locks(fd, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), StoryFile(tmp_path / "s.jsonl") as stories:
        stories.append(record(1))
    assert caplog.messages == [
        f"'{tmp_path / 's.jsonl'}' can't be locked here: make sure that no other run writes to it"
    ]
    assert keys_in(tmp_path / "s.jsonl") == [1]


@pytest.mark.parametrize("job", ["f" * 17, "1", "0x" + "0" * 14, "+" + "1" * 15, 1, None])
def test_a_key_of_another_form_is_no_story(tmp_path, job):
    path = tmp_path / "s.jsonl"
    path.write_bytes(line(1) + json.dumps({"job": job}).encode() + b"\n")
    with StoryFile(path) as stories, pytest.raises(BatchError, match=r"line 2 of .* is not a story"):
        list(stories.records())


def test_a_file_of_errors_that_is_replaced_ends_the_run(tmp_path):
    errors = ErrorFile(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").unlink()
    with pytest.raises(BatchError, match=r"the file of errors .* was replaced or removed"):
        errors.add({"line": 1})
    errors.close()


@pytest.mark.fuzz
@given(texts=st.lists(st.text(max_size=8), max_size=4), share=st.floats(0, 1), zeros=st.integers(0, 9))
def test_a_file_cut_anywhere_heals(tmp_path, texts, share, zeros):
    """Also with the zeros that a crash may leave: every whole story is found, and the cut one is removed."""
    path = tmp_path / "s.jsonl"
    records = [record(number, text=text) for number, text in enumerate(texts)]
    content = b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records)
    kept = content[: round(share * len(content))]
    path.write_bytes(kept + b"\0" * zeros)
    with StoryFile(path) as stories:
        found = [story for _, story in stories.records()]
        assert found == records[: len(found)]
        assert len(found) >= kept.count(b"\n")
        stories.begin()
        stories.append(record(99))
    assert [json.loads(each) for each in path.read_bytes().splitlines()] == [*found, record(99)]


def test_a_sorted_file_is_not_copied(tmp_path):
    path = tmp_path / "s.jsonl"
    with StoryFile(path) as stories:
        for key in (1, 2):
            stories.append(record(key))
        before = path.stat().st_ino
        stories.sort(lambda key: key)
        assert path.stat().st_ino == before


def test_error_file(tmp_path):
    ErrorFile(None).add({"line": 1})
    errors = ErrorFile(tmp_path / "bad.jsonl")
    errors.add({"line": 3, "error": "ü"})
    assert (tmp_path / "bad.jsonl").read_text() == '{"line": 3, "error": "ü"}\n'  # at once, not at the end
    errors.close()
    full = ErrorFile(Path("/dev/full"))
    with pytest.raises(BatchError, match="can't write the errors"):
        full.add({"line": 1})
    full.close()  # nothing is left to be written


def test_no_file_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").touch()
    Path("link").symlink_to("p.txt")
    check_apart("p.txt", Path("s.jsonl"), Path("bad.jsonl"))
    check_apart("-", Path("s.jsonl"), None)
    for prompts, stories, errors in (
        ("p.txt", "p.txt", None),
        ("p.txt", "link", None),
        ("-", "a", "a"),
        ("p.txt", "a", "link"),
    ):
        with pytest.raises(BatchError, match="would overwrite"):
            check_apart(prompts, Path(stories), errors and Path(errors))


@pytest.mark.parametrize(("descriptor", "stream"), [(1, "stdout"), (2, "stderr")])
@pytest.mark.parametrize("kind", ["stories", "errors"])
def test_a_file_that_takes_stdout_too_is_refused(tmp_path, descriptor, stream, kind):
    path, kept = tmp_path / "taken", os.dup(descriptor)
    named = {"stories": Path("s.jsonl"), "errors": Path("bad.jsonl"), kind: path}
    with path.open("wb") as file:
        os.dup2(file.fileno(), descriptor)
    try:
        with pytest.raises(BatchError, match=f"{stream} goes to .*taken.* would overwrite the {kind}: name another"):
            check_apart("p.txt", named["stories"], named["errors"])
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
    check_apart("p.txt", named["stories"], named["errors"])
