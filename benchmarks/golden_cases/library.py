"""The default model from Python: the hf engine, `steer` around transformers' own `generate`, and recording."""

from functools import partial
from pathlib import Path
from typing import Any

from golden_cases.running import Cases, report_of, tensor_hash
from golden_cases.tables import GREEDY, OPENINGS, SAMPLINGS, STEERINGS, STORY, TEXTS, TOKENS, as_plan


def hf(gguf: Path | None) -> Cases:
    import steermoe

    loaded = steermoe.load(dtype="float32")
    plans = {name: as_plan(loaded.model, **fields) for name, fields in STEERINGS.items()}
    yield from engine_cases(loaded, plans)
    yield from steer_cases(loaded, plans)
    yield from recording_cases(loaded)


def engine_cases(loaded: Any, plans: dict[str, Any]) -> Cases:
    """Every plan alone, then rows that differ in plan, opening and sampling."""
    import steermoe

    engine = steermoe.HFEngine(loaded, compiled=False)

    def generate(*asked: tuple[str, Any, dict[str, Any]], **options: Any) -> dict[str, Any]:
        requests = [
            steermoe.Request(opening, plan, steermoe.Sampling(**{"max_new_tokens": TOKENS, **sampling}))
            for opening, plan, sampling in asked
        ]
        done = engine.generate(requests, **options)
        texts = [[one.text, one.token_ids, one.finish_reason, tensor_hash(one.frequency)] for one in done]
        return {"texts": texts, "report": report_of(done[0].report)}

    def stream() -> list[Any]:
        pieces: list[str] = []
        return [generate((STORY, plans["mixture"], {"seed": 1}), on_text=pieces.append), pieces]

    for name, plan in plans.items():
        yield name, partial(generate, (STORY, plan, GREEDY))
    yield "rows", partial(generate, *((STORY, plan, GREEDY) for plan in plans.values()))
    yield "rows of one plan", partial(generate, *((opening, plans["calibrated"], GREEDY) for opening in OPENINGS))
    samplings = [*SAMPLINGS.values(), {"seed": 5, "max_new_tokens": 9}]
    mixed = [(OPENINGS[i % 3], plan, samplings[i % 7]) for i, plan in enumerate(plans.values())]
    yield "rows that sample", partial(generate, *mixed)
    yield "rows that are recorded", partial(generate, *mixed[:6], record=True)
    yield "stream", stream


def steer_cases(loaded: Any, plans: dict[str, Any]) -> Cases:
    """Steering around a model's own `generate`: rows, beams, and changes between calls."""
    import steermoe

    def steered(rows: list[Any], count: int = 2, **options: Any) -> list[Any]:
        with steermoe.steer(loaded.model, rows=rows) as handle:
            return [continuations(loaded, count, **options), report_of(handle.report())]

    def changed() -> list[Any]:
        found: list[Any] = []
        sport, food = (steermoe.load_vector(name, loaded.model) for name in ("sport", "food"))
        with steermoe.steer(loaded.model, sport, 10.0, schedule="decay:10") as handle:
            for change in ({}, {"strength": -5.0}, {"plan": steermoe.plan_for(food)}, {"rows": [None]}):
                handle.set(**change)
                found.append([continuations(loaded, 1), report_of(handle.report())])
            handle.set(rows=[plans["all"], plans["layers"]])
            found.append([continuations(loaded, 2), report_of(handle.report())])
        return [*found, continuations(loaded, 1)]

    yield "steer rows", partial(steered, [plans["mixture"], None])
    yield "steer beams", partial(steered, [plans["everything"], plans["away"]], num_beams=2)
    yield "handle.set", changed


def recording_cases(loaded: Any) -> Cases:
    import steermoe

    def recorded(positions: str) -> list[Any]:
        with steermoe.record_routing(loaded.model, positions, probabilities=True) as routing:
            found = continuations(loaded, 2)
        return [found, *map(tensor_hash, (routing.counts, routing.tokens, routing.mean_probability()))]

    for positions in ("generated", "prompt", "all"):
        yield f"record {positions}", partial(recorded, positions)
    texts = TEXTS["sport"].split("|")
    yield "routing_embeddings", lambda: [*map(tensor_hash, steermoe.routing_embeddings(loaded, texts))]
    yield "vector_from_texts", lambda: steermoe.vector_from_texts(loaded, "sport", texts, threshold=2.0).chosen()


def continuations(loaded: Any, rows: int, **options: Any) -> list[str]:
    """Of the story, by transformers."""
    import torch

    ids = loaded.tokenizer([STORY] * rows, return_tensors="pt").input_ids
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    new = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return loaded.tokenizer.batch_decode(new[:, ids.shape[1] :])
