"""The kernels for Hopper, on a CPU: what they compute and how their warps wait for each other."""

import subprocess
import sys

import pytest
import torch
from helpers import gluon_interpreter
from helpers.kernel_tools import error, outputs_and_gradients, random

from hotlap.kernels import attention as module
from hotlap.kernels import (
    attention_backward,
    attention_blocks,
    attention_forward,
    attention_hopper,
    attention_hopper_backward,
)
from hotlap.kernels.attention import attention, attention_ref
from hotlap.kernels.dispatch import INTERPRETED, Device
from hotlap.kernels.tiles import Tile

_TABLE = attention_forward._attention_forward_tiles
pytestmark = [
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.skipif(not INTERPRETED or attention_hopper.gluon is None, reason="needs kernels in Python"),
]
FORMS = {
    attention_forward: {"_attention_forward": (32, 16, 3)},
    attention_backward: {"_attention_dq": (32, 16, 2), "_attention_dk_dv": (16, 32, 2)},
}


def table(kernel: str, m: int, n: int, stages: int):
    plain = Tile({"BLOCK_C": 128, "BLOCK_M": 16, "BLOCK_N": 16})
    special = Tile({"BLOCK_M": m, "BLOCK_N": n}, 4, stages, kernel=f"{kernel}_hopper_kernel")
    return lambda *_: [special, plain]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 32 queries and 16 keys, or the other way round, so that short rows have many of them."""
    for file, kernels in FORMS.items():
        for kernel, shape in kernels.items():
            for place in (file, module):
                if hasattr(place, f"{kernel}_tiles"):
                    monkeypatch.setattr(place, f"{kernel}_tiles", table(kernel, *shape))
            form = gluon_interpreter.Kernel(getattr(file, f"{kernel}_hopper_kernel"))
            monkeypatch.setattr(file, f"{kernel}_hopper_kernel", form)
    blocks = type(attention_blocks)("blocks")  # what Triton's interpreter takes stays as it is
    for name in ("edges", "block_at", "place"):
        function = getattr(attention_blocks, name).fn
        copied = type(function)(function.__code__, vars(blocks))
        setattr(blocks, name, copied)
        for place in (attention_hopper, attention_hopper_backward):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, copied)
    blocks.tl = gluon_interpreter.language
    gluon_interpreter.run_on_cpu(monkeypatch, attention_hopper, attention_hopper_backward)


def case(B, T, H, K, dtype=torch.float16, S=None):
    """q, k and v as views of one projection, of which q is the last T positions, and the gradient of y."""
    S = S or T
    qkv = random(B, S, H + 2 * K, 128, dtype=dtype, grad=False)
    q, k, v = qkv.split((H, K, K), dim=2)
    return [q[:, S - T :].requires_grad_(), k.requires_grad_(), v.requires_grad_()], [
        random(B, T, H, 128, seed=1, dtype=dtype, grad=False)
    ]


def compare(inputs, gradients, window=None, document_start=None, launched=3):
    """With attention_ref in float64."""
    counts = [0]
    original = gluon_interpreter.Kernel.__getitem__

    def count(kernel, grid):
        counts[0] += 1
        return original(kernel, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_interpreter.Kernel, "__getitem__", count)
        ours = outputs_and_gradients(
            lambda *x: attention(*x, window, document_start, backend="triton"), inputs, gradients
        )
    assert counts == [launched]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = [x.double() for x in gradients]
    expected = outputs_and_gradients(lambda *x: attention_ref(*x, window, document_start), exact, wide)
    for a, b in zip(ours, expected, strict=True):
        scale = 1e-3 * wide[0].norm().item()  # exact dq and dk are zero where queries have no choice of keys
        assert error(a, b, scale) < (2e-3 if a.dtype == torch.float16 else 2e-2)


def starts(T: int, *places: int) -> torch.Tensor:
    """document_start (1, T), of documents that start at 0 and at these places."""
    begin = torch.tensor([0, *places])
    return begin[torch.searchsorted(begin, torch.arange(T), right=True) - 1][None]


@pytest.mark.parametrize("window", [None, 1, 16, 23, 64])
@pytest.mark.parametrize("T", [1, 16, 32, 33, 47, 64, 100, 128])
def test_any_length_and_window(T, window):
    compare(*case(1, T, 1, 1), window)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("places", [(), (1,), (40, 41), (32, 64), (99,), (33, 66, 67)])
def test_documents(places, window):
    compare(*case(1, 100, 2, 1), window, starts(100, *places))


@pytest.mark.parametrize("H, K", [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_heads(H, K, dtype):
    compare(*case(2, 50, H, K, dtype), 20)


@pytest.mark.parametrize("T, S", [(1, 50), (17, 80), (40, 41), (64, 100), (50, 20)])
@pytest.mark.parametrize("window", [None, 10])
def test_queries_are_the_last_of_the_positions(T, S, window):
    q, k, v = (random(2, n, 1, 128, seed=i, dtype=torch.float16) for i, n in enumerate((T, S, S)))
    dy = [random(2, T, 1, 128, seed=3, dtype=torch.float16, grad=False)]
    compare([q, k, v], dy, window)
    compare([q, k, v], dy, window, torch.full((2, T), 7))


def test_many_queries_at_once(monkeypatch):
    monkeypatch.setattr(attention_backward, "_attention_dk_dv_tiles", table("_attention_dk_dv", 64, 32, 2))
    compare(*case(1, 150, 4, 2), 70, starts(150, 30))


def test_what_the_forms_do_not_take_is_for_the_plain_ones():
    (q, k, v), gradients = case(1, 40, 2, 2)
    assert attention_hopper.hopper_takes(0.0, q, k, v)
    assert not attention_hopper.hopper_takes(15.0, q, k, v)
    odd = torch.zeros(40 * 2 * 129 + 8, dtype=torch.float16)
    for strides in ((0, 258, 129, 1), (40 * 256, 256, 0, 1)):  # rows of 258 bytes; heads that are one
        x = odd.as_strided((1, 40, 2, 128), strides).requires_grad_()
        assert not attention_hopper.hopper_takes(0.0, q, x)
        compare([q, x, v], gradients, launched=0)
    unaligned = odd[1:].as_strided((1, 40, 2, 128), (40 * 256, 256, 128, 1))
    assert not attention_hopper.hopper_takes(0.0, unaligned)


def test_two_runs_agree_bit_for_bit():
    inputs, gradients = case(1, 70, 4, 2, torch.bfloat16)
    runs = [
        outputs_and_gradients(lambda *x: attention(*x, 30, backend="triton"), inputs, gradients)
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


def test_other_gpus_and_head_sizes_have_no_such_tiles():
    hopper = Device("H100", 232448, 132, tma=True, compute=90)
    if attention_hopper.MISSING:  # as it is under the interpreter
        assert not [tile for tile in _TABLE(128, hopper) if tile.kernel]
    for compute in (80, 100, 120):
        device = hopper._replace(compute=compute)
        assert not [tile for tile in _TABLE(128, device) if tile.kernel]


def test_without_gluon_there_is_one_line_of_reason_and_the_plain_tiles():
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "sys.modules['triton.experimental.gluon'] = None\n"
        "from hotlap.kernels import attention\n"
        "from hotlap.kernels.dispatch import Device\n"
        "device = Device('H100', 232448, 132, tma=True, compute=90)\n"
        "for table in (attention._attention_forward_tiles, attention._attention_dq_tiles):\n"
        "    print([tile.kernel for tile in table(128, device) if tile.kernel])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "[]"], result.stderr
    assert result.stderr.count("without the kernels for Hopper") == 1
