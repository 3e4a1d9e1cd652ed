"""What goes into an engine and what comes out: a request, its sampling, its completion. Knows no engine."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from steermoe.errors import GenerationError, SteeringError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from steermoe.engines.messages import Chat
    from steermoe.engines.trace import TokenTrace, Trace
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.report import SteeringReport

MOST_SCALING = 1e9
"""The largest temperature or penalty; 1 / 1e9 is the smallest. Scores times this stay finite."""
MOST_PENALTY = 2.0
"""The largest presence or frequency penalty, as in OpenAI's protocol."""
LISTS = ("force", "ban")
"""Fields of a plan that a completion leaves out, since lists can be long; stories have them at the end."""

UNREACHED = {
    "thinking": "none of them inside the model's think tags that was to be steered",
    "answer": "before any token of an answer that was to be steered",
    "tool-calls": "none of them inside a tool call that was to be steered",
}
"""Why no token of a text was steered, by the positions that depend on its tags."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked, by transformers' own names; a field with "help" is a command-line option.

    Attributes:
        top_k, top_p: 0 and 1.0 turn them off.
        min_p: tokens less likely than this share of the likeliest one's probability are never drawn (Nguyen et al.,
            2407.01082); 0 turns it off, 1 leaves the likeliest. After temperature, and after top-k and top-p, as in
            transformers; in vLLM before these two, so top-p then counts what min-p leaves.
        seed: a row's text depends on its own seed, not on the rows beside it.

    Raises:
        GenerationError: a value outside its range.
    """

    max_new_tokens: int = field(default=120, metadata={"help": "Maximum number of tokens to generate."})
    min_new_tokens: int = 0
    do_sample: bool = field(default=True, metadata={"help": "Sample the next token, or take the likeliest."})
    temperature: float = field(
        default=0.7, metadata={"help": "Below 1 sharpens, above 1 flattens the distribution of the next token."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens with this total probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0 for all."})
    min_p: float = field(
        default=0.0,
        kw_only=True,
        metadata={"help": "Sample from tokens with at least this share of the likeliest one's probability; 0 for all."},
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Values above 1 discourage repetition."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same text."})

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("max_new_tokens", 1 <= self.max_new_tokens < 2**31, "1 or more, below 2**31"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            (
                "temperature",
                1 / MOST_SCALING <= self.temperature <= MOST_SCALING,
                f"above 0, {1 / MOST_SCALING:g} to {MOST_SCALING:g} (for greedy decoding: --no-do-sample)",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "0 to 2**31 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition_penalty",
                1 / MOST_SCALING <= self.repetition_penalty <= MOST_SCALING,
                f"above 0, {1 / MOST_SCALING:g} to {MOST_SCALING:g}",
            ),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        ):
            if not is_right:
                raise GenerationError(f"{name} {getattr(self, name)} is out of range: expected {expected}")

    @property
    def penalties(self) -> tuple[float, float]:
        """What is subtracted from the scores of tokens that were generated: once each, and for each time."""
        return 0.0, 0.0


@dataclass(frozen=True)
class PenalisedSampling(Sampling):
    """With the penalties of OpenAI's protocol, which lower the scores of tokens that were generated already.

    Attributes:
        presence_penalty: once for each generated token.
        frequency_penalty: for each time that it was generated.

    Raises:
        GenerationError: a value outside its range.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MOST_PENALTY:
                expected = f"{-MOST_PENALTY:g} to {MOST_PENALTY:g}"
                raise GenerationError(f"{name} {getattr(self, name)} is out of range: expected {expected}")

    @property
    def penalties(self) -> tuple[float, float]:
        """As `Sampling.penalties`."""
        return self.presence_penalty, self.frequency_penalty


@dataclass(frozen=True)
class TokenScore:
    """How likely the model thought a token, before anything but steering changed its logits.

    Attributes:
        logprob: natural logarithm of its probability.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Request:
    """One text to continue; `plan` None leaves it unsteered.

    Attributes:
        special_tokens: if the prompt holds special tokens that the chat template writes, or begins with any, encode its
            special tokens as such. If not, what looks like one stays text, as is right for text from elsewhere; None
            does that too, and says so.
        chat: what to answer instead of continuing the prompt, which is then its last message; `Engine.chat` makes it.
        logprobs: also fill `Completion.scores`, with this many of the likeliest tokens at each place; None does not.
        trace: also fill `Completion.trace`, at some cost in speed.
        on_trace: called with each token of the trace, once the model has read it; of a single request, or through a
            decoder.
    """

    prompt: str
    plan: "SteeringPlan | None" = None
    sampling: Sampling = field(default_factory=Sampling)
    special_tokens: bool | None = None
    chat: "Chat | None" = None
    trace: bool = False
    on_trace: "Callable[[TokenTrace], None] | None" = None
    logprobs: int | None = None

    def require_steered(self) -> None:
        """Raise SteeringError if its plan asks for steering that none of its tokens could get."""
        if self.plan is not None:
            require_steered(self.plan, self.sampling.max_new_tokens)


def require_steered(plan: "SteeringPlan", most: int) -> None:
    """Raise SteeringError if a plan asks for steering, but can't steer any token of a text of `most` new tokens.

    The model does not read the last one. All tokens of a prompt are steered alike, so one stands for it here.
    """
    if plan.does_something and not plan.steers(1, most - 1):
        raise SteeringError(
            f"steering was asked for, but it would reach none of {most} new tokens, the last of which the model does "
            f"not read (positions {plan.positions}, schedule {plan.schedule}): generate more, or steer with "
            "positions all and schedule constant"
        )


@dataclass(frozen=True, eq=False)
class Completion:
    """The result of a request.

    Attributes:
        text: the continuation, without the prompt; of a chat the answer, without thinking.
        prompt_tokens, new_tokens: counts.
        finish_reason: "stop" where the model ended the text itself, "length" at max_new_tokens, "interrupted" where
            `decoding.Stop` ended it.
        seconds: the time of the whole batch that it was generated in.
        report: the steering report of that batch; None if nothing in it was steered.
        frequency: routing embedding F [L, N] of the generated tokens, if it was requested and there are any.
        was_steered: whether its plan steered any of its tokens, where that depends on more than their number.
        thinking: what came before the answer of a chat; None for a model that is not known to think.
        scores: one per token, if `Request.logprobs` asks for them.
        trace: where each token was sent, if it was requested.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seconds: float
    report: "SteeringReport | None" = None
    frequency: "Tensor | None" = None
    was_steered: bool | None = None
    thinking: str | None = None
    trace: "Trace | None" = None
    scores: tuple[TokenScore, ...] | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def missed(self) -> str:
        """Why none of its tokens was steered although its plan asks for it; "" if some was, or none was to be."""
        plan = self.request.plan
        read = self.new_tokens - (self.finish_reason != "stop")
        if plan is None or not plan.does_something:
            return ""
        if plan.steers(self.prompt_tokens, read) if self.was_steered is None else self.was_steered:
            return ""
        ended = f"steering was asked for, but the text ended after {self.new_tokens} tokens"
        settings = f"(positions {plan.positions}, schedule {plan.schedule})"
        if self.was_steered is False and (reason := UNREACHED.get(plan.positions)):
            return f"{ended}, {reason} {settings}: take another seed, more tokens or positions generated"
        return (
            f"{ended}, before any that was to be steered {settings}: take another seed, or steer with positions all "
            "and schedule constant"
        )

    @property
    def unanswered(self) -> str:
        """Why a chat has no answer; "" if it has one, or is no chat."""
        if self.request.chat is None or self.text.strip() or self.finish_reason == "interrupted":
            return ""
        if self.thinking and self.finish_reason == "length":
            return f"the model was still thinking after {self.new_tokens} tokens: raise --max-new-tokens"
        return "the model answered nothing: take another seed, or ask in other words"

    def as_dict(self, model: str) -> dict[str, Any]:
        """One flat object for JSON lines."""
        from steermoe.steering.plans import UNSTEERED

        plan = self.request.plan
        steering = dict(UNSTEERED if plan is None else plan.as_dict())
        for name in LISTS:
            del steering[name]
        return {
            "text": self.text,
            "prompt": self.request.prompt,
            "model": model,
            **steering,
            **asdict(self.request.sampling),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "finish_reason": self.finish_reason,
            "seconds": round(self.seconds, 3),
            "steering": self.report.as_dict() if self.report else None,
            **({} if self.request.chat is None else self.request.chat.as_dict(self.thinking)),
        }
