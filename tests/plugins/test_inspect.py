"""Inspect's model provider, against a real server on a tiny model; skipped where Inspect is not installed."""

import re
import shlex
import socket
from functools import partial
from itertools import pairwise

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed: pip install 'steermoe[inspect]'")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")

import httpx
from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

from steermoe.plugins import inspect  # noqa: F401  (an environment that was made before the entry point)
from steermoe.serving.app import ServerOptions, Settings
from tests.support import served
from tests.support.pages import code_blocks, read_page

pytestmark = pytest.mark.filterwarnings("ignore")  # Inspect and its libraries warn in many ways
PAGE = read_page("docs/plugins.md")
OPENINGS = ("It rained all night.", "The old bus was late again.")
MODEL = "tiny-mixtral"

blocks = partial(code_blocks, PAGE)


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    engine = served.tiny_engine(tiny_checkpoint)
    vectors = tmp_path_factory.mktemp("served") / "vectors"
    served.write_vectors(vectors, engine.shape)
    settings = Settings(ServerOptions(port=0, api_keys=("secret",)), grace=1)
    with served.running(engine, vectors, settings=settings) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("STEERMOE_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("STEERMOE_API_KEY", "secret")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def asked(server, path, **body):
    """What the server answers."""
    answer = httpx.post(
        f"{server.url}/v1/{path}",
        json={"model": MODEL, "temperature": 0, "max_tokens": 12, **body},
        headers={"Authorization": "Bearer secret"},
        timeout=60,
    ).json()["choices"][0]
    return answer["text"] if path == "completions" else answer["message"]["content"]


def texts(model=f"steermoe/{MODEL}", **arguments):
    """What Inspect logs as the outputs of two samples."""
    task = Task(dataset=[Sample(input=one, target="x") for one in OPENINGS], solver=generate(), scorer=includes())
    (log,) = eval(task, model=model, model_args=arguments, max_tokens=12, temperature=0, display="none", log_dir="logs")
    assert log.status == "success", log.error
    assert log.eval.model_args == arguments
    return [sample.output.completion for sample in log.samples]


def test_answers_are_steered(server):
    steering = {"domain": "sport", "strength": 30}
    messages = [[{"role": "user", "content": one}] for one in OPENINGS]
    expected = [asked(server, "chat/completions", messages=one, steering=steering) for one in messages]
    assert texts(**steering) == expected
    assert expected != [asked(server, "chat/completions", messages=one) for one in messages]


def test_continuations_and_steering_by_name(server):
    expected = [asked(server, "completions", prompt=one, steering={"domain": "law"}) for one in OPENINGS]
    assert texts(chat=False, domain="law") == expected
    assert texts(f"steermoe/{MODEL}:law", chat=False) == expected
    assert expected != [asked(server, "completions", prompt=one) for one in OPENINGS]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nope", {}, f"has no model 'nope': it has {MODEL}, {MODEL}:biology"),
        (f"{MODEL}:", {}, "names no domain after its colon"),
        (MODEL, {"domian": "sport"}, "-M domian is no argument of steermoe: they are chat, domain, strength"),
        (MODEL, {"domain": "sport", "strength": "much"}, "field 'strength' is 'much', expected a number"),
        (MODEL, {"domain": "sport", "strength": "[/red]"}, r"field 'strength' is '\\\[/red\]', expected a number"),
        (MODEL, {"force": 725}, "field 'force' is 725, expected a list"),
        (MODEL, {"strength": 2}, "it names no domain"),
        (f"{MODEL}:law", {"domain": "sport"}, "and -M ask for steering: leave one of them out"),
        (MODEL, {"api_key": "wrong"}, "refuses to list its models: .*needs a key.*name a key in STEERMOE_API_KEY"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_sample(name, arguments, message):
    with pytest.raises(PrerequisiteError) as refused:
        get_model(f"steermoe/{name}", memoize=False, **arguments)
    assert re.search(message, str(refused.value.message))
    assert "\n" not in str(refused.value.message)


def test_a_server_that_is_away():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(PrerequisiteError) as refused:
        get_model(f"steermoe/{MODEL}", base_url=address, memoize=False)
    assert str(refused.value.message).startswith(f"no server answers at {address}: start one with `steermoe serve`")


def test_two_places_that_ask_for_steering():
    model = get_model(f"steermoe/{MODEL}", memoize=False, domain="sport")
    with pytest.raises(PrerequisiteError) as refused:
        model.api.completion_params(GenerateConfig(extra_body={"steering": "law"}), tools=False)
    assert str(refused.value.message).startswith("both -M and extra_body ask for steering")


def test_a_domain_without_a_vector_fails_the_task():
    task = Task(dataset=[Sample(input="hello", target="x")], solver=generate(), scorer=includes())
    (log,) = eval(task, model=f"steermoe/{MODEL}", model_args={"domain": "cooking"}, display="none", log_dir="logs")
    assert log.status == "error"
    assert "steering: no vector 'cooking'; there are biology, food" in log.error.message.replace("\\", "")


def test_the_page(tmp_path):
    (source,) = [block for block in blocks("python") if "inspect_ai" in block]
    (tmp_path / "openings.py").write_text(source)
    commands = [line for block in blocks("console") for line in block.splitlines() if line.startswith("inspect ")]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("smollm2-moe", MODEL))
        assert words[:3] == ["inspect", "eval", "openings.py"]
        given = dict(word.split("=", 1) for before, word in pairwise(words) if before == "-M")
        arguments = {name: {"false": False}.get(value, value) for name, value in given.items()}
        (log,) = eval(
            "openings.py",
            model=words[words.index("--model") + 1],
            model_args=arguments,
            max_tokens=6,
            display="none",
            log_dir="logs",
        )
        assert log.status == "success", log.error
        assert len(log.samples) == 2
