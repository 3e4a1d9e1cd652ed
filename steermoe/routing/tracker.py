"""Track which token is where: rows and columns of every forward call, prompt or generated, real or padding.

Steering and recording both need it; it knows nothing about either. A column is a position in the padded batch, counted
from the first prompt token, so it is the same for cached and uncached decoding.

Shapes: B rows and S columns of a forward call, P columns of a prompt.
"""

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steermoe.errors import SteeringError
from steermoe.routing.wrapping import EagerHook, wrap_method

Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, ...] = get_args(Stack)
_TURNS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_MAKING_TURNS = threading.Lock()


def turn_of(model: nn.Module) -> "threading.RLock":
    """The lock that a thread holds while it generates with a watched model, or runs its forward.

    Where a token is, and how it is steered, is kept per model: threads that share one take turns.
    """
    with _MAKING_TURNS:
        return _TURNS.setdefault(model, threading.RLock())


@dataclass(frozen=True)
class Window:
    """The tokens of one forward call of a stack: B rows, S columns from `first` on.

    Attributes:
        prompt_length: columns of the prompt; what comes after is generated.
        index: [B, S], what `generated_index` returns, if the caller knows it, as where rows began at different times;
            then `first` is not used.
        counted: [B, S], true for tokens that count: not padding, not filler for finished rows, not recomputed for lack
            of a cache; None if all count.
        ids: [B, S], the tokens; None if the model is passed their embeddings.
        reorders: whether rows may change places between calls.
    """

    rows: int
    columns: int
    first: int
    prompt_length: int
    counted: Tensor | None = None
    stack: Stack = "decoder"
    index: Tensor | None = None
    ids: Tensor | None = None
    reorders: bool = False

    @property
    def is_prompt(self) -> bool:
        """Whether no token of the call is generated."""
        return self.first + self.columns <= self.prompt_length

    @property
    def is_generated(self) -> bool:
        """Whether the call holds one generated token of each row of the decoder, and all of them count."""
        if self.columns != 1 or self.stack != "decoder" or self.counted is not None:
            return False
        if self.index is None:
            return self.first >= self.prompt_length
        return self.index.device.type == "cpu" and bool((self.index >= 0).all())

    def generated_index(self) -> Tensor:
        """[S], or [B, S] where rows differ: 0 for the first generated token, negative in the prompt."""
        if self.index is not None:
            return self.index
        return torch.arange(self.first - self.prompt_length, self.first - self.prompt_length + self.columns)

    @property
    def tokens(self) -> int | Tensor:
        """The number of tokens that count; a tensor if it has to be computed on the device."""
        return self.rows * self.columns if self.counted is None else self.counted.sum()


@dataclass
class _Generation:
    """A running call of `generate`.

    Attributes:
        prompt_length: None until the first forward call shows it, in an encoder-decoder.
        mask: [B', P], which columns of the prompt are real; `generate` may repeat its rows.
        filling: tokens that `generate` feeds to finished rows.
        reorders: whether it searches with beams.
        seen: columns computed so far.
    """

    prompt_length: int | None
    mask: Tensor | None
    filling: Tensor | None
    reorders: bool = False
    seen: int = 0


class Tracker:
    """Watches a model's forward and generate, and passes the window of each forward call to a listener.

    Threads take turns: one call of `generate`, or one forward call outside of it, at a time.

    Args:
        model: the model, without wrappers such as torch.compile (see `language_model`).
        before: called with the window before each forward call, separately for the two stacks of an encoder-decoder.
        after: called with the window after each forward call that succeeded.
    """

    def __init__(
        self, model: nn.Module, before: Callable[[Window], None], after: Callable[[Window], None] | None = None
    ) -> None:
        self.prompt_length: int | None = None
        """For direct calls; if None, a call with an empty cache is taken to be the prompt."""
        self.known_window: Window | None = None
        """The window of the following calls, if whoever drives the model knows it; None to infer it."""
        self._model = model
        self._before, self._after = before, after
        self._prompt_seen = 0
        self._generation: _Generation | None = None
        self._windows: dict[Stack, Window] = {}
        self._turn = turn_of(model)
        self._inside: set[tuple[int, Stack]] = set()
        """Threads that are inside a forward call, with its stack. More than one only if they wait for their turn."""
        self._is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        with ExitStack() as undo:
            self._watch(model, "decoder", self._window, undo)
            if self._is_encoder_decoder and hasattr(model, "get_encoder"):  # `generate` calls it directly
                encoder: Any = model.get_encoder
                self._watch(encoder(), "encoder", self._encoder_window, undo)
            if hasattr(model, "generate"):
                undo.callback(wrap_method(model, "generate", self._around_generate))
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Stop watching, once no other thread is inside a call."""
        with self._turn:
            self._undo.close()
        for stack in STACKS:  # if it was called inside a forward call, whose end is no longer noticed
            self._end_turn(stack)

    def _watch(
        self, module: nn.Module, stack: Stack, window: Callable[[dict[str, Any]], Window], undo: ExitStack
    ) -> None:
        signature = inspect.signature(module.forward)

        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if getattr(called, "_is_replica", False):
                raise SteeringError(
                    "nn.DataParallel runs replicas of the model, which share its routers: use DistributedDataParallel, "
                    "or load the model with device_map='auto'"
                )
            self._take_turn(stack)
            self._windows[stack] = window(_arguments(signature, args, kwargs))
            self._before(self._windows[stack])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._after is not None:
                self._after(self._windows[stack])

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._end_turn(stack)

        undo.callback(module.register_forward_pre_hook(EagerHook(before), with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(EagerHook(after)).remove)
        undo.callback(module.register_forward_hook(EagerHook(end), always_call=True).remove)  # after a failure too

    def _take_turn(self, stack: Stack) -> None:
        self._turn.acquire()
        here = threading.get_ident(), stack
        if here in self._inside:  # a compiled call that failed, after which no hook runs
            self._turn.release()
        self._inside.add(here)

    def _end_turn(self, stack: Stack) -> None:
        here = threading.get_ident(), stack
        if here in self._inside:
            self._inside.discard(here)
            self._turn.release()

    # ---- generate ----

    def _around_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(generate)

        def tracked(*args: Any, **kwargs: Any) -> Any:
            with self._turn:
                if self._generation is not None:
                    # a decoding method that calls generate itself: its prompt is not the user's
                    return generate(*args, **kwargs)
                self._generation = self._begin(_arguments(signature, args, kwargs))
                try:
                    return generate(*args, **kwargs)
                finally:
                    self._generation = None

        return tracked

    def _begin(self, given: dict[str, Any]) -> _Generation:
        def setting(name: str) -> Any:
            places = (given.get("generation_config"), getattr(self._model, "generation_config", None))
            found = (getattr(place, name, None) for place in places)
            return given[name] if given.get(name) is not None else next((f for f in found if f is not None), None)

        ends, pad = _token_list(setting("eos_token_id")), _token_list(setting("pad_token_id"))
        filling = torch.tensor(sorted({*ends, *pad})) if ends else None  # without an end token no row finishes early
        reorders = (setting("num_beams") or 1) > 1
        if self._is_encoder_decoder:
            return _Generation(None, None, filling, reorders)
        prompts = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        prompt = next((tensor for tensor in prompts if tensor is not None), None)
        mask = given.get("attention_mask")
        if mask is None and prompt is not None and prompt.dim() == 2 and pad and pad[0] not in ends:
            mask = prompt != pad[0]  # as `generate` does
        lengths = [tensor.shape[1] for tensor in (prompt, mask) if tensor is not None]  # a mask also covers the cache
        return _Generation(max(lengths, default=1), mask, filling, reorders)

    # ---- forward ----

    def _window(self, given: dict[str, Any]) -> Window:
        if self.known_window is not None:
            return self.known_window
        prefix = "decoder_" if self._is_encoder_decoder else ""
        ids = given.get(f"{prefix}input_ids")
        tokens = next(
            (t for t in (ids, given.get(f"{prefix}inputs_embeds"), given.get("labels")) if t is not None), None
        )
        rows, columns = (1, 1) if tokens is None else tokens.shape[:2]
        first = _cached_length(given.get("past_key_values"))
        generation = self._generation
        if first == 0:
            self._prompt_seen = columns
        if generation is None:
            prompt_length = self._prompt_seen if self.prompt_length is None else self.prompt_length
        else:
            if generation.prompt_length is None:
                generation.prompt_length = columns
            prompt_length = generation.prompt_length
        counted = None
        if columns > 1:
            counted = _real_tokens(given.get(f"{prefix}attention_mask"), rows, columns)
        if generation is not None:
            counted = self._counted(generation, counted, rows, columns, first, ids)
        reorders = generation is not None and generation.reorders
        return Window(rows, columns, first, prompt_length, counted, ids=ids, reorders=reorders)

    def _counted(
        self, generation: _Generation, real: Tensor | None, rows: int, columns: int, first: int, ids: Tensor | None
    ) -> Tensor | None:
        """[B, S], which tokens count, given the running generation; None for all."""
        prompt_length = generation.prompt_length or 0
        mask = generation.mask
        if real is None and mask is not None and first < mask.shape[1] and rows % len(mask) == 0:
            part = mask[:, first : first + columns].bool().repeat_interleave(rows // len(mask), 0)
            real = nn.functional.pad(part, (0, columns - part.shape[1]), value=True)
        again = generation.seen if first == 0 and 0 < generation.seen < columns else 0
        generation.seen = max(generation.seen, first + columns)
        generated = max(0, prompt_length - first)  # the first generated column
        may_be_filling = rows > 1 and generated < columns and ids is not None and generation.filling is not None
        if not again and (not may_be_filling or (real is None and _is_free_of(generation.filling, ids))):
            return real
        device = None if ids is None else ids.device
        real = (
            torch.ones(rows, columns, dtype=torch.bool, device=device) if real is None else real.to(device, copy=True)
        )
        if may_be_filling:
            assert ids is not None
            assert generation.filling is not None
            generation.filling = generation.filling.to(ids.device, non_blocking=True)
            real[:, generated:] &= ~torch.isin(ids[:, generated:], generation.filling)
        real[:, :again] = False
        return real

    def _encoder_window(self, given: dict[str, Any]) -> Window:
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        rows, columns = (1, 1) if tokens is None else tokens.shape[:2]
        counted = _real_tokens(given.get("attention_mask"), rows, columns)
        return Window(rows, columns, 0, columns, counted, "encoder")


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _is_free_of(filling: Tensor | None, ids: Tensor | None) -> bool:
    """Whether none of these tokens is filling, as far as Python can see without waiting for a device."""
    if type(ids) is not Tensor or type(filling) is not Tensor or ids.device.type != "cpu":
        return False
    return filling.device.type == "cpu" and set(filling.tolist()).isdisjoint(ids.flatten().tolist())


def _token_list(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    listed = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    return list(listed) if isinstance(listed, list | tuple) else [int(listed)]


def _cached_length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _real_tokens(mask: Any, rows: int, columns: int) -> Tensor | None:
    """The last columns of a 2-D attention mask; None if it isn't one or doesn't match."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        return None
    real = mask[:, -columns:].bool()
    return real if real.shape[1] == columns else None
