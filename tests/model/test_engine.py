"""Generation: the same tokens as the naive way, requests that come and go, and tools in the loop."""

import importlib
import logging

import pytest
import torch
from helpers.engine_functions import PROMPTS, whole_and_sharded_answers
from helpers.ranks import in_world, run_ranks
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.common.log import log
from hotlap.model.conversation import parse_answer, render, render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import train_characters

attention = importlib.import_module("hotlap.kernels.attention")
GREEDY = Sampling(temperature=0.0, max_tokens=20)


@pytest.fixture
def engine(random_model, tiny_tokenizer):
    """A random model whose table is padded by 20 ids, and that never writes a special token."""
    model = random_model(tiny_config(layers=3))
    with torch.no_grad():
        model.head.weight[tiny_tokenizer.text_size : tiny_tokenizer.vocab_size] = 0
        model.head.weight[tiny_tokenizer.vocab_size :] *= 100  # what padding says must not matter
    return Engine(model, tiny_tokenizer)


@pytest.fixture
def prompts(tiny_tokenizer):
    texts = ["", "The quick brown fox", "What is 2 + 3?", "dog"]
    return [[tiny_tokenizer.bos, *tiny_tokenizer.encode(text)] for text in texts]


def naive_greedy(engine, prompt, count):
    """The whole sequence through the model for each new token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = engine.model(torch.tensor([ids]))[0, -1, : engine.tokenizer.vocab_size]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def test_a_batch_generates_what_each_prompt_would_alone(engine, prompts):
    answers = engine.complete(prompts, GREEDY)
    assert answers == [naive_greedy(engine, prompt, 20) for prompt in prompts]
    assert answers == Engine(engine.model, engine.tokenizer, slots=3).complete(prompts, GREEDY)
    assert answers == [list(engine.generate(prompt, GREEDY)) for prompt in prompts]
    assert len(set(map(tuple, answers))) > 1


def test_requests_wait_for_a_slot_in_the_order_they_came(engine, prompts):
    engine = Engine(engine.model, engine.tokenizer, slots=2)
    requests = [engine.add(prompt, Sampling(max_tokens=5 + i)) for i, prompt in enumerate(prompts)]
    engine.cancel(requests[2])
    order = []
    while engine.busy:
        step = engine.step()
        assert 1 <= len(step) <= 2
        order += [r for r, _ in step if r not in order]
        assert len([r for r in requests if r.tokens and not r.finish_reason]) <= 2
    assert order == [requests[0], requests[1], requests[3]]
    assert [r.finish_reason for r in requests] == ["length", "length", "cancelled", "length"]
    assert [len(r.tokens) for r in requests] == [5, 6, 0, 8]
    assert engine.step() == []


def test_no_slots_is_an_error(engine):
    with pytest.raises(ValueError, match="slots=0"):
        Engine(engine.model, engine.tokenizer, slots=0)


@pytest.fixture
def caller(random_model, tiny_tokenizer):
    """A random model that often calls a tool, and seldom ends its answer."""
    model, special = random_model(tiny_config(layers=3, context=128)), tiny_tokenizer.special
    with torch.no_grad():
        model.head.weight[[special["<|assistant_end|>"], tiny_tokenizer.bos]] = 0
        model.head.weight[[special["<|tool_start|>"], special["<|tool_end|>"]]] *= 6
    return model


def test_log_probabilities_are_those_of_the_model_itself(caller, tiny_tokenizer):
    """Whatever the sampling, for forced tokens too; over the whole table; None where nobody asked."""
    engine = Engine(caller, tiny_tokenizer)
    sampling = Sampling(temperature=2.0, top_k=20, max_tokens=50, seed=2)
    asked = engine.add([tiny_tokenizer.bos, 5], sampling, logprobs=0)
    other = engine.add([tiny_tokenizer.bos, 6], sampling)
    while engine.busy:
        engine.step()
    ids = [*asked.prompt, *(token.id for token in asked.tokens)]
    with torch.no_grad():
        expected = caller(torch.tensor([ids[:-1]])).log_softmax(-1)[0, 1:]
    expected = expected[range(len(asked.tokens)), ids[2:]]
    torch.testing.assert_close(torch.tensor([token.logprob for token in asked.tokens]), expected)
    assert len({token.sampled for token in asked.tokens}) == 2
    assert all(token.logprob is None for token in other.tokens)


def test_prompts_of_a_batch_draw_different_answers(engine, prompts):
    answers = engine.complete([prompts[0]] * 4, Sampling(temperature=1.0, max_tokens=20, seed=3))
    assert len(set(map(tuple, answers))) == 4
    alone = Sampling(temperature=1.0, max_tokens=20, seed=5)
    assert answers[2] == engine.complete(prompts[:1], alone)[0]


def test_a_stream_that_is_closed_frees_its_slot(engine, prompts):
    stream = engine.generate(prompts[1], GREEDY)
    assert next(stream) == naive_greedy(engine, prompts[1], 1)[0] and engine.busy
    stream.close()
    assert not engine.busy


def test_nan_is_an_error_and_no_answer(engine, prompts):
    with torch.no_grad():
        engine.model.blocks[0].mlp.fc.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.complete(prompts, GREEDY)
    assert not engine.busy


def test_a_sharded_model_generates_what_the_whole_one_does():
    """Ranks have different numbers of prompts, which end after different numbers of tokens."""
    for rank, (whole, sharded) in enumerate(run_ranks(2, in_world, whole_and_sharded_answers)):
        assert sharded == whole and len(whole) == len(PROMPTS[rank])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 10.0])
def test_padding_of_the_table_is_never_drawn(engine, prompts, temperature):
    sampling = Sampling(temperature=temperature, top_k=0, max_tokens=40)
    drawn = {token for answer in engine.complete(prompts, sampling) for token in answer}
    assert max(drawn) < engine.tokenizer.vocab_size


def test_the_same_seed_draws_the_same_tokens(engine, prompts):
    one, other, third = (
        engine.complete(prompts, Sampling(temperature=1.0, max_tokens=20, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == other != third


def test_an_answer_ends_at_max_tokens_or_where_the_context_does(engine):
    short, long = [engine.tokenizer.bos], [5] * 60
    answers = engine.complete([short, long], Sampling(temperature=0.0, max_tokens=50))
    assert [len(a) for a in answers] == [50, 4]  # of a context of 64
    assert [len(a) for a in engine.complete([short, long], Sampling(temperature=0.0, max_tokens=1))] == [1, 1]
    assert len(engine.complete([[5] * 63], GREEDY)[0]) == 1


@pytest.mark.parametrize("prompt", [[], [5] * 64, [5] * 100])
def test_a_prompt_without_room_for_an_answer_is_refused(engine, prompt):
    with pytest.raises(ValueError, match=f"prompt of {len(prompt)} tokens .* context of 64"):
        engine.complete([[5], prompt], GREEDY)
    assert not engine.busy


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1), ("temperature", 11.0), ("temperature", float("nan")), ("top_k", -1),
        ("max_tokens", -1), ("top_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0),
        ("presence_penalty", 3.0), ("frequency_penalty", float("nan")), ("logit_bias", ((5, 101),)),
        ("stop", ("a", "")),
    ],
)  # fmt: skip
def test_sampling_that_cannot_be_is_named(engine, field, value):
    with pytest.raises(ValueError, match=field):
        engine.complete([[5]], Sampling(**{field: value}))


@pytest.mark.parametrize("mark", ["<|assistant_end|>", "<|bos|>"])
def test_an_answer_stops_at_its_end_and_others_go_on(mark, tiny_tokenizer):
    t = tiny_tokenizer
    said = t.encode("It is 5."), t.encode("A longer answer.")
    scripts = [script(3, [*said[0], t.special[mark]]), script(2, [*said[1], t.special["<|assistant_end|>"]])]
    model = ScriptedModel(tiny_config(), scripts, otherwise=7)
    answers = Engine(model, t).complete([[t.bos, 5, 6], [t.bos, 5]], Sampling(temperature=1.0, max_tokens=40))
    assert answers == list(said)
    assert model.fed == [[t.bos, 5, 6, *said[0]], [t.bos, 5, *said[1]]]  # nothing runs past an end


def test_a_call_gets_its_result_in_place(tiny_tokenizer):
    """The model's own wish, an end of its answer, does not count while the result is fed."""
    t = tiny_tokenizer
    prompt = render_prompt([{"role": "user", "content": "12*12?"}], t)
    function = {"name": "calculator", "arguments": {"expression": "12*12"}}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "144"},
        {"role": "assistant", "content": "It is 144."},
    ]
    whole, said = render([{"role": "user", "content": "12*12?"}, *answer], t)
    end = t.special["<|assistant_end|>"]
    own = {position: token for position, (token, by) in enumerate(zip(whole, said, strict=True)) if by}
    plain = script(1, t.encode("no call"))
    model = ScriptedModel(tiny_config(), [own, plain], otherwise=end)
    engine = Engine(model, t)
    called, other = (engine.add(ids, Sampling(0.0, max_tokens=50)) for ids in (prompt, [t.bos]))
    while engine.busy:
        engine.step()
    assert [*prompt, *called.answer, end] == whole and other.answer == t.encode("no call")
    assert [token.sampled for token in called.tokens] == said[len(prompt) :]  # what carries loss
    assert called.finish_reason == "stop" and called.tokens[-1].id == end
    assert parse_answer(called.answer, t) == answer
    assert spoken(called.answer, t) == "It is 144."
    assert model.fed[0] == whole[:-1]


def test_each_request_has_its_own_tools(tiny_tokenizer):
    t = tiny_tokenizer
    call = [t.special["<|tool_start|>"], *t.encode("9*9"), t.special["<|tool_end|>"]]
    model = ScriptedModel(tiny_config(), [script(1, call)] * 3, otherwise=t.special["<|assistant_end|>"])
    engine, asked = Engine(model, t), []
    tools = ({}, {"calculator": lambda text: f"{text}!"}, {"calculator": str.title, "python": asked.append})
    requests = [engine.add([t.bos], GREEDY, table) for table in tools]
    while engine.busy:
        engine.step()
    results = [request.answer[len(call) :] for request in requests]
    marks = t.special["<|result_start|>"], t.special["<|result_end|>"]
    assert results == [[]] + [[marks[0], *t.encode(text), marks[1]] for text in ("9*9!", "9*9")]
    assert asked == []


def test_a_result_that_cannot_be_spelt_is_empty_and_other_requests_go_on(caplog):
    t = train_characters("89*hi")  # without the 1 of 81, and without the letters of an error
    start, end = ([t.special[f"<|{part}_{at}|>"] for part in ("tool", "result")] for at in ("start", "end"))
    calls = [[start[0], *t.encode(text), end[0]] for text in ("9*9", "*")]
    scripts = [script(1, call) | script(1 + len(call) + 2, t.encode("hi")) for call in calls]
    scripts.append(script(1, t.encode("hihihihi")))
    model = ScriptedModel(tiny_config(), scripts, otherwise=t.special["<|assistant_end|>"])
    with caplog.at_level("WARNING", "hotlap"):
        answers = Engine(model, t).complete([[t.bos]] * 3, GREEDY)
    assert answers == [[*call, start[1], end[1], *t.encode("hi")] for call in calls] + [t.encode("hihihihi")]
    assert caplog.text.count("a tool's result stays empty") == 1


def test_a_result_that_does_not_fit_is_cut(tiny_tokenizer):
    t = tiny_tokenizer
    call = [t.special["<|tool_start|>"], *t.encode("9*9"), t.special["<|tool_end|>"]]
    model = ScriptedModel(tiny_config(), [script(1, call)], otherwise=t.special["<|assistant_end|>"])
    answer = Engine(model, t).complete([[t.bos]], Sampling(temperature=0.0, max_tokens=len(call) + 1))
    assert answer == [[*call, t.special["<|result_start|>"]]]


@pytest.mark.parametrize("call", ["tool_start 2+3", "tool_start 2+3 tool_end", "tool_end"])
def test_a_call_in_the_prompt_is_not_run(call, tiny_tokenizer):
    """Nor is one that the prompt began and the model ends, nor an end without a beginning."""
    t = tiny_tokenizer
    prompt = [t.bos]
    for piece in call.split():
        prompt += [t.special[f"<|{piece}|>"]] if "tool" in piece else t.encode(piece)
    end = [t.special["<|tool_end|>"], t.special["<|assistant_end|>"]]
    model = ScriptedModel(tiny_config(), [script(len(prompt), end)], otherwise=7)
    assert Engine(model, t).complete([prompt], GREEDY) == [end[:1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's choices")
def test_kernels_are_chosen_and_logged_before_the_first_prompt(engine, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "hotlap")
    monkeypatch.setattr(attention, "fastest", lambda question, candidates: log.info(question) or "blockwise")
    attention._choose.cache_clear()
    attention._report.cache_clear()
    engine.choose_kernels()
    assert "attention: blockwise" in caplog.text
    caplog.clear()
    for tokens in (2, 9, engine.model.config.context - 1):
        engine.complete([[engine.tokenizer.bos] * tokens], Sampling(max_tokens=1))
    assert not caplog.records
    attention._choose.cache_clear()
    attention._report.cache_clear()
