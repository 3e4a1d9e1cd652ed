"""`steermoe.load_vector`: a vector from the library of vectors, built and calibrated first if that is wanted."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.discovery.packaged import Language
from steermoe.errors import ModelError
from steermoe.evaluation.provision import Wish, provide
from steermoe.models.loading import LoadedModel
from steermoe.routing.shape import RoutingShape, name_of
from steermoe.vectors import library
from steermoe.vectors.library import is_path

if TYPE_CHECKING:
    from steermoe.discovery.embedder import RoutingSource
    from steermoe.vectors.vector import SteeringVector


def load_vector(
    name: str | Path,
    model: Any = None,
    *,
    folder: Path | str | None = None,
    group: str | None = None,
    any_model: bool = False,
    build: bool = False,
    language: Language = "en",
) -> "SteeringVector":
    """Load a domain's vector; with `build`, one that the model lacks is built and calibrated first, and kept.

    Args:
        name: a domain, or the path of a vector file.
        model: as for `library.load_vector`: a model or its shape; or a `LoadedModel` or an engine. To build a vector
            for a bare model, its tokenizer is loaded from where the model came from.
        folder: searched before all others.
        group: only look in this model's folder, such as "smollm2-moe".
        any_model: if the model has no vector of its own, take that of another model of the same shape.
        build: build what is missing of the packaged domains; no steering may be attached to the model.
        language: of the texts that it is built from: "en", "ru" or "both".

    Raises:
        VectorNotFound: no such file. CompatibilityError: only files for other models. VectorError: a damaged file.
        ModelError: no tokenizer to build with.
    """
    options: dict[str, Any] = {"folder": folder, "group": group, "any_model": any_model}
    if not build or is_path(name):
        shape = getattr(model, "shape", None)
        return library.load_vector(name, shape if isinstance(shape, RoutingShape) else model, **options)
    source = _source(model)
    wish = Wish((str(name),), language, None if folder is None else Path(folder), any_model)
    built = provide(source, wish)
    return library.load_vector(built.get(str(name), name), source.shape, **options)


def _source(model: Any) -> "RoutingSource":
    """What a vector can be built from: the model that an engine runs, or a bare one with its tokenizer.

    Raises:
        ModelError: neither.
    """
    from transformers import AutoTokenizer, PreTrainedModel

    if isinstance(model, LoadedModel) or hasattr(model, "chosen"):
        return model
    if isinstance(getattr(model, "loaded", None), LoadedModel):
        return model.loaded
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"build=True needs a model, not {type(model).__name__}: pass what steermoe.load returns, or a model of "
            "transformers"
        )
    where = getattr(model, "name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # transformers raises anything
        raise ModelError(
            f"there is no tokenizer at '{where}', where the model came from: pass LoadedModel(name, model, tokenizer)"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    folder = Path(where)
    return LoadedModel(name_of(folder.resolve()) if folder.is_dir() else where, model, tokenizer)
