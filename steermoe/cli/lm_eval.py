"""`steermoe lm-eval`: tasks of EleutherAI's lm-evaluation-harness, unsteered and steered."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from steermoe.cli import loading, on_demand
from steermoe.cli import options as o
from steermoe.steering.spec import SteeringSpec

EXAMPLES = """Examples:

steermoe lm-eval -t arc_easy --domain biology

steermoe lm-eval -t professional_law -t arc_easy --domain law --positions all --limit 100

steermoe lm-eval -t my_task --tasks-folder tasks --domain sport --json
"""
TASKS = "Tasks"


@o.spread
def lm_eval(
    *,
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", help="Task, group or pattern of the harness; repeat for several."),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most documents of each task. Default: all.", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt. Default: the task's own.", rich_help_panel=TASKS)
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder of further tasks, as YAML files.", rich_help_panel=TASKS)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to prompts.", rich_help_panel=TASKS)
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Texts generated at once.", rich_help_panel=TASKS)
    ] = 8,
    steering: Annotated[SteeringSpec, o.Group(o.STEERING, without=("positions", "think_tags"))],
    positions: Annotated[
        Literal["last-prompt", "all", "prompt", "generated"],
        typer.Option(
            help="Tokens to steer. last-prompt: those that decide the continuation, the prompt's last one and the "
            "continuation; generated: without the prompt's last one, so that a continuation of one token is unsteered.",
            rich_help_panel=o.STEERING,
        ),
    ] = "last-prompt",
    vectors: o.VectorOptions,
    model: loading.Loaded,
    json: o.Json = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness, unsteered and steered, and compare them.

    The harness is installed by `pip install 'steermoe[lm-eval]'`. It downloads the data of its tasks; a task of your
    own may read local files (--tasks-folder).
    """
    from dataclasses import replace

    from steermoe.cli.terminal import console, tables
    from steermoe.evaluation.harness import TITLES, Tasks, run_tasks, table_rows
    from steermoe.steering.resolver import names_of

    tasks = Tasks(tuple(task), limit, num_fewshot, tasks_folder, chat, batch_size)
    spec = replace(steering, positions=positions)
    vectors.check(spec)
    tasks.find()
    loaded = model.load()
    built = on_demand.files_of(loaded, vectors, on_demand.wish(vectors, names_of(spec)))
    plan = vectors.resolver(loaded.shape, built).plan(spec)
    o.warn_beyond_safe_range([plan])
    with console.working("Running the tasks ...") as show:
        found = run_tasks(loaded, plan, tasks, show)
    if json:
        console.write_json(found)
    else:
        tables.print_table(TITLES, table_rows(found))
