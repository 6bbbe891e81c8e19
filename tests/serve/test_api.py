"""Routes, statuses and headers of the HTTP API, over a socket."""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from helpers.fake_engine import FakeEngine
from helpers.running_server import CONTEXT, chat, running_server, served, wait_until

from hotlap.serve.api import router
from hotlap.serve.responses import Reply

KEY = "0123456789abcdef"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server(tiny_tokenizer):
    with running_server(FakeEngine(tiny_tokenizer), served(tiny_tokenizer)) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tiny_tokenizer):
    with running_server(FakeEngine(tiny_tokenizer), served(tiny_tokenizer), key=KEY) as running:
        yield running


def test_a_chat_request_is_answered(server):
    status, reply, _ = server.ask(CHAT, chat())
    assert status == 200 and reply["model"] == "tiny" and reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "abcd"}
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4


def test_a_stream_has_the_same_answer(server):
    events = server.events(CHAT, chat(stream=True, stream_options={"include_usage": True}))
    *chunks, usage = map(json.loads, events[:-1])
    assert events[-1] == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "abcd"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4


def test_a_stream_is_not_cached(server):
    _, _, headers = server.ask(CHAT, chat(stream=True))
    assert headers["cache-control"] == "no-cache"


def test_text_is_continued(server):
    status, reply, _ = server.ask(COMPLETIONS, {"model": "hotlap", "prompt": ["x", "y"], "max_tokens": 2})
    assert status == 200 and [choice["text"] for choice in reply["choices"]] == ["ab", "ab"]
    events = server.events(COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True})
    assert events[-1] == "[DONE]" and json.loads(events[0])["object"] == "text_completion"


def test_the_model_is_listed(server):
    _, listing, _ = server.ask("/v1/models")
    (model,) = listing["data"]
    assert listing["object"] == "list" and model["id"] == "tiny" and model["object"] == "model"
    assert type(model["created"]) is int and model["max_model_len"] == CONTEXT
    for name in ("tiny", "hotlap"):
        assert server.ask(f"/v1/models/{name}")[:2] == (200, model)
    for name in ("other", "../../etc/passwd"):
        status, reply, _ = server.ask(f"/v1/models/{name}")
        assert status == 404 and reply["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/v1", "GET", 404),
        ("/v1/embeddings", "POST", 404),
        ("/docs", "GET", 404),
        ("/openapi.json", "GET", 404),
        (f"{CHAT}/", "POST", 404),
        (CHAT, "GET", 405),
        (CHAT, "OPTIONS", 405),
        ("/v1/models", "DELETE", 405),
    ],
)
def test_what_is_not_there_is_an_error_of_the_api(server, path, method, status):
    found, reply, headers = server.ask(path, b"{}", method)
    assert found == status and set(reply["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in headers) == (status == 405)
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"temperature": NaN}', "NaN is not a number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_a_bad_body_is_refused(server, path, body, words):
    status, reply, _ = server.ask(path, body)
    assert status == 400 and words in reply["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_kinds_of_body_are_refused(server, kind):
    status, reply, _ = server.ask(CHAT, chat(), content_type=kind)
    assert status == 415 and "application/json" in reply["error"]["message"]


def test_a_character_set_may_be_named(server):
    assert server.ask(CHAT, chat(), content_type="Application/JSON; charset=utf-8")[0] == 200


def test_a_large_body_is_refused_with_and_without_its_length(server):
    for body in (b" " * 10_000_000, (b" " * 100_000 for _ in range(100))):
        connection = server.connect()
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()


def test_the_key_is_asked_of_every_route_but_health(locked):
    assert locked.ask("/health")[0] == 200
    for route in router.routes:
        (method,) = route.methods
        path = route.path.replace("{name:path}", "tiny")
        body = None if method == "GET" else {}
        status, reply, headers = locked.ask(path, body)
        assert (status == 401) == (path != "/health"), path
        if status == 401:
            assert reply["error"]["code"] == "invalid_api_key" and headers["www-authenticate"] == "Bearer"
    assert locked.ask("/nothing")[0] == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"api_key": KEY}, 200),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer \xe9"}, 401),
        ({"api_key": "wrong"}, 401),
    ],
)
def test_the_key_is_compared_whole(locked, headers, status):
    assert locked.ask("/v1/models", **headers)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("attacker.example", 403),
        ("attacker.example:8000", 403),
        ("localhost.attacker.example", 403),
        ("192.168.0.9", 403),
        ("", 403),
    ],
)
def test_without_a_key_the_host_must_be_this_machine(server, host, status):
    assert server.ask("/v1/models", host=host)[0] == status


def test_with_a_key_any_host_is_right(locked):
    assert locked.ask("/v1/models", host="models.example", api_key=KEY)[0] == 200


def test_every_response_has_an_id_of_its_own(server):
    asked = [(CHAT, chat()), (CHAT, chat(stream=True)), (CHAT, {}), ("/nothing", None), ("/health", None)]
    ids = [server.ask(path, body)[2]["x-request-id"] for path, body in asked * 2]
    assert all(ids) and len(set(ids)) == len(ids)


def test_health_and_readiness(server, locked):
    assert server.ask("/health")[:2] == (200, {"status": "ok"})
    assert server.ask("/ready")[:2] == (200, {"ready": True})


def test_metrics_count_what_happened(tiny_tokenizer):
    with running_server(FakeEngine(tiny_tokenizer, slots=3), served(tiny_tokenizer)) as running:
        running.ask(CHAT, chat(n=2))
        running.ask(CHAT, {})
        wait_until(lambda: 'status="400"' in running.ask("/metrics")[1])  # counted after they are sent
        text = running.ask("/metrics")[1]
    for line in (
        'hotlap_requests_total{status="400"} 1.0',
        "hotlap_completion_tokens_total 8.0",
        "hotlap_time_to_first_token_seconds_count 2.0",
        "hotlap_time_between_tokens_seconds_count 6.0",
        "hotlap_slots 3.0",
        "hotlap_running 0.0",
        "hotlap_waiting 0.0",
    ):
        assert line in text.splitlines()


def test_nothing_of_prompts_or_answers_is_logged(server, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    secret = "Sesame"
    monkeypatch.setattr(Reply, "whole", lambda self, usage: {}[secret])
    server.ask(f"{CHAT}?prompt={secret}", chat(secret, stream=True))
    server.ask(CHAT, chat(secret, temprature=1, stop=secret))
    server.ask(CHAT, f'{{"{secret}'.encode())
    status, reply, _ = server.ask(CHAT, chat(secret))
    assert status == 500 and secret not in str(reply) and "Traceback" not in str(reply)
    # uvicorn's log of requests is off, but pytest listens to it all the same
    records = [record for record in caplog.records if record.name != "uvicorn.access"]
    logged = "\n".join(map(caplog.handler.format, records))
    assert "KeyError" in logged and CHAT in logged
    assert secret not in logged and "abcd" not in logged


def test_a_path_cannot_forge_a_line_of_the_log(server, caplog):
    caplog.set_level(logging.INFO, "hotlap")
    server.ask("/health%0aGET%20/admin")
    start = "GET /health%0aGET%20/admin 404"
    wait_until(lambda: any(line.startswith(start) and "\n" not in line for line in caplog.messages))
    assert not any(line.startswith("GET /admin") for line in caplog.messages)


def test_a_silent_stream_has_comments(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("hotlap.serve.api.QUIET", 0.02)
    engine = FakeEngine(tiny_tokenizer, slots=1)
    engine.gate.clear()
    with running_server(engine, served(tiny_tokenizer)) as running:
        connection = running.connect()
        body = json.dumps(chat(stream=True))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b": ") and response.readline() == b"\n"
        engine.gate.set()
        assert b"[DONE]" in response.read()


def test_every_route_is_documented():
    text = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    for route in router.routes:
        assert f"`{route.path.replace('{name:path}', 'NAME')}`" in text.replace("POST ", "").replace(
            "GET ", ""
        )


def test_tokens_of_text_and_back(server, tiny_tokenizer):
    bos, ids = tiny_tokenizer.bos, tiny_tokenizer.encode("a dog")
    _, reply, _ = server.ask("/tokenize", {"prompt": "a dog"})
    assert reply == {"tokens": [bos, *ids], "count": len(ids) + 1, "max_model_len": CONTEXT}
    _, reply, _ = server.ask("/tokenize", {"prompt": "a dog", "add_special_tokens": False})
    assert reply["tokens"] == ids
    assert server.ask("/detokenize", {"tokens": [bos, *ids]})[1] == {"prompt": "a dog"}


def test_tokens_of_a_conversation_are_those_of_a_chat(server):
    _, reply, _ = server.ask("/tokenize", {"messages": chat()["messages"]})
    assert reply["count"] == server.ask(CHAT, chat())[1]["usage"]["prompt_tokens"]


def test_special_tokens_are_known_by_name(server, tiny_tokenizer):
    _, info, _ = server.ask("/tokenizer_info")
    assert info["model_max_length"] == CONTEXT and info["chat_template"] is None
    for name in (info["bos_token"], info["eos_token"]):
        _, reply, _ = server.ask("/tokenize", {"prompt": name, "add_special_tokens": False})
        assert reply["tokens"] == [tiny_tokenizer.special[name]]
        _, reply, _ = server.ask("/tokenize", {"prompt": f"{name} ", "add_special_tokens": False})
        assert max(reply["tokens"]) < tiny_tokenizer.text_size


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special": True}, "add_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_bad_requests_about_tokens_name_the_field(server, path, body, param):
    status, reply, _ = server.ask(path, body)
    assert status == 400 and reply["error"]["param"] == param


def test_no_request_is_left(server):
    wait_until(server.quiet)
