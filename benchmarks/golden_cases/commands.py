"""Commands on the default model and on its GGUF file: generate, compare, batch, models, vectors, embed, evaluate and
calibrate; with every engine.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from golden_cases.running import Cases, answers, cli, command, exit_code, files_in, lines_of, sha256
from golden_cases.tables import (
    GREEDY,
    OPENINGS,
    OTHER_LINES,
    SAMPLINGS,
    STEERINGS,
    STORY,
    TOKENS,
    as_options,
    write_lines,
    write_store,
    write_texts,
)

SOME = shlex.split("-d sport -d sport=0.5+food=0.5 --formula max_scaled --formula additive --max-new-tokens 16")


REFUSED = (
    "generate x -d sport --schedule decay:0 --no-compiled-steps",
    "generate x --force 1:1 --ban 1:1 --no-compiled-steps",
    "generate x --layers 30-31 -d sport --no-compiled-steps",
    "generate x --nonsense",
    "vectors show nonsense",
    "vectors mix sport=x -o y",
    "batch nothing.txt -o y",
)
"""Lines of which only the exit code is kept."""


# ---- for every engine ----


def generate_cases(*options: Any, steerings: dict[str, dict[str, Any]] = STEERINGS) -> Cases:
    """`generate` with every steering and every sampling."""
    asked = {name: (STORY, fields | GREEDY) for name, fields in steerings.items()}
    asked |= {name: (OPENINGS[0], {"domain": "sport", **sampling}) for name, sampling in SAMPLINGS.items()}
    for name, (opening, fields) in asked.items():
        said = [*as_options(fields), "--max-new-tokens", TOKENS, *options]
        yield name, partial(answers, "generate", opening, *said)


def batch_cases(
    *options: Any, steerings: dict[str, dict[str, Any]] = STEERINGS, run: Callable[..., str] = cli
) -> Cases:
    """Batches of mixed jobs, of plain lines, of what only options can say, and one that is complete already."""
    lines = [{"prompt": STORY, **GREEDY, **f} for f in steerings.values() if not {"force", "ban"} & f.keys()]
    lines += [{"prompt": OPENINGS[0], "domain": "sport", **sampling} for sampling in SAMPLINGS.values()]
    write_lines(Path("mixed.jsonl"), lines + OTHER_LINES)
    Path("plain.txt").write_text("\n\n".join(OPENINGS) + "\n")
    three = shlex.split("plain.txt -d sport -d food=0.6+law=0.4 -d none --samples 2 --seed 11")
    everything = steerings["everything"]
    everything = as_options({**everything, "domain": [everything["domain"]], **GREEDY})
    common = ["--batch-size", 8, "--ordered", *options]
    yield "batch of mixed jobs", partial(batch, "mixed", "mixed.jsonl", *common, run=run)
    yield "batch of lines", partial(batch, "plain", *three, *common, run=run)
    yield "batch of lines again", partial(batch, "plain", *three, *common, run=run)
    yield "batch of options", partial(batch, "options", "plain.txt", *everything, *common, run=run)


def batch(name: str, *arguments: Any, run: Callable[..., str] = cli) -> dict[str, Any]:
    """The stories of a batch in the order of their file, its summary, and the numbers of the lines it left out."""
    output, errors = Path(f"{name}.stories"), Path(f"{name}.errors")
    said = [*arguments, "-o", output, "--errors", errors, "--max-new-tokens", TOKENS]
    (summary,) = answers("batch", *said, run=run)
    if summary["steering"]:
        summary["steering"]["batch_vector_share"] = summary["steering"].pop("vector_share")
    left_out = [line["line"] for line in lines_of(errors)]
    return {"stories": lines_of(output), "summary": summary, "left out": left_out}


# ---- transformers ----


def cli_section(gguf: Path | None) -> Cases:
    common = ["--dtype", "float32", "--no-compiled-steps"]
    yield from generate_cases(*common)
    text = partial(cli, "generate", STORY, "-d", "food", "--max-new-tokens", 8, "--no-compiled-steps")
    yield "text", partial(text, "--dtype", "float32", "--stream")
    yield "bfloat16", partial(text, "--dtype", "bfloat16")
    yield "int8", partial(text, "--quantize", "int8")
    yield "compare", partial(answers, "compare", OPENINGS[0], *SOME, *common)
    yield "compare strengths", partial(answers, "compare", STORY, *shlex.split("--strength 4 --strength -4"), *common)
    write_texts()
    yield "inspect", partial(answers, "models", "inspect", "smollm2-moe")
    yield "inspect texts", partial(answers, "models", "inspect", "--texts", "corpus", "--dtype", "float32")
    yield "families", partial(answers, "models", "list")
    yield "export", exported
    for line in REFUSED:
        yield line, partial(exit_code, line)


def exported() -> str:
    cli("models", "export", "--gguf", "bf16", "-o", "model.gguf")
    return sha256(Path("model.gguf").read_bytes())


def batch_section(gguf: Path | None) -> Cases:
    yield from batch_cases("--no-compiled-steps")
    write_lines(Path("few.jsonl"), [{"prompt": opening, "domain": "sport", "seed": 1} for opening in OPENINGS])
    yield "batch as finished", partial(batch, "few", "few.jsonl", "--batch-size", 2, "--no-compiled-steps")


def vectors(gguf: Path | None) -> Cases:
    write_texts()
    Path("matrix.json").write_text(json.dumps([[(3 * row + n) % 7 / 7 for n in range(18)] for row in range(30)]))
    build = "vectors build --texts sport=corpus/sport --texts food=corpus/food --dtype float32"
    for name, line in {
        "embed": "embed corpus --dtype float32",
        "embed more": "embed corpus --dtype float32 --features probabilities --hidden --batch-tokens 64",
        "embed last": "embed corpus --dtype float32 --tokens last --max-tokens 5",
        "build": f"{build} --threshold 2",
        "build relative": f"{build} --relative --threshold 1.2",
        "build against": f"{build} --against corpus/other --lists 5",
    }.items():
        yield name, partial(made, name, *shlex.split(line))
    for name, line in {
        "mix": "vectors mix sport=0.7 food=0.3",
        "mix away": "vectors mix law medicine=-0.5 --model smollm2-moe",
        "import": "vectors import matrix.json --domain chess --model smollm2-moe",
    }.items():
        yield name, partial(made, f"{name.replace(' ', '_')}.safetensors", *shlex.split(line))
    for line in ("show sport", "show sport --threshold 1.5 --relative", "check sport food -m smollm2-moe", "list"):
        yield line, partial(answers, "vectors", *shlex.split(line))
    if all(map(find_spec, ("umap", "matplotlib", "plotly"))):
        write_store(Path("store"))
        yield "discover", partial(made, "report", *shlex.split("vectors discover store --threshold 1.5 --name 0=first"))


def evaluation(gguf: Path | None) -> Cases:
    Path("openings.txt").write_text("\n".join(OPENINGS[:2]) + "\n")
    few = shlex.split("-d sport --texts 2 --dtype float32")
    small = shlex.split("--openings openings.txt --seeds 1 --max-new-tokens 12")
    yield "evaluate", partial(made, "evaluation", "evaluate", *small, *few)
    yield "calibrate", partial(answers, "calibrate", *few, "--dry-run")


def made(output: str, *arguments: Any) -> list[Any]:
    """What a command says of a file or folder that it makes, and what is in it."""
    return [answers(*arguments, "-o", output), files_in(Path(output))]


# ---- the other engines ----


def llamacpp(gguf: Path | None) -> Cases:
    common = ["--engine", "llamacpp", "--model", gguf]
    yield from generate_cases(*common)
    yield "compare", partial(answers, "compare", OPENINGS[0], *SOME, *common)
    write_texts()
    yield "embed", partial(made, "counts", "embed", "corpus", *common)
    yield "embed last", partial(made, "last", "embed", "corpus", "--tokens", "last", *common)
    yield from batch_cases(*common)


def vllm(gguf: Path | None) -> Cases:
    """Few cases, since vLLM takes a minute to start; in processes of their own."""
    common = ["--engine", "vllm", "--dtype", "float32"]
    yield from ((name, case) for name, case in batch_cases(*common, run=command) if "lines" not in name)
    said = [*as_options(STEERINGS["everything"] | GREEDY), "--max-new-tokens", TOKENS, *common]
    yield "generate", partial(answers, "generate", STORY, *said, run=command)
    yield "compare", partial(answers, "compare", OPENINGS[0], *SOME, *common, run=command)
