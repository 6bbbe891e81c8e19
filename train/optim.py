"""Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

Groups, rates and betas are nanochat's. Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.adamw import adamw

from hotlap.kernels.dispatch import fast_dtype
from hotlap.kernels.muon import muon_apply, muon_momentum
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.model.gpt import GPT

ADAM_EPS = 1e-10
MUON_BETA2 = 0.9


@dataclass(frozen=True)
class OptimConfig:
    """Peak learning rates and weight decay. `train.schedule` scales them over the run."""

    matrix_lr: float = 0.02
    """Muon, for the matrices of the blocks."""
    embedding_lr: float = 0.3
    """AdamW, for the token embedding; value embeddings take half of it."""
    head_lr: float = 0.008
    """AdamW, for the output head."""
    scalar_lr: float = 0.5
    """AdamW, for the x0 scalars; the residual scalars take a hundredth of it."""
    weight_decay: float = 0.28
    """Cautious weight decay of the matrices, as a share per unit of learning rate."""

    def validate(self) -> OptimConfig:
        for name in ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more")
        return self


def parameter_groups(model: GPT, config: OptimConfig) -> list[dict]:
    """The parameters of the model by name, in the groups that share a rule."""
    adamw_rate = (model.config.width / 768) ** -0.5  # rates were tuned at 768 wide
    groups: dict[str, dict] = {
        "embedding": {
            "lr": config.embedding_lr * adamw_rate,
            "betas": (0.8, 0.995),
            "weight_decay": 0.001,
        },
        "value_embeddings": {
            "lr": config.embedding_lr / 2 * adamw_rate,
            "betas": (0.8, 0.995),
            "weight_decay": 0.01,
        },
        "head": {"lr": config.head_lr * adamw_rate, "betas": (0.8, 0.96), "weight_decay": 0.01},
        "residual_scale": {
            "lr": config.scalar_lr / 100,
            "betas": (0.8, 0.95),
            "weight_decay": 0.05,
        },
        "x0_scale": {"lr": config.scalar_lr, "betas": (0.96, 0.95), "weight_decay": 0.0},
        "smear": {"lr": 0.2, "betas": (0.8, 0.95), "weight_decay": 0.0},
        "backout": {"lr": 0.2, "betas": (0.8, 0.95), "weight_decay": 0.0},
    }
    members: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            members[f"muon {tuple(parameter.shape)}"].append((name, parameter))
        else:
            members[next(key for key in groups if name.startswith(key))].append((name, parameter))
    result = []
    for key, named in members.items():
        rule = groups.get(key) or {"lr": config.matrix_lr, "weight_decay": config.weight_decay}
        names, parameters = zip(*named, strict=True)
        result.append(
            {
                "params": list(parameters),
                "names": names,
                "muon": key.startswith("muon"),
                "peak_lr": rule["lr"],
                "peak_weight_decay": rule["weight_decay"],
                **rule,
            }
        )
    return result


class MuonAdamW(torch.optim.Optimizer):
    """One step of Muon or AdamW for each group. `momentum` applies to the Muon groups and may be changed.

    State is created here, not at the first step, so that every rank and every checkpoint has the same keys.
    """

    def __init__(self, model: GPT, config: OptimConfig):
        super().__init__(parameter_groups(model, config.validate()), {})
        self.momentum = 0.95
        self.steps = 0
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not group["muon"]:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                    state["step"] = torch.zeros((), device=parameter.device)
                    continue
                if i == 0:  # one buffer a group: the batch is the state, and each parameter has a view of it
                    count, (M, N) = len(group["params"]), parameter.shape
                    momentum = parameter.new_zeros(count, M, N)
                    second = parameter.new_zeros((count, M, 1) if M >= N else (count, 1, N))
                    group["momentum_buffer"], group["second_moment"] = momentum, second
                state["momentum"], state["second_moment"] = momentum[i], second[i]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            self._muon(group) if group["muon"] else self._adamw(group)

    def _muon(self, group: dict) -> None:
        weights = group["params"]
        M, N = weights[0].shape
        device = weights[0].device
        scalar = lambda value: torch.tensor(value, device=device)  # noqa: E731
        grad = torch.stack([w.grad for w in weights])  # (G, M, N)
        update = muon_momentum(grad, group["momentum_buffer"], scalar(self.momentum))
        update = orthogonalize(update.to(fast_dtype(device.type)))
        stacked = torch.stack(list(weights))
        lr = group["lr"] * max(1, M / N) ** 0.5
        muon_apply(
            stacked,
            update,
            group["second_moment"],
            scalar(lr),
            scalar(group["weight_decay"]),
            MUON_BETA2,
        )
        torch._foreach_copy_(list(weights), list(stacked.unbind()))

    def _adamw(self, group: dict) -> None:
        states = [self.state[p] for p in group["params"]]
        beta1, beta2 = group["betas"]
        adamw(
            group["params"],
            [p.grad for p in group["params"]],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=ADAM_EPS, maximize=False,
        )  # fmt: skip

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor with a name that is stable over runs: `blocks.0.mlp.fc.weight/momentum`."""
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.state[parameter].items():
                    yield f"{name}/{key}", tensor
