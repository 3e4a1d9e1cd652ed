"""What a server costs: its throughput beside that of a batch, its first token under load, llama.cpp's own server.

    python benchmarks/serve.py [--model FILE.gguf] [--texts 64] [--tokens 32] [--rounds 3] [--llama-server]

The server runs in this process, its clients in another one. Batch and server take turns, on one engine; so do the two
servers. Texts are mixed: of all domains and of none, each sampled with its own seed.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

PORT = 8963


def bodies(model: str, texts: int, tokens: int, steered: bool) -> list[dict]:
    from steermoe.models.default import spec
    from steermoe.models.default.stories import openings

    names = [model, *(f"{model}:{domain}" for domain in spec.DOMAINS)] if steered else [model]
    return [
        {
            "model": names[number % len(names)],
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.7,
            "seed": number,
        }
        for number, prompt in enumerate(openings("heldout", texts))
    ]


async def ask(url: str, asked: list[dict]) -> tuple[float, int]:
    """Seconds and tokens of requests that are sent at once."""
    import httpx

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=256)) as client:
        await client.get(f"{url}/v1/models")
        started = time.perf_counter()
        answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in asked))
        seconds = time.perf_counter() - started
    return seconds, sum(answer.json()["usage"]["completion_tokens"] for answer in answers)


def client(url: str, asked: list[dict]) -> tuple[float, float]:
    """Tokens per second of requests from another process, and per CPU second of this one."""
    used = time.process_time()
    done = subprocess.run(
        [sys.executable, __file__, "--client", url], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    seconds, tokens = json.loads(done.stdout)
    return tokens / seconds, tokens / (time.process_time() - used)


@contextmanager
def served(engine, rows: int, tokens: int):
    """A server of ours in this process: its address and its live engine."""
    from steermoe.engines.listening import ServerOptions
    from steermoe.serving import app
    from steermoe.serving.live import Limits, LiveEngine
    from steermoe.steering.resolver import PlanResolver

    settings = app.Settings(ServerOptions(port=PORT), grace=1)
    with LiveEngine(engine, Limits(rows=rows, tokens=tokens)) as live:
        made = app.create_app(live, PlanResolver(engine.shape, watch=True, names_only=True), settings)
        server = app.make_server(made, settings)
        server.config.port = PORT
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{PORT}", live
        server.should_exit = True
        thread.join()


def batch(engine, rows: int, asked: list[dict]) -> tuple[float, float]:
    """Tokens per second and per CPU second of the same texts as `steermoe batch` runs them."""
    from itertools import count

    from steermoe.batch.jobs import Job
    from steermoe.batch.worker import EngineWorker, PlannedJob
    from steermoe.engines.request import Sampling
    from steermoe.steering.resolver import PlanResolver
    from steermoe.steering.spec import SteeringSpec

    resolver, numbers = PlanResolver(engine.shape), count()
    jobs = []
    for body in asked:
        domain = body["model"].partition(":")[2]
        steering = SteeringSpec(domain=(domain,)) if domain else SteeringSpec()
        sampling = Sampling(max_new_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        number = next(numbers)
        job = Job(number, body["prompt"], steering, sampling)
        jobs.append(PlannedJob(job, number, resolver.plan(steering)))
    started, used = time.perf_counter(), time.process_time()
    records = list(EngineWorker(engine, rows).generate(iter(jobs), lambda job, reason: print(reason, file=sys.stderr)))
    tokens = sum(record["new_tokens"] for record in records)
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - used)


def first_token(live, load: int) -> tuple[float, int]:
    """Seconds and steps to the first token of a text that joins `load` others."""
    from steermoe.engines.request import Request, Sampling

    long = Sampling(max_new_tokens=200, min_new_tokens=200, seed=1)
    others = live.submit([Request("Once upon a time there was a dog.", None, long) for _ in range(load)])
    for other in others:
        next(iter(other))
    request = Request("The two sisters met at the station.", None, Sampling(max_new_tokens=4))
    prompt = live.encode(request)
    steps, started = live.steps, time.perf_counter()
    (ticket,) = live.submit([request], [prompt])
    next(iter(ticket))
    found = time.perf_counter() - started, live.steps - steps
    for other in others:
        other.cancel()
    while live.running:
        time.sleep(0.01)
    return found


@contextmanager
def llama_server(model: str, threads: int):
    """llama.cpp's own server, as llama-cpp-python has it."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", str(PORT + 1), "--n_ctx", "1024"]
    command += ["--n_threads", str(threads), "--interrupt_requests", "False", "--verbose", "False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    import httpx

    url = f"http://127.0.0.1:{PORT + 1}"
    for _ in range(600):
        try:
            httpx.get(f"{url}/v1/models")
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait()


def shown(name: str, unit: str, server: list[float], other: list[float]) -> None:
    ratios = [a / b for a, b in zip(server, other, strict=True)]
    print(
        f"{name}: {statistics.median(server):.1f} against {statistics.median(other):.1f} {unit}, "
        f"ratio {statistics.median(ratios):.3f} ({', '.join(f'{one:.3f}' for one in ratios)})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--llama-server", action="store_true", help="also measure llama.cpp's own server, 1 and 8 texts"
    )
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(asyncio.run(ask(options.client, json.load(sys.stdin)))))
        return
    import torch

    from steermoe.engines.auto import open_engine

    engine = open_engine(options.model)
    print(f"{engine.name}, {type(engine).__name__}, {engine.dtype}, {torch.get_num_threads()} threads", flush=True)
    with served(engine, options.texts, 256) as (url, live):
        asked = bodies(engine.name, options.texts, options.tokens, steered=True)
        client(url, asked[:2])
        rates: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for number in range(options.rounds):
            ways = [lambda: client(url, asked), lambda: live.call(lambda: batch(engine, options.texts, asked)).result()]
            for way in (0, 1) if number % 2 == 0 else (1, 0):
                rates[way].append(ways[way]())
        for place, unit in enumerate(("tokens/s", "tokens per CPU second")):
            shown(f"{options.texts} texts, server against batch", unit, *([one[place] for one in way] for way in rates))
        for load in (0, 8):
            found = [first_token(live, load) for _ in range(3)]
            seconds, steps = statistics.median(one[0] for one in found), max(one[1] for one in found)
            print(f"first token beside {load} texts: {seconds * 1000:.0f} ms, at most {steps} steps", flush=True)
        if not options.llama_server:
            return
        with llama_server(str(Path(options.model).resolve()), torch.get_num_threads()) as other:
            for texts in (1, 8):
                asked = bodies(engine.name, texts, options.tokens, steered=False)
                client(url, asked), client(other, asked)
                rates = ([], [])
                for number in range(options.rounds + 2):
                    for way in (0, 1) if number % 2 == 0 else (1, 0):
                        rates[way].append(client((url, other)[way], asked))
                walls = ([one[0] for one in way] for way in rates)  # the other server's CPU time is not this process's
                shown(f"{texts} texts, server against llama.cpp's", "tokens/s", *walls)


if __name__ == "__main__":
    main()
