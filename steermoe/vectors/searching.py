"""Find packs of vectors on the Hub. What the Hub answers about them, others wrote: it is checked, and only shown."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from steermoe.hub import check_reachable, endpoint, hub_errors
from steermoe.routing.shape import RoutingShape
from steermoe.vectors.card import KEY, TAG
from steermoe.vectors.file import SUFFIX, normal_name

MOST_PACKS = 1000
"""The most downloaded ones, among which is searched."""
MOST_LISTED = 256
"""Domains and keywords that are kept of one pack."""
DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


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
    from huggingface_hub.utils import build_hf_headers, paginate

    check_reachable()
    asked = {"filter": TAG, "sort": "downloads", "limit": MOST_PACKS, "full": True, "cardData": True}
    with hub_errors(what="the search"):  # HfApi.list_models raises TypeError for some keys of a card
        pages = paginate(f"{endpoint()}/api/models", asked, build_hf_headers(token=token))
        listed = list(islice(pages, MOST_PACKS))
    found = [pack for one in listed if (pack := _found(one)) is not None]
    chosen = [pack for pack in found if pack.is_about(text) and (model is None or pack.fits(model))]
    return chosen, len(listed) == MOST_PACKS


def _found(info: Any) -> PackFound | None:
    """A pack, from the Hub's JSON; what is not of the expected kind is left out. None if it has no name."""
    info = _mapping(info)
    repo, downloads = _text(info.get("id")), info.get("downloads")
    if not repo:
        return None
    card = _mapping(info.get("cardData"))
    own = _mapping(card.get(KEY))
    records = map(_mapping, _list(own.get("vectors"))[:MOST_LISTED])
    words = [word for record in records for word in _list(record.get("keywords"))]
    names = [_text(_mapping(one).get("rfilename")) for one in _list(info.get("siblings"))]
    domains = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return PackFound(
        repo=repo,
        domains=tuple(sorted(one for one in domains if one == normal_name(one))[:MOST_LISTED]),
        model=_text(own.get("model")),
        base_model=_text(base),
        fingerprint=_text(own.get("fingerprint")),
        licence=_text(card.get("license")),
        keywords=tuple(word for word in words if isinstance(word, str))[:MOST_LISTED],
        downloads=downloads if type(downloads) is int else 0,
        updated=day[0] if (day := DAY.match(_text(info.get("lastModified")))) else "",
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
