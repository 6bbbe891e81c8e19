"""`hotlap bench serving`: tokens/s and waiting times of a server, with one stream and with many at once.

It speaks OpenAI's API alone, so it measures any server that does, from the outside as its users see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from hotlap.bench import plots, results
from hotlap.bench.config import ServingConfig
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.kernels.dispatch import default_device

IDS = 256  # prompts are of ids below this, which every tokenizer has
SHORT = 16  # tokens of a prompt, and of an answer, where there are many
MB = 1e6


@dataclass
class Timings:
    """What one case measured, in seconds."""

    first: list[float] = field(default_factory=list)
    """From each request to its first token."""
    between: list[float] = field(default_factory=list)
    """From each token to the next."""
    tokens: int = 0
    seconds: float = 0.0

    def row(self, case: str) -> dict:
        return {
            "case": case,
            "provider": "server",
            "requests": len(self.first),
            "tokens": self.tokens,
            "ms": 1e3 * quantile(self.between, 0.5),
            "ms_99": 1e3 * quantile(self.between, 0.99),
            "first_token_ms": 1e3 * quantile(self.first, 0.5),
            "first_token_ms_99": 1e3 * quantile(self.first, 0.99),
            "tokens_per_second": self.tokens / self.seconds,
        }


def quantile(values: list[float], share: float) -> float:
    """The smallest value that a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else float("nan")


class Client:
    """Streams completions of random prompts from one server."""

    def __init__(self, url: str, prompt: int, tokens: int):
        """prompt, tokens: of each request."""
        self.address = urlsplit(url)
        self.prompt, self.tokens, self.dice = prompt, tokens, random.Random(0)
        self.model = self.ask("GET", "/v1/models")["data"][0]["id"]
        self.never = self.ends()

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        async def answer() -> bytes:
            async with self.exchange(method, path, body) as reader:
                return await reader.read()

        return json.loads(asyncio.run(answer()))

    def ends(self) -> dict[str, float]:
        """A bias against the tokens that end answers, so that all have one length. None if the server does
        not say which these are.
        """
        try:
            info = self.ask("GET", "/tokenizer_info")
            names = {info["eos_token"], info["bos_token"]} - {None}
            asked = ({"prompt": name, "add_special_tokens": False} for name in names)
            ids = [self.ask("POST", "/tokenize", body)["tokens"] for body in asked]
        except (DataError, KeyError, ValueError):
            log.info("the server does not say which tokens end an answer, so answers may be short")
            return {}
        return {str(id): -100 for (id,) in ids}

    @contextlib.asynccontextmanager
    async def exchange(self, method: str, path: str, body: dict | None = None):
        """Send a request, and give the reader of its answer's body. DataError if it is refused."""
        host, port = self.address.hostname, self.address.port or 80
        reader, writer = await asyncio.open_connection(host, port)
        try:
            content = b"" if body is None else json.dumps(body).encode()
            key = os.environ.get("HOTLAP_API_KEY")
            headers = {"Host": self.address.netloc, "Content-Type": "application/json"}
            headers |= {"Content-Length": len(content)} | ({"Authorization": f"Bearer {key}"} if key else {})
            lines = [f"{method} {path} HTTP/1.0", *(f"{n}: {v}" for n, v in headers.items()), "", ""]
            writer.write("\r\n".join(lines).encode() + content)
            status = (await reader.readline()).split()
            while (await reader.readline()).strip():
                pass
            if status[1:2] != [b"200"]:
                raise DataError(f"{self.address.geturl()}{path} answers {(await reader.read(500)).decode()}")
            yield reader
        finally:
            writer.close()

    async def complete(self, timings: Timings) -> None:
        """One request, timed."""
        body = {
            "model": self.model, "prompt": [self.dice.randrange(IDS) for _ in range(self.prompt)],
            "max_tokens": self.tokens, "temperature": 1, "seed": self.dice.randrange(1 << 30),
            "logit_bias": self.never, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        last, first = time.perf_counter(), True
        async with self.exchange("POST", "/v1/completions", body) as reader:
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if "error" in event:
                    raise DataError(f"the server failed: {event['error'].get('message')}")
                if event.get("usage"):
                    timings.tokens += event["usage"]["completion_tokens"]
                if event["choices"]:
                    (timings.first if first else timings.between).append(now - last)
                    last, first = now, False

    async def streams(self, count: int, seconds: float = float("inf"), requests: int = 1 << 62) -> Timings:
        """`count` users, each of whom asks again as soon as an answer is there, until the time is over or so
        many requests have been sent.
        """
        timings, start, sent = Timings(), time.perf_counter(), 0

        async def user() -> None:
            nonlocal sent
            while time.perf_counter() - start < seconds and sent < requests:
                sent += 1
                await self.complete(timings)

        await asyncio.gather(*(user() for _ in range(count)))
        timings.seconds = time.perf_counter() - start
        return timings


@contextlib.contextmanager
def started(config: ServingConfig) -> Iterator[tuple[str, int | None]]:
    """The address of a server, and its process id if it was started for this."""
    if config.url:
        yield config.url.rstrip("/").removesuffix("/v1"), None
        return
    model = [str(config.model)] if config.model else []
    slots = ["--slots", str(max(config.streams))]
    command = [sys.executable, "-m", "hotlap.cli", "serve", *model, *slots, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        said = itertools.takewhile(lambda line: line.strip(), server.stdout)
        found = re.search(r"address +(\S+)/v1", "".join(said))
        if not found:
            raise ValueError("the server did not start; its error is above")
        yield found[1], server.pid
    finally:
        server.terminate()
        server.communicate()


def resident(process: int) -> float:
    """Megabytes of memory that a process holds."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
    return 1024 * int(line.split()[1]) / MB


def bench_serving(config: ServingConfig) -> list[dict]:
    """Measure each number of streams, write serving.json, .csv and .png, and return the rows."""
    config.validate()
    device = default_device()
    path = results.open_file("serving", config.out, device)
    log_warnings(device)
    rows: list[dict] = []
    with started(config) as (url, process):
        client = Client(url, config.prompt, config.tokens)
        sizes = f"{client.model} {config.prompt} + {config.tokens} tokens"
        asyncio.run(client.streams(max(config.streams), requests=2 * max(config.streams)))  # warms up
        for count in config.streams:
            timings = asyncio.run(client.streams(count, config.seconds))
            rows.append(timings.row(f"{sizes} streams {count}"))
            log.info("%s", results.as_line(rows[-1]))
            results.save(path, rows, device)
        if config.requests:
            rows.append(soak(url, process, config))
            log.info("%s", results.as_line(rows[-1]))
            results.save(path, rows, device)
    plots.draw(path, plots.serving)
    log.info("written to %s", path)
    return rows


def soak(url: str, process: int | None, config: ServingConfig) -> dict:
    """A row of many short requests, with the server's memory after the first tenth and at the end."""
    tenth = max(1, config.requests // 10)
    client = Client(url, min(SHORT, config.prompt), min(SHORT, config.tokens))
    whole, memory = Timings(), []
    for part in range(10):
        timings = asyncio.run(client.streams(max(config.streams), requests=tenth))
        whole.first += timings.first
        whole.between += timings.between
        whole.tokens += timings.tokens
        whole.seconds += timings.seconds
        memory += [resident(process)] if process else []
        said = f", {memory[-1]:.0f} MB" if memory else ""
        log.info("%d of %d requests%s", (part + 1) * tenth, 10 * tenth, said)
    found = {"memory_mb_after_a_tenth": memory[0], "memory_mb": memory[-1]} if memory else {}
    case = f"{client.model} {client.prompt} + {client.tokens} tokens requests {config.requests}"
    return whole.row(case) | found


def main(config: ServingConfig) -> None:
    """`hotlap bench serving`."""
    bench_serving(config)
