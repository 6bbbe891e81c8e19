"""What a user gets who installs hotlap without its repository: a source archive, and the wheel made of it.

The installed copy lies in a folder that may not be written to, and runs from another one. Python starts
without the .pth files of this environment (-S), one of which may point to the checkout.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from shutil import which

import pytest
from helpers.small_runs import MODEL_FLAGS, write_text

import hotlap.cli

ROOT = Path(hotlap.cli.__file__).resolve().parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Iterator[Path]:
    """The folder of an installation, made as `python -m build` and `pip install --target` make it."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml asks for; install the extra dev")
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"  # so that what a build leaves behind is not left in ours
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if files.returncode:
        pytest.skip(f"this is not a git checkout: {files.stderr.strip()}")
    for name in filter(lambda name: not name.startswith("bench/results/"), files.stdout.splitlines()):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys\nfrom setuptools.build_meta import build_sdist\nprint(build_sdist(sys.argv[1]))"
    python(["-c", build, str(folder)], checkout, {"PYTHONPATH": sysconfig.get_path("purelib")})
    (archive,) = folder.glob("hotlap-*.tar.gz")
    target = folder / "target"
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *flags, "--target", str(target), str(archive)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (target, *target.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(target.rglob("*"))
    yield target
    assert sorted(target.rglob("*")) == before  # also where root, who may write everywhere, runs the tests


def python(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What Python prints, run in a folder without .pth files."""
    done = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def run(installed, tmp_path):
    """Runs Python in another folder, with the installed copy and not the checkout."""
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    return lambda *arguments, **more: python([*map(str, arguments)], tmp_path, environment | more)


def test_it_has_code_data_types_and_no_tests(installed):
    package = installed / "hotlap"
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"py.typed", "cli.py", "serve/blocklist-example.txt", "kernels/cpu/common.h"} <= names
    assert "train/speedruns/shapes.json" in names
    data = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*") if p.suffix in (".c", ".json")
    }
    assert len(data) > 5 and data <= names
    assert not [n for n in names if n.startswith(("tests/", "docs/")) or "test_" in n or n == "setup.py"]


def test_it_says_its_version_and_where_it_is(run, installed):
    assert run("-m", "hotlap.cli", "--version").startswith("hotlap 0.")
    code = "import hotlap.kernels.attention as found, hotlap; print(found.__file__, *hotlap.__path__)"
    assert run("-c", code).split() == [f"{installed}/hotlap/kernels/attention.py", f"{installed}/hotlap"]


def test_it_trains_from_another_folder_and_compiles_its_kernels_into_the_cache(run, tmp_path):
    write_text(tmp_path / "text.txt")
    flags = ["--data", "text.txt", "--tokenizer", "characters", "--out", "base", *MODEL_FLAGS]
    flags += ["--batch-rows", "4", "--loop.steps", "3", "--compile", "off"]
    quick = tmp_path / "cc"  # optimizing takes most of the time of a compilation
    quick.write_text('#!/bin/bash\nexec cc "${@/-O3/-O0}"\n', encoding="utf-8")
    quick.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")} | ({"CC": str(quick)} if which("cc") else {})
    said = run("-m", "hotlap.cli", "pretrain", *flags, **environment)
    assert (tmp_path / "base" / "checkpoints" / "step-000003").is_dir()
    if "kernels: c " in said:
        assert len(list((tmp_path / "cache" / "hotlap" / "cpu").glob("*.so"))) == 2
