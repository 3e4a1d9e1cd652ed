"""How a GGUF model's routers choose from their logits: what llama.cpp's graph does between logits and choice.

Not every file says how scores are made of logits, so a `Rule` without that begins with the likeliest way and takes
another one if choices that llama.cpp itself made contradict it; with it, such choices confirm it.

Shapes: R choices, N experts of a layer, K experts chosen per token, G groups.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steermoe.errors import ModelError, TraceError
from steermoe.models.gguf.header import GGUFModel, _read, _Settings

Floats = NDArray[np.float32]
SCORINGS = {1: "softmax", 2: "sigmoid", 3: "logits", 4: "softplus"}
"""By GGUF's numbers of gating functions."""
LIKELIEST = ("sigmoid", "softmax", "softplus", "logits")
"""Where a file with biases or groups says nothing: most that have biases take sigmoids."""
F32 = 0
"""GGUF's type of biases."""
TIE = 1e-5
"""Scores that are closer than this may swap places: llama.cpp rounds differently."""
FEW, SHARE = 3, 0.01
"""How many choices, and which share of them, may contradict a scoring: groups can tie too."""
BY_SUM_OF = 2
"""A group's score is the sum of its best two experts."""


class Rule:
    """Chooses as a model's routers do.

    Args:
        name: of the architecture, for messages.
        biases: [L, N], added to scores before the choice; None for none.
        groups: into which experts are divided; 1 for none.
        groups_used: groups that a token may choose from.
        scoring: how scores are made of logits, as far as it is known.
    """

    def __init__(
        self, name: str, biases: Floats | None, groups: int, groups_used: int, scoring: str | None = None
    ) -> None:
        self._name, self._biases, self._groups, self._groups_used = name, biases, groups, groups_used
        is_plain = biases is None and groups <= 1
        possible = ("logits",) if is_plain else LIKELIEST if scoring is None else (scoring,)
        self._contradicted = dict.fromkeys(possible, 0)
        self._checked = 0

    @classmethod
    def of(cls, model: GGUFModel) -> "Rule":
        """The rule of a model.

        Raises:
            ModelError: the file has changed, or has biases of an unknown type.
        """
        if model.chooses_by_logits:
            return cls(model.architecture, None, 1, 1)
        metadata, tensors = _read(model.path)
        settings = _Settings(model.path, metadata)
        rows = []
        for router in model.routers:
            tensor = tensors.get(f"blk.{router.layer}.exp_probs_b.bias")
            if tensor is None:
                rows.append(np.zeros(router.num_experts, dtype=np.float32))
                continue
            if tensor.kind != F32 or tensor.shape != (router.num_experts,):
                raise ModelError(
                    f"'{model.path}' has biases of layer {router.layer} in a form that is not known: use --engine hf"
                )
            rows.append(_numbers(model.path, tensor.start, router.num_experts))
        groups = settings.number("expert_group_count", 1)
        return cls(
            model.architecture, np.stack(rows), max(1, groups), settings.number("expert_group_used_count", groups)
        )

    def check(self, rows: NDArray[np.intp], logits: Floats, chosen: NDArray[np.int32]) -> None:
        """Compare with choices that llama.cpp made.

        Args:
            rows: [R], the router of each choice, by its place in the model.
            logits: [R, N], as the choice was made from them.
            chosen: [R, K].

        Raises:
            TraceError: no scoring explains them.
        """
        self._checked += len(logits)
        limit = max(FEW, SHARE * self._checked)
        for scoring in self._contradicted:
            by = self._by(scoring, rows, logits)
            is_chosen = np.zeros(by.shape, dtype=bool)
            np.put_along_axis(is_chosen, chosen.astype(np.intp), True, 1)
            least = np.where(is_chosen, by, np.inf).min(1)
            most = np.where(is_chosen, -np.inf, by).max(1)
            self._contradicted[scoring] += int((least < most - TIE * np.maximum(1, np.abs(most))).sum())
        if min(self._contradicted.values()) > limit:
            raise TraceError(
                f"{self._name}'s routers in llama.cpp choose by a rule that is not known, so what they would choose "
                "without steering isn't known either: leave the trace out, or use --engine hf"
            )

    def choose(self, rows: NDArray[np.intp], logits: Floats, top_k: int) -> NDArray[np.int32]:
        """The experts [R, K] chosen from logits [R, N], the best ones first; arguments as for `check`."""
        best = min(self._contradicted, key=lambda scoring: self._contradicted[scoring])
        order = np.argsort(-self._by(best, rows, logits), axis=1, kind="stable")
        return order[:, :top_k].astype(np.int32)

    def _by(self, scoring: str, rows: NDArray[np.intp], logits: Floats) -> Floats:
        """What the largest are taken of, [R, N]."""
        with np.errstate(over="ignore"):
            scores = _score(scoring, logits)
        if self._biases is not None:
            scores = scores + self._biases[rows]
        if self._groups <= 1 or self._groups_used >= self._groups:
            return scores
        grouped = scores.reshape(len(scores), self._groups, scores.shape[1] // self._groups)
        of_groups = np.sort(grouped, axis=2)[:, :, -BY_SUM_OF:].sum(2)
        used = np.argsort(-of_groups, axis=1, kind="stable")[:, : self._groups_used]
        is_used = np.zeros(of_groups.shape, dtype=bool)
        np.put_along_axis(is_used, used, True, 1)
        return np.where(is_used[:, :, None], grouped, -np.inf).reshape(scores.shape).astype(np.float32)


def _score(scoring: str, logits: Floats) -> Floats:
    if scoring == "softmax":
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))
    if scoring == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    if scoring == "softplus":
        return np.asarray(np.sqrt(np.logaddexp(0, logits)))
    return logits


def _numbers(path: Path, start: int, count: int) -> Floats:
    return np.fromfile(path, dtype="<f4", count=count, offset=start).astype(np.float32)
