import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, check, chosen, far_apart, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import qkv as module
from hotlap.kernels.qkv import attention_inputs, attention_inputs_ref, rotary_tables

pytestmark = pytest.mark.usefixtures("triton_or_c")


def case(B, T, H, K, C, dtype=torch.float32, embedded=True, gain=1.0):
    """The inputs, the tables among them, and gradients of q, k and v."""
    qkv = random(B, T, H + 2 * K, C, dtype=dtype)
    added = [random(B, T, K, dtype=dtype, seed=1), random(B, T, K, C, dtype=dtype, seed=2)]
    tables = rotary_tables(T, C, 10_000.0, DEVICE)
    gradients = [random(B, T, heads, C, seed=i, grad=False) for i, heads in enumerate((H, K, K), 3)]
    return [qkv, K, *tables, gain, *(added if embedded else ())], gradients


SHAPES = [(1, 5, 1, 1, 6), (2, 63, 6, 2, 16), (1, 97, 3, 3, 96), (2, 5, 8, 1, 128), (1, 200, 2, 1, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("embedded", [False, True])
def test_is_as_exact_as_torch(shape, dtype, embedded):
    for gain in (1.0, 1.2):
        check(attention_inputs, attention_inputs_ref, *case(*shape, dtype, embedded, gain), scale=1e-3)


def test_each_sequence_may_stand_at_its_own_positions():
    (qkv, K, cos, sin, *rest), gradients = case(3, 4, 2, 1, 16)
    positions = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]]).to(DEVICE)
    for p in (positions, positions[:1]):
        check(attention_inputs, attention_inputs_ref, [qkv, K, cos[p], sin[p], *rest], gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tables_may_be_of_another_dtype(dtype):
    (qkv, K, cos, sin, *rest), gradients = case(2, 5, 2, 1, 16)
    tables = cos.to(dtype), sin.to(dtype)
    results = [
        outputs_and_gradients(attention_inputs, [qkv, K, *given, *rest], gradients)
        for given in (tables, [x.float() for x in tables])
    ]
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_step_of_decoding_is_a_row_of_the_whole():
    (qkv, K, cos, sin, *rest), _ = case(2, 9, 4, 2, 32)
    gain, gate, embedding = rest
    whole = attention_inputs(qkv, K, cos, sin, *rest)
    token, at = torch.arange(2), torch.tensor([3, 7])  # of each sequence

    def one(x):
        return x[token, at].unsqueeze(1)

    with torch.no_grad():
        tables = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
        part = attention_inputs(one(qkv), K, *tables, gain, one(gate), one(embedding))
    for a, b in zip(part, whole, strict=True):
        torch.testing.assert_close(a, one(b))


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    (qkv, K, cos, sin, *_), _ = case(1, 9, 1, 1, 32, embedded=False)
    q, k, _ = attention_inputs(qkv, K, cos, sin, 2.0)
    torch.testing.assert_close(q.square().mean(-1), torch.full_like(q[..., 0], 4.0))
    q, k, _ = attention_inputs(qkv[:, :1].expand(qkv.shape), K, cos, sin)
    torch.testing.assert_close((q[0, 5, 0] * k[0, 2, 0]).sum(), (q[0, 8, 0] * k[0, 5, 0]).sum())


@pytest.mark.parametrize("embedded", [False, True])
def test_outputs_and_gradients_share_no_memory_with_inputs_and_their_heads_have_no_gaps(embedded):
    inputs, gradients = case(2, 5, 4, 2, 16, embedded=embedded)
    given = {x.untyped_storage().data_ptr() for x in (*inputs, *gradients) if isinstance(x, torch.Tensor)}
    found = outputs_and_gradients(attention_inputs, inputs, gradients)
    assert all(x.untyped_storage().data_ptr() not in given for x in found)
    q, k, v, *gradients = found
    for x in (q, k, v):  # whole tokens, or as matmuls over heads read them
        assert x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    assert all(x.is_contiguous() for x in gradients)


@pytest.mark.parametrize("layout", ["heads first", "channels apart", "expanded"])
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    def view(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack((x, x), -1)[..., 0] if layout == "channels apart" else x[:, :1].expand(x.shape)

    (qkv, K, cos, sin, gain, *added), gradients = case(2, 5, 4, 2, 16)
    qkv, *added = (view(x).detach().requires_grad_() for x in (qkv, *added))
    inputs = [qkv, K, cos, sin, gain, *added]
    check(attention_inputs, attention_inputs_ref, inputs, [view(g) for g in gradients])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_unused_output_has_no_gradient(used):
    inputs, gradients = case(2, 5, 4, 2, 16)

    def one(function):
        return lambda *x: function(*x)[used] + 0 * x[-1].sum() + 0 * x[-2].sum()

    check(
        one(attention_inputs),
        one(attention_inputs_ref),
        inputs,
        gradients[used : used + 1],
    )


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 16), (2, 0, 2, 1, 16)])
def test_nothing_gives_nothing(shape):
    check(attention_inputs, attention_inputs_ref, *case(*shape))


@pytest.mark.xdist_group("gigabytes")
def test_tokens_may_lie_beyond_two_to_the_31():
    (qkv, *rest), gradients = case(3, 2, 1, 1, 8, torch.float16)
    gradients = [g.half() for g in gradients]
    far = far_apart(qkv).requires_grad_()
    ours = outputs_and_gradients(attention_inputs, (far, *rest), [*map(far_apart, gradients)])
    for a, b in zip(ours, outputs_and_gradients(attention_inputs, (qkv, *rest), gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.xdist_group("gigabytes")
def test_heads_may_lie_beyond_two_to_the_31():
    (qkv, *rest), gradients = case(1, 2, 1, 1, 8, torch.float16)
    far = far_apart(qkv.permute(2, 0, 1, 3)).permute(1, 2, 0, 3).requires_grad_()
    for a, b in zip(
        outputs_and_gradients(attention_inputs, (far, *rest), gradients),
        outputs_and_gradients(attention_inputs, (qkv, *rest), gradients),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(2, 33, 4, 2, 32)
    first, second = (outputs_and_gradients(attention_inputs, inputs, gradients) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("embedded", [False, True])
def test_the_operations_keep_the_rules_of_torch(embedded):
    (qkv, K, cos, sin, gain, *added), gradients = case(2, 3, 4, 2, 16, embedded=embedded)
    added = added or [None, None]
    opcheck(chosen(module._qkv), (qkv, K, cos, sin, gain, 1e-6, *added))
    q, k, _ = (torch.empty_like(g) for g in gradients)
    added = [x if x is None else x.detach() for x in added]
    rstd = torch.ones(2, 3, 6, device=DEVICE)
    opcheck(
        chosen(module._qkv_backward), (*gradients, q.normal_(), k.normal_(), cos, sin, rstd, gain, *added)
    )


@pytest.mark.parametrize("embedded", [False, True])
def test_compiles_whole_to_the_same_results(embedded):
    def function(qkv, *rest):
        q, k, v = attention_inputs(qkv.sin(), *rest)
        return q.flatten(2), k * v

    inputs, _ = case(2, 5, 4, 2, 16, embedded=embedded)
    gradients = [random(2, 5, 64, grad=False), random(2, 5, 2, 16, grad=False)]
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), inputs, gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, inputs, gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_named():
    (qkv, K, cos, sin, gain, gate, embedding), _ = case(1, 4, 2, 1, 16)
    with pytest.raises(ValueError, match="qkv is"):
        attention_inputs(qkv, 2, cos, sin)
    with pytest.raises(ValueError, match="cos is"):
        attention_inputs(qkv, K, cos[:3], sin[:3])
    with pytest.raises(ValueError, match="both, or neither"):
        attention_inputs(qkv, K, cos, sin, gain, gate)
    with pytest.raises(ValueError, match="value_embedding is"):
        attention_inputs(qkv, K, cos, sin, gain, gate, embedding.flatten(2))
    with pytest.raises(ValueError, match="positive"):
        attention_inputs(qkv, K, cos, sin, 0.0)
