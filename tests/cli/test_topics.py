"""`--topic`: `vectors build`, `generate`, `compare`, `batch`."""

import json

import pytest

from steermoe.evaluation import provision
from steermoe.vectors.file import read_vector
from tests.support.chat_models import write_chat_checkpoint

SHORT = ("--max-new-tokens", "6")
FEW = ("--texts-per-topic", "6")


@pytest.fixture
def kept(monkeypatch, bare_search_path, tmp_path):
    """Folders of the test's own; a function that returns the names of what is kept."""
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "user-data" / "steermoe" / "steering_vectors"
    return lambda: sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def test_generate_builds_once(run, kept, tiny_checkpoint):
    arguments = ("generate", "A dog", "--topic", "pirates at sea", *FEW, "--model", tiny_checkpoint, *SHORT)
    first = run(*arguments)
    assert first.code == 0, first.err
    assert "tiny-mixtral has no vector of 'pirates at sea': it writes 6 texts" in first.err
    assert "a guess" not in first.err
    assert kept() == ["pirates-at-sea.safetensors", "pirates-at-sea.texts.jsonl"]
    second = run(*arguments)
    assert second.out == first.out
    assert "writes" not in second.err
    by_name = run("generate", "A dog", "-d", "pirates-at-sea", "--model", tiny_checkpoint, *SHORT)
    assert by_name.out == first.out
    columns = run("compare", "A dog", *arguments[2:], "--json")
    assert [json.loads(line)["domain"] for line in columns.out.splitlines()] == [None, "pirates-at-sea"]


def test_another_number_of_texts_is_not_skipped_in_silence(run, kept, tiny_checkpoint):
    arguments = ("generate", "A dog", "--topic", "pirates at sea", "--model", tiny_checkpoint, *SHORT)
    assert run(*arguments, *FEW).code == 0
    assert "is there already" not in run(*arguments, *FEW).err
    assert "is there already, from 6 texts, not 9: remove" in run(*arguments, "--texts-per-topic", "9").err
    assert "is there already" not in run(*arguments).err


def test_nothing_is_said_about_the_template_of_requests(run, kept, tmp_path, caplog):
    checkpoint = write_chat_checkpoint(tmp_path / "tiny-chat")
    found = run("generate", "A dog", "--topic", "pirates at sea", "--model", checkpoint, *SHORT, *FEW)
    assert found.code == 0, found.err
    assert "it writes 6 texts" in found.err
    assert "special token" not in found.err + caplog.text


def test_no_build_refuses(run, kept, tiny_checkpoint):
    found = run("generate", "A dog", "--topic", "pirates at sea", "--no-build", "--model", tiny_checkpoint)
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert "without --no-build the model writes 32 texts about it now" in found.err
    assert not kept()


def test_batch_takes_topics_as_domains(run, kept, tiny_checkpoint, tmp_path):
    prompts, stories = tmp_path / "prompts.txt", tmp_path / "stories.jsonl"
    prompts.write_text("A dog\n", encoding="utf-8")
    command = ("batch", prompts, "-o", stories, "--model", tiny_checkpoint, *SHORT, *FEW)
    found = run(*command, "-d", "none", "--topic", "pirates at sea")
    assert found.code == 0, found.err
    records = [json.loads(line) for line in stories.read_text(encoding="utf-8").splitlines()]
    assert sorted(str(record["domain"]) for record in records) == ["None", "pirates-at-sea"]


def test_build(run, kept, tiny_checkpoint, tmp_path):
    folder = tmp_path / "made"
    command = ("vectors", "build", "--model", tiny_checkpoint, "-o", folder, *FEW)
    found = run(*command, "--topic", "pirates at sea", "--topic", "Space robots", "--json")
    assert found.code == 0, found.err
    records = json.loads(found.out)
    assert [(one["domain"], one["topic"]) for one in records] == [
        ("pirates-at-sea", "pirates at sea"),
        ("space-robots", "Space robots"),
    ]
    assert "tiny-mixtral continues openings: 6 texts about each topic and 6 about other things" in found.err
    assert sorted(path.name for path in folder.iterdir()) == [
        *("pirates-at-sea.safetensors", "pirates-at-sea.texts.jsonl"),
        *("space-robots.safetensors", "space-robots.texts.jsonl"),
    ]
    assert read_vector(folder / "space-robots.safetensors").info.strength is None
    again = run(*command, "--topic", "pirates at sea")
    assert again.code == 1
    assert "is there already" in again.err
    named = run(*command, "--topic", "pirates at sea", "--name", "sailors")
    assert named.out == f"{folder / 'sailors.safetensors'}\n"
    assert not kept()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "--topic", ""), "the topic is empty"),
        (("generate", "--topic", " ?"), "the topic '?' has no letters"),
        (("generate", "--topic", "😀😀"), "the topic '😀😀' has no letters"),
        (("generate", "--texts-per-topic", "8"), "needs a topic"),
        (("generate", "--topic", "a", "-d", "none"), "--domain none leaves the text unsteered"),
        (("vectors", "build", "--topic", ""), "the topic is empty"),
        (("vectors", "build", "--topic", "a", "--texts", "b=c"), "leave out --texts"),
        (("vectors", "build", "--topic", "a", "--against", "b"), "--against needs texts of your own"),
        (("vectors", "build", "--topic", "a", "--topic", "A"), "two topics would be named 'a'"),
        (("vectors", "build", "--topic", "a", "--topic", "b", "--name", "c"), "--name is for one topic"),
        (("vectors", "build", "--topic", "a", "--name", "No Name"), "is not allowed"),
        (("vectors", "build", "--name", "a"), "--name is for the vector of a --topic"),
    ],
)
def test_wrong_usage(run, kept, arguments, said):
    found = run(*arguments)
    assert found.code == 2
    assert said in " ".join(found.err.replace("│", " ").split())
    assert not found.out
