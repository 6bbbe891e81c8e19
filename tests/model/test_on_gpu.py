"""Decoding in real CUDA graphs."""

import warnings

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.model.decoding import Decoder, Row
from hotlap.model.engine import Engine
from hotlap.model.kv_cache import KVCache
from hotlap.model.sampling import Sampling

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def decoders(model):
    """One that captures graphs and one that does not, each with a cache of 4 slots of 256 tokens."""
    caches = [KVCache(model.config, 4, 256, model.compute_dtype, GPU) for _ in range(2)]
    captured, eager = (Decoder(model, cache) for cache in caches)
    eager.captures = False
    return captured, eager


@torch.no_grad()
def test_a_captured_step_is_the_eager_one(random_model):
    """At every length, for batches in turn, and after the cache has grown."""
    config = tiny_config(layers=3, context=512, width=128, heads=2, kv_heads=1)
    model = random_model(config, compute_dtype=torch.bfloat16).to(GPU).for_inference()
    captured, eager = decoders(model)
    lengths = [0, 0, 0, 0]
    for step in range(120):
        slots = [(0,), (3, 1), (1, 0, 2, 3)][step % 3]
        rows = [Row(7 * (step + slot) % 300, 5, slot, lengths[slot]) for slot in slots]
        if step == 60:
            for decoder in (captured, eager):
                decoder.cache.reserve(400)
        torch.testing.assert_close(captured(rows), eager(rows), rtol=0, atol=3e-2)
        for slot in slots:
            lengths[slot] += 1
    assert all(step.graph for step in captured.steps.values()) and len(captured.steps) == 3
    assert not any(step.graph for step in eager.steps.values())


def test_a_step_that_waits_for_the_gpu_runs_eagerly(random_model, caplog):
    model = random_model(tiny_config()).to(GPU)
    captured, eager = decoders(model)

    def waits(ids, **options):
        assert ids.sum().item() >= 0
        return model(ids, **options)

    captured.model = waits
    with torch.no_grad():
        for position in range(4):
            rows = [Row(position, 3, 0, position), Row(9, 3, 1, position)]
            torch.testing.assert_close(captured(rows), eager(rows))
    assert caplog.text.count("decoding without a CUDA graph") == 1
    torch.randn(3, device=GPU)  # fails after a capture that left torch unusable
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("reads", [False, True])
def test_a_step_of_the_engine_waits_for_the_gpu_once(reads, random_model, request):
    """Whatever the sampling; and while a prompt is read beside the answers."""
    pytest.importorskip("tokenizers")
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    model = random_model(tiny_config(layers=3)).to(GPU)
    engine = Engine(model, tokenizer, slots=4, chunk=3)
    engine.stops = set()  # so that the batch stays the same
    for i in range(3):
        sampling = Sampling(
            i, 10 * i, 40, i, top_p=0.9, min_p=0.05, presence_penalty=1.0, logit_bias=((5, 1.0),)
        )
        engine.add([tokenizer.bos, 5 + i], sampling, logprobs=2 if i == 1 else None)
    if reads:
        engine.add([5] * 60, Sampling(max_tokens=1))
    for _ in range(6):  # compiles and captures
        engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            for _ in range(5):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 5


def test_answers_do_not_depend_on_graphs(random_model, request):
    pytest.importorskip("tokenizers")
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    model = random_model(tiny_config(layers=3)).to(GPU)
    prompts = [[tokenizer.bos, *range(20, 20 + 7 * i)] for i in range(6)]
    answers = []
    for captures in (True, False):
        engine = Engine(model, tokenizer, slots=5)
        engine.decoder.captures = captures
        answers.append(engine.complete(prompts, Sampling(temperature=0.0, max_tokens=20)))
    assert answers[0] == answers[1]
