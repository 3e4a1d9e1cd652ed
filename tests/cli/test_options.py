"""Dataclasses as options: the options that typer makes, the values that the command gets, and complete groups."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from steermoe.cli import options as o
from steermoe.cli.app import app
from steermoe.cli.compare import FormulaName
from steermoe.engines.request import Sampling
from steermoe.formulas import FORMULAS
from steermoe.steering.spec import SteeringSpec


@dataclass(frozen=True)
class Plain:
    """As the library defines options: without typer."""

    colour: Literal["red", "green"] = field(default="red", metadata={"help": "Which colour."})
    names: tuple[str, ...] = field(default=(), metadata={"help": "Names.", "flags": ("--name", "-n")})
    loud: bool = field(default=True, metadata={"help": "How loud."})
    size: int | None = field(default=None, metadata={"help": "How large."})
    hidden: int = 7


@dataclass(frozen=True)
class Annotated_:
    """As commands define options."""

    weight: Annotated[float, typer.Option("--weight", "-w", min=0, help="How heavy.")]
    tries: Annotated[int, typer.Option(help="How often.")] = 3
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.tries > 9:
            raise typer.BadParameter("too often")


@pytest.fixture
def got():
    return {}


@pytest.fixture
def invoke(got):
    tool = typer.Typer(rich_markup_mode=None)

    @tool.command()
    @o.spread
    def command(
        *,
        path: Annotated[str, typer.Argument(metavar="PATH", help="Where.")],
        plain: Annotated[Plain, o.Group("Look", without=("size",))],
        other: Annotated_,
        json: o.Json = False,
    ) -> None:
        """What it does."""
        got.update(path=path, plain=plain, other=other, json=json)

    runner = CliRunner()
    return lambda *arguments: runner.invoke(tool, arguments)


def test_missing_options_keep_the_defaults_of_the_dataclass(invoke, got):
    assert invoke("here", "-w", "2").exit_code == 0
    assert got == {"path": "here", "plain": Plain(), "other": Annotated_(2.0), "json": False}


def test_flags_choices_and_repeated_options_reach_their_fields(invoke, got):
    result = invoke(
        "here", "-w", "2", "--colour", "green", "--no-loud", "-n", "a", "--name", "b", "--tries", "4", "--json"
    )
    assert result.exit_code == 0, result.output
    assert got == {
        "path": "here",
        "plain": Plain("green", ("a", "b"), False),
        "other": Annotated_(2.0, 4),
        "json": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["here"], "--weight"),
        (["-w", "2"], "PATH"),
        (["here", "-w", "-1"], "-w"),
        (["here", "-w", "1", "--colour", "blue"], "--colour"),
        (["here", "-w", "1", "--size", "3"], "--size"),
        (["here", "-w", "1", "--hidden", "3"], "--hidden"),
        (["here", "-w", "1", "--tries", "10"], "too often"),
    ],
)
def test_wrong_usage_is_refused(invoke, got, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not got


def test_help_lists_options_in_the_order_of_parameters_and_fields(invoke):
    shown = invoke("--help").output
    assert "What it does." in shown
    names = ("PATH", "--colour", "--name", "--loud / --no-loud", "--weight", "--tries", "--json")
    places = [shown.index(name) for name in names]
    assert places == sorted(places)
    assert "[default: red]" in shown
    assert "red|green" in shown
    assert "--options" not in shown


def option_names(command):
    return {parameter.name for parameter in get_command(app).commands[command].params}


@pytest.mark.parametrize("command", ["generate", "compare", "batch"])
def test_every_field_of_steering_and_sampling_is_an_option(command):
    described = {one.name for kind in (SteeringSpec, Sampling) for one in fields(kind) if "help" in one.metadata}
    assert {"domain", "ban", "temperature"} < described <= option_names(command)


def test_options_of_a_group_are_under_its_heading():
    panels = {parameter.name: parameter.rich_help_panel for parameter in get_command(app).commands["batch"].params[1:]}
    assert (panels["strength"], panels["top_p"], panels["dtype"], panels["ray"]) == (
        "Steering",
        "Sampling",
        "Model",
        "Ray",
    )


def test_compare_offers_every_formula():
    assert [one.value for one in FormulaName] == list(FORMULAS)
