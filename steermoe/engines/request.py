"""What goes into an engine and what comes out: a request, its sampling, its completion. Knows no engine."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from steermoe.errors import GenerationError

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.report import SteeringReport

LISTS = ("force", "ban")
"""Fields of a plan that a completion leaves out, since lists can be long; stories have them at the end."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked, by transformers' own names; a field with "help" is a command-line option.

    Attributes:
        top_k, top_p: 0 and 1.0 turn them off.
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
    repetition_penalty: float = field(default=1.0, metadata={"help": "Values above 1 discourage repetition."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same text."})

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("temperature", 0 < self.temperature < float("inf"), "above 0 (for greedy decoding: --no-do-sample)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        ):
            if not is_right:
                raise GenerationError(f"{name} {getattr(self, name)} is out of range: expected {expected}")


@dataclass(frozen=True, eq=False)
class Request:
    """One text to continue; `plan` None leaves it unsteered.

    Attributes:
        special_tokens: if the prompt begins with a special token, as what a chat template writes does, encode its
            special tokens as such. If not, what looks like one stays text, as is right for text from elsewhere.
    """

    prompt: str
    plan: "SteeringPlan | None" = None
    sampling: Sampling = field(default_factory=Sampling)
    special_tokens: bool = False


@dataclass(frozen=True, eq=False)
class Completion:
    """The result of a request.

    Attributes:
        text: the continuation, without the prompt.
        prompt_tokens, new_tokens: counts.
        finish_reason: "stop" where the model ended the text itself, "length" at max_new_tokens.
        seconds: the time of the whole batch that it was generated in.
        report: the steering report of that batch; None if nothing in it was steered.
        frequency: routing embedding F [L, N] of the generated tokens, if it was requested and there are any.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seconds: float
    report: "SteeringReport | None" = None
    frequency: "Tensor | None" = None

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

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
        }
