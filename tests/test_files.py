"""Files written whole or not at all: their permissions, links, devices and names; locks."""

import errno
import os
import stat
from pathlib import Path

import pytest

from steermoe.files import atomic_path, hidden_beside, lock, new_file


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as partial:
        partial.write_text(text)


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, mask, mode):
    umask(mask)
    write(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, umask, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    with atomic_path(path) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600  # readable to nobody else meanwhile
        partial.write_text("new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_a_link(tmp_path, is_there):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    link.symlink_to(target)
    if is_there:
        target.write_text("old")
    write(link)
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]


def test_a_pipe_gets_the_content_and_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write(path)
    assert os.read(reader, 99) == b"new"
    os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_full_device_is_an_error_and_stays():
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"))
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["x" * 255, "\u00fc" * 127, "x" * 250])
def test_the_longest_names_can_be_written(tmp_path, name):
    write(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert len(os.fsencode(hidden_beside(tmp_path / name, "sorting").name)) <= 255


def test_longer_names_fail_before_the_work(tmp_path):
    with pytest.raises(OSError, match="too long"), atomic_path(tmp_path / ("x" * 256)):
        pytest.fail("the block must not run")


def test_a_new_file_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "link")
    assert not victim.exists()


def test_locks(tmp_path, monkeypatch):
    import fcntl

    path = new_file(tmp_path / "lock")
    with path.open() as first, path.open() as second:
        assert lock(first.fileno()) is True
        assert lock(second.fileno()) is False
        first.close()
        assert lock(second.fileno(), wait=True) is True

    def no_locks(fd, kind):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with path.open() as third:
        assert lock(third.fileno()) is None
