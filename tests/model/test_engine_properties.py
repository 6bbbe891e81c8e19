"""Whatever comes and goes beside a request: it says what the plain model says, without a cache."""

import random

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.model.engine import Engine
from hotlap.model.sampling import Draw, Sampling, is_greedy, sample

TOLERANCE = 1e-5  # of float32 log-probabilities: matmuls of other shapes add in another order


def caller(random_model, tokenizer, **fields):
    """A random model that often calls a tool, and seldom ends its answer."""
    model, special = random_model(tiny_config(layers=3, **fields)), tokenizer.special
    with torch.no_grad():
        model.head.weight[[special["<|assistant_end|>"], tokenizer.bos]] = 0
        model.head.weight[[special["<|tool_start|>"], special["<|tool_end|>"]]] *= 6
    return model


def prompts_of(dice, tokenizer, longest):
    """Prompts without end. Half of them begin as an earlier one."""
    earlier = []
    while True:
        start = []
        if earlier and dice.random() < 0.5:
            whole = dice.choice(earlier[-3:])
            start = whole[: dice.randint(1, len(whole))]
        new = [dice.randrange(tokenizer.text_size) for _ in range(dice.randrange(longest))]
        prompt = ([*start, *new] or [tokenizer.bos])[:longest]
        earlier.append(prompt)
        yield prompt


def sampling_of(dice, context):
    choices = {
        "temperature": [0.0, 0.0, 0.7, 1.0], "top_k": [0, 5, 50], "max_tokens": [0, 1, 5, 20, context],
        "top_p": [1.0, 0.8], "min_p": [0.0, 0.02], "repetition_penalty": [1.0, 1.2],
        "presence_penalty": [0.0, 0.5], "logit_bias": [(), ((7, 3.0), (8, -100.0))], "seed": range(9),
    }  # fmt: skip
    return Sampling(**{name: dice.choice(of) for name, of in choices.items()})


def close(logprob, expected):
    return abs(logprob - float(expected)) <= TOLERANCE * (1 + abs(float(expected)))


def assert_is_the_plain_models(request, model, vocab_size):
    """Tokens, log-probabilities and alternatives of the prompt and of the answer."""
    ids = [*request.prompt, *(token.id for token in request.tokens)]
    logits = model(torch.tensor([ids]))[0]  # row i says what follows ids[: i + 1]
    logprobs, text = logits.log_softmax(-1), logits[:, :vocab_size]
    numbers, answer, settings = random.Random(request.sampling.seed), [], request.sampling
    for i, token in enumerate(request.tokens):
        row = len(request.prompt) + i - 1
        if token.sampled:
            number = 0.0 if is_greedy(settings) else numbers.random()
            draw = Draw(settings, number, request.prompt, answer)
            assert token.id == int(sample(text[row : row + 1], [draw]))
        answer.append(token.id)
    scored = list(enumerate(request.echoed, 0))[1:] + list(enumerate(request.tokens, len(request.prompt)))
    for place, token in scored:
        if request.logprobs is None and not request.echo:
            assert token.logprob is None and token.top == ()
            continue
        expected = logprobs[place - 1]
        assert close(token.logprob, expected[token.id])
        assert len(token.top) == (request.logprobs or 0)
        found, best = dict(token.top), expected[:vocab_size].topk(len(token.top)).values
        assert [*found.values()] == sorted(found.values(), reverse=True)
        assert all(map(close, found.values(), best))
        assert all(close(logprob, expected[id]) for id, logprob in found.items())
        if token.id in found:
            assert found[token.id] == token.logprob  # to the last bit: lm-eval compares them
    if request.echo and request.finish_reason != "cancelled":
        assert [token.id for token in request.echoed] == request.prompt
        assert request.echoed[0].logprob is None


@pytest.mark.parametrize("seed", range(12))
def test_all_that_is_said_is_what_the_plain_model_says(seed, random_model, tiny_tokenizer):
    """Arrivals, lengths, cancellations, chunk sizes, slots and shared beginnings are random."""
    dice, t = random.Random(seed), tiny_tokenizer
    long = seed % 3 == 0  # windows of 128 of a context of 512, so that slots are rings
    context, longest, wanted = (512, 400, 16) if long else (64, 50, 40)
    model = caller(random_model, t, context=context, kv_heads=1 + seed % 2)
    engine = Engine(model, t, slots=dice.choice([1, 2, 3, 6]), chunk=dice.choice([1, 5, 16, 64, 300]))
    prompts, requests, arrivals = prompts_of(dice, t, longest), [], dice.choice([0.05, 0.3, 0.9])
    while engine.busy or len(requests) < wanted:
        while len(requests) < wanted and dice.random() < arrivals:
            options = {"logprobs": dice.choice([None, 0, 3]), "echo": dice.random() < 0.2}
            requests.append(engine.add(next(prompts), sampling_of(dice, context), **options))
        if requests and dice.random() < 0.05:
            engine.cancel(dice.choice(requests))
        step = engine.step()
        assert len({id(request) for request, _ in step}) == len(step)
        assert sum(1 for r in engine.slots if r) + len(engine.sequences.free) == len(engine.slots)
        assert len(set(engine.sequences.free)) == len(engine.sequences.free)
    assert all(request.finish_reason for request in requests)
    assert sorted(engine.sequences.free) == list(range(len(engine.slots)))
    with torch.no_grad():
        for request in requests:
            assert_is_the_plain_models(request, model, t.vocab_size)
    assert any(request.cached for request in requests)
    assert any(not token.sampled for request in requests for token in request.tokens)  # results of calls


def test_nobody_waits_for_the_end_of_anothers_prompt(random_model, tiny_tokenizer):
    """While a prompt is read in chunks, every answer grows by a token in each step."""
    model = caller(random_model, tiny_tokenizer, context=512)
    engine = Engine(model, tiny_tokenizer, slots=4, chunk=10)
    short = [engine.add([tiny_tokenizer.bos, 5 + i], Sampling(1.0, max_tokens=100)) for i in range(2)]
    engine.step()
    long = engine.add([7] * 200, Sampling(0.0, max_tokens=5))
    for _ in range(19):
        assert {request for request, _ in engine.step()} == {r for r in short if not r.finish_reason}
        assert not long.tokens
    engine.step()
    assert len(long.tokens) == 1


def test_requests_that_begin_alike_read_the_beginning_once(random_model, tiny_tokenizer):
    """At once, and after the first has ended; each says what it says alone."""
    model, t = caller(random_model, tiny_tokenizer, context=512), tiny_tokenizer
    dice = random.Random(0)
    start = [dice.randrange(t.text_size) for _ in range(100)]
    prompts = [[*start, 5 + i] for i in range(4)]
    engine = Engine(model, t, slots=6, chunk=64)
    requests = [engine.add(prompt, Sampling(1.0, max_tokens=30, seed=3)) for prompt in prompts]
    while engine.busy:
        engine.step()
    assert [request.cached for request in requests] == [0, 96, 96, 96]
    talk = [*prompts[1], *requests[1].answer, 9, 9]
    again = engine.add(talk, Sampling(1.0, max_tokens=30, seed=3))
    while engine.busy:
        engine.step()
    assert again.cached == len(talk) // 16 * 16 - 16 * (len(talk) % 16 == 0) >= 112
    alone = Engine(model, t, slots=1)
    for request in (*requests, again):
        alone.forget()
        other = alone.add(request.prompt, request.sampling)
        while alone.busy:
            alone.step()
        assert other.tokens == request.tokens and other.cached == 0


def test_what_changed_weights_computed_is_not_reused_after_forget(random_model, tiny_tokenizer):
    model, prompt = caller(random_model, tiny_tokenizer), [5, 6, 7, 8] * 8
    engine, greedy = Engine(model, tiny_tokenizer, slots=2), Sampling(0.0, max_tokens=10)
    engine.complete([prompt], greedy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.1)
    engine.forget()
    fresh = Engine(model, tiny_tokenizer, slots=2).complete([prompt], greedy)
    assert engine.complete([prompt], greedy) == fresh


def test_the_same_tokens_at_another_place_are_not_a_prefix(random_model, tiny_tokenizer):
    model = caller(random_model, tiny_tokenizer)
    engine, greedy = Engine(model, tiny_tokenizer, slots=3), Sampling(0.0, max_tokens=3)
    block = list(range(20, 36))
    engine.complete([[*block, *block, 7]], greedy)
    request = engine.add([9, *block, *block], greedy)
    engine.step()
    assert request.cached == 0


def test_stop_strings_end_an_answer_and_are_not_in_it(random_model, tiny_tokenizer):
    """At any place, also inside of a token or over several; the text never shows the beginning of one."""
    model, t = caller(random_model, tiny_tokenizer), tiny_tokenizer
    dice, engine = random.Random(0), Engine(model, t, slots=2)
    free = Sampling(1.0, max_tokens=40, seed=1)
    whole = engine.add([t.bos, 5], free, tools={})
    while engine.busy:
        engine.step()
    for _ in range(60):
        start = dice.randrange(len(whole.text) - 4)
        found = [whole.text[start + i : start + i + dice.randint(1, 6)] for i in (0, 3)]
        stops = (*found, "never")
        request = engine.add([t.bos, 5], Sampling(1.0, max_tokens=40, seed=1, stop=stops), tools={})
        seen = [""]
        while engine.busy:
            engine.step()
            assert request.text.startswith(seen[-1])
            seen.append(request.text)
        _, end = min((whole.text.index(stop) + len(stop), whole.text.index(stop)) for stop in found)
        assert request.text == whole.text[:end] and request.finish_reason == "stop"
        assert request.answer == [token.id for token in request.tokens]


def test_a_prompt_alone_can_be_scored(random_model, tiny_tokenizer):
    """As long as the context, and of a single token."""
    model = caller(random_model, tiny_tokenizer)
    engine = Engine(model, tiny_tokenizer, slots=2, chunk=7)
    requests = [
        engine.add(ids, Sampling(max_tokens=0), logprobs=1, echo=True)
        for ids in ([5], [*range(5, 69)], [5, 6])
    ]
    while engine.busy:
        assert engine.step() == []
    assert [request.finish_reason for request in requests] == ["length"] * 3
    with torch.no_grad():
        for request in requests:
            assert request.tokens == []
            assert_is_the_plain_models(request, model, tiny_tokenizer.vocab_size)
    with pytest.raises(ValueError, match="65 tokens does not fit"):
        engine.add([5] * 65, Sampling(max_tokens=0))
