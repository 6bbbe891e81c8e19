"""RMSNorm, attention's inputs and ReLU^2 against their definitions in float64."""

import pytest
import torch
from helpers.tools import relative_error

from hotlap.kernels.qkv import attention_inputs, rotary_tables
from hotlap.kernels.relu2 import relu2
from hotlap.kernels.rms_norm import EPS, rms_norm


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, *inputs):
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, random(*y.shape, seed=9).to(y.dtype))


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # bfloat16: one rounding of the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_forward_and_gradients(scale, dtype):
    def naive(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    x = (scale * random(5, 7, 48)).transpose(0, 1).to(dtype).requires_grad_()
    weight = random(48, seed=1).to(dtype).requires_grad_()
    exact = with_gradients(naive, *(t.detach().double().requires_grad_() for t in (x, weight)))
    for actual, wanted in zip(with_gradients(rms_norm, x, weight), exact, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


def test_rms_norm_without_weight_has_a_root_mean_square_of_one():
    y = rms_norm(100 * random(3, 64))
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3))
    assert not rms_norm(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu2_forward_and_gradient(dtype):
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0], dtype=dtype, requires_grad=True)
    y = relu2(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 0.25, 9] and x.grad.tolist() == [0, 0, 0, 1, 6] and y.dtype == dtype


def test_rotary_scores_depend_on_the_distance_only():
    cos, sin = rotary_tables(64, 32, 10_000.0)
    q, k, _ = attention_inputs(random(1, 1, 3, 32).expand(1, 64, 3, 32), 1, cos, sin)
    scores = q[0, :, 0] @ k[0, :, 0].T  # (query, key)
    for distance in (0, 1, 7, 40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[40, 0], scores[0, 40], atol=1e-2)  # before is not after


def test_queries_and_keys_are_normed_then_scaled_then_rotated():
    cos, sin = rotary_tables(9, 64, 100_000.0)
    qkv = random(2, 9, 8, 64)
    rotated_q, rotated_k, _ = attention_inputs(qkv, 2, cos, sin, gain=1.2)
    angle = torch.arange(9)[:, None] * 100_000.0 ** (-torch.arange(0, 64, 2) / 64).double()
    turn = torch.polar(torch.ones_like(angle), -angle)[:, None]  # by the negative angle, as nanochat does
    for x, y in ((qkv[:, :, :4], rotated_q), (qkv[:, :, 4:6], rotated_k)):
        normed = 1.2 * x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
        exact = torch.complex(*normed.chunk(2, -1)) * turn
        assert relative_error(y, torch.cat((exact.real, exact.imag), -1)) < 1e-5
        assert y.shape == x.shape


def test_values_have_a_gated_value_embedding_added():
    cos, sin = rotary_tables(9, 64, 100_000.0)
    qkv, gate, embedding = random(2, 9, 8, 64), random(2, 9, 2, seed=1), random(2, 9, 2, 64, seed=2)
    exact = qkv[:, :, 6:] + 3 / (1 + torch.exp(-gate[..., None])) * embedding
    torch.testing.assert_close(attention_inputs(qkv, 2, cos, sin, 1.2, gate, embedding)[2], exact)
    assert torch.equal(attention_inputs(qkv, 2, cos, sin)[2], qkv[:, :, 6:])


def test_rotary_rows_may_stand_at_different_positions():
    cos, sin = rotary_tables(20, 32, 10_000.0)
    qkv = random(2, 20, 4, 32)
    positions = torch.tensor([[3, 4, 5], [11, 12, 13]])
    row = torch.arange(2)[:, None]
    part = attention_inputs(qkv[row, positions], 1, cos[positions], sin[positions])
    for a, b in zip(part, attention_inputs(qkv, 1, cos, sin), strict=True):
        assert torch.equal(a, b[row, positions])
