"""Muon and AdamW as one optimiser."""

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.kernels.muon import muon_apply, muon_factors, muon_momentum, muon_squares
from hotlap.kernels.orthogonalize import orthogonalize
from hotlap.model.gpt import GPT
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig, parameter_groups


def model_with_gradients(seed: int = 0, **fields) -> GPT:
    model = GPT(tiny_config(**fields)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
        parameter.data += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("extras", [True, False])
def test_every_parameter_is_in_one_group_under_its_name(extras):
    fields = dict.fromkeys(("value_embeddings", "residual_scalars", "smear", "backout"), extras)
    fields["bigram_rows"] = 100 * extras
    model = GPT(tiny_config(layers=3, kv_heads=1, **fields))
    groups = MuonAdamW(model, OptimConfig()).param_groups
    named = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
    assert sorted(name for name, _ in named) == sorted(name for name, _ in model.named_parameters())
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in named)
    for group in groups:
        assert group["muon"] == all(name.startswith("blocks.") for name in group["names"])
        assert not group["muon"] or len({p.shape for p in group["params"]}) == 1


class WithMore(GPT):
    """A model with an unknown parameter."""

    def __init__(self, *given):
        super().__init__(*given)
        self.my_bias = torch.nn.Parameter(torch.zeros(3))


def test_a_parameter_without_group_or_initialiser_is_refused_by_name():
    with pytest.raises(ValueError, match="my_bias"):
        MuonAdamW(WithMore(tiny_config()), OptimConfig())
    with pytest.raises(ValueError, match="my_bias"):
        WithMore(tiny_config()).init_weights()


def test_the_state_is_whole_before_the_first_step_and_its_names_are_unique():
    model = model_with_gradients()
    optimizer = MuonAdamW(model, OptimConfig())
    names = [name for name, _ in optimizer.named_state()]
    before = dict(optimizer.named_state())
    optimizer.step()
    assert names == [name for name, _ in optimizer.named_state()] and len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {name for name, _ in model.named_parameters()}
    for name, tensor in optimizer.named_state():
        assert tensor is before[name] or tensor.data_ptr() == before[name].data_ptr()
        assert tensor.abs().sum() > 0, name  # a checkpoint holds everything that a step changes


def test_a_step_with_learning_rate_zero_changes_no_parameter():
    model = model_with_gradients()
    before = [p.clone() for p in model.parameters()]
    optimizer = MuonAdamW(model, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_batched_matrices_are_updated_like_each_alone():
    model = model_with_gradients(layers=3)
    optimizer = MuonAdamW(model, OptimConfig(weight_decay=0.5))
    groups = [group for group in optimizer.param_groups if group["muon"]]
    assert any(len(group["params"]) > 1 for group in groups)
    generator = torch.Generator().manual_seed(1)
    steps = [  # gradients that change, or the second moment would be the same with any beta2
        {p: torch.randn(p.shape, generator=generator) for p in model.parameters()} for _ in range(3)
    ]
    expected = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            M, N = parameter.shape
            weight, momentum = parameter.detach().clone(), torch.zeros(1, M, N)
            second = torch.zeros((1, M, 1) if M >= N else (1, 1, N))
            lr = torch.tensor(group["lr"] * max(1, M / N) ** 0.5)
            for gradients in steps:
                update = muon_momentum([gradients[parameter]], momentum, torch.tensor(0.95), torch.float32)
                update = orthogonalize(update, norm=M**0.5)
                factors = muon_factors(muon_squares(update), second, min(M, N), 0.9)  # nanochat's beta2
                muon_apply([weight], update, factors, lr, torch.tensor(0.5))
            expected[name] = weight
    for gradients in steps:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        optimizer.step()
    for name, weight in expected.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name].detach(), weight, rtol=1e-5, atol=1e-6
        )


def test_adamw_groups_match_torch_adamw():
    model, twin = model_with_gradients(), model_with_gradients()
    optimizer = MuonAdamW(model, OptimConfig())
    named = dict(twin.named_parameters())
    rules = [
        {"params": [named[n] for n in g["names"]], "lr": g["lr"], "betas": g["betas"],
         "weight_decay": g["weight_decay"], "eps": g["eps"]}
        for g in optimizer.param_groups if not g["muon"]
    ]  # fmt: skip
    reference = torch.optim.AdamW(rules)
    for _ in range(3):
        optimizer.step()
        reference.step()
    for group in optimizer.param_groups:
        if not group["muon"]:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                torch.testing.assert_close(parameter, named[name], rtol=1e-6, atol=1e-6)


def test_the_numbers_of_adamw_are_those_of_nanochat():
    """At the width of 768, for which its learning rates are. eps of the scalars and the bigrams are ours."""
    with torch.device("meta"):
        model = GPT(tiny_config(width=768, heads=6, kv_heads=6, layers=3, bigram_rows=10))
    rules = {  # learning rate, betas, weight decay, eps
        "head": (0.008, (0.8, 0.96), 0.01, 1e-10),
        "embedding": (0.3, (0.8, 0.995), 0.001, 1e-10),
        "bigrams": (0.15, (0.0, 0.995), 0.05, 1e-10),
        "value_embeddings": (0.15, (0.8, 0.995), 0.01, 1e-10),
        "residual_scale": (0.005, (0.8, 0.95), 0.05, 1e-8),
        "x0_scale": (0.5, (0.96, 0.95), 0.0, 1e-8),
        "smear_scale": (0.2, (0.8, 0.95), 0.0, 1e-8),
        "backout_scale": (0.2, (0.8, 0.95), 0.0, 1e-8),
    }
    groups = parameter_groups(model, OptimConfig())
    found = {g["names"][0].split(".")[0]: g for g in groups if not g["muon"]}
    assert found.keys() == rules.keys()
    for name, numbers in rules.items():
        group = found[name]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((numbers[0], numbers[2])), name
        assert (group["betas"], group["eps"]) == (numbers[1], numbers[3]), name
    assert {g["lr"] for g in groups if g["muon"]} == {0.02}


def test_the_decay_of_adamw_grows_for_what_has_rows_alone():
    with torch.device("meta"):
        model = GPT(tiny_config(bigram_rows=10))
    plain, more = (parameter_groups(model, OptimConfig(adamw_decay=decay)) for decay in (1.0, 3.0))
    for one, other in zip(plain, more, strict=True):
        tables = one["names"][0].startswith(("embedding", "bigrams", "value_embeddings", "head"))
        assert other["weight_decay"] == pytest.approx(one["weight_decay"] * (3 if tables else 1))


def test_adamw_learning_rates_fall_with_the_root_of_the_width():
    rate = {
        width: {
            g["names"][0]: g["lr"]
            for g in MuonAdamW(GPT(tiny_config(width=width)), OptimConfig()).param_groups
        }
        for width in (64, 256)
    }
    assert rate[64]["head.weight"] == pytest.approx(2 * rate[256]["head.weight"])
    assert rate[64]["blocks.0.mlp.fc.weight"] == rate[256]["blocks.0.mlp.fc.weight"]


def test_a_few_steps_memorise_a_sequence():
    model = GPT(tiny_config()).init_weights()
    optimizer = MuonAdamW(model, OptimConfig(weight_decay=0.0))
    ids = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("field", ["matrix_lr", "embedding_lr", "head_lr", "scalar_lr"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_must_be_positive(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must be positive"):
        OptimConfig(**{field: value}).validate()


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weight_decay_must_be_zero_or_more(value):
    with pytest.raises(ValueError, match="weight_decay"):
        OptimConfig(weight_decay=value).validate()
