"""How a model's routers share their load on some texts: are experts balanced, unused, or always used?

Shapes: B texts, L MoE layers, N experts per layer.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steermoe.discovery.embed_corpus import SHARD_TEXTS, embedder
from steermoe.discovery.embedder import EmbeddingOptions, TextProgress
from steermoe.errors import CorpusError, ModelError, count_of
from steermoe.figures import MAX_TICKS, drawable, figure_class, save
from steermoe.models.loading import LoadedModel
from steermoe.routing.routers import find_routers

ALWAYS = 0.999
"""An expert chosen by at least this share of the tokens counts as always used."""


@dataclass(frozen=True)
class LayerHealth:
    """One router's load.

    Attributes:
        layer: its decoder layer.
        load: f [N], share of the layer's choices that each expert got; sums to 1.
        probability: P [N], mean router probability of each expert, before top-k; sums to 1. A sigmoid router's scores
            are divided by their sum over the experts.
        balance_loss: N * sum(f P), the load-balancing loss of Switch Transformers (2101.03961, eq. 4) without its
            factor alpha. 1 is perfect balance, N is everything on one expert.
        entropy: of f, in nats; log N is perfect balance.
        evenness: entropy over log N, 0 to 1; 1 if there is only one expert.
        never: experts that no token chose. always: experts that at least 99.9% of the tokens chose.
    """

    layer: int
    load: tuple[float, ...]
    probability: tuple[float, ...]
    balance_loss: float
    entropy: float
    evenness: float
    never: tuple[int, ...]
    always: tuple[int, ...]

    @property
    def busiest(self) -> int:
        """The expert with the largest load."""
        return max(range(len(self.load)), key=self.load.__getitem__)

    @property
    def max_to_mean(self) -> float:
        """The largest load over the mean load, 1 to N; 1 is perfect balance."""
        return max(self.load) * len(self.load)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "busiest": self.busiest, "max_to_mean": self.max_to_mean}


@dataclass(frozen=True)
class RoutingHealth:
    """All routers of a model on some texts.

    Attributes:
        model: its name. texts: number of texts with tokens. tokens: number of tokens read.
        layers: one per router, in layer order.
    """

    model: str
    texts: int
    tokens: int
    layers: tuple[LayerHealth, ...]

    @property
    def balance_loss(self) -> float:
        """Mean over the layers."""
        return sum(layer.balance_loss for layer in self.layers) / len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "texts": self.texts,
            "tokens": self.tokens,
            "balance_loss": self.balance_loss,
            "layers": [layer.as_dict() for layer in self.layers],
        }


def routing_health(
    loaded: LoadedModel, texts: Iterable[str], *, max_tokens: int = 512, progress: TextProgress | None = None
) -> RoutingHealth:
    """Measure the load of a model's routers; every token counts the same.

    It is the load of the unsteered model: attached steering has no effect here.

    Args:
        loaded: the model with its tokenizer.
        texts: what to run, read once and in parts; balance depends on the texts as much as on the model.
        max_tokens: tokens read of each text.
        progress: called with texts and tokens done.

    Raises:
        CorpusError: no text has any tokens. ModelError: a router's probabilities are not finite.
    """
    num_texts = num_tokens = 0
    remaining = iter(texts)
    with embedder(loaded, EmbeddingOptions(max_tokens=max_tokens, both=True)) as embed:
        load_LN = torch.zeros(embed.shape, dtype=torch.float64)
        probability_LN = torch.zeros_like(load_LN)
        while part := list(islice(remaining, SHARD_TEXTS)):
            embedded = embed.texts(part, progress)
            assert embedded.probability is not None
            tokens_B = embedded.tokens.double()
            load_LN += torch.einsum("b,bln->ln", tokens_B, embedded.frequency.double())
            probability_LN += torch.einsum("b,bln->ln", tokens_B, embedded.probability.double())
            num_texts += int((embedded.tokens > 0).sum())
            num_tokens += int(embedded.tokens.sum())
    if num_tokens == 0:
        raise CorpusError("no text has any tokens: there is nothing to measure")
    routers = find_routers(loaded.model)
    for router, probability in zip(routers, probability_LN, strict=True):
        if not probability.isfinite().all():
            raise ModelError(
                f"the router of layer {router.layer} gives probabilities that are not finite: "
                "the model overflows or its weights are damaged; try --dtype float32"
            )
    layers = [
        layer_health(router.layer, load[: router.num_experts], probability[: router.num_experts], router.top_k)
        for router, load, probability in zip(routers, load_LN / num_tokens, probability_LN / num_tokens, strict=True)
    ]
    return RoutingHealth(loaded.name, num_texts, num_tokens, tuple(layers))


def layer_health(layer: int, load: Tensor, probability: Tensor, top_k: int) -> LayerHealth:
    """From f [N] and P [N] of one router, each summing to 1."""
    experts = len(load)
    entropy = float(torch.special.entr(load).sum())
    return LayerHealth(
        layer=layer,
        load=tuple(load.tolist()),
        probability=tuple(probability.tolist()),
        balance_loss=float(experts * (load * probability).sum()),
        entropy=entropy,
        evenness=entropy / math.log(experts) if experts > 1 else 1.0,
        never=tuple(torch.nonzero(load == 0).flatten().tolist()),
        always=tuple(torch.nonzero(load * top_k >= ALWAYS).flatten().tolist()),
    )


LEAST_LOAD = 1e-9
"""Below every load but 0, so that only experts that are never used get the colour for values below the scale."""


def draw_health(health: "RoutingHealth", path: Path) -> None:
    """Draw each layer's load as a heat map, N f with balance in the middle, with loss and evenness beside it.

    Experts that are never used are black; grey fills layers that have fewer experts than others.

    Raises:
        SteerMoEError: matplotlib is missing, or the file can't be written.
    """
    Figure = figure_class()
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    numbers = [layer.layer for layer in health.layers]
    experts = max(len(layer.load) for layer in health.layers)
    load = [
        [len(layer.load) * f for f in layer.load] + [float("nan")] * (experts - len(layer.load))
        for layer in health.layers
    ]
    size = 9 + min(experts, 256) / 32, 4.5 + min(len(numbers), 64) / 30
    figure = Figure(figsize=size, layout="constrained")
    heat, loss, even = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1, 1))
    largest = max(2.0, *(layer.max_to_mean for layer in health.layers))
    image = heat.imshow(
        load,
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["RdBu_r"].with_extremes(under="black", bad="lightgrey"),
        norm=TwoSlopeNorm(1.0, vmin=LEAST_LOAD, vmax=largest),
    )
    bar = figure.colorbar(image, ax=heat, extend="min", label="load, as a multiple of balance (black: never used)")
    ticks = [LEAST_LOAD, 0.5, 1.0, *(float(tick) for tick in bar.get_ticks() if 1.2 < tick <= largest)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" if tick > LEAST_LOAD else "0" for tick in ticks])
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    heat.xaxis.get_major_locator().set_params(integer=True)
    every = -(-len(numbers) // MAX_TICKS)
    rows = range(len(numbers))
    heat.set_yticks(rows[::every], [str(number) for number in numbers[::every]])
    loss.barh(rows, [layer.balance_loss for layer in health.layers], color="#4477aa")
    loss.axvline(1.0, color="black", linewidth=0.8)
    loss.set_xlabel("balance loss\n(1 = balanced)")
    even.barh(rows, [layer.evenness for layer in health.layers], color="#228833")
    even.set_xlim(0, 1)
    even.set_xlabel("entropy / log N\n(1 = balanced)")
    title = f"{health.model}: {count_of(health.tokens, 'token')} of {count_of(health.texts, 'text')}"
    figure.suptitle(drawable(title), parse_math=False)
    save(figure, path)
