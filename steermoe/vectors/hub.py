"""Vectors on the Hub: `hub:USER/REPO/DOMAIN@REVISION`, and packs, which are repositories with `DOMAIN.safetensors`.

What is downloaded lies in the cache of the Hub's client, so that it is there without a network too, and is checked:
its size before, the hash that the Hub names for it after, then all that a vector file is checked for. Nothing that a
pack holds but vector files is read here, and no code of it runs.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steermoe.errors import HubError, HubUnreachable, VectorError, VectorNotFound, count_of, quoted, shown
from steermoe.hub import check_reachable, endpoint, hub_errors, listing, patience
from steermoe.vectors.file import (
    MAX_FILE_BYTES,
    SUFFIX,
    VectorHeader,
    check_domain_name,
    normal_name,
    read_header,
    read_vector,
    write_vector,
)
from steermoe.vectors.vector import SteeringVector

logger = logging.getLogger(__name__)

PREFIX = "hub:"
FORM = f"{PREFIX}USER/REPO/DOMAIN, with @REVISION if you like"
MAIN = "main"
"""The branch that is meant if no revision is named."""
MOST_VECTORS = 256
"""Of a pack that is pulled whole."""
MOST_FOLDER_NAME = 200
"""Bytes of a folder's name that a model gives it."""
REPO = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,99}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN_DIGITS = 12
"""Digits of a commit in messages."""


@dataclass(frozen=True)
class Place:
    """Where a vector is on the Hub.

    Attributes:
        revision: a branch, a tag or a commit; "" for the latest of the main branch.
    """

    repo: str
    domain: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}/{self.domain}" + (f"@{self.revision}" if self.revision else "")


def is_place(name: str | Path) -> bool:
    """Whether a domain is given as its place on the Hub."""
    return str(name).startswith(PREFIX)


def refuse_places(names: Iterable[str], fix: str) -> None:
    """Raise VectorError for a place on the Hub where a file is to be changed: its copy in the cache must stay as it is.

    `fix` says what to do instead.
    """
    if place := next(filter(is_place, names), None):
        raise VectorError(f"'{quoted(place)}' is on the Hub, where nothing is changed: {fix}")


def parse_place(text: str) -> Place:
    """The place that `hub:USER/REPO/DOMAIN@REVISION` names.

    Raises:
        VectorError: it is not of that form, or a part of it could leave its folder.
    """
    whole, sign, revision = text.removeprefix(PREFIX).partition("@")
    repo, slash, domain = whole.rpartition("/")
    if not slash or "/" not in repo or (sign and not revision):
        raise VectorError(f"'{quoted(text)}' is no place on the Hub: write {FORM}")
    return Place(check_repo(repo), check_domain_name(domain), check_revision(revision))


def check_repo(repo: str) -> str:
    """The name of a repository, if it is one.

    Raises:
        VectorError: it is not.
    """
    if not REPO.fullmatch(repo) or repo.endswith(".git"):
        raise VectorError(f"'{quoted(repo)}' is no repository of the Hub: write USER/REPO")
    return repo


def check_revision(revision: str) -> str:
    """The name of a revision, if it is one; "" stays.

    Raises:
        VectorError: it is not.
    """
    if revision and not REVISION.fullmatch(revision):
        raise VectorError(f"'{quoted(revision)}' is no revision: name a branch, a tag or a commit of the repository")
    return revision


# ---- packs ----


@dataclass(frozen=True)
class Listed:
    """A file of a pack as the Hub lists it.

    Attributes:
        size: bytes; None if the pack was found in the cache.
        sha256: of its content; "" if the Hub does not say.
        git_sha1: its name in git, for a file that is kept there itself; "" if the Hub does not say.
    """

    name: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Pack:
    """A repository with vectors, at one commit.

    Attributes:
        asked: the revision that was asked for, which the cache keeps the commit under.
        files: of its vectors, by domain.
        others: names of what else ends in .safetensors, which is never read: no domain is called so.
        sizes: of all its files, by name, None where the Hub does not say; empty if it was found in the cache.
        why_cached: why its copy in the cache was taken; "" if the Hub answered.
    """

    repo: str
    commit: str
    asked: str
    files: dict[str, Listed]
    others: tuple[str, ...] = ()
    sizes: dict[str, int | None] = field(default_factory=dict)
    why_cached: str = ""
    token: str | None = field(default=None, repr=False)

    def place(self, domain: str) -> Place:
        """Where a vector of it is, at this commit."""
        return Place(self.repo, domain, self.commit)


def open_pack(repo: str, revision: str = "", token: str | None = None) -> Pack:
    """Look at a pack: on the Hub, or in the cache if the Hub gives no answer.

    Raises:
        HubError: no such repository or revision. HubUnreachable: no answer, and nothing in the cache.
        VectorError: a name that is none.
    """
    check_repo(repo)
    check_revision(revision)
    try:
        check_reachable()
        with hub_errors(repo, revision):
            info = listing(repo, revision, token)
    except HubUnreachable as error:
        return _cached_pack(repo, revision or MAIN, error)
    return _pack_of(info, repo, revision or MAIN, token)


def _pack_of(info: Any, repo: str, asked: str, token: str | None) -> Pack:
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise HubError(f"the Hub names {shown(info.sha)} as the commit of '{repo}': what answers is no Hub")
    files: dict[str, Listed] = {}
    sizes: dict[str, int | None] = {}
    others = []
    for one in info.siblings or ():
        name = str(one.rfilename)
        size = sizes[name] = one.size if type(one.size) is int else None
        domain = name.removesuffix(SUFFIX)
        if name.endswith(SUFFIX) and domain != normal_name(domain):
            others.append(name)
        elif name.endswith(SUFFIX):
            sha256 = str(one.lfs.sha256) if one.lfs else ""
            files[domain] = Listed(name, size, sha256, "" if sha256 else str(one.blob_id or ""))
    return Pack(repo, info.sha, asked, files, tuple(others), sizes, token=token)


def _cached_pack(repo: str, asked: str, why: HubUnreachable) -> Pack:
    """What the cache has of a pack.

    Raises:
        HubUnreachable: nothing.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=asked, local_files_only=True, allow_patterns=f"*{SUFFIX}"))
    except Exception as error:  # the client's, of several kinds
        raise HubUnreachable(f"{why}; nothing of '{repo}' at revision '{quoted(asked)}' was pulled before") from error
    names = [path.name.removesuffix(SUFFIX) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    files = {domain: Listed(f"{domain}{SUFFIX}") for domain in names if domain == normal_name(domain)}
    return Pack(repo, folder.name, asked, files, why_cached=str(why))


def fetch(pack: Pack, domain: str) -> Path:
    """The file of one vector, in the cache; downloaded if it is not there yet.

    Raises:
        VectorNotFound: the pack has no such vector. VectorError: it is too large, it is not what the Hub lists, or it
            is a vector of another name. HubError: it can't be downloaded.
    """
    listed = pack.files.get(domain)
    if listed is None:
        known = ", ".join(sorted(pack.files)[:20]) or "none"
        raise VectorNotFound(f"'{pack.repo}' has no vector '{domain}' at {pack.commit[:SHOWN_DIGITS]}; it has {known}")
    if listed.size is not None and listed.size > MAX_FILE_BYTES:
        raise VectorError(
            f"'{listed.name}' of '{pack.repo}' has {listed.size:,} bytes, a vector file at most {MAX_FILE_BYTES:,}: it "
            "is something else, and was not downloaded"
        )
    from huggingface_hub import hf_hub_download

    with hub_errors(pack.repo, pack.asked):
        path = Path(
            hf_hub_download(
                pack.repo,
                listed.name,
                revision=pack.asked,
                endpoint=endpoint(),
                token=pack.token,
                etag_timeout=patience(),
                local_files_only=bool(pack.why_cached),
            )
        )
    if path.parent.name != pack.commit:
        raise HubError(f"'{pack.repo}' was changed while it was read: run the same command again")
    _check_content(path, listed, pack.repo)
    return _check_name(path, pack.place(domain))


def _check_name(path: Path, place: Place) -> Path:
    """The path of a vector file, if the vector is called as the file is.

    Raises:
        VectorError: it is not, or it is no vector file.
    """
    if (said := read_header(path).domain) != place.domain:
        raise VectorError(f"'{path.name}' of '{place.repo}' holds a vector that is called '{said}': it was renamed")
    return path


def _check_content(path: Path, listed: Listed, repo: str) -> None:
    """Compare a file in the cache with what the Hub says it is.

    Raises:
        VectorError: it is something else.
    """
    if not listed.sha256 and not listed.git_sha1:
        return
    size = path.stat().st_size
    content = path.read_bytes() if size == listed.size else b""
    if listed.sha256:
        is_right = size == listed.size and hashlib.sha256(content).hexdigest() == listed.sha256
    else:
        git = hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False)
        is_right = size == listed.size and git.hexdigest() == listed.git_sha1
    if not is_right:
        raise VectorError(
            f"'{path}' is not the file that the Hub lists in '{repo}': it was damaged on the way; delete it and what "
            "it links to, and pull it again"
        )


# ---- single vectors ----

_found: dict[Place, Path] = {}
"""What was found in this process, so that all that a command does is done with one revision."""


def find(name: str) -> Path:
    """The file of a vector that is named by its place on the Hub; once found, the same one until the process ends.

    Raises:
        VectorError: no such place, or as of `fetch`. HubError: as of `open_pack`.
    """
    place = parse_place(name)
    if place not in _found:
        path, pack = _find(place)
        if pack is not None and pack.why_cached:
            logger.warning("%s; using what was pulled before, %s", pack.why_cached, pack.place(place.domain))
        elif pack is not None and place.revision != pack.commit:
            logger.warning("%s is now %s, which stays what it is", place, pack.place(place.domain))
        _found[place] = path
    return _found[place]


def _find(place: Place) -> tuple[Path, Pack | None]:
    """The file, and its pack if that was looked at: a commit that is in the cache can't have changed."""
    from huggingface_hub import try_to_load_from_cache

    if COMMIT.fullmatch(place.revision):
        cached = try_to_load_from_cache(place.repo, f"{place.domain}{SUFFIX}", revision=place.revision)
        if isinstance(cached, str):
            return _check_name(Path(cached), place), None
    pack = open_pack(place.repo, place.revision)
    return fetch(pack, place.domain), pack


def load(repo: str, domain: str | None = None, revision: str = "", token: str | None = None) -> SteeringVector:
    """Load a vector; arguments and errors as of `SteeringVector.from_pretrained`."""
    if is_place(repo):
        place = parse_place(repo)
        repo, domain, revision = place.repo, domain or place.domain, revision or place.revision
    pack = open_pack(repo, revision, token)
    if domain is None and len(pack.files) != 1:
        listed = ", ".join(sorted(pack.files)[:20])
        of = f", one of {listed}" if listed else ""
        raise VectorNotFound(f"'{repo}' has {count_of(len(pack.files), 'vector')}: name a domain{of}")
    return sourced(pack, domain if domain is not None else next(iter(pack.files)))


def sourced(pack: Pack, domain: str) -> SteeringVector:
    """A vector of a pack, which says where it is from; errors as of `fetch`."""
    vector = read_vector(fetch(pack, domain))
    return replace(vector, info=replace(vector.info, source=str(pack.place(domain))))


# ---- pulling ----


def pull(
    pack: Pack, domains: Sequence[str] = (), folder: Path | None = None, *, overwrite: bool = False
) -> dict[Path, VectorHeader]:
    """Copy vectors of a pack to where they are searched for, each with its source. All are checked before any is kept.

    Args:
        pack: what to pull from.
        domains: which vectors; empty for all.
        folder: where to. Default: steering_vectors/MODEL, with the model that a vector was built for.
        overwrite: replace files that are there.

    Returns:
        what was written, by its path.

    Raises:
        VectorNotFound: no such vector, or none. VectorError: a file is there already, or can't be written, or as of
            `fetch`. HubError: as of `fetch`.
    """
    if not domains and not 0 < len(pack.files) <= MOST_VECTORS:
        raise VectorNotFound(
            f"'{pack.repo}' has {count_of(len(pack.files), 'vector')} at {pack.commit[:SHOWN_DIGITS]}: "
            + ("name the ones you want" if pack.files else f"it needs files DOMAIN{SUFFIX} outside of all folders")
        )
    vectors = [sourced(pack, domain) for domain in dict.fromkeys(domains or sorted(pack.files))]
    written = {}
    for vector in vectors:
        name = folder_name(vector.info.model).encode()[:MOST_FOLDER_NAME].decode(errors="ignore") or "pulled"
        written[(folder or Path("steering_vectors") / name) / f"{vector.domain}{SUFFIX}"] = vector
    if (there := next((path for path in written if path.exists()), None)) and not overwrite:
        raise VectorError(f"'{there}' already exists: pass --force to overwrite it, or --output for another folder")
    for path, vector in written.items():
        write_vector(vector, path)
    return {path: read_header(path) for path in written}


def folder_name(model: str) -> str:
    """The folder of a model's vectors by the model that a file names; "" if that can't be a folder's name."""
    name = Path(model).name
    return name if name != ".." and name.isprintable() else ""
