"""The `hotlap web` command: a web page to chat on, and the server that it asks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hotlap.common.errors import EXIT_CODES
from hotlap.common.files import state_folder
from hotlap.common.process import end_with_parent
from hotlap.common.terminal import printable
from hotlap.serve.command import BACKLOG, PACKAGES, bound, url_of
from hotlap.serve.config import WebConfig

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).with_name("page.py")
ENDS = 5  # seconds that the server gets to end with the page
LAST_ANSWERS = 1  # seconds that connections get
STREAMLIT = {  # its settings, whatever the user's own files say
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",  # an exception's text is no Markdown
    "client.toolbarMode": "minimal",
    "server.address": "127.0.0.1",
    "server.fileWatcherType": "none",
    "server.headless": True,
}
# Streamlit sets styles on elements, and makes images out of data. Its inline script, which is for search
# engines, does not run.
POLICY = (
    "default-src 'self'; img-src 'self' data:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def main(config: WebConfig) -> int:
    """Serve the page until a signal. Whatever can be refused is refused before the model is loaded."""
    config.validate()
    needed = ("streamlit", "openai", *(() if config.url else PACKAGES))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"the web page needs {', '.join(missing)}: pip install -e '.[web]'")
    from hotlap.serve.security import read_key

    key, folder = read_key(None), (config.folder or state_folder() / "conversations").absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with bound("127.0.0.1", config.port) as listener, contextlib.ExitStack() as stack:
        url = config.url.rstrip("/").removesuffix("/v1") if config.url else None
        url = url or stack.enter_context(server(config))
        listener.listen(BACKLOG)
        return asyncio.run(serve(listener, {"url": url, "key": key or "", "folder": str(folder)}))


@contextlib.contextmanager
def server(config: WebConfig) -> Iterator[str]:
    """The address of a server of the model, a process that ends with the block. If it does not start, raises
    its error.
    """
    command = [sys.executable, "-m", "hotlap.cli", "serve", "--port", "0"]
    command += ["--model", str(config.model)] if config.model else []
    command += ["--tools", *config.tools]
    command += ["--moderation", config.moderation] if config.moderation else []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
            preexec_fn=None if sys.platform == "win32" else end_with_parent,
            start_new_session=True,  # Ctrl-C is for the page, which then ends it
        )  # fmt: skip
        try:
            for line in process.stdout:
                if line.startswith("model ") and line.endswith("base model, which continues text\n"):
                    raise ValueError(
                        "a base model only continues text; `hotlap sft` makes a chat model of it, and "
                        "`hotlap chat` shows what it writes"
                    )
                if line.startswith("address "):
                    yield line.split()[1].removesuffix("/v1")
                    return
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("error: ") if lines else "the server has ended without a word"
            kinds = {code: kind for kind, code in reversed(EXIT_CODES.items())}
            raise kinds.get(process.wait(), ValueError)(why)  # which ends this process with the same code
        finally:
            process.terminate()
            try:
                process.wait(ENDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def serve(listener: socket.socket, secrets: dict[str, str]) -> int:
    """Serve the page until SIGINT or SIGTERM. secrets: what page.py reads as `st.secrets`."""
    import uvicorn
    from starlette.middleware import Middleware
    from streamlit.starlette import App
    from streamlit.web import bootstrap

    from hotlap.serve.answering import stop_all
    from hotlap.serve.server import Server, on_signals

    bootstrap.load_config_options(STREAMLIT)
    app = App(PAGE, secrets=secrets, middleware=[Middleware(OnlyThisMachine)])
    uvicorn_server = Server(
        uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )
    )  # fmt: skip
    stop = asyncio.Event()
    on_signals(lambda number: stop.set())
    serving = asyncio.create_task(uvicorn_server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    print(printable(f"page     {url_of(listener)}"), flush=True)
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stop_all()
    uvicorn_server.should_exit = True
    await serving
    return 0


class OnlyThisMachine:
    """Refuses what other pages in the browser send here, in their own name or under a name that they have
    pointed at this machine, and lets the browser load nothing from elsewhere.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        from hotlap.serve.security import is_loopback

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        names = [urlsplit(f"//{headers.get('host', '')}").hostname]
        if "origin" in headers:
            names.append(urlsplit(headers["origin"]).hostname)
        if all(name and is_loopback(name) for name in names):
            await self.app(scope, receive, send_with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("this page is for this machine alone", 403)(scope, receive, send)
