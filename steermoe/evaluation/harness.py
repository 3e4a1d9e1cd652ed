"""Tasks of EleutherAI's lm-evaluation-harness, unsteered and steered, with paired intervals.

The harness downloads a task's data and the files of its prompts; a task of your own may read local files.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steermoe.errors import CorpusError, SteerMoEError, UnsupportedModel, quoted
from steermoe.evaluation.bootstrap import bootstrap
from steermoe.models.loading import LoadedModel
from steermoe.steering.plans import SteeringPlan

STEERED, UNSTEERED = "steered", "unsteered"


@dataclass(frozen=True)
class Tasks:
    """Which tasks are run, and how.

    Attributes:
        names: of tasks, groups or tags; patterns such as "arc_*" too.
        limit: most documents of each task; None for all.
        fewshot: examples in each prompt; None for the task's own number.
        folder: of further tasks, as YAML files.
        chat: apply the model's chat template.
        batch_size: texts generated at once.
    """

    names: tuple[str, ...]
    limit: int | None = None
    fewshot: int | None = None
    folder: Path | None = None
    chat: bool = False
    batch_size: int = 8

    def find(self) -> tuple[list[str], Any]:
        """The names of the tasks that are meant, and the harness's own list of tasks.

        Raises:
            SteerMoEError: the harness is missing, or a name is unknown.
        """
        if self.folder is not None and not self.folder.is_dir():
            raise SteerMoEError(f"'{self.folder}' is no folder of tasks: name one that holds their YAML files")
        return _found(self.names, self.folder)


@functools.lru_cache(maxsize=4)
def _found(names: tuple[str, ...], folder: Path | None) -> tuple[list[str], Any]:
    """As `Tasks.find`. The harness reads thousands of files to know its own tasks: only if the folder does not do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SteerMoEError(f"this needs lm-eval ({error}): pip install 'steermoe[lm-eval]'") from error
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        found = [own.match_tasks([name]) for name in names]
        several = {*own.all_groups, *own.all_tags}  # which may hold tasks of the harness
        if all(found) and not several.intersection(_once(found)):
            return _once(found), own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    found = [manager.match_tasks([name]) for name in names]
    for name, matching in zip(names, found, strict=True):
        if not matching:
            raise SteerMoEError(
                f"the harness has no task '{quoted(name)}': `lm-eval ls tasks` lists them, and --tasks-folder names a "
                "folder with your own"
            )
    return _once(found), manager


def _once(found: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for matching in found for name in matching))


def run_tasks(
    loaded: LoadedModel,
    plan: SteeringPlan | None,
    tasks: Tasks,
    notify: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Run tasks unsteered and, with a plan, steered.

    Args:
        loaded: the model; no steering may be attached to it.
        plan: how it is steered; None runs the tasks unsteered only.
        tasks: which ones.
        notify: called with a short description of each step.

    Returns:
        `model`, `plan`, `harness` (its version) and `tasks`: for each task `documents` and `metrics`, each with
        `unsteered`, `steered` and their paired `difference`, an interval over documents where the metric is a mean.

    Raises:
        SteerMoEError: the harness is missing, a name is unknown, or a task can't be run. UnsupportedModel: an
            encoder-decoder.
    """
    if loaded.model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{loaded.name} is an encoder-decoder: the harness steers models that continue a text")
    names, manager = tasks.find()
    found: dict[str, Any] = {}
    for condition, own in ((UNSTEERED, None), *(((STEERED, plan),) if plan else ())):
        notify(f"{condition}: {', '.join(names)}")
        found[condition] = _run(loaded, own, names, manager, tasks)
    of_tasks = {
        name: {
            "documents": found[UNSTEERED]["n-samples"][name]["effective"],
            "metrics": _compared({condition: results["samples"][name] for condition, results in found.items()},
                                 {condition: results["results"][name] for condition, results in found.items()}),
        }
        for name in found[UNSTEERED]["samples"]
    }  # fmt: skip
    return {
        "model": loaded.name,
        "plan": None if plan is None else plan.as_dict(),
        "harness": _version(),
        "tasks": of_tasks,
    }


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _run(
    loaded: LoadedModel, plan: SteeringPlan | None, names: Sequence[str], manager: Any, tasks: Tasks
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from steermoe.evaluation.harness_model import SteeredLM

    try:
        with _quiet():
            results: dict[str, Any] = simple_evaluate(
                SteeredLM(loaded, plan, tasks.batch_size),
                tasks=list(names),
                num_fewshot=tasks.fewshot,
                limit=tasks.limit,
                apply_chat_template=tasks.chat,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
    except SteerMoEError:
        raise
    except Exception as error:  # whatever a task's file, its data or the network may raise
        lines = str(error).strip().splitlines() or [""]
        raise CorpusError(
            f"task '{', '.join(names)}' can't be run ({type(error).__name__}: {quoted(lines[0])}): check its file and "
            "its data, which the harness downloads unless they are local"
        ) from error
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the harness prints goes to stderr, and of what it logs only errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _compared(samples: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]]) -> Any:
    """Of one task: each metric by condition, and the difference.

    Args:
        samples: by condition, what the harness records of each document and filter.
        results: by condition, its own figures, such as {"acc,none": 0.5}.
    """
    metrics = {}
    for key, value in results[UNSTEERED].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        row: dict[str, Any] = {condition: float(found[key]) for condition, found in results.items()}
        if STEERED in results:
            row["difference"] = _difference(
                _values(samples[STEERED], metric, filter_name),
                _values(samples[UNSTEERED], metric, filter_name),
                row[STEERED] - row[UNSTEERED],
            )
        metrics[metric if filter_name == "none" else key] = row
    return metrics


def _values(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> dict[Any, float] | None:
    """A metric of each document; None if it is not a number there, such as the parts of a perplexity."""
    own = {sample["doc_id"]: sample.get(metric) for sample in samples if sample.get("filter", "none") == filter_name}
    if not own or not all(isinstance(value, int | float) for value in own.values()):
        return None
    return {document: float(value) for document, value in own.items() if value is not None}


def _difference(steered: dict[Any, float] | None, unsteered: dict[Any, float] | None, of_means: float) -> Any:
    """With an interval over documents, if the metric is the mean of theirs."""
    if steered is None or unsteered is None or steered.keys() != unsteered.keys():
        return {"mean": of_means}
    found = bootstrap(np.array([steered[document] - unsteered[document] for document in steered]))
    if found is None or abs(found.mean - of_means) > 1e-6:
        return {"mean": of_means}
    return {"mean": found.mean, "low": found.low, "high": found.high, "documents": found.openings}


TITLES = ("task", "documents", "metric", UNSTEERED, STEERED, "difference")


def table_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows for `TITLES`."""
    rows = []
    for name, task in found["tasks"].items():
        for metric, row in task["metrics"].items():
            cells = [f"{row[condition]:.3f}" if condition in row else "" for condition in (UNSTEERED, STEERED)]
            difference = row.get("difference")
            shown = "" if difference is None else f"{difference['mean']:+.3f}"
            if difference is not None and "low" in difference:
                shown += f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
            rows.append([name, str(task["documents"]), metric, *cells, shown])
    return rows
