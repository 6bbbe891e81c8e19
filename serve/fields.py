"""The fields of a request by name, and checks that return a field's value or raise an APIError that names it.

null is as good as absent. Numbers must be finite, and true and false are not numbers. Where a whole number
belongs, 5.0 is 5: JavaScript does not tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from hotlap.common.errors import known
from hotlap.model.messages import shown
from hotlap.serve.config import Limits
from hotlap.serve.errors import refused

WORKING = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "stop", "max_tokens", "seed", "n", "logprobs", "stream",
    "stream_options",
)  # fmt: skip
NO_EFFECT = (  # on an answer, whatever they hold
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "verbosity", "reasoning_effort", "parallel_tool_calls",
)  # fmt: skip
REFUSED = {  # unless null
    "audio": "the model writes text only",
    "prediction": "it is not supported",
    "web_search_options": "the model cannot search",
    "moderation": "what is filtered is set when the server is started, with --moderation",
    "functions": "the model was taught no functions",
    "function_call": "the model was taught no functions",
    "suffix": "the model only continues text",
}
CHAT_FIELDS = (
    *WORKING, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "response_format",
    "modalities", *NO_EFFECT, "audio", "prediction", "web_search_options", "moderation", "functions",
    "function_call",
)  # fmt: skip
COMPLETION_FIELDS = (*WORKING, "prompt", "echo", "best_of", *NO_EFFECT, "suffix")

LARGEST = 2**63 - 1
EXACT = 2**53  # floats below it are exact where they are whole
LONGEST_NAME = 64  # characters of a field's name that an error repeats
SURROGATE = re.compile("[\ud800-\udfff]")
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def check_names(body: dict, names: Collection[str], what: str = "field") -> None:
    """Refuse a field that is not one of names, and say which one is nearest."""
    for name in body:
        if name not in names:
            name = printable_name(name)
            try:
                known(name, names, what)
            except ValueError as error:
                raise refused(str(error), name) from None


def printable_name(name: str) -> str:
    """A field's name, short enough to repeat, and without what no UTF-8 can hold."""
    return SURROGATE.sub("\ufffd", name[:LONGEST_NAME])


def required(body: dict, name: str) -> object:
    if body.get(name) is None:
        raise refused(f"`{name}` is missing", name)
    return body[name]


def number(body: dict, name: str, default: float) -> float:
    """A finite number."""
    value = body.get(name)
    return default if value is None else finite(value, name, f"`{name}`")


def finite(value: object, param: str, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise refused(f"{what} must be a finite number, not {shown(value)}", param)
    return float(value)


def whole(
    body: dict, name: str, default: int | None = None, low: int | None = 0, high: int | None = LARGEST
) -> int | None:
    """A whole number from low to high, both None: any."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is float and abs(value) <= EXACT and value.is_integer():
        value = int(value)
    if type(value) is not int or (low is not None and not low <= value <= high):
        limits = "" if low is None else f" from {low} to {'2^63 - 1' if high == LARGEST else high}"
        raise refused(f"`{name}` must be a whole number{limits}, not {shown(value)}", name)
    return value


def flag(body: dict, name: str) -> bool:
    """true or false; false if absent."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise refused(f"`{name}` must be true or false, not {shown(value)}", name)
    return bool(value)


def check_text(text: str, name: str, what: str, most: int) -> None:
    """Refuse text that is too long, and text that is not Unicode: JSON can spell half of a surrogate pair."""
    if len(text) > most:
        raise refused(f"{what} has {len(text)} characters; at most {most} are read", name)
    if half := SURROGATE.search(text):
        raise refused(
            f"{what} has {half.group()!r} at character {half.start()}, which is half of a surrogate pair",
            name,
        )


def stop_strings(body: dict, limits: Limits) -> tuple[str, ...]:
    """`stop`: a string, or a list of them."""
    value = body.get("stop")
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise refused(f"`stop` must be a string or a list of strings, not {shown(value)}", "stop")
    if len(strings) > limits.stops:
        raise refused(f"`stop` has {len(strings)} strings; at most {limits.stops}", "stop")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise refused(f"`stop` may hold strings that are not empty, not {shown(string)}", "stop")
        check_text(string, "stop", "a string of `stop`", limits.stop_characters)
    return tuple(strings)


def logit_bias(body: dict, vocab_size: int, limits: Limits) -> tuple[tuple[int, float], ...]:
    """`logit_bias`: an object from token ids, written as strings, to numbers from -100 to 100."""
    biases = body.get("logit_bias")
    if biases is None:
        return ()
    if not isinstance(biases, dict):
        raise refused(f"`logit_bias` must be an object, not {shown(biases)}", "logit_bias")
    if len(biases) > limits.biases:
        raise refused(f"`logit_bias` has {len(biases)} entries; at most {limits.biases}", "logit_bias")
    found = []
    for key, value in biases.items():
        if not TOKEN_ID.fullmatch(key) or int(key) >= vocab_size:
            raise refused(
                f"`logit_bias` has the key {shown(key)}; needs token ids from 0 to {vocab_size - 1}",
                "logit_bias",
            )
        bias = finite(value, "logit_bias", f"`logit_bias` of {key}")
        if abs(bias) > 100:
            raise refused(
                f"`logit_bias` of {key} must be a number from -100 to 100, not {bias:g}", "logit_bias"
            )
        found.append((int(key), bias))
    return tuple(found)


def include_usage(body: dict, stream: bool) -> bool:
    """`stream_options.include_usage`. Its `include_obfuscation` is accepted: nothing is obfuscated."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise refused(f"`stream_options` must be an object, not {shown(options)}", "stream_options")
    if not stream:
        raise refused("`stream_options` needs `stream` true", "stream_options")
    check_names(options, ("include_usage", "include_obfuscation"), "field of `stream_options`")
    flag(options, "include_obfuscation")
    return flag(options, "include_usage")
