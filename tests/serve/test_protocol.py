"""Requests: every field and value of OpenAI's two endpoints that works, has no effect, or is refused."""
# ruff: noqa: E501  a row is one line

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.api_requests import CONTEXT, read, served_model, user
from helpers.small_runs import conversation

from hotlap.model.conversation import render_prompt
from hotlap.model.tokenizer import train_characters
from hotlap.model.tools import TOOLS
from hotlap.serve.config import Limits
from hotlap.serve.errors import APIError
from hotlap.serve.fields import CHAT_FIELDS, COMPLETION_FIELDS, NO_EFFECT, REFUSED, WORKING
from hotlap.serve.protocol import SEEDS, chat_call, completion_call

CHAT, COMPLETIONS, BOTH = ("chat",), ("completions",), ("chat", "completions")
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
MISSING = Ellipsis  # a field that is left out

# endpoints, fields, what the call has then (of itself or of its sampling)
WORKS = [
    (BOTH, {}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
    (BOTH, {}, {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": (), "stop": ()}),
    (BOTH, {}, {"n": 1, "logprobs": None, "echo": False, "stream": False, "include_usage": False}),
    (BOTH, {"model": "tiny"}, {"model": "tiny"}),
    (BOTH, {"model": "hotlap"}, {"model": "tiny"}),
    (BOTH, {"temperature": 0}, {"temperature": 0.0}),
    (BOTH, {"temperature": 2}, {"temperature": 2.0}),
    (BOTH, {"temperature": 10}, {"temperature": 10.0}),
    (BOTH, {"top_p": 0.5}, {"top_p": 0.5}),
    (BOTH, {"top_p": 1}, {"top_p": 1.0}),
    (BOTH, {"top_k": 5}, {"top_k": 5}),
    (BOTH, {"top_k": 5.0}, {"top_k": 5}),
    (BOTH, {"top_k": -1}, {"top_k": 0}),  # vLLM's off
    (BOTH, {"min_p": 0.1}, {"min_p": 0.1}),
    (BOTH, {"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    (BOTH, {"presence_penalty": -2}, {"presence_penalty": -2.0}),
    (BOTH, {"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
    (BOTH, {"logit_bias": {}}, {"logit_bias": ()}),
    (BOTH, {"logit_bias": {"0": -100, "7": 0.5}}, {"logit_bias": ((0, -100.0), (7, 0.5))}),
    (BOTH, {"stop": "\n"}, {"stop": ("\n",)}),
    (BOTH, {"stop": []}, {"stop": ()}),
    (BOTH, {"stop": [str(i) for i in range(16)]}, {"stop": tuple(str(i) for i in range(16))}),
    (BOTH, {"stop": "é" * 256}, {"stop": ("é" * 256,)}),
    (BOTH, {"seed": 0}, {"seed": 0}),
    (BOTH, {"seed": 1234.0}, {"seed": 1234}),
    (BOTH, {"seed": -1}, {"seed": SEEDS - 1}),
    (BOTH, {"seed": -(2**63)}, {"seed": -(2**63) % SEEDS}),
    (BOTH, {"seed": 2**63 - 1}, {"seed": (2**63 - 1) % SEEDS}),
    (BOTH, {"seed": 2**70}, {"seed": 2**70 % SEEDS}),
    (BOTH, {"n": 3}, {"n": 3}),
    (BOTH, {"n": 128}, {"n": 128}),
    (BOTH, {"stream": True}, {"stream": True, "include_usage": False}),
    (BOTH, {"stream": False}, {"stream": False}),
    (BOTH, {"stream": True, "stream_options": {}}, {"include_usage": False}),
    (BOTH, {"stream": True, "stream_options": {"include_usage": True}}, {"include_usage": True}),
    (BOTH, {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": True}}, {"include_usage": False}),
    (BOTH, {"max_tokens": 3}, {"max_tokens": 3}),
    (BOTH, {"max_tokens": 3.0}, {"max_tokens": 3}),
    (CHAT, {}, {"chat": True, "tools": TOOLS, "max_tokens": CONTEXT - 6}),
    (CHAT, {"max_tokens": CONTEXT}, {"max_tokens": CONTEXT - 6}),
    (CHAT, {"messages": [user(" ")]}, {"max_tokens": CONTEXT - 5}),
    (CHAT, {"messages": [user("Hi"), {"role": "assistant", "content": ""}, user("Hi")]}, {"max_tokens": CONTEXT - 12}),
    (CHAT, {"max_completion_tokens": 3}, {"max_tokens": 3}),
    (CHAT, {"max_completion_tokens": 2**40}, {"max_tokens": CONTEXT - 6}),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 3}, {"max_tokens": 3}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": False}, {"logprobs": None}),
    (CHAT, {"logprobs": True, "top_logprobs": 0}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    (CHAT, {"tools": []}, {"tools": TOOLS}),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}, {"tools": TOOLS}),
    (CHAT, {"tool_choice": "none"}, {"tools": TOOLS}),
    (CHAT, {"tool_choice": "auto"}, {"tools": TOOLS}),
    (CHAT, {"response_format": {"type": "text"}}, {}),
    (CHAT, {"modalities": ["text"]}, {}),
    (COMPLETIONS, {}, {"chat": False, "tools": {}, "max_tokens": 16}),
    (COMPLETIONS, {"max_tokens": 1000}, {"max_tokens": CONTEXT - 3}),
    (COMPLETIONS, {"max_tokens": 0, "echo": True}, {"max_tokens": 0, "echo": True}),
    (COMPLETIONS, {"echo": True}, {"echo": True}),
    (COMPLETIONS, {"logprobs": 0}, {"logprobs": 0}),
    (COMPLETIONS, {"logprobs": 20}, {"logprobs": 20}),
    (COMPLETIONS, {"n": 2, "best_of": 2}, {"n": 2}),
    (COMPLETIONS, {"best_of": 1}, {"n": 1}),
    # what lm-eval sends
    (COMPLETIONS, {"prompt": [[5, 6, 7]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}, {"prompts": [[5, 6, 7]], "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}),
    # forms of a prompt of ids, which are taken as they are
    (COMPLETIONS, {"prompt": [5, 6]}, {"prompts": [[5, 6]]}),
    (COMPLETIONS, {"prompt": [[5], [6, 299]]}, {"prompts": [[5], [6, 299]]}),
    (COMPLETIONS, {"prompt": [1] * (CONTEXT - 1)}, {"max_tokens": 1}),
    (COMPLETIONS, {"prompt": [1] * CONTEXT, "max_tokens": 0, "echo": True}, {"max_tokens": 0}),
    (COMPLETIONS, {"prompt": [[1] * 60, [1] * 50]}, {"max_tokens": 14}),
]  # fmt: skip

# endpoints, fields, the parameter that the error names, what it says
WRONG = [
    (BOTH, {"model": MISSING}, "model", "missing"),
    (BOTH, {"model": None}, "model", "missing"),
    # numbers
    (BOTH, {"temperature": -0.1}, "temperature", "from 0 to 10"),
    (BOTH, {"temperature": 10.1}, "temperature", "from 0 to 10"),
    (BOTH, {"temperature": math.nan}, "temperature", "finite number, not nan"),
    (BOTH, {"temperature": math.inf}, "temperature", "finite number, not inf"),
    (BOTH, {"temperature": True}, "temperature", "finite number, not True"),
    (BOTH, {"temperature": "0"}, "temperature", "finite number, not '0'"),
    (BOTH, {"temperature": 10**400}, "temperature", "finite number"),
    (BOTH, {"temperature": [1]}, "temperature", "finite number, not a list"),
    (BOTH, {"top_p": -0.1}, "top_p", "top_p=-0.1 must be"),
    (BOTH, {"top_p": 1.1}, "top_p", "top_p=1.1 must be"),
    (BOTH, {"top_p": math.nan}, "top_p", "finite"),
    (BOTH, {"top_k": -2}, "top_k", "from -1 to 2\\^63 - 1, not -2"),
    (BOTH, {"top_k": 0.5}, "top_k", "whole number"),
    (BOTH, {"top_k": True}, "top_k", "whole number"),
    (BOTH, {"top_k": 2**70}, "top_k", "whole number"),
    (BOTH, {"min_p": 1.5}, "min_p", "min_p=1.5 must be"),
    (BOTH, {"min_p": {}}, "min_p", "finite number, not an empty object"),
    (BOTH, {"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0.0 must be"),
    (BOTH, {"repetition_penalty": -math.inf}, "repetition_penalty", "finite"),
    (BOTH, {"presence_penalty": 2.5}, "presence_penalty", "presence_penalty=2.5 must be"),
    (BOTH, {"presence_penalty": "x"}, "presence_penalty", "finite"),
    (BOTH, {"frequency_penalty": -2.5}, "frequency_penalty", "frequency_penalty=-2.5 must be"),
    (BOTH, {"frequency_penalty": False}, "frequency_penalty", "finite"),
    (BOTH, {"seed": "1"}, "seed", "must be a whole number, not '1'"),
    (BOTH, {"seed": 0.5}, "seed", "whole number, not 0.5"),
    (BOTH, {"seed": 1e30}, "seed", "whole number, not 1e\\+30"),
    (BOTH, {"seed": math.nan}, "seed", "whole number, not nan"),
    (BOTH, {"seed": True}, "seed", "whole number, not True"),
    (BOTH, {"n": 0}, "n", "from 1 to 128, not 0"),
    (BOTH, {"n": 129}, "n", "from 1 to 128, not 129"),
    (BOTH, {"n": 1_000_000_000}, "n", "from 1 to 128"),
    (BOTH, {"n": 1.5}, "n", "whole number"),
    (BOTH, {"n": True}, "n", "whole number"),
    (BOTH, {"max_tokens": -1}, "max_tokens", "not -1"),
    (BOTH, {"max_tokens": 1e30}, "max_tokens", "not 1e\\+30"),
    (BOTH, {"max_tokens": 2**63}, "max_tokens", "to 2\\^63 - 1"),
    (BOTH, {"max_tokens": 2.5}, "max_tokens", "whole number"),
    (BOTH, {"max_tokens": "5"}, "max_tokens", "whole number"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "from 1"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
    (CHAT, {"max_completion_tokens": False}, "max_completion_tokens", "whole number"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ; send one"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens", "needs `echo`"),
    (COMPLETIONS, {"max_completion_tokens": 5}, "max_completion_tokens", "did you mean 'max_tokens'"),
    # logit_bias
    (BOTH, {"logit_bias": []}, "logit_bias", "must be an object, not a list"),
    (BOTH, {"logit_bias": {"300": 1}}, "logit_bias", "key '300'; needs token ids from 0 to 299"),
    (BOTH, {"logit_bias": {"-1": 1}}, "logit_bias", "key '-1'"),
    (BOTH, {"logit_bias": {"01": 1}}, "logit_bias", "key '01'"),
    (BOTH, {"logit_bias": {"\u0661": 1}}, "logit_bias", "key"),  # a digit, but not of ASCII
    (BOTH, {"logit_bias": {"the": 1}}, "logit_bias", "key 'the'"),
    (BOTH, {"logit_bias": {"9" * 5000: 1}}, "logit_bias", "key '9"),
    (BOTH, {"logit_bias": {"1": 101}}, "logit_bias", "of 1 must be a number from -100 to 100, not 101"),
    (BOTH, {"logit_bias": {"1": math.nan}}, "logit_bias", "of 1 must be a finite number"),
    (BOTH, {"logit_bias": {"1": True}}, "logit_bias", "of 1 must be a finite number"),
    (BOTH, {"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias", "5000 entries; at most 1024"),
    # stop
    (BOTH, {"stop": ""}, "stop", "not empty, not ''"),
    (BOTH, {"stop": [""]}, "stop", "not empty, not ''"),
    (BOTH, {"stop": ["a", 1]}, "stop", "not empty, not 1"),
    (BOTH, {"stop": ["a", None]}, "stop", "not empty, not null"),
    (BOTH, {"stop": 5}, "stop", "a string or a list of strings, not 5"),
    (BOTH, {"stop": {"a": 1}}, "stop", "a string or a list of strings"),
    (BOTH, {"stop": ["a"] * 100}, "stop", "100 strings; at most 16"),
    (BOTH, {"stop": "a" * 257}, "stop", "257 characters; at most 256"),
    (BOTH, {"stop": "a\ud800"}, "stop", "half of a surrogate pair"),
    # switches
    (BOTH, {"stream": 1}, "stream", "true or false, not 1"),
    (BOTH, {"stream": "true"}, "stream", "true or false, not 'true'"),
    (BOTH, {"stream_options": {}}, "stream_options", "needs `stream` true"),
    (BOTH, {"stream": True, "stream_options": []}, "stream_options", "must be an object"),
    (BOTH, {"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
    (BOTH, {"stream": True, "stream_options": {"include_usge": True}}, "include_usge", "did you mean 'include_usage'"),
    (CHAT, {"logprobs": 1}, "logprobs", "true or false, not 1"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs `logprobs` true"),
    (CHAT, {"logprobs": False, "top_logprobs": 0}, "top_logprobs", "needs `logprobs` true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (CHAT, {"logprobs": True, "top_logprobs": True}, "top_logprobs", "whole number"),
    (COMPLETIONS, {"logprobs": True}, "logprobs", "whole number from 0 to 20, not True"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs", "from 0 to 20"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs", "from 0 to 20"),
    (COMPLETIONS, {"echo": 1}, "echo", "true or false"),
    (COMPLETIONS, {"best_of": 2}, "best_of", "equal to `n`"),
    (COMPLETIONS, {"n": 2, "best_of": 1}, "best_of", "equal to `n`"),
    (COMPLETIONS, {"best_of": "2"}, "best_of", "whole number"),
    (COMPLETIONS, {"suffix": "."}, "suffix", "only continues"),
    # tools and kinds of output
    (CHAT, {"tools": [TOOL]}, "tools", "taught no tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "auto"}, "tools", "taught no tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tools", "taught no tools"),
    (CHAT, {"tools": [TOOL] * 129, "tool_choice": "none"}, "tools", "129 entries; at most 128"),
    (CHAT, {"tools": TOOL}, "tools", "must be a list"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "must be none or auto, not 'required'"),
    (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice", "must be none or auto"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "taught no functions"),
    (CHAT, {"function_call": "auto"}, "function_call", "taught no functions"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "plain text only"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "plain text only"),
    (CHAT, {"response_format": "text"}, "response_format", 'must be {"type": "text"}'),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", 'must be \\["text"\\]'),
    (CHAT, {"audio": {"voice": "x"}}, "audio", "text only"),
    (CHAT, {"prediction": {"type": "content"}}, "prediction", "not supported"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "cannot search"),
    (CHAT, {"moderation": {"model": "x"}}, "moderation", "not moderated"),
    # unknown fields
    (BOTH, {"temprature": 1}, "temprature", "unknown field: 'temprature'; did you mean 'temperature'"),
    (BOTH, {"repeat_penalty": 1}, "repeat_penalty", "did you mean 'repetition_penalty'"),
    (BOTH, {"ignore_eos": None}, "ignore_eos", "unknown field: 'ignore_eos'"),
    (BOTH, {"": 1}, "", "unknown field: ''; known: model"),
    (CHAT, {"prompt": "x"}, "prompt", "unknown field: 'prompt'"),
    (CHAT, {"echo": True}, "echo", "unknown field: 'echo'"),
    (COMPLETIONS, {"messages": []}, "messages", "unknown field: 'messages'"),
    (COMPLETIONS, {"tools": []}, "tools", "unknown field: 'tools'"),
    # messages
    (CHAT, {"messages": MISSING}, "messages", "missing"),
    (CHAT, {"messages": []}, "messages", "at least one message"),
    (CHAT, {"messages": "Hi"}, "messages", "must be a list"),
    (CHAT, {"messages": {"role": "user"}}, "messages", "must be a list"),
    (CHAT, {"messages": [None]}, "messages", "message 0: null"),
    (CHAT, {"messages": [["user", "Hi"]]}, "messages", "message 0: a list of 2"),
    (CHAT, {"messages": [{"role": "critic", "content": "x"}]}, "messages", "`role` is 'critic'"),
    (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages", "`role` is a list"),
    (CHAT, {"messages": [{"role": {}, "content": "x"}]}, "messages", "`role` is an empty object"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages", "no `role`"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages", "without `content`"),
    (CHAT, {"messages": [user(None)]}, "messages", "without `content`"),
    (CHAT, {"messages": [user(5)]}, "messages", "must be a string, not 5"),
    (CHAT, {"messages": [user(["Hi"])]}, "messages", "`content` has 'Hi' in its list"),
    (CHAT, {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages", "part of type 'image_url'"),
    (CHAT, {"messages": [user([{"type": "text", "text": 5}])]}, "messages", "part of type 'text'"),
    (CHAT, {"messages": [user("Hi") | {"name": "Ada"}]}, "messages", "unknown key 'name'"),
    (CHAT, {"messages": [user("Hi"), user("there")]}, "messages", "two messages from 'user' in a row"),
    (CHAT, {"messages": [user("Hi"), SYSTEM]}, "messages", "a system message must be the first one"),
    (CHAT, {"messages": [SYSTEM, SYSTEM | {"role": "developer"}, user("Hi")]}, "messages", "and the only one"),
    (CHAT, {"messages": [SYSTEM]}, "messages", "must end with a message from the user"),
    (CHAT, {"messages": conversation("Hi", "Hello.")}, "messages", "must end with a message from the user"),
    (CHAT, {"messages": [user("Hi"), {"role": "tool", "content": "5"}]}, "messages", "from 'tool' after 'user'"),
    (CHAT, {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [TOOL]}]}, "messages", "the only tool is 'calculator'"),
    (CHAT, {"messages": [user("a\udc00")]}, "messages", "udc00' at character 1, which is half of a surrogate pair"),
    (CHAT, {"messages": [user("x" * 300_000)]}, "messages", "have 300000 characters; at most 262144"),
    # prompts
    (COMPLETIONS, {"prompt": MISSING}, "prompt", "missing"),
    (COMPLETIONS, {"prompt": None}, "prompt", "missing"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty list"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "empty list of token ids"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt", "empty list of token ids"),
    (COMPLETIONS, {"prompt": 5}, "prompt", "must be a string, a list of strings"),
    (COMPLETIONS, {"prompt": {"text": "x"}}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [1.0, 2]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [[[1]]]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [None]}, "prompt", "must be a string"),
    (COMPLETIONS, {"prompt": [0, 300]}, "prompt", "token id 300; needs 0 to 299"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "token id -1; needs 0 to 299"),
    (COMPLETIONS, {"prompt": [2**70]}, "prompt", "token id 1180591620717411303424"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt", "129 prompts; at most 128"),
    (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, "n", "`n`=2 for 100 prompts is more than 128 choices"),
    (COMPLETIONS, {"prompt": "x" * 300_000}, "prompt", "300000 characters; at most 262144"),
    (COMPLETIONS, {"prompt": ["a", "\ud800"]}, "prompt", "half of a surrogate pair"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tiny_tokenizer):
    return served_model(tiny_tokenizer)


def rows(table: list) -> list:
    """A row for each endpoint, with a name that says endpoint and fields."""
    return [
        pytest.param(endpoint, *row, id=f"{endpoint} {re.sub('[^ -~]', '?', str(row[0]))[:60]}")
        for endpoints, *row in table
        for endpoint in endpoints
    ]


def request(endpoint: str, served, fields: dict):
    present = {name: value for name, value in fields.items() if value is not MISSING}
    if len(present) == len(fields):
        return read(endpoint, served, **fields)
    body = (
        {"model": "tiny", "messages": [user("Hi")]}
        if endpoint == "chat"
        else {"model": "tiny", "prompt": "Hi"}
    )
    body = {name: value for name, value in (body | fields).items() if value is not MISSING}
    return (chat_call if endpoint == "chat" else completion_call)(body, served)


def sent(error: APIError) -> str:
    """The body of an error as it is sent, in any JSON encoder's UTF-8."""
    return json.dumps(error.body, ensure_ascii=False, allow_nan=False).encode().decode()


@pytest.mark.parametrize("endpoint, fields, expected", rows(WORKS))
def test_a_field_that_works_reaches_the_call(served, endpoint, fields, expected):
    call = read(endpoint, served, **fields)
    found = {name: getattr(call, name, getattr(call.sampling, name, None)) for name in expected}
    assert found == expected


@pytest.mark.parametrize("endpoint, fields, param, said", rows(WRONG))
def test_what_cannot_be_done_is_refused_by_name(served, endpoint, fields, param, said):
    with pytest.raises(APIError, match=said) as caught:
        request(endpoint, served, fields)
    error = caught.value
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, None)
    assert len(sent(error)) < 1200


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_hint_changes_nothing_whatever_it_holds(served, endpoint, name):
    plain = read(endpoint, served, seed=1)
    for value in (None, True, "high", {"a": "b"}, 5, []):
        hinted = read(endpoint, served, seed=1, **{name: value})
        assert replace(hinted, id=plain.id, created=plain.created) == plain


@pytest.mark.parametrize("endpoint, names", [("chat", CHAT_FIELDS), ("completions", COMPLETION_FIELDS)])
def test_null_is_as_good_as_absent(served, endpoint, names):
    needed = {"model", "messages", "prompt", "seed"}
    plain = read(endpoint, served, seed=1)
    nulls = read(endpoint, served, seed=1, **{name: None for name in names if name not in needed})
    assert replace(nulls, id=plain.id, created=plain.created) == plain


def test_every_known_field_has_a_row():
    for endpoint, names in (("chat", CHAT_FIELDS), ("completions", COMPLETION_FIELDS)):
        tried = {name for table in (WORKS, WRONG) for row in table if endpoint in row[0] for name in row[1]}
        assert set(names) - tried - {"messages", "prompt"} == set(NO_EFFECT)


JUNK = [
    None, True, 0, -1, 0.5, 5.0, 1e30, 2**70, 10**400, math.nan, -math.inf, "", "x", "\ud800", "1" * 5000, [], [[]],
    [None], [0], ["\udfff"], [{}], {}, {"": None}, {"\ud800": 1}, {"type": ["text"]}, {"1": {}}, [[[[[[]]]]]],
]  # fmt: skip


@pytest.mark.parametrize("endpoint, names", [("chat", CHAT_FIELDS), ("completions", COMPLETION_FIELDS)])
def test_any_value_of_any_field_is_a_call_or_an_error_that_can_be_sent(served, endpoint, names):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for name in (*names, "\ud800", "x" * 100_000):
        for value in (*JUNK, deep):
            try:
                read(endpoint, served, **{"stream": True, name: value})
            except APIError as error:
                assert error.status in (400, 404) and len(sent(error)) < 1200


def test_any_value_in_a_message_is_a_call_or_an_error_that_can_be_sent(served):
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2"}}}
    for value in JUNK:
        changed = [{name: value} for name in ("role", "content", "name", "tool_calls", "\ud800")]
        changed += [{"content": [value]}, {"content": [{"type": value, "text": value}]}]
        changed += [{"content": [{"type": "text", "text": value}]}, {"tool_calls": [value]}]
        changed += [{"tool_calls": [call | {"function": call["function"] | {"arguments": value}}]}]
        for messages in (
            [value],
            *([user("Hi"), {"role": r, "content": "x"} | c] for r in ("user", "assistant") for c in changed),
        ):
            try:
                read("chat", served, messages=messages)
            except APIError as error:
                assert error.param == "messages" and len(sent(error)) < 1200


@pytest.mark.parametrize("body", [None, [], "x", 5, True, [{}]])
def test_a_body_that_is_no_object_is_refused(served, body):
    for endpoint in (chat_call, completion_call):
        with pytest.raises(APIError, match="the body must be a JSON object"):
            endpoint(body, served)


@pytest.mark.parametrize("name", ["gpt-4", "runs/tiny/sft", "../tiny", 5, ["tiny"], {"id": "tiny"}])
def test_another_model_is_not_found(served, name):
    for endpoint in BOTH:
        with pytest.raises(APIError, match="there is 'tiny', or 'hotlap'") as caught:
            read(endpoint, served, model=name)
        assert (caught.value.status, caught.value.type) == (404, "not_found_error")
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_a_base_model_only_continues_text(tiny_tokenizer):
    base = served_model(tiny_tokenizer, chat=False)
    with pytest.raises(APIError, match=r"base model.*use /v1/completions") as caught:
        read("chat", base)
    assert caught.value.status == 400
    assert read("completions", base).prompts


def test_ids_of_calls_differ_and_say_their_kind(served):
    for endpoint, start in (("chat", "chatcmpl-"), ("completions", "cmpl-")):
        calls = [read(endpoint, served) for _ in range(20)]
        assert len({call.id for call in calls}) == 20 and all(call.id.startswith(start) for call in calls)
        assert all(type(call.created) is int and call.created > 1_700_000_000 for call in calls)
        assert len({call.sampling.seed for call in calls}) == 20  # without a seed, each has another


# Prompts


def test_text_of_completions_begins_after_bos_and_ids_do_not(served):
    tokenizer = served.tokenizer
    ids = tokenizer.encode("The dog <|bos|>")
    assert max(ids) < tokenizer.text_size
    assert read("completions", served, prompt="The dog <|bos|>").prompts == [[tokenizer.bos, *ids]]
    assert read("completions", served, prompt=ids).prompts == [ids]
    assert read("completions", served, prompt="").prompts == [[tokenizer.bos]]
    assert read("completions", served, prompt=["a", ""]).prompts == [
        [tokenizer.bos, *tokenizer.encode("a")],
        [tokenizer.bos],
    ]


def test_messages_are_rendered_as_in_training(served):
    messages = [SYSTEM, *conversation("Hi", "Hello."), user("Bye")]
    expected = [render_prompt(messages, served.tokenizer)]
    assert read("chat", served, messages=messages).prompts == expected
    assert read("chat", served, messages=[SYSTEM | {"role": "developer"}, *messages[1:]]).prompts == expected
    parts = [{**m, "content": [{"type": "text", "text": c} for c in m["content"]]} for m in messages]
    assert read("chat", served, messages=parts).prompts == expected


def test_a_message_cannot_spell_a_special_token(served):
    tokenizer = served.tokenizer
    (prompt,) = read("chat", served, messages=[user("<|assistant_end|>")]).prompts
    special = [
        tokenizer.special[f"<|{name}|>"] for name in ("bos", "user_start", "user_end", "assistant_start")
    ]
    assert [i for i in prompt if i >= tokenizer.text_size] == special
    assert tokenizer.decode(prompt) == "<|assistant_end|>"


def test_a_conversation_may_hold_calls_of_the_calculator(served):
    function = {"name": "calculator", "arguments": '{"expression": "2+3"}'}
    messages = [
        user("2+3?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "assistant", "content": "5", "refusal": None},
        user("Ok"),
    ]
    assert served.tokenizer.decode(read("chat", served, messages=messages).prompts[0]) == "2+3?2+355Ok"


@pytest.mark.parametrize("endpoint, name", [("chat", "messages"), ("completions", "prompt")])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(served, endpoint, name):
    def of(tokens: int) -> dict:
        """A prompt of so many tokens: <|bos|>, the three around a message, and one for each x."""
        return {name: [user("x" * (tokens - 4))] if endpoint == "chat" else "x" * (tokens - 1)}

    fits = read(endpoint, served, **of(CONTEXT - 1))
    assert len(fits.prompts[0]) == CONTEXT - 1 and fits.sampling.max_tokens == 1
    for tokens in (CONTEXT, 1000):
        with pytest.raises(
            APIError, match=f"maximum context length is 64 tokens; the prompt has {tokens}"
        ) as caught:
            read(endpoint, served, **of(tokens))
        assert caught.value.code == "context_length_exceeded" and caught.value.param == name
        assert caught.value.status == 400 and caught.value.type == "invalid_request_error"


def test_one_prompt_of_a_batch_that_does_not_fit_is_refused(served):
    with pytest.raises(APIError) as caught:
        read("completions", served, prompt=[[1], [1] * 65], max_tokens=0, echo=True)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "endpoint, fields", [("chat", {"messages": [user("aé")]}), ("completions", {"prompt": "aé"})]
)
def test_a_character_that_the_tokenizer_lacks_is_refused(endpoint, fields):
    served = served_model(train_characters("Hia"))
    with pytest.raises(APIError, match="character 'é' is not among") as caught:
        read(endpoint, served, **fields)
    assert caught.value.status == 400 and caught.value.param == next(iter(fields))
    assert read(endpoint, served).prompts


@pytest.mark.parametrize("endpoint, name", [("chat", "messages"), ("completions", "prompt")])
def test_characters_are_counted_before_they_are_tokenized(served, monkeypatch, endpoint, name):
    monkeypatch.setattr(type(served.tokenizer), "encode", lambda *_: pytest.fail("tokenized"))
    small = replace(served, limits=replace(served.limits, characters=10))
    messages = [SYSTEM, user("x")]  # 10 characters together
    for text in ("x" * 11, "x\ud800"):
        with pytest.raises(APIError):
            read(endpoint, small, **{name: [user(text)] if endpoint == "chat" else text})
    with pytest.raises(APIError, match="have 11 characters; at most 10"):
        read("chat", small, messages=[messages[0], user("xx")])


def test_limits_are_positive():
    assert Limits().validate() == Limits()
    for name in ("body", "characters", "prompts", "choices"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            replace(Limits(), **{name: 0}).validate()


def test_errors_of_the_conversation_are_not_swallowed(served, monkeypatch):
    """Only what a request can cause becomes its error."""
    monkeypatch.setattr("hotlap.serve.protocol.render_prompt", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        read("chat", served)


def test_the_documentation_has_every_field_and_what_becomes_of_it():
    text = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    listed = {"chat": {}, "completions": {}}
    for line in text.split("## Responses")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        for name in re.findall("`([a-z_]+)`", cells[1]) if len(cells) == 6 else ():
            listed["chat"][name], listed["completions"][name] = cells[2:4]
    for name in ("characters", "prompts", "choices", "stops", "stop_characters", "biases", "top_logprobs"):
        assert f"{getattr(Limits(), name):,}" in text
    for endpoint, names in (("chat", CHAT_FIELDS), ("completions", COMPLETION_FIELDS)):
        there = {name: what for name, what in listed[endpoint].items() if what}
        assert set(there) == set(names)
        assert {name for name, what in there.items() if what == "no effect"} >= set(NO_EFFECT)
        assert {name for name, what in there.items() if what == "refused"} >= set(REFUSED) & set(names)
        assert {name for name, what in there.items() if what == "works"} >= set(WORKING)
