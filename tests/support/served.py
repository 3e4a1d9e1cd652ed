"""A server in this process: uvicorn in a thread, on a free port, with a tiny model of its own."""

import threading
import time
from contextlib import contextmanager

import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.models import loading
from steermoe.serving import app as serving
from steermoe.serving.live import LiveEngine
from steermoe.steering.resolver import PlanResolver
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo

DOMAINS = ("biology", "food", "law", "medicine", "music", "software", "space", "sport")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_vectors(folder, shape):
    """A vector for each domain, each raising other experts of the tiny model strongly."""
    for number, domain in enumerate(DOMAINS):
        frequency = torch.full((len(shape.layers), shape.num_experts), 0.1 / (shape.num_experts - 1))
        frequency[:, number % shape.num_experts] = 0.9
        info = VectorInfo(model=shape.name, top_k=2, strength=8.0, formula="additive")
        vector = SteeringVector(domain, frequency / frequency.sum(-1, keepdim=True), shape.layers, info=info)
        write_vector(vector, folder / f"{domain}.safetensors")


def tiny_engine(checkpoint):
    """An engine of its own, so that steering does not meet what other tests do with the shared model; it can chat."""
    loaded = loading.load(checkpoint, dtype="float32")
    loaded.tokenizer.chat_template = TEMPLATE
    return HFEngine(loaded)


class Running:
    """A running server.

    Attributes:
        url: its address.
        live: its live engine.
    """

    def __init__(self, app, server, live, socket):
        self.app, self.server, self.live = app, server, live
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"


@contextmanager
def running(engine, vectors, limits=None, settings=None, extend=lambda app: None):
    """A server for an engine, until the end of the block; `extend` as for `serving.run`."""
    settings = settings or serving.Settings(serving.ServerOptions(port=0), grace=1)
    with LiveEngine(engine, limits) as live:
        app = serving.create_app(live, PlanResolver(engine.shape, vectors, watch=True, names_only=True), settings)
        extend(app)
        server = serving.make_server(app, settings)
        socket = serving._bound(serving.ServerOptions(port=0))
        thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield Running(app, server, live, socket)
        finally:
            server.should_exit = True
            thread.join()
            socket.close()
