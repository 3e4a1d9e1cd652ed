"""Requests go to vLLM, which batches, samples and ends them; completions come back as they finish.

Knows vLLM only by the calls of its `LLMEngine`, which `replicas` offers too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from steermoe.engines.decoding import Row, finish
from steermoe.engines.engine import OnToken
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.engines.text import Tokenizer
from steermoe.engines.vllm.steps import RECORD
from steermoe.engines.vllm.wire import pack
from steermoe.errors import GenerationError, SteeringError
from steermoe.routing.shape import RoutingShape
from steermoe.steering.asked import KEY
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.report import SteeringReport
from steermoe.steering.tables import check_plan
from steermoe.steering.tags import ModelTags

_numbers = count()
"""vLLM identifies requests by names, which must be unique as long as it runs."""


class VLLMDecoder:
    """As `engine.Decoder`; requests that there is no room for wait in vLLM's own queue.

    Args:
        vllm: runs the model.
        shape: the model's shape, which plans must fit.
        tokenizer: the model's tokenizer.
        ends: tokens that end a text.
        record: also fill `Completion.frequency`.
        no_lists: why plans that force or ban experts are refused; "" if they are not.
        tags: the model's; by default none.
    """

    def __init__(
        self,
        vllm: Any,
        shape: RoutingShape,
        tokenizer: Tokenizer,
        ends: set[int],
        record: bool = False,
        no_lists: str = "",
        tags: ModelTags | None = None,
    ) -> None:
        self._tags = tags or ModelTags()
        self._vllm, self._shape, self._tokenizer, self._ends = vllm, shape, tokenizer, ends
        self._record, self._no_lists = record, no_lists
        self._rows: dict[str, Row[None]] = {}
        self._was_steered = False

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        if self._rows:
            self._vllm.abort_request(list(self._rows))
        self._rows = {}

    def close(self) -> None:
        self.clear()

    def report(self) -> SteeringReport | None:
        """As `Decoder.report`.

        Raises:
            SteeringError: a forced expert was not chosen, or a banned one was.
        """
        if not self._was_steered:
            return None
        found = report_of(self._vllm)
        if found.forced_share < 1 or found.banned_share > 0:
            raise SteeringError(
                f"vLLM's routers chose forced experts in {found.forced_share:.1%} of their places and banned ones in "
                f"{found.banned_share:.1%}: this architecture does not keep to lists here; use --engine hf"
            )
        return found

    def start(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        on_text: Callable[[str], None] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        if any(request.trace for request in requests):
            raise GenerationError(
                "vLLM does not show what its routers choose for each token: leave trace out, or use --engine hf, or "
                "llamacpp for a GGUF file"
            )
        from vllm import TokensPrompt

        for request, prompt in zip(requests, prompts, strict=True):
            name = f"steermoe-{next(_numbers)}"
            self._vllm.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), self._params(request))
            tags = self._tags.of(request.plan)
            self._rows[name] = Row(
                request, prompt, self._tokenizer, self._ends, None, on_text, tags=tags, on_token=on_token
            )
            self._was_steered |= request.plan is not None

    def drop(self, request: Request) -> None:
        for row in self._rows.values():
            if row.request is request:
                row.end("interrupted")

    def steer(self, request: Request, plan: SteeringPlan | None) -> None:
        if any(row.request is request for row in self._rows.values()):
            raise SteeringError("vLLM can't change the steering of a text that it generates: use --engine hf")

    def step(self) -> list[Completion]:
        finished = {name: row for name, row in self._rows.items() if row.finish_reason}
        if finished:
            self._vllm.abort_request(list(finished))
        self._rows = {name: row for name, row in self._rows.items() if name not in finished}
        for output in self._vllm.step() if self._vllm.has_unfinished_requests() else ():
            row, written = self._rows[output.request_id], output.outputs[0]
            for token in written.token_ids[len(row.new) :]:
                if not row.finish_reason:
                    row.take(token)
            if output.finished:
                row.end("stop" if written.finish_reason == "stop" else "length")
            elif row.finish_reason == "interrupted":
                self._vllm.abort_request([output.request_id])
            else:
                continue
            finished[output.request_id] = self._rows.pop(output.request_id)
        counts = self._recorded() if self._record and finished else {}
        return [finish(row, _frequency_of(counts.get(name))) for name, row in finished.items()]

    def _params(self, request: Request) -> Any:
        """How vLLM samples the request's tokens, and what its workers must know to steer or record it."""
        params = sampling_params(request.sampling, sorted(self._ends))
        extra: dict[str, Any] = {RECORD: b"1"} if self._record else {}  # bytes, which no client of a server can send
        if request.plan is not None and request.plan.does_something:
            check_plan(self._shape, request.plan)
            if self._no_lists and (request.plan.force or request.plan.ban):
                raise SteeringError(f"vLLM can't force or ban experts here: {self._no_lists}; use --engine hf")
            extra[KEY] = pack(request.plan, self._tags.of(request.plan))
        params.extra_args = extra or None
        return params

    def _recorded(self) -> dict[str, Tensor]:
        """Counts [L, N] of the experts that each recorded request chose, since the last call."""
        found: dict[str, Tensor] = {}
        for worker in self._vllm.collective_rpc("steermoe_recorded"):
            for name, rows in worker.items():
                counts = found.setdefault(name, torch.zeros(len(self._shape.routers), self._shape.num_experts))
                for row, values in rows:
                    counts[row, : len(values)] = torch.tensor(values, dtype=torch.float32)
        return found


def sampling_params(sampling: Sampling, ends: list[int]) -> Any:
    """The same for vLLM: a text ends at `ends` and nowhere else."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature if sampling.do_sample else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.penalties[0],
        frequency_penalty=sampling.penalties[1],
        seed=sampling.seed,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=ends,
        ignore_eos=True,
        detokenize=False,
    )


def report_of(vllm: Any) -> SteeringReport:
    """What all workers together have steered since the last report.

    Workers that split the layers of a stage count the same tokens and choices, so one of them answers for all. All
    stages of a replica see the same tokens, so only its first stage counts them, while each stage counts the calls and
    slots of its own layers.
    """
    parts: dict[tuple[int, tuple[int, ...]], SteeringReport] = {}
    for worker in vllm.collective_rpc("steermoe_report"):
        counts = {name: number for name, number in worker.items() if name not in ("replica", "rows")}
        parts[worker["replica"], tuple(worker["rows"])] = SteeringReport(**counts)
    first = min(rows for _, rows in parts)
    whole = (
        report if rows == first else replace(report, tokens_seen=0, tokens_steered=0)
        for (_, rows), report in parts.items()
    )
    return sum(whole, SteeringReport())


def _frequency_of(counts: Tensor | None) -> Tensor | None:
    """Routing embedding F [L, N]; None if some layer counted nothing."""
    if counts is None or not bool((counts.sum(-1) > 0).all()):
        return None
    return counts / counts.sum(-1, keepdim=True)
