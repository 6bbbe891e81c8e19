"""Policy-gradient losses, against gradients that can be written down."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.train.policy_losses import FACTS, AnswerBatch, answer_loss, k3
from hotlap.train.rl_config import CLIPS, RLConfig

LOSSES = list(CLIPS)


class Arms(nn.Module):
    """A policy that picks arm 0 or 1 at every place, with the same logits: pi(1) = sigmoid(x)."""

    def __init__(self, x: float):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x, dtype=torch.float64))

    def forward(self, inputs, targets, reduction):
        assert reduction == "none"
        logprobs = nn.functional.logsigmoid(torch.stack((-self.x, self.x)))
        return -torch.where(targets == IGNORE, 0.0, logprobs[targets.clamp(min=0)]).flatten()


def config_of(**fields) -> RLConfig:
    return dataclasses.replace(RLConfig(), max_tokens=4, **fields)


def batch_of(targets, advantage, share, old=None, reference=None) -> AnswerBatch:
    targets = torch.tensor(targets)
    B, T = targets.shape
    zeros = torch.zeros(B, T, dtype=torch.float64)
    count = int((targets != IGNORE).sum())
    return AnswerBatch(
        torch.zeros_like(targets), targets, torch.zeros_like(targets), B,
        torch.tensor(advantage, dtype=torch.float64), torch.tensor(share, dtype=torch.float64),
        token_share=torch.full((B,), B / count), sampler=zeros,
        old=zeros if old is None else torch.tensor(old, dtype=torch.float64),
        reference=zeros if reference is None else torch.tensor(reference, dtype=torch.float64),
        facts=torch.zeros(B, len(FACTS)), stored=old is not None,
    )  # fmt: skip


def gradient(policy: Arms, batch: AnswerBatch, config: RLConfig) -> float:
    value, _ = answer_loss(policy, batch, config)
    (found,) = torch.autograd.grad(value / batch.weight, policy.x)
    return found.item()


def score(arm: int, x: float) -> float:
    """The derivative of log pi(arm) by x."""
    p = 1 / (1 + math.exp(-x))
    return 1 - p if arm else -p


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("x", [0.0, 0.7, -1.3])
def test_the_expected_gradient_of_one_update_is_that_of_the_expected_reward(loss, x):
    """Arm 1 pays 1, arm 0 nothing, so the expected reward is p and its derivative p (1 - p). All pairs of two
    answers of one token, each weighted by its probability: the mean of a pair's rewards takes half off.
    """
    p = 1 / (1 + math.exp(-x))
    config, expected = config_of(loss=loss), 0.0
    share = 1 / config.max_tokens if loss == "dr_grpo" else 1.0
    for arms in ((0, 0), (0, 1), (1, 0), (1, 1)):
        advantage = [arm - sum(arms) / 2 for arm in arms]
        batch = batch_of([[arm] for arm in arms], advantage, [share] * 2)
        probability = math.prod(p if arm else 1 - p for arm in arms)
        expected += probability * gradient(Arms(x), batch, config)
    assert expected == pytest.approx(-share * p * (1 - p) / 2, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_ratio_scales_the_gradient_until_it_is_clipped(loss):
    """Two answers: 1 1 with advantage 1, and 0 0 with -1. The old policy had x0, the new one has x."""
    low, high = CLIPS[loss]
    for x0, x in ((0.0, 0.0), (0.0, 1e-4), (0.0, 0.3), (0.0, 2.0), (0.0, 5.0), (0.5, 0.2)):
        log = [lambda arm, at=at: math.log(1 / (1 + math.exp(-at if arm else at))) for at in (x0, x)]
        old = [[log[0](1)] * 2, [log[0](0)] * 2]
        config = config_of(loss=loss, updates=2)
        share = {"dr_grpo": 1 / config.max_tokens, "gspo": 1 / 2}.get(loss, 2 / 4)
        found = gradient(Arms(x), batch_of([[1, 1], [0, 0]], [1.0, -1.0], [share] * 2, old), config)
        expected = 0.0
        for arm, advantage in ((1, 1.0), (0, -1.0)):
            ratio = math.exp(log[1](arm) - log[0](arm))  # of gspo's answers, too: their tokens are equal
            if loss == "cispo":
                kept = min(ratio, 1 + high)
            else:
                clipped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
                kept = 0.0 if clipped else ratio
            expected += -share * 2 * kept * advantage * score(arm, x) / 2
        assert found == pytest.approx(expected, abs=1e-12), (x0, x)


def test_gspo_has_one_ratio_for_all_tokens_of_an_answer():
    """Tokens 1 and 0 of one answer: the mean of their log ratios decides, with a gradient through both."""
    x0, x = 0.0, 1e-4
    p0, p = (1 / (1 + math.exp(-at)) for at in (x0, x))
    old = [[math.log(p0), math.log(1 - p0)]]
    found = gradient(Arms(x), batch_of([[1, 0]], [1.0], [1 / 2], old), config_of(loss="gspo", updates=2))
    ratio = math.exp((math.log(p / p0) + math.log((1 - p) / (1 - p0))) / 2)
    assert found == pytest.approx(-ratio * (score(1, x) + score(0, x)) / 2, abs=1e-12)


def test_without_clipping_every_ratio_keeps_its_gradient():
    batch = batch_of([[1]], [1.0], [1.0], [[math.log(0.01)]])
    free = config_of(updates=2, clip_low=0.0, clip_high=0.0)
    p = 0.5
    assert gradient(Arms(0.0), batch, free) == pytest.approx(-(p / 0.01) * (1 - p))
    assert gradient(Arms(0.0), batch, config_of(updates=2)) == 0.0


def test_the_divergence_pulls_back_to_the_reference():
    """The expectation of k3 times the ratio over the policy's own tokens has the gradient of the divergence,
    which is p (1 - p) (x - y) for a reference with logits y.
    """
    x, y = 0.8, -0.4
    p = 1 / (1 + math.exp(-x))
    expected = 0.0
    for arm in (0, 1):
        reference = math.log(1 / (1 + math.exp(-y if arm else y)))
        batch = batch_of([[arm]], [0.0], [1.0], reference=[[reference]])
        expected += (p if arm else 1 - p) * gradient(Arms(x), batch, config_of(kl=0.3))
    assert expected == pytest.approx(0.3 * p * (1 - p) * (x - y), abs=1e-12)


def test_k3_is_never_negative_and_zero_only_for_equal_probabilities():
    x = torch.cat((torch.linspace(-3, -0.1, 30), torch.linspace(0.1, 3, 30))).double()
    assert (k3(x) > 0).all() and k3(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_that_were_not_sampled_carry_no_gradient(loss):
    """What tools said, prompts, and answers whose reward failed."""
    config = config_of(loss=loss)
    with_tool = batch_of([[1, IGNORE, 0], [0, 0, IGNORE]], [0.5, -0.5], [0.5, 0.5])
    without = batch_of([[1, 0, IGNORE], [0, 0, IGNORE]], [0.5, -0.5], [0.5, 0.5])
    assert gradient(Arms(0.3), with_tool, config) == pytest.approx(gradient(Arms(0.3), without, config))
    failed = batch_of([[1, 0], [IGNORE, IGNORE]], [0.5, 0.0], [0.5, 0.5])
    alone = batch_of([[1, 0]], [0.5], [0.5])
    assert gradient(Arms(0.3), failed, config) == pytest.approx(gradient(Arms(0.3), alone, config) / 2)


def test_the_mismatch_of_engine_and_trainer_is_seen_where_it_is_small():
    """1e-6 of log-probability is 5e-13 of divergence, which float32 would round to nothing or to 1e-7."""
    batch = batch_of([[1]], [0.0], [1.0])
    policy = Arms(0.0)
    engine = torch.full((1, 1), math.log(0.5) - 1e-6, dtype=torch.float64)
    _, metrics = answer_loss(policy, dataclasses.replace(batch, sampler=engine), config_of())
    assert metrics["engine_kl"].item() == pytest.approx(5e-13, rel=1e-3)
    same = -policy(None, batch.targets, "none").detach().view(1, 1)
    _, metrics = answer_loss(policy, dataclasses.replace(batch, sampler=same), config_of())
    assert metrics["engine_kl"].item() == 0.0
