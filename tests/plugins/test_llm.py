"""The plugin for `llm`: through its command line and its Python API, on tiny random models."""

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest

pytest.importorskip("llm", reason="llm is not installed: pip install 'steermoe[llm]'")

import llm
from click.testing import CliRunner
from llm.plugins import load_plugins, pm

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.messages import Message, conversation
from steermoe.engines.request import Request, Sampling
from steermoe.engines.text import printable
from steermoe.models import loading
from steermoe.plugins import llm as plugin
from steermoe.plugins import llm_models, llm_options
from steermoe.plugins.session import Opening
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import NAMES, SteeringSpec
from tests.support import served
from tests.support.pages import code_blocks, read_page

load_plugins()
if not pm.has_plugin("steermoe"):  # an environment that was made before the entry point
    pm.register(plugin, "steermoe")

PROMPT = "a dog ran"
blocks = partial(code_blocks, read_page("docs/plugins.md"))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "chat_template.jinja").write_text(served.TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    """The same model once more, for what it generates without `llm`."""
    return HFEngine(loading.load(checkpoint))


@pytest.fixture(scope="module")
def vectors(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    served.write_vectors(folder, engine.shape)
    return folder


@pytest.fixture(scope="module")
def sessions():
    """Models that stay open for all tests of this file."""
    plugin._sessions.cache_clear()
    return plugin._sessions()


@pytest.fixture(scope="module")
def home(checkpoint, sessions, tmp_path_factory):
    """A folder of `llm`, which knows the tiny model as steermoe/chatty. Its log is slow to make."""
    folder = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(folder))
        llm_models.add("chatty", {"model": str(checkpoint)})
    return folder


@pytest.fixture
def run(home, monkeypatch):
    """Runs `llm`."""
    monkeypatch.setenv("LLM_USER_PATH", str(home))
    monkeypatch.delenv("LLM_MODEL", raising=False)
    from llm.cli import cli  # asks the plugins for commands

    return lambda *arguments, input=None: CliRunner().invoke(cli, list(map(str, arguments)), input=input)


@pytest.fixture
def bare(run, tmp_path, monkeypatch):
    """Runs `llm` in an empty folder, without the log."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return run


@pytest.fixture
def model(run):
    return llm.get_model("steermoe/chatty")


@pytest.fixture
def expected(engine, vectors):
    """What the engine generates."""

    def expected(spec=None, chat=None, text=PROMPT, **sampling):
        plan = PlanResolver(engine.shape, vectors).plan(spec or SteeringSpec())
        chat = None if chat is None else engine.chat(chat)
        (completion,) = engine.generate([Request(text, plan, Sampling(**sampling), chat=chat)])
        return completion

    return expected


OPTIONS = [
    ({}, SteeringSpec()),
    ({"domain": "sport"}, SteeringSpec(("sport",))),
    ({"domain": "sport=0.7,food=0.3", "strength": "3"}, SteeringSpec(("sport=0.7", "food=0.3"), 3)),
    (
        {"domain": "law", "formula": "zero_max_scaled", "schedule": "first:6", "layers": "1-2", "positions": "all"},
        SteeringSpec(("law",), formula="zero_max_scaled", schedule="first:6", layers="1-2", positions="all"),
    ),
    (
        {"force": "0:1,2:3", "ban": '["1:4"]', "active_experts": "3"},
        SteeringSpec(force=("0:1", "2:3"), ban=("1:4",), active_experts=3),
    ),
]


@pytest.mark.parametrize(("options", "spec"), OPTIONS)
def test_a_prompt_is_continued_as_by_generate(run, vectors, expected, options, spec):
    options |= {"vectors": str(vectors), "max_new_tokens": "40", "temperature": "1.5", "top_p": "0.9", "seed": "7"}
    done = run("-m", "steermoe/chatty", *(word for pair in options.items() for word in ("-o", *pair)), PROMPT)
    assert done.exit_code == 0, done.output
    completion = expected(spec, max_new_tokens=40, temperature=1.5, top_p=0.9, seed=7)
    assert done.stdout == printable(completion.text) + "\n"
    assert completion.new_tokens == 40
    (logged,) = json.loads(run("logs", "--json", "-n", "1").stdout)
    assert (logged["input_tokens"], logged["output_tokens"]) == (len(PROMPT), 40)
    record = logged["response_json"]
    assert (record["domain"], record["seed"]) == (completion.as_dict("x")["domain"], 7)


def test_a_terminal_gets_no_control_characters(run, expected, vectors):
    text = expected(max_new_tokens=60, temperature=3.0, seed=1).text
    assert printable(text) != text
    options = ("-o", "max_new_tokens", "60", "-o", "temperature", "3", "-o", "seed", "1")
    assert run("-m", "steermoe/chatty", *options, PROMPT).stdout == printable(text) + "\n"


def test_python_values_pieces_and_a_text_that_is_left(model, vectors, expected, checkpoint, sessions):
    options = {"domain": {"sport": 0.5, "food": 1}, "vectors": str(vectors), "max_new_tokens": 12, "do_sample": False}
    pieces = list(model.prompt(PROMPT, **options))
    completion = expected(SteeringSpec(("sport=0.5", "food=1")), max_new_tokens=12, do_sample=False)
    assert "".join(pieces) == printable(completion.text)
    assert len(pieces) > 1
    left = iter(model.prompt(PROMPT, max_new_tokens=200))
    next(left)
    left.close()
    session = sessions._open[Opening(str(checkpoint))]
    assert model.prompt(PROMPT, max_new_tokens=3).text()
    assert session._live.running == 0


def test_a_system_prompt_and_turns_are_answered(model, expected):
    talk = model.conversation()
    first = talk.prompt("hello", system="be kind", max_new_tokens=9)
    answer = expected(chat=conversation("hello", "be kind"), text="hello", max_new_tokens=9)
    assert first.text() == printable(answer.text)
    second = talk.prompt("and now", max_new_tokens=9, seed=2)
    turns = (*conversation("hello", "be kind"), Message("assistant", first.text()), Message("user", "and now"))
    assert second.text() == printable(expected(chat=turns, text="and now", max_new_tokens=9, seed=2).text)
    alone = model.prompt("hello", chat="yes", max_new_tokens=9)
    assert alone.text() == printable(expected(chat=conversation("hello"), text="hello", max_new_tokens=9).text)


def test_event_loops(run, expected, vectors):
    model = llm.get_async_model("steermoe/chatty")

    async def both():
        options = {"vectors": str(vectors), "max_new_tokens": 8, "do_sample": False}
        asked = [model.prompt(PROMPT, domain=domain, **options) for domain in ("sport", "law")]
        return await asyncio.gather(*(one.text() for one in asked)), [(await one.usage()).output for one in asked]

    texts, counts = asyncio.run(both())
    for domain, text in zip(("sport", "law"), texts, strict=True):
        assert text == printable(expected(SteeringSpec((domain,)), max_new_tokens=8, do_sample=False).text)
    assert counts == [8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "cooking"}, "no vector 'cooking'"),
        ({"domain": "sport", "vectors": "nowhere"}, "there is no folder of vectors 'nowhere': name one"),
        ({"domain": "sport=much"}, "'much' is not a weight"),
        ({"strength": "much"}, "field 'strength' is 'much', expected a number"),
        ({"strength": "3"}, "it names no domain"),
        ({"force": "0-1"}, "write layer:expert, such as 12:5"),
        ({"temperature": "0"}, "for greedy decoding: -o do_sample false)"),
        ({"seed": "x"}, "option 'seed' is 'x', expected a whole number"),
        ({"chat": "maybe"}, "option 'chat' is 'maybe', expected true or false"),
        ({"thinking": "true"}, "-o thinking belongs to an answer: add -o chat true"),
        ({"domain": "sport", "max_new_tokens": "1"}, "it would reach none of 1 new tokens"),
        ({"max_new_tokens": "5000"}, "5000 more were asked for"),
        ({"domain": "sport", "active_experts": "9"}, "9 active experts are too many"),
    ],
)
def test_errors_are_one_line(run, vectors, options, message):
    options = {"vectors": str(vectors), **options}
    done = run("-m", "steermoe/chatty", *(word for pair in options.items() for word in ("-o", *pair)), PROMPT)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_messages_that_cannot_be_read(model, tiny_checkpoint):
    plain = plugin.SteeredModel("plain", {"model": str(tiny_checkpoint)})
    with pytest.raises(llm.ModelError, match="has no chat template, so it can't chat"):
        plain.prompt("hello", system="be kind").text()
    with pytest.raises(llm.ModelError, match="-o chat false continues one text, but there are 2 messages"):
        model.prompt("hello", system="be kind", chat=False).text()
    part = llm.parts.ToolResultPart(name="clock", output="12:00")
    with pytest.raises(llm.ModelError, match="a message holds a ToolResultPart"):
        model.prompt(messages=[llm.user("hello"), llm.tool_message(part)]).text()


def test_every_setting_is_an_option_and_explained(run):
    assert set(NAMES) <= set(llm_options.NAMES)
    assert set(llm_options.Options.model_fields) == set(llm_options.NAMES)
    shown = run("models", "--options", "-m", "steermoe/smollm2-moe").stdout
    for name in llm_options.NAMES:
        assert f"\n    {name}: " in shown
    assert "sport=0.7,food=0.3 mixes" in " ".join(shown.split())
    assert "repeat" not in shown


def test_llm_starts_without_anything_heavy():
    code = "import sys, llm; own = set(sys.modules); import steermoe.plugins.llm; print(*(set(sys.modules) - own))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "steermoe.plugins.llm" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "typer", "rich"})


def test_models_are_added_listed_and_removed(bare, checkpoint, tmp_path):
    assert bare("steermoe", "add", checkpoint).stdout == "steermoe/chatty\n"
    added = bare("steermoe", "add", checkpoint, "--name", "again", "--quantize", "int8")
    assert added.stdout == "steermoe/again\n"
    listed = json.loads(bare("steermoe", "list", "--json").stdout)
    assert list(listed) == ["steermoe/smollm2-moe", "steermoe/chatty", "steermoe/again"]
    assert listed["steermoe/again"]["quantize"] == "int8"
    assert bare("steermoe", "list").stdout.splitlines()[1] == f"steermoe/chatty: {checkpoint}"
    for arguments, message in (
        (("add", checkpoint), "there is a model 'chatty' already"),
        (("add", checkpoint, "--name", "a b"), "'a b' is no name for a model"),
        (("add", tmp_path / "nothing"), "nothing"),
        (("remove", "smollm2-moe"), "no model was added as 'smollm2-moe': there are chatty, again"),
    ):
        refused = bare("steermoe", *arguments)
        assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1), refused.output
        assert message in refused.stderr
    assert bare("steermoe", "remove", "steermoe/again").exit_code == 0
    assert "again" not in bare("models").stdout


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"x": 1}',
        '{"x": {"model": 3}}',
        '{"x": {"model": "a", "b": 1}}',
        '{"x": {"model": "a", "engine": "b"}}',
        '{"x": {"model": "a", "quantize": "int3"}}',
    ],
)
def test_a_damaged_file_of_models_stops_no_other_model(bare, tmp_path, content):
    (tmp_path / "steermoe.json").write_text(content)
    done = bare("models")
    assert done.exit_code == 0
    assert "steermoe/smollm2-moe" in done.stdout
    assert "steermoe.json' can't be read" in done.stderr
    refused = bare("steermoe", "list")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "steermoe.json' can't be read" in refused.stderr


def test_the_commands_of_the_page_run(run, home, checkpoint, vectors, monkeypatch):
    """Each line of docs/plugins.md, on the tiny model and with few tokens."""
    commands = [line for block in blocks("console") for line in block.splitlines() if "llm " in line]
    assert len(commands) == 14
    monkeypatch.setenv("STEERMOE_VECTORS", str(vectors))
    for command in commands:
        words = shlex.split(command.replace("smollm2-moe", "chatty").replace("PATH_OR_HUB_ID", str(checkpoint)))
        typed = None
        if "|" in words:
            _, typed, _ = words[: words.index("|") + 1]
            words = words[words.index("|") + 1 :]
        if words[1] == "chat":
            typed = "hello\nexit\n"
        is_prompt = words[1] in ("-m", "-c", "chat")
        done = run(*words[1:], *(("-o", "max_new_tokens", "4") if is_prompt else ()), input=typed)
        assert done.exit_code == 0, (command, done.output)
        assert done.output.strip() or words[1] in ("aliases", "steermoe"), command
    code = blocks("python")[0].replace("smollm2-moe", "chatty")
    exec(compile(code, "plugins.md", "exec"), {})
