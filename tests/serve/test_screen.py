"""The filter in the HTTP API: requests and answers that it blocks, over a socket."""

import json
import logging

import pytest

pytest.importorskip("fastapi")

from helpers.fake_engine import FakeEngine
from helpers.running_server import chat, running_server, served, wait_until
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.serve.blocklist import Blocklist
from hotlap.serve.moderation import GuardedHook

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAYS = "It is a fine day and the bad dog is here. "
BEFORE = "It is a fine day and the "


@pytest.fixture(scope="module")
def blocklist(tmp_path_factory):
    path = tmp_path_factory.mktemp("filter") / "mine.txt"
    path.write_text("never\nbad dog\n")
    return Blocklist(path)


@pytest.fixture
def engine(tiny_tokenizer):
    return FakeEngine(tiny_tokenizer, slots=2, says=(SAYS,))


@pytest.fixture
def server(tiny_tokenizer, engine, blocklist):
    model = served(tiny_tokenizer, context=4096)
    with running_server(engine, model, moderate=blocklist) as running:
        yield running
        wait_until(running.quiet)


def text_prompt(prompt="Hello", **fields) -> dict:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 200, **fields}


def choices_of(events: list[str], index: int = 0) -> list[dict]:
    """A choice of each chunk of a stream."""
    chunks = [json.loads(event) for event in events if event not in ("[DONE]", ": still working")]
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def streamed(events: list[str], index: int = 0) -> tuple[str, list[str | None]]:
    """The text of a choice, and its reasons."""
    found = choices_of(events, index)
    text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in found)
    return text, [c["finish_reason"] for c in found]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("such a Bad  dog!")),
        (
            CHAT,
            chat(stream=True, messages=[{"role": "user", "content": [{"type": "text", "text": "never"}]}]),
        ),
        (CHAT, chat(messages=[{"role": "system", "content": "never"}, {"role": "user", "content": "Hi"}])),
        (
            CHAT,
            chat(
                messages=[
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "never"},
                    {"role": "user", "content": "Hi"},
                ]
            ),
        ),
        (COMPLETIONS, text_prompt("never")),
        (COMPLETIONS, text_prompt(["Hi", "I never do"], echo=True, stream=True)),
    ],
)
def test_a_blocked_request_is_refused_before_anything_runs(server, engine, path, body, caplog):
    caplog.set_level(logging.INFO, "hotlap")
    status, reply, _ = server.ask(path, body)
    error = reply["error"]
    assert status == 400 and error["code"] == "content_filter" and error["type"] == "invalid_request_error"
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert "never" not in error["message"] and "mine.txt" not in error["message"]
    assert not engine.started and 'hotlap_blocked_total{direction="input"} 1.0' in server.ask("/metrics")[1]
    wait_until(lambda: any("mine.txt:" in line for line in caplog.messages))
    assert "never" not in caplog.text


def test_a_blocked_prompt_of_ids_is_refused(server, tiny_tokenizer):
    ids = [tiny_tokenizer.bos, *tiny_tokenizer.encode("never")]
    for prompt in (ids, [ids[:1], ids]):
        assert server.ask(COMPLETIONS, text_prompt(prompt))[1]["error"]["code"] == "content_filter"


def test_messages_are_checked_one_by_one(server):
    """So that the end of one and the beginning of the next are no phrase."""
    messages = [{"role": "system", "content": "bad"}, {"role": "user", "content": "dog"}]
    assert server.ask(CHAT, chat(messages=messages))[0] == 200


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["dogs", "x"]}])
def test_a_blocked_answer_ends_before_the_phrase_and_frees_its_slot(server, engine, fields):
    status, reply, _ = server.ask(CHAT, chat(max_tokens=3000, **fields))
    (choice,) = reply["choices"]
    assert status == 200 and choice["finish_reason"] == "content_filter"
    assert BEFORE.startswith(choice["message"]["content"]) and choice["message"]["content"]
    wait_until(lambda: engine.started[0].finish_reason == "cancelled")
    assert len(BEFORE) < reply["usage"]["completion_tokens"] < 3000
    text, reasons = streamed(server.events(CHAT, chat(max_tokens=3000, stream=True, **fields)))
    assert BEFORE.startswith(text) and text
    assert reasons[-1] == "content_filter" and set(reasons[:-1]) == {None}
    assert 'hotlap_blocked_total{direction="output"} 2.0' in server.ask("/metrics")[1]


def test_a_blocked_stream_ends_in_order(server):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = server.events(COMPLETIONS, text_prompt(**options))
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] > len(BEFORE)
    text, reasons = streamed(events)
    assert BEFORE.startswith(text) and reasons[-1] == "content_filter"


def test_an_allowed_answer_is_whole(server):
    length = len(BEFORE)
    for options in ({}, {"logprobs": 0}):
        reply = server.ask(COMPLETIONS, text_prompt(max_tokens=length, **options))[1]
        (choice,) = reply["choices"]
        assert (choice["text"], choice["finish_reason"]) == (BEFORE, "length")
        text, reasons = streamed(
            server.events(COMPLETIONS, text_prompt(max_tokens=length, stream=True, **options))
        )
        assert text == BEFORE and reasons[-1] == "length"
    assert len(choice["logprobs"]["tokens"]) == length


def test_a_phrase_at_the_very_end_of_an_answer_is_blocked(server):
    length = len(BEFORE) + len("bad dog")
    reply = server.ask(COMPLETIONS, text_prompt(max_tokens=length))[1]
    assert reply["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "logprobs"), [(CHAT, True), (COMPLETIONS, 0)])
def test_log_probabilities_are_those_of_the_text_that_left(server, path, logprobs, stream):
    body = chat(max_tokens=200) if path == CHAT else text_prompt()
    body |= {"logprobs": logprobs, "stream": stream}
    found = choices_of(server.events(path, body)) if stream else server.ask(path, body)[1]["choices"]
    said = []
    for entry in (choice["logprobs"] for choice in found if choice["logprobs"]):
        said += [e["token"] for e in entry["content"]] if path == CHAT else entry["tokens"]
    if stream:
        text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in found)
    else:
        text = found[0]["message"]["content"] if path == CHAT else found[0]["text"]
    assert "".join(said) == text and BEFORE.startswith(text) and text


def test_an_echo_comes_with_its_log_probabilities(server, tiny_tokenizer):
    ids = [tiny_tokenizer.bos, *tiny_tokenizer.encode("Well: \U0001f600")[:-1]]  # ends inside a character
    body = text_prompt(ids, echo=True, logprobs=0, max_tokens=12)
    (choice,) = server.ask(COMPLETIONS, body)[1]["choices"]
    assert choice["text"] == tiny_tokenizer.decode(ids) + SAYS[:12]
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 12
    (choice,) = server.ask(COMPLETIONS, body | {"max_tokens": 200})[1]["choices"]
    assert choice["finish_reason"] == "content_filter"
    answered = len(choice["text"]) - len(tiny_tokenizer.decode(ids))
    assert 0 < answered <= len(BEFORE) and len(choice["logprobs"]["tokens"]) == len(ids) + answered


@pytest.fixture
def scripted(tiny_tokenizer, blocklist):
    """What a model that says these tokens answers, with the filter or without."""
    t = tiny_tokenizer
    start = len(render_prompt(chat()["messages"], t))

    def ask(ids: list[int], moderate=blocklist, **fields) -> dict:
        model = ScriptedModel(tiny_config(context=256), [script(start, ids)], t.special["<|assistant_end|>"])
        engine = Engine(model, t, slots=1)
        with running_server(engine, served(t, context=256), moderate=moderate) as running:
            reply = running.ask(CHAT, chat(max_tokens=200, temperature=0, logprobs=True, **fields))[1]
            wait_until(running.quiet)
        return reply["choices"][0]

    return ask


def tokens_of(choice: dict) -> str:
    return "".join(entry["token"] for entry in choice["logprobs"]["content"])


def test_an_answer_that_is_allowed_is_the_same_with_and_without_a_filter(scripted, tiny_tokenizer):
    """Also with a call of the calculator in it, and with characters of several tokens."""
    special, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    call = [special["<|tool_start|>"], *encode("2+3"), special["<|tool_end|>"]]
    result = [special["<|result_start|>"], *encode("5"), special["<|result_end|>"]]
    ids = [*encode("Well \U0001f600 "), *call, *result, *encode("it is 5, my dear\u732b")]
    choice = scripted(ids)
    assert choice == scripted(ids, moderate=None) and choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "Well \U0001f600 it is 5, my dear\u732b"


def test_a_call_that_is_not_allowed_is_not_listed(scripted, tiny_tokenizer):
    special, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    call = [special["<|tool_start|>"], *encode("bad dog"), special["<|tool_end|>"]]
    ids = [*encode("Well "), *call, *[0] * 30, *encode("it is 5.")]  # the result takes the place of some
    assert scripted(ids, moderate=None)["message"]["executed_tools"]
    choice = scripted(ids)
    assert choice["finish_reason"] == "content_filter" and "dog" not in json.dumps(choice)


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("bad d", "stop"), ("bad dog is", "stop"), ("dog i", "stop"), ("is here", "content_filter")],
)
def test_the_tokens_of_a_stop_string_are_not_listed(scripted, tiny_tokenizer, stop, reason):
    """They may be those of a phrase."""
    choice = scripted(tiny_tokenizer.encode(SAYS), stop=stop)
    text = choice["message"]["content"]
    assert choice["finish_reason"] == reason
    assert text == SAYS[: SAYS.index(stop)] if reason == "stop" else BEFORE.startswith(text)
    assert text.startswith(tokens_of(choice)) and tokens_of(choice)


def test_only_the_blocked_choice_ends(tiny_tokenizer, blocklist):
    engine = FakeEngine(tiny_tokenizer, says=(SAYS, "fine "))
    with running_server(engine, served(tiny_tokenizer, context=256), moderate=blocklist) as running:
        events = running.events(COMPLETIONS, text_prompt(n=2, stream=True, max_tokens=150))
        first, reasons = streamed(events, 0)
        assert BEFORE.startswith(first) and reasons[-1] == "content_filter"
        wait_until(lambda: engine.started[0].finish_reason == "cancelled")
        assert streamed(events, 1) == ("fine " * 30, [None] * (len(streamed(events, 1)[1]) - 1) + ["length"])
        choices = running.ask(COMPLETIONS, text_prompt(n=2, max_tokens=150))[1]["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["content_filter", "length"]
        assert choices[1]["text"] == "fine " * 30


def test_a_filter_that_fails_lets_nothing_through(tiny_tokenizer):
    def moderate(text, direction):
        if direction == "input":
            return True, ""
        raise RuntimeError(text)

    engine = FakeEngine(tiny_tokenizer, says=(SAYS,))
    with running_server(engine, served(tiny_tokenizer), moderate=GuardedHook(moderate)) as running:
        (choice,) = running.ask(CHAT, chat())[1]["choices"]
        assert choice["message"]["content"] == "" and choice["finish_reason"] == "content_filter"
        text, reasons = streamed(running.events(CHAT, chat(stream=True)))
        assert text == "" and reasons[-1] == "content_filter"


def test_the_field_of_a_request_says_who_decides(server):
    status, reply, _ = server.ask(CHAT, chat(moderation={"model": "x"}))
    assert status == 400 and "when the server is started" in reply["error"]["message"]
