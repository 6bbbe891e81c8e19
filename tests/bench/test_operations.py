"""Who provides an operation computes it, whatever its own conventions are."""

import re
import sys
import types

import pytest
import torch
from torch import Tensor

from hotlap.bench import accuracy, attention, providers
from hotlap.bench.operations import BUILDERS, operations
from hotlap.cli import main
from hotlap.kernels.attention import attention_ref

CPU = torch.device("cpu")
T = 16


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "orthogonalize"])
def test_every_provider_computes_its_operation(name):
    operation = next(operations(64, CPU, torch.float32, (name,)))
    right = accuracy.right_answer(operation, CPU)
    for provider in operation.providers.keys() - {"compile"}:
        assert accuracy.mistake(right, provider) == "", provider


def test_the_help_names_every_operation(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--help"])
    words = re.findall(r"\w+", capsys.readouterr().out)
    assert set(BUILDERS) <= set(words)


def flash_attention(q, k, v, causal=False, window_size=(-1, -1)):
    """What flash-attn documents: query i sees keys i - left to i + right, and those up to it if causal."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    left, right = (T if side < 0 else side for side in window_size)
    mask = (distance <= left) & (-distance <= (0 if causal else right))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def varlen_attention(q, k, v, starts, also_starts, longest, also_longest, window_size):
    """What torch.nn.attention.varlen documents, for rows of one length: q is (B * T, H, C)."""
    assert starts.tolist() == also_starts.tolist() == list(range(0, len(q) + 1, T)) and longest == T
    assert starts.dtype == torch.int32
    y = flash_attention(*(x.unflatten(0, (-1, T)) for x in (q, k, v)), window_size=window_size)
    return y.flatten(0, 1)


@pytest.mark.parametrize("window", [1, 5, T])
def test_everyone_means_the_same_by_a_window(window, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = (torch.randn(2, T, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    everyone = {
        "sdpa": attention._sdpa(window, T, CPU),
        "flex": attention._flex(window, T, CPU),
        "varlen": attention._varlen(varlen_attention, window, T, 2 * T, CPU),
        "flash": attention._flash_attention(flash_attention, window, T),
        "flash, with more outputs": attention._flash_attention(
            lambda *given, **more: (flash_attention(*given, **more), None), window, T
        ),
    }
    exact = attention_ref(q, k, v, window)
    for name, function in everyone.items():
        y = function(q, k, v)
        assert isinstance(y, Tensor)
        torch.testing.assert_close(y, exact, msg=lambda text, name=name: f"{name}: {text}")


def test_a_package_that_is_missing_is_no_provider_and_one_that_is_broken_is_named(monkeypatch, caplog):
    providers.installed.cache_clear()
    assert providers.installed("no_such_package.deeper", "f") is None
    monkeypatch.setitem(sys.modules, "only_a_namespace", types.ModuleType("only_a_namespace"))
    assert providers.installed("only_a_namespace.flash", "f") is None and caplog.records == []
    assert providers.installed("only_a_namespace", "f") is None
    assert "f of only_a_namespace cannot be used" in caplog.text
    assert providers.installed("math", "sqrt")(4) == 2
    providers.installed.cache_clear()
