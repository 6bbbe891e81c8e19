import pytest
import torch
import torch.nn.functional as F
from kernel_tools import DEVICE, DTYPES, check, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import linear_relu2 as module
from hotlap.kernels.linear_relu2 import linear_relu2, linear_relu2_ref
from hotlap.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    blocks = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2}
    monkeypatch.setattr(module, "_linear_relu2_tiles", lambda *_: [Tile(blocks)])


def case(M, D, N, dtype=torch.float32):
    """Inputs whose activations are of size 1, and a gradient."""
    x, w_in, w_out = (
        random(M, D, dtype=dtype),
        random(N, D, dtype=dtype, seed=1),
        random(D, N, dtype=dtype, seed=2),
    )
    weights = [(w / w.shape[1] ** 0.5).detach().requires_grad_() for w in (w_in, w_out)]
    return [x, *weights], [random(M, D, seed=3, grad=False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 20, 30), (33, 16, 64), (70, 40, 90), (128, 32, 128), (17, 65, 31)])
def test_is_as_exact_as_torch(shape, dtype):
    inputs, gradients = case(*shape, dtype)
    check(linear_relu2, linear_relu2_ref, inputs, gradients, scale=1e-2)


def test_the_reference_is_what_it_says():
    (x, w_in, w_out), _ = case(5, 8, 32)
    expected = torch.stack([w_out @ F.relu(w_in @ row).square() for row in x])
    torch.testing.assert_close(linear_relu2_ref(x, w_in, w_out), expected)
    torch.testing.assert_close(linear_relu2(x, w_in, w_out), expected)


def test_float32_weights_get_float32_gradients():
    (x, w_in, w_out), (dy,) = case(20, 16, 64, torch.bfloat16)
    masters = [w.detach().float().requires_grad_() for w in (w_in, w_out)]
    y, dx, *dw = outputs_and_gradients(linear_relu2, [x, *masters], [dy])
    assert y.dtype == dx.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in dw)
    rounded = outputs_and_gradients(linear_relu2, [x, w_in, w_out], [dy])
    for one, other in zip((y, dx, *dw), rounded, strict=True):
        torch.testing.assert_close(one.float(), other.float())


@pytest.mark.parametrize("layout", ["rows apart", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "expanded":
            return x[:1].expand(x.shape)
        return torch.stack((x, x), -1 if layout == "channels apart" else 1).select(
            -1 if layout[0] == "c" else 1, 0
        )

    inputs, gradients = case(20, 24, 40)
    check(
        linear_relu2,
        linear_relu2_ref,
        [view(x).detach().requires_grad_() for x in inputs],
        [view(g) for g in gradients],
        scale=1e-2,
    )
    linear_relu2(*inputs).sum().backward()  # a gradient of stride 0


def test_batches_keep_their_shape_and_nothing_gives_nothing():
    (x, w_in, w_out), (dy,) = case(12, 16, 64)
    y = linear_relu2(x.view(2, 6, 16), w_in, w_out)
    assert torch.equal(y.flatten(0, 1), linear_relu2(x, w_in, w_out))
    check(linear_relu2, linear_relu2_ref, [x[:0], w_in, w_out], [dy[:0]])


def test_rows_may_lie_beyond_two_to_the_31():
    (x, w_in, w_out), (dy,) = case(2, 16, 32, torch.float16)
    far = torch.empty_strided((2, 16), (2**31, 1), dtype=torch.float16, device=DEVICE)
    far = far.copy_(x.detach()).requires_grad_()
    ours = outputs_and_gradients(linear_relu2, (far, w_in, w_out), [dy])
    for a, b in zip(ours, outputs_and_gradients(linear_relu2, (x, w_in, w_out), [dy]), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_a_number_is_not_hidden():
    (x, w_in, w_out), _ = case(4, 16, 32)
    x.data[1, 3] = float("nan")
    y = linear_relu2(x, w_in, w_out)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(50, 40, 90, torch.bfloat16)
    first, second = (outputs_and_gradients(linear_relu2, inputs, gradients) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    (x, w_in, w_out), (dy,) = case(10, 16, 32)
    opcheck(module._linear_relu2.op, (x, w_in, w_out))
    a = torch.rand(10, 32, device=DEVICE)
    opcheck(module._linear_relu2_backward.op, (dy, x.detach(), w_in.detach(), w_out.detach(), a))


def test_compiles_whole_to_the_same_results():
    def function(x, w_in, w_out):
        return linear_relu2(x.sin(), w_in, w_out) * 2

    inputs, gradients = case(10, 16, 32)
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_wide_layers_are_not_fused(monkeypatch):
    (x, w_in, w_out), _ = case(10, 32, 64)
    monkeypatch.setattr(module, "FUSED_WIDTH", 31)
    monkeypatch.setattr(module, "_product", None)
    torch.testing.assert_close(linear_relu2(x, w_in, w_out), linear_relu2_ref(x, w_in, w_out))


def test_wrong_shapes_are_named():
    (x, w_in, w_out), _ = case(4, 8, 16)
    with pytest.raises(ValueError, match=r"w_in \(16, 7\)"):
        linear_relu2(x, w_in[:, :7], w_out)
    with pytest.raises(ValueError, match=r"w_out \(8, 15\)"):
        linear_relu2(x, w_in, w_out[:, :15])
