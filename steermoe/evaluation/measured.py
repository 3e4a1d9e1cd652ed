"""Success of vectors for their cards on the Hub, from the folder of an evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steermoe.errors import SteerMoEError
from steermoe.evaluation.results import SETTINGS, SUMMARY
from steermoe.evaluation.summary import MAIN
from steermoe.vectors.card import Measured
from steermoe.vectors.file import tensors_sha256
from steermoe.vectors.vector import SteeringVector

HASH_DIGITS = 16
"""Digits of the hash of a vector's experts that an evaluation's settings keep."""


def measured(folder: Path, vectors: Mapping[str, SteeringVector]) -> dict[str, Measured]:
    """What `steermoe evaluate` found about vectors at their own strength, formula and scale.

    Args:
        folder: where it wrote its results.
        vectors: by domain.

    Returns:
        by domain, those that were measured so.

    Raises:
        SteerMoEError: no finished evaluation is there, or it is of other vectors.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        known = settings["vectors"]
        size = len(settings["openings"]), int(settings["seeds"])
        found = {}
        for domain, vector in vectors.items():
            if domain not in known:
                continue
            if known[domain] != tensors_sha256({"experts": vector.experts.contiguous()})[:HASH_DIGITS]:
                raise SteerMoEError(f"'{path}' is about another vector '{domain}': evaluate the one that you push")
            if (row := _own_row(summary["conditions"], vector)) is not None:
                success, usual = row["figures"][MAIN], summary["unsteered"][domain][MAIN]
                found[domain] = Measured(success["mean"], success["low"], success["high"], usual["mean"], *size)
        return found
    except OSError as error:
        raise SteerMoEError(
            f"can't read '{path}' ({error.strerror}): name the folder that `steermoe evaluate -o` wrote to its end"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SteerMoEError(f"'{path}' is damaged ({error!r}): run `steermoe evaluate` again") from error


def _own_row(conditions: list[dict[str, Any]], vector: SteeringVector) -> dict[str, Any] | None:
    """The condition that steers with a vector as it is; None if there is none."""
    info = vector.info
    for row in conditions:
        is_own = row["kind"] == "steered" and row["domain"] == vector.domain and row["cut"] == "own"
        is_alike = info.formula in (None, row["formula"]) and info.scale in (None, row["scale"])
        if is_own and is_alike and info.strength is not None and abs(row["strength"] - info.strength) < 1e-6:
            return row
    return None
