"""uvicorn around the application and the worker, from the first connection to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from hotlap.common.errors import BUG
from hotlap.common.log import log
from hotlap.serve.worker import Worker

if TYPE_CHECKING:
    from starlette.types import ASGIApp

IDLE = 30  # seconds that a connection may be kept for the next request, longer than clients keep theirs
LAST_ANSWERS = 5  # seconds for answers to reach their clients, once nothing is generated any more


class Server(uvicorn.Server):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        """Leave signals to `stop_by_signals`: uvicorn would close the port at once."""
        return contextlib.nullcontext()


async def serve(
    app: ASGIApp, worker: Worker, listener: socket.socket, grace: float, stop: asyncio.Event
) -> int:
    """Answer requests until `stop` is set or the engine fails. Returns the exit code.

    While running requests finish, for `grace` seconds, the port still answers: with 503.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=LAST_ANSWERS,
    )
    server = Server(config)
    worker.start()
    ended, stopped = asyncio.wrap_future(worker.done), asyncio.create_task(stop.wait())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await asyncio.wait({ended, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
    await worker.stop(grace)
    server.should_exit = True
    await serving
    stopped.cancel()
    return BUG if worker.failed else 0


def stop_by_signals(stop: asyncio.Event) -> None:
    """Set `stop` at the first SIGINT or SIGTERM, and end the process at the second."""

    def stopped(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        log.info("stopping when the running requests are done; a second signal stops now")
        stop.set()

    on_signals(stopped)


def on_signals(action: Callable[[int], None]) -> None:
    """Have the event loop that runs now call action with the number of each SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform == "win32":  # whose event loops take no signals
            signal.signal(number, lambda number, frame: loop.call_soon_threadsafe(action, number))
        else:
            loop.add_signal_handler(number, action, number)
