"""Requests: every field and value of OpenAI's two endpoints that works, has no effect, or is refused."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.api_fields import BOTH, MISSING, SYSTEM, WORKS, WRONG
from helpers.api_requests import CONTEXT, read, served_model, user
from helpers.small_runs import conversation

from hotlap.model.conversation import render_prompt
from hotlap.model.tokenizer import train_characters
from hotlap.serve.config import Limits
from hotlap.serve.errors import APIError
from hotlap.serve.fields import CHAT_FIELDS, COMPLETION_FIELDS, NO_EFFECT, REFUSED, WORKING
from hotlap.serve.protocol import chat_call, completion_call


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
    None, True, 0, -1, 0.5, 5.0, 1e30, 2**70, 10**400, math.nan, -math.inf, "", "x", "\ud800", "1" * 5000,
    [], [[]], [None], [0], ["\udfff"], [{}], [[[[[[]]]]]],
    {}, {"": None}, {"\ud800": 1}, {"type": ["text"]}, {"1": {}},
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
