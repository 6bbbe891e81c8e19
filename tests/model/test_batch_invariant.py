"""In the batch-invariant mode, the engine and a training pass give every token the same bits."""

import random

import pytest
import torch
from helpers.adapters import PLAIN, adapted
from helpers.tools import tiny_config

from hotlap.kernels.batch_invariant import batch_invariant
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels in C are of CPUs")

LONG = {"context": 512, "layers": 3}  # windows of 128
SHAPES = {
    "every extra": {},
    "no extra": PLAIN,
    "grouped heads": {"width": 128, "heads": 4, "kv_heads": 2, "layers": 3},
    "one head for all": {"width": 128, "heads": 4, "kv_heads": 1, "softcap": 0.0},
    "heads of 80, vocabulary of 301": {"width": 160, "vocab_size": 301},
    "rings that wrap": LONG,
    "rings that wrap, grouped heads": {**LONG, "kv_heads": 1, "smear": False, "backout": False},
}


@pytest.fixture(autouse=True)
def c_kernels(choose_kernels):
    choose_kernels("c")


@pytest.fixture(params=[0, 1])
def seed(request):
    """With one more thread than that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + request.param)
    yield request.param
    torch.set_num_threads(before)


def prompts_of(dice, tokenizer, count, longest):
    """Half of them begin as an earlier one."""
    prompts = []
    for _ in range(count):
        start = dice.choice(prompts) if prompts and dice.random() < 0.5 else []
        start = start[: dice.randint(0, len(start))]
        new = [dice.randrange(tokenizer.text_size) for _ in range(dice.randrange(longest))]
        prompts.append(([*start, *new] or [tokenizer.bos])[:longest])
    return prompts


def answered(model, tokenizer, dice, count, longest):
    """Requests that came at random times and were answered together."""
    chunk = dice.choice([16, 64, 300] if longest > 100 else [1, 5, 64])
    engine = Engine(model, tokenizer, slots=dice.choice([1, 3, 7, 20]), chunk=chunk)
    prompts, requests = prompts_of(dice, tokenizer, count, longest), []
    arrivals = dice.choice([0.1, 0.5, 0.9])
    while engine.busy or prompts:
        while prompts and dice.random() < arrivals:
            sampling = Sampling(1.0, max_tokens=dice.choice([1, 5, 40, 200]), seed=dice.randrange(99))
            options = {"logprobs": dice.choice([0, 3]), "echo": dice.random() < 0.3}
            requests.append(engine.add(prompts.pop(), sampling, **options))
        with batch_invariant():
            engine.step()
    return requests


def training_logprobs(model, rows):
    """Those of every token of each row but its first, of one batch with gradients."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    with batch_invariant():
        losses = model(ids[:, :-1], ids[:, 1:], reduction="none")
    assert losses.requires_grad
    return [
        (-part[: len(row) - 1]).tolist() for part, row in zip(losses.view(len(rows), -1), rows, strict=True)
    ]


def assert_equal_bits(requests, logprobs):
    """logprobs: of each request's prompt and answer, from its second token on."""
    for request, found in zip(requests, logprobs, strict=True):
        start = len(request.prompt) - 1
        assert [token.logprob for token in request.tokens] == found[start:]
        if request.echo:
            assert [token.logprob for token in request.echoed[1:]] == found[:start]
        for token in (*request.tokens, *request.echoed[1:]):
            if token.id in dict(token.top):
                assert dict(token.top)[token.id] == token.logprob


def rows_of(requests):
    return [[*request.prompt, *(token.id for token in request.tokens)] for request in requests]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_training_pass_gives_the_engines_logprobs(seed, shape, lora, random_model, tiny_tokenizer):
    dice, fields = random.Random(f"{seed} {shape} {lora}"), SHAPES[shape]
    model = random_model(tiny_config(**fields), seed)
    model = adapted(model) if lora else model
    count, longest = (5, 400) if "context" in fields else (12, 50)
    requests = answered(model, tiny_tokenizer, dice, count, longest)
    dice.shuffle(requests)
    rows = rows_of(requests)
    assert_equal_bits(requests, training_logprobs(model, rows))  # as one batch
    longer = [row for row in rows if len(row) > 1]
    for row in longer[:3]:  # and alone
        assert_equal_bits([requests[rows.index(row)]], training_logprobs(model, [row]))


def test_without_the_mode_they_differ_in_the_last_bits(random_model, tiny_tokenizer):
    """So the test above could fail."""
    model = random_model(tiny_config())
    engine = Engine(model, tiny_tokenizer)
    request = engine.add([5, 6, 7, 8], Sampling(1.0, max_tokens=40), logprobs=0)
    while engine.busy:
        engine.step()
    (row,) = rows_of([request])
    expected, given = training_logprobs(model, [row])[0][3:], [token.logprob for token in request.tokens]
    assert expected != given and given == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("shape", ["every extra", "grouped heads"])
def test_gradients_are_those_without_the_mode(shape, lora, random_model):
    model = random_model(tiny_config(**SHAPES[shape]))
    model = adapted(model) if lora else model
    ids = torch.randint(320, (3, 41), generator=torch.Generator().manual_seed(0))
    factors = torch.randn(120, generator=torch.Generator().manual_seed(1))  # as of a policy gradient
    starts = torch.tensor([[0] * 40, [0] * 15 + [15] * 25, [0] * 40])
    parameters, found = [p for p in model.parameters() if p.requires_grad], []
    for on in (True, False):
        with batch_invariant(on):
            losses = model(ids[:, :-1], ids[:, 1:], reduction="none", document_start=starts)
            found.append(torch.autograd.grad(losses @ factors, parameters))
    largest = max(float(plain.norm()) for plain in found[1])  # some gradients nearly cancel
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() < 1e-4 * plain.norm() + 1e-6 * largest
    assert not all(map(torch.equal, *found))  # the mode was on


def test_bfloat16_has_equal_bits_too(random_model, tiny_tokenizer):
    model = random_model(tiny_config(), compute_dtype=torch.bfloat16)
    requests = answered(model, tiny_tokenizer, random.Random(0), 20, 50)
    assert_equal_bits(requests, training_logprobs(model, rows_of(requests)))


def test_each_row_of_a_batch_has_the_bits_that_it_has_alone(random_model):
    """Logits, wherever the row stands, and whatever follows."""
    model = random_model(tiny_config())
    ids = torch.randint(320, (5, 33), generator=torch.Generator().manual_seed(0))
    with batch_invariant():
        logits = model(ids)
        for row in range(5):
            for length in (1, 20, 33):
                assert torch.equal(model(ids[row : row + 1, :length])[0], logits[row, :length])
