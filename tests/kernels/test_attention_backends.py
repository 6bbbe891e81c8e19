"""Who computes attention: what "auto" chooses, what others are asked for, and what they refuse."""

import logging
import sys
from types import ModuleType

import pytest
import torch
from helpers.kernel_tools import random

from hotlap.kernels import attention as module
from hotlap.kernels import attention_torch, tiles
from hotlap.kernels.attention import attention, attention_ref

GPU = tiles.Device("A GPU", 232448, 132)


@pytest.fixture
def torch_kernels(choose_kernels):
    choose_kernels("torch")


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """What is chosen on an H100, pretended, where nothing is measured yet; cuDNN takes heads of up to 128."""
    device = torch.device("cuda", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "device_facts", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(module, "flash_attn_function", lambda _: None)

    def takes(backend, device, dtype, C, S, grouped):
        return dtype != torch.float32 and (backend == "flash" or C <= 128)

    monkeypatch.setattr(module, "sdpa_takes", takes)

    def chosen(S, window=0, documents=False, softcap=False, dtype=torch.bfloat16, kernels=True, C=128):
        plain = not (window or documents or softcap)
        return module._choose.__wrapped__(
            device, dtype, C, S, False, plain, documents, kernels, window, softcap, False
        )

    tiles.tuned.cache_clear()
    yield chosen
    tiles.tuned.cache_clear()


def test_what_is_not_measured_is_chosen_by_a_rule(hopper):
    assert hopper(2048) == "cudnn" and hopper(2048, C=256) == "flash"
    for more in ({"window": 512}, {"documents": True}, {"softcap": True}):
        assert hopper(2048, **more) == "triton"
        assert hopper(2048, **more, kernels=False) == "blockwise"
        assert hopper(2048, **more, dtype=torch.float32) == "blockwise"
    assert hopper(2048, dtype=torch.float32) == "sdpa"


def test_what_is_measured_is_chosen_where_it_applies(hopper, monkeypatch):
    backends = {"128 2048 0": "triton", "128 2048 512": "cudnn", "128 4096 512": "flash-attn"}
    tiles.write_tuned(GPU.name, {}, backends)
    assert hopper(2048) == "triton"
    assert hopper(2048, window=512) == "triton"  # cuDNN's has no windows here
    assert hopper(4096, window=512) == "triton"  # flash-attn is not installed
    monkeypatch.setattr(module, "flash_attn_function", lambda _: print)
    assert hopper(4096, window=512) == "flash-attn"
    assert hopper(4096, window=512, documents=True) == "triton"
    assert hopper(4096, window=512, softcap=True) == "triton"  # which was not measured
    assert hopper(4096, window=512, dtype=torch.float32) == "blockwise"


def test_what_torch_refuses_falls_to_the_next(hopper, monkeypatch):
    monkeypatch.setattr(module, "sdpa_takes", lambda backend, *_: backend == "flash")
    assert hopper(2048) == "flash"
    monkeypatch.setattr(module, "sdpa_takes", lambda *_: False)
    assert hopper(2048) == "triton" and hopper(2048, kernels=False) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's choices")
@pytest.mark.parametrize("faster", ["sdpa", "blockwise"])
def test_the_choice_is_logged_once_with_its_reason(faster, torch_kernels, caplog, monkeypatch):
    monkeypatch.setattr(module, "fastest", lambda question, candidates: faster)
    caplog.set_level(logging.INFO, "hotlap")
    module._choose.cache_clear()
    module._report.cache_clear()
    for T in (8, 40, 8):
        x = random(1, T, 1, 16)
        attention(x, x, x)
        attention(x, x, x, 4)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("attention")]
    module._choose.cache_clear()
    module._report.cache_clear()
    assert sorted(lines) == sorted(
        ["attention: blockwise (more than causal)", f"attention: {faster} (only causal, measured)"]
    )


@pytest.mark.parametrize("H, K", [(4, 1), (4, 2), (3, 3)])
def test_torchs_attention_takes_grouped_heads_and_any_strides(H, K):
    q, k, v = (random(2, 20, heads, 16, seed=i, grad=False) for i, heads in enumerate((H, K, K)))
    q = torch.stack((q, q), -1)[..., 0]  # channels apart
    y = attention(q, k, v, scale=0.3, backend="sdpa")
    torch.testing.assert_close(y, attention_ref(q, k, v, scale=0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window, softcap", [(None, None), (1, None), (5, None), (5, 2.0), (100, None)])
def test_a_window_means_the_same_to_flash_attn(window, softcap, monkeypatch):
    """Of a function with flash-attn's parameters: `left` keys before the query's own, and none after."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0):
        left, right = window_size
        assert causal and right in (None, 0)
        return attention_ref(q, k, v, None if left is None else left + 1, None, softcap, softmax_scale), None

    monkeypatch.setattr(attention_torch, "flash_attn_function", lambda _: flash_attn_func)
    q, k, v = (
        random(1, 30, heads, 16, seed=i, dtype=torch.float16, grad=False) for i, heads in enumerate((4, 2, 2))
    )
    y = attention(q, k, v, window, softcap=softcap, backend="flash-attn")
    assert torch.equal(y, attention_ref(q, k, v, window, softcap=softcap))


@pytest.mark.parametrize(
    "installed, capability, version",
    [((2, 4), (9, 0), 4), ((2, 4), (8, 0), 2), ((2,), (9, 0), 2), ((4,), (10, 0), 4), ((4,), (8, 0), None)],
)
def test_flash_attn_4_is_for_hopper_and_blackwell(installed, capability, version, monkeypatch):
    for name, number in (("flash_attn", 2), ("flash_attn.cute", 4)):
        package = ModuleType(name)
        package.flash_attn_func = lambda number=number: number
        monkeypatch.setitem(sys.modules, name, package if number in installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    function = attention_torch.flash_attn_function.__wrapped__(torch.device("cuda", 0))
    assert (function and function()) == version


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's refusals")
def test_backends_say_what_they_lack_and_what_to_try(torch_kernels):
    x = torch.randn(1, 8, 1, 16)
    document_start = torch.zeros(1, 8, dtype=torch.int64)
    for backend, arguments, match in (
        ("sdpa", (None, document_start), "no windows, .*documents; try"),
        ("sdpa", (4,), "no windows"),
        ("flash-attn", (None, document_start), "'flash-attn' has no documents; try"),
        ("flash-attn", (), "pip install flash-attn"),
        ("cudnn", (), "no 'cudnn' attention for float32 heads of 16 on 'cpu' here; try"),
        ("flash", (), "no 'flash' attention"),
        ("triton", (), "a GPU, and Triton kernels switched on; try"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(x, x, x, *arguments, backend=backend)


def test_flash_attn_is_deterministic_where_torch_is_set_to_be(monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention_torch, "flash_attn_function", lambda _: lambda q, *_, **options: asked.append(options) or q
    )
    x = random(1, 8, 1, 16, dtype=torch.float16, grad=False)
    attention(x, x, x, backend="flash-attn")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attention(x, x, x, backend="flash-attn")
    assert [options.get("deterministic", False) for options in asked] == [False, True]
