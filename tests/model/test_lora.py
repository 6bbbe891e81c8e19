"""Adapters: what they compute, what trains, and what they count as."""

import copy

import pytest
import torch
from helpers.adapters import ALPHA, RANK, adapted
from helpers.tools import relative_error, tiny_config

from hotlap.model.adapter_files import merge
from hotlap.model.engine import Engine
from hotlap.model.flops import matmul_flops, meta_model, parameter_counts, training_bytes
from hotlap.model.gpt import GPT
from hotlap.model.lora import (
    LoRA,
    adapter_count,
    adapter_shapes,
    add_adapters,
    base_weights,
    check_rank,
    is_adapter,
    trained_weights,
    update,
)
from hotlap.model.sampling import Sampling

IDS = torch.arange(60)[None]


def merged(model: GPT, monkeypatch) -> GPT:
    """A whole model with the adapters of another one in its weights."""
    from hotlap.model import adapter_files

    whole = GPT(model.config, model.compute_dtype).init_weights()
    whole.load_state_dict(base_weights(model))
    monkeypatch.setattr(adapter_files, "read_adapters", lambda *_: trained_weights(model))
    monkeypatch.setattr(adapter_files, "read_lora", lambda _: model.lora)
    merge(whole, None)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_nothing_to_the_last_bit(dtype, random_model):
    base = random_model(tiny_config(), compute_dtype=dtype)
    model = adapted(base, fresh=True, dtype=dtype)
    assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS, IDS), base(IDS, IDS))


@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
def test_merged_weights_compute_the_same(heads, random_model, monkeypatch):
    base = random_model(tiny_config(heads=heads[0], kv_heads=heads[1]))
    model = adapted(base)
    whole = merged(model, monkeypatch)
    with torch.no_grad():
        assert relative_error(model(IDS), whole(IDS).double()) < 1e-5
        assert relative_error(model(IDS), base(IDS).double()) > 1e-2


def test_an_update_is_the_product_of_each_part():
    A, B = torch.randn(3 * RANK, 8).double(), torch.randn(10, RANK).double()
    found = update(A, B, (4, 3, 3), 0.5)
    for part, rows in enumerate((slice(0, 4), slice(4, 7), slice(7, 10))):
        a = A[RANK * part : RANK * (part + 1)]
        assert torch.allclose(found[rows], 0.5 * torch.einsum("or,ri->oi", B[rows], a))


def test_gradients_are_those_of_the_formula_and_of_nothing_else(random_model):
    model = adapted(random_model(tiny_config()))
    layer = model.blocks[0].attention.qkv
    x, dy = torch.randn(5, 64), torch.randn(5, 192)
    layer(x).backward(dy)
    A, B = (p.detach().double().requires_grad_() for p in (layer.adapter.A, layer.adapter.B))
    weight = layer.weight.detach().double() + update(A, B, layer.adapter.outputs, ALPHA / RANK)
    (x.double() @ weight.T).backward(dy.double())
    assert relative_error(layer.adapter.A.grad, A.grad) < 1e-5
    assert relative_error(layer.adapter.B.grad, B.grad) < 1e-5
    model(IDS, IDS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name) == parameter.requires_grad, name


def test_generating_uses_the_adapters(random_model, monkeypatch, tiny_tokenizer):
    model = adapted(random_model(tiny_config()))
    whole = merged(model, monkeypatch)
    greedy = Sampling(temperature=0, max_tokens=16)
    answers = [Engine(m.eval(), tiny_tokenizer).complete([[5, 6, 7]], greedy) for m in (model, whole)]
    assert answers[0] == answers[1]


def test_every_seed_gives_the_same_base_with_and_without_adapters():
    whole = GPT(tiny_config()).init_weights(seed=5)
    model = copy.deepcopy(whole)
    add_adapters(model, LoRA(RANK, ALPHA, (), None))
    model.init_weights(seed=5)
    assert all(torch.equal(tensor, base_weights(model)[name]) for name, tensor in whole.state_dict().items())
    bound = 64**-0.5
    A, B = model.blocks[1].mlp.fc.adapter.A, model.blocks[1].mlp.fc.adapter.B
    assert 0.9 * bound < A.abs().max() <= bound and not B.any()


def test_adapters_are_counted_apart_and_what_is_frozen_needs_less():
    shape = tiny_config(kv_heads=1)
    model = meta_model(shape)
    before, flops, full = parameter_counts(model), matmul_flops(model), training_bytes(model, 2, 64)
    add_adapters(model, LoRA(RANK, ALPHA, (), None))
    adapters = sum(tensor.numel() for tensor in trained_weights(model).values())
    assert adapters == adapter_count(shape, RANK)
    assert {tuple(t.shape) for t in trained_weights(model).values()} == {
        *adapter_shapes(shape, RANK).values()
    }
    assert parameter_counts(model) == before
    assert flops == 6 * before["matmul"] and matmul_flops(model) == 4 * before["matmul"] + 6 * adapters
    frozen = training_bytes(model, 2, 64)
    assert frozen["gradients"] + frozen["optimizer"] == 12 * adapters < full["gradients"]


def test_a_rank_that_saves_nothing_is_refused():
    shape = tiny_config(kv_heads=1)  # keys are 32 wide
    check_rank(shape, 32)
    with pytest.raises(ValueError, match=r"lora_rank=33 must be at most 32"):
        check_rank(shape, 33)
