"""Tests on a GPU that is not there, each in a process of its own: `make standin`, and a part in `make test`.

`pytest -m standin` needs the CUDA build of torch, of which 5 GB are installed for it.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
TESTS = HERE.parent
KERNELS = [
    p for p in sorted(TESTS.glob("kernels/test_*.py")) if re.search("triton_(kernels|or_c)", p.read_text())
]


def stand_in(files: list[Path], name: str, **environment: str) -> None:
    """Run tests with the stand-in, `launches` or `torch`; what pytest says, where one fails."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": path, "STAND_IN": name, "PYTEST_ADDOPTS": "", "HOTLAP_KERNELS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_stand_in.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", "--show-capture=no", "--disable-warnings", *map(str, files)]
    result = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | variables | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_the_way_that_kernels_are_launched():
    stand_in([HERE / "launch_path.py"], "launches")


@pytest.mark.standin
@pytest.mark.parametrize("file", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_that_is_tested_compiles(file):
    stand_in([file], "launches")


@pytest.fixture(scope="session")
def cudart(tmp_path_factory) -> Path:
    """The library that is preloaded. It says that it is libcuda too, of which torch wants one function."""
    library = tmp_path_factory.mktemp("cudart") / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", str(library), str(HERE / "cudart.c")], check=True)
    return library


@pytest.mark.standin
def test_what_a_run_compiles(cudart):
    stand_in([HERE / "blocks.py"], "torch", LD_PRELOAD=str(cudart))


@pytest.mark.standin
def test_the_static_gate_passes_with_the_triton_of_this_torch():
    code = (
        "from hotlap.bench import static\n"
        "rows = static.run(static.StaticConfig(arch=('sm_90',)))\n"
        "print(static.table(rows))\n"
        "exit(any(row['faults'] for row in rows))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    faults = [f"{row}\n{fault}" for row, fault in itertools.pairwise(lines) if "FAULT" in fault]
    assert result.returncode == 0, "\n".join(faults) + result.stderr[-2000:]
