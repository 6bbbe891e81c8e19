"""Requests of OpenAI's API, and the model that they are checked against."""

from __future__ import annotations

from dataclasses import replace

from helpers.tools import train_tiny_tokenizer

from hotlap.model.config import Sampling
from hotlap.model.request import Token
from hotlap.model.tokenizer import Tokenizer
from hotlap.serve.config import Limits
from hotlap.serve.protocol import Call, Served, chat_call, completion_call

CONTEXT = 64


def served_model(tokenizer: Tokenizer | None = None, **fields) -> Served:
    """A chat model with a context of 64 tokens."""
    tokenizer = tokenizer or train_tiny_tokenizer()
    chat = Served("tiny", "hotlap", tokenizer, CONTEXT, chat=True, created=0, limits=Limits())
    return replace(chat, **fields)


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def read(endpoint: str, served: Served, /, **fields) -> Call:
    """The call of a short request to an endpoint, "chat" or "completions", with these fields."""
    if endpoint == "chat":
        return chat_call({"model": "tiny", "messages": [user("Hi")]} | fields, served)
    return completion_call({"model": "tiny", "prompt": "Hi"} | fields, served)


def fixed_call(**fields) -> Call:
    """A call with the same id and time in every test."""
    chat = fields.get("chat", True)
    call = Call(
        id="chatcmpl-1" if chat else "cmpl-1",
        chat=chat,
        model="tiny",
        created=1700000000,
        prompts=[[1]],
        n=1,
        sampling=Sampling(),
        tools={},
        logprobs=None,
        echo=False,
        stream=True,
        include_usage=False,
    )
    return replace(call, **fields)


def tokens_of(ids: list[int], first: float | None = -0.5, alternatives: int = 0) -> list[Token]:
    """Tokens with log-probabilities `first`, `first` - 0.5, ...; the likeliest are each itself and those of
    the ids below it. first None: as an echoed prompt's.
    """
    found = []
    for place, i in enumerate(ids):
        logprob = None if first is None and place == 0 else (first or 0.0) - 0.5 * place
        top = () if logprob is None else tuple((i - k, logprob - 0.25 * k) for k in range(alternatives))
        found.append(Token(i, True, logprob, top))
    return found
