"""hotlap on systems that are not Linux: nothing needs Triton, or what only POSIX has.

Each test is a process from which helpers/without_posix.py takes that away. What Windows does otherwise with
the same functions is not seen here.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

from helpers.small_runs import MODEL_FLAGS, write_conversations, write_text
from test_layout import FOLDERS, ROOT, files_of, modules

START = """
import asyncio, importlib, logging, sys
import numpy, safetensors.torch, tokenizers, tiktoken, torch, torch.distributed.checkpoint, tqdm, tyro
from torch.distributed import fsdp
from helpers.without_posix import MEMORY, hide
"""


def other_system(code: str, folder: Path, question: str = "") -> str:
    """What a process on another system prints, which runs in the folder and reads a question."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", START + code], cwd=folder, env=environment, input=question,
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_module_is_imported(tmp_path):
    code = (
        "import aiohttp, fastapi, lm_eval.models.utils, matplotlib, openai, scipy.stats, streamlit, uvicorn\n"
    )
    code += "hide()\n"
    other_system(code + f"for name in {modules()}: importlib.import_module(name)\n", tmp_path)


def test_a_model_is_trained_resumed_and_asked(tmp_path):
    write_text(tmp_path / "text.txt")
    write_conversations(tmp_path / "talks.jsonl")
    run = ["--batch-rows", "4", "--loop.steps", "4", "--loop.save-every", "2"]
    data = ["--data", "text.txt", "--tokenizer", "characters"]
    code = f"""
hide()
from hotlap.common.memory import machine_bytes
from hotlap.cli import main
assert machine_bytes() == MEMORY
pretrain = ["pretrain", *{data}, *{MODEL_FLAGS}, "--out", "base"]
assert main([*pretrain, *{run}]) == 0
assert main([*pretrain, *{run}, "--loop.steps", "6", "--resume", "auto"]) == 0
assert main(["sft", "--base", "base", "--data", "talks.jsonl", *{run}, "--out", "sft"]) == 0
from hotlap import chat
assert main(["chat", "sft", "--max-tokens", "4"]) == 0
assert main(["chat", "sft", "-p", "Hello", "--max-tokens", "4", "--tools", "python"]) == 2
assert main(["rl", "--base", "sft", "--data", "sums", "--out", "rl"]) == 2
"""
    said = other_system(code, tmp_path, "square of 3\n")
    assert "kernels: torch (no kernels in C: they are not built on Windows)" in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "Traceback" not in said
    assert "needs Linux, and this is win32" in errors[0] and "which Windows has not" in errors[1]


def test_a_macs_gpu_is_chosen_by_name_and_given_what_it_has(tmp_path):
    """There is none here: the CPU stands in, in a process in which a tensor in float64 is an error there."""
    write_text(tmp_path / "text.txt")
    data = ["--data", "text.txt", "--tokenizer", "characters", "--batch-rows", "4", "--loop.steps", "2"]
    code = f"""
import os
from torch.utils._python_dispatch import TorchDispatchMode
from hotlap.common import gpu
from hotlap.kernels.dispatch import default_device, fast_dtype, kernel_choice
from hotlap.common.log import log, set_up_logging
set_up_logging()
torch.backends.mps.is_available = lambda: True
assert str(default_device()) == "cpu"
os.environ["HOTLAP_DEVICE"] = "mps"
assert str(default_device()) == "mps"
assert kernel_choice("mps") == "torch" and fast_dtype("mps") == torch.float32
os.environ["HOTLAP_DEVICE"] = "cuda"
try:
    default_device()
except ValueError as error:
    print(error)
os.environ["HOTLAP_DEVICE"] = "cpu"
gpu.NO_FLOAT64.add("cpu")
os.environ["HOTLAP_KERNELS"] = "torch"

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        found = operation(*arguments, **(options or {{}}))
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, operation
        return found

from hotlap.cli import main
with NoFloat64():
    assert main(["pretrain", *{data}, *{MODEL_FLAGS}, "--out", "base", "--compile", "off"]) == 0
    assert main(["chat", "base", "-p", "The", "--max-tokens", "4", "--top-p", "0.9"]) == 0
"""
    said = other_system(code, tmp_path)
    assert "HOTLAP_DEVICE=mps takes this Mac's GPU, which has not been tried so far" in said
    assert "HOTLAP_DEVICE='cuda' is no device of this machine; set mps or cpu, or unset it" in said


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
