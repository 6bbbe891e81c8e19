"""The losses of preference pairs, against their formulas in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.train.config import DPOConfig
from hotlap.train.data.preference_rows import PairBatch
from hotlap.train.preference_losses import pair_loss

DPO = DPOConfig(sft_weight=0.0)
CONFIGS = [
    DPO,
    dataclasses.replace(DPO, loss="sigmoid_norm", beta=5.0),
    dataclasses.replace(DPO, loss="ipo", beta=0.2),
    dataclasses.replace(DPO, loss="apo_zero", beta=0.05),
    dataclasses.replace(DPO, loss="robust", label_smoothing=0.2),
    dataclasses.replace(DPO, sft_weight=0.7),
]
by_loss = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.loss + "+sft" * (c.sft_weight > 0))


class Table(nn.Module):
    """Acts as a model: the log-probability of each target is a parameter."""

    def __init__(self, logprobs: Tensor):
        super().__init__()
        self.logprobs = nn.Parameter(logprobs.clone())

    def forward(self, ids, targets, reduction, document_start):
        assert reduction == "none" and ids.shape == targets.shape == document_start.shape
        return (-self.logprobs).flatten() * (targets.flatten() != IGNORE)


def a_batch(B: int = 3, T: int = 24, P: int = 4) -> PairBatch:
    """Rows of one to P pairs, whose sides have other lengths."""
    random = torch.Generator().manual_seed(0)
    pair, targets = torch.full((B, 2, T), -1), torch.full((B, 2, T), IGNORE)
    numbers = torch.full((B, P), -1)
    for b in range(B):
        for p in range(P - b):
            numbers[b, p] = 10 * b + p
            for side in range(2):
                length = int(torch.randint(2, T // P + 1, (), generator=random))
                here = slice(p * T // P, p * T // P + length)
                pair[b, side, here], targets[b, side, p * T // P + 1 : here.stop] = p, 7
    reference = -torch.rand(B, 2, T, generator=random).where(targets != IGNORE, 0)
    empty = torch.zeros(B, 2, T, dtype=torch.int64)
    return PairBatch(empty, targets, empty, int((numbers >= 0).sum()), pair, reference, numbers)


def logprobs_of(batch: PairBatch) -> Tensor:
    noise = torch.randn(batch.reference.shape, generator=torch.Generator().manual_seed(1))
    return (batch.reference - noise.abs()).where(batch.targets != IGNORE, 0)


def plain_losses(logprobs: Tensor, batch: PairBatch, config: DPOConfig) -> list[Tensor]:
    """The formulas, pair by pair, as the papers have them."""
    found, beta, e = [], config.beta, config.label_smoothing
    for b, p in (batch.numbers >= 0).nonzero().tolist():
        r, n, log_pi = [], [], []
        for side in range(2):
            here = (batch.pair[b, side] == p) & (batch.targets[b, side] != IGNORE)
            n.append(here.sum())
            log_pi.append(logprobs[b, side][here].sum())
            r.append(log_pi[-1] - batch.reference[b, side][here].double().sum())

        def minus_log_sigmoid(x: Tensor) -> Tensor:
            return (1 + (-x).exp()).log()

        loss = {
            "sigmoid": lambda r=r: minus_log_sigmoid(beta * (r[0] - r[1])),
            "sigmoid_norm": lambda r=r, n=n: minus_log_sigmoid(beta * (r[0] / n[0] - r[1] / n[1])),
            "ipo": lambda r=r, n=n: (r[0] / n[0] - r[1] / n[1] - 1 / (2 * beta)) ** 2,
            "apo_zero": lambda r=r: 1 - 1 / (1 + (-beta * r[0]).exp()) + 1 / (1 + (-beta * r[1]).exp()),
            "robust": lambda m=beta * (r[0] - r[1]): (
                ((1 - e) * minus_log_sigmoid(m) - e * minus_log_sigmoid(-m)) / (1 - 2 * e)
            ),
        }[config.loss]()  # fmt: skip
        found.append(loss - config.sft_weight * log_pi[0] / n[0])
    return found


@by_loss
def test_loss_and_gradient_are_the_formula(config):
    batch = a_batch()
    model = Table(logprobs_of(batch))
    value, _ = pair_loss(model, batch, config)
    value.backward()
    exact = logprobs_of(batch).double().requires_grad_()
    wanted = sum(plain_losses(exact, batch, config))
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(model.logprobs.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert model.logprobs.grad[batch.targets == IGNORE].eq(0).all()


@by_loss
def test_swapping_the_answers_mirrors_accuracy_and_margin(config):
    batch = a_batch()
    logprobs = logprobs_of(batch)
    swap = lambda tensor: tensor.flip(1) if tensor.ndim == 3 else tensor  # noqa: E731
    _, there = pair_loss(Table(logprobs), batch, config)
    _, back = pair_loss(Table(logprobs.flip(1)), batch.change(swap), config)
    assert there["accuracy"] + back["accuracy"] == batch.weight and 0 < there["accuracy"] < batch.weight
    assert there["margin"].item() == pytest.approx(-back["margin"].item())
    assert there["chosen_reward"].item() == pytest.approx(back["rejected_reward"].item())
    assert there["chosen_tokens"] == back["rejected_tokens"] and there["kl"].item() == pytest.approx(
        back["kl"].item()
    )


@by_loss
def test_the_reference_itself_has_no_margin_and_a_known_loss(config):
    batch = a_batch()
    value, metrics = pair_loss(Table(batch.reference), batch, dataclasses.replace(config, sft_weight=0.0))
    n = batch.weight
    assert [metrics[name].item() for name in ("margin", "chosen_reward", "rejected_reward", "kl")] == [
        0,
        0,
        0,
        0,
    ]
    assert metrics["accuracy"].item() == n / 2
    known = {"ipo": 1 / (4 * config.beta**2), "apo_zero": 1.0}.get(config.loss, math.log(2))
    assert value.item() / n == pytest.approx(known, rel=1e-7)
    if config.loss.startswith("sigmoid"):
        assert torch.tensor(value.item() / n) == torch.tensor(math.log(2))


@pytest.mark.parametrize("loss", ["sigmoid_norm", "ipo"])
def test_losses_per_token_do_not_depend_on_the_length_of_an_answer(loss):
    """Twice as many tokens, each as much more likely as before."""
    config = dataclasses.replace(DPO, loss=loss)
    batch = a_batch(B=1, P=1, T=12)
    here = batch.pair >= 0
    even = (batch.reference + torch.tensor([0.3, -0.2])[None, :, None]).where(batch.targets != IGNORE, 0)
    longer = batch.change(lambda tensor: torch.cat((tensor, tensor), -1) if tensor.ndim == 3 else tensor)
    assert here.any()
    short = pair_loss(Table(even), batch, config)[0]
    long = pair_loss(Table(torch.cat((even, even), -1)), longer, config)[0]
    assert short.item() == pytest.approx(long.item(), rel=1e-6)
    assert (
        pair_loss(Table(even), batch, DPO)[0] > pair_loss(Table(torch.cat((even, even), -1)), longer, DPO)[0]
    )


def test_rows_add_up_whatever_they_are_batched_with():
    batch = a_batch()
    logprobs = logprobs_of(batch)
    whole, metrics = pair_loss(Table(logprobs), batch, DPO)
    parts = [
        pair_loss(Table(logprobs[b : b + 1]), batch.change(lambda t, b=b: t[b : b + 1]), DPO)
        for b in range(3)
    ]
    assert whole.item() == pytest.approx(sum(value.item() for value, _ in parts), rel=1e-12)
    for name, value in metrics.items():
        assert value.item() == pytest.approx(sum(found[name].item() for _, found in parts), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"beta": float("nan")}, "beta=nan must be positive"),
        ({"loss": "robust"}, "robust needs it above 0"),
        ({"label_smoothing": 0.1}, "loss=sigmoid with label_smoothing=0.1"),
        ({"loss": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5 must be from 0 to less than 0.5"),
        ({"sft_weight": -1.0}, "sft_weight=-1.0 must be 0"),
        ({"data": ()}, "no --data; name tasks"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        DPOConfig(**fields).validate()
