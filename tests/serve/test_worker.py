"""The engine's thread: order, the bounded queue, cancellation, deadlines and the end, without HTTP."""

import asyncio
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

pytest.importorskip("prometheus_client")

from helpers.fake_engine import FakeEngine
from helpers.running_server import chat, served
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.serve.errors import APIError
from hotlap.serve.metrics import Metrics
from hotlap.serve.protocol import chat_call, completion_call
from hotlap.serve.responses import Piece
from hotlap.serve.worker import Worker


@pytest.fixture
def engine(tiny_tokenizer):
    return FakeEngine(tiny_tokenizer, slots=1)


@pytest.fixture
def call(tiny_tokenizer):
    model = served(tiny_tokenizer, chat=False)
    return lambda prompt="ab", **fields: completion_call({"model": "tiny", "prompt": prompt, **fields}, model)


def with_worker(engine, scenario, queue=4, timeout=30.0, grace=5.0):
    """Run a coroutine function with a started worker, and stop that at the end."""

    async def run():
        worker = Worker(engine, queue, timeout, Metrics())
        worker.start()
        try:
            return await scenario(worker)
        finally:
            engine.gate.set()
            await worker.stop(grace)
            assert not worker.alive and not (worker.tickets or worker.choices)
            assert not any(engine.slots) and not engine.waiting

    return asyncio.run(run())


async def read(ticket) -> list[str]:
    """The text of each choice."""
    texts = [""] * ticket.choices
    for piece in await pieces_of(ticket):
        texts[piece.choice] += piece.text
    return texts


async def pieces_of(ticket) -> list[Piece]:
    found = []
    while pieces := await ticket.take():
        found += pieces
    return found


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_calls_are_answered_in_the_order_in_which_they_came(engine, call):
    async def scenario(worker):
        tickets = [worker.submit(call("ab" * n, max_tokens=3)) for n in range(1, 5)]
        assert [await read(ticket) for ticket in tickets] == [["abc"]] * 4
        lengths = [len(request.prompt) for request in engine.started]
        assert lengths == sorted(lengths) and len(lengths) == 4

    with_worker(engine, scenario)


def test_the_choices_of_a_call_differ_in_their_seeds_and_share_a_ticket(engine, call):
    async def scenario(worker):
        ticket = worker.submit(call(["ab", "abc"], n=2, seed=7, max_tokens=2))
        assert await read(ticket) == ["ab"] * 4
        assert [request.sampling.seed for request in engine.started] == [7, 8, 9, 10]
        lengths = [len(request.prompt) for request in engine.started]
        assert lengths[0] == lengths[1] != lengths[2] == lengths[3]
        assert ticket.usage.completion_tokens == 8
        assert ticket.usage.prompt_tokens == lengths[0] + lengths[2]  # each prompt once

    with_worker(engine, scenario)


def test_cached_tokens_count_once_for_a_prompt(engine, call):
    async def scenario(worker):
        engine.gate.clear()
        ticket = worker.submit(call(n=2, max_tokens=2))
        await until(lambda: len(engine.waiting) == 2)
        engine.waiting[0].cached, engine.waiting[1].cached = 1, 2
        engine.gate.set()
        await read(ticket)
        assert ticket.usage.cached_tokens == 1 <= ticket.usage.prompt_tokens

    with_worker(engine, scenario)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_with_echo_the_first_piece_begins_with_the_prompt(engine, call, max_tokens):
    async def scenario(worker):
        asked = call("ab", echo=True, logprobs=0, max_tokens=max_tokens)
        pieces = await pieces_of(worker.submit(asked))
        assert "".join(piece.text for piece in pieces) == "ab" + "ab"[:max_tokens]
        ids = [token.id for token in pieces[0].tokens]
        assert ids[: len(asked.prompts[0])] == asked.prompts[0]
        assert sum(len(piece.tokens) for piece in pieces) == len(asked.prompts[0]) + max_tokens

    with_worker(engine, scenario)


def test_more_than_slots_and_queue_are_refused_at_once(engine, call):
    async def scenario(worker):
        engine.gate.clear()
        tickets = [worker.submit(call(max_tokens=1)) for _ in range(3)]
        with pytest.raises(APIError) as caught:
            worker.submit(call(max_tokens=1))
        assert caught.value.status == 503 and int(caught.value.headers["Retry-After"]) > 0
        assert worker.waiting == 2
        engine.gate.set()
        assert [await read(ticket) for ticket in tickets] == [["a"]] * 3

    with_worker(engine, scenario, queue=2)


def test_a_call_larger_than_the_queue_is_answered_when_it_is_alone(engine, call):
    async def scenario(worker):
        assert await read(worker.submit(call(n=9, max_tokens=1))) == ["a"] * 9

    with_worker(engine, scenario, queue=2)


def test_a_cancelled_call_leaves_its_slot_within_a_step(engine, call):
    async def scenario(worker):
        engine.pace = 0.01
        first, second = worker.submit(call(max_tokens=60)), worker.submit(call(max_tokens=2))
        await first.take()
        first.cancel()
        assert await read(second) == ["ab"]
        request = engine.started[0]
        assert request.finish_reason == "cancelled" and len(request.tokens) < 60

    with_worker(engine, scenario)


def test_a_dropped_choice_leaves_its_slot_and_the_others_go_on(engine, call):
    async def scenario(worker):
        engine.pace = 0.01
        ticket = worker.submit(call(n=2, max_tokens=60))
        await ticket.take()
        ticket.drop(0)
        pieces = await pieces_of(ticket)
        assert {piece.choice for piece in pieces} <= {1} and pieces[-1].finish_reason == "length"
        request = engine.started[0]
        assert request.finish_reason == "cancelled" and len(request.tokens) < 60
        ticket = worker.submit(call(max_tokens=60))
        await ticket.take()
        ticket.drop(0)
        assert ticket.ended and await pieces_of(ticket) == []

    with_worker(engine, scenario)


def test_a_call_that_is_cancelled_while_it_waits_never_starts(engine, call):
    async def scenario(worker):
        engine.gate.clear()
        first, second, third = (worker.submit(call(max_tokens=2)) for _ in range(3))
        second.cancel()
        engine.gate.set()
        assert await read(first) == await read(third) == ["ab"]
        assert len(engine.started) == 2

    with_worker(engine, scenario)


def test_a_call_ends_at_its_deadline_wherever_it_is(engine, call):
    async def scenario(worker):
        engine.gate.clear()
        tickets = [worker.submit(call(max_tokens=2)) for _ in range(2)]
        for ticket in tickets:
            with pytest.raises(APIError) as caught:
                await read(ticket)
            assert caught.value.status == 504

    with_worker(engine, scenario, timeout=0.05)


def test_no_steps_are_made_without_calls(engine, call):
    async def scenario(worker):
        await read(worker.submit(call(max_tokens=2)))
        engine.fault = RuntimeError("a step")
        await asyncio.sleep(0.05)
        assert worker.ready
        engine.fault = None

    with_worker(engine, scenario)


def test_what_the_engine_refuses_is_an_error_of_that_call_alone(engine, call, monkeypatch):
    async def scenario(worker):
        with monkeypatch.context() as patch:

            def refuse(*given):
                raise ValueError("a prompt of 3 tokens does not fit")

            patch.setattr(engine, "add", refuse)
            with pytest.raises(APIError, match="does not fit"):
                await read(worker.submit(call()))
        assert await read(worker.submit(call(max_tokens=1))) == ["a"]

    with_worker(engine, scenario)


def test_a_failed_step_ends_every_call_and_the_worker(engine, call):
    async def scenario(worker):
        engine.gate.clear()
        tickets = [worker.submit(call(max_tokens=2)) for _ in range(3)]
        engine.fault = RuntimeError("the device is gone")
        engine.gate.set()
        for ticket in tickets:
            with pytest.raises(APIError) as caught:
                await read(ticket)
            assert caught.value.status == 500 and "device" not in caught.value.message
        assert worker.failed and not worker.ready
        with pytest.raises(APIError) as caught:
            worker.submit(call())
        assert caught.value.status == 503
        engine.slots, engine.waiting = [], []  # a failed engine is not used again

    with_worker(engine, scenario)


def test_a_stopping_worker_finishes_what_it_can(engine, call):
    async def scenario(worker):
        engine.pace = 0.01
        short, long = worker.submit(call(max_tokens=2)), worker.submit(call(max_tokens=60))
        stopping = asyncio.create_task(worker.stop(0.2))
        await asyncio.sleep(0)
        assert not worker.ready
        with pytest.raises(APIError) as caught:
            worker.submit(call())
        assert caught.value.status == 503
        assert await read(short) == ["ab"]
        with pytest.raises(APIError, match="shut down"):
            await read(long)
        await stopping

    with_worker(engine, scenario)


def test_a_step_that_hangs_keeps_no_caller(engine, call, monkeypatch):
    monkeypatch.setattr("hotlap.serve.worker.STUCK", 0.01)
    monkeypatch.setattr("hotlap.serve.worker.LAST_STEP", 0.05)

    async def scenario(worker):
        engine.gate.clear()
        ticket = worker.submit(call())
        await until(lambda: not worker.ready)
        began = time.monotonic()
        await worker.stop(0)
        with pytest.raises(APIError, match="shut down"):
            await read(ticket)
        assert time.monotonic() - began < 5 and worker.alive
        engine.gate.set()
        await until(lambda: not worker.alive)

    with_worker(engine, scenario)


def test_other_answers_go_on_while_a_tool_runs(tiny_tokenizer):
    """A real engine with a scripted model: the first chat calls Python, the second says the alphabet."""
    t, pending = tiny_tokenizer, Future()
    special, prompt = t.special, render_prompt([{"role": "user", "content": "hello"}], t)
    code = [special["<|tool_start|>"], *t.encode("python: f()"), special["<|tool_end|>"]]
    scripts = [script(len(prompt), said) for said in (code, t.encode("abcdefgh"))]
    model = ScriptedModel(tiny_config(), scripts, special["<|assistant_end|>"])
    offered = replace(served(t), tools={"python": lambda code: pending})

    async def scenario(worker):
        body = chat("hello", max_tokens=40, temperature=0)
        caller, other = (worker.submit(chat_call(body, offered)) for _ in range(2))
        assert await read(other) == ["abcdefgh"]
        assert not caller.ended and worker.ready
        pending.set_result("7")
        pieces = await pieces_of(caller)
        assert t.decode(token.id for piece in pieces for token in piece.tokens) == "python: f()7"

    engine = Engine(model, t, slots=2)
    engine.gate = threading.Event()  # that a fake engine has
    with_worker(engine, scenario)
