"""A command, Python and curl that make the steered text again: each is read back, and comes to the same steering."""

import json
import shlex

import pytest

import steermoe
from steermoe.serving.page import exports
from steermoe.serving.page.settings import Settings
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import read_spec
from steermoe.vectors.file import write_vector

PROMPT = 'It\'s "Milo" & $HOME; `x`\\ \n--end'
PLAIN = Settings(PROMPT, amounts={"sport": 1.0}, tokens=6, seed=3)
CAUTIOUS = Settings("Milo", amounts={"sport": 1.0}, tokens=6, temperature=1.5, min_p=0.25)
FULL = Settings(
    "-d food",
    amounts={"sport": 0.5, "food": -0.25},
    strength=0.5,
    formula="additive",
    scale="paper",
    positions="all",
    schedule="decay:40",
    layers="1-2",
    tokens=6,
    temperature=0.0,
)


@pytest.fixture
def resolver(bare_search_path, make_vector, tiny_model):
    for domain in ("sport", "food"):
        write_vector(
            make_vector(domain), bare_search_path / "steering_vectors" / "tiny-mixtral" / f"{domain}.safetensors"
        )
    return PlanResolver(tiny_model.shape)


@pytest.mark.parametrize("settings", [PLAIN, CAUTIOUS, FULL, Settings(PROMPT, tokens=6)])
def test_the_command_writes_the_same_text_as_the_program(settings, resolver, run, tiny_checkpoint, capsys):
    spec = settings.spec(lambda domain: 4.0)
    command = exports.command(settings, spec, str(tiny_checkpoint))
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["steermoe", "compare"]
    result = run("compare", "--json", *words[2:])
    assert result.code == 0, result.err
    texts = [json.loads(line)["text"] for line in result.out.splitlines()]

    program = exports.python(settings, spec, str(tiny_checkpoint))
    exec(compile(program, "program", "exec"), {})
    assert capsys.readouterr().out == texts[-1] + "\n"


@pytest.mark.parametrize("settings", [PLAIN, CAUTIOUS, FULL])
def test_the_request_comes_to_the_same_plan(settings, resolver):
    spec = settings.spec(lambda domain: 4.0)
    words = shlex.split(exports.curl(settings, spec, "tiny", "http://host:1"))
    assert words[:3] == ["curl", "http://host:1/v1/completions", "--json"]
    body = json.loads(words[3])
    assert body["prompt"] == settings.prompt
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (6, settings.seed, settings.temperature)
    assert body.get("min_p", 0.0) == settings.min_p
    assert resolver.plan(read_spec(body["steering"])).as_dict() == resolver.plan(spec).as_dict()


def test_a_message_is_answered_by_all_three():
    settings = Settings("Hello", is_chat=True)
    spec = settings.spec(lambda domain: 4.0)
    assert "--chat" in exports.command(settings, spec, "m")
    assert "steering" not in exports.curl(settings, spec, "m")
    assert '"messages": [{"role": "user", "content": "Hello"}]' in exports.curl(settings, spec, "m")
    assert "chat=engine.chat(conversation('Hello'))" in exports.python(settings, spec, "m")
    assert steermoe.Request
