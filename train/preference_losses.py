"""Losses of preference pairs, with which a model learns from answers that are preferred to others.

A reward is how much more likely the model makes an answer than the reference does, the model that training
starts from: beta times the log ratio of the answer, the sum over its tokens of log pi - log pi_ref.
`sigmoid_norm` and `ipo` take the mean over its tokens instead. With the margin m, the reward of the chosen
answer minus that of the rejected one, and e = label_smoothing:

    sigmoid (DPO), sigmoid_norm    -log sigmoid(m)
    ipo                            ((m - 1/2) / beta)^2
    apo_zero                       sigmoid(-reward of the chosen) + sigmoid(reward of the rejected)
    robust                         (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e)
"""
# B rows, T tokens of a side, P pairs of a row

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.common.gpu import widest
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.model.transformer import Transformer
from hotlap.train.config import DPOConfig
from hotlap.train.data.preference_rows import PairBatch
from hotlap.train.losses import Loss

PER_TOKEN = ("sigmoid_norm", "ipo")  # whose rewards are means over an answer's tokens


def preference_loss(config: DPOConfig) -> Loss:
    """The loss function of a run, see losses.py: its sums are over pairs."""
    return partial(pair_loss, config=config)


def log_probabilities(model: Transformer, batch: PairBatch) -> Tensor:
    """Of each target, in nats: (B, 2, T) float32; 0 where there is none."""
    flat = (tensor.flatten(0, 1) for tensor in (batch.inputs, batch.targets, batch.document_start))
    inputs, targets, document_start = flat
    losses = model(inputs, targets, reduction="none", document_start=document_start)
    return -losses.view(batch.targets.shape)


def pair_loss(model: Transformer, batch: PairBatch, config: DPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the pairs, and sums to log. Those over an answer's tokens are means over them.

    Log ratios are taken token by token before anything is summed, so that they are exactly 0 while the model
    still is the reference.
    """
    logprobs = log_probabilities(model, batch)
    carries = batch.targets != IGNORE
    ratios = (logprobs - batch.reference).where(carries, 0.0)
    places = torch.arange(batch.numbers.shape[1], device=batch.pair.device)
    # (B, 2, P, T): sums under a mask always add in the same order, which index_add does not on a GPU
    members = (batch.pair[:, :, None] == places[:, None]) & carries[:, :, None]

    def total(values: Tensor) -> Tensor:
        """The sum over the answer's tokens of each pair, (B, 2, P)."""
        return torch.where(members, values[:, :, None], 0.0).sum(-1)

    lengths = members.sum(-1).clamp(min=1)
    rewards = config.beta * total(ratios)
    if config.loss in PER_TOKEN:
        rewards = rewards / lengths
    chosen, rejected = rewards.unbind(1)  # (B, P)
    losses = losses_of_rewards(chosen, rejected, config)
    nll = -(total(logprobs) / lengths)[:, 0]
    if config.sft_weight:
        losses = losses + config.sft_weight * nll
    exists = batch.numbers >= 0

    def over_pairs(values: Tensor) -> Tensor:
        # float64: the sum of equal losses divided by their number is that loss again
        return torch.where(exists, values, 0.0).sum(dtype=widest(values.device))

    with torch.no_grad():
        margin = chosen - rejected
        # half the square: the estimates with exp are for tokens that the model itself has drawn, and explode
        # on an answer that it has learned to avoid
        divergence = total(0.5 * ratios.square()) / lengths
        metrics = {
            "margin": over_pairs(margin),
            "accuracy": over_pairs((margin > 0) + 0.5 * (margin == 0)),
            "chosen_reward": over_pairs(chosen),
            "rejected_reward": over_pairs(rejected),
            "chosen_nll": over_pairs(nll),
            "kl": over_pairs(divergence.mean(1)),
            "chosen_tokens": over_pairs(lengths[:, 0]),
            "rejected_tokens": over_pairs(lengths[:, 1]),
        }
    return over_pairs(losses), metrics


def losses_of_rewards(chosen: Tensor, rejected: Tensor, config: DPOConfig) -> Tensor:
    """The loss of each pair, without the SFT term, in the shape of the rewards."""
    margin = chosen - rejected
    if config.loss in ("sigmoid", "sigmoid_norm"):
        return -F.logsigmoid(margin)
    if config.loss == "ipo":
        return ((margin - 0.5) / config.beta).square()
    if config.loss == "apo_zero":
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    assert config.loss == "robust", config.loss
    e = config.label_smoothing
    return (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)
