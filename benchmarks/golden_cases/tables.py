"""What is asked: prompts, steerings, samplings and a corpus as tables, and how each place says them. Runs nothing."""

import json
from pathlib import Path
from typing import Any

STORY = "Once upon a time there was a brown dog named Milo who lived by the river."
OPENINGS = ("The two sisters met at the station.", "It rained all night.", STORY)
TOKENS = 24
FORMULAS, SCALES = ("additive", "max_scaled", "zero_max_scaled"), ("magnitude", "paper")
STEERINGS: dict[str, dict[str, Any]] = {
    "unsteered": {},
    "calibrated": {"domain": "sport"},
    **{f"{f} {s}": {"domain": "sport", "formula": f, "scale": s, "strength": 8.0} for f in FORMULAS for s in SCALES},
    "away": {"domain": "sport", "strength": -8.0},
    "no strength": {"domain": "sport", "strength": 0.0},
    "prompt": {"domain": "food", "positions": "prompt"},
    "all": {"domain": "food", "positions": "all"},
    "decay": {"domain": "law", "schedule": "decay:12", "strength": 12.0},
    "window": {"domain": "space", "schedule": "window:4-12"},
    "window of all": {"domain": "food", "schedule": "window:2-8", "positions": "all", "formula": "additive"},
    "layers": {"domain": "music", "layers": "10-20"},
    "mixture": {"domain": "sport=0.4+food=0.6"},
    "mixture away": {"domain": "law=1+medicine=-0.5", "formula": "zero_max_scaled", "strength": 4.0},
    "force": {"force": ["3:5", "20:1"]},
    "ban": {"ban": ["0:16", "12:16", "25:17"], "positions": "all"},
    "everything": {
        **{"domain": "space=0.8+food=0.2", "strength": 6.0, "formula": "zero_max_scaled", "schedule": "decay:16"},
        **{"positions": "all", "layers": "2-25", "force": ["5:3"], "ban": ["7:7", "29:0"]},
    },
}
"""As a line of a batch says them; `as_options` and `as_plan` say the same otherwise."""
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "temperature": {"seed": 6, "temperature": 1.3},
    "top_p": {"seed": 7, "top_p": 0.8, "temperature": 1.0},
    "top_k": {"seed": 8, "top_k": 12},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
    "all of them": {"seed": 9, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1},
}
DOMAINS_LINE = {"domains": ["space", None, {"law": 0.5, "music": 0.5}], "samples": 2, "id": "many", "meta": {"a": [1]}}
OTHER_LINES = [
    {"prompt": OPENINGS[1], **DOMAINS_LINE},
    {"prompt": OPENINGS[0], "id": 7, "domain": "food", "min_new_tokens": 10, "max_new_tokens": 10, "seed": 3},
    {"prompt": OPENINGS[0], "id": 7, "domain": "food", "min_new_tokens": 10, "max_new_tokens": 10, "seed": 3},
    {"prompt": " "},
    {"prompt": STORY, "strength": "much"},
    {"prompt": STORY, "domain": "nonsense"},
]
"""The third asks for the second's story again, the last three can't be used."""
TEXTS = {
    "sport": "The goalkeeper dived, and the ball hit the post.|They trained for the final all summer.|Our team won.",
    "food": "She kneaded the dough and lit the oven.|The soup needs salt, pepper and an onion.|He fried two eggs.",
    "other": "The train was late again.|A letter lay on the table.|Nobody had seen the grey cat since Monday.",
}


# ---- the same, said otherwise ----


def as_options(fields: dict[str, Any]) -> list[str]:
    """Fields of a steering or sampling as options of a command."""
    options: list[str] = []
    for name, value in fields.items():
        flag = "--" + ("no-" if value is False else "") + name.replace("_", "-")
        if isinstance(value, bool):
            options.append(flag)
        else:
            values = value if isinstance(value, list) else value.split("+") if name == "domain" else [value]
            options += [text for one in values for text in (flag, str(one))]
    return options


def as_plan(model: Any, domain: str | None = None, layers: str | None = None, force=(), ban=(), **fields: Any) -> Any:
    """The same as a plan; None for no steering."""
    import steermoe

    parts = [part.partition("=") for part in domain.split("+")] if domain else []
    vectors = [(steermoe.load_vector(name, model), float(weight or 1)) for name, _, weight in parts]
    if not (vectors or force or ban):
        return None
    fields |= {n: [tuple(map(int, e.split(":"))) for e in named] for n, named in (("force", force), ("ban", ban))}
    if layers:
        fields["layers"] = tuple(map(int, layers.split("-")))
    return steermoe.plan_for(steermoe.mix(vectors) if vectors else None, **fields)


# ---- files ----


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_texts() -> None:
    """The corpus: a folder a domain, a file a text."""
    for domain, texts in TEXTS.items():
        folder = Path("corpus") / domain
        folder.mkdir(parents=True)
        for number, text in enumerate(texts.split("|")):
            (folder / f"{number}.txt").write_text(text)


def write_store(folder: Path, texts: int = 60) -> None:
    """Embeddings of three domains, as `steermoe embed` writes them."""
    import numpy as np

    random, means = np.random.default_rng(0), np.full((3, 8), 0.02) + 0.84 * np.eye(3, 8)
    rows = [random.dirichlet(100 * means[number % 3], size=4) for number in range(texts)]
    lines = [
        {"id": str(number), "label": domain, "tokens": 20, "text": f"{TEXTS[domain]} {number}"}
        for number, domain in zip(range(texts), [*TEXTS] * texts, strict=False)
    ]
    meta = {"format_version": 1, "model": "tiny", "architecture": "mixtral", "complete": True, "texts": texts}
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({**meta, "layers": [0, 1, 2, 3], "num_experts": 8, "top_k": 2}))
    np.save(folder / "embeddings-00000.npy", np.array(rows, dtype=np.float32))
    write_lines(folder / "texts-00000.jsonl", lines)
