import pytest
import torch
from helpers.kernel_tools import DEVICE, DTYPES, check, far_rows, outputs_and_gradients, random
from helpers.tools import tiny_config
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from hotlap.kernels import embedding as module
from hotlap.kernels.embedding import embedding, embedding_ref, token_runs
from hotlap.kernels.tiles import Tile
from hotlap.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture(params=["small blocks", "default blocks"])
def blocks(request, monkeypatch):
    """Tokens, runs and rows that take several blocks, and one."""
    if request.param == "small blocks":
        for name in ("forward", "backward"):
            tile = Tile({"ROWS": 4, "BLOCK": 256})
            monkeypatch.setattr(module, f"_embedding_{name}_tiles", lambda *_, tile=tile: [tile])


def some_ids(*shape: int, V: int, seed: int = 0) -> torch.Tensor:
    """Of which every third is the second of the vocabulary, and some do not occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, shape, generator=generator)
    ids.view(-1)[::3] = min(1, V - 1)
    return ids.to(DEVICE)


def backward(ids, weight, seed=0, accumulate=True, dtype=torch.float32) -> None:
    """One micro-batch."""
    y = embedding(ids, weight, dtype, accumulate=accumulate)
    y.backward(random(*y.shape, seed=seed, dtype=dtype, grad=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, V, D", [(1, 1, 1, 1), (2, 17, 9, 33), (3, 20, 40, 16), (1, 70, 3, 520)])
def test_is_as_exact_as_torch(B, T, V, D, dtype, blocks):
    ids, weight, dy = some_ids(B, T, V=V), random(V, D), random(B, T, D, seed=1, grad=False).to(dtype)
    assert torch.equal(embedding(ids, weight, dtype), embedding_ref(ids, weight, dtype))

    def reference(weight):
        return embedding_ref(ids, weight, weight.dtype if weight.dtype == torch.float64 else dtype)

    check(lambda weight: embedding(ids, weight, dtype), reference, (weight,), [dy])


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_tables_and_their_gradients_keep_their_dtype(weight_dtype, blocks):
    ids, weight = some_ids(2, 20, V=9), random(9, 33, dtype=weight_dtype)
    for dtype in DTYPES:
        y = embedding(ids, weight, dtype)
        assert torch.equal(y, embedding_ref(ids, weight, dtype))
        (grad,) = torch.autograd.grad(y.float().sum(), weight)
        assert grad.dtype == weight_dtype
        assert torch.equal(grad[:, 0].float(), torch.bincount(ids.flatten(), minlength=9).float())


def test_strides_and_dtypes_of_ids_tables_and_gradients_do_not_matter():
    ids, weight, dy = some_ids(4, 30, V=9), random(9, 20, grad=False), random(4, 30, 20, seed=1, grad=False)
    expected = outputs_and_gradients(embedding_ref, (ids, weight.requires_grad_(), torch.float32), [dy])

    def outputs(ids, weight, dy):
        return outputs_and_gradients(embedding, (ids, weight, torch.float32), [dy])

    def apart(x):
        return torch.stack((x, torch.full_like(x, 7)), -1)[..., 0].detach()

    for given in (apart(ids), ids.int(), apart(ids.int()), ids.T.contiguous().T):
        torch.testing.assert_close(outputs(given, weight, dy), expected)
    for table in (apart(weight), weight.detach().T.contiguous().T):
        torch.testing.assert_close(outputs(ids, table.requires_grad_(), dy), expected)
    for gradient in (apart(dy), dy.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(outputs(ids, weight, gradient), expected)
    embedding(ids, weight, torch.float32).sum().backward()  # a gradient of stride 0
    assert torch.equal(weight.grad[:, 0], torch.bincount(ids.flatten(), minlength=9).float())


@pytest.mark.xdist_group("gigabytes")
def test_rows_may_lie_beyond_two_to_the_31():
    weight, dy = far_rows(20), far_rows(20)
    ids = torch.tensor([2, 1, 0], device=DEVICE)
    assert torch.equal(embedding(ids, weight, torch.float16), weight[ids])
    (grad,) = torch.autograd.grad(embedding(ids, weight.requires_grad_(), torch.float16), weight, dy)
    assert torch.equal(grad, dy.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_add_up_in_place_to_what_autograd_adds_up(count, dtype, blocks):
    tables = random(9, 33), random(9, 33)
    for accumulate, weight in enumerate(tables):
        kept = []
        for i in range(count):
            backward(some_ids(2, 17 - i, V=9 - i, seed=i), weight, i, bool(accumulate), dtype)
            kept.append(weight.grad.data_ptr())
        assert len(set(kept)) == 1
    assert torch.equal(tables[0].grad, tables[1].grad)


@pytest.mark.parametrize("accumulate", [False, True])
def test_only_the_first_of_micro_batches_gives_autograd_a_gradient_where_it_is_to_be_added(accumulate):
    weight, seen = random(9, 33), []
    weight.register_hook(seen.append)
    for i in range(3):
        backward(some_ids(2, 17, V=9), weight, i, accumulate)
    assert len([gradient for gradient in seen if gradient is not None]) == (1 if accumulate else 3)


def test_rows_that_do_not_occur_are_not_touched():
    weight = random(9, 33)
    weight.grad = torch.full_like(weight, float("nan"))
    weight.grad[3] = 0
    backward(torch.full((2, 5), 3, device=DEVICE), weight)
    assert weight.grad[3].isfinite().all() and weight.grad.isnan().all(1).sum() == 8


def test_a_gradient_asked_for_by_itself_is_returned_and_leaves_that_of_the_table():
    ids, weight = some_ids(2, 17, V=9), random(9, 33)
    weight.grad = torch.ones_like(weight)
    (grad,) = torch.autograd.grad(embedding(ids, weight, torch.float32).sum(), weight)
    assert torch.equal(grad[:, 0], torch.bincount(ids.flatten(), minlength=9).float())
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("layout", ["transposed", "columns apart", "sparse", "differentiable"])
def test_gradients_of_other_layouts_are_added_to_by_autograd(layout):
    ids, weight, start = some_ids(2, 17, V=9), random(9, 33), random(9, 33, seed=2, grad=False)
    weight.grad = {
        "transposed": lambda: start.T.contiguous().T,
        "columns apart": lambda: torch.stack((start, start), 2)[..., 0],
        "sparse": lambda: start.to_sparse(1),
        "differentiable": lambda: start.clone().requires_grad_(),
    }[layout]()
    backward(ids, weight)
    expected = weight.detach().clone().requires_grad_()
    expected.grad = start.clone()
    backward(ids, expected, accumulate=False)
    torch.testing.assert_close(weight.grad.detach(), expected.grad)


def test_a_gradient_that_is_to_be_differentiated_is_not_changed():
    weight = random(9, 33)
    before = weight.grad = torch.ones_like(weight)
    y = embedding(some_ids(2, 17, V=9), weight, torch.float32, accumulate=True)
    y.sum().backward(create_graph=True)
    assert torch.equal(before, torch.ones_like(weight)) and not torch.equal(weight.grad, before)


def test_a_table_used_twice_or_elsewhere_gets_the_sum():
    """Such as one that is the head too."""
    ids, tables = some_ids(2, 17, V=9), (random(9, 33), random(9, 33))
    for accumulate, weight in enumerate(tables):
        for i in range(3):
            y, z = (
                embedding(x, weight, torch.float32, accumulate=bool(accumulate)) for x in (ids, ids.flip(0))
            )
            (y.square() @ weight.T + z.sum()).sum().mul(i + 1).backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad)


@pytest.mark.parametrize("wrong", [-1, 9, -(2**20), 2**20])
def test_an_id_out_of_range_gives_nan_and_no_gradient(wrong):
    weight, ids = random(9, 33), torch.tensor([[2, wrong, 8]], device=DEVICE)
    y = embedding(ids, weight, torch.float32)
    assert torch.equal(y[0, ::2], weight[[2, 8]]) and y[0, 1].isnan().all()
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert torch.equal(grad[:, 0], torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1.0], device=DEVICE))


def test_torch_raises_for_an_id_out_of_range(choose_kernels):
    choose_kernels("torch")
    with pytest.raises(IndexError):
        embedding(torch.tensor([9]), torch.zeros(9, 3), torch.float32)


@pytest.mark.parametrize("N, D", [(0, 33), (5, 0)])
def test_no_tokens_and_no_columns_are_empty(N, D):
    ids, weight = torch.zeros(2, N, dtype=torch.int64, device=DEVICE), random(9, D)
    assert embedding(ids, weight, torch.bfloat16).shape == (2, N, D)
    for _ in range(2):
        backward(ids, weight)
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_without_a_gradient_nothing_is_sorted():
    ids, weight = some_ids(2, 17, V=9), random(9, 33)
    assert token_runs(ids, weight.detach()) is None
    with torch.no_grad():
        assert token_runs(ids, weight) is None
        assert torch.equal(embedding(ids, weight, torch.float32), weight[ids])


def test_two_runs_agree_bit_for_bit():
    ids, dy = some_ids(2, 300, V=9), [random(2, 300, 33, grad=False)]
    given = ids, random(9, 33), torch.float32
    assert all(map(torch.equal, *(outputs_and_gradients(embedding, given, dy) for _ in range(2))))


def test_the_operations_keep_the_rules_of_torch():
    ids, weight = some_ids(2, 17, V=9), random(9, 33)
    runs, dy = token_runs(ids, weight), random(2, 17, 33, grad=False)
    for accumulate in (False, True):
        opcheck(module._embedding.registered(), (weight, ids, *runs, torch.bfloat16, accumulate))
    opcheck(module._embedding.registered(), (weight.detach(), ids, None, None, torch.float32, False))
    opcheck(module._embedding_backward.registered(), (dy, *runs, torch.float32))
    opcheck(module._embedding_add.registered(), (torch.zeros(9, 33, device=DEVICE), dy, *runs))


def test_compiles_whole_to_the_same_gradients_of_two_micro_batches():
    tables = random(9, 33), random(9, 33)

    def function(ids, weight):
        return embedding(ids, weight, torch.float32, accumulate=True).sin().sum()

    for run, weight in zip((function, torch.compile(function, fullgraph=True)), tables, strict=True):
        for i in range(2):
            run(some_ids(2, 17, V=9, seed=i), weight).backward()
    torch.testing.assert_close(tables[1].grad, tables[0].grad)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode():
        weight = torch.empty(9, 33, device=DEVICE, requires_grad=True)
        ids = torch.empty(2, 17, dtype=torch.int64, device=DEVICE)
        for _ in range(2):
            y = embedding(ids, weight, torch.bfloat16, accumulate=True)
            y.sum().backward()
    assert y.shape == (2, 17, 33) and y.dtype == torch.bfloat16 and weight.grad.shape == (9, 33)


def test_a_model_has_the_gradients_of_torch_after_three_micro_batches(choose_kernels):
    found = []
    for kernels in ("torch", "triton"):
        choose_kernels(kernels)
        config = tiny_config(context=16, vocab_size=40, width=32, heads=1, kv_heads=1)
        model = GPT(config).to(DEVICE).init_weights()
        with torch.no_grad():
            for block in model.blocks:  # so that every table has a gradient
                block.attention.proj.weight.normal_(0, 0.05, generator=torch.Generator(DEVICE).manual_seed(0))
        for table in (model.embedding, *model.value_embeddings.values()):
            table.accumulate = True
        for i in range(3):
            ids = some_ids(1, 9, V=40, seed=i)
            model(ids[:, :-1], ids[:, 1:].contiguous()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
