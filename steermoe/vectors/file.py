"""Vector files: one safetensors file per vector with up to three matrices [L layers, N experts] (`frequency`,
`baseline`, `weights`) and a JSON header. No pickle, so loading runs no code. Knows no folders.

The header holds the hash of the matrices and, from format version 2 on, a hash of itself: everything that steers is
covered. The hashes detect damage and careless edits, not forgery. Nothing large is read before its size is checked.
"""

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import VectorError, VectorNotFound, reason, shown
from steermoe.files import atomic_path, why_not_written
from steermoe.vectors.vector import MAX_EXPERTS, MAX_LAYERS, SteeringVector, VectorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


FORMAT_VERSION = 2
"""Version 1 had no hash of the header."""

MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 2**28
"""Far more than any model needs: 1,000 layers of 20,000 experts, three times."""

SUFFIX = ".safetensors"


METADATA_KEY = "steermoe"


MATRICES = ("frequency", "baseline", "weights")


HEADER_FIELDS = {
    "domain": str,
    "layers": list,
    "num_experts": int,
    "threshold": float,
    "relative": bool,
    "tensors_sha256": str,
    "info": dict,
}
HEADER_HASH = "sha256"
"""Of everything else in the header, in version 2."""


NAME_KINDS = {"Ll", "Lo", "Lm", "Mn", "Mc", "Nd"}
"""Unicode categories in a domain's name besides - and _: letters without capitals, vowel signs and accents, digits."""
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks that show nothing, so that two names could look alike."""
MAX_NAME_BYTES, MAX_SHOWN = 200, 60
"""With what is written before and after it, a name must fit into the 255 bytes that file systems allow."""


@dataclass(frozen=True)
class VectorHeader:
    """Everything in a vector file but its matrices. Fields as in `SteeringVector`.

    Attributes:
        tensors_sha256: hash of the matrices.
        matrices: which of `frequency`, `baseline` and `weights` it contains.
        sha256: hash of everything else in the header, the matrices' hash included; None in a file of version 1.
    """

    domain: str
    layers: tuple[int, ...]
    num_experts: int
    threshold: float
    relative: bool
    tensors_sha256: str
    matrices: tuple[str, ...]
    info: VectorInfo
    sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """One flat object for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        return {**own, **asdict(self.info)}


def check_domain_name(name: str) -> str:
    """The name as files and vectors hold it, in Unicode's form NFKC, if it is allowed as a file name.

    Raises:
        VectorError: it could leave the folder, isn't portable, or could hide what it is.
    """
    if (normal := normal_name(name)) is None:
        raise VectorError(
            f"domain name {_shown(name)} is not allowed: use lowercase letters of any script, digits, - and _, not - "
            f"or _ first, at most {MAX_NAME_BYTES} bytes (the path of a vector file ends in {SUFFIX})"
        )
    return normal


def normal_name(name: str) -> str | None:
    """A domain's name in form NFKC, which the same name typed on any system has; None if it is not allowed."""
    normal = unicodedata.normalize("NFKC", name)
    kinds = [unicodedata.category(char) for char in normal]
    is_allowed = all(kind in NAME_KINDS or char in "-_" for kind, char in zip(kinds, normal, strict=True))
    if not is_allowed or not normal or kinds[0] in ("Mn", "Mc") or normal[0] in "-_" or INVISIBLE.search(normal):
        return None
    return normal if normal == normal.lower() and len(normal.encode()) <= MAX_NAME_BYTES else None


def _shown(name: str) -> str:
    """A name in quotes, cut short and with escapes for what could change a terminal or hide."""
    short = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return f"'{short}'" if short.isprintable() else repr(short)


def read_header(path: Path | str) -> VectorHeader:
    """Read a file's header, without its matrices and without torch.

    Raises:
        VectorNotFound: no such file. VectorError: not a vector file, an unknown version, or a header that is damaged or
            doesn't match its hash.
    """
    with _open(Path(path)) as file:
        return _parse_header(file)


def read_vector(path: Path | str) -> SteeringVector:
    """Read one file and check all of it.

    Raises:
        VectorNotFound: no such file. VectorError: not a vector file, an unknown version, content that doesn't match its
            hashes, too many numbers, or invalid ones (see `SteeringVector`).
    """
    with _open(Path(path)) as file:
        header = _parse_header(file)
        kinds = {name: file.get_slice(name).get_dtype() for name in header.matrices}
        if wrong := {name: kind for name, kind in kinds.items() if name not in MATRICES or kind != "F32"}:
            raise VectorError(f"it contains {shown(wrong)}, expected F32 matrices named {', '.join(MATRICES)}")
        tensors = {name: file.get_tensor(name) for name in kinds}
        if header.tensors_sha256 != tensors_sha256(tensors):
            raise VectorError(
                "its numbers do not match the hash in its header; it was changed or damaged: get it again"
            )
        matrices: dict[str, Any] = {name: tensors.get(name) for name in MATRICES}
        vector = SteeringVector(
            domain=header.domain,
            layers=header.layers,
            threshold=header.threshold,
            relative=header.relative,
            info=header.info,
            **matrices,
        )
        if vector.num_experts != header.num_experts:
            raise VectorError(f"its header says {header.num_experts} experts per layer, it has {vector.num_experts}")
        return vector


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An open safetensors file that gives arrays; any failure becomes a VectorError that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise VectorNotFound(f"no vector file '{path}'; `steermoe vectors list` shows what there is")
        _check_size(path)
        with safe_open(path, "np") as file:
            yield file
    except VectorNotFound:
        raise
    except VectorError as error:
        raise VectorError(f"'{path}': {error}") from error
    except SafetensorError as error:
        raise VectorError(
            f"'{path}' is not a safetensors file or is cut off ({reason(error)}); get it again"
        ) from error
    except OSError as error:
        raise VectorError(f"can't read '{path}': {error.strerror or error}") from error


def _check_size(path: Path) -> None:
    """Check how much would be read.

    Raises:
        VectorError: more than a vector file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size > MAX_FILE_BYTES or MAX_HEADER_BYTES < length <= size:
        raise VectorError(
            f"it has {size} bytes, {length} of them in its header; a vector file has at most {MAX_FILE_BYTES} and "
            f"{MAX_HEADER_BYTES}: it is something else"
        )


def _parse_header(file: Any) -> VectorHeader:
    """The header of an open file, checked."""
    header = (file.metadata() or {}).get(METADATA_KEY)
    if header is None:
        raise VectorError(f"it is not a steering vector: its header has no '{METADATA_KEY}' entry")
    try:
        data = json.loads(header)
        version = data["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise VectorError(
                f"it has format version {shown(version)}, this steermoe reads 1 to {FORMAT_VERSION}: upgrade steermoe"
            )
        _check_fields(data, version)
        info = {f.name: data["info"][f.name] for f in fields(VectorInfo) if f.name in data["info"]}
        for name in ("keywords", "safe_range", "parts"):
            if isinstance(info.get(name), list):
                info[name] = tuple(info[name])
        return VectorHeader(
            domain="+".join(map(check_domain_name, data["domain"].split("+"))),
            layers=tuple(data["layers"]),
            num_experts=data["num_experts"],
            threshold=data["threshold"],
            relative=data["relative"],
            tensors_sha256=data["tensors_sha256"],
            matrices=tuple(sorted(file.keys())),
            info=VectorInfo(**info),
            sha256=data.get(HEADER_HASH),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VectorError(f"its '{METADATA_KEY}' header lacks or garbles a field ({error!r}); get it again") from error


def _check_fields(data: dict[str, Any], version: int) -> None:
    """Check the kinds and the size of a header's fields, and its hash.

    Raises:
        KeyError: one is missing. TypeError: one has the wrong kind or is too large. VectorError: the hash is wrong.
    """
    kinds = HEADER_FIELDS if version == 1 else {**HEADER_FIELDS, HEADER_HASH: str}
    for name, kind in kinds.items():
        if type(data[name]) is not kind:
            raise TypeError(f"{name} is {shown(data[name])}")
    if unknown := set(data) - set(kinds) - {"format_version"}:
        raise TypeError(f"{shown(sorted(unknown))} is unknown")
    layers, threshold = data["layers"], data["threshold"]
    if not all(type(layer) is int and layer < MAX_LAYERS for layer in layers):
        raise TypeError(f"layers are {shown(layers)}, expected whole numbers below {MAX_LAYERS}")
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise VectorError(f"its layers {shown(layers)} must be one or more, increasing, from 0 on")
    if not 0 <= threshold < float("inf"):
        raise VectorError(f"its threshold {threshold} must be a finite number, 0 or more")
    if not 0 < data["num_experts"] <= MAX_EXPERTS:
        raise TypeError(f"num_experts is {shown(data['num_experts'])}, expected 1 to {MAX_EXPERTS}")
    if version > 1 and data[HEADER_HASH] != header_sha256(data):
        raise VectorError(
            "its header (strength, layers, threshold ...) does not match the hash in it; it was changed or damaged: "
            "get it again"
        )


def write_vector(vector: SteeringVector, path: Path) -> None:
    """Write a vector file whole or not at all: a temporary file is renamed when it is complete.

    Raises:
        VectorError: the folder can't be written to, or the domain is not allowed as a file name.
    """
    from safetensors.torch import save

    domain = "+".join(map(check_domain_name, vector.domain.split("+")))
    tensors = {name: getattr(vector, name) for name in MATRICES if getattr(vector, name) is not None}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "domain": domain,
        "layers": list(vector.layers),
        "num_experts": vector.num_experts,
        "threshold": float(vector.threshold),
        "relative": bool(vector.relative),
        "tensors_sha256": tensors_sha256(tensors),
        "info": {name: value for name, value in asdict(vector.info).items() if value or name != "source"},
    }
    header[HEADER_HASH] = header_sha256(header)
    content = save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})
    write_whole(content, path)


def write_whole(content: bytes, path: Path) -> None:
    """Write a file whole or not at all, into a folder that need not exist.

    Raises:
        VectorError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise VectorError(f"can't write '{path}': {why_not_written(error)}; name another file or folder") from error


def tensors_sha256(tensors: "Mapping[str, Tensor | NDArray[np.float32]]") -> str:
    """The hash of a file's matrices that its header keeps: names, dtypes as torch writes them, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        given: Any = tensors[name]
        array = given.numpy() if hasattr(given, "numpy") else given
        digest.update(f"{name} torch.{array.dtype} {list(array.shape)}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def header_sha256(header: dict[str, Any]) -> str:
    """The hash of a header that it keeps itself: of all its fields but this one, as JSON with sorted keys."""
    content = {name: value for name, value in header.items() if name != HEADER_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
