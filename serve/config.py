"""What configures the server, the web page and samples. Imports no torch, so that flags are read at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

import tyro

from hotlap.common.checks import at_least, between, refuse
from hotlap.model.config import Sampling
from hotlap.model.tools import DEFAULT_TOOLS, check_tools

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a model, for clients
LONGEST = 7 * 24 * 3600  # seconds
BASE_TEMPERATURE = 0.8  # at 0, base models repeat themselves


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


@dataclass(frozen=True)
class SamplingFlags:
    """The flags of the commands that generate text in the terminal."""

    model_field: ClassVar[str] = "model"
    model: Path | None = None
    """Run, checkpoint or model directory; the newest under runs/ by default."""
    temperature: float | None = None
    """0 takes the most likely token; higher is more random. By default 0.7, and 0.8 for base models."""
    top_k: int = Sampling.top_k
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = Sampling.top_p
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    min_p: float = Sampling.min_p
    """Leave out tokens with less than this share of the most likely token's probability; 0: none."""
    max_tokens: int = Sampling.max_tokens
    """Maximum length of an answer in tokens."""
    seed: int | None = None
    """Makes a session at a temperature above 0 repeatable; by default, every answer is another draw."""

    def sampling(self, base: bool) -> Sampling:
        """base: whether the model is a base model. ValueError names a field that is out of range."""
        temperature = self.temperature
        if temperature is None:
            temperature = BASE_TEMPERATURE if base else Sampling.temperature
        if self.seed is not None and not 0 <= self.seed < 1 << 62:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^62 - 1")
        at_least(self, 1, "max_tokens")
        sampling = Sampling(temperature, self.top_k, self.max_tokens, top_p=self.top_p, min_p=self.min_p)
        return sampling.validate()


@dataclass(frozen=True)
class SampleConfig(SamplingFlags):
    """Print samples of what a model writes, up to the end of a document, max-tokens or the context."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Continue this text. By default, samples are whole documents, from their beginning."""
    prompt_file: Path | None = None
    """Continue the text in this file, as it is; -: of standard input."""
    samples: int = 1
    """How many; they are generated side by side."""
    seed: int | None = None
    """Seed of the first sample; each has the next one. By default, every sample is another draw."""

    def validate(self) -> SampleConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        self.sampling(base=True)
        at_least(self, 1, "samples")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt-file exclude each other; give one of them")
        return self
