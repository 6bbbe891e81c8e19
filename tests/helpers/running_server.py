"""A server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hotlap.serve.api import create_app
from hotlap.serve.command import bound
from hotlap.serve.config import Limits
from hotlap.serve.metrics import Metrics
from hotlap.serve.moderation import Moderation
from hotlap.serve.protocol import Served
from hotlap.serve.server import serve
from hotlap.serve.worker import Worker

CONTEXT = 64


def served(tokenizer, chat: bool = True, context: int = CONTEXT, **limits) -> Served:
    return Served("tiny", "hotlap", tokenizer, context, chat, 1_700_000_000, Limits(**limits))


def chat(text: str = "hello", **fields) -> dict:
    """The body of a chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}


@dataclass
class Running:
    """A server that answers on `port`."""

    port: int
    worker: Worker
    exit_code: int | None = None
    stop: Callable[[], None] = field(default=lambda: None)
    thread: threading.Thread | None = None

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(
        self, path: str, body: object = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict, http.client.HTTPMessage]:
        """Status, JSON and headers of the response to a request. body: an object for JSON, or bytes."""
        connection = self.connect()
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if raw is not None:
            headers = {"content-type": "application/json"} | headers
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(content) if is_json else content.decode(), response.headers

    def events(self, path: str, body: dict) -> list[str]:
        """What comes after `data: ` in each event of a stream, and the comments."""
        status, text, headers = self.ask(path, body)
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        assert text.endswith("\n\n")
        return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]

    def quiet(self) -> bool:
        """Whether no request is open, and the engine has none."""
        engine = self.worker.engine
        return not (self.worker.tickets or self.worker.choices or engine.waiting or any(engine.slots))


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def running_server(
    engine,
    model: Served,
    key: str | None = None,
    queue: int = 256,
    timeout: float = 30,
    grace: float = 5,
    moderate: Moderation | None = None,
    port: int = 0,
) -> Iterator[Running]:
    listener = bound("127.0.0.1", port)
    listener.listen(256)
    metrics = Metrics()
    worker = Worker(engine, queue, timeout, metrics)
    metrics.watch(worker)
    running = Running(listener.getsockname()[1], worker)

    async def run() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        running.stop = lambda: loop.call_soon_threadsafe(stop.set)
        ready.set()
        running.exit_code = await serve(
            create_app(worker, model, metrics, key, moderate), worker, listener, grace, stop
        )

    ready = threading.Event()
    running.thread = threading.Thread(target=lambda: asyncio.run(run()))
    running.thread.start()
    ready.wait()
    try:
        yield running
    finally:
        if running.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                running.stop()
        running.thread.join(20)
        assert not running.thread.is_alive()
