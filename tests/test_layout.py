"""What may import what, and that importing does nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "model", "train", "bench", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"kernels", "model"},
    "train": {"kernels", "model", "train"},
    "chat.py": {"kernels", "model"},
}


def files_of(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere in a tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> list[str]:
    """Every importable module of the package, as hotlap.x.y."""
    files = [p for part in ("kernels", "model", "train", "bench") for p in files_of(part)]
    files = [p for p in files if not p.name.startswith("test_")]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    return [f"hotlap.{name}" for name in (*names, "chat", "cli")]


def run_python(code: str, folder: Path) -> str:
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(folder))
    environment = os.environ | places | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return (done.stdout + done.stderr).decode()


def test_no_folder_is_a_regular_package():
    assert [p for folder in FOLDERS for p in (ROOT / folder).rglob("__init__.py")] == []
    assert not (ROOT / "__init__.py").exists()


def as_a_module(file: Path) -> ast.AST:
    """Without what runs only where the file is the program."""
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.dump(n.test))]
    return tree


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    for file in files_of(part):
        ours = {n.split(".")[1] for n in imports(as_a_module(file)) if n.startswith("hotlap.")}
        assert ours <= MAY_IMPORT[part], f"{file} imports {ours - MAY_IMPORT[part]}"


def test_the_command_imports_stages_only_when_called():
    top = ast.Module([n for n in ast.parse((ROOT / "cli.py").read_text()).body if not hasattr(n, "body")], [])
    assert {n.split(".")[1] for n in imports(top) if n.startswith("hotlap.")} <= {"kernels", "model"}


@pytest.mark.parametrize("file", files_of("kernels"), ids=lambda p: p.name)
def test_kernels_are_functions_of_tensors(file):
    tree = ast.parse(file.read_text())
    roots = {name.split(".")[0] for name in imports(tree)}
    assert roots <= {
        "torch",
        "triton",
        "hotlap",
        *sys.stdlib_module_names,
        "flash_attn",
    }  # the last where installed
    assert not any(n.startswith(("torch.nn.Module", "torch.distributed")) for n in imports(tree))
    bases = {ast.unparse(base) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for base in n.bases}
    assert not any("Module" in base for base in bases)


def test_kernels_model_and_benchmarks_need_torch_and_numpy_alone(tmp_path):
    wanted = [name for name in modules() if name.startswith("hotlap.kernels.")]
    wanted += [f"hotlap.model.{name}" for name in ("config", "gpt", "flops", "sampling", "engine")]
    wanted += [f"hotlap.bench.{name}" for name in ("suite", "peers")]
    run_python(
        "import sys, importlib\n"
        "for name in ('tokenizers', 'tiktoken', 'safetensors', 'tyro', 'tqdm', 'regex', 'requests'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {wanted}: importlib.import_module(name)",
        tmp_path,
    )


def test_importing_has_no_side_effect(tmp_path):
    """No handler, no output, no file, no random state, no thread setting, no CUDA."""
    said = run_python(
        "import importlib, logging, os, signal, sys, threading, warnings\n"
        "import torch, tyro, tqdm, tokenizers, tiktoken, safetensors\n"
        "def state():\n"
        "    logs = [logging.getLogger(), logging.getLogger('hotlap')]\n"
        "    return ([(list(l.handlers), l.level, l.propagate) for l in logs], torch.get_num_threads(),\n"
        "        torch.initial_seed(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),\n"
        "        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),\n"
        "        threading.active_count(), dict(os.environ), torch.cuda.is_initialized())\n"
        "before = state()\n"
        f"for name in {modules()}: importlib.import_module(name)\n"
        "assert state() == before, (before, state())",
        tmp_path,
    )
    assert said == "" and list(tmp_path.iterdir()) == []
