"""Data-parallel replicas behind vLLM's own load balancer, with the calls that `LLMEngine` has for a single one."""

import asyncio
import queue
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

WAIT_SECONDS = 0.02


class Replicas:
    """vLLM's asynchronous engine, driven from ordinary code.

    Args:
        options: arguments of vLLM's `AsyncEngineArgs`, `data_parallel_size` among them.
    """

    def __init__(self, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-replicas", daemon=True)
        self._thread.start()
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks: dict[str, Any] = {}
        self._engine = self._wait(self._open(options))
        self.model_config = self._engine.model_config
        self.engine_core = self

    async def _open(self, options: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    def add_request(self, number: str, prompt: Any, params: Any) -> None:
        self._tasks[number] = asyncio.run_coroutine_threadsafe(self._follow(number, prompt, params), self._loop)

    async def _follow(self, number: str, prompt: Any, params: Any) -> None:
        try:
            async for output in self._engine.generate(prompt, params, number):
                self._outputs.put(output)
        except Exception as error:
            self._outputs.put(error)

    def has_unfinished_requests(self) -> bool:
        return bool(self._tasks)

    def step(self) -> list[Any]:
        """The outputs since the last call; waits briefly if there are none."""
        found: list[Any] = []
        try:
            found.append(self._outputs.get(timeout=WAIT_SECONDS))
            while True:
                found.append(self._outputs.get_nowait())
        except queue.Empty:
            pass
        for output in found:
            if isinstance(output, Exception):
                raise output
            if output.finished:
                self._tasks.pop(output.request_id, None)
        return found

    def abort_request(self, numbers: Sequence[str]) -> None:
        self._wait(self._engine.abort(list(numbers)))
        for number in numbers:
            if (task := self._tasks.pop(number, None)) is not None:
                task.cancel()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """The answers of the workers of all replicas."""
        ask = self._engine.engine_core.call_utility_all_async  # collective_rpc itself asks only the first replica
        return [one for replica in self._wait(ask("collective_rpc", method, None, args, None)) for one in replica]

    def shutdown(self) -> None:
        self._loop.call_soon_threadsafe(self._engine.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
