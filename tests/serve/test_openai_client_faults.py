"""What the `openai` client does when it is refused, cut off, or gives up itself."""

import itertools

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from helpers.fake_engine import FakeEngine
from helpers.openai_client import QUESTION, client_of, joined
from helpers.running_server import running_server, served, wait_until

KEY = "0123456789abcdef"


def test_the_key_is_the_clients(tiny_tokenizer):
    with running_server(FakeEngine(tiny_tokenizer), served(tiny_tokenizer), key=KEY) as running:
        with client_of(running, key=KEY) as right:
            assert next(iter(right.models.list())).id == "tiny"
        with client_of(running, key="another key, wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_a_full_queue_is_an_error_after_the_clients_own_retries(tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer, slots=1)
    engine.gate.clear()
    fields = {"model": "tiny", "messages": QUESTION, "max_tokens": 2}
    with running_server(engine, served(tiny_tokenizer), queue=1) as running:
        made = client_of(running, max_retries=0)
        waiting = [made.chat.completions.create(stream=True, **fields) for _ in range(2)]
        with pytest.raises(openai.APIStatusError) as refused:
            made.chat.completions.create(**fields)
        assert refused.value.status_code == 503 and float(refused.value.response.headers["retry-after"]) > 0
        statuses = []
        hooks = {"response": [lambda response: statuses.append(response.status_code)]}
        made = client_of(running, max_retries=1, http_client=openai.DefaultHttpxClient(event_hooks=hooks))

        def room_instead_of_seconds(**fields):
            engine.gate.set()
            wait_until(running.quiet)

        made._sleep_for_retry = room_instead_of_seconds
        assert made.chat.completions.create(**fields).choices[0].message.content == "ab"
        assert statuses == [503, 200] and [joined(stream) for stream in waiting] == ["ab", "ab"]


def test_comments_in_a_silent_stream_are_skipped(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hotlap.serve.api.QUIET", 0.02)
    engine = FakeEngine(tiny_tokenizer, pace=0.1)
    with running_server(engine, served(tiny_tokenizer)) as running, client_of(running) as client:
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=3, stream=True)
        assert joined(stream) == "abc"


def test_an_error_in_the_middle_of_a_stream_raises(tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer, pace=0.01)
    with running_server(engine, served(tiny_tokenizer)) as running, client_of(running) as client:
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=40, stream=True)
        said = [next(stream), next(stream)]
        engine.fault = RuntimeError("the device is gone")
        with pytest.raises(openai.APIError, match="engine failed"):
            said += stream
        assert all(chunk.choices[0].finish_reason is None for chunk in said)


def test_closing_a_stream_frees_the_slot(tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer, slots=1, pace=0.002)
    with (
        running_server(engine, served(tiny_tokenizer, context=10**6)) as running,
        client_of(running) as client,
    ):
        with client.chat.completions.create(model="tiny", messages=QUESTION, stream=True) as stream:
            assert len(list(itertools.islice(stream, 3))) == 3
        wait_until(running.quiet)


def test_a_client_that_gives_up_frees_the_slot(tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer, slots=1, pace=0.002)
    with running_server(engine, served(tiny_tokenizer, context=10**6)) as running:
        client = client_of(running, max_retries=0).with_options(timeout=0.2)
        with client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", messages=QUESTION)
        wait_until(running.quiet)
