"""`steermoe verify`: checks of steering on this machine, as a report to paste into an issue."""

from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import loading
from steermoe.cli import options as o

if TYPE_CHECKING:
    from steermoe.evaluation.verification import Check

EXAMPLES = """Examples:

steermoe verify

steermoe verify --device cuda --json

steermoe verify --model ./my-model
"""
MARKS = {True: "passed", False: "FAILED", None: "not run"}


def verify(
    *,
    device: Annotated[
        str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. Default: as generate does.")
    ] = None,
    model: o.Model = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Check on this machine that steering does what it says, and print a report.

    Each formula against its equation, cached against uncached steps, texts together against alone, narrow types,
    compiled steps if there are any, speed. Exits with 1 if a check fails. The report can be pasted into an issue.
    """
    from steermoe.cli.terminal import console, tables
    from steermoe.errors import SteerMoEError

    if device is not None:
        check_device(device)

    def options(dtype: str) -> loading.ModelOptions:
        return loading.ModelOptions(model=model, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code)

    loaded = options("float32").load()
    from steermoe.evaluation.teacher_forcing import require_decoder
    from steermoe.evaluation.verification import Verification, facts, summary

    require_decoder(loaded)
    known = facts(loaded)
    if not json:
        tables.print_facts(known)
        console.say("")
    verification = Verification(loaded, lambda dtype: options(dtype).load(), lambda: options("auto").load())
    done: list[Check] = []
    with console.working("Checking ...") as update:
        for check in verification.run():
            done.append(check)
            update(f"Checking, {len(done)} done: {check.name}")
    passed, failed, not_run = summary(done)
    if json:
        from dataclasses import asdict

        console.write_json({**known, "checks": [asdict(check) for check in done], "passed": not failed})
    else:
        tables.print_table(
            ("check", "", "found", "expected", "seconds"),
            [(one.name, MARKS[one.passed], one.found, one.expected, f"{one.seconds:.1f}") for one in done],
            wrapping=3,
        )
        console.say(f"\n{passed} passed, {failed} failed, {not_run} not run")
    if failed:
        names = ", ".join(one.name for one in done if one.passed is False)
        raise SteerMoEError(f"{failed} of {len(done)} checks failed ({names}): please report it with this output")


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not know or have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        from steermoe.errors import reason

        raise typer.BadParameter(
            f"'{device}' can't be used here: {reason(error)}; expected cpu, or a device that torch has here",
            param_hint="--device",
        ) from error
