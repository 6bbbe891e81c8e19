"""Decoding steps: what a graph replays, padding, and a cache that grows, with graphs that only pretend."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.model import decoding, kv_cache
from hotlap.model.decoding import Decoder, Row
from hotlap.model.engine import Engine
from hotlap.model.kv_cache import KVCache
from hotlap.model.sampling import Sampling


@pytest.fixture
def captures(monkeypatch):
    """A function that lets a decoder capture graphs on a CPU; returns the list of graphs.

    Capturing changes nothing. A replay runs the calls, and fails if the cache or the inputs lie elsewhere.
    """

    def start(decoder: Decoder) -> list:
        graphs = []

        def addresses():
            return [t.data_ptr() for t in (*decoder.cache.k, *decoder.cache.v)]

        def captured(calls, pool):
            assert pool == (
                "pool" if decoder.steps and any(s.graph for s in decoder.steps.values()) else None
            )
            graph, seen = SimpleNamespace(replays=0, pool=lambda: "pool"), addresses()
            outputs = calls()

            def replay():
                assert addresses() == seen
                outputs.copy_(calls())
                graph.replays += 1

            graph.replay = replay
            graphs.append(graph)
            return graph, outputs

        monkeypatch.setattr(decoding, "captured", captured)
        decoder.captures = True
        return graphs

    return start


@pytest.fixture
def model(random_model):
    return random_model(tiny_config(layers=3, context=128))


def alone(model, tokenizer, request):
    """The tokens of a request that nothing runs beside, without graphs."""
    engine = Engine(model, tokenizer, slots=1)
    again = engine.add(request.prompt, request.sampling)
    while engine.busy:
        engine.step()
    return [token.id for token in again.tokens]


@pytest.mark.parametrize("seed", range(3))
def test_requests_come_and_go_beside_padding_and_while_the_cache_grows(
    seed, model, tiny_tokenizer, captures, monkeypatch
):
    monkeypatch.setattr(kv_cache, "GROWTH", 32)
    dice, t = random.Random(seed), tiny_tokenizer
    engine = Engine(model, t, slots=7)
    graphs, requests, sizes, wanted = captures(engine.decoder), [], [], 16
    decode = engine.decoder

    def watched(rows):
        sizes.append((len(rows), sum(row.length > 0 for row in rows)))
        return decode(rows)

    watched.batch_size = decode.batch_size
    engine.decoder = watched
    while engine.busy or len(requests) < wanted:
        if len(requests) < wanted and dice.random() < 0.4:
            longest = 5 + 5 * len(requests)  # so that the cache grows again and again
            prompt = [t.bos, *(dice.randrange(t.text_size) for _ in range(dice.randrange(longest)))]
            sampling = Sampling(dice.choice([0.0, 1.0]), 20, dice.randint(1, 30), dice.randrange(9))
            requests.append(engine.add(prompt, sampling))
        if requests and dice.random() < 0.05:
            engine.cancel(dice.choice(requests))
        engine.step()
    for request in requests:
        full = alone(model, t, request)
        said = [token.id for token in request.tokens]
        assert said == (full[: len(said)] if request.finish_reason == "cancelled" else full)
    assert {size for size, _ in sizes} <= {1, 2, 4, 7}
    assert any(real < size for size, real in sizes)
    assert len(graphs) > 4 and sum(graph.replays for graph in graphs) > len(sizes) / 3


def test_a_slot_that_padding_and_a_cancelled_request_used_is_as_new(model, tiny_tokenizer, captures):
    t = tiny_tokenizer
    engine = Engine(model, t, slots=4)
    graphs = captures(engine.decoder)
    greedy = Sampling(temperature=0.0, max_tokens=30)
    first = [engine.add([t.bos, 5 + i], greedy) for i in range(4)]
    for _ in range(10):
        engine.step()
    engine.cancel(first[2])
    for _ in range(5):  # three sequences, and padding where the cancelled one was
        engine.step()
    second = engine.add([t.bos, 50, 51], greedy)
    engine.step()
    assert second.slot == first[2].slot and graphs[0].replays
    while engine.busy:
        engine.step()
    for request in (first[0], first[1], first[3], second):
        assert [token.id for token in request.tokens] == alone(model, t, request)


def test_a_graph_gives_way_to_one_of_the_grown_cache(model, captures):
    cache, whole = (
        KVCache(model.config, 3, 0, torch.float32, "cpu"),
        KVCache(model.config, 1, 60, torch.float32, "cpu"),
    )
    decoder, eager = Decoder(model, cache), Decoder(model, whole)
    graphs = captures(decoder)
    with torch.no_grad():
        for position in range(60):
            if position % 20 == 0:
                cache.reserve(128 * (1 + position // 20))
            token, previous = 7 * position % 300, 7 * (position - 1) % 300 if position else -1
            logits = decoder([Row(token, previous, 1, position)])
            expected = eager([Row(token, previous, 0, position)])
            torch.testing.assert_close(logits, expected)
    assert [graph.replays for graph in graphs] == [19, 19, 19]


def test_padding_writes_to_its_own_slot_alone(model, captures):
    caches = [KVCache(model.config, 4, 20, torch.float32, "cpu") for _ in range(2)]
    for cache in caches:
        generator = torch.Generator().manual_seed(0)
        for tensor in (*cache.k, *cache.v):
            tensor.normal_(generator=generator)
    before = [tensor.clone() for tensor in (*caches[0].k, *caches[0].v)]
    padded, plain = (Decoder(model, cache) for cache in caches)
    rows = [Row(5, 8, 3, 4), Row(6, 9, 0, 9), Row(7, -1, 2, 0)]
    captures(padded)
    assert padded.batch_size(3) == 4 and plain.batch_size(3) == 3
    with torch.no_grad():
        logits = padded([*rows, Row(0, -1, 1, 0)])[:3]
        torch.testing.assert_close(logits, plain(rows))
    after = [(*cache.k, *cache.v) for cache in caches]
    for old, ours, theirs in zip(before, *after, strict=True):
        torch.testing.assert_close(ours[[0, 2, 3]], theirs[[0, 2, 3]])
        assert not torch.equal(ours[1], old[1])
        assert torch.equal(theirs[1], old[1])


def test_a_step_that_cannot_be_captured_runs_as_before_and_says_so_once(
    model, tiny_tokenizer, captures, monkeypatch, caplog
):
    t = tiny_tokenizer
    engine = Engine(model, t, slots=4)
    captures(engine.decoder)

    def fails(calls, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(decoding, "captured", fails)
    prompts = [[t.bos, 5 + i] for i in range(3)]
    answers = engine.complete(prompts, Sampling(temperature=0.0, max_tokens=10))
    expected = Engine(model, t).complete(prompts, Sampling(temperature=0.0, max_tokens=10))
    assert answers == expected and not engine.decoder.captures
    said = [record.getMessage() for record in caplog.records if "graph" in record.getMessage()]
    assert said == [
        "decoding without a CUDA graph: capture failed: operation not permitted when stream is capturing"
    ]


def test_a_cpu_pads_nothing(model, tiny_tokenizer):
    decoder = Engine(model, tiny_tokenizer, slots=9).decoder
    assert [decoder.batch_size(n) for n in range(1, 10)] == [*range(1, 10)]


def test_batches_with_graphs_are_powers_of_two_or_full(model, tiny_tokenizer, captures):
    decoder = Engine(model, tiny_tokenizer, slots=9).decoder
    captures(decoder)
    assert [decoder.batch_size(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 9]
