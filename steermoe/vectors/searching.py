"""Find packs of vectors on the Hub. What the Hub answers about them, others wrote: it is checked, and only shown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steermoe.hub import check_reachable, endpoint, hub_errors
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.card import KEY, TAG
from steermoe.vectors.file import SUFFIX, normal_name

MOST_PACKS = 1000
"""The most downloaded ones, among which is searched."""
MOST_LISTED = 256
"""Domains and keywords that are kept of one pack."""


@dataclass(frozen=True)
class PackFound:
    """A pack as the Hub describes it.

    Attributes:
        repo: USER/REPO.
        domains: its vectors, by the names of their files.
        model: the model's name that its card gives; "" if it gives none.
        base_model: the model's id on the Hub; "" if there is none.
        fingerprint: of the model's routers; "" if the card gives none.
        keywords: what its vectors are about.
        updated: the day of the last change, as 2026-11-29; "" if unknown.
    """

    repo: str
    domains: tuple[str, ...]
    model: str
    base_model: str
    fingerprint: str
    licence: str
    keywords: tuple[str, ...]
    downloads: int
    updated: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_about(self, text: str) -> bool:
        """Whether every word of a text is in something that is known of it."""
        known = (self.repo, *self.domains, self.model, self.base_model, *self.keywords)
        whole = "\n".join(known).casefold()
        return all(word in whole for word in text.casefold().split())

    def fits(self, model: RoutingShape) -> bool:
        """Whether it is for a model: for its routers, or where those are unknown on a side, for its name."""
        if self.fingerprint and model.fingerprint:
            return self.fingerprint == model.fingerprint
        return any(model.is_named(name) for name in (self.model, self.base_model) if name)


def search(text: str = "", model: RoutingShape | None = None, token: str | None = None) -> tuple[list[PackFound], bool]:
    """Packs on the Hub, the most downloaded first.

    Args:
        text: words that must all be in what is known of a pack; "" for all.
        model: the model that they must be for; of a model that is only named, a shape with nothing but the name.
        token: instead of the saved one.

    Returns:
        the packs, and whether there were too many to look at all of them.

    Raises:
        HubError: the Hub gives no answer, or an odd one.
    """
    from huggingface_hub import HfApi

    check_reachable()
    with hub_errors("the search"):
        listed = HfApi(endpoint(), token).list_models(
            filter=TAG, sort="downloads", limit=MOST_PACKS, full=True, cardData=True
        )
        found = [_found(info) for info in listed]
    chosen = [pack for pack in found if pack.is_about(text) and (model is None or pack.fits(model))]
    return chosen, len(found) == MOST_PACKS


def _found(info: Any) -> PackFound:
    """A pack, from what the Hub says; what is not of the expected kind is left out."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    own = card.get(KEY)
    own = own if isinstance(own, Mapping) else {}
    records = own.get("vectors")
    words = [
        word
        for record in (records if isinstance(records, list) else [])[:MOST_LISTED]
        if isinstance(record, Mapping) and isinstance(record.get("keywords"), list)
        for word in record["keywords"]
    ]
    names = [str(one.rfilename) for one in info.siblings or ()]
    domains = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return PackFound(
        repo=str(info.id),
        domains=tuple(sorted(one for one in domains if one == normal_name(one))[:MOST_LISTED]),
        model=_text(own.get("model")),
        base_model=_text(base),
        fingerprint=_text(own.get("fingerprint")),
        licence=_text(card.get("license")),
        keywords=tuple(word for word in words if isinstance(word, str))[:MOST_LISTED],
        downloads=info.downloads or 0,
        updated=f"{info.last_modified:%Y-%m-%d}" if info.last_modified else "",
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
