"""Policy-gradient losses of sampled answers, whose rewards are compared within groups.

A is an answer's advantage: its reward minus the mean of its group, the answers to the same question. rho is
the ratio of a token's probability to that under the policy that sampled it, pi / pi_old. The loss of a token:

    dapo, dr_grpo    -min(rho A, clip(rho) A)
    gspo             the same, with one rho an answer: exp(mean over its tokens of log pi - log pi_old)
    cispo            -min(rho, 1 + clip_high) A log pi, without a gradient through the ratio

clip(rho) keeps it from 1 - clip_low to 1 + clip_high. With one update for each set of answers, rho is exactly
1, and all of them are the plain policy gradient. They differ in how tokens add up, too: dapo and cispo divide
the sum over all tokens of a step by their number, dr_grpo by the number of answers times max_tokens, and gspo
takes the mean over each answer first.

DAPO: Yu et al. 2025, arXiv:2503.14476. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783. GSPO: Zheng et al. 2025,
arXiv:2507.18071. CISPO: MiniMax 2025, arXiv:2506.13585. The divergence from the reference is Schulman's k3,
times the ratio, so that its gradient is that of the divergence.
"""
# B answers, T tokens, F facts

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hotlap.common.gpu import widest
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.transformer import Transformer
from hotlap.train.data.rows import Batch
from hotlap.train.losses import Loss
from hotlap.train.rl_config import RLConfig

# What is logged of each answer, as a mean over a step's.
FACTS = ("reward", "answer_tokens", "cut_off", "tool_calls", "failed_rewards", "equal_groups")


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """Rows of one sampled answer each, after its prompt. targets: the sampled tokens; neither the prompt nor
    what tools said. weight: the number of answers.
    """

    advantage: Tensor
    """(B,) float32."""
    share: Tensor
    """(B,) float32: the factor of each token's loss. The sum over tokens and rows, divided by the number of
    answers, is the loss of the step."""
    token_share: Tensor
    """(B,) float32: the same for means over all tokens of a step."""
    sampler: Tensor
    """(B, T) float32: the log-probability of each target as the engine sampled it, in nats."""
    old: Tensor
    """(B, T) float32: the same by a training pass with the weights that it was sampled with, if `stored`."""
    reference: Tensor
    """(B, T) float32: the same by the base, for the divergence from it."""
    facts: Tensor
    """(B, F) float32: see FACTS."""
    stored: bool
    """Whether `old` is filled; else this is the first and only update, and it is the policy's own."""


def policy_loss(config: RLConfig) -> Loss:
    """The loss function of a run, see losses.py: its sums are over answers."""
    return partial(answer_loss, config=config)


def log_probabilities(model: Transformer, batch: Batch) -> Tensor:
    """Of each target, in nats: (B, T) float32; 0 where there is none."""
    return -model(batch.inputs, batch.targets, reduction="none").view(batch.targets.shape)


def answer_loss(model: Transformer, batch: AnswerBatch, config: RLConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the answers, and sums to log. Those over tokens are means over a step's tokens."""
    logprobs = log_probabilities(model, batch)
    active = batch.targets != IGNORE
    old = batch.old if batch.stored else logprobs.detach()
    log_ratio = (logprobs - old).where(active, 0.0)
    losses, clipped = token_losses(logprobs, log_ratio, batch.advantage[:, None], active, config)
    if config.kl:
        divergence = log_ratio.exp() * k3(batch.reference - logprobs)
        losses = losses + config.kl * divergence

    def total(values: Tensor, share: Tensor) -> Tensor:
        return (values * share[:, None]).where(active, 0.0).sum(dtype=widest(values.device))

    with torch.no_grad():
        # float64: half the square of the small differences that are looked for is nothing in float32
        mismatch = k3((logprobs - batch.sampler).to(widest(logprobs.device)))
        metrics = {name: batch.facts[:, i].sum() for i, name in enumerate(FACTS)} | {
            "entropy": total(-logprobs, batch.token_share),
            "engine_kl": total(mismatch, batch.token_share),
            "clipped": total(clipped.float(), batch.token_share),
        }
        if config.kl:
            metrics["kl"] = total(divergence, batch.token_share)
    return total(losses, batch.share), metrics


def token_losses(
    logprobs: Tensor, log_ratio: Tensor, advantage: Tensor, active: Tensor, config: RLConfig
) -> tuple[Tensor, Tensor]:
    """The loss of each token (B, T), and whether clipping took its gradient. advantage: (B, 1)."""
    low, high = config.clips
    if config.loss == "gspo":
        count = active.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / count).expand_as(log_ratio)
    ratio = log_ratio.exp()
    above = (ratio > 1 + high) & bool(high)
    if config.loss == "cispo":
        bounded = ratio.detach().clamp(max=1 + high) if high else ratio.detach()
        return -bounded * advantage * logprobs, above  # which keep a gradient, bounded
    clipped = above & (advantage > 0) | (ratio < 1 - low) & bool(low) & (advantage < 0)
    bounded = ratio.clamp(1 - low if low else None, 1 + high if high else float("inf"))
    return -torch.minimum(ratio * advantage, bounded * advantage), clipped


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1, which is never negative: of x = log q - log p for samples of p, the mean is the
    divergence of p from q (http://joschu.net/blog/kl-approx.html).
    """
    return log_ratio.expm1() - log_ratio
