"""The kernels in a model that is not ours, as docs/kernels.md shows it. The page's code runs here."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers.kernel_tools import DEVICE

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> dict:
    """The names that the page's code defines."""
    pytest.importorskip("transformers")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    return names


def train(model: torch.nn.Module, loss_of, rows: torch.Tensor) -> list[float]:
    """The losses of three steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_llama_learns_the_same_with_our_kernels(page):
    torch.manual_seed(0)
    shape = page["LlamaConfig"](hidden_size=64, intermediate_size=128, **page["shape"])
    theirs = page["LlamaForCausalLM"](shape).to(DEVICE)
    for parameter in theirs.parameters():  # weights of norms are 1 at first, which would hide that they count
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = page["with_kernels"](copy.deepcopy(theirs))
    rows = torch.randint(128, (3, 25), device=DEVICE)
    expected = train(theirs, lambda model, ids: model(input_ids=ids, labels=ids).loss, rows)
    assert train(ours, page["loss_of"], rows) == pytest.approx(expected, rel=1e-5)
    assert expected[2] < expected[0]


def test_every_name_on_the_page_is_a_function_of_the_kernels():
    table = TEXT.split("## What there is")[1].split("## Where they run")[0]
    for row in (line.split("|")[1] for line in table.splitlines() if line.startswith("| `")):
        module = ""
        for name in re.findall(r"`([a-z0-9_.]+)`", row):
            module, function = name.split(".") if "." in name else (module, name)
            assert callable(getattr(__import__(f"hotlap.kernels.{module}", fromlist=[function]), function))
