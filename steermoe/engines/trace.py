"""The trace of a text: for each of its tokens, which experts were chosen, and which would have been without steering.

Knows no engine; `recorder` takes it down.

Shapes: T generated tokens, L MoE layers, K experts chosen per token (the most of any layer), D domains, N experts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import GenerationError, shown

if TYPE_CHECKING:
    from steermoe.routing.shape import RoutingShape
    from steermoe.vectors.vector import SteeringVector

NO_EXPERT = -1
"""Stands in `chosen` and `unsteered` where no expert was chosen."""
VERSION = 1
"""Of the dictionary that `Trace.to_dict` returns."""
MOST_NUMBERS = 1 << 27
"""The most choices that `Trace.from_dict` takes."""


@dataclass(frozen=True, eq=False)
class Domain:
    """A domain whose share of the choices a trace counts.

    Attributes:
        name: of its vector.
        experts: [L, N] bool, the experts of its vector, those with E > 0; N is the most that any layer has.
    """

    name: str
    experts: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """One token of a trace, as it is passed on while the text is generated; fields as in `Trace`, without T.

    Attributes:
        number: the token's number in the text, from 0.
        is_read: whether the model has read it; if not, it has no experts.
    """

    number: int
    text: str
    token_id: int
    logprob: float
    is_read: bool
    chosen: NDArray[np.int32]
    unsteered: NDArray[np.int32]
    share: dict[str, float]
    share_before: dict[str, float]
    strength: float


@dataclass(frozen=True, eq=False)
class Trace:
    """Where each token of a text was sent.

    A token's experts are those that are chosen when the model reads it. It does not read the last token of a text that
    ends at its greatest length, which has no experts then.

    Attributes:
        tokens: the text of each token, [T]; together they are the text. A token that ends within a character has "".
        token_ids: [T] int64.
        logprob: [T] float32, natural logarithm of the token's probability as the model computed it, steered but before
            temperature, top-p and penalties.
        layers: the decoder layer of each of the L rows.
        experts: [L], how many experts each layer has.
        chosen: [T, L, K] int32, the experts chosen in each MoE layer; -1 where none was.
        unsteered: [T, L, K] int32, what the router would have chosen at that place without steering: the router's own
            rule on its own logits, in the same pass. What came before, text and layers below, was steered.
        domains: of the plans that steered the text, [D]; those of a mixture one by one.
        share: [T, D] float32, the share of the token's places, in all MoE layers, that went to experts of each domain's
            vector; 0 without places.
        share_before: [T, D] float32, the same of what would have been chosen.
        strength: [T] float32, c of the plan times its schedule's factor; 0 where the token was not steered.
    """

    tokens: tuple[str, ...]
    token_ids: NDArray[np.int64]
    logprob: NDArray[np.float32]
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    chosen: NDArray[np.int32]
    unsteered: NDArray[np.int32]
    domains: tuple[Domain, ...]
    share: NDArray[np.float32]
    share_before: NDArray[np.float32]
    strength: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def text(self) -> str:
        """The text, of a chat with its thinking and the tags around it."""
        return "".join(self.tokens)

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """[T], which tokens the model has read, so that they have experts."""
        return np.asarray((self.chosen >= 0).any((1, 2)))

    @property
    def moved(self) -> NDArray[np.float32]:
        """[T], the share of each token's places that steering filled with other experts."""
        return moved(self.chosen, self.unsteered)

    def with_domains(self, domains: Sequence[Domain]) -> "Trace":
        """The same trace with the shares of other domains, such as those of a text that is compared with it.

        Raises:
            GenerationError: a domain of another model.
        """
        wanted = (len(self.layers), max(self.experts))
        for domain in domains:
            if domain.experts.shape != wanted:
                raise GenerationError(
                    f"domain {shown(domain.name)} has experts {domain.experts.shape}, expected {wanted}: it is of "
                    "another model than the trace"
                )
        return replace(
            self,
            domains=tuple(domains),
            share=shares(self.chosen, domains),
            share_before=shares(self.unsteered, domains),
        )

    def to_dict(self) -> dict[str, Any]:
        """The trace as JSON values. Choices are lists, experts of domains are lists of [layer's place, expert]."""
        return {
            "version": VERSION,
            "tokens": list(self.tokens),
            "token_ids": self.token_ids.tolist(),
            "logprob": [round(float(one), 5) for one in self.logprob],
            "layers": list(self.layers),
            "experts": list(self.experts),
            "chosen": self.chosen.tolist(),
            "unsteered": self.unsteered.tolist(),
            "domains": [{"name": one.name, "experts": np.argwhere(one.experts).tolist()} for one in self.domains],
            "share": _rounded(self.share),
            "share_before": _rounded(self.share_before),
            "strength": [round(float(one), 5) for one in self.strength],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trace":
        """The trace that `to_dict` wrote; shares follow from its choices.

        Raises:
            GenerationError: something else.
        """
        try:
            return _read(values)
        except GenerationError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise GenerationError(f"this is no trace ({what}): give what `Trace.to_dict` returned") from error

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """What `to_json` wrote; raises as `from_dict`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"this is no trace: not JSON ({error})") from error
        return cls.from_dict(values)


def _rounded(values: NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(one), 5) for one in row] for row in values]


def _read(values: Mapping[str, Any]) -> Trace:
    if values["version"] != VERSION:
        raise GenerationError(f"the trace has version {shown(values['version'])}, expected {VERSION}: make it again")
    layers, experts = tuple(map(int, values["layers"])), tuple(map(int, values["experts"]))
    tokens = values["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(one, str) for one in tokens):
        raise GenerationError("the tokens of the trace are no list of texts: make it again")
    if len(experts) != len(layers) or not layers or len(layers) * max(experts) > MOST_NUMBERS:
        raise GenerationError(f"the trace has {len(layers)} layers, and experts for {len(experts)}: make it again")
    chosen, unsteered = (np.array(values[name], dtype=np.int32) for name in ("chosen", "unsteered"))
    top_k = chosen.shape[2] if chosen.ndim == 3 else 1
    wanted = (len(tokens), len(layers), top_k)
    if not tokens:
        chosen, unsteered = (np.zeros(wanted, dtype=np.int32) for _ in range(2))
    columns = [np.array(values[name], dtype=np.float32) for name in ("logprob", "strength")]
    token_ids = np.array(values["token_ids"], dtype=np.int64)
    limit = np.array(experts)[None, :, None]
    for name, array in (("chosen", chosen), ("unsteered", unsteered)):
        if array.shape != wanted or not bool(((array >= NO_EXPERT) & (array < limit)).all()):
            raise GenerationError(f"'{name}' of the trace does not fit {wanted} and its experts: make it again")
    per_token: list[NDArray[Any]] = [*columns, token_ids]
    for column in per_token:
        if column.shape != wanted[:1]:
            raise GenerationError(f"the trace has {len(tokens)} tokens but {column.size} values for them")
    domains = []
    for one in values["domains"]:
        marks = np.zeros((len(layers), max(experts)), dtype=np.bool_)
        places = np.array(one["experts"], dtype=np.int64).reshape(-1, 2)
        if (places < 0).any():
            raise GenerationError("a domain of the trace has experts below 0: make it again")
        marks[places[:, 0], places[:, 1]] = True
        domains.append(Domain(str(one["name"]), marks))
    empty = np.zeros((len(tokens), 0), dtype=np.float32)
    trace = Trace(
        tuple(tokens), token_ids, columns[0], layers, experts, chosen, unsteered, (), empty, empty, columns[1]
    )
    return trace.with_domains(domains)


def shares(chosen: NDArray[np.int32], domains: Sequence[Domain]) -> NDArray[np.float32]:
    """[T, D], the share of each token's places that went to each domain's experts; `chosen` [T, L, K]."""
    found = np.zeros((len(chosen), len(domains)), dtype=np.float32)
    is_place = chosen >= 0
    places = is_place.sum((1, 2))
    rows = np.arange(chosen.shape[1])[None, :, None]
    for number, domain in enumerate(domains):
        hits = (domain.experts[rows, chosen.clip(0)] & is_place).sum((1, 2))
        found[:, number] = hits / places.clip(1)
    return found


def moved(chosen: NDArray[np.int32], unsteered: NDArray[np.int32]) -> NDArray[np.float32]:
    """[T], the share of each token's places with an expert that would not have been chosen; both [T, L, K]."""
    is_place = chosen >= 0
    is_new = is_place & ~(chosen[..., :, None] == unsteered[..., None, :]).any(-1)
    return (is_new.sum((1, 2)) / is_place.sum((1, 2)).clip(1)).astype(np.float32)


def domains_of(vectors: Sequence["SteeringVector"], shape: "RoutingShape") -> tuple[Domain, ...]:
    """The domains of vectors, those of a mixture one by one, each once."""
    width = max(router.num_experts for router in shape.routers)
    found: dict[str, Domain] = {}
    for vector in vectors:
        for one in vector.sources or (vector,):
            if one.domain not in found:
                marks = np.zeros((len(shape.routers), width), dtype=np.bool_)
                marks[:, : one.num_experts] = one.experts.cpu().numpy() > 0
                found[one.domain] = Domain(one.domain, marks)
    return tuple(found.values())
