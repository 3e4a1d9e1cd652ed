"""The default engine: any model and device that transformers supports.

It picks the decoder: `RollingDecoder` if rows may come and go or compiled steps exist, otherwise `StaticDecoder`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from steermoe.engines.chat import read_chat
from steermoe.engines.decoding import complete
from steermoe.engines.engine import Decoder
from steermoe.engines.hf.cache import bytes_of_a_token, rows_can_change
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.hf.static import StaticDecoder
from steermoe.engines.memory import SHARE, Room, free_memory, keep_freed_memory
from steermoe.engines.request import Completion, Request
from steermoe.engines.text import HFEncoder, encode_prompt, end_tokens
from steermoe.models.loading import LoadedModel, try_remote_code
from steermoe.routing.shape import RoutingShape
from steermoe.routing.tracker import turn_of
from steermoe.routing.weights import weights_of
from steermoe.routing.wrapping import is_untouched
from steermoe.steering.tags import HFVocabulary, ModelTags

if TYPE_CHECKING:
    from steermoe.engines.hf.compiled.steps import CompiledSteps
    from steermoe.engines.messages import Chat, Message

MOST_ROWS, MOST_ROWS_ON_CPU = 256, 64
"""More rows add little speed and take much memory."""
LOGITS_BYTES = 40
"""Per row and token of the vocabulary: logits as the model returns them, in float32, warped, and twice in float64."""
SAMPLED_WEIGHTS = 8
"""How many numbers of each tensor go into a model's fingerprint."""


class HFEngine:
    """Generates with transformers' own `generate`, with steering attached around it, or with compiled steps.

    Args:
        loaded: the model.
        compiled: use the steps that `steermoe models compile` made, if there are any for this model.
    """

    def __init__(self, loaded: LoadedModel, compiled: bool = True) -> None:
        self.loaded = loaded
        self.compiled = compiled
        self._encoder = HFEncoder(loaded.tokenizer)
        self.tags = ModelTags(HFVocabulary(loaded.tokenizer), lambda: self.end_tokens())
        self._was_tried = self._has_own_encoder = False
        self._steps: CompiledSteps | None = None

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def shape(self) -> RoutingShape:
        return self.loaded.shape

    @property
    def dtype(self) -> str:
        return str(self.loaded.model.dtype).removeprefix("torch.")

    @property
    def most_rows(self) -> int:
        return MOST_ROWS_ON_CPU if self.loaded.device.type == "cpu" else MOST_ROWS

    def room(self) -> Room:
        model: Any = self.loaded.model
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        return Room(int(free_memory(self.loaded.device) * SHARE), LOGITS_BYTES * vocabulary, bytes_of_a_token(model))

    def decoder(self, rows: int, tokens: int | None = None) -> Decoder:
        """As `Engine.decoder`: the best one that the model allows."""
        self._try_once()
        if tokens is not None and not self._has_own_encoder:  # a tokenizer can't encode and decode at once
            self._encoder, self._has_own_encoder = HFEncoder(deepcopy(self.loaded.tokenizer)), True
        if rows_can_change(self.loaded.model):
            return RollingDecoder(self.loaded, self.end_tokens(), self.compiled_steps(), self.tags)
        return StaticDecoder(self.loaded, self.end_tokens(), tags=self.tags, steerable=tokens is not None)

    @property
    def context_length(self) -> int | None:
        return self.loaded.context_length

    def chat(self, messages: "Sequence[Message]", thinking: bool | None = None) -> "Chat":
        """As `Engine.chat`."""
        return read_chat(self._encoder, messages, self.name, thinking)

    def encode(self, request: Request, known: list[int] | None = None) -> list[int]:
        """As `Engine.encode`."""
        self.tags.of(request.plan)
        return encode_prompt(self._encoder, request, self.name, self.context_length, known)

    def end_tokens(self) -> set[int]:
        """Tokens that end a text."""
        return end_tokens(self.loaded.model.generation_config.eos_token_id, self.loaded.tokenizer)

    def fingerprint(self) -> str:
        """A hash of class, dtype and a few numbers of every tensor."""
        model: Any = self.loaded.model
        digest = hashlib.sha256(f"{type(model).__name__} {model.dtype}".encode())
        for name, weight in weights_of(model):
            some = weight.flatten()[:SAMPLED_WEIGHTS]
            numbers = "" if some.is_meta else some.float().cpu().tolist()
            digest.update(f"{name} {tuple(weight.shape)} {numbers}".encode())
        return digest.hexdigest()

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[str], None] | None = None, record: bool = False
    ) -> list[Completion]:
        """As `Engine.generate`; all requests run as one batch, by compiled steps where there are any for it.

        Threads take turns.
        """
        with turn_of(self.loaded.model):
            return self._generate(requests, on_text, record)

    def _generate(
        self, requests: Sequence[Request], on_text: Callable[[str], None] | None, record: bool
    ) -> list[Completion]:
        self._try_once()
        prompts = [self.encode(request) for request in requests]
        steps = self.compiled_steps() if requests and not record else None
        decoder: Decoder
        if steps is not None and steps.promise(len(requests)):
            decoder = RollingDecoder(self.loaded, self.end_tokens(), steps, self.tags)
        else:
            decoder = StaticDecoder(self.loaded, self.end_tokens(), record, self.tags)
        return complete(decoder, requests, prompts, on_text)

    def _try_once(self) -> None:
        """Get ready to decode: raise ModelError if code that came with the checkpoint does not run."""
        if not self._was_tried:
            try_remote_code(self.loaded)
            if self.loaded.device.type == "cpu":
                keep_freed_memory()
        self._was_tried = True

    def compiled_steps(self) -> "CompiledSteps | None":
        """The model's compiled steps; None if unwanted, or if they would bypass something attached to the model."""
        model = self.loaded.model
        if not self.compiled or model.device.type != "cpu" or not all(map(is_untouched, model.modules())):
            return None
        from steermoe.engines.hf.compiled.steps import CompiledSteps

        if self._steps is None:
            self._steps = CompiledSteps(self.loaded.model)
        return self._steps

    def compile_later(self, load: Mapping[str, Any]) -> bool:
        """Begin to compile, in the background, the steps that the model's texts lacked so far.

        Args:
            load: the arguments with which `loading.load` loaded the model.

        Returns:
            whether it has begun, see `background.compile_later`.
        """
        if self._steps is None or not self._steps.missing:
            return False
        from steermoe.engines.hf.compiled.background import compile_later

        return compile_later(self.loaded.model, sorted(self._steps.missing, reverse=True), load)
