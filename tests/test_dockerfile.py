"""The Dockerfile agrees with the package and with what it says: no root, a key, a health check, only the wheel."""

import json
import re
from pathlib import Path

import typer

from steermoe.cli.app import app
from steermoe.serving.app import OPEN

ROOT = Path(__file__).parents[1]
STEPS = [
    step.split(maxsplit=1)
    for step in re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    if step and not step.startswith("#")
]


def arguments(name):
    """What follows each instruction of that name."""
    return [rest for instruction, rest in STEPS if instruction == name]


def test_it_takes_only_the_wheel_and_the_constraints():
    copied, installed = arguments("COPY")
    assert copied.split()[:-1] == ["constraints.txt", "dist/*.whl"]
    assert installed.startswith("--from=build ")
    everything, *admitted = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert (everything, admitted) == ("*", [f"!{name}" for name in copied.split()[:-1]])


def test_both_stages_have_one_python_that_the_package_accepts():
    images = {image.split()[0] for image in arguments("FROM")}
    (image,) = images
    assert re.fullmatch(r"python:3\.1[1-9]-slim-\w+", image)


def test_models_are_pulled_and_served_by_a_user_who_is_not_root():
    (user,) = arguments("USER")
    assert int(user) > 0
    names = [" ".join(step[:2]) for step in STEPS]
    assert names.index(f"USER {user}") < names.index("RUN steermoe models pull") < names.index("VOLUME /data")
    assert any(f"--uid {user} " in step for step in arguments("RUN"))


def test_the_hub_is_asked_for_nothing_and_an_empty_key_ends_the_start(run, monkeypatch):
    variables = dict(re.findall(r"(\w+)=(\S*)", " ".join(arguments("ENV"))))
    assert (variables["HF_HUB_OFFLINE"], variables["STEERMOE_API_KEY"]) == ("1", "")
    monkeypatch.setenv("STEERMOE_API_KEY", variables["STEERMOE_API_KEY"])
    (entry,) = arguments("ENTRYPOINT")
    program, *words = json.loads(entry)
    done = run(*words)
    assert (program, done.code) == ("steermoe", 1)
    assert (
        done.err == "steermoe: $STEERMOE_API_KEY is empty, which would let everyone in: set it to a key, or unset it\n"
    )


def test_the_server_listens_where_it_is_asked_how_it_is():
    (entry,), (check,), (port,) = arguments("ENTRYPOINT"), arguments("HEALTHCHECK"), arguments("EXPOSE")
    program, command, *options = json.loads(entry)
    assert (program, command) == ("steermoe", "serve")
    serve = typer.main.get_command(app).commands[command]
    assert set(options[::2]) <= {flag for parameter in serve.params for flag in parameter.opts}
    assert dict(zip(options[::2], options[1::2], strict=True)) == {"--host": "0.0.0.0", "--port": port}
    (path,) = re.findall(rf"http://127\.0\.0\.1:{port}(/\w+)'", check)
    assert path in OPEN
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
