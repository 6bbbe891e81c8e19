import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, check, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import rotary as module
from hotlap.kernels.rotary import qk_norm_rotary, qk_norm_rotary_ref, rotary_tables

pytestmark = pytest.mark.usefixtures("triton_kernels")


def reference(q, k, cos, sin, gain=1.0):
    return qk_norm_rotary_ref(q, cos, sin, gain), qk_norm_rotary_ref(k, cos, sin, gain)


def case(B, T, H, K, C, dtype=torch.float32):
    """q and k as views of one projection, the tables, and gradients."""
    qkv = random(B, T, H + 2 * K, C, dtype=dtype, grad=False)
    q, k, _ = qkv.split((H, K, K), dim=2)
    cos, sin = rotary_tables(T, C, 10_000.0, DEVICE)
    gradients = [random(B, T, heads, C, seed=heads, grad=False) for heads in (H, K)]
    return [q.requires_grad_(), k.requires_grad_(), cos, sin], gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (2, 63, 6, 2, 16), (1, 97, 3, 3, 96), (2, 5, 8, 1, 128), (1, 200, 2, 1, 40)]
)
def test_is_as_exact_as_torch(shape, dtype):
    inputs, gradients = case(*shape, dtype)
    check(qk_norm_rotary, reference, inputs, gradients, scale=1e-3)
    check(lambda *x: qk_norm_rotary(*x, 1.2), lambda *x: reference(*x, 1.2), inputs, gradients, scale=1e-3)


def test_each_sequence_may_stand_at_its_own_positions():
    (q, k, cos, sin), gradients = case(3, 4, 2, 1, 16)
    positions = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]]).to(DEVICE)
    check(qk_norm_rotary, reference, [q, k, cos[positions], sin[positions]], gradients)
    check(qk_norm_rotary, reference, [q, k, cos[positions[:1]], sin[positions[:1]]], gradients)


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    (q, k, cos, sin), _ = case(1, 9, 1, 1, 32)
    y, _ = qk_norm_rotary(q, k, cos, sin, 2.0)
    torch.testing.assert_close(y.square().mean(-1), torch.full_like(y[..., 0], 4.0))
    a, b = qk_norm_rotary(q[:, :1].expand(q.shape), k[:, :1].expand(k.shape), cos, sin)
    torch.testing.assert_close((a[0, 5, 0] * b[0, 2, 0]).sum(), (a[0, 8, 0] * b[0, 5, 0]).sum())


@pytest.mark.parametrize("layout", ["heads first", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack((x, x), -1)[..., 0] if layout == "channels apart" else x[:, :1].expand(x.shape)

    (q, k, cos, sin), gradients = case(2, 5, 4, 2, 16)
    inputs = [view(x).detach().requires_grad_() for x in (q, k)] + [cos, sin]
    check(qk_norm_rotary, reference, inputs, [view(g) for g in gradients])
    (qk_norm_rotary(*inputs)[0].sum()).backward()  # a gradient of stride 0, and none for k


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 16), (2, 0, 2, 1, 16)])
def test_nothing_gives_nothing(shape):
    inputs, gradients = case(*shape)
    check(qk_norm_rotary, reference, inputs, gradients)


@pytest.mark.xdist_group("gigabytes")
def test_tokens_may_lie_beyond_two_to_the_31():
    (q, k, cos, sin), gradients = case(2, 2, 1, 1, 8)
    apart = torch.empty_strided((2, 2, 1, 8), (2**31, 8, 8, 1), device=DEVICE, dtype=torch.float16)
    q, k = q.detach().half().requires_grad_(), k.detach().half().requires_grad_()
    far = apart.copy_(q.detach()).requires_grad_()
    ours = outputs_and_gradients(qk_norm_rotary, (far, k, cos, sin), gradients)
    for a, b in zip(ours, outputs_and_gradients(qk_norm_rotary, (q, k, cos, sin), gradients), strict=True):
        assert torch.equal(a, b)


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(2, 33, 4, 2, 32)
    first, second = (outputs_and_gradients(qk_norm_rotary, inputs, gradients) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    (q, k, cos, sin), (dq, dk) = case(2, 3, 4, 2, 16)
    opcheck(module._rotary.op, (q, k, cos, sin, 1.0, 1e-6))
    rstd = [torch.ones(x.shape[:3], device=DEVICE) for x in (q, k)]
    opcheck(module._rotary_backward.op, (dq, dk, q.detach(), k.detach(), cos, sin, *rstd, 1.0))


def test_compiles_whole_to_the_same_results():
    def function(x, cos, sin):
        q, k, v = x.sin().split((4, 2, 2), dim=2)
        q, k = qk_norm_rotary(q, k, cos, sin)
        return q.flatten(2), k * v

    x, (cos, sin) = random(2, 5, 8, 16), rotary_tables(5, 16, 1e4, DEVICE)
    gradients = [random(2, 5, 64, grad=False), random(2, 5, 2, 16, grad=False)]
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), (x, cos, sin), gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, (x, cos, sin), gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_named():
    (q, k, cos, sin), _ = case(1, 4, 2, 1, 16)
    with pytest.raises(ValueError, match="q is"):
        qk_norm_rotary(q, k[..., :8], cos, sin)
    with pytest.raises(ValueError, match="cos is"):
        qk_norm_rotary(q, k, cos[:3], sin[:3])
