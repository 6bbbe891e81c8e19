"""The hash of the code is that of what trains, wherever it is installed."""

import shutil
from pathlib import Path

import pytest

from hotlap.common.code import SOURCES, TRAINS, code_sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path) -> Path:
    """The files of an installation, without what is only in a checkout."""
    for folder in TRAINS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SOURCES:
                target = tmp_path / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return tmp_path


def test_a_checkout_and_an_installation_have_one_hash(installed):
    (installed / "train" / "__pycache__").mkdir()
    (installed / "train/__pycache__/loop.pyc").write_bytes(b"\0")
    (installed / "serve").mkdir()
    (installed / "serve/page.py").write_text("another page", encoding="utf-8")
    assert code_sha256(installed) == code_sha256()


def test_line_ends_do_not_matter_and_any_change_of_code_does(installed):
    loop = installed / "train/loop.py"
    text = loop.read_bytes()
    loop.write_bytes(text.replace(b"\n", b"\r\n"))
    assert code_sha256(installed) == code_sha256()
    loop.write_bytes(text + b"\n")
    changed = code_sha256(installed)
    loop.write_bytes(text)
    loop.rename(installed / "train/loops.py")
    assert len({code_sha256(), changed, code_sha256(installed)}) == 3
