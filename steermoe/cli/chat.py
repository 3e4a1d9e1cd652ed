"""`steermoe chat`: a conversation with a model, steered or not, at a terminal or through a pipe."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import on_demand
from steermoe.cli import options as o
from steermoe.cli.loading import ModelOptions
from steermoe.engines.request import Sampling

if TYPE_CHECKING:
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.spec import SteeringSpec

EXAMPLES = """Examples:

steermoe chat --domain food

steermoe chat --model smollm2-moe-q8_0.gguf -d sport=0.7 -d food=0.3 --system "Answer in one sentence."

echo "What is a good breakfast?" | steermoe chat -d food --json

printf '%s\\n' "Name a game." "/domain music" "/compare" "/save chat.jsonl" | steermoe chat -d sport
"""


@dataclass(frozen=True)
class ChatSampling(Sampling):
    """Answers may be longer than stories."""

    max_new_tokens: int = field(default=512, metadata={"help": "Maximum number of tokens of an answer."})


@o.spread
def chat(
    *,
    steering: o.Steering,
    vectors: o.VectorOptions,
    sampling: Annotated[ChatSampling, o.Group(o.SAMPLING)],
    model: ModelOptions,
    system: o.System = None,
    thinking: o.Thinking = None,
    json: o.Json = False,
) -> None:
    """Chat with a model by its chat template; /help lists the commands, and Ctrl-D ends the chat.

    In a pipe, each line is a message or a command, and each answer goes to stdout.
    """
    from steermoe.cli.terminal import console, lines

    vectors.check(steering)
    from steermoe.engines.conversation import PROBE
    from steermoe.engines.messages import conversation

    engine, resolver = on_demand.open_engine(
        model,
        vectors,
        [steering],
        system or "",
        check=lambda engine: engine.chat(conversation(PROBE, system), thinking),
    )
    from steermoe.cli.terminal.talk import Talk
    from steermoe.engines.conversation import Conversation, Manner
    from steermoe.steering.resolver import names_of

    def plan(spec: "SteeringSpec") -> "SteeringPlan | None":
        """The plan of a spec, whose vectors are built first if the model lacks them."""
        if spec.domain == steering.domain:
            return resolver.plan(spec)
        vectors.check(spec)
        wanted = on_demand.wish(vectors, names_of(spec), system or "")
        return vectors.resolver(engine, on_demand.files(model, engine, vectors, wanted)).plan(spec)

    talk = Talk(Conversation(engine, plan, Manner(steering, sampling, system, thinking)), json=json)
    o.warn_beyond_safe_range([plan(steering)])
    is_typed = lines.are_typed()
    if is_typed:
        console.note(f"Chatting with {engine.name}: /help lists the commands, Ctrl-D ends the chat", "dim")
    for line in lines.typed(talk.prompt) if is_typed else lines.piped():
        if not talk.handle(line):
            break
    model.compile_later(engine)
    if talk.failed and not is_typed:
        raise typer.Exit(1)
