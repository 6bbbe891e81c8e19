import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_tools import DEVICE, DTYPES, check, far_rows, outputs_and_gradients, random
from torch.library import opcheck

from hotlap.kernels import cross_entropy as module
from hotlap.kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_ref

pytestmark = pytest.mark.usefixtures("triton_kernels")


def case(N, V, dtype=torch.float32):
    """Logits and targets; every third token carries no loss."""
    logits = random(N, V, dtype=dtype, grad=False).mul_(4).requires_grad_()
    targets = torch.arange(N).mul(7919).remainder(V).to(DEVICE)
    targets[1::3] = IGNORE
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 63, 97, 200, 257, 1025, 16384])
def test_is_as_exact_as_torch(vocab, dtype):
    logits, targets = case(4, vocab, dtype)
    dloss = random(4, seed=1, grad=False)
    for softcap, z_loss in ((0.0, 0.0), (5.0, 1e-2)):

        def arguments(function, softcap=softcap, z_loss=z_loss):
            return lambda logits: function(logits, targets, softcap, "none", z_loss)

        scale = 1.0 if vocab == 1 else 1e-30  # the loss of the only word there is, is zero
        check(arguments(cross_entropy), arguments(cross_entropy_ref), (logits,), [dloss], scale)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_the_loss_of_torch(reduction):
    logits, targets = case(7, 50)
    want = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)
    torch.testing.assert_close(cross_entropy(logits, targets, reduction=reduction), want)
    torch.testing.assert_close(cross_entropy_ref(logits, targets, reduction=reduction), want)


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_ref])
def test_tokens_without_loss_have_none_and_no_gradient(function):
    logits, targets = case(5, 70)
    logits.data[1] = float("nan")  # one of them
    targets[1:] = IGNORE
    (grad,) = torch.autograd.grad(function(logits, targets, 0.0, "sum"), logits)
    assert not grad[1:].any() and grad[0].any()
    targets[:] = IGNORE
    loss = function(logits, targets)
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_logits_of_any_size_do_not_overflow():
    logits, targets = case(4, 300)
    for scale, shift in ((1.0, 1e4), (1e4, 0.0)):
        x = (logits.detach() * scale + shift).requires_grad_()
        x.data[:, 5] = float("-inf")  # a word that cannot be
        loss = cross_entropy(x, targets, reduction="none")
        want = F.cross_entropy(x, targets, ignore_index=IGNORE, reduction="none")
        torch.testing.assert_close(loss, want)
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 97, 9000])
@pytest.mark.parametrize("softcap, z_loss", [(0.0, 0.0), (5.0, 1e-2)])
def test_loss_and_gradient_at_once_are_those_of_two_passes(vocab, softcap, z_loss, dtype):
    logits, targets = case(5, vocab, dtype)
    dloss = random(5, seed=1, grad=False)
    dloss[3] = 0
    memory = torch.zeros(5, vocab + 3, dtype=dtype, device=DEVICE)
    rows = memory[:, :vocab].copy_(logits.detach())
    losses = module.cross_entropy_both(dloss, rows, targets, softcap, z_loss, IGNORE)
    expected = outputs_and_gradients(
        lambda x: cross_entropy(x, targets, softcap, "none", z_loss), (logits,), [dloss]
    )
    fast = softcap and dtype == torch.bfloat16 and DEVICE.type == "cuda"  # by the GPU's own tanh
    torch.testing.assert_close(
        (losses, rows),
        tuple(expected),
        rtol=1e-6 if dtype == torch.float32 else 1e-2,
        atol=1e-2 if fast else 1e-6,
    )
    assert not memory[:, vocab:].any()


@pytest.mark.parametrize("target", [8, -2])
def test_a_target_that_is_no_word_gives_nan(target):
    assert cross_entropy(random(1, 8), torch.tensor([target]).to(DEVICE)).isnan()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_target_of_tokens_without_loss_can_be_chosen(reduction):
    logits, targets = case(7, 50)
    targets = targets.where(targets != IGNORE, -100)
    want = F.cross_entropy(logits, targets, reduction=reduction)
    for function in (cross_entropy, cross_entropy_ref):
        torch.testing.assert_close(function(logits, targets, reduction=reduction, ignore_index=-100), want)


def test_gradients_are_written_in_place_only_where_that_is_allowed():
    logits, targets = case(6, 100)
    before = logits.detach().clone()
    (apart,) = torch.autograd.grad(cross_entropy(logits, targets, 9.0), logits)
    assert torch.equal(logits, before)
    (within,) = torch.autograd.grad(cross_entropy(logits, targets, 9.0, inplace_backward=True), logits)
    assert within.data_ptr() == logits.data_ptr() and torch.equal(within, apart)


def test_logits_that_were_overwritten_are_not_used_again():
    x, targets = case(6, 100)
    logits = x.sin()
    loss = cross_entropy(logits, targets, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "expanded"])
@pytest.mark.parametrize("in_place", [False, True])
def test_strides_of_inputs_and_gradients_do_not_matter(layout, in_place):
    x, targets = case(8, 80)
    views = {"rows apart": x[:, 3:70], "transposed": x.T[:8], "expanded": x[:1].expand(8, 80)}
    logits = views[layout].detach().requires_grad_()
    targets = targets.repeat_interleave(2)[::2].clamp(max=7)
    dloss = random(16, seed=1, grad=False)[::2]
    want = outputs_and_gradients(lambda x: cross_entropy_ref(x, targets, 0.0, "none"), (logits,), [dloss])
    in_place = in_place and layout != "expanded"  # whose rows are one
    ours = outputs_and_gradients(
        lambda x: cross_entropy(x, targets, 0.0, "none", inplace_backward=in_place), (logits,), [dloss]
    )
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_gives_nothing(reduction):
    logits = random(0, 9)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and logits.grad.shape == (0, 9)


@pytest.mark.xdist_group("gigabytes")
def test_rows_may_lie_beyond_two_to_the_31():
    targets, dloss = torch.tensor([3, 60, 7]).to(DEVICE), random(3, grad=False)
    for in_place in (False, True):
        far = far_rows(64).requires_grad_()
        near = far.detach().contiguous().requires_grad_()
        results = (
            outputs_and_gradients(
                lambda x, in_place=in_place: cross_entropy(x, targets, 0.0, "none", 0.0, in_place),
                (x,),
                [dloss],
            )
            for x in (far, near)
        )
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    far, near = far.detach(), near.detach()  # which are gradients now, and logits as good as any
    losses = [module.cross_entropy_both(dloss, x, targets, 5.0, 0.0, IGNORE) for x in (far, near)]
    assert torch.equal(*losses) and torch.equal(far, near)


def test_two_runs_agree_bit_for_bit():
    logits, targets = case(9, 700)
    first, second = (
        outputs_and_gradients(
            lambda x: cross_entropy(x, targets, 15.0), (logits,), [torch.ones(()).to(DEVICE)]
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_the_operations_keep_the_rules_of_torch():
    logits, targets = case(4, 40)
    opcheck(module._cross_entropy.registered(), (logits, targets, 15.0, 1e-4, IGNORE, False))
    ones = torch.ones(4, device=DEVICE)
    opcheck(
        module._cross_entropy_backward.registered(), (ones, logits.detach(), targets, ones, 15.0, 0.0, IGNORE)
    )


def test_compiles_whole_to_the_same_results():
    def function(x):
        return cross_entropy(x.sin(), targets, 15.0, "mean", 1e-4, inplace_backward=True)

    x, targets = case(5, 33)
    gradients = [torch.ones(()).to(DEVICE)]
    compiled = outputs_and_gradients(torch.compile(function, fullgraph=True), (x,), gradients)
    for a, b in zip(compiled, outputs_and_gradients(function, (x,), gradients), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_is_named():
    logits, targets = case(4, 8)
    with pytest.raises(ValueError, match="logits are"):
        cross_entropy(logits, targets[:3])
    with pytest.raises(ValueError, match="none, mean or sum"):
        cross_entropy(logits, targets, reduction="average")
