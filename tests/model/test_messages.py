"""Messages as people write them: what is accepted, and what an error says."""

import pytest
from helpers.small_runs import conversation

from hotlap.common.errors import DataError
from hotlap.model.messages import check_messages

USER, ASSISTANT = conversation("Hi", "Hello.")
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "5"}


def user(content) -> dict:
    return {"role": "user", "content": content}


def call(**changes) -> dict:
    function = {"name": "calculator", "arguments": {"expression": "2+3"}} | changes
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


TWO_CALLS = call() | {"tool_calls": call()["tool_calls"] * 2}


@pytest.mark.parametrize(
    "messages, number, why",
    [
        # the order
        ([ASSISTANT], 0, "from 'assistant' at the start; expected system or user"),
        ([USER, USER], 1, "two messages from 'user' in a row; expected assistant"),
        ([USER, ASSISTANT, ASSISTANT], 2, "two messages from 'assistant' in a row; expected user"),
        ([USER, ASSISTANT, SYSTEM], 2, "a system message must be the first one"),
        ([SYSTEM, SYSTEM], 1, "a system message must be the first one, and the only one"),
        ([USER, TOOL], 1, "from 'tool' after 'user'; expected assistant"),
        ([USER, call(), ASSISTANT], 2, "from 'assistant' after a call; expected tool"),
        ([USER, call(), TOOL, USER], 3, "from 'user' after 'tool'; expected assistant"),
        # keys and roles
        (["Hi"], 0, "'Hi'; needs .*role.*content"),
        ([None], 0, "null; needs"),
        ([{"content": "x"}], 0, "no `role`, but an object with the keys 'content'; needs"),
        ([{"rol": "user", "content": "x"}], 0, "no `role`, .*'rol', 'content'"),
        ([{"from": "human", "value": "x"}], 0, "ShareGPT's keys; rename `from` to `role`"),
        ([{"role": "human", "content": "x"}], 0, "`role` is 'human'; rename it to 'user'"),
        ([{"role": "gpt", "content": "x"}], 0, "`role` is 'gpt'; rename it to 'assistant'"),
        ([{"role": "User", "content": "x"}], 0, "`role` is 'User'; rename it to 'user'"),
        ([{"role": "critic", "content": "x"}], 0, "`role` is 'critic'; needs system, user"),
        ([{"role": ["user"], "content": "x"}], 0, "`role` is a list of 1; needs system, user"),
        ([{"role": "user", "text": "x"}], 0, "unknown key 'text'; .*`content`"),
        ([USER, ASSISTANT | {"weight": 0}], 1, "unknown key 'weight'; .*`tool_calls`"),
        ([USER | {"name": "Ada"}], 0, "unknown key 'name'"),
        # content
        ([{"role": "user"}], 0, "from 'user' without `content`"),
        ([user(None)], 0, "from 'user' without `content`"),
        ([USER, {"role": "assistant"}], 1, "from 'assistant' without `content`"),
        ([user(" \n")], 0, "the user says nothing"),
        ([USER, ASSISTANT | {"content": ""}], 1, "the assistant says nothing"),
        ([SYSTEM | {"content": ""}], 0, "the system says nothing"),
        ([user([])], 0, "the user says nothing"),
        ([user(0)], 0, "`content` must be a string, not 0"),
        ([user({"text": "x"})], 0, "`content` must be a string, not an object with the keys 'text'"),
        ([user(["text"])], 0, "`content` has 'text' in its list; needs"),
        ([user([{"type": "image_url", "image_url": {}}])], 0, "a part of type 'image_url'; needs"),
        ([user([{"type": "text", "text": None}])], 0, "a part of type 'text'; needs"),
        # calls
        ([USER | {"tool_calls": call()["tool_calls"]}], 0, "only the assistant can make"),
        ([USER, call() | {"tool_calls": "2+3"}], 1, "a list of one call, not '2[+]3'"),
        ([USER, call() | {"tool_calls": [{}]}], 1, "a call needs .*, not an empty object"),
        ([USER, call() | {"tool_calls": [{"name": "calculator"}]}], 1, "a call needs .*the keys 'name'"),
        ([USER, TWO_CALLS], 1, "2 `tool_calls`; one message makes one call"),
        ([USER, call(name="shell")], 1, "calls 'shell'; the tools are 'calculator' and 'python'"),
        ([USER, call(name=["python"])], 1, "calls a list of 1; the tools are"),
        ([USER, call(name="python")], 1, "must be `code` alone, not an object with the keys 'expression'"),
        ([USER, call(name="python", arguments={"code": ["1"]})], 1, "`code` must be a string, not a list"),
        ([USER, call(arguments={"code": "1"})], 1, "must be `expression` alone, not .* 'code'"),
        (
            [USER, call(arguments={"expression": "python: 1"})],
            1,
            "which would be a call of another",
        ),
        ([USER, call(arguments="{")], 1, "not JSON: '{'"),
        ([USER, call(arguments="[1]")], 1, "must be `expression` alone, not a list of 1"),
        ([USER, call(arguments=None)], 1, "must be `expression` alone, not null"),
        ([USER, call(arguments={"expression": 5})], 1, "must be a string, not 5"),
        ([USER, call(arguments={"expression": "5", "digits": 3})], 1, "'expression', 'digits'"),
        ([USER, {"role": "assistant", "function_call": {}}], 1, "unknown key 'function_call'"),
    ],
)
def test_a_malformed_message_is_named_with_what_was_found_and_what_is_needed(messages, number, why):
    with pytest.raises(DataError, match=rf"^message {number}: .*{why}"):
        check_messages(messages)


@pytest.mark.parametrize("messages", [[], None, {}, "Hi", ()])
def test_messages_are_a_list(messages):
    with pytest.raises(DataError, match="list of at least one"):
        check_messages(messages)


def test_what_openai_and_parquet_write_becomes_the_plain_form():
    parts = user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])
    assert check_messages([parts | {"name": None, "tool_calls": None}]) == [USER]
    written = call(arguments='{"expression": "2+3"}') | {"content": None}
    written["tool_calls"][0]["id"] = "call_1"
    result = TOOL | {"tool_call_id": "call_1", "name": "calculator"}
    messages = check_messages([USER, written, result, ASSISTANT | {"tool_calls": []}])
    assert messages == [USER, call(), TOOL, ASSISTANT] == check_messages(messages)


def test_a_tool_may_return_nothing():
    messages = [USER, call(), TOOL | {"content": ""}, ASSISTANT]
    assert check_messages(messages) == messages
