"""Sampling: each row by its own settings and number, and frequencies as the probabilities say."""

import math
import random

import pytest
import torch

from hotlap.common import gpu
from hotlap.model.sampling import Draw, Sampling, sample


def draw(logits, count=4000, prompt=(), answer=(), **fields):
    """`count` draws from one distribution, with evenly spread numbers."""
    settings = Sampling(**({"top_k": 0} | fields))
    draws = [Draw(settings, (i + 0.5) / count, prompt, answer) for i in range(count)]
    return sample(torch.tensor([logits]).expand(count, -1), draws)


def shares(drawn, size):
    return (torch.bincount(drawn, minlength=size) / len(drawn)).tolist()


def test_each_row_has_its_own_settings():
    dice = random.Random(0)
    logits = torch.tensor([0.5, 1.0, 0.0, 1.5])
    settings = [
        Sampling(0.0), Sampling(10.0, top_k=2), Sampling(1e-40), Sampling(10.0, top_k=0),
        Sampling(1.0, top_k=0, top_p=0.4), Sampling(1.0, top_k=3, min_p=0.3),
        Sampling(0.0, logit_bias=((2, 9.0),)),
    ]  # fmt: skip
    drawn = sample(logits.expand(7 * 500, -1), [Draw(s, dice.random()) for s in settings * 500])
    found = [set(drawn[i::7].tolist()) for i in range(7)]
    assert found == [{3}, {1, 3}, {3}, {0, 1, 2, 3}, {3}, {0, 1, 3}, {2}]


def test_a_row_does_not_depend_on_the_others():
    generator, dice = torch.Generator().manual_seed(0), random.Random(0)
    logits = 3 * torch.randn(64, 300, generator=generator)
    choices = {
        "temperature": [0.0, 0.7, 1.0, 2.0], "top_k": [0, 0, 3, 50, 400], "top_p": [1, 0.9, 0.3],
        "min_p": [0, 0, 0.1], "repetition_penalty": [1, 1, 1.3], "frequency_penalty": [0, 0.5],
        "logit_bias": [(), ((5, 8.0), (6, -100.0))],
    }  # fmt: skip
    settings = [Sampling(**{name: dice.choice(of) for name, of in choices.items()}) for _ in range(64)]
    draws = [Draw(s, dice.random(), [1, 2, 3], [4, 4, 5]) for s in settings]
    together = sample(logits, draws).tolist()
    assert together == [int(sample(logits[i : i + 1], [draws[i]])) for i in range(64)]
    order = dice.sample(range(64), 64)
    assert [together[i] for i in order] == sample(logits[order], [draws[i] for i in order]).tolist()


def test_temperature_zero_is_the_likeliest_and_so_is_almost_zero():
    for temperature in (0.0, 1e-300, 1e-40, 1e-6, 1e-3):
        assert set(draw([0.1, 3.0, -1e4, 2.5], temperature=temperature).tolist()) == {1}


@pytest.mark.parametrize(
    "k, expected", [(1, {3}), (2, {3, 1}), (3, {3, 1, 0}), (0, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_draws_the_k_likeliest(k, expected):
    assert set(draw([0.5, 1.0, 0.0, 1.5], temperature=1.0, top_k=k).tolist()) == expected


@pytest.mark.parametrize(
    "p, kept", [(0.0, 1), (0.39, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.91, 4), (1.0, 4)]
)
def test_top_p_draws_the_fewest_that_have_the_probability(p, kept):
    logits = [math.log(share) for share in (0.2, 0.4, 0.1, 0.3)]
    assert set(draw(logits, temperature=1.0, top_p=p).tolist()) == set([1, 3, 0, 2][:kept])


def test_top_p_counts_what_top_k_leaves():
    logits = [math.log(share) for share in (0.2, 0.4, 0.1, 0.3)]
    assert set(draw(logits, temperature=1.0, top_k=2, top_p=0.57).tolist()) == {1}  # 0.4 of 0.7
    assert set(draw(logits, temperature=1.0, top_k=2, top_p=0.58).tolist()) == {1, 3}


@pytest.mark.parametrize(
    "p, expected", [(0, {0, 1, 2, 3}), (0.2, {0, 1, 2, 3}), (0.3, {0, 1, 3}), (0.8, {1}), (1, {1})]
)
def test_min_p_is_a_share_of_the_likeliest(p, expected):
    logits = [math.log(share) for share in (0.2, 0.4, 0.1, 0.3)]
    assert set(draw(logits, temperature=1.0, min_p=p).tolist()) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [0, 2])
def test_frequencies_are_the_softmax_of_what_is_left(temperature, k):
    logits = torch.tensor([0.0, 1.0, 2.0])
    kept = logits if k == 0 else torch.tensor([-math.inf, 1.0, 2.0])
    found = shares(draw(logits.tolist(), temperature=temperature, top_k=k), 3)
    assert found == pytest.approx((kept / temperature).softmax(-1).tolist(), abs=1e-3)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_extreme_numbers_draw_tokens_that_have_a_probability(number):
    logits = torch.tensor([[-1e4, 0.0, 0.3, 0.1, -1e4]])
    assert int(sample(logits, [Draw(Sampling(1.0, 0), number)])) in (1, 2, 3)


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should_be():
    logits = torch.zeros(1, 100_000)
    logits[0, -1] = math.log(100_000)  # half of everything
    draws = [Draw(Sampling(1.0, 0), (i + 0.5) / 1000) for i in range(1000)]
    drawn = sample(logits.expand(1000, -1), draws)
    assert 495 <= int((drawn == 99_999).sum()) <= 505
    assert drawn[:490].tolist() == pytest.approx([200 * i + 100 for i in range(490)], abs=2)


def test_penalties_are_the_formulas():
    logits, prompt, answer = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.1]]), [0, 1], [3, 3, 0]
    settings = Sampling(
        1.0, 0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 1.5),)
    )
    expected = [2 / 2 - 0.5 - 0.25, -2.0, 0.5, 3 / 2 - 0.5 - 0.5, 1.6]
    count = 20_000
    draws = [Draw(settings, (i + 0.5) / count, prompt, answer) for i in range(count)]
    found = shares(sample(logits.expand(count, -1), draws), 5)
    assert found == pytest.approx(torch.tensor(expected).softmax(-1).tolist(), abs=1e-3)
    greedy = Sampling(0.0, 0, repetition_penalty=2.0, presence_penalty=2.0)
    assert int(sample(logits, [Draw(greedy, 0.0, prompt, answer)])) == 2


def test_a_bias_bans_and_forces():
    logits = [0.0, 1.0, 2.0]
    assert set(draw(logits, temperature=1.0, logit_bias=((2, -100.0),)).tolist()) == {0, 1}
    assert set(draw(logits, temperature=1.0, logit_bias=((0, 100.0),)).tolist()) == {0}


@pytest.mark.parametrize("device_types", [set(), {"cpu"}], ids=["float64", "float32"])
def test_the_highest_number_draws_an_id_of_the_vocabulary(monkeypatch, device_types):
    """Also on devices without float64, in which it rounds to 1."""
    monkeypatch.setattr(gpu, "NO_FLOAT64", device_types)
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(Sampling(temperature=1.0), 1 - 2**-53) for _ in logits]
    assert sample(logits, draws).max() < 50
