"""What configures the server. Imports no torch, so that flags are read at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from hotlap.common.checks import at_least, between, refuse
from hotlap.model.tools import DEFAULT_TOOLS, check_tools

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a model, for clients
LONGEST = 7 * 24 * 3600  # seconds


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for. More is refused before it costs anything."""

    body: int = 1 << 20
    """Bytes of a request's body."""
    characters: int = 1 << 18
    """Characters of a prompt, or of a conversation's messages together; counted before they are tokenized."""
    prompts: int = 128
    """Prompts of one request to /v1/completions."""
    choices: int = 128
    """Answers of one request: its prompts times `n`."""
    stops: int = 16
    """Stop strings."""
    stop_characters: int = 256
    """Characters of a stop string."""
    biases: int = 1024
    """Entries of `logit_bias`."""
    top_logprobs: int = 20
    """Alternatives listed with each token."""
    tools: int = 128
    """Entries of `tools`, which may be sent with `tool_choice` none."""

    def validate(self) -> Limits:
        at_least(self, 1, "body", "characters", "prompts", "choices", "stops", "stop_characters")
        at_least(self, 0, "biases", "top_logprobs", "tools")
        return self


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model behind OpenAI's HTTP API."""

    model_field: ClassVar[str] = "model"
    model: Path | None = None
    """Run, checkpoint or model directory; the newest under runs/ by default."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines can reach needs an API key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    name: str | None = None
    """Name of the model for clients. By default its path below runs/, such as tiny-sft."""
    slots: int | None = None
    """Answers that are generated at once. By default as many as fit the free memory, and at most 64."""
    int8: bool = False
    """Round the weights to 8 bits, on a CPU; it can pay for large models with few answers at once."""
    queue: int = 256
    """Answers that may wait for a slot; more are refused."""
    timeout: float = 600
    """Seconds that a request may take, with its time in the queue."""
    grace: float = 30
    """Seconds that running requests get to finish when the server is stopped."""
    tools: tuple[str, ...] = DEFAULT_TOOLS
    """What the model may call in a chat: calculator, and python, which runs its code in a sandbox here."""
    moderation: str | None = None
    """Filter for questions and answers: a file of words, or package.module:function. By default none."""
    api_key_file: Path | None = None
    """File with the key that clients must send. By default the variable HOTLAP_API_KEY, if there is one."""

    def validate(self) -> ServeConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        between(self, 0, 65535, "port")
        if self.name is not None and not re.fullmatch(NAME, self.name):
            refuse(self, "name", "1 to 64 letters, digits and . _ -, and begin with a letter or digit")
        if self.slots is not None:
            at_least(self, 1, "slots")
        at_least(self, 1, "queue")
        between(self, 1, LONGEST, "timeout")
        between(self, 0, LONGEST, "grace")
        check_tools(self.tools)
        return self


@dataclass(frozen=True)
class WebConfig:
    """Chat with a model in a web browser. The page asks a server of OpenAI's API, which it starts."""

    model_field: ClassVar[str] = "model"
    model: Path | None = None
    """Run, checkpoint or model directory; the newest under runs/ by default."""
    url: str | None = None
    """Ask this server instead, such as http://127.0.0.1:8000; its key is the variable HOTLAP_API_KEY."""
    port: int = 8501
    """Port of the page, on this machine alone; 0: any free one."""
    folder: Path | None = None
    """Where conversations are kept; by default ~/.local/state/hotlap/conversations."""
    tools: tuple[str, ...] = DEFAULT_TOOLS
    """What the model may call: calculator, and python, which runs its code in a sandbox."""
    moderation: str | None = None
    """Filter for questions and answers: a file of words, or package.module:function. By default none."""

    def validate(self) -> WebConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        between(self, 0, 65535, "port")
        check_tools(self.tools)
        if self.url is not None:
            if self.tools != DEFAULT_TOOLS:
                raise ValueError("--url names a server, which has its tools; leave out --tools, or --url")
            if self.model is not None:
                raise ValueError("--url names a server, which has its model; leave out the model, or --url")
            if self.moderation is not None:
                raise ValueError(
                    "--url names a server, which has its filter; leave out --moderation, or --url"
                )
            try:
                parts = urlsplit(self.url)
                good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                good = False
            if not good:
                refuse(self, "url", "the address of a server, such as http://127.0.0.1:8000")
        return self
