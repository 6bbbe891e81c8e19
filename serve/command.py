"""The `hotlap serve` command: check, load, listen."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import socket
import time
from typing import TYPE_CHECKING

from hotlap.common.terminal import printable
from hotlap.model.tools import TOOLS, Tools, described, named_tools
from hotlap.serve.config import Limits, ServeConfig
from hotlap.serve.moderation import Moderation, load_moderation

if TYPE_CHECKING:
    from hotlap.model.engine import Engine
    from hotlap.serve.protocol import Served

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
ALIAS = "hotlap"  # a name that every served model has
MOST_SLOTS = 64  # by default
BACKLOG = 1024  # connections that wait to be accepted


def main(config: ServeConfig) -> int:
    """Serve until a signal. Whatever can be refused is refused before the model is loaded."""
    config.validate()
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"serving needs {', '.join(missing)}: pip install -e '.[serve]'")
    from hotlap.serve.security import KEY_VARIABLE, is_loopback, read_key

    key = read_key(config.api_key_file)
    if key is None and not is_loopback(config.host):
        raise ValueError(
            f"host={config.host} can be reached by other machines, so it needs an API key: name a file with "
            f"--api-key-file, or set {KEY_VARIABLE}"
        )
    tools = named_tools(config.tools)
    moderate = load_moderation(config.moderation) if config.moderation else None
    with bound(config.host, config.port) as listener:
        engine, served = load(config, tools)
        listener.listen(BACKLOG)
        return asyncio.run(serve(config, engine, served, key, moderate, listener))


async def serve(
    config: ServeConfig,
    engine: Engine,
    served: Served,
    key: str | None,
    moderate: Moderation | None,
    listener: socket.socket,
) -> int:
    from hotlap.serve import server
    from hotlap.serve.api import create_app
    from hotlap.serve.metrics import Metrics
    from hotlap.serve.worker import Worker

    metrics, stop = Metrics(), asyncio.Event()
    worker = Worker(engine, config.queue, config.timeout, metrics)
    metrics.watch(worker)
    server.stop_by_signals(stop)
    said = announcement(engine, served, url_of(listener), key, config.moderation)
    print(printable(said), flush=True)
    app = create_app(worker, served, metrics, key, moderate)
    return await server.serve(app, worker, listener, config.grace, stop)


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the port, and does not listen yet. ValueError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host} is no address of this machine: {error}; try 127.0.0.1") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"host={host} is no address of this machine; try 127.0.0.1") from None
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise ValueError(f"port={port} {why} on {host}; choose another, or 0 for any free one") from None
    return found


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def load(config: ServeConfig, tools: Tools = TOOLS) -> tuple[Engine, Served]:
    """The engine with its slots, and what requests are checked against."""
    from hotlap.common.memory import require_memory
    from hotlap.kernels.dispatch import default_device, kernel_choice
    from hotlap.model.engine import CHUNK, Engine
    from hotlap.model.kv_cache import fitting_slots, slot_bytes
    from hotlap.model.weights import load_model, model_folder, model_name, stage
    from hotlap.serve.protocol import Served

    folder, device = model_folder(config.model), default_device()
    if config.int8 and kernel_choice(device.type) != "c":
        raise ValueError(
            "int8=True is for CPUs with a C compiler: elsewhere it has not been measured; leave it out"
        )
    model, tokenizer = load_model(folder, device)
    model, slots = model.for_inference(), config.slots
    if config.int8:
        model.quantize()
    shape, dtype = model.config, model.compute_dtype
    if slots is None:
        slots = fitting_slots(shape, CHUNK, dtype, device, MOST_SLOTS)
    else:
        needed = slots * slot_bytes(shape, shape.context, CHUNK, dtype)
        require_memory(f"slots={slots} for contexts of {shape.context} tokens", needed, "lower it", device)
    engine = Engine(model, tokenizer, slots)
    engine.cache.reserve(shape.context)
    engine.choose_kernels()
    name = config.name or model_name(folder)
    chat = stage(folder) != "pretrain"
    return engine, Served(name, ALIAS, tokenizer, shape.context, chat, int(time.time()), Limits(), tools)


def announcement(
    engine: Engine, served: Served, url: str, key: str | None, moderation: str | None = None
) -> str:
    """What is served, where, and how to try it."""
    from hotlap.common.memory import amount
    from hotlap.model.kv_cache import slot_bytes

    parameters = sum(p.numel() for p in engine.model.parameters())
    slots, chunk, dtype = len(engine.slots), engine.chunk, engine.model.compute_dtype
    memory = amount(slots * slot_bytes(engine.model.config, served.context, chunk, dtype))
    route, question = "/v1/completions", '"prompt": "Hello", "max_tokens": 32'
    if served.chat:
        route, question = "/v1/chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
    return "\n".join([
        f"model    {served.name}, also called {served.alias}: {parameters / 1e6:.1f}M parameters on "
        f"{engine.device}, {'chat' if served.chat else 'base model, which continues text'}",
        f"slots    {slots} of {served.context} tokens, {memory}",
        f"address  {url}/v1",
        f"key      {'needed' if key else 'not needed; only this machine can connect'}",
        f"tools    {described(served.tools) if served.chat else 'none: for chats only'}",
        f"filter   {moderation or 'none: neither questions nor answers are checked'}",
        "",
        f"  curl {url}{route} -H 'Content-Type: application/json' "
        + ("-H 'Authorization: Bearer KEY' " if key else "")
        + f"-d '{{\"model\": \"{served.name}\", {question}}}'",
    ])  # fmt: skip
