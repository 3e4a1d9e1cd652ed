"""Where steered stories fall apart: `python benchmarks/long_texts.py [--work DIR] [--json FILE]`.

Stories of 512 tokens, steered all along or by a schedule, in windows of 40 tokens. Of each window: whether it is about
the domain (the classifier of `steermoe evaluate`), whether it is sound (neither gibberish, nor a loop, nor a list of
words), and both. Usual are the first windows of unsteered stories; a window that repeats what came before it, in any
window, counts as a loop.

The default model ends its stories after 120 to 160 tokens. So by default the end token is not drawn; with `--may-end`
it is, and "not ended" says how many stories have reached a window.

Every condition is kept in the work folder as soon as it is finished: the same command resumes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from steermoe.engines.hf.engine import HFEngine
from steermoe.engines.request import Request, Sampling
from steermoe.evaluation import measures
from steermoe.evaluation.bootstrap import bootstrap
from steermoe.evaluation.classifier import DomainClassifier
from steermoe.evaluation.results import ResultFolder
from steermoe.evaluation.soundness import Usual, defect_of
from steermoe.evaluation.texts import domain_list, packaged_texts
from steermoe.evaluation.words import word_pattern
from steermoe.models.default.stories import openings
from steermoe.models.loading import LoadedModel, load
from steermoe.steering.plans import SteeringPlan, plan_for
from steermoe.vectors.file import tensors_sha256
from steermoe.vectors.library import vectors_for

SCHEDULES = ("constant", "decay:128", "decay:512", "window:0-256", "first:40", "first:128")
UNSTEERED = "unsteered"
FIGURES = {"about": "about the domain", "sound": "sound", "both": "about the domain and sound", "there": "not ended"}
LEAST = 0.5
"""Of a window: what is shorter is not judged."""


def token_nats(loaded: LoadedModel, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Of each token given all before it, under the unsteered model."""
    ids = torch.tensor([[*prompt, *tokens]], device=loaded.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    losses = [F.cross_entropy(part.float(), ids[0, len(prompt) + start :][: len(part)], reduction="none")
              for start, part in zip(range(0, len(tokens), 128), logits.split(128), strict=True)]  # fmt: skip
    return [round(loss, 4) for loss in torch.cat(losses).tolist()]


def generate(
    loaded: LoadedModel, prompts: Sequence[str], plan: SteeringPlan | None, args: argparse.Namespace
) -> dict[str, list]:
    """A text for each opening and seed; openings and seeds are the same in all conditions."""
    engine, texts = HFEngine(loaded), []
    requests = [
        Request(
            prompt,
            plan,
            Sampling(
                max_new_tokens=args.tokens,
                min_new_tokens=0 if args.may_end else args.tokens,
                temperature=0.7,
                seed=seed * 1000 + number,
            ),
        )
        for seed in range(args.seeds)
        for number, prompt in enumerate(prompts)
    ]
    for first in range(0, len(requests), args.batch):
        for number, done in enumerate(engine.generate(requests[first : first + args.batch]), first):
            ids = loaded.tokenizer(done.request.prompt, split_special_tokens=True)["input_ids"]
            nats = token_nats(loaded, ids, done.token_ids) if done.token_ids else []
            texts.append({"opening": number % len(prompts), "token_ids": list(done.token_ids), "nats": nats})
    return {"texts": texts}


class Windows:
    """Judges windows of texts.

    Args:
        loaded: whose tokens they are.
        classifier: names the topic of a window.
        unsteered: texts whose first windows are usual.
        width: of a window, in tokens. count: windows of a text.
    """

    def __init__(
        self, loaded: LoadedModel, classifier: DomainClassifier, unsteered: list[dict], width: int, count: int
    ) -> None:
        self.loaded, self.classifier, self.width, self.count = loaded, classifier, width, count
        self.usual = Usual.of([float(np.mean(text["nats"][:width])) for text in unsteered if text["nats"]])

    def judge(self, texts: list[dict], domain: str) -> dict[str, np.ndarray]:
        """Each of `FIGURES` for each text and window [texts, windows]; NaN where a text has ended."""
        found = {name: np.full((len(texts), self.count), np.nan) for name in FIGURES}
        found["there"][:] = 0.0
        pattern = word_pattern(domain_list(domain) or ["\0"])
        column = self.classifier.labels.index(domain)
        for row, text in enumerate(texts):
            ids, seen = text["token_ids"], set()
            for number in range(self.count):
                part = slice(number * self.width, (number + 1) * self.width)
                own, nats = ids[part], text["nats"][part]
                if len(own) < LEAST * self.width:
                    break
                shown = self.loaded.tokenizer.decode(own, skip_special_tokens=True)
                grams = [tuple(ids[i : i + 4]) for i in range(max(0, part.start - 3), part.start + len(own) - 3)]
                new = set(grams) - seen
                repeated = 1 - len(new) / len(grams)
                seen |= new
                density = measures.word_figures(shown, pattern).per_thousand
                loop = measures.longest_loop(own)
                about = float(self.classifier.probabilities([shown])[0].argmax() == column)
                sound = float(not defect_of(self.usual, float(np.mean(nats)), repeated, loop, density))
                values = {"about": about, "sound": sound, "both": about * sound, "there": 1.0}
                for name, value in values.items():
                    found[name][row, number] = value
        return found


def by_opening(values: np.ndarray, texts: list[dict], count: int) -> np.ndarray:
    """[openings, windows], mean over seeds, without NaN."""
    own = np.full((count, values.shape[1]), np.nan)
    for opening in range(count):
        rows = values[[number for number, text in enumerate(texts) if text["opening"] == opening]]
        known = ~np.isnan(rows)
        own[opening] = np.where(known.any(0), np.nansum(rows, 0) / np.maximum(known.sum(0), 1), np.nan)
    return own


def summary(judged: dict[str, list[np.ndarray]]) -> dict:
    """Of one schedule, from [openings, windows] of each domain: each figure by window, over openings and domains."""
    found = {}
    for name, tables in judged.items():
        stacked = np.stack(tables)
        known = ~np.isnan(stacked)
        over_domains = np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)
        intervals = [bootstrap(over_domains[:, number]) for number in range(over_domains.shape[1])]
        found[name] = [None if one is None else one.as_dict() for one in intervals]
    return found


def show(found: dict[str, dict], width: int, name: str) -> None:
    windows = len(next(iter(found.values()))[name])
    table = Table("schedule", *(str(width * (number + 1)) for number in range(windows)), title=FIGURES[name])
    for schedule, figures in found.items():
        table.add_row(schedule, *("" if one is None else f"{one['mean']:.0%}" for one in figures[name]))
    Console(width=150).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: smollm2-moe")
    parser.add_argument("--vectors", type=Path, help="a folder of vectors to search first")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "steermoe-bench-long-texts")
    parser.add_argument("--domains", nargs="+", help="default: all that the model has vectors of")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--openings", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--may-end", action="store_true", help="stories may end; else the end token is not drawn")
    parser.add_argument("--window", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if not 4 <= args.window <= args.tokens:
        parser.error(f"--window {args.window} is out of range: expected 4 to {args.tokens}, the length of a text")
    return args


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    loaded = load(args.model)
    vectors = vectors_for(loaded.shape, args.domains or [], folder=args.vectors)
    prompts = openings("heldout", args.openings)
    settings = {
        "model": loaded.name, "fingerprint": loaded.shape.fingerprint, "dtype": str(loaded.model.dtype),
        "openings": prompts, "seeds": args.seeds, "tokens": args.tokens, "batch": args.batch,
        "may_end": args.may_end,
    }  # fmt: skip
    folder = ResultFolder(args.work, settings)

    def texts_of(name: str, plan: SteeringPlan | None) -> list[dict]:
        texts = folder.on_texts(name, lambda: generate(loaded, prompts, plan, args))["texts"]
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return texts

    unsteered = texts_of(UNSTEERED, None)
    windows = Windows(loaded, DomainClassifier(packaged_texts()), unsteered, args.window, args.tokens // args.window)
    found = {}
    for schedule in (UNSTEERED, *args.schedules):
        judged: dict[str, list[np.ndarray]] = {name: [] for name in FIGURES}
        for domain, vector in vectors.items():
            texts = unsteered
            if schedule != UNSTEERED:
                mark = tensors_sha256({"experts": vector.experts.contiguous()})[:8]
                plan = plan_for(vector, schedule=schedule)
                texts = texts_of(f"{domain}-{mark}-{plan.strength:g}-{schedule.replace(':', '-')}", plan)
            for name, values in windows.judge(texts, domain).items():
                judged[name].append(by_opening(values, texts, len(prompts)))
        found[schedule] = summary(judged)
    print(f"{loaded.name}, {', '.join(vectors)}; columns: the windows of {args.window} tokens, by their ends")
    for name in FIGURES:
        show(found, args.window, name)
    if args.json:
        figures = {"settings": settings, "domains": list(vectors), "window": args.window, "schedules": found}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
