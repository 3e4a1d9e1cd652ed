"""Embed texts with llama.cpp, one after the other: nothing after the last router is computed.

Shapes: B texts, L MoE layers, N experts per layer.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from steermoe.discovery.embedder import Embedded, EmbeddingOptions, TextProgress, in_order
from steermoe.errors import CorpusError

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine


class GGUFEmbedder:
    """Like `embedder_hf.Embedder`, for a GGUF file.

    Raises:
        CorpusError: hidden states or probabilities are requested, which only transformers provides.
    """

    def __init__(self, engine: "LlamaCppEngine", options: EmbeddingOptions) -> None:
        if options.hidden or options.both or options.features != "counts":
            raise CorpusError(
                "llama.cpp counts the chosen experts; for hidden states, probabilities and routing health use "
                "--engine hf"
            )
        self._engine = engine
        self._options = options
        self.shape = len(engine.shape.layers), engine.shape.num_experts

    def texts(self, texts: Sequence[str], progress: TextProgress | None = None) -> Embedded:
        """Embed texts, in their order."""
        return in_order(self, texts, progress, both=False)

    def parts(self, texts: Sequence[str], done: Collection[int] = ()) -> Iterator[tuple[list[int], Embedded]]:
        """As `TextEmbedder.parts`; each text is a batch."""
        for place, text in enumerate(texts):
            tokens = [] if place in done else self._engine.tokenizer.encode(text)[: self._options.max_tokens]
            if tokens:
                chosen = torch.from_numpy(self._engine.chosen(tokens))
                counts = chosen[-1] if self._options.tokens == "last" else chosen.sum(0)
                frequency = (counts / counts.sum(-1, keepdim=True)).float()
                yield [place], Embedded(frequency[None], torch.tensor([len(tokens)]))
