"""What a chat does with each line: answers a message, or carries out a command. Reads no lines itself.

Answers go to stdout, all else to stderr. An error is one line there, and the chat goes on.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from steermoe.cli.options import check_steered, warn_beyond_safe_range, warn_unanswered
from steermoe.cli.terminal import commands, console
from steermoe.cli.terminal.answers import AnswerPrinter
from steermoe.engines.conversation import Conversation
from steermoe.engines.decoding import Stop
from steermoe.engines.request import Request
from steermoe.errors import SteerMoEError


class Talk:
    """A conversation at the command line.

    Args:
        conversation: what is said.
        json: print each answer as a JSON object.

    Attributes:
        failed: whether any line could not be done.
    """

    def __init__(self, conversation: Conversation, *, json: bool = False) -> None:
        self._conversation = conversation
        self._json = json
        self.failed = False

    def handle(self, line: str) -> bool:
        """Do what a line says; returns whether the chat goes on."""
        try:
            found = commands.parse(line)
            if isinstance(found, str):
                if found.strip():
                    self._answer(self._conversation.request(found))
                return True
            if found.name == "quit":
                return False
            try:
                getattr(self, f"_do_{found.name}")(found)
            except KeyboardInterrupt:
                if found.name == "retry":  # whose first Ctrl-C only ended the answer
                    raise
                console.note("stopped", "dim")
        except SteerMoEError as error:
            console.note(f"steermoe: {error}")
            self.failed = True
        return True

    def prompt(self) -> str:
        """What stands before the user's next message: how the answer will be steered."""
        plan = self._conversation.plan
        if plan is None:
            return "> "
        return f"({console.line(plan.vector.domain) if plan.vector is not None else 'forced experts'}) > "

    # ---- answers ----

    def _answer(self, request: Request, *, again: bool = False) -> None:
        assert request.chat is not None
        self._tell_dropped()
        if self._json:
            with console.working("Answering ..."), interruptible() as check:
                turn = self._conversation.answer(request, lambda text: check(), again=again)
            console.write_json(turn.as_dict(self._conversation.engine.name))
        else:
            printer = AnswerPrinter(request.chat, wraps=sys.stdout.isatty())

            def on_text(text: str) -> None:
                printer(text)
                check()

            with interruptible() as check:
                try:
                    turn = self._conversation.answer(request, on_text, again=again)
                finally:
                    printer.end()
        self._tell_ending(turn.completion)

    def _tell_dropped(self) -> None:
        """Say that the context is full, at each turn at which more is left out."""
        first, most = self._conversation.first, self._conversation.engine.context_length
        if first > self._dropped:
            turns = "turn is" if first == 1 else f"{first} turns are"
            console.note(
                f"steermoe: the context of {self._conversation.engine.name} holds {most} tokens: the oldest {turns} no "
                "longer sent to the model"
            )
        self._dropped = first

    _dropped = 0
    """Turns that were left out when it was last said."""

    def _tell_ending(self, completion: Any) -> None:
        report, reason = completion.report, completion.finish_reason
        warn_unanswered([completion])
        parts = [f"steered {report.tokens_steered} of {report.tokens_seen} tokens"] if report is not None else []
        if reason == "length":
            parts.append(f"cut off after {completion.new_tokens} tokens (--max-new-tokens)")
        elif reason == "interrupted":
            parts.append("stopped")
        if parts:
            console.note("; ".join(parts), "dim")
        if reason != "interrupted":
            check_steered([completion])

    # ---- commands ----

    def _do_domain(self, command: commands.Command) -> None:
        if command.argument:
            self._steer(domain=tuple(command.argument.split()))
        else:
            self._tell_steering()

    def _do_strength(self, command: commands.Command) -> None:
        if command.argument:
            self._steer(strength=None if command.argument == "own" else commands.read_number(command.argument))
        else:
            self._tell_steering()

    def _steer(self, **fields: Any) -> None:
        talk = self._conversation
        talk.change(steering=replace(talk.manner.steering, **fields))
        self._tell_steering()
        warn_beyond_safe_range([talk.plan])

    def _tell_steering(self) -> None:
        plan = self._conversation.plan
        if plan is None:
            console.note("not steered", "dim")
            return
        toward = "forced experts" if plan.vector is None else plan.vector.domain
        console.note(f"steered toward {toward} with {plan.formula}, strength {plan.strength:g}", "dim")

    def _do_compare(self, command: commands.Command) -> None:
        from steermoe.cli.terminal.columns import print_columns
        from steermoe.evaluation.comparison import compare_completions

        requests = self._conversation.both()
        with console.working("Generating 2 answers ..."):
            completions = self._conversation.engine.generate(requests, record=True)
        columns = compare_completions(completions)
        if self._json:
            for column in columns:
                console.write_json(column.as_dict(self._conversation.engine.name))
        else:
            print_columns(requests[0].prompt, columns)
        check_steered(completions)

    def _do_retry(self, command: commands.Command) -> None:
        request = self._conversation.again()
        console.note(f"seed {request.sampling.seed}", "dim")
        self._answer(request, again=True)

    def _do_undo(self, command: commands.Command) -> None:
        turn = self._conversation.undo()
        self._dropped = 0
        left = len(self._conversation.turns)
        console.note(f"took back: {turn.text[:60]} ({left} {'turn' if left == 1 else 'turns'} left)", "dim")

    def _do_system(self, command: commands.Command) -> None:
        if command.argument:
            self._conversation.change(system=None if command.argument == "none" else command.argument)
        system = self._conversation.manner.system
        console.note("no message of the system" if system is None else f"system: {system}", "dim")

    def _do_seed(self, command: commands.Command) -> None:
        sampling = self._conversation.manner.sampling
        if command.argument:
            sampling = replace(sampling, seed=commands.read_seed(command.argument))
            self._conversation.change(sampling=sampling)
        console.note(f"seed {sampling.seed}", "dim")

    def _do_save(self, command: commands.Command) -> None:
        if not command.argument:
            raise SteerMoEError("/save needs a file: write /save chat.txt, or /save chat.jsonl for all figures")
        path = Path(command.argument)
        with suppress(RuntimeError):  # there is no such home folder
            path = path.expanduser()
        self._conversation.save(path, replaces=command.forced)
        turns = len(self._conversation.turns)
        console.note(f"{turns} {'turn' if turns == 1 else 'turns'} in '{path}'", "dim")

    def _do_help(self, command: commands.Command) -> None:
        for line in commands.help_lines():
            console.note(line)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C end the answer, and the second the program. Yields what `on_text` has to call each time."""
    pressed = 0

    def press(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise Stop

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
