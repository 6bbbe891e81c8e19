"""`hotlap serve`: names of models, what it says, what it refuses, and how it ends."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from helpers.commands import USAGE, assert_error
from helpers.fake_sandbox import FakeSandbox
from helpers.running_server import chat
from helpers.tools import tiny_config

from hotlap.cli import main
from hotlap.model.gpt import GPT
from hotlap.model.tools import named_tools
from hotlap.model.weights import model_name, save_model
from hotlap.serve import command
from hotlap.serve.command import announcement, load
from hotlap.serve.config import NAME, ServeConfig
from hotlap.serve.server import stop_by_signals

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_tokenizer) -> Path:
    """A chat model with a context of 4,096 tokens."""
    folder = tmp_path_factory.mktemp("place") / "runs" / "tiny" / "sft"
    folder.mkdir(parents=True)
    save_model(folder, GPT(tiny_config(context=4096)).init_weights(3), tiny_tokenizer)
    (folder / "state.json").write_text(json.dumps({"stage": "sft"}))
    return folder


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/a/runs/tiny/sft", "tiny-sft"),
        ("/a/runs/tiny/sft/checkpoints/step-000100", "tiny-sft"),
        ("/a/runs/notes", "notes"),
        ("/runs/b/runs/c", "c"),
        ("/models/my model", "my-model"),
        ("/models/.hidden", "hidden"),
        ("/models/\u732b", "model"),
        ("/a/runs", "runs"),
        ("/a/runs/" + "n" * 100, "n" * 64),
    ],
)
def test_a_model_is_named_after_its_run(folder, name):
    assert model_name(Path(folder)) == name and re.fullmatch(NAME, name)


def test_it_says_what_is_served_and_how_to_ask(run):
    engine, served = load(ServeConfig(model=run, slots=3))
    said = announcement(engine, served, "http://127.0.0.1:8000", None)
    assert "tiny-sft" in said and "hotlap" in said and "3 of 4096 tokens" in said and "not needed" in said
    body = re.search("-d '(.*)'", said)[1]
    assert json.loads(body)["model"] == "tiny-sft" and "/v1/chat/completions" in said
    assert "Authorization: Bearer" in announcement(engine, served, "http://10.0.0.1:80", "k" * 16)


def test_slots_are_at_most_what_fits_the_free_memory(run, monkeypatch):
    assert len(load(ServeConfig(model=run))[0].slots) == command.MOST_SLOTS
    monkeypatch.setattr("hotlap.model.kv_cache.free_memory", lambda device: 20e6)
    assert 1 <= len(load(ServeConfig(model=run))[0].slots) < command.MOST_SLOTS
    monkeypatch.setattr("hotlap.model.kv_cache.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"a slot for a context of 4096 tokens needs .* GB"):
        load(ServeConfig(model=run))


def test_a_port_in_use_is_named(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert_error(capsys, main(["serve", str(run), "--port", port]), USAGE, f"--port {port} is in use")


def test_missing_packages_are_named_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(command, "PACKAGES", ("fastapi", "no_such_package"))
    assert_error(capsys, main(["serve", "nowhere"]), 1, "no_such_package", "pip install -e '.[serve]'")


def test_a_signal_in_the_middle_of_a_stream_ends_the_process_in_order(run, tiny_tokenizer):
    """Started as `python chat.py RUN --serve`."""
    ends = {str(tiny_tokenizer.special[name]): -100 for name in ("<|assistant_end|>", "<|bos|>")}
    body = chat("what", model="tiny-sft", max_tokens=4000, stream=True, temperature=0, logit_bias=ends)
    arguments = [sys.executable, str(ROOT / "chat.py"), str(run), "--serve", "--port", "0", "--grace", "0.3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        port = 0
        while not port:
            line = process.stdout.readline().decode()
            assert line, process.stderr.read().decode()
            port = int(found[1]) if (found := re.search(r"http://127.0.0.1:(\d+)/v1", line)) else 0
        raw = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
            )
            answer = client.recv(1 << 16)
            while b'"content":"' not in answer:
                answer += client.recv(1 << 16)
            process.send_signal(signal.SIGTERM)
            while more := client.recv(1 << 16):
                answer += more
        errors = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 0
        assert b"HTTP/1.1 200" in answer and b"shut down before the answer was complete" in answer
        assert "Traceback" not in errors and "/v1/chat/completions 200" in errors
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    async def signalled() -> None:
        stop = asyncio.Event()
        stop_by_signals(stop)
        signal.raise_signal(signal.SIGTERM)
        await stop.wait()
        assert codes == []
        signal.raise_signal(signal.SIGINT)
        while not codes:
            await asyncio.sleep(0)

    asyncio.run(signalled())
    assert codes == [130]


def test_python_without_a_sandbox_is_refused_before_the_model_is_loaded(run, monkeypatch):
    FakeSandbox(None).install(monkeypatch)
    monkeypatch.setattr(command, "load", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"the tool python runs code .* and needs a sandbox"):
        command.main(ServeConfig(model=run, port=0, tools=("python",)))


def test_it_says_which_tools_are_offered_and_chats_get_them(run, monkeypatch):
    FakeSandbox(lambda code: None).install(monkeypatch)
    engine, served = load(ServeConfig(model=run, slots=1), tools := named_tools(["python"]))
    assert served.tools is tools
    assert "tools    python (sandbox: fake)" in announcement(engine, replace(served, chat=True), "url", None)
    assert "tools    none" in announcement(engine, replace(served, chat=False), "url", None)
