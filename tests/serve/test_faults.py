"""What clients, the network and the engine do wrong: every other request is answered, and nothing is left."""

import asyncio
import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")

from helpers.fake_engine import FakeEngine
from helpers.running_server import chat, running_server, served, wait_until
from helpers.tools import tiny_config

from hotlap.model.engine import Engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def engine(tiny_tokenizer):
    return FakeEngine(tiny_tokenizer)


@pytest.fixture
def server(engine, tiny_tokenizer):
    with running_server(engine, served(tiny_tokenizer)) as running:
        yield running


def request_bytes(body: dict) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw


def send(server, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(data)
    return connection


def test_a_hundred_of_two_hundred_clients_leave(random_model, tiny_tokenizer):
    """Some before the answer begins, some in its middle; streaming and not. The engine is a real one."""
    draw, engine = random.Random(0), Engine(random_model(tiny_config()), tiny_tokenizer, slots=16)
    leaving = {*draw.sample(range(200), 100)}

    async def client(port: int, number: int) -> str | None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes(chat(stream=number % 2 == 0, max_tokens=20, temperature=0, seed=1)))
        try:
            if number in leaving:
                await writer.drain()
                await asyncio.sleep(draw.uniform(0, 0.5))
                return None
            return (await reader.read()).decode()
        finally:
            writer.close()

    async def clients(port: int) -> list:
        return await asyncio.gather(*(client(port, number) for number in range(200)))

    with running_server(engine, served(tiny_tokenizer), queue=200) as server:
        answers = asyncio.run(clients(server.port))
        whole = server.ask(CHAT, chat(max_tokens=20, temperature=0))[1]["choices"][0]
        for number, answer in enumerate(answers):
            if number not in leaving:
                assert answer.startswith("HTTP/1.1 200"), answer
                contents = re.findall('"content":("(?:[^"\\\\]|\\\\.)*")', answer)
                assert "".join(map(json.loads, contents)) == whole["message"]["content"]
                assert re.findall('"finish_reason":"(.*?)"', answer) == [whole["finish_reason"]]
                assert ("[DONE]" in answer) == (number % 2 == 0)
        wait_until(server.quiet)


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_stops_its_answer(server, engine, stream):
    engine.pace = 0.01
    connection = send(server, request_bytes(chat(stream=stream, max_tokens=50)))
    wait_until(lambda: engine.started and len(engine.started[0].tokens) > 2)
    connection.close()
    wait_until(server.quiet)
    assert engine.started[0].finish_reason == "cancelled"


def test_a_client_that_reads_nothing_holds_up_nobody(server, engine):
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", server.port))
    slow.sendall(request_bytes(chat(stream=True, n=128, logprobs=True, max_tokens=50)))
    wait_until(lambda: engine.started)
    assert server.ask(CHAT, chat())[0] == 200
    wait_until(server.quiet)
    assert len(engine.started) == 129
    slow.close()


def test_six_requests_at_once_on_one_slot_are_answered_in_order(tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer, slots=1)
    engine.gate.clear()
    done = []

    def ask(number: int) -> None:
        status, reply, _ = server.ask(CHAT, chat("a" * (number + 1), stream=number % 2 == 1))
        done.append((number, status, "abcd" in str(reply) or str(reply).count('"content":"')))

    with running_server(engine, served(tiny_tokenizer)) as server, ThreadPoolExecutor(6) as pool:
        for number in range(6):
            pool.submit(ask, number)
            wait_until(lambda: len(server.worker.tickets) == number + 1)  # noqa: B023
        engine.gate.set()
        wait_until(lambda: len(done) == 6)
        assert [status for _, status, _ in done] == [200] * 6 and all(found for *_, found in done)
        lengths = [len(request.prompt) for request in engine.started]
        assert lengths == sorted(lengths) and engine.most_running == 1


def test_a_slow_body_is_given_up(server, monkeypatch):
    monkeypatch.setattr("hotlap.serve.body.SLOWEST", 0.1)
    connection = send(server, request_bytes(chat())[:-10])
    assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert server.ask(CHAT, chat())[0] == 200
    connection.close()


def test_a_connection_that_ends_in_its_body_is_no_error(server, caplog):
    send(server, request_bytes(chat())[:-10]).close()
    wait_until(lambda: "499" in caplog.text)
    assert server.ask("/health")[0] == 200 and "bug" not in caplog.text


@pytest.mark.parametrize("text", ["a" * 1_000_000, "\u3042 " * 150_000, "\\" * 500_000, "\0" * 170_000])
def test_a_million_characters_are_refused_while_others_are_answered(server, text):
    statuses = []
    asking = threading.Thread(target=lambda: statuses.append(server.ask(CHAT, chat(text))[0]))
    asking.start()
    while asking.is_alive():
        assert server.ask("/health")[0] == 200
    assert statuses[0] in (400, 413)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9},
        {"n": 10**30},
        {"max_tokens": -1},
        {"temperature": 1e400},
        {"stop": ["x"] * 100},
        {"stop": "x" * 10_000},
        {"seed": "x"},
        {"top_logprobs": 10**9, "logprobs": True},
        {"logit_bias": {"1" * 5000: 1}},
        {"messages": [{"role": "user", "content": "a"}] * 100_000},
        {"messages": [[[[]]]]},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_immoderate_requests_are_refused_and_cost_no_step(server, engine, fields):
    status, reply, _ = server.ask(CHAT, chat() | fields)
    assert status in (400, 413) and reply["error"]["message"]
    assert not engine.started


def test_a_full_queue_refuses_at_once_and_recovers(engine, tiny_tokenizer):
    engine.slots = [None]
    engine.gate.clear()
    with running_server(engine, served(tiny_tokenizer), queue=2) as server, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.ask, CHAT, chat()) for _ in range(3)]
        wait_until(lambda: server.worker.choices == 3)
        status, reply, headers = server.ask(CHAT, chat())
        assert status == 503 and reply["error"]["message"] and int(headers["retry-after"]) > 0
        assert "hotlap_queue_full_total 1.0" in server.ask("/metrics")[1]
        engine.gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 3
        assert server.ask(CHAT, chat())[0] == 200


def test_a_deadline_is_a_status_or_the_last_event(engine, tiny_tokenizer):
    engine.pace = 0.02
    with running_server(engine, served(tiny_tokenizer), timeout=0.2) as server:
        assert server.ask(CHAT, chat(max_tokens=50))[0] == 504
        *_, last = server.events(CHAT, chat(max_tokens=50, stream=True))
        assert json.loads(last)["error"]["type"] == "timeout_error"
        wait_until(server.quiet)


def test_a_failed_engine_answers_everybody_and_ends_the_server(engine, tiny_tokenizer, caplog):
    engine.pace = 0.01
    bodies = [chat(max_tokens=50, stream=stream, n=2) for stream in (True, False, True, False)]
    with running_server(engine, served(tiny_tokenizer)) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.ask, CHAT, body) for body in bodies]
        wait_until(lambda: len(server.worker.tickets) == 4 and engine.started)
        began = time.monotonic()
        engine.fault = RuntimeError("no such device")
        found = [answer.result() for answer in answers]
        assert time.monotonic() - began < 2
        for body, (status, reply, _) in zip(bodies, found, strict=True):
            assert status == (200 if body["stream"] else 500)
            error = reply.split("data: ")[-1] if body["stream"] else json.dumps(reply)
            assert json.loads(error)["error"]["type"] == "server_error" and "device" not in error
        wait_until(lambda: not server.thread.is_alive())
        assert server.exit_code != 0
        assert "Traceback" in caplog.text and "no such device" in caplog.text


def test_a_stopped_server_lets_answers_finish_and_ends_others_honestly(engine, tiny_tokenizer):
    engine.pace = 0.02
    short, long = chat(max_tokens=10, stream=True), chat(max_tokens=50, stream=True)
    with (
        running_server(engine, served(tiny_tokenizer), grace=0.5) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = [pool.submit(server.ask, CHAT, body) for body in (short, long)]
        wait_until(lambda: len(engine.started) == 2)
        server.stop()
        wait_until(lambda: server.ask("/ready")[0] == 503)
        assert server.ask(CHAT, chat())[0] == server.ask("/v1/models")[0] == 503
        assert server.ask("/health")[0] == 200
        finished, cut = (answer.result()[1].split("data: ")[-1] for answer in answers)
        assert finished.strip() == "[DONE]"
        assert "shut down" in json.loads(cut)["error"]["message"]
        wait_until(lambda: not server.thread.is_alive())
        assert server.exit_code == 0
