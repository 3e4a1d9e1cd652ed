"""Put vectors into a pack on the Hub: their files, a map of each, and the card, in one commit."""

import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steermoe.errors import HubUnreachable, VectorError, shown
from steermoe.figures import check_matplotlib
from steermoe.hub import check_reachable, endpoint, hub_errors, is_there, patience
from steermoe.vectors.card import Card, Entry, Measured, licence_id, read_metadata, recorded
from steermoe.vectors.file import SUFFIX, VectorHeader, check_domain_name, read_header, write_vector
from steermoe.vectors.hub import REPO, Pack, check_repo, fetch, open_pack
from steermoe.vectors.vector import SteeringVector

CARD = "README.md"
MOST_CARD_BYTES = 2**20
FOLDERS = frozenset(("checkpoint", "checkpoints", "data", "model", "models", "out", "output", "outputs", "tmp"))
"""What models/mine begins with, which is a folder, though it looks like a repository."""


@dataclass(frozen=True)
class Push:
    """How vectors are pushed.

    Attributes:
        message: of the commit; "" for one that names the domains.
        private: whether a new repository is private; None for what the account has by default.
        token: instead of the saved one.
        base_model: the model's id on the Hub; "" for the one of the pack's card, or the model's name, if that is one.
        licence: of the vectors; "" for the one of the pack's card, or the one that all of them name.
        measured: success of vectors, by domain.
        run_with: what --model takes in the card's commands; None for the base model.
        about: a sentence about the model for the card.
    """

    message: str = ""
    private: bool | None = None
    token: str | None = field(default=None, repr=False)
    base_model: str = ""
    licence: str = ""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    run_with: str | None = None
    about: str = ""

    def card(self, repo: str, headers: Sequence[VectorHeader], known: Mapping[str, Any]) -> Card:
        """What the card says, apart from its entries.

        Args:
            repo: USER/REPO.
            headers: of all vectors of the pack.
            known: the front matter of the card that is there.

        Raises:
            VectorError: a licence or a base model that is none; vectors of several licences, and none was named.
        """
        said = {name: value for name in ("base_model", "license") if isinstance(value := known.get(name), str)}
        licence = licence_id(self.licence or said.get("license", "")) or _common_licence(headers)
        model = headers[0].info.model
        base = self.base_model or said.get("base_model") or _hub_id(model)
        base = check_repo(base) if base else ""
        return Card(repo, base, licence, base or model if self.run_with is None else self.run_with, self.about)


def _common_licence(headers: Sequence[VectorHeader]) -> str:
    """The licence that all vectors name; "" if one of them names none.

    Raises:
        VectorError: they name several, or what is none.
    """
    licences = {licence_id(header.info.licence) for header in headers}
    if len(licences - {""}) > 1:
        listed = ", ".join(sorted(licences - {""}))
        raise VectorError(f"the vectors have several licences ({listed}): name one of the pack with --licence")
    return min(licences)


def _hub_id(model: str) -> str:
    """The model's id on the Hub, if its name can be one; "" for what is or looks like a folder."""
    is_id = REPO.fullmatch(model) and not model.endswith(".git") and model.partition("/")[0].lower() not in FOLDERS
    return model if is_id and not Path(model).exists() else ""


@dataclass(frozen=True)
class Pushed:
    """What was pushed: the commit and its address, and the domains and the base model that the pack has now."""

    repo: str
    commit: str
    url: str
    domains: tuple[str, ...]
    base_model: str


def push(vectors: Sequence[SteeringVector], repo: str, wanted: Push | None = None) -> Pushed:
    """Put vectors of one model into a pack, which is created if it is not there; what else it has stays.

    Raises:
        VectorError: vectors of several models, or of another one than the pack's; a name that can't be a file's.
        HubError: the Hub refuses it, or gives no answer. SteerMoEError: matplotlib is missing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from steermoe.vectors.picture import draw_vector

    wanted = wanted or Push()
    check_repo(repo)
    check_matplotlib()
    with tempfile.TemporaryDirectory() as scratch:
        written = write_files(vectors, Path(scratch))
        check_reachable()
        api = HfApi(endpoint(), wanted.token)
        with hub_errors(repo):
            if not is_there(repo, wanted.token):
                wanted.card(repo, list(written.values()), {})  # nothing is created for what can't be pushed
            api.create_repo(repo, private=wanted.private, exist_ok=True)
        pack = open_pack(repo, token=wanted.token)
        if pack.why_cached:  # the copy has no card, and what is there must stay
            raise HubUnreachable(pack.why_cached)
        headers = {**_others(pack, written), **written}
        existing = _card_of(pack) if CARD in pack.sizes else ""
        known = read_metadata(existing, repo)
        card = wanted.card(repo, list(headers.values()), known)
        pictures = {f"{domain}.png" for domain in written} | pack.sizes.keys()
        entries = _entries(headers, wanted.measured, known, pictures)
        (Path(scratch) / CARD).write_text(card.write(entries, existing), encoding="utf-8")
        for vector in vectors:
            draw_vector(vector, Path(scratch) / f"{check_domain_name(vector.domain)}.png")
        files = sorted(Path(scratch).iterdir())
        with hub_errors(repo):
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(path.name, path.read_bytes()) for path in files],
                commit_message=wanted.message or f"Add {', '.join(sorted(written))}"[:200],
                parent_commit=pack.commit,
            )
    return Pushed(repo, str(commit.oid), str(commit.commit_url), tuple(sorted(headers)), card.base_model)


def preview(vectors: Sequence[SteeringVector], repo: str, wanted: Push) -> str:
    """The card of a pack that has nothing but these vectors; asks no Hub. Errors as of `push`."""
    check_repo(repo)
    with tempfile.TemporaryDirectory() as scratch:
        headers = write_files(vectors, Path(scratch))
    entries = _entries(headers, wanted.measured, {}, {f"{domain}.png" for domain in headers})
    return wanted.card(repo, list(headers.values()), {}).write(entries)


def write_files(vectors: Sequence[SteeringVector], folder: Path) -> dict[str, VectorHeader]:
    """Write the files of vectors.

    Returns:
        the headers of the files, by domain.

    Raises:
        VectorError: vectors of several models, a domain twice, or a name that can't be a file's.
    """
    headers: dict[str, VectorHeader] = {}
    for vector in vectors:
        domain = check_domain_name(vector.domain)
        if domain in headers:
            raise VectorError(f"two of the vectors are called '{domain}': push one of them")
        write_vector(vector, folder / f"{domain}{SUFFIX}")
        headers[domain] = read_header(folder / f"{domain}{SUFFIX}")
        _check_one_model(headers[domain], next(iter(headers.values())), "the others")
    return headers


def _check_one_model(header: VectorHeader, other: VectorHeader, of: str) -> None:
    """Raise VectorError if two vectors are not of one model: a pack has one base model."""
    prints = header.info.fingerprint, other.info.fingerprint
    differ = (header.layers, header.num_experts) != (other.layers, other.num_experts)
    if differ or (all(prints) and prints[0] != prints[1]) or header.info.model != other.info.model:
        own, there = (shown(one.info.model) if one.info.model else "an unknown model" for one in (header, other))
        raise VectorError(
            f"vector '{header.domain}' is for {own}, {of} for {there} ({len(other.layers)}x{other.num_experts}, "
            f"routers {other.info.fingerprint or 'unknown'}): a pack is for one model, push it to another repository"
        )


def _others(pack: Pack, written: Mapping[str, VectorHeader]) -> dict[str, VectorHeader]:
    """The headers of what a pack has already; all of it is of the model of what is pushed."""
    first = next(iter(written.values()))
    found = {domain: read_header(fetch(pack, domain)) for domain in pack.files}
    for header in found.values():
        _check_one_model(first, header, f"those of '{pack.repo}' are")
    return found


def _card_of(pack: Pack) -> str:
    """The text of a pack's card.

    Raises:
        VectorError: it is too large, or no text. HubError: it can't be downloaded.
    """
    from huggingface_hub import hf_hub_download

    too_large = f"it has more than {MOST_CARD_BYTES:,} bytes"
    if (pack.sizes[CARD] or 0) > MOST_CARD_BYTES:
        raise VectorError(f"the {CARD} of '{pack.repo}' is no card ({too_large}): mend it")
    with hub_errors(pack.repo):
        path = Path(
            hf_hub_download(
                pack.repo,
                CARD,
                revision=pack.commit,
                endpoint=endpoint(),
                token=pack.token,
                etag_timeout=patience(),
            )
        )
    with path.open("rb") as file:
        content = file.read(MOST_CARD_BYTES + 1)
    try:
        if len(content) > MOST_CARD_BYTES:
            raise ValueError(too_large)
        return content.decode()
    except ValueError as error:
        raise VectorError(f"the {CARD} of '{pack.repo}' is no card ({error}): mend it") from error


def _entries(
    headers: Mapping[str, VectorHeader],
    measured: Mapping[str, Measured],
    metadata: Mapping[str, Any],
    pictures: Set[str],
) -> list[Entry]:
    """What the card says about each vector; what it said before about the same file stays."""
    known = recorded(metadata)
    return [
        Entry(header, measured.get(domain) or known.get(header.sha256 or ""), f"{domain}.png" in pictures)
        for domain, header in headers.items()
    ]


def as_record(pushed: Pushed) -> dict[str, Any]:
    """For JSON."""
    return {
        "repo": pushed.repo,
        "revision": pushed.commit,
        "url": pushed.url,
        "domains": list(pushed.domains),
        "base_model": pushed.base_model,
    }
