"""hotlap on systems that are not Linux, as far as that can be tried on Linux.

For Windows, helpers/without_posix.py takes from a process what only POSIX has, and Triton. For a Mac's GPU,
the CPU stands in.
"""

import ast
import asyncio
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.commands import pretrain_here
from helpers.small_runs import MODEL_FLAGS, write_conversations, write_text
from test_layout import EXPORTED, FOLDERS, ROOT, files_of, modules
from torch.utils._python_dispatch import TorchDispatchMode

from hotlap.cli import main
from hotlap.common import gpu
from hotlap.common.log import log
from hotlap.kernels import dispatch
from hotlap.train.distributed.sharding import should_compile

START = """
import importlib, sys
import aiohttp, fastapi, lm_eval.models.utils, matplotlib, openai, scipy.stats, streamlit, uvicorn
import numpy, safetensors.torch, tokenizers, tiktoken, torch, torch.distributed.checkpoint, tqdm, tyro
from torch.distributed import fsdp
from helpers.without_posix import MEMORY, hide
hide()
"""


def test_without_posix_every_module_is_imported_and_a_model_trained_resumed_and_asked(tmp_path):
    write_text(tmp_path / "text.txt")
    write_conversations(tmp_path / "talks.jsonl")
    run = ["--batch-rows", "4", "--loop.steps", "4", "--loop.save-every", "2"]
    data = ["--data", "text.txt", "--tokenizer", "characters"]
    code = f"""
for name in {[name for name in modules() if name != EXPORTED]}: importlib.import_module(name)
from hotlap.common.memory import machine_bytes
from hotlap.cli import main
assert machine_bytes() == MEMORY
pretrain = ["pretrain", *{data}, *{MODEL_FLAGS}, "--out", "base"]
assert main([*pretrain, *{run}]) == 0
assert main([*pretrain, *{run}, "--loop.steps", "6", "--resume", "auto"]) == 0
assert main(["sft", "--base", "base", "--data", "talks.jsonl", *{run}, "--out", "sft"]) == 0
assert main(["chat", "sft", "--max-tokens", "4", "--seed", "0"]) == 0
assert main(["chat", "sft", "-p", "Hello", "--max-tokens", "4", "--tools", "python"]) == 2
assert main(["rl", "--base", "sft", "--data", "sums", "--out", "rl"]) == 2
"""
    places = {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", START + code], cwd=tmp_path, env=os.environ | places,
        input="square of 3\n", capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "kernels: torch (no kernels in C: they are not built on Windows)" in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "Traceback" not in said
    assert "needs Linux, and this is win32" in errors[0] and "which Windows has not" in errors[1]


def test_servers_are_told_of_signals_where_event_loops_are_not(monkeypatch):
    pytest.importorskip("uvicorn")
    from hotlap.serve.server import on_signals

    async def told() -> int:
        number = asyncio.get_running_loop().create_future()
        on_signals(number.set_result)
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(number, 60)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "platform", "win32")
    try:
        assert asyncio.run(told()) == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_macs_gpu_is_taken_by_name_alone(monkeypatch, caplog):
    monkeypatch.delenv("HOTLAP_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(log, "propagate", True)
    dispatch._log_untried.cache_clear()
    with caplog.at_level("INFO"):
        assert dispatch.default_device().type == dispatch.default_device().type == "cpu"
    assert [row for row in caplog.messages if "HOTLAP_DEVICE=mps" in row] == [
        "on the CPU: HOTLAP_DEVICE=mps takes this Mac's GPU, which has not been tried so far"
    ]
    monkeypatch.setenv("HOTLAP_DEVICE", "mps")
    assert dispatch.default_device().type == "mps"
    assert dispatch.kernel_choice("mps") == "torch" and dispatch.fast_dtype("mps") == torch.float32
    assert not should_compile("auto", torch.device("mps"))
    monkeypatch.setenv("HOTLAP_DEVICE", "cuda")
    with pytest.raises(
        ValueError, match=r"HOTLAP_DEVICE='cuda' is no device of .*; set mps or cpu, or unset"
    ):
        dispatch.default_device()


class NoFloat64(TorchDispatchMode):
    """A context in which an operation that gives a tensor in float64 is an error."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        found = operation(*arguments, **(options or {}))
        for tensor in found if isinstance(found, list | tuple) else [found]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, operation
        return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for a Mac's GPU")
def test_training_and_chat_need_no_float64_on_a_macs_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "NO_FLOAT64", {"cpu"})
    write_text(tmp_path / "text.txt")
    with NoFloat64():
        assert pretrain_here() == 0
        assert main(["chat", "base", "-p", "The", "--max-tokens", "4", "--top-p", "0.9", "--seed", "0"]) == 0


def test_text_is_read_and_written_as_utf8(tmp_path):
    """Without an encoding, Python takes that of the system, on Windows one of its code pages."""
    wrong = []
    for file in (path for part in (*FOLDERS[:-1], "chat.py", "cli.py") for path in files_of(part)):
        for call in (n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            words = [ast.unparse(argument) for argument in call.args]
            text = name in ("read_text", "write_text") or given.get("text") == "True"
            text |= ast.unparse(call.func) == "open" and not any("b'" in word for word in words)
            if text and not {"encoding", "errors"} & set(given) and "'utf-8'" not in words:
                wrong.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert wrong == []
