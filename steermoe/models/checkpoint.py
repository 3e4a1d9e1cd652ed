"""Find a checkpoint, its tokenizer, its end tokens and the dtype to run it in. Loads no weights."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steermoe.errors import HubUnreachable, ModelError, quoted, reason
from steermoe.hub import check_reachable, is_offline
from steermoe.models.default.pull import DEFAULT_MODEL, check_intact, default_model_folder, is_pulled
from steermoe.models.gguf.header import read_header
from steermoe.models.stored import local_folder
from steermoe.models.template import has_tokenizer
from steermoe.routing.architectures import NOT_RUN
from steermoe.routing.shape import name_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLED_BYTES = 32
"""Bytes of each tensor of a checkpoint that go into its fingerprint."""
SMALL_CHECKPOINT_BYTES = 4 * 2**30
"""Up to this size a bfloat16 checkpoint is run in float32 on CPUs that compute bfloat16 slowly."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that a library other than transformers loads.

    Attributes:
        name: as in `LoadedModel`.
        folder: its folder or hub id.
        dtype: name of a torch dtype, or "auto".
    """

    name: str
    folder: str
    dtype: str

    def tokenizer(self, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
        """Its tokenizer.

        Raises:
            ModelError: it has none that can be loaded.
        """
        return load_tokenizer(self.name, self.folder, trust_remote_code)

    def eos_token_id(self) -> int | list[int] | None:
        """The end tokens of its generation configuration; None if that names none."""
        from transformers import GenerationConfig

        try:
            end: int | list[int] | None = GenerationConfig.from_pretrained(self.folder).eos_token_id
        except OSError:
            return None
        return end

    def fingerprint(self) -> str:
        """A hash of its name, its configuration, and a few bytes of every tensor."""
        import hashlib

        digest = hashlib.sha256(self.name.encode())
        if not Path(self.folder).is_dir():
            return digest.hexdigest()  # on the hub, where a name keeps its owner
        digest.update((Path(self.folder) / "config.json").read_bytes())
        for path in sorted(Path(self.folder).glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        file.seek(8 + length + entry["data_offsets"][0])
                        digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()


def load_tokenizer(name: str, where: str, trust_remote_code: bool, **gguf: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; arguments as `_locate` returns them.

    Raises:
        ModelError: it has none, or none that can be loaded.
    """
    from transformers import AutoTokenizer

    if not gguf and Path(where).is_dir() and not has_tokenizer(where):
        raise ModelError(
            f"'{name}' has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model that it was made "
            f"of into '{where}'"
        )
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, trust_remote_code=trust_remote_code, **gguf
        )
    except Exception as error:  # a damaged checkpoint can make transformers raise anything
        raise ModelError(_why_not_loaded(name, error, where)) from error
    return found


def find_source(model: str | Path | None = None, dtype: str = "auto") -> Source:
    """Find a checkpoint without loading it; arguments as for `load`.

    Raises:
        ModelError: there is none, or it is a GGUF file, which only transformers and llama.cpp can read.
    """
    import torch

    if model is not None and Path(model).suffix == ".gguf":
        raise ModelError(f"'{model}' is a GGUF file: run it with --engine llamacpp or --engine hf")
    name, where, _ = _locate(model)
    device = "auto" if torch.accelerator.is_available() else None
    chosen = _parse_dtype(dtype) if dtype != "auto" else _natural_dtype(where, device)
    return Source(name, where, str(chosen).removeprefix("torch."))


def _locate(model: str | Path | None) -> tuple[str, str, dict[str, str]]:
    """Name, what transformers should load, and extra arguments for it."""
    if model is None or str(model) == DEFAULT_MODEL:
        if not is_pulled():
            raise ModelError("the default model is not here yet: run `steermoe models pull` (once, about 100 MB)")
        check_intact()
        return DEFAULT_MODEL, str(default_model_folder()), {}
    path = Path(model)
    if path.suffix == ".gguf":
        read_header(path)  # transformers' own reader trusts whatever a header claims
        return path.stem, str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder '{path}' contains no model: it has no config.json")
        return name_of(path.resolve()), str(path), {}
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise ModelError(f"no model at '{model}': give a checkpoint folder, a .gguf file, or a hub id")
    return str(model), _on_hub(str(model)), {}


def _on_hub(model: str) -> str:
    """What transformers should load for a hub id: the id, or the copy in the cache if the Hub gives no answer.

    The Hub is asked once in a process, before libraries ask it for each file, and again and again for half a minute.

    Raises:
        ModelError: no answer, and no copy.
    """
    if model in _answered or is_offline():
        return model
    try:
        check_reachable()
    except HubUnreachable as error:
        folder = local_folder(model)
        if folder is None:
            raise ModelError(f"can't find '{quoted(model)}', neither as a folder nor on the hub: {error}") from error
        return str(folder)
    _answered.add(model)
    return model


_answered: set[str] = set()
"""Hub ids for which the Hub gave an answer in this process, if only that it has none of that name."""


def _auto_class(config: Any) -> Any:
    """The class of transformers that builds a text generator from a configuration.

    A causal model if there is one, then an encoder-decoder, then a model that also takes images; None if there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    known = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText)
    own = getattr(config, "auto_map", None) or {}
    return next((auto for auto in known if type(config) in auto._model_mapping or auto.__name__ in own), None)


def _why_not_run(config: Any) -> str:
    """Why no command can generate text with a model of this configuration; "" if they can."""
    if config.model_type in NOT_RUN:
        return NOT_RUN[config.model_type]
    return "" if _auto_class(config) else "transformers has no class for it that continues a text"


def _parse_dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"dtype '{name}' is unknown: use auto, float32, bfloat16 or float16")
    return found


def _natural_dtype(where: str, device_map: str | None) -> Any:
    """The checkpoint's own dtype, but float32 for a small one if bfloat16 products are emulated."""
    import torch

    if device_map is not None or torch.cpu._is_avx512_bf16_supported():
        return "auto"
    return torch.float32 if Path(where).is_dir() and _weight_bytes(where) <= SMALL_CHECKPOINT_BYTES else "auto"


def repeatable_dtype(model: str | Path | None) -> str:
    """The dtype in which a text is the same in any batch: float32 for a small model on a CPU, else "auto".

    In bfloat16 the third digit of a logit changes with the number of rows, and sampled texts soon diverge.

    Raises:
        ModelError: there is no such model.
    """
    import torch

    _, where, _ = _locate(model)
    is_small = 0 < _weight_bytes(where) <= SMALL_CHECKPOINT_BYTES
    return "float32" if is_small and not torch.accelerator.is_available() else "auto"


def _weight_bytes(where: str) -> int:
    """Size of the weight files in a folder; 0 if it is not a folder."""
    return sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) if Path(where).is_dir() else 0


OUTDATED = re.compile(
    r"cannot import name '(?P<name>\w+)' from '(?P<module>transformers[\w.]*)'"
    r"|No module named '(?P<gone>transformers\.[\w.]+)'"
    r"|module '?transformers[\w.]*'? has no attribute '?(?P<missing>\w+)"
)
"""Errors of a checkpoint's own code that was written for another version of transformers."""


def _why_outdated(name: str, error: Exception, where: str) -> str:
    """The message if a checkpoint's own code does not run with this version of transformers, else ""."""
    import transformers

    match = OUTDATED.search(str(error))
    is_own = isinstance(error, AttributeError | ImportError | TypeError) and "transformers_modules" in _files_of(error)
    if match is None and (isinstance(error, ModuleNotFoundError) or not is_own):
        return ""
    lacks = f"it lacks {match['name'] or match['gone'] or match['missing']}" if match else reason(error)
    written = _config_value(where, "transformers_version")
    runs = f"transformers {written} runs (its config.json says so)" if written else "an older transformers runs"
    return (
        f"'{name}' brings its own model code, which {runs} and {transformers.__version__} does not: {lacks}; steermoe "
        "needs the newer one: try it without --trust-remote-code if `steermoe models list` names its family, or as a "
        "GGUF file with --engine llamacpp"
    )


def _files_of(error: BaseException) -> str:
    """The files that an error came through."""
    import traceback

    return " ".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _config_value(where: str, key: str) -> str:
    """A text in a checkpoint's configuration; "" if it has none that can be read."""
    from transformers import PreTrainedConfig

    try:
        value = PreTrainedConfig.get_config_dict(where)[0].get(key)
    except Exception:  # the message goes without it, whatever is wrong
        return ""
    return value[:20] if isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) else ""


def _why_not_loaded(name: str, error: Exception, where: str = "") -> str:
    text = reason(error, most=1 << 20)  # what it advises may come late
    if outdated := _why_outdated(name, error, where):
        return outdated
    if "trust_remote_code" in text:
        return f"'{name}' brings its own model code: pass --trust-remote-code if you trust it"
    if isinstance(error, OSError) and ("offline" in text.lower() or "connect" in text.lower() or "not a local" in text):
        return f"can't find '{name}', neither as a folder nor on the hub: check the name and the connection"
    return f"can't load '{name}': {reason(error)}"
