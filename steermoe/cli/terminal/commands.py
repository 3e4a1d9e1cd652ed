"""The commands of a chat: how they are written, and what they are. Knows no terminal and no model."""

import math
from dataclasses import dataclass
from difflib import get_close_matches

from steermoe.errors import GenerationError

COMMANDS = {
    "domain": ("NAME=WEIGHT ... or none", "steer toward a domain or a mixture from now on; alone, say what is steered"),
    "strength": ("X or own", "set the strength c; own is the vector's; alone, say what it is"),
    "compare": ("", "answer the last message again, unsteered and steered, side by side"),
    "retry": ("", "answer the last message again, with the next seed"),
    "undo": ("", "take back the last message and its answer"),
    "system": ("TEXT or none", "set the message of the system; none is the chat template's own"),
    "seed": ("N", "set the seed; alone, say what it is"),
    "save": ("FILE", "save the chat: .jsonl with all figures, else text; /save! replaces a file"),
    "help": ("", "list the commands"),
    "quit": ("", "end the chat; so does Ctrl-D"),
}
"""What follows each command, and what it does."""
HIDDEN = {"exit": "quit"}
BARE = tuple(name for name, (follows, _) in COMMANDS.items() if not follows)


@dataclass(frozen=True)
class Command:
    """A command as it was written.

    Attributes:
        argument: what follows the name, without spaces around it.
        forced: whether the name ends with an exclamation mark.
    """

    name: str
    argument: str = ""
    forced: bool = False


def parse(line: str) -> "Command | str":
    """The command in a line, or the message; a message that begins with a slash is written with two.

    Raises:
        GenerationError: a command that does not exist, or one with too much after it.
    """
    if not line.startswith("/"):
        return line
    if line.startswith("//"):
        return line[1:]
    written, _, argument = line[1:].partition(" ")
    name = written.removesuffix("!").lower()
    name = HIDDEN.get(name, name)
    if name not in COMMANDS or (written.endswith("!") and name != "save"):
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
        rule = "a message that starts with / is written with //"
        raise GenerationError(f"/{written[:40]} is no command: {hint} ({rule})")
    if name in BARE and argument.strip():
        raise GenerationError(f"/{name} takes nothing after it, not '{argument.strip()[:40]}'")
    return Command(name, argument.strip(), written.endswith("!"))


def read_number(text: str) -> float:
    """A finite number, such as a strength.

    Raises:
        GenerationError: it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GenerationError(f"/strength {text[:40]}: that is no number; write one, such as /strength 4, or own")
    return number


def read_seed(text: str) -> int:
    """A whole number, 0 or more.

    Raises:
        GenerationError: it is none.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(2**63)):
        raise GenerationError(f"/seed {text[:40]}: that is no seed; write a whole number, such as /seed 1")
    return int(text)


def help_lines() -> list[str]:
    """One line for each command."""
    written = {name: f"/{name} {follows}".rstrip() for name, (follows, _) in COMMANDS.items()}
    width = max(map(len, written.values()))
    return [f"{written[name]:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
