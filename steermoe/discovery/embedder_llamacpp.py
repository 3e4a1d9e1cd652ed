"""Routing embeddings of texts by llama.cpp: nothing after the last router is computed, one text after the other.

Shapes: B texts, L MoE layers, N experts a layer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from steermoe.discovery.embedder import Embedded, EmbeddingOptions, Progress
from steermoe.errors import CorpusError

if TYPE_CHECKING:
    from steermoe.engines.llamacpp.engine import LlamaCppEngine


class GGUFEmbedder:
    """As `embedding.Embedder`, for a GGUF file.

    Raises:
        CorpusError: hidden states or probabilities are asked for, which only transformers gives.
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

    def texts(self, texts: Sequence[str], progress: Progress | None = None) -> Embedded:
        """Embed texts, in their order."""
        frequency = torch.zeros(len(texts), *self.shape)
        lengths = torch.zeros(len(texts), dtype=torch.int64)
        for number, text in enumerate(texts):
            tokens = self._engine.tokenizer.encode(text)[: self._options.max_tokens]
            lengths[number] = len(tokens)
            if tokens:
                chosen = torch.from_numpy(self._engine.chosen(tokens))
                counts = chosen[-1] if self._options.tokens == "last" else chosen.sum(0)
                frequency[number] = (counts / counts.sum(-1, keepdim=True)).float()
            if progress is not None:
                progress(1, len(tokens))
        return Embedded(frequency, lengths)
