"""Vector files: where they are searched, how they are read, checked, written and imported.

A file is safetensors with up to three matrices of [L layers, N experts] (`frequency`, `baseline`, `weights`) and one
JSON string of metadata under the key `steermoe`. No pickle, so loading runs no code. torch is imported only where
numbers are read.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
from steermoe.vectors import ROW_SUM_TOLERANCE, SteeringVector, VectorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from steermoe.targets import Target

FORMAT_VERSION = 1
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
DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class VectorFile:
    """A vector file that was found: its path, its domain, and the folder (named after a model) that it is in."""

    path: Path
    domain: str
    group: str


@dataclass(frozen=True)
class VectorHeader:
    """What a vector file says of itself: everything but its numbers. Fields as in `SteeringVector`.

    Attributes:
        matrices: which of `frequency`, `baseline` and `weights` it holds.
    """

    domain: str
    layers: tuple[int, ...]
    num_experts: int
    threshold: float
    relative: bool
    tensors_sha256: str
    matrices: tuple[str, ...]
    info: VectorInfo

    def as_dict(self) -> dict[str, Any]:
        """One flat object for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "info"}
        return {**own, **asdict(self.info)}


def check_domain_name(name: str) -> str:
    """The name, if it can be a file's.

    Raises:
        VectorError: it could leave the folder or isn't portable.
    """
    if not DOMAIN_NAME.fullmatch(name):
        raise VectorError(
            f"domain name '{name}' is not allowed: use small letters, digits, - and _, not - or _ first "
            f"(the path of a vector file ends in {SUFFIX})"
        )
    return name


def search_path(folder: Path | str | None = None) -> list[Path]:
    """Folders that are searched for vectors, first to last, whether they exist or not.

    `folder` if given, $STEERMOE_VECTORS, ./steering_vectors, the user's data folder, what is shipped with the package.
    """
    from platformdirs import user_data_path

    folders = [Path(folder)] if folder is not None else []
    if os.environ.get("STEERMOE_VECTORS"):
        folders += [Path(part) for part in os.environ["STEERMOE_VECTORS"].split(os.pathsep) if part]
    folders += [Path("steering_vectors"), user_data_path("steermoe") / "steering_vectors", packaged_vectors()]
    return list(dict.fromkeys(path.resolve() for path in folders))


def packaged_vectors() -> Path:
    """The vectors that came with the package: inside it when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "steering_vectors"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "steering_vectors"


def find_vectors(folder: Path | str | None = None) -> list[VectorFile]:
    """All vector files on the search path, a domain's earlier file before a later one of the same name.

    Files whose names can't be a domain's, such as hidden ones, are left out.
    """
    found = []
    for place in search_path(folder):
        for path in sorted(place.glob(f"*{SUFFIX}")) + sorted(place.glob(f"*/*{SUFFIX}")):
            domain = path.name.removesuffix(SUFFIX)
            if DOMAIN_NAME.fullmatch(domain):
                found.append(VectorFile(path, domain, "" if path.parent == place else path.parent.name))
    return found


def find_vector(name: str | Path, *, folder: Path | str | None = None, group: str | None = None) -> list[Path]:
    """The files that a name can mean, first to last: a vector file's own path, or a domain's files on the search path.

    Raises:
        VectorNotFound: no such file.
    """
    if Path(name).suffix == SUFFIX:
        return [Path(name)]
    domain = check_domain_name(str(name))
    files = [file for file in find_vectors(folder) if group in (None, file.group)]
    if found := [file.path for file in files if file.domain == domain]:
        return found
    known = sorted({file.domain for file in files})
    where = f" for {group}" if group else ""
    raise VectorNotFound(
        f"no vector '{domain}'{where}; there are {', '.join(known) or 'none'} (searched: "
        f"{', '.join(str(path) for path in search_path(folder))}); build one with `steermoe vectors build`"
    )


def read_fitting(paths: Sequence[Path], check: Callable[[SteeringVector], None]) -> tuple[Path, SteeringVector]:
    """The first of several files that passes a check of its fit, which raises CompatibilityError where it does not.

    Raises:
        CompatibilityError: none fits; the first one's error.
    """
    misfits = []
    for path in paths:
        vector = read_vector(path)
        try:
            check(vector)
        except CompatibilityError as error:
            misfits.append(error)
        else:
            return path, vector
    raise misfits[0]


def load_vector(
    name: str | Path, model: "Target | None" = None, *, folder: Path | str | None = None, group: str | None = None
) -> SteeringVector:
    """Load a domain's vector.

    Args:
        name: a domain, or the path of a vector file.
        model: the model to steer; of several files of the domain the first that fits it is taken.
        folder: searched before all others.
        group: only look in this model's folder, such as "smollm2-moe".

    Raises:
        VectorNotFound: no such file. CompatibilityError: only files for other models. VectorError: a damaged file.
    """
    paths = find_vector(name, folder=folder, group=group)
    if model is None:
        return read_vector(paths[0])
    from steermoe.targets import check_fits

    return read_fitting(paths, lambda vector: check_fits(model, vector))[1]


def read_header(path: Path | str) -> VectorHeader:
    """Read what a file says of itself, without its numbers and without torch.

    Raises:
        VectorNotFound: no such file. VectorError: no vector file, an unknown version, or a damaged header.
    """
    with _open(Path(path), "np") as file:
        return _parse_header(file)


def read_vector(path: Path | str) -> SteeringVector:
    """Read one file and check all of it.

    Raises:
        VectorNotFound: no such file. VectorError: no vector file, an unknown version, other content than its hash says,
            or numbers that can't be (see `SteeringVector`).
    """
    with _open(Path(path), "pt") as file:
        header = _parse_header(file)
        kinds = {name: file.get_slice(name).get_dtype() for name in header.matrices}
        if wrong := {name: kind for name, kind in kinds.items() if name not in MATRICES or kind != "F32"}:
            raise VectorError(f"it holds {wrong}, expected F32 matrices named {', '.join(MATRICES)}")
        tensors = {name: file.get_tensor(name) for name in kinds}
        if header.tensors_sha256 != tensors_sha256(tensors):
            raise VectorError(
                "its numbers do not match the hash in its header; it was changed or damaged: get it again"
            )
        vector = SteeringVector(
            domain=header.domain,
            layers=header.layers,
            threshold=header.threshold,
            relative=header.relative,
            info=header.info,
            **{name: tensors.get(name) for name in MATRICES},
        )
        if vector.num_experts != header.num_experts:
            raise VectorError(f"its header says {header.num_experts} experts a layer, it has {vector.num_experts}")
        return vector


@contextlib.contextmanager
def _open(path: Path, framework: Literal["np", "pt"]) -> Iterator[Any]:
    """An open safetensors file; whatever goes wrong with it becomes a VectorError that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise VectorNotFound(f"no vector file '{path}'; `steermoe vectors list` shows what there is")
        with safe_open(path, framework) as file:
            yield file
    except VectorNotFound:
        raise
    except VectorError as error:
        raise VectorError(f"'{path}': {error}") from error
    except SafetensorError as error:
        raise VectorError(f"'{path}' is no safetensors file or is cut off ({error}); get it again") from error
    except OSError as error:
        raise VectorError(f"can't read '{path}': {error.strerror or error}") from error


def _parse_header(file: Any) -> VectorHeader:
    """The header of an open file as it should be, or a VectorError."""
    header = (file.metadata() or {}).get(METADATA_KEY)
    if header is None:
        raise VectorError(f"it is no steering vector: its header has no '{METADATA_KEY}' entry")
    try:
        data = json.loads(header)
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise VectorError(
                f"it has format version {version}, this steermoe reads {FORMAT_VERSION}: upgrade steermoe"
            )
        for name, kind in HEADER_FIELDS.items():
            if type(data[name]) is not kind:
                raise TypeError(f"{name} is {data[name]!r}")
        if not all(type(layer) is int for layer in data["layers"]):
            raise TypeError(f"layers are {data['layers']!r}")
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
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VectorError(f"its '{METADATA_KEY}' header lacks or garbles a field ({error!r}); get it again") from error


def write_vector(vector: SteeringVector, path: Path) -> None:
    """Write a vector file at once or not at all: a temporary file that is renamed when it is complete.

    Raises:
        VectorError: the folder can't be written to, or the domain can't be a file's name.
    """
    from safetensors.torch import save

    for name in vector.domain.split("+"):
        check_domain_name(name)
    tensors = {name: getattr(vector, name) for name in MATRICES if getattr(vector, name) is not None}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "domain": vector.domain,
        "layers": list(vector.layers),
        "num_experts": vector.num_experts,
        "threshold": float(vector.threshold),
        "relative": bool(vector.relative),
        "tensors_sha256": tensors_sha256(tensors),
        "info": asdict(vector.info),
    }
    content = save(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise VectorError(f"can't write '{path}': {error.strerror}; name another file or folder") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    """The hash that a file's header keeps of its matrices: names, kinds, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def import_matrix(
    path: Path, domain: str, *, layers: Sequence[int] | None = None, info: VectorInfo | None = None
) -> SteeringVector:
    """Read an expert vector as the paper's authors keep it: JSON, a list of L lists of N numbers.

    Rows that each sum to 1 are taken for frequencies F, anything else for E itself.

    Args:
        path: the JSON file.
        domain: name of the vector.
        layers: the decoder layer of each row; by default 0 to L-1.
        info: what else is known.

    Raises:
        VectorError: not JSON, not such a list, or numbers that can't be.
    """
    import torch

    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise VectorNotFound(f"can't read '{path}': {error.strerror}; give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise VectorError(f"'{path}' is not JSON: {error}") from error
    is_matrix = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not is_matrix or not all(type(x) in (int, float) for row in rows for x in row):
        raise VectorError(f"'{path}' is no matrix: expected a list of L lists of N numbers")
    if len({len(row) for row in rows}) != 1:
        raise VectorError(
            f"'{path}': its rows have different lengths {sorted({len(row) for row in rows})}, expected one"
        )
    numbers = tuple(layers) if layers is not None else tuple(range(len(rows)))
    if len(numbers) != len(rows):
        raise VectorError(
            f"'{path}' has {len(rows)} rows, expected one for each of {len(numbers)} layers: it is for another model"
        )
    try:
        matrix = torch.tensor(rows, dtype=torch.float32)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise VectorError(f"'{path}' holds a number that is too large for float32") from error
    if not matrix.any():
        raise VectorError(f"'{path}' holds nothing but zeros: it would steer nothing")
    info = info or VectorInfo()
    is_frequency = bool(((matrix.sum(-1) - 1).abs() < ROW_SUM_TOLERANCE).all() and (matrix >= 0).all())
    return SteeringVector(
        check_domain_name(domain),
        matrix if is_frequency else None,
        numbers,
        weights=None if is_frequency else matrix,
        info=replace(info, created_by=info.created_by or "steermoe vectors import"),
    )
