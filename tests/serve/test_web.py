"""`hotlap web`: what it refuses before a model is loaded, and who may use the page."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("streamlit")

from helpers.commands import INPUT_OUTPUT, NO_INPUT, USAGE, assert_error
from helpers.page_commands import running_page
from helpers.running_server import wait_until
from helpers.tools import tiny_config

from hotlap.cli import main
from hotlap.model.gpt import GPT
from hotlap.model.weights import save_model
from hotlap.serve import web

NOBODY = "http://127.0.0.1:9"  # where no server is


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with running_page(tmp_path_factory.mktemp("talks"), "--url", NOBODY) as (address, _):
        yield address


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = main(["web", "--url", NOBODY, "--port", port, "--folder", str(tmp_path)])
    assert_error(capsys, code, USAGE, f"--port {port} is in use on 127.0.0.1", "0 for any free one")


def test_a_missing_package_is_one_line_that_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(web, "PACKAGES", ("no_such_package",))
    assert_error(capsys, main(["web"]), 1, "no_such_package", "pip install -e '.[web]'")


def test_a_model_that_cannot_be_served_is_one_line(tmp_path, capsys):
    code = main(["web", str(tmp_path / "none"), "--port", "0", "--folder", str(tmp_path / "talks")])
    assert_error(capsys, code, NO_INPUT, "no model at")


def test_a_filter_that_cannot_be_read_is_one_line(tmp_path, capsys, tiny_tokenizer):
    save_model(tmp_path, GPT(tiny_config()).init_weights(3), tiny_tokenizer)
    code = main(["web", str(tmp_path), "--port", "0", "--moderation", "no-list", "--folder", str(tmp_path)])
    assert_error(capsys, code, USAGE, "--moderation no-list is no file, and names no function")


def test_a_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = main(["web", "--url", NOBODY, "--folder", str(tmp_path / "file")])
    assert_error(capsys, code, INPUT_OUTPUT, "file: Not a directory")


def test_a_base_model_is_refused(tmp_path, capsys, tiny_tokenizer):
    save_model(tmp_path, GPT(tiny_config()).init_weights(3), tiny_tokenizer)
    (tmp_path / "state.json").write_text(json.dumps({"stage": "pretrain"}))
    code = main(["web", str(tmp_path), "--port", "0", "--folder", str(tmp_path / "talks")])
    assert_error(capsys, code, USAGE, "a base model only continues text", "hotlap sft")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_the_server_ends_even_if_the_page_is_killed(tmp_path, tiny_tokenizer):
    save_model(tmp_path, GPT(tiny_config()).init_weights(3), tiny_tokenizer)
    (tmp_path / "state.json").write_text(json.dumps({"stage": "sft"}))
    with pytest.raises(AssertionError), running_page(tmp_path / "talks", str(tmp_path)) as (_, process):
        (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    wait_until(lambda: not Path(f"/proc/{server}").exists())


def test_it_prints_one_line_and_ends_at_once(tmp_path):
    with running_page(tmp_path / "new" / "talks", "--url", NOBODY) as (address, process):
        with urllib.request.urlopen(address) as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stdout.read() == ""


def test_the_page_does_not_need_torch(tmp_path):
    code = (
        "import sys\nfrom hotlap.serve import page, web\nassert not {'torch', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}], ids=str
)
def test_other_pages_in_the_browser_are_refused(page, headers):
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(page, headers=headers))
    assert refused.value.code == 403


def test_their_web_sockets_are_refused_too(page):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    address = page.replace("http", "ws") + "/_stcore/stream"
    with connect(address, origin=page), pytest.raises(InvalidStatus, match="403"):
        connect(address, origin="https://evil.example")


def test_the_browser_may_load_nothing_from_elsewhere(page):
    with urllib.request.urlopen(page) as response:
        policy = response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'" and "script-src" not in rules and "connect-src" not in rules
    assert not [rule for rule in rules.values() if "http" in rule or "*" in rule]


def test_the_key_of_the_environment_is_checked_before_anything_starts(capsys, monkeypatch):
    monkeypatch.setenv("HOTLAP_API_KEY", "short")
    assert_error(capsys, main(["web", "--url", NOBODY]), USAGE, "HOTLAP_API_KEY must be at least 16")
