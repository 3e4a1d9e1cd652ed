"""The card of a pack on the Hub, its README.md: what was measured on each vector, and how to use it. Knows no network.

The card has a part that is written anew each time, between two comments; what people write around it stays.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from steermoe.errors import VectorError, reason
from steermoe.vectors.file import VectorHeader
from steermoe.vectors.vector import format_layers

TAGS = ("steermoe", "steermoe-vector", "steering-vector", "mixture-of-experts")
TAG = "steermoe-vector"
"""By which packs are found."""
KEY = "steermoe"
"""In the front matter: the model, and a record of each vector."""
BEGIN, END = "<!-- written by `steermoe vectors push` -->", "<!-- end of what it wrote -->"
MOST_KEYWORDS = 12
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~!&$])")
"""What Markdown or HTML would act on."""
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Measured:
    """How often a vector brings a text into its domain at its own strength, as `steermoe evaluate` measured it.

    Attributes:
        success, low, high: share of texts that are about the domain and sound, with its 95% interval.
        unsteered: the same share without steering.
        openings, seeds: how many texts: each opening was continued once with each seed.
    """

    success: float
    low: float
    high: float
    unsteered: float
    openings: int
    seeds: int

    @classmethod
    def read(cls, record: Any) -> "Measured | None":
        """From a card's front matter; None if it is not there, or not in form."""
        if not isinstance(record, Mapping):
            return None
        values: dict[str, Any] = {one.name: record.get(one.name) for one in fields(cls)}
        are_numbers = all(type(value) in (int, float) and 0 <= value < 10**9 for value in values.values())
        return cls(**values) if are_numbers else None


@dataclass(frozen=True)
class Entry:
    """A vector of a pack: the header of its file, and what was measured, if anything was."""

    header: VectorHeader
    measured: Measured | None = None
    has_picture: bool = True


@dataclass(frozen=True)
class Card:
    """What a card says about a pack as a whole.

    Attributes:
        repo: USER/REPO.
        base_model: the model's id on the Hub; "" if it has none.
        licence: of the vectors, as the Hub spells it, such as apache-2.0; "" if unknown.
        run_with: what --model takes in commands; "" for the default model.
        about: a sentence about the model.
    """

    repo: str
    base_model: str = ""
    licence: str = ""
    run_with: str = ""
    about: str = ""

    def write(self, entries: Sequence[Entry], existing: str = "") -> str:
        """The whole card.

        Args:
            entries: all vectors of the pack.
            existing: the card that is there, whose other front matter and text stay.

        Raises:
            VectorError: the front matter of the existing card can't be read.
        """
        entries = sorted(entries, key=lambda entry: entry.header.domain)
        card = _parsed(existing, self.repo)
        tags = card.data.get("tags") or []
        kept = [str(tag) for tag in tags if tag not in TAGS] if isinstance(tags, list) else []
        for name, value in {**self.metadata(entries), "tags": [*TAGS, *kept]}.items():
            card.data[name] = value
        card.text = f"\n{_around(card.text, self.body(entries))}\n"
        return str(card.content)

    def metadata(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The front matter."""
        first = entries[0].header.info
        vectors = []
        for entry in entries:
            header = entry.header
            record: dict[str, Any] = {"domain": header.domain, "sha256": header.sha256 or header.tensors_sha256}
            if header.info.keywords:
                record["keywords"] = list(header.info.keywords[:MOST_KEYWORDS])
            vectors.append(record | ({"success": asdict(entry.measured)} if entry.measured else {}))
        found: dict[str, Any] = {"library_name": "steermoe"}
        if self.base_model:
            found |= {"base_model": self.base_model, "base_model_relation": "adapter"}
        if self.licence:
            found["license"] = self.licence
        return found | {KEY: {"model": first.model, "fingerprint": first.fingerprint, "vectors": vectors}}

    # ---- the text ----

    def body(self, entries: Sequence[Entry]) -> str:
        """The part that is written anew, in Markdown."""
        first = entries[0].header
        name = first.info.model or self.base_model or "a Mixture-of-Experts model"
        lines = [
            BEGIN,
            f"# Steering vectors for {_code(name)}",
            "",
            f"Each vector turns what {_code(name)} writes toward a domain. It changes the routers' choice of experts, "
            "but no weights.",
        ]
        if self.base_model:
            lines += ["", f"Base model: [{_plain(self.base_model)}](https://huggingface.co/{self.base_model})."]
        lines += ["", self.about] if self.about else []
        lines += ["", "## Use", "", *self._use(entries), "", "## What was measured", "", *_table(entries)]
        for entry in entries:
            lines += ["", *_section(entry)]
        return "\n".join([*lines, "", END])

    def _use(self, entries: Sequence[Entry]) -> list[str]:
        domain = entries[0].header.domain
        model = f" --model {shlex.quote(' '.join(self.run_with.split()))}" if self.run_with else ""
        command = f"steermoe generate{model} -d hub:{self.repo}/{domain}"
        loading = f'SteeringVector.from_pretrained("{self.repo}", "{domain}")'
        return [
            *["```bash", "pip install steermoe", command, "```", ""],
            *["```python", "from steermoe import SteeringVector", "", f"vector = {loading}", "```"],
        ]


def _around(text: str, part: str) -> str:
    """A card's text with the part that is written anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    parts = [before, part, after] if begin and end else [part, text]
    return "\n\n".join(stripped for each in parts if (stripped := each.strip()))


def _table(entries: Sequence[Entry]) -> list[str]:
    rows = []
    for entry in entries:
        info = entry.header.info
        spread = f"{info.safe_range[0]:g} to {info.safe_range[1]:g}" if info.safe_range else UNKNOWN
        damage = f"{info.damage:.2f} nats" if info.damage is not None else UNKNOWN
        success, without = UNKNOWN, UNKNOWN
        if entry.measured:
            count = entry.measured.openings * entry.measured.seeds
            interval = f"{entry.measured.low:.0%} to {entry.measured.high:.0%}"
            success = f"{entry.measured.success:.0%} ({interval}) of {count:,} texts"
            without = f"{entry.measured.unsteered:.0%}"
        strength = f"{info.strength:g}" if info.strength is not None else "a guess"
        texts = f"{info.texts:,}" if info.texts else ""
        rows.append((entry.header.domain, strength, spread, damage, success, without, texts, _plain(info.licence)))
    titles = ("domain", "strength", "safe range", "damage", "success", "unsteered", "texts", "licence")
    lines = [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)]
    explained = [
        "- Strength: the default. Within the safe range, the damage is at most the one in the table.",
        "- Damage: 95th percentile of KL(steered || unsteered) per token of neutral texts, at the end of that range.",
    ]
    if any(entry.measured for entry in entries):
        explained.append(
            "- Success: share of continuations that are about the domain, and neither gibberish nor loops nor lists, "
            "with its 95% interval, as `steermoe evaluate` measures it."
        )
    return [*lines, "", *explained, "- Texts: how many the vector was built from."]


def _section(entry: Entry) -> list[str]:
    header, info = entry.header, entry.header.info
    cut = "weights as given"
    if "weights" not in header.matrices:
        usual = "the corpus baseline" if header.relative else "the mean frequency"
        cut = f"experts over {header.threshold:g} x {usual}"
    facts = {
        "about": _plain(info.title),
        "keywords": _plain(", ".join(info.keywords[:MOST_KEYWORDS])),
        "formula": f"`{info.formula}`, scale `{info.scale or 'magnitude'}`" if info.formula else "",
        "layers x experts": f"{len(header.layers)} x {header.num_experts}, layers {format_layers(header.layers)}",
        "cut": cut,
        "routers": f"`{info.fingerprint}`" if info.fingerprint else "",
        "tokens": f"{info.tokens:,}" if info.tokens else "",
        "mixed from": _plain(", ".join(info.parts)),
        "made by": _plain(info.created_by),
        "pulled from": _plain(info.source),
        "sha256": f"`{header.sha256 or header.tensors_sha256}`",
    }
    lines = [f"### {header.domain}", "", *(f"- {label}: {fact}" for label, fact in facts.items() if fact)]
    if entry.has_picture:
        lines += ["", f"![Map of {header.domain}: layers and experts]({header.domain}.png)"]
    return lines


def _plain(text: str) -> str:
    """Text from a file on one line, with what Markdown and HTML would act on made harmless."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return SPECIAL.sub(r"\\\1", " ".join(shown.split())).replace("\\<", "&lt;").replace("\\&", "&amp;")


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`"


def _parsed(text: str, repo: str) -> Any:
    """A card as huggingface_hub reads it.

    Raises:
        VectorError: its front matter can't be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=True)
        card.data.to_dict()
        return card
    except Exception as error:  # the library's, or its YAML's
        raise VectorError(
            f"the README.md of '{repo}' has front matter that can't be read ({reason(error, 100)}): mend it"
        ) from error


def read_metadata(text: str, repo: str) -> dict[str, Any]:
    """The front matter of a card; of none, for an empty text.

    Raises:
        VectorError: it can't be read.
    """
    return dict(_parsed(text, repo).data.to_dict()) if text else {}


def licence_id(licence: str) -> str:
    """A licence as the Hub spells it; "" stays.

    Raises:
        VectorError: it can't be one.
    """
    found = licence.strip().lower()
    if found and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,39}", found):
        raise VectorError(
            f"licence {licence[:60]!r} is none that the Hub knows: name one with --licence, such as apache-2.0 or "
            "cc-by-4.0"
        )
    return found


def recorded(metadata: Any) -> dict[str, Measured]:
    """What an existing card's front matter says was measured, by the hash of the vector's file."""
    own = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    vectors = own.get("vectors") if isinstance(own, Mapping) else None
    found = {}
    for one in vectors if isinstance(vectors, list) else ():
        measured = Measured.read(one.get("success")) if isinstance(one, Mapping) else None
        if measured and isinstance(one.get("sha256"), str):
            found[one["sha256"]] = measured
    return found
