"""The chunked loss against the reference and against float64."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_tools import DEVICE, check
from helpers.tools import assert_as_good, relative_error
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotlap.kernels import linear_cross_entropy as module
from hotlap.kernels.cross_entropy import IGNORE
from hotlap.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

N, D, V = 53, 24, 101


@pytest.fixture(params=["torch", "triton", "c"], autouse=True)
def kernels(request, choose_kernels):
    """Every path; kernels on poisoned memory."""
    return (
        choose_kernels("torch")
        if request.param == "torch"
        else request.getfixturevalue(f"{request.param}_kernels")
    )


def problem(dtype=torch.float32, ignored=(0, 7, 52)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    head = 3 * torch.randn(V, D, generator=generator)  # logits large enough to be capped
    targets = torch.randint(V, (N,), generator=generator)
    targets[list(ignored)] = IGNORE
    return x, head.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def naive(x, head, targets, softcap, reduction):
    """One logarithm a token, in float64."""
    logits = x @ head.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = [row.exp().sum().log() - row[t] for row, t in zip(logits, targets, strict=True) if t != IGNORE]
    total = torch.stack(losses).sum()
    return total / len(losses) if reduction == "mean" else total


def with_gradients(function, x, head, targets, softcap, reduction, scale):
    loss = function(x, head, targets, softcap, reduction)
    return loss.detach(), *torch.autograd.grad(loss * scale, (x, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_chunks_give_the_loss_and_both_gradients(rows, reduction, softcap, dtype, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: rows)
    x, head, targets = problem(dtype)
    arguments = (targets, softcap, reduction, 0.37)
    actual = with_gradients(linear_cross_entropy, x, head, *arguments)
    plain = with_gradients(linear_cross_entropy_ref, x, head, *arguments)
    exact_head = head.detach().to(dtype).double().requires_grad_()  # what the product is given
    exact = with_gradients(naive, x.detach().double().requires_grad_(), exact_head, *arguments)
    for one, other, wanted in zip(actual, plain, exact, strict=True):
        assert_as_good(one, other, wanted)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype and actual[2].dtype == torch.float32


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_head_changes_no_gradient_but_its_own(reduction, monkeypatch):
    monkeypatch.setattr(module, "_grown", None)  # the parts of its gradient are not computed
    x, head = torch.randn(70, 24, device=DEVICE, requires_grad=True), torch.randn(50, 24, device=DEVICE)
    targets = torch.randint(0, 50, (70,), device=DEVICE)
    linear_cross_entropy(x, head, targets, 15.0, reduction).sum().backward()
    found, x.grad = x.grad, None
    linear_cross_entropy_ref(x, head, targets, 15.0, reduction).sum().backward()
    assert relative_error(found, x.grad.double()) < 1e-5 and head.grad is None


def test_ignored_tokens_carry_no_loss_and_no_gradient():
    x, head, targets = problem()
    kept = targets != IGNORE
    loss, dx, dw = with_gradients(linear_cross_entropy, x, head, targets, 15.0, "sum", 1.0)
    alone = with_gradients(linear_cross_entropy, x[kept], head, targets[kept], 15.0, "sum", 1.0)
    assert not dx[~kept].any()
    for one, other in zip((loss, dx[kept], dw), (alone[0], alone[1], alone[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_batch_without_any_loss_is_zero_and_teaches_nothing():
    x, head, targets = problem(ignored=range(N))
    loss, dx, dw = with_gradients(linear_cross_entropy, x, head, targets, 15.0, "sum", 1.0)
    assert loss == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("learning", [True, False])
def test_every_reduction_is_pytorchs_with_and_without_gradients(learning, reduction, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 16)
    x, head, targets = problem()
    with torch.set_grad_enabled(learning):
        losses = linear_cross_entropy(x, head, targets, 0.0, reduction)
    expected = F.cross_entropy(x @ head.T, targets, ignore_index=IGNORE, reduction=reduction)
    torch.testing.assert_close(losses, expected)
    assert losses.requires_grad == learning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap, z_loss", [(0.0, 0.0), (15.0, 0.0), (15.0, 0.1), (0.0, 0.1)])
def test_each_tokens_loss_has_its_own_gradient(softcap, z_loss, dtype, monkeypatch):
    """The weights of the tokens, some zero, arrive in dx and dW: none is lost in what a chunk has summed."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 16)
    x, head, targets = problem(dtype)
    weights = torch.linspace(-1, 1, N, device=DEVICE).mul(10).round()
    head = head.detach().to(dtype).float().requires_grad_()  # so that float64 sees the same
    for reduction, gradient in (("none", weights), ("sum", torch.tensor(-2.5)), ("mean", torch.tensor(0.3))):
        check(
            lambda x, w, r=reduction: linear_cross_entropy(x, w, targets, softcap, r, z_loss),
            lambda x, w, r=reduction: linear_cross_entropy_ref(x, w, targets, softcap, r, z_loss).to(
                torch.promote_types(torch.float32, x.dtype)
            ),
            [x, head], [gradient.to(DEVICE)], scale=1.0,
        )  # fmt: skip


def test_without_reduction_or_z_loss_it_is_the_negative_log_probability():
    x, head, targets = problem(ignored=())
    expected = torch.log_softmax(15 * torch.tanh(x @ head.T / 15), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(-linear_cross_entropy(x, head, targets, 15.0, "none"), expected)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        floats = [x for x in tree_leaves(result) if torch.is_tensor(x) and x.is_floating_point()]
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in floats]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 30)
    x, head = torch.randn(200, 8, device=DEVICE), torch.randn(300, 8, device=DEVICE)
    targets, ones = torch.randint(300, (200,), device=DEVICE), torch.ones(200, device=DEVICE)
    with Largest() as ours:
        module._linear_sum.eager(x, head, targets, 15.0, 0.0, IGNORE)
        module._linear_losses.eager(x, head, targets, 15.0, 0.0, IGNORE)
        module._linear_losses_backward.eager(ones, x, head, targets, 15.0, 0.0, IGNORE)
    with Largest() as theirs:
        linear_cross_entropy_ref(x, head, targets, 15.0)
    assert ours.elements == 30 * 300 and theirs.elements == 200 * 300


class Memory(TorchDispatchMode):
    """The bytes of tensors that live at once, at most, of those that operations return."""

    now = most = 0

    def __init__(self):
        super().__init__()
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, tree_leaves(result)):
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_64k_tokens_of_d24_take_less_than_3_gb(monkeypatch):
    """Forward and backward, with x, the head and its float32 master, where the naive way takes 17 GB."""
    rows = module.chunk_rows(32768, 1536, "cuda")
    monkeypatch.setattr(module, "chunk_rows", lambda *_: rows)

    def kernels(logits, targets, softcap, z_loss, ignore, dlosses):  # what they allocate
        return torch.empty(len(logits)), logits

    monkeypatch.setattr(module, "_losses_and_gradient", kernels)

    def whole(function):
        with FakeTensorMode(), Memory() as memory:
            x = torch.empty(65536, 1536, dtype=torch.bfloat16, requires_grad=True)
            head, targets = (
                torch.empty(32768, 1536, requires_grad=True),
                torch.zeros(65536, dtype=torch.int64),
            )
            function(x, head, targets)
        return memory.most / 1e9

    def ours(x, head, targets):
        saved = module._sum(x.detach(), head.detach(), targets, 15.0, 0.0, IGNORE)
        return [
            torch.mul(gradient, torch.ones(1, 1), out=torch.empty_like(gradient)) for gradient in saved[1:]
        ]

    def naive(x, head, targets):
        return torch.autograd.grad(linear_cross_entropy_ref(x, head, targets, 15.0), (x, head))

    assert 1 < whole(ours) < 1.6 and whole(naive) > 17  # a second chunk of logits would make it 2.0


def test_shares_of_dw_are_added_in_float32_whatever_the_head(monkeypatch):
    """In bfloat16, a sum of 53 equal shares, one of each row, would stop to grow."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 1)
    x, _, _ = problem(torch.bfloat16, ignored=())
    head = torch.zeros(V, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    x = torch.ones_like(x) * 0.3
    targets = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    (dw,) = torch.autograd.grad(linear_cross_entropy(x, head, targets), head)
    assert dw.dtype == torch.bfloat16
    exact = N * 0.3 * (1 / V - 1)
    assert abs(dw[0].double().mean().item() / exact - 1) < 0.01


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_target_of_tokens_without_loss_can_be_chosen(reduction):
    x, head, targets = problem()
    other = targets.where(targets != IGNORE, -100)
    results = [
        with_gradients(
            lambda *given, i=index: linear_cross_entropy(*given, ignore_index=i).sum(), x, head, given, 15.0,
            reduction, 1.0,
        )
        for given, index in ((targets, IGNORE), (other, -100))
    ]  # fmt: skip
    assert all(map(torch.equal, *results))


def test_chunks_are_bounded_in_bytes_and_not_too_thin():
    assert module.chunk_rows(32768, 1536, "cuda") == 4096  # 256 MiB in bfloat16
    assert module.chunk_rows(50304, 768, "cuda") % 128 == 0
    assert module.chunk_rows(10**9, 768, "cuda") == 128
    assert module.chunk_rows(4096, 256, "cpu") == 512 and module.chunk_rows(32768, 768, "cpu") == 1536


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiles_whole_to_the_same_results(reduction):
    def function(x, head, targets):
        return linear_cross_entropy(x.sin(), head, targets, 15.0, reduction)

    x, head, targets = problem()
    scale = (
        torch.linspace(1, 2, N, device=DEVICE) if reduction == "none" else torch.tensor(1.5, device=DEVICE)
    )
    compiled = torch.compile(function, fullgraph=True)
    results = []
    for run in (compiled, function):
        loss = run(x, head, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, head), scale)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operations_keep_the_rules_of_torch():
    x, head, targets = problem()
    opcheck(module._linear_sum.registered(), (x, head, targets, 15.0, 0.1, IGNORE))
    opcheck(module._linear_losses.registered(), (x, head, targets, 15.0, 0.1, IGNORE))


def test_two_runs_agree_bit_for_bit():
    x, head, targets = problem(torch.bfloat16)
    first, second = (
        with_gradients(linear_cross_entropy, x, head, targets, 15.0, "sum", 1.0) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_wrong_arguments_are_named():
    x, head, targets = problem()
    with pytest.raises(ValueError, match=r"x is \(53, 24\), head \(101, 23\)"):
        linear_cross_entropy(x, head[:, :-1], targets)
    with pytest.raises(ValueError, match="reduction='median'"):
        linear_cross_entropy(x, head, targets, reduction="median")
