"""Routes, statuses and headers of the HTTP API, over a socket."""

import json

import pytest

pytest.importorskip("fastapi")

from helpers.fake_engine import FakeEngine
from helpers.running_server import chat, running_server, served


@pytest.fixture(scope="module")
def server(tiny_tokenizer):
    with running_server(FakeEngine(tiny_tokenizer), served(tiny_tokenizer)) as running:
        yield running


def test_a_chat_request_is_answered(server):
    status, reply, headers = server.ask("/v1/chat/completions", chat())
    assert status == 200 and reply["model"] == "tiny"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "abcd"}
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4
    assert headers["x-request-id"]


def test_a_stream_has_the_same_answer(server):
    events = server.events("/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True}))
    *chunks, usage = map(json.loads, events[:-1])
    assert events[-1] == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "abcd"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
