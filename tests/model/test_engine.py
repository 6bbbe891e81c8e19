"""Generation: the same tokens as the naive way, and the calculator in the loop."""

import pytest
import torch
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.model.conversation import parse_answer, render, render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling, sample

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
    assert answers == engine.complete(prompts, GREEDY, batch=3)
    assert len(set(map(tuple, answers))) > 1


def test_steps_come_one_token_a_prompt_at_a_time(engine, prompts):
    for step in engine.generate(prompts, GREEDY):
        assert [i for i, _ in step] == [0, 1, 2, 3]


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


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1), ("temperature", 11.0), ("temperature", float("nan")), ("top_k", -1),
        ("max_tokens", 0),
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
    called, other = engine.complete([prompt, [t.bos]], Sampling(temperature=0.0, max_tokens=50))
    assert [*prompt, *called, end] == whole and other == t.encode("no call")
    assert parse_answer(called, t) == answer
    assert engine.spoken(called) == "It is 144."
    assert model.fed[0] == whole[:-1]


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


def draw(logits, count=4000, **fields):
    generator = torch.Generator().manual_seed(0)
    return sample(torch.tensor([logits]).expand(count, -1), Sampling(**fields), generator)


def test_temperature_zero_is_the_likeliest_and_so_is_almost_zero():
    for temperature in (0.0, 1e-300, 1e-40, 1e-6, 1e-3):
        assert set(draw([0.1, 3.0, -1e4, 2.5], temperature=temperature).tolist()) == {1}


@pytest.mark.parametrize(
    "k, expected", [(1, {3}), (2, {3, 1}), (3, {3, 1, 0}), (0, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_draws_the_k_likeliest(k, expected):
    assert set(draw([0.5, 1.0, 0.0, 1.5], temperature=1.0, top_k=k).tolist()) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = [0.0, 1.0, 2.0]
    counts = torch.bincount(draw(logits, 20_000, temperature=temperature, top_k=0), minlength=3) / 20_000
    expected = (torch.tensor(logits) / temperature).softmax(-1)
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.015)
