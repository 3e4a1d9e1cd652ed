"""What makes the steered text again: a command, Python and a request to the server. Runs nothing."""

import json
import shlex
from dataclasses import fields
from typing import Any

from steermoe.serving.page.settings import Settings
from steermoe.steering.spec import SteeringSpec, parse_domain

ADDRESS = "http://127.0.0.1:8000"


def command(settings: Settings, spec: SteeringSpec, model: str) -> str:
    """`steermoe compare` with these settings, which writes both texts."""
    options = [f"--domain {shlex.quote('+'.join(spec.domain) or 'none')}"]
    given = _given(spec)
    options += [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items()]
    options += _sampling_options(settings)
    options += ["--chat"] if settings.is_chat else []
    options += [f"--model {shlex.quote(model)}"]
    return " \\\n  ".join(["steermoe compare", *options, f"-- {shlex.quote(settings.prompt)}"])


def _sampling_options(settings: Settings) -> list[str]:
    options = [f"--max-new-tokens {settings.tokens}", f"--seed {settings.seed}"]
    options.append(f"--temperature {settings.temperature:g}" if settings.temperature else "--no-do-sample")
    return [*options, *([f"--min-p {settings.min_p:g}"] if settings.min_p else [])]


def python(settings: Settings, spec: SteeringSpec, model: str) -> str:
    """A program that writes the steered text."""
    domains = list(map(parse_domain, spec.domain))
    lines = ["import steermoe", "", f"loaded = steermoe.load({model!r})", "engine = steermoe.HFEngine(loaded)"]
    plan = "None"
    if domains:
        vectors = ", ".join(
            f"(steermoe.load_vector({name!r}, model=loaded.model), {weight:g})" for name, weight in domains
        )
        lines.append(f"vector = steermoe.mix([{vectors}])")
        values = {**spec.plan_fields(), "schedule": spec.schedule}
        given = [f"{name}={values[name]!r}" for name in _given(spec)]
        lines.append(f"plan = steermoe.plan_for(vector, {', '.join(given)})")
        plan = "plan"
    sampling = [f"max_new_tokens={settings.tokens}", f"seed={settings.seed}"]
    sampling.append(f"temperature={settings.temperature:g}" if settings.temperature else "do_sample=False")
    sampling += [f"min_p={settings.min_p:g}"] if settings.min_p else []
    lines.append(f"sampling = steermoe.Sampling({', '.join(sampling)})")
    chat = ""
    if settings.is_chat:
        lines.insert(1, "from steermoe.engines.messages import conversation")
        chat = f", chat=engine.chat(conversation({settings.prompt!r}))"
    lines.append(f"request = steermoe.Request({settings.prompt!r}, {plan}, sampling{chat})")
    lines += ["(completion,) = engine.generate([request])", "print(completion.text)"]
    return "\n".join(lines)


def curl(settings: Settings, spec: SteeringSpec, model: str, address: str = ADDRESS) -> str:
    """A request for the steered text to `steermoe serve`."""
    body: dict[str, Any] = {"model": model}
    if settings.is_chat:
        body["messages"] = [{"role": "user", "content": settings.prompt}]
    else:
        body["prompt"] = settings.prompt
    body |= {"max_tokens": settings.tokens, "temperature": settings.temperature, "seed": settings.seed}
    body |= {"min_p": settings.min_p} if settings.min_p else {}
    if spec.domain:
        body["steering"] = {"domain": dict(map(parse_domain, spec.domain)), **_given(spec)}
    path = "/v1/chat/completions" if settings.is_chat else "/v1/completions"
    return f"curl {address}{path} --json {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def _given(spec: SteeringSpec) -> dict[str, Any]:
    """The fields of a spec that differ from their defaults, but for its domains."""
    if not spec.domain:
        return {}
    return {
        one.name: value
        for one in fields(spec)
        if one.name != "domain" and (value := getattr(spec, one.name)) != one.default
    }
