"""What all kernels in C promise: rows are independent, and what is not a number or infinite is not hidden."""

import pytest
import torch

from hotlap.kernels import muon
from hotlap.kernels.attention import attention
from hotlap.kernels.attention_blockwise import Masks, _softmax_backward
from hotlap.kernels.cpu.library import run
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.kernels.dispatch import kernel_choice
from hotlap.kernels.linear_cross_entropy import _losses_and_gradient
from hotlap.kernels.qkv import attention_inputs, rotary_tables
from hotlap.kernels.relu2 import relu2_ref
from hotlap.kernels.rms_norm import rms_norm, rms_norm_residual

pytestmark = pytest.mark.usefixtures("c_kernels")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs_and_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    upstream = [random(*y.shape, seed=9).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


# Functions of x (M, N), which return what has rows for the rows of x: outputs and gradients


def normalised(x):
    return outputs_and_gradients(lambda x: (rms_norm(x),), x)


def residual(x):
    return outputs_and_gradients(rms_norm_residual, x, x.roll(1, 1))


def scaled_residual(x):
    scales = torch.tensor(0.7, dtype=x.dtype), torch.tensor(-1.3, dtype=x.dtype)
    return outputs_and_gradients(lambda x, y: rms_norm_residual(x, y, scales=scales), x, x.roll(1, 1))


def inputs_of_attention(x):
    M, N = x.shape
    tables = rotary_tables(1, N // 4, 1e4)
    return outputs_and_gradients(
        lambda x: [y.view(M, -1) for y in attention_inputs(x.view(M, 1, 4, N // 4), 1, *tables, 1.2)], x
    )


def inputs_with_value_embeddings(x):
    M, N = x.shape
    tables = rotary_tables(1, N // 4, 1e4)

    def function(gate, embedding):
        qkv = random(M, 1, 4, N // 4, dtype=gate.dtype)
        values = attention_inputs(qkv, 1, *tables, 1.0, gate.view(M, 1, 1), embedding.view(M, 1, 1, -1))[2]
        return (values.view(M, -1),)

    return outputs_and_gradients(function, x[:, 3:4], x[:, : N // 4])


def loss(x, softcap=0.0):
    M, N = x.shape
    targets = torch.arange(M) % N
    targets[:2] = IGNORE
    with torch.no_grad():
        return _losses_and_gradient(x.clone(), targets, softcap, 0.01, IGNORE, torch.linspace(0, 1, M))


def capped_loss(x):
    return loss(x, 5.0)


def momentum(x):
    beta, grad = torch.tensor(0.9), x.float()
    moved = random(*x.shape, seed=1)[None]
    return [muon.muon_momentum([grad], moved, beta, x.dtype)[0], moved[0]]


def moved_weights(x):
    M, N = x.shape
    weight = random(M, N, seed=1)
    factors = random(1, M, 1, seed=2).abs()
    muon.muon_apply([weight], x[None], factors, torch.tensor(0.1), torch.tensor(0.3))
    return [weight]


def softmax(x):  # rows are queries of one head, which see the keys up to their own
    M, N = x.shape
    masks = Masks(M, N, 1, 0, None)
    weights = masks.softmax(x.clone()[None], slice(0, M), slice(0, N), 0.5)
    gradient = _softmax_backward(random(1, M, N, dtype=x.dtype), weights, 0.5)
    return [weights[0, :, : N - M], gradient[0, :, : N - M]]  # what all queries see


def activations(x):
    if kernel_choice("cpu") == "torch":
        return outputs_and_gradients(lambda x: (relu2_ref(x),), x)
    a, gradient = x.clone(), random(*x.shape, seed=9).to(x.dtype)
    run("relu2", x.dtype, a, a.numel())
    run("relu2_backward", x.dtype, gradient, a, a.numel())
    return a, gradient


OPERATIONS = (
    normalised, residual, scaled_residual, inputs_of_attention, inputs_with_value_embeddings,
    loss, capped_loss, momentum, moved_weights, softmax, activations,
)  # fmt: skip


@both_dtypes
@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads_do_not_change_a_bit(operation, dtype):
    x, before = random(70, 520, dtype=dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(operation(x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_not_finite_stays_in_its_row_and_is_as_visible_as_in_torch(
    operation, value, dtype, choose_kernels
):
    x = random(9, 40, dtype=dtype)
    clean = operation(x)
    x[5, 3] = value
    found = operation(x)
    choose_kernels("torch")
    wanted = operation(x)
    others = torch.arange(9) != 5
    for ours, torchs, without in zip(found, wanted, clean, strict=True):
        assert torch.equal(ours[others], without[others])
        assert torch.equal(ours.isfinite(), torchs.isfinite())


@both_dtypes
def test_attention_hides_what_is_not_a_number_from_queries_that_do_not_see_it_alone(dtype):
    q, k, v = (random(1, 300, 2, 16, dtype=dtype, seed=i) for i in range(3))
    clean = attention(q, k, v, 40, backend="blockwise")
    k[0, 150, 0, 3] = float("nan")
    y = attention(q, k, v, 40, backend="blockwise")
    assert y[0, 150:190, 0].isnan().any(-1).all()
    assert torch.equal(y[0, :150], clean[0, :150]) and torch.equal(y[0, 190:], clean[0, 190:])
    assert torch.equal(y[0, :, 1], clean[0, :, 1])


@both_dtypes
@pytest.mark.parametrize("M, N", [(1, 1), (1, 7), (3, 193), (0, 8), (130, 1)])
def test_losses_of_any_size_are_those_of_torch(M, N, dtype, choose_kernels):
    logits, targets = random(M, N, dtype=dtype), torch.arange(M) % N
    targets[::3] = IGNORE
    upstream = torch.arange(M) % 2.0  # some zero
    results = []
    for kernels in ("c", "torch"):
        choose_kernels(kernels)
        given = logits.clone()
        results.append(_losses_and_gradient(given, targets, 15.0, 0.1, IGNORE, upstream))
        assert torch.equal(results[-1][0], _losses_and_gradient(logits, targets, 15.0, 0.1, IGNORE, None)[0])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs)


@both_dtypes
@pytest.mark.parametrize("target", [-2, 40, 2**40])
def test_a_target_out_of_range_gives_a_loss_that_is_not_a_number(target, dtype):
    x, targets = random(4, 40, dtype=dtype), torch.tensor([3, target, 5, 6])
    losses, gradient = _losses_and_gradient(x, targets, 0.0, 0.0, IGNORE, torch.ones(4))
    assert losses.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, False, False]
