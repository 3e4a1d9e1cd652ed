"""What the compiled callback has to do with each token, as arrays that it reads by address.

Shapes: T tokens of a forward call, L routers, N experts of each, P distinct plans, B texts.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steermoe.engines.llamacpp import callback
from steermoe.engines.llamacpp.callback import FIELD, TensorLayout
from steermoe.errors import SteeringError
from steermoe.formulas import FORMULAS
from steermoe.models.gguf.choice import Rule
from steermoe.models.gguf.header import GGUFModel
from steermoe.routing.shape import RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.tables import BANNED, FORCED, tables_for

Reach = Literal["graph", "pieces"]
"""How logits are reached: inside the graph, or between pieces of it (see `callback`)."""

KINDS = {
    "ffn_moe_logits": callback.LOGITS,
    "ffn_moe_logits_biased": callback.BIASED,
    "ffn_moe_probs": callback.PROBABILITIES,
}

_Asked = tuple[list[int], list[float], list[int], list[int] | None]
"""What `steer` was asked for."""


class CallbackState:
    """The arrays and their addresses, for one model and one llama.cpp context.

    Args:
        model: whose routers are steered.
        layout: where things are in this ggml's tensors.
        functions: addresses of ggml_backend_tensor_get, ggml_backend_tensor_set and ggml_backend_buffer_is_host.
        capacity: the most tokens of a forward call.
        reach: as `Reach`; "graph" needs all layers on the CPU.

    Attributes:
        counts: [B, L, N] int64, choices of the tokens that are counted (see `record`).
    """

    def __init__(
        self, model: GGUFModel, layout: TensorLayout, functions: tuple[int, int, int], capacity: int, reach: Reach
    ) -> None:
        experts = {router.num_experts for router in model.routers}
        top_k = {router.top_k for router in model.routers}
        if len(experts) > 1 or len(top_k) > 1:
            raise SteeringError(
                f"{model.name} has layers of {sorted(experts)} experts with {sorted(top_k)} chosen, expected the "
                "same in all: use --engine hf"
            )
        self._model = model
        self.header = np.zeros(len(FIELD), dtype=np.int64)
        self.counts = np.zeros((0, 0, 0), dtype=np.int64)
        self._kept: dict[str, NDArray[Any]] = {}
        routers, layers = len(model.routers), model.layers
        row = np.full(layers[-1] + 1, -1, dtype=np.int32)
        row[list(layers)] = range(routers)
        for name in ("name", "op", "op_params", "src", "data", "ne", "nb", "buffer"):
            self._set(f"at_{name}", getattr(layout, name))
        for name in ("op_custom", "op_softmax", "op_unary", "unary_sigmoid"):
            self._set(name, getattr(layout, name))
        for name, function in zip(("get", "set", "is_host"), functions, strict=True):
            self._set(name, function)
        self._set("custom_edit", callback.edit_in_graph.address)
        self._set("kind", KINDS[model.node])
        self._set("in_graph", int(reach == "graph" and model.node != "ffn_moe_probs"))
        self._set("experts", experts.pop())
        self._set("top_k", top_k.pop())
        self._set("max_layer", layers[-1])
        self._set("routers", routers)
        self._set("stop_after", -1)
        self._keep("row", row)
        self._keep("active", np.zeros(routers, dtype=np.uint8))
        self._keep("number", np.full(capacity, -1, dtype=np.int32))
        self._keep("factor", np.zeros(capacity, dtype=np.float32))
        self._keep("output", np.zeros(capacity, dtype=np.int32))
        self._keep("text", np.full(capacity, -1, dtype=np.int32))
        self._keep("listed", np.zeros(routers, dtype=np.uint8))
        self._keep_of_call(routers)
        self._keep("saved", np.zeros((routers, callback.SAVED), dtype=np.int64))
        self._keep("scratch", np.zeros(capacity * int(self.header[FIELD["experts"]]), dtype=np.float32))
        self._keep("slot", np.full(capacity, -1, dtype=np.int32))
        self._rule: Rule | None = None
        self._asked: _Asked | None = None
        self._used: set[int] | None = None
        self._verified: tuple[bytes, int] | None = None
        self._set("a_state", self.header.ctypes.data)
        self.install([])
        self.record(0)

    @property
    def shape(self) -> RoutingShape:
        return self._model.shape

    def _set(self, name: str, value: int) -> None:
        self.header[FIELD[name]] = value

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        self._kept[name] = values
        self._set(f"a_{name}", values.ctypes.data)

    def _keep_of_call(self, routers: int) -> None:
        """What each forward call begins with as zeros, side by side: clearing each array alone would take longer."""
        words = np.zeros((4, routers), dtype=np.int64)
        for name, own in zip(("calls", "ordered", "source"), words, strict=False):
            self._keep(name, own)
        self._keep("counted", words[3].view(np.uint8)[:routers])
        self._of_call, self._zeros = words.view(np.uint8).reshape(-1).data, bytes(words.nbytes)
        self._seen = self._of_call[: 2 * words[0].nbytes]

    def install(self, plans: Sequence[SteeringPlan]) -> None:
        """Take the plans that tokens will follow, by their numbers in this list.

        Raises:
            CompatibilityError: a vector of another model. SteeringError: layers or experts that it does not have.
        """
        tables = tables_for(self._model.shape, plans)
        push_PLN = np.stack([table.push for table in tables], 1)
        marks_PLN = np.stack([table.marks() for table in tables], 1)
        self._listed_PL = (marks_PLN & (FORCED | BANNED) != 0).any(-1)
        self._busy_PL = (push_PLN != 0).any(-1) | self._listed_PL
        self._keep("push", np.ascontiguousarray(push_PLN))
        self._keep("marks", np.ascontiguousarray(marks_PLN))
        self._keep("formula", np.array([FORMULAS.index(plan.formula) for plan in plans] or [0], dtype=np.int32))
        self._keep("paper", np.array([plan.scale == "paper" for plan in plans] or [False], dtype=np.int32))
        self._asked, self._used = None, None
        self.steer([], [])

    def record(self, texts: int, stop: bool = False) -> None:
        """Count choices from now on, for this many texts; 0 counts none.

        Args:
            texts: B.
            stop: end each forward call once the last router has chosen, if nothing after it is needed.
        """
        header = self.header
        self.counts = np.zeros((texts, int(header[FIELD["routers"]]), int(header[FIELD["experts"]])), dtype=np.int64)
        self._keep("counts", self.counts)
        self._set("has_texts", int(texts > 0))
        self._texts, self._slots = texts, 0
        self._read_choices()
        self._set("stop_after", int(header[FIELD["routers"]]) - 1 if stop else -1)

    def _read_choices(self) -> None:
        """Ask for llama.cpp's own choices only where something needs them: each of them interrupts the graph."""
        is_needed = self._texts > 0 or self._slots > 0 or not self._model.chooses_by_logits
        self._set("from_topk", int(is_needed))
        self._set("has_trace", int(self._slots > 0))

    def trace(self, slots: Sequence[int]) -> None:
        """Say which tokens of the next forward call are traced; call it before each call, or with nothing once.

        Args:
            slots: [T], 0 or more for tokens that are, each another number; -1 for others.
        """
        self._slots = max(slots, default=-1) + 1
        self._read_choices()
        if not self._slots:
            return
        routers, experts, top_k = (int(self.header[FIELD[name]]) for name in ("routers", "experts", "top_k"))
        if self._rule is None:
            self._rule = Rule.of(self._model)
        if len(self._kept.get("edited", ())) < self._slots:
            self._keep("looked", np.zeros((self._slots, routers, 2, experts), dtype=np.float32))
            self._keep("edited", np.zeros((self._slots, routers), dtype=np.uint8))
            self._keep("chosen", np.zeros((self._slots, routers, top_k), dtype=np.int32))
        self._kept["slot"][: len(slots)] = slots
        self._kept["edited"][:] = 0
        self._kept["chosen"][:] = -1

    def take_traced(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What the traced tokens of the last call chose, and would have without steering: [slots, L, K] each.

        Raises:
            SteeringError: how the model's routers choose is not known.
        """
        chosen = self._kept["chosen"][: self._slots].copy()
        unsteered = chosen.copy()
        slot_R, row_R = np.nonzero(self._kept["edited"][: self._slots])
        if len(slot_R):
            assert self._rule is not None
            looked = self._kept["looked"][slot_R, row_R]
            keeps_to_lists = self._kept["listed"][row_R] != 0
            checked = ~keeps_to_lists & (chosen[slot_R, row_R] >= 0).all(1)
            self._rule.check(row_R[checked], looked[checked, 1], chosen[slot_R, row_R][checked])
            unsteered[slot_R, row_R] = self._rule.choose(row_R, looked[:, 0], chosen.shape[2])
        return chosen, unsteered

    def steer(
        self,
        numbers: Sequence[int] | NDArray[np.int32],
        factors: Sequence[float] | NDArray[np.float32],
        outputs: Sequence[int] | NDArray[np.int32] = (),
        texts: Sequence[int] | NDArray[np.int32] | None = None,
    ) -> int:
        """Set what happens to the tokens of the next forward call, in their order.

        Args:
            numbers: [T], each token's plan, or -1.
            factors: [T], the factor for its strength; 0 leaves the token alone.
            outputs: which tokens' logits are wanted: the last layer sees only those.
            texts: [T], which text a token's choices count for, or -1; by default none.

        Returns:
            how many tokens are steered.
        """
        asked = (list(numbers), list(factors), list(outputs), None if texts is None else list(texts))
        if asked != self._asked:
            self._asked, self._steered = asked, self._write(*asked)
        self._of_call[:] = self._zeros
        if self._idle_slots:
            self.header[FIELD["slots"]] += self._steered * self._idle_slots
        return self._steered

    def _write(self, numbers: list[int], factors: list[float], outputs: list[int], texts: list[int] | None) -> int:
        """Write down what `steer` was asked for, if it is not what the call before asked for."""
        tokens = len(numbers)
        number_T, factor_T = self._kept["number"], self._kept["factor"]
        number_T[:tokens], factor_T[:tokens] = numbers, factors
        self._kept["output"][: len(outputs)] = outputs
        self._kept["text"][:tokens] = -1 if texts is None else texts
        self._set("tokens", tokens)
        self._set("outputs", len(outputs))
        steered = [int(number) for number, factor in zip(numbers, factors, strict=True) if number >= 0 and factor != 0]
        used = set(steered)
        if used != self._used:
            self._used = used
            self._activate(sorted(used))
        return len(steered)

    def _activate(self, used: list[int]) -> None:
        """Say in which layers the plans with these numbers do anything."""
        active_L = self._busy_PL[used].any(0)
        self._kept["active"][:] = active_L
        self._kept["listed"][:] = self._listed_PL[used].any(0)
        self._set("any_listed", int(self._kept["listed"].any()))
        self._idle_slots = int((~active_L).sum()) * int(self.header[FIELD["top_k"]])
        self._verified = None

    def verify(self) -> int:
        """Make sure that the forward call was steered as requested.

        Returns:
            how many routers' logits were changed.

        Raises:
            SteeringError: a router was bypassed, or its logits have another shape or type.
        """
        problem, seen = int(self.header[FIELD["problem"]]), bytes(self._seen)
        if not problem and self._verified is not None and seen == self._verified[0]:
            return self._verified[1]  # as in the call before
        self._set("problem", 0)
        if problem == callback.PROBLEM_SHAPE:
            raise SteeringError(
                f"{self._model.architecture}'s router logits in llama.cpp do not match the tokens of the call: "
                "this architecture can't be steered here; use --engine hf"
            )
        if problem == callback.PROBLEM_TYPE:
            raise SteeringError(
                f"{self._model.architecture}'s router logits in llama.cpp are stored or used in an unknown way: "
                "this architecture can't be steered here; use --engine hf"
            )
        calls_L, active_L = self._kept["calls"], self._kept["active"] != 0
        missed = active_L & (calls_L == 0)
        if missed.any():
            layer = self._model.layers[int(missed.argmax())]
            raise SteeringError(
                f"{int(missed.sum())} of {int(active_L.sum())} routers were to be steered but llama.cpp computed no "
                f"node '{self._model.node}-{layer}' in a known way: this architecture can't be steered here; "
                "use --engine hf"
            )
        unordered = (self._kept["listed"] != 0) & (self._kept["ordered"] == 0)
        if unordered.any():
            layer = self._model.layers[int(unordered.argmax())]
            raise SteeringError(
                f"llama.cpp computed no node 'ffn_moe_argsort-{layer}', so no expert can be forced or banned in "
                f"{self._model.architecture} here; use --engine hf, or a llama-cpp-python that steermoe was tested with"
            )
        self._verified = seen, int(calls_L.sum())
        return self._verified[1]

    def take_share(self) -> tuple[int, int]:
        """Top-k slots of steered tokens that went to raised or forced experts, and all slots, since the last call.

        All are those of all MoE layers, as in `SteeringReport`.
        """
        hits, slots = int(self.header[FIELD["hits"]]), int(self.header[FIELD["slots"]])
        self._set("hits", 0)
        self._set("slots", 0)
        return hits, slots

    def take_listed(self) -> dict[str, int]:
        """The counts of `SteeringReport` for forced and banned experts since the last call."""
        names = ("forced_hits", "forced_places", "banned_hits", "banned_places")
        counts = {name: int(self.header[FIELD[name]]) for name in names}
        for name in names:
            self._set(name, 0)
        return counts
