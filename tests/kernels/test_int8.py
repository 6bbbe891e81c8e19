"""Weights in int8 are as near as their scales allow, and count as the weights that they stand for."""

import pytest
import torch
from helpers.kernel_tools import DEVICE, SMALLEST_ERROR, as_double, error, random
from torch.utils._pytree import tree_map

from hotlap.kernels import decode_linear as module
from hotlap.kernels.decode_linear import (
    linear,
    linear_residual,
    linear_residual_ref,
    norm_linear,
    norm_linear_ref,
)
from hotlap.kernels.dispatch import INTERPRETED
from hotlap.kernels.int8 import dequantized, quantize_rows

# On a GPU, float32 has no tensor cores
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][not INTERPRETED :])


def weight_of(N, D):
    return random(N, D, grad=False, seed=2) / D**0.5


def test_a_weight_is_off_by_at_most_half_its_row_s_scale():
    weight = weight_of(33, 40) * torch.logspace(-20, 20, 33, device=DEVICE)[:, None]
    quantized, scales = quantize_rows(weight)
    assert quantized.dtype == torch.int8 and quantized.int().abs().amax(1).eq(127).all()
    torch.testing.assert_close(scales, weight.abs().amax(1) / 127)
    off = (dequantized(quantized, scales, torch.float32) - weight).abs()
    assert (off <= scales[:, None] * (0.5 + 1e-4)).all()


def test_rows_of_zeros_stay_zero():
    weight = weight_of(3, 8)
    weight[1] = 0
    assert not dequantized(*quantize_rows(weight), torch.bfloat16)[1].any()
    assert quantize_rows(weight[:0])[1].shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(value):
    weight = weight_of(3, 8)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(weight)


def in_torch(x, quantized, scales, mix, gate, residual):
    weight = (quantized.double() * scales.double()[:, None]).to(x.dtype)
    sums = linear_residual_ref(x, weight, residual), torch.nn.functional.linear(x, weight)
    return *norm_linear_ref(x, weight, mix, gate, True), *sums


@both_dtypes
@pytest.mark.parametrize("R, D, N", [(1, 97, 33), (5, 333, 20), (16, 64, 24)])
def test_products_are_as_exact_as_of_the_weight_in_float64(R, D, N, dtype, triton_or_c, monkeypatch):
    x, residual = (random(R, width, grad=False, seed=width).to(dtype) for width in (D, N))
    quantized, scales = quantize_rows(weight_of(N, D))
    gate, a, b = random(3, 8, dtype=dtype, grad=False), x[0, 0].clone(), x[0, 1].clone()
    tensors = x, quantized, scales, (a, b, x), gate, residual
    reference = [in_torch(*given) for given in (tensors, tree_map(as_double, tensors))]
    for name in ("norm_linear_ref", "linear_residual_ref", "dequantized"):
        monkeypatch.setattr(module, name, None)  # nothing is computed by the reference
    ours = (
        *norm_linear(x, quantized, (a, b, x), gate, True, scales),
        linear_residual(x, quantized, residual, scales),
        linear(x, quantized, scales),
    )
    for y, torchs, exact in zip(ours, *reference, strict=True):
        assert y.dtype == dtype
        assert error(y, exact) <= 2 * error(torchs, exact) + 4 * SMALLEST_ERROR


@pytest.mark.parametrize("reason", ["rows", "kernels"])
def test_what_the_kernel_does_not_take_is_multiplied_by_torch(reason, choose_kernels):
    if reason == "kernels":
        choose_kernels("torch")
    x, residual = (random(17, width, grad=False).to(torch.bfloat16) for width in (40, 33))
    quantized, scales = quantize_rows(weight_of(33, 40))
    weight = dequantized(quantized, scales, torch.bfloat16)
    assert torch.equal(linear(x, quantized, scales), x @ weight.T)
    y = linear_residual(x, quantized, residual, scales)
    assert torch.equal(y, linear_residual_ref(x, weight, residual))
    y = norm_linear(x, quantized, squared_relu=True, scales=scales)[0]
    assert torch.equal(y, norm_linear_ref(x, weight, squared_relu=True)[0])


def test_a_row_gives_the_same_bits_whatever_the_rows_beside_it(c_kernels):
    x = random(16, 333, grad=False).to(torch.bfloat16)
    quantized, scales = quantize_rows(weight_of(70, 333))
    together = linear(x, quantized, scales)
    for rows in ([3], [15, 0], [4, 5, 9], [1, 2, 3, 4, 5, 6, 7]):
        assert torch.equal(linear(x[rows], quantized, scales), together[rows])


def test_wrong_scales_are_named():
    x, (quantized, scales) = random(2, 40, grad=False), quantize_rows(weight_of(33, 40))
    for call, match in (
        (lambda: linear(x, quantized), "int8 without scales"),
        (lambda: linear(x, weight_of(33, 40), scales), "float32 with scales"),
        (lambda: linear(x, quantized, scales[:5]), r"scales are \(5,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
