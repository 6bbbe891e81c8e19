"""What may import what, and that importing does nothing else."""

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from hotlap.cli import COMMANDS, Group, Table

ROOT = Path(__file__).parent.parent
EXPORTED = "hotlap.model.modeling_hotlap"  # a file for exports, which Transformers imports there
FOLDERS = ("common", "kernels", "model", "serve", "train", "bench", "tests")
MAY_IMPORT = {
    "common": {"common"},
    "kernels": {"common", "kernels"},
    "model": {"common", "kernels", "model"},
    "serve": {"common", "kernels", "model", "serve"},
    "train": {"common", "kernels", "model", "train"},
    "bench": {"common", "kernels", "model", "train", "bench"},
    "chat.py": {"common", "kernels", "model", "serve", "cli"},
    "cli.py": {"common"},
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
    files = [p for part in FOLDERS[:-1] for p in files_of(part)]
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


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_down_only(part):
    for file in files_of(part):
        ours = {n.split(".")[1] for n in imports(ast.parse(file.read_text())) if n.startswith("hotlap.")}
        assert ours <= MAY_IMPORT[part], f"{file} imports {ours - MAY_IMPORT[part]}"


@cache
def import_graph() -> dict[str, set[str]]:
    """The modules of hotlap that each one imports when it runs, also inside of functions."""
    files = {name: ROOT / Path(*name.split(".")[1:]).with_suffix(".py") for name in modules()}
    graph = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        tree.body = [n for n in tree.body if not ast.unparse(n).startswith("if TYPE_CHECKING:")]
        found = imports(tree)
        graph[name] = {n if n in files else n.rsplit(".", 1)[0] for n in found} & set(files)
    return graph


def test_no_module_imports_itself_through_others():
    order = TopologicalSorter(import_graph())
    order.prepare()  # CycleError names the modules of a circle


def test_the_class_that_is_exported_stands_alone():
    graph = import_graph()
    assert graph[EXPORTED] == set() and not [name for name, found in graph.items() if EXPORTED in found]
    tree = ast.parse((ROOT / "model" / "modeling_hotlap.py").read_text())
    assert {name.split(".")[0] for name in imports(tree)} == {"torch", "transformers"}


def test_every_command_is_a_function_of_a_module_that_is_there():
    for command in leaves(COMMANDS).values():
        for name in (command.config, command.run):
            module, _, found = name.partition(":")
            tree = ast.parse((ROOT / Path(*module.split(".")).with_suffix(".py")).read_text())
            assert found in {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}, name


def leaves(table: Table, path: str = "") -> dict:
    """All commands that do something, by what one types for them."""
    found = {}
    for name, row in table.items():
        found |= leaves(row.commands, f"{path}{name} ") if isinstance(row, Group) else {f"{path}{name}": row}
    return found


def test_reading_flags_does_not_import_torch(tmp_path):
    """Help and mistakes are shown at once: torch takes seconds to import."""
    run_python(
        "import contextlib, io, os, sys\n"
        "from hotlap import cli\n"
        f"for command in {[*leaves(COMMANDS), 'pretrain --preset d12', 'pretrain --depth 4']}:\n"
        "    for flags in (['--help'], ['--no-such-flag', '3'], ['--out']):\n"
        "        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "            with contextlib.suppress(SystemExit):\n"
        "                cli.main([*command.split(), *flags])\n"
        "        assert 'torch' not in sys.modules, (command, flags)",
        tmp_path,
    )


def test_the_chat_starts_without_the_compiler(tmp_path):
    run_python(
        "import sys, hotlap.chat, hotlap.model.engine, hotlap.model.weights, hotlap.kernels.dispatch\n"
        "loaded = {'torch._dynamo', 'torch.distributed.fsdp', 'sympy'} & set(sys.modules)\n"
        "assert not loaded, loaded",
        tmp_path,
    )


def test_a_source_archive_has_what_is_installed_and_no_tests(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    lines = (tmp_path / "hotlap.egg-info" / "SOURCES.txt").read_text().splitlines()
    listed = {Path(line).as_posix() for line in lines}
    sources = (
        p for part in FOLDERS[:-1] for end in ("py", "c", "h") for p in (ROOT / part).rglob(f"*.{end}")
    )
    needed = {
        p.relative_to(ROOT).as_posix()
        for p in (
            *sources,
            *ROOT.glob("kernels/tuned/*.json"),
            *ROOT.glob("serve/*.txt"),
            *ROOT.glob("train/speedruns/*.json"),
        )
    }
    assert needed - listed <= {"bench/test_kernels.py"}  # which is not installed
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "cli.py", "chat.py"} <= listed
    assert not [name for name in listed if name.startswith(("tests/", "docs/", "runs/"))]


def test_every_folder_with_code_is_installed():
    folders = {p.parent.relative_to(ROOT) for part in FOLDERS[:-1] for p in (ROOT / part).rglob("*.py")}
    listed = next(
        ast.literal_eval(n.value)
        for n in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FOLDERS"
    )
    assert set(listed) == {".".join(folder.parts) for folder in folders}


def test_an_installation_has_all_modules_and_nothing_else(tmp_path):
    """What setuptools copies into a wheel."""
    code = (
        "import os, sys\n"
        f"os.chdir({str(ROOT)!r})\n"
        "from distutils.core import run_setup\n"
        "import setuptools\n"
        "builder = run_setup('setup.py', stop_after='init').get_command_obj('build_py')\n"
        "builder.ensure_finalized()\n"
        "print(*('.'.join(row[:2]) for row in builder.find_all_modules()))"
    )
    assert set(run_python(code, tmp_path).split()) == set(modules())


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
    kernels = [name for name in modules() if name.startswith("hotlap.kernels.")]
    wanted = [f"hotlap.model.{name}" for name in ("config", "gpt", "flops", "sampling", "engine")]
    wanted += [f"hotlap.bench.{name}" for name in ("suite", "peers")]
    run_python(
        "import sys, importlib\n"
        "for name in ('tokenizers', 'tiktoken', 'safetensors', 'tyro', 'tqdm', 'regex', 'requests'):\n"
        "    sys.modules[name] = None\n"
        "import numpy, torch\n"
        "try: import triton, triton.experimental.gluon\n"
        "except ImportError: pass\n"
        "before = set(sys.modules)\n"
        f"for name in {kernels}: importlib.import_module(name)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'hotlap', 'torch', 'triton', *sys.stdlib_module_names}, new\n"
        f"for name in {wanted}: importlib.import_module(name)",
        tmp_path,
    )


def test_importing_has_no_side_effect(tmp_path):
    """No handler, no output, no file, no random state, no thread setting, no CUDA."""
    said = run_python(
        "import importlib, logging, os, signal, sys, threading, warnings\n"
        "import torch, tyro, tqdm, tokenizers, tiktoken, safetensors, streamlit, lm_eval.models.utils\n"
        "def state():\n"
        "    logs = [logging.getLogger(), logging.getLogger('hotlap')]\n"
        "    return ([(list(l.handlers), l.level, l.propagate) for l in logs], torch.get_num_threads(),\n"
        "        torch.initial_seed(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),\n"
        "        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),\n"
        "        threading.active_count(), dict(os.environ), torch.cuda.is_initialized())\n"
        "before = state()\n"
        f"for name in {[name for name in modules() if name != EXPORTED]}: importlib.import_module(name)\n"
        "assert state() == before, (before, state())",
        tmp_path,
    )
    assert said == "" and list(tmp_path.iterdir()) == []
