"""Replies and streams in OpenAI's form, and what they look like on the wire."""

import json
from pathlib import Path

import pytest
from helpers.api_requests import Token, fixed_call, tokens_of

from hotlap.serve.errors import APIError
from hotlap.serve.responses import DONE, Piece, Reply, Usage, sse

GOLDENS = Path(__file__).parent / "goldens"
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=2)


@pytest.fixture
def reply(tiny_tokenizer):
    return lambda **fields: Reply(fixed_call(**fields), tiny_tokenizer)


def streamed(reply: Reply, *pieces: Piece) -> list[dict]:
    return [chunk for piece in pieces for chunk in reply.chunks(piece)]


def whole(reply: Reply, *pieces: Piece) -> dict:
    for piece in pieces:
        reply.add(piece)
    return reply.whole(USAGE)


def ids_of(tokenizer, *texts: str) -> list[int]:
    """The ids of texts that are one token each."""
    ids = [tokenizer.encode(text) for text in texts]
    assert all(len(i) == 1 for i in ids)
    return [i for (i,) in ids]


# Chat


def test_a_chat_streams_its_role_then_what_is_new_then_one_reason(reply):
    chunks = streamed(
        reply(),
        Piece(0, "", [], None),
        Piece(0, "Hel", [], None),
        Piece(0, "", [], None),
        Piece(0, "lo", [], "stop"),
    )
    for chunk in chunks:
        assert (chunk["id"], chunk["object"]) == ("chatcmpl-1", "chat.completion.chunk")
        assert (chunk["created"], chunk["model"]) == (1700000000, "tiny") and "usage" not in chunk
        assert [choice["index"] for choice in chunk["choices"]] == [0]
        assert chunk["choices"][0]["logprobs"] is None
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({}, "stop"),
    ]


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("chat", [True, False])
def test_each_choice_has_exactly_one_finish_chunk_also_without_text(reply, chat, reason):
    pieces = [Piece(1, "b", [], None), Piece(0, "", [], reason), Piece(1, "", [], reason)]
    chunks = [chunk["choices"][0] for chunk in streamed(reply(chat=chat, n=2), *pieces)]
    for index in (0, 1):
        reasons = [c["finish_reason"] for c in chunks if c["index"] == index]
        assert reasons[-1] == reason and set(reasons[:-1]) <= {None}
        if chat:
            roles = [c["delta"].get("role") for c in chunks if c["index"] == index]
            assert roles[0] == "assistant" and set(roles[1:]) <= {None}


@pytest.mark.parametrize("chat", [True, False])
def test_usage_is_a_last_chunk_without_choices_if_asked(reply, chat):
    asked = reply(chat=chat, include_usage=True)
    chunks = streamed(asked, Piece(0, "a", [], "stop"))
    assert all(chunk["usage"] is None for chunk in chunks)
    last = asked.usage_chunk(USAGE)
    assert last["choices"] == [] and last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert {k: last[k] for k in ("id", "object", "created", "model")} == {
        k: chunks[0][k] for k in ("id", "object", "created", "model")
    }


def test_a_whole_chat_reply(reply):
    body = whole(reply(n=2), Piece(1, "b", [], "length"), Piece(0, "a", [], None), Piece(0, "c", [], "stop"))
    assert body == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ac"},
                "logprobs": None,
                "finish_reason": "stop",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "b"},
                "logprobs": None,
                "finish_reason": "length",
            },
        ],
        "usage": USAGE.fields(),
    }


def test_chat_logprobs_have_text_bytes_and_alternatives(reply, tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, "H", "i")
    body = whole(reply(logprobs=2), Piece(0, "Hi", tokens_of(ids, alternatives=2), "stop"))
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "H",
                "logprob": -0.5,
                "bytes": [72],
                "top_logprobs": [
                    {"token": "H", "logprob": -0.5, "bytes": [72]},
                    {"token": "G", "logprob": -0.75, "bytes": [71]},
                ],
            },
            {
                "token": "i",
                "logprob": -1.0,
                "bytes": [105],
                "top_logprobs": [
                    {"token": "i", "logprob": -1.0, "bytes": [105]},
                    {"token": "h", "logprob": -1.25, "bytes": [104]},
                ],
            },
        ]
    }


def test_chat_logprobs_without_alternatives_list_none(reply, tiny_tokenizer):
    body = whole(reply(logprobs=0), Piece(0, "H", tokens_of(ids_of(tiny_tokenizer, "H")), "stop"))
    assert [entry["top_logprobs"] for entry in body["choices"][0]["logprobs"]["content"]] == [[]]
    empty = whole(reply(logprobs=0), Piece(0, "", [], "stop"))
    assert empty["choices"][0]["logprobs"] == {"content": []}


def test_chat_logprobs_are_those_of_the_text_alone(reply, tiny_tokenizer):
    """Hidden calls and results, and the token that ends the answer, are not in the text."""
    special, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    call = [special["<|tool_start|>"], *encode("2+3"), special["<|tool_end|>"]]
    result = [special["<|result_start|>"], *encode("5"), special["<|result_end|>"]]
    ids = [*encode("a"), *call, *result, *encode("b"), special["<|assistant_end|>"]]
    pieces = [Piece(0, "", [token], None) for token in tokens_of(ids)] + [Piece(0, "ab", [], "stop")]
    body = whole(reply(logprobs=0), *pieces)
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["a", "b"]
    chunks = [chunk["choices"][0] for chunk in streamed(reply(logprobs=0), *pieces)]
    found = [entry["token"] for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert found == ["a", "b"]
    assert "".join(c["delta"].get("content", "") for c in chunks) == "ab"


def test_executed_tools_are_listed_where_their_result_ends(reply, tiny_tokenizer):
    special, encode = tiny_tokenizer.special, tiny_tokenizer.encode
    used = [
        [special["<|tool_start|>"], *encode(sum), special["<|tool_end|>"], special["<|result_start|>"],
         *encode(result), special["<|result_end|>"]]
        for sum, result in (("2+3", "5"), ("python: print(5 * 2)", "10"))
    ]  # fmt: skip
    pieces = [Piece(0, "", tokens_of(ids), None) for ids in used]
    pieces += [Piece(0, "10", tokens_of(encode("10")), "stop")]
    tools = [
        {"index": 0, "type": "calculator", "arguments": '{"expression": "2+3"}', "output": "5"},
        {"index": 1, "type": "python", "arguments": '{"code": "print(5 * 2)"}', "output": "10"},
    ]
    assert whole(reply(), *pieces)["choices"][0]["message"]["executed_tools"] == tools
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed(reply(), *pieces)]
    assert [delta.get("executed_tools") for delta in deltas[1:]] == [tools[:1], tools[1:], None, None]
    assert "executed_tools" not in whole(reply(chat=False), *pieces)["choices"][0]


def test_half_a_character_is_told_from_the_other_half(reply, tiny_tokenizer):
    ids = tiny_tokenizer.encode("😀")
    body = whole(reply(logprobs=0), Piece(0, "😀", tokens_of(ids), "length"))
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "😀"
    assert [entry["token"] for entry in content] == [rf"bytes:\x{byte:02x}" for byte in "😀".encode()]


# Completions


def test_completions_stream_text(reply):
    chunks = streamed(reply(chat=False), Piece(0, "a", [], None), Piece(0, "b", [], "length"))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "b", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}],
    ]


def test_a_whole_completion(reply):
    body = whole(
        reply(chat=False), Piece(2, "c", [], "stop"), Piece(0, "a", [], "stop"), Piece(1, "b", [], "length")
    )
    assert body["object"] == "text_completion" and body["usage"]["total_tokens"] == 10
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "a", "stop"),
        (1, "b", "length"),
        (2, "c", "stop"),
    ]


def test_completion_logprobs_cover_prompt_and_answer_as_lm_eval_reads_them(reply, tiny_tokenizer):
    """The sum over the continuation's tokens, and whether each is the likeliest."""
    context, continuation, written = (ids_of(tiny_tokenizer, *text) for text in ("The", " d", "!"))
    ids = [*context, *continuation, *written]
    tokens = tokens_of(ids, first=None, alternatives=1)
    likelier = tokens[3]._replace(top=((ids[0], tokens[3].logprob + 1),))
    tokens[3] = likelier
    pieces = [Piece(0, "The d", tokens[:-1], None), Piece(0, "!", tokens[-1:], "length")]
    body = whole(reply(chat=False, logprobs=1, echo=True), *pieces)
    choice = body["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == "The d!" and found["tokens"] == ["T", "h", "e", " ", "d", "!"]
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert (
        found["token_logprobs"] == [None, -0.5, -1.0, -1.5, -2.0, -2.5] and found["top_logprobs"][0] is None
    )
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(found["token_logprobs"][3:-1], found["top_logprobs"][3:-1], strict=True)
    ]
    assert greedy == [False, True] and found["top_logprobs"][3] == {"T": -0.5, " ": -1.5}


def test_completion_logprobs_name_special_tokens_and_count_characters(reply, tiny_tokenizer):
    ids = [tiny_tokenizer.bos, *tiny_tokenizer.encode("😀x"), tiny_tokenizer.special["<|assistant_end|>"]]
    body = whole(
        reply(chat=False, logprobs=0, echo=True), Piece(0, "😀x", tokens_of(ids, first=None), "stop")
    )
    found = body["choices"][0]["logprobs"]
    assert found["tokens"][0] == "<|bos|>" and found["tokens"][-2:] == ["x", "<|assistant_end|>"]
    assert found["text_offset"] == [0] * (len(ids) - 2) + [1, 2]
    for text, logprob, top in zip(
        *(found[k][1:] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top == {text: logprob}  # 0 alternatives: the token alone


def test_max_tokens_0_returns_the_prompt_alone(reply, tiny_tokenizer):
    ids = ids_of(tiny_tokenizer, "H", "i")
    body = whole(
        reply(chat=False, logprobs=1, echo=True), Piece(0, "Hi", tokens_of(ids, first=None), "length")
    )
    (choice,) = body["choices"]
    assert choice["text"] == "Hi" and choice["logprobs"]["token_logprobs"] == [None, -0.5]


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_logprobs_join_to_those_of_the_whole_reply(reply, tiny_tokenizer, chat):
    ids = tiny_tokenizer.encode("Je préfère 😀!")
    tokens = tokens_of(ids, alternatives=2)
    pieces = [Piece(0, tiny_tokenizer.decode([i]), [t], None) for i, t in zip(ids, tokens, strict=True)]
    pieces.append(Piece(0, "", [], "stop"))
    expected = whole(reply(chat=chat, logprobs=2), *pieces)["choices"][0]["logprobs"]
    chunks = streamed(reply(chat=chat, logprobs=2), *pieces)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {name: [entry for part in parts for entry in part[name]] for name in expected} == expected


def test_a_probability_of_zero_can_be_sent(reply, tiny_tokenizer):
    token = Token(ids_of(tiny_tokenizer, "H")[0], True, float("-inf"), ((5, float("-inf")),))
    for chat in (True, False):
        body = whole(reply(chat=chat, logprobs=1), Piece(0, "H", [token], "stop"))
        assert "-9999.0" in sse(body)


# The wire


def test_an_event_is_one_line_that_every_client_can_split():
    event = sse({"text": "a\nb\r\u2028\u0085\x0b😀"})
    assert event.startswith("data: ") and event.endswith("\n\n") and len(event.splitlines()) == 2
    assert json.loads(event[6:])["text"] == "a\nb\r\u2028\u0085\x0b😀" and event.isascii()


def test_errors_have_openais_form():
    error = APIError(503, "the queue is full", headers={"Retry-After": "1"})
    assert error.body == {
        "error": {"message": "the queue is full", "type": "overloaded_error", "param": None, "code": None}
    }
    assert error.headers == {"Retry-After": "1"} and str(error) == "the queue is full"
    types = {
        status: APIError(status, "").type for status in (400, 401, 404, 405, 413, 415, 429, 500, 502, 504)
    }
    assert types == {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        502: "server_error",
        504: "timeout_error",
    }


def streams(tokenizer) -> dict[str, str]:
    """What is sent in five cases, by the name of its file."""

    def wire(pieces: list[Piece], **fields) -> str:
        reply = Reply(fixed_call(**fields), tokenizer)
        events = [*streamed(reply, *pieces)]
        if reply.call.include_usage:
            events.append(reply.usage_chunk(USAGE))
        return "".join(map(sse, events)) + DONE

    prompt = tokens_of(ids_of(tokenizer, "H", "i"), first=None, alternatives=1)
    written = tokens_of(ids_of(tokenizer, "!"), first=-0.25, alternatives=1)
    failed = APIError(500, "the model's logits are not finite")
    answer = [Piece(0, "The d", [], None), Piece(0, "og.", [], "stop")]
    return {
        "answer": wire(answer, include_usage=True),
        # `stop` is "END", the model wrote "yes", " E", "NDing"
        "stop_inside_a_token": wire([Piece(0, "yes", [], None), Piece(0, " ", [], "stop")]),
        "two_choices": wire(
            [
                Piece(0, "a", [], None),
                Piece(1, "b", [], None),
                Piece(1, "", [], "stop"),
                Piece(0, "c", [], "length"),
            ],
            n=2,
        ),
        "echo_with_logprobs": wire(
            [Piece(0, "Hi", prompt, None), Piece(0, "!", written, "length")],
            chat=False,
            echo=True,
            logprobs=1,
        ),
        "error": wire(answer[:1]).removesuffix(DONE) + sse(failed.body),
    }


@pytest.mark.parametrize(
    "name", ["answer", "stop_inside_a_token", "two_choices", "echo_with_logprobs", "error"]
)
def test_the_wire_is_as_recorded(tiny_tokenizer, name):
    assert streams(tiny_tokenizer)[name] == (GOLDENS / f"{name}.txt").read_text()
