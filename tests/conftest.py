"""What all tests share: small real things, made once.

Tests of kernels also run where only torch, Triton and pytest are installed: the rest is imported in use.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small here, and threads wait for each other
torch.set_num_threads(1)
if not torch.cuda.is_available():  # kernels run in Triton's interpreter, chosen before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers.tools import tiny_config, train_tiny_tokenizer

from hotlap.kernels import dispatch
from hotlap.model.gpt import GPT

if TYPE_CHECKING:
    from hotlap.model.tokenizer import Tokenizer

__all__ = ["tiny_config"]  # a plain function, from tests/tools.py


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """`-m gpu` is what a GPU has to pass: the tests that need one, and those of kernels, which run on it.

    `-m standin` runs where there is the CUDA build of torch and no GPU.
    """
    there_is_one = torch.cuda.is_available()
    stands_in = torch.version.cuda is not None and not there_is_one
    for item in items:
        if there_is_one and item.path.parent.name == "kernels":
            item.add_marker("gpu")
        elif not there_is_one and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if not stands_in and item.get_closest_marker("standin"):
            item.add_marker(pytest.mark.skip(reason="needs what `make standin` sets up"))


def pytest_runtest_logreport(report):
    """Say at once how a test failed, where FAILURES names a file: a run may be cut off before its end."""
    if report.failed and (path := os.environ.get("FAILURES")) and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"== {report.nodeid}\n{report.longreprtext[-1500:]}\n\n")


@pytest.fixture
def choose_kernels(monkeypatch):
    """A function that sets HOTLAP_KERNELS for the rest of the test."""

    def choose(name: str) -> None:
        monkeypatch.setenv("HOTLAP_KERNELS", name)
        dispatch._decide.cache_clear()
        torch._dynamo.reset()  # compiled functions hold the choice

    yield choose
    dispatch._decide.cache_clear()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids, of which 289 are text."""
    return train_tiny_tokenizer()


@pytest.fixture(scope="session")
def random_model():
    """Build a GPT whose every weight is random, those that are zero at the start too."""

    def build(config, seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> GPT:
        model = GPT(config, compute_dtype).init_weights(seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("blocks", "head", "smear", "backout", "bigrams")):
                    parameter.normal_(0, 0.2, generator=generator)
        return model

    return build


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with text.txt and talks.jsonl."""
    from helpers.small_runs import write_conversations, write_text

    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    write_conversations(tmp_path / "talks.jsonl")
    return tmp_path


@pytest.fixture
def hub_server(monkeypatch):
    """A hub on this machine, empty, that downloads are from. Waiting between attempts takes little time."""
    from helpers.hub_server import running_hub

    from hotlap.common import download

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(download, "WAITS", (0, 0))
    monkeypatch.setattr(download, "SPARE", 0)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(autouse=True)
def quiet_log():
    """Each test finds the project's log as on import; a command sends it to its own standard error."""
    log = logging.getLogger("hotlap")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.INFO)
    yield
    log.handlers.clear()
    log.propagate = True
