"""The Mixture-of-Experts families of the installed transformers, and how steermoe handles each.

Read from their source files, not from a list of supported names: a family that a newer transformers adds appears
automatically, as steerable or with the reason why not. Imports neither transformers nor torch, and builds no model.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from steermoe.errors import ModelError
from steermoe.routing.architectures import (
    HASH_REASON,
    LINEAR_GATE,
    NO_ROUTER_REASONS,
    NOT_A_ROUTER,
    NOT_RUN,
    NOT_TEXT,
    PYTHON_ONLY,
    ROUTER_CLASS,
)

UNKNOWN_REASON = "no router class that steermoe knows"

WRITERS = "CAUSAL_LM|SEQ_TO_SEQ_CAUSAL_LM|IMAGE_TEXT_TO_TEXT"
"""The kinds of models that the commands load."""
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
EXPERTS_CLASS = re.compile(r"Experts?$")
EXPERTS_IN_CODE = re.compile(
    r"@use_experts_implementation"
    r"|\bconfig\.(?:num_experts|num_local_experts|n_routed_experts|moe_num_experts"
    r"|num_experts_per_tok|top_k_experts|moe_topk|moe_top_k|moe_k)\b"
)
"""What the code of a mixture of experts contains, whatever its router is called. `num_experts` alone is not enough:
dense models inherit it from the mixture that they were copied from.
"""
RECORDED_ROUTER = re.compile(r"[\"']router_logits[\"']: *(\[[^\]]*\]|[^\n]*)")
"""An entry of `_can_record_outputs`, in which a model declares what computes its router logits."""
LINEAR_LAYER = re.compile(r"self\.(\w+) = nn\.Linear\(([^\n]*(?:\n[^\n]*){0,3}?)\)\n")


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        family: its folder in `transformers.models`, usually its `model_type` too.
        steerable: whether steermoe finds its routers and steers them.
        reason: why not; for a steerable family, which of its routers are left alone, and whether the commands can't
            run it; or "".
        routers: the classes that are steered; "Linear" is a plain layer with the name of a gate.
    """

    family: str
    steerable: bool
    reason: str
    routers: tuple[str, ...]


def list_families(models: Path | None = None) -> list[Family]:
    """Every family that routes text tokens to experts, sorted by name.

    A model that only wraps another family's text model, as many vision models do, is not listed: it is steered as that
    family.

    Args:
        models: folder with one subfolder per family; by default that of the installed transformers.

    Raises:
        ModelError: transformers is not installed.
    """
    return list(_list_families(models or _transformers_models()))


@functools.cache
def _list_families(models: Path) -> tuple[Family, ...]:
    sources: dict[str, list[str]] = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        data = path.read_bytes()
        if b"xpert" in data:  # most families have none; decoding and searching those would take most of the time
            sources.setdefault(path.parent.name, []).append(data.decode())
    writers = _writers(models / "auto" / "modeling_auto.py")
    families = []
    for name, texts in sources.items():
        source = "\n".join(texts)
        family = _read_family(name, source)
        if family is not None and family.steerable and (wrong := _why_not_run(name, source, writers)):
            family = replace(family, reason="; ".join(filter(None, (family.reason, f"{PYTHON_ONLY}: {wrong}"))))
        families += [] if family is None else [family]
    return tuple(families)


def _writers(path: Path) -> set[str] | None:
    """The classes that transformers registers as models that continue a text; None if it has no such file."""
    if not path.is_file():
        return None
    source = path.read_text()
    blocks = re.findall(rf"^MODEL_FOR_(?:{WRITERS})_MAPPING_NAMES = (.*?)^\)$", source, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"(\w+)"\s*\)', "\n".join(blocks)))


def _why_not_run(family: str, source: str, writers: set[str] | None) -> str:
    """Why the commands can't generate with a family whose routers are found; "" if they can."""
    if family in NOT_RUN:
        return NOT_RUN[family]
    is_known = writers is None or not writers.isdisjoint(CLASS.findall(source))
    return "" if is_known else "transformers has no class for it that continues a text"


def _transformers_models() -> Path:
    spec = importlib.util.find_spec("transformers")  # finds it without running it
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("transformers is not installed: `pip install transformers`")
    return Path(spec.submodule_search_locations[0]) / "models"


def _read_family(family: str, source: str) -> Family | None:
    """What the source says, or None if it is not a mixture of experts that generates text."""
    code_of = dict(_classes(source))
    recorded = _recorded(source)
    candidates = [name for name in code_of if ROUTER_CLASS.search(name) or name in recorded]
    routers = tuple(name for name in candidates if not NOT_A_ROUTER.search(name) and "Attention" not in name)
    text_code = {name: code for name, code in code_of.items() if not NOT_TEXT.search(name)}
    if "vocab_size" not in source or not (routers or _has_experts(text_code)):
        return None
    if not routers and family not in NO_ROUTER_REASONS and any(map(_has_linear_gate, text_code.values())):
        routers = ("Linear",)
    if routers:
        return Family(family, True, _left_alone(candidates), routers)
    usual = HASH_REASON if any("Hash" in name for name in candidates) else UNKNOWN_REASON
    return Family(family, False, NO_ROUTER_REASONS.get(family, usual), ())


def _has_experts(code_of: Mapping[str, str]) -> bool:
    return any(EXPERTS_CLASS.search(name) or EXPERTS_IN_CODE.search(code) for name, code in code_of.items())


def _classes(source: str) -> Iterator[tuple[str, str]]:
    """The name and the code of each class, with its decorators."""
    names = list(CLASS.finditer(source))
    ends = [match.start() for match in names[1:]] + [len(source)]
    for match, end in zip(names, ends, strict=True):
        decorators = re.search(r"(?:^@[^\n]*\n)*\Z", source[: match.start()][-500:], re.MULTILINE)
        above = decorators.group() if decorators else ""
        yield match[1], above + source[match.start() : end]


def _recorded(source: str) -> set[str]:
    """The classes that the model declares as the source of its router logits."""
    return {name for entry in RECORDED_ROUTER.findall(source) for name in re.findall(r"\w+", entry)} - {"Linear"}


def _has_linear_gate(code: str) -> bool:
    return any(LINEAR_GATE.search(name) and "expert" in arguments for name, arguments in LINEAR_LAYER.findall(code))


def _left_alone(candidates: list[str]) -> str:
    """Which routers of a steerable family are not steered."""
    parts = {
        "Hash": "its hash routers, which have no logits",
        "Attention": "the routers of its attention",
        "Vision": "its vision routers",
        "Talker": "its talker's routers",
    }
    left = [what for word, what in parts.items() if any(word in name for name in candidates)]
    return f"except {' and '.join(left)}" if left else ""
