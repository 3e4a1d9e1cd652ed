"""`steermoe chat` in a pipe, and --chat of the other commands, on a tiny chat model."""

import io
import json

import pytest

from steermoe.cli.terminal import console
from steermoe.cli.terminal.talk import interruptible
from steermoe.engines.decoding import Stop
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import VectorInfo
from tests.support import chat_models

SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return chat_models.write_chat_checkpoint(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture
def vectors(bare_search_path, make_vector):
    """`sport` and `food` for the tiny model, in ./steering_vectors."""
    for domain in ("sport", "food"):
        info = VectorInfo(model="tiny-chat", architecture="mixtral", top_k=2, strength=4.0)
        vector = make_vector(domain, layers=range(2), info=info)
        write_vector(vector, bare_search_path / "steering_vectors" / "tiny-chat" / f"{domain}.safetensors")
    return bare_search_path


@pytest.fixture
def talk(run, checkpoint, vectors, monkeypatch):
    """Runs a chat with these lines."""

    def talk(*lines, options=SHORT, model=checkpoint):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogateescape"))))
        return run("chat", "-m", model, "--no-compiled-steps", *options)

    return talk


def test_each_answer_is_a_line_of_json(talk):
    result = talk("Hi", "", "/domain sport=0.7 food=0.3", "the thing", options=(*SHORT, "--json", "--seed", "3"))
    assert result.code == 0
    first, second = map(json.loads, result.out.splitlines())
    assert (first["prompt"], first["domain"], first["chat"], first["seed"]) == ("Hi", None, True, 3)
    assert second["prompt"] == "the thing"
    assert "sport" in second["domain"]
    assert "food" in second["domain"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]
    assert first["steering"] is None
    assert second["steering"]["tokens_steered"] > 0
    assert "steered toward" in result.err
    assert "messages" not in second


def test_the_history_is_that_of_generate_with_the_same_messages(talk, run, checkpoint, tmp_path):
    """What the model reads in the second turn, told as the messages of a batch."""
    first, second = map(json.loads, talk("Hi", "the", options=(*SHORT, "--json")).out.splitlines())
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "the"},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    batch = ("batch", tmp_path / "chats.jsonl", "-o", "out.jsonl", "-m", checkpoint, *SHORT)
    assert run(*batch).code == 0
    with open("out.jsonl", encoding="utf-8") as file:  # noqa: PTH123
        record = json.loads(file.read())
    assert (record["text"], record["prompt_tokens"]) == (second["text"], second["prompt_tokens"])
    assert record["messages"] == messages


def test_commands_change_what_comes_next(talk, tmp_path):
    result = talk(
        "/system Be brief.",
        "/seed 5",
        "Hi",
        "/retry",
        "/strength 2",
        "/domain sport",
        "the",
        "/undo",
        "/help",
        f"/save {tmp_path}/chat.jsonl",
        f"/save {tmp_path}/chat.txt",
        f"/save {tmp_path}/chat.txt",
        f"/save! {tmp_path}/chat.txt",
        "/quit",
        "never read",
        options=(*SHORT, "--json"),
    )
    first, again, third = map(json.loads, result.out.splitlines())
    assert (first["seed"], again["seed"], third["strength"], third["domain"]) == (5, 6, 2.0, "sport")
    assert first["system"] == third["system"] == "Be brief."
    saved = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert saved == [again]
    assert (tmp_path / "chat.txt").read_text().startswith(f"You: Hi\n\ntiny-chat: {again['text']}")
    assert result.err.count("is there already: name another file, or replace it with /save! ") == 1
    assert "/save FILE" in result.err
    assert result.code == 1  # one line could not be done


def test_errors_do_not_end_the_chat(talk):
    result = talk(
        "/undo", "/nonsense", "/compare", "/domain nosuch", "/strength x", "/seed x", "x" * 400, "\udcff", "/save", "Hi"
    )
    assert result.code == 1
    for message in (
        "there is no answer yet",
        "/nonsense is no command",
        "no vector 'nosuch'",
        "that is no number",
        "that is no seed",
        "the context of tiny-chat is 256",
        "a message of role 'user' is not UTF-8",
        "/save needs a file",
    ):
        assert message in result.err
    assert result.out.count("\n") >= 1
    assert "Traceback" not in result.err


def test_the_oldest_turns_are_dropped_and_that_is_said(talk):
    result = talk(*(letter * 60 for letter in "abcde"))
    assert result.code == 0
    assert "the context of tiny-chat holds 256 tokens: the oldest turn is no longer sent to the model" in result.err
    assert "the oldest 2 turns are no longer sent" in result.err


def test_the_last_answer_is_compared(talk):
    result = talk("Hi", "/compare", "/domain sport", "/compare", options=(*SHORT, "--json"))
    assert "there is no steering to compare with" in result.err
    answer, plain, steered = map(json.loads, result.out.splitlines())
    assert plain["text"] == answer["text"]
    assert (plain["domain"], steered["domain"]) == (None, "sport")
    assert 0 <= steered["vector_shares"]["sport"] <= 1
    shown = talk("Hi", "/compare", options=(*SHORT, "-d", "sport"))
    assert "unsteered" in shown.out


def test_a_model_without_a_template(talk, tiny_checkpoint, vectors):
    result = talk("Hi", model=tiny_checkpoint)
    assert (result.code, result.out) == (1, "")
    assert "tiny-mixtral has no chat template, so it can't chat" in result.err


def test_a_closed_stdin(run, checkpoint, vectors, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    result = run("chat", "-m", checkpoint)
    assert result.code == 1
    assert "stdin is closed: pipe messages into it" in result.err


def test_ctrl_c_ends_the_answer_and_then_the_program():
    import signal

    with interruptible() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stop):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- the other commands ----


def test_generate_answers_a_message(run, checkpoint, vectors):
    command = ("generate", "Hi", "--chat", "--system", "Be brief.", "-d", "sport", "-m", checkpoint, *SHORT)
    answer, streamed, record = run(*command), run(*command, "--stream"), json.loads(run(*command, "--json").out)
    assert answer.out == streamed.out == console.printable(f"{record['text']}\n")
    assert (record["prompt"], record["chat"], record["system"]) == ("Hi", True, "Be brief.")
    assert "steered" in answer.err


def test_compare_answers_a_message(run, checkpoint, vectors):
    result = run("compare", "Hi", "--chat", "-d", "sport", "-m", checkpoint, "--json", *SHORT)
    plain, steered = map(json.loads, result.out.splitlines())
    assert plain["chat"] is steered["chat"] is True
    assert plain["prompt_tokens"] == steered["prompt_tokens"] > 2


def test_batch_answers_messages(run, checkpoint, vectors):
    with open("questions.txt", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write("Hi\nthe thing\n")
    command = ("batch", "questions.txt", "-o", "out.jsonl", "-d", "sport", "-m", checkpoint, *SHORT)
    assert run(*command, "--chat", "--system", "Be brief.").code == 0
    assert "2 stories" in run(*command, "--chat", "--system", "Be brief.").out
    refused = run(*command)
    assert "2 stories that this run does not ask for" in refused.err
    with open("out.jsonl", encoding="utf-8") as file:  # noqa: PTH123
        records = [json.loads(line) for line in file]
    alone = ("generate", "Hi", "--chat", "--system", "Be brief.", "-d", "sport", "-m", checkpoint, "--json", *SHORT)
    assert {r["prompt"]: r["text"] for r in records}["Hi"] == json.loads(run(*alone).out)["text"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--system", "y"], 2, "--system belongs to a chat: add --chat"),
        (["compare", "x", "--no-thinking"], 2, "--no-thinking belongs to a chat: add --chat"),
        (["generate", "x", "--chat", "--thinking"], 1, "has no switch for thinking: leave out --thinking"),
        (["generate", "x", "--chat", "--max-new-tokens", "300"], 1, "the context of tiny-chat is 256"),
    ],
)
def test_wrong_usage_is_one_clear_line(run, checkpoint, vectors, arguments, code, message):
    result = run(*arguments, "-m", checkpoint)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
