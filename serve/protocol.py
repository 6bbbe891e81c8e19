"""What requests to /v1/chat/completions and /v1/completions ask for: from JSON to a `Call`.

The fields are OpenAI's, with top_k, min_p and repetition_penalty as vLLM names them. What changes an answer
is done or refused by name; what does not is accepted. docs/api.md lists the fields.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hotlap.common.errors import DataError
from hotlap.model.config import Sampling
from hotlap.model.conversation import render_prompt
from hotlap.model.messages import call_text, check_messages, shown
from hotlap.model.tools import TOOLS, Tools
from hotlap.serve.config import Limits
from hotlap.serve.errors import APIError, refused
from hotlap.serve.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    REFUSED,
    check_names,
    check_text,
    flag,
    include_usage,
    logit_bias,
    number,
    required,
    stop_strings,
    whole,
)

if TYPE_CHECKING:
    from hotlap.model.tokenizer import Tokenizer

PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of such lists"
SEEDS = 2**63 - 2**16  # leaves room for the seeds of the other choices


@dataclass(frozen=True)
class Served:
    """The model that requests are checked against."""

    name: str
    alias: str
    """A second name under which it is found."""
    tokenizer: Tokenizer
    context: int
    """Tokens of a prompt and its answer together."""
    chat: bool
    """Whether it was trained on conversations; a base model only continues text."""
    created: int
    """Unix time in seconds."""
    limits: Limits
    tools: Tools = field(default_factory=lambda: TOOLS)
    """What the model may call in a chat, here on the server."""


@dataclass(frozen=True)
class Call:
    """A request that can be run. Choice i answers prompts[i // n], with the seed `sampling.seed` + i."""

    id: str
    chat: bool
    model: str
    created: int
    """Unix time in seconds."""
    prompts: list[list[int]]
    n: int
    sampling: Sampling
    """max_tokens is at most what the context has left after the shortest prompt."""
    tools: Tools
    logprobs: int | None
    """How many alternatives each token lists; None: no logprobs at all."""
    echo: bool
    stream: bool
    include_usage: bool


def chat_call(body: object, served: Served) -> Call:
    """Check a request to /v1/chat/completions. APIError says which field is wrong, and what it needs."""
    check_body(body, CHAT_FIELDS, served)
    if not served.chat:
        raise refused(f"{served.name!r} is a base model, not trained to chat; use /v1/completions", "model")
    check_tools(body, served.limits)
    check_kind(body, "response_format", {"type": "text"})
    check_kind(body, "modalities", ["text"])
    alternatives = whole(body, "top_logprobs", high=served.limits.top_logprobs)
    if not flag(body, "logprobs"):
        if alternatives is not None:
            raise refused("`top_logprobs` needs `logprobs` true", "top_logprobs")
        logprobs = None
    else:
        logprobs = alternatives or 0
    asked = whole(body, "max_tokens", low=1)
    longest = whole(body, "max_completion_tokens", asked, low=1)
    if asked is not None and asked != longest:
        raise refused("`max_tokens` and `max_completion_tokens` differ; send one of them", "max_tokens")
    call = call_without_prompts(body, served, longest or served.context, logprobs, chat=True)
    return with_prompts(call, [conversation_ids(body, served)], "messages", served)


def completion_call(body: object, served: Served) -> Call:
    """Check a request to /v1/completions. APIError says which field is wrong, and what it needs.

    Text begins after the token <|bos|>, as documents do in training. Token ids are taken as they are.
    """
    check_body(body, COMPLETION_FIELDS, served)
    logprobs = whole(body, "logprobs", high=served.limits.top_logprobs)
    echo, longest = flag(body, "echo"), whole(body, "max_tokens", 16)
    if not longest and not echo:
        raise refused("`max_tokens` 0 needs `echo` true: there is nothing else to return", "max_tokens")
    call = call_without_prompts(body, served, longest, logprobs, echo=echo)
    return with_prompts(call, prompt_ids(required(body, "prompt"), served), "prompt", served)


def check_body(body: object, names: tuple[str, ...], served: Served) -> None:
    """Refuse fields that are not known or not supported, and other models."""
    if not isinstance(body, dict):
        raise refused(f"the body must be a JSON object, not {shown(body)}")
    check_names(body, names)
    for name in names:
        if name in REFUSED and body.get(name) is not None:
            raise refused(f"`{name}` is refused: {REFUSED[name]}", name)
    model = required(body, "model")
    if model not in (served.name, served.alias):
        here = f"{served.name!r}, or {served.alias!r}" if served.alias != served.name else f"{served.name!r}"
        raise APIError(404, f"no model {shown(model)} here; there is {here}", "model", "model_not_found")


def check_tools(body: dict, limits: Limits) -> None:
    """The model was taught no tools of clients: it may be told of some only if it shall not call them."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools is not None and not isinstance(tools, list):
        raise refused(f"`tools` must be a list, not {shown(tools)}", "tools")
    if tools and len(tools) > limits.tools:
        raise refused(f"`tools` has {len(tools)} entries; at most {limits.tools}", "tools")
    if tools and choice != "none":
        raise refused("the model was taught no tools; leave out `tools`, or send `tool_choice` none", "tools")
    if choice not in (None, "none", "auto"):
        raise refused(
            f"`tool_choice` must be none or auto, not {shown(choice)}: the model was taught no tools",
            "tool_choice",
        )


def check_kind(body: dict, name: str, only: object) -> None:
    """Refuse a field that has another value than the only one that the model can do."""
    if body.get(name) not in (None, only):
        raise refused(f"`{name}` must be {json.dumps(only)}: the model writes plain text only", name)


def conversation_ids(body: dict, served: Served) -> list[int]:
    """Ids of `messages`, up to the start of the assistant's turn."""
    messages = required(body, "messages")
    if isinstance(messages, list):  # OpenAI's newer name of the system
        messages = [
            {**m, "role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m
            for m in messages
        ]
    try:
        messages, most = check_messages(messages, silence=True), served.limits.characters
        texts = [m["content"] + (call_text(m) if m.get("tool_calls") else "") for m in messages]
        if (length := sum(map(len, texts))) > most:
            raise refused(f"`messages` have {length} characters; at most {most} are read", "messages")
        for i, text in enumerate(texts):
            check_text(text, "messages", f"message {i}", most)
        return render_prompt(messages, served.tokenizer)
    except DataError as error:
        raise refused(str(error), "messages") from None


def prompt_ids(prompt: object, served: Served) -> list[list[int]]:
    """Ids of each prompt in `prompt`, in any of OpenAI's four forms."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list):
        raise refused(f"`prompt` must be {PROMPT_FORMS}, not {shown(prompt)}", "prompt")
    if prompts and all(type(entry) is int for entry in prompts):
        prompts = [prompts]
    if not prompts:
        raise refused(f"`prompt` is an empty list; needs {PROMPT_FORMS}", "prompt")
    if len(prompts) > served.limits.prompts:
        raise refused(f"{len(prompts)} prompts; at most {served.limits.prompts} at once", "prompt")
    if all(isinstance(text, str) for text in prompts):
        return [text_ids(text, served) for text in prompts]
    vocabulary = range(served.tokenizer.vocab_size)
    for ids in prompts:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise refused(f"`prompt` must be {PROMPT_FORMS}", "prompt")
        if not ids:
            raise refused("`prompt` has an empty list of token ids; needs at least one", "prompt")
        if wrong := [i for i in ids if i not in vocabulary]:
            raise refused(
                f"`prompt` has the token id {shown(wrong[0])}; needs 0 to {vocabulary[-1]}", "prompt"
            )
    return prompts


def text_ids(text: str, served: Served) -> list[int]:
    check_text(text, "prompt", "a prompt", served.limits.characters)
    try:
        return [served.tokenizer.bos, *served.tokenizer.encode(text)]
    except DataError as error:  # a tokenizer of characters lacks one
        raise refused(str(error), "prompt") from None


def texts_of(prompt: list[int], tokenizer: Tokenizer) -> list[str]:
    """The texts between the special tokens of a prompt, as the model reads them: messages, calls, results."""
    parts = itertools.groupby(prompt, lambda token: token < tokenizer.text_size)
    return [tokenizer.decode(part) for is_text, part in parts if is_text]


def call_without_prompts(
    body: dict, served: Served, longest: int, logprobs: int | None, echo: bool = False, chat: bool = False
) -> Call:
    """A call with what both endpoints share. Prompts are read last, because that alone takes time."""
    n = whole(body, "n", 1, low=1, high=served.limits.choices)
    if whole(body, "best_of", n, low=1) != n:
        raise refused("`best_of` must be equal to `n`: all answers are returned", "best_of")
    stream = flag(body, "stream")
    return Call(
        id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        chat=chat,
        model=served.name,
        created=int(time.time()),
        prompts=[],
        n=n,
        sampling=sampling(body, served, longest),
        tools=served.tools if chat else {},
        logprobs=logprobs,
        echo=echo,
        stream=stream,
        include_usage=include_usage(body, stream),
    )


def with_prompts(call: Call, prompts: list[list[int]], name: str, served: Served) -> Call:
    """The call with prompts that fit; from an answer that does not, the end is cut off. name: their field."""
    if call.n * len(prompts) > served.limits.choices:
        most = served.limits.choices
        raise refused(f"`n`={call.n} for {len(prompts)} prompts is more than {most} choices", "n")
    answer = min(call.sampling.max_tokens, 1)  # tokens that must have room
    if (longest := max(map(len, prompts))) + answer > served.context:
        raise refused(
            f"this model's maximum context length is {served.context} tokens; the prompt has {longest}"
            + (", and an answer needs one" if answer else "")
            + "; shorten it",
            name,
            "context_length_exceeded",
        )
    room = served.context - min(map(len, prompts))
    sampling = replace(call.sampling, max_tokens=min(call.sampling.max_tokens, room))
    return replace(call, prompts=prompts, sampling=sampling)


def sampling(body: dict, served: Served, max_tokens: int) -> Sampling:
    """How to sample: OpenAI's defaults, not the terminal chat's. Without a seed, each call has another."""
    top_k = whole(body, "top_k", 0, low=-1)
    seed = whole(body, "seed", secrets.randbelow(SEEDS), low=None, high=None)
    try:
        return Sampling(
            temperature=number(body, "temperature", 1.0),
            top_k=max(top_k, 0),  # -1 is vLLM's off
            top_p=number(body, "top_p", 1.0),
            min_p=number(body, "min_p", 0.0),
            repetition_penalty=number(body, "repetition_penalty", 1.0),
            presence_penalty=number(body, "presence_penalty", 0.0),
            frequency_penalty=number(body, "frequency_penalty", 0.0),
            logit_bias=logit_bias(body, served.tokenizer.vocab_size, served.limits),
            stop=stop_strings(body, served.limits),
            max_tokens=max_tokens,
            seed=seed % SEEDS,
        ).validate()
    except ValueError as error:  # `FIELD=VALUE must be ...`
        raise refused(str(error), str(error).partition("=")[0]) from None
