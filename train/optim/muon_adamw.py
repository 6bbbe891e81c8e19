"""Muon for the block matrices and AdamW for everything else, as one optimiser.

Parameter groups, learning rates and betas are nanochat's. Matrices of one shape are orthogonalised together.
A GPT-2 has nanoGPT's groups: AdamW for all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum, muon_squares
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.model.gpt2 import GPT2
from hotlap.model.lora import is_adapter
from hotlap.model.transformer import Transformer
from hotlap.train.config import OptimConfig
from hotlap.train.distributed.sharding import local
from hotlap.train.optim.exchange import Exchange, assign_owners

ADAM_EPS = 1e-10
# While the blocks' outputs are still zero, scaling the residual changes nothing, so the scalars' gradients
# are rounding errors below 1e-8. A smaller eps would turn them into full steps in random directions; a larger
# one slows learning.
SCALAR_EPS = 1e-8
MUON_BETA2 = 0.9


def parameter_groups(model: Transformer, config: OptimConfig) -> list[dict]:
    """The model's parameters that are trained, with their names, in groups that share hyperparameters."""
    rules = (gpt2_rules if isinstance(model, GPT2) else gpt_rules)(config, model.config.width)
    members: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the base of adapters
            continue
        if is_adapter(name):
            members["adapters"].append((name, parameter))
        elif isinstance(model, GPT2):
            members["vectors" if parameter.ndim == 1 else "matrices"].append((name, parameter))
        elif name.startswith("blocks."):
            members[f"muon {tuple(parameter.shape)}"].append((name, parameter))
        else:
            key = next((key for key in rules if name.startswith(key)), None)
            if key is None:
                raise ValueError(f"no parameter group matches {name}; add one to parameter_groups")
            members[key].append((name, parameter))
    result = []
    for key, named in members.items():
        rule = rules.get(key) or {"lr": config.matrix_lr, "weight_decay": config.weight_decay}
        names, parameters = zip(*named, strict=True)
        result.append(
            {
                "params": list(parameters),
                "names": names,
                "muon": key.startswith("muon"),
                "peak_lr": rule["lr"],
                "peak_weight_decay": rule["weight_decay"],
                "eps": ADAM_EPS,
                **rule,
            }
        )
    return result


def gpt2_rules(config: OptimConfig, width: int) -> dict[str, dict]:
    """nanoGPT's: one rate, and weight decay for what has rows, the embeddings too."""
    adamw = {"lr": config.adamw_lr, "betas": (0.9, 0.95), "eps": SCALAR_EPS}
    return {
        "matrices": adamw | {"weight_decay": config.weight_decay},
        "vectors": adamw | {"weight_decay": 0.0},
        "adapters": adapter_rule(config, width),
    }


def adapter_rule(config: OptimConfig, width: int) -> dict:
    return {
        "lr": config.adapter_lr * (width / 768) ** -0.5,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
        "eps": SCALAR_EPS,
    }


def gpt_rules(config: OptimConfig, width: int) -> dict[str, dict]:
    """By the beginning of parameters' names; of what Muon does not train."""
    adamw_rate = (width / 768) ** -0.5  # rates were tuned at width 768
    return {
        "embedding": {
            "lr": config.embedding_lr * adamw_rate,
            "betas": (0.8, 0.995),
            "weight_decay": 0.001 * config.adamw_decay,
        },
        "bigrams": {
            "lr": config.embedding_lr / 2 * adamw_rate,
            # most bigrams are rare: with momentum, a row would move on long after its bigram occurred
            "betas": (0.0, 0.995),
            "weight_decay": 0.05 * config.adamw_decay,
        },
        "value_embeddings": {
            "lr": config.embedding_lr / 2 * adamw_rate,
            "betas": (0.8, 0.995),
            "weight_decay": 0.01 * config.adamw_decay,
        },
        "head": {
            "lr": config.head_lr * adamw_rate,
            "betas": (0.8, 0.96),
            "weight_decay": 0.01 * config.adamw_decay,
        },
        "residual_scale": {
            "lr": config.scalar_lr / 100,
            "betas": (0.8, 0.95),
            "weight_decay": 0.05,
            "eps": SCALAR_EPS,
        },
        "x0_scale": {"lr": config.scalar_lr, "betas": (0.96, 0.95), "weight_decay": 0.0, "eps": SCALAR_EPS},
        "smear": {"lr": 0.2, "betas": (0.8, 0.95), "weight_decay": 0.0, "eps": SCALAR_EPS},
        "backout": {"lr": 0.2, "betas": (0.8, 0.95), "weight_decay": 0.0, "eps": SCALAR_EPS},
        "adapters": adapter_rule(config, width),
    }


def sharded_like(parameter: Tensor, part: Tensor) -> Tensor:
    """Wrap `part` as this rank's shard of a tensor that is sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some groups, AdamW for the others. `momentum` is Muon's; the schedule sets it.

    Parameters may be whole or sharded by rows with FSDP2: each rank keeps the state of its rows, and
    orthogonalises the matrices that it owns (exchange.py). State is created at construction, so that every
    rank and every checkpoint has the same keys.
    """

    def __init__(self, model: Transformer, config: OptimConfig):
        super().__init__(parameter_groups(model, config.validate()), {})
        self.momentum = 0.95
        self.dtype = model.compute_dtype  # of the orthogonalisation
        for group in self.param_groups:
            if group["muon"]:
                self._add_muon_state(group)
                continue
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros((), device=parameter.device)
        self._plan_exchange()

    def _add_muon_state(self, group: dict) -> None:
        """One buffer per group; each parameter's state is a view of it."""
        first = local(group["params"][0])
        count, (M, N) = len(group["params"]), group["params"][0].shape
        group["momentum_buffer"] = first.new_zeros(count, *first.shape)  # (G, m, N): this rank's rows
        # of whole matrices, equal on all ranks
        group["second_moment"] = first.new_zeros((count, M, 1) if M >= N else (count, 1, N))
        # filled at each step; creating them there would copy from the CPU, which a GPU has to wait for
        group["scalars"] = {name: first.new_zeros(()) for name in ("momentum", "lr", "decay")}
        for i, parameter in enumerate(group["params"]):
            state = self.state[parameter]
            state["momentum"] = sharded_like(parameter, group["momentum_buffer"][i])
            state["second_moment"] = group["second_moment"][i]

    def _plan_exchange(self) -> None:
        groups = [group for group in self.param_groups if group["muon"]]
        first = groups[0]["params"][0] if groups else None  # none: beside adapters all matrices are frozen
        mesh = first.device_mesh if isinstance(first, DTensor) else None
        if mesh is None or mesh.size() == 1:
            return
        shapes = [tuple(group["params"][0].shape) for group in groups]
        owners = assign_owners(
            [(len(g["params"]), *s) for g, s in zip(groups, shapes, strict=True)], mesh.size()
        )
        for group, shape, owned in zip(groups, shapes, owners, strict=True):
            group["exchange"] = Exchange(shape, owned, mesh)

    @torch.no_grad()
    def step(self) -> None:
        """Matrices are sent to their owners during AdamW, and back while others are orthogonalised."""
        muon = [group for group in self.param_groups if group["muon"]]
        updates = {id(group): self._start(group) for group in muon}
        for group in self.param_groups:
            if not group["muon"]:
                self._adamw(group)
        returned = {id(group): self._orthogonalize(group, updates.pop(id(group))) for group in muon}
        for group in muon:
            self._apply(group, *returned.pop(id(group)))

    def _start(self, group: dict) -> Tensor:
        """The update (G, m, N) of this rank's rows; if sharded, start sending it."""
        grads = [local(p.grad) for p in group["params"]]
        beta = group["scalars"]["momentum"].fill_(self.momentum)
        update = muon_momentum(grads, group["momentum_buffer"], beta, self.dtype)
        if "exchange" in group:
            group["exchange"].send(update)
        return update

    def _orthogonalize(self, group: dict, update: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The orthogonalised update and its squares; None if they are being sent back."""
        norm = group["params"][0].shape[0] ** 0.5  # of rows of norm 1
        if "exchange" not in group:
            update = orthogonalize(update, norm=norm)
            return update, muon_squares(update)
        update = orthogonalize(group["exchange"].receive(), norm=norm)  # (k, M, N)
        group["exchange"].send_back(update, muon_squares(update))
        return None, None

    def _apply(self, group: dict, update: Tensor | None, squares: Tensor | None) -> None:
        if update is None:
            update, squares = group["exchange"].receive_back()
        weights = [local(p) for p in group["params"]]
        M, N = group["params"][0].shape
        factors = muon_factors(
            squares.view_as(group["second_moment"]), group["second_moment"], min(M, N), MUON_BETA2
        )
        if M >= N and "exchange" in group:  # one factor per row: select this rank's rows
            first = group["exchange"].first_row
            factors = factors[:, first : first + len(weights[0])]
        lr = group["scalars"]["lr"].fill_(group["lr"] * max(1, M / N) ** 0.5)
        decay = group["scalars"]["decay"].fill_(group["weight_decay"])
        muon_apply(weights, update, factors, lr, decay)

    def _adamw(self, group: dict) -> None:
        states = [self.state[p] for p in group["params"]]
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in group["params"]],
            [local(p.grad) for p in group["params"]],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor with a name that is stable across runs: `blocks.0.mlp.fc.weight/momentum`."""
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.state[parameter].items():
                    yield f"{name}/{key}", tensor
