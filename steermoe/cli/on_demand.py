"""Vectors that a model lacks are built before a command needs them; the work and its progress are shown on stderr.

vLLM can't record routing: for it the model is loaded in transformers first, and given up before vLLM starts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steermoe.cli.loading import ModelOptions, pull_if_needed
from steermoe.cli.options import TopicOptions, VectorOptions
from steermoe.steering.spec import NO_DOMAIN

if TYPE_CHECKING:
    from steermoe.engines.engine import Engine
    from steermoe.evaluation.provision import Wish
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.resolver import PlanResolver
    from steermoe.steering.spec import SteeringSpec


AnyModel = TypeVar("AnyModel", bound=ModelOptions)


def wish(vectors: VectorOptions, names: Iterable[str], text: str = "", *, calibrated: bool = True) -> "Wish":
    """What a command needs: vectors of these names, from texts in the language of `text` unless an option says."""
    from steermoe.discovery.packaged import language_of
    from steermoe.evaluation.provision import Wish

    language = vectors.language or language_of(text)
    return Wish(tuple(names), language, vectors.vectors, vectors.any_model, calibrated)


def open_engine(
    model: ModelOptions,
    vectors: VectorOptions,
    specs: "Sequence[SteeringSpec]",
    text: str,
    topics: TopicOptions | None = None,
    check: "Callable[[Engine], object]" = lambda runner: None,
) -> "tuple[Engine, PlanResolver]":
    """Open a model with the vectors that specs name, and what turns the specs into plans.

    Args:
        model: which model.
        vectors: where vectors are looked for, and whether they may be built.
        specs: what will be steered.
        text: the prompt, which decides the language.
        topics: what else the specs name: topics in words.
        check: raises if the model can't do what is asked for, before anything is built for it.
    """
    from steermoe.steering.resolver import names_of

    wanted = wish(vectors, (name for spec in specs for name in names_of(spec)), text)
    built = before_opening(model, vectors, wanted, topics)
    runner = with_active_experts(model, specs).open()
    check_tags(runner, specs)
    check(runner)
    warn_of_script(runner.shape, text)
    return runner, vectors.resolver(runner, built | files(model, runner, vectors, wanted, topics))


def with_active_experts(model: AnyModel, specs: "Iterable[SteeringSpec]") -> AnyModel:
    """The options, with the number of experts that all specs ask for, if there is one: llama.cpp loads a model so."""
    numbers = {spec.active_experts for spec in specs if spec.domain != (NO_DOMAIN,)}
    return replace(model, active_experts=numbers.pop()) if len(numbers) == 1 else model


def check_tags(runner: "Engine", specs: "Iterable[SteeringSpec]") -> None:
    """Raise if specs follow tags that the model lacks, before anything is built for them."""
    for spec in specs:
        if not spec.is_unsteered and spec.strength != 0:
            runner.tags.check(spec.positions, spec.think_tags)


def before_opening(
    model: ModelOptions, vectors: VectorOptions, wanted: "Wish", topics: TopicOptions | None = None
) -> dict[str, Path]:
    """For an engine that can't record routing: build what is missing, in transformers; else do nothing."""
    topics = topics or TopicOptions()
    if model.chosen != "vllm" or not (topics.topic or any(map(vectors.can_build, wanted.domains))):
        return {}
    import gc
    import os

    from steermoe.cli.terminal import console
    from steermoe.evaluation.provision import known_file, lacking
    from steermoe.evaluation.topic_vectors import check_topics_there, lacking_topics, topic_files
    from steermoe.models.description import describe

    pull_if_needed(model.model)
    shape = describe(model.model, trust_remote_code=model.trust_remote_code).shape
    asked = topics.wish(vectors)
    if vectors.no_build:
        check_topics_there(shape, asked)
    if not lacking(shape, wanted) and not lacking_topics(shape, asked):
        return known_file(shape, wanted) | topic_files(shape, asked)
    console.note(f"steermoe: vLLM can't record routing: {shape.name} is loaded in transformers first")
    loaded = model.load()
    found = files_of(loaded, vectors, wanted, topics)
    del loaded
    gc.collect()
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # torch has started its threads here
    return found


def files(
    model: ModelOptions,
    runner: "Engine",
    vectors: VectorOptions,
    wanted: "Wish",
    topics: TopicOptions | None = None,
) -> dict[str, Path]:
    """The files of the vectors that were built on demand, after building what is missing.

    Raises:
        SteerMoEError: a vector is missing and --no-build is given, or as of `provide`.
    """
    return {} if model.chosen == "vllm" else files_of(getattr(runner, "loaded", runner), vectors, wanted, topics)


def files_of(
    source: Any, vectors: VectorOptions, wanted: "Wish", topics: TopicOptions | None = None
) -> dict[str, Path]:
    """As `files`, for a model whose routing can be recorded."""
    from steermoe.cli.terminal import console
    from steermoe.evaluation.provision import check_there, known_file, provide

    if vectors.no_build:
        check_there(source.shape, wanted)
        return known_file(source.shape, wanted) | _topic_files(source, vectors, topics)
    return provide(source, wanted, console) | _topic_files(source, vectors, topics)


def _topic_files(source: Any, vectors: VectorOptions, topics: TopicOptions | None) -> dict[str, Path]:
    """The files of topics' vectors, after building what is missing, if that is allowed."""
    if topics is None or not topics.topic:
        return {}
    from steermoe.cli.terminal import console
    from steermoe.evaluation.topic_vectors import check_topics_there, provide_topics, topic_files

    wanted = topics.wish(vectors)
    if vectors.no_build:
        check_topics_there(source.shape, wanted)
        return topic_files(source.shape, wanted)
    return provide_topics(source, wanted, console)


def warn_of_script(shape: "RoutingShape", text: str) -> None:
    """Warn that the default model knows only English, if a prompt is in another script."""
    from steermoe.cli.terminal.console import note
    from steermoe.discovery.packaged import is_latin
    from steermoe.models.default.pull import DEFAULT_MODEL

    if shape.is_named(DEFAULT_MODEL) and not is_latin(text):
        note(
            f"steermoe: {DEFAULT_MODEL} was trained on English, and this prompt is in another script: name a model "
            "that knows its language with --model"
        )
