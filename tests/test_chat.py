"""chat.py as its user meets it: in a pipe, with odd input, and stopped in the middle."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers.fake_sandbox import FakeSandbox
from helpers.talker import save_models

from hotlap import chat as program
from hotlap.chat import ChatConfig
from hotlap.common.errors import BAD_DATA
from hotlap.model.conversation import check_messages

CHAT = Path(__file__).parent.parent / "chat.py"


def run_chat(*arguments, lines: bytes = b"", folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of chat.py with `lines` on its standard input."""
    command = [sys.executable, str(CHAT), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=lines, capture_output=True, cwd=folder, env=environment, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_tokenizer):
    """A folder with runs/talker, which converses, and runs/base, which does not."""
    folder = tmp_path_factory.mktemp("workplace")
    save_models(folder, tiny_tokenizer)
    return folder


def test_a_session_in_a_pipe_survives_whatever_is_typed(workplace):
    lines = b"\n".join(
        [
            b"/help", b"hi", b"", b"/dance", b"/temperature warm", b"/temperature nan", b"/temperature 11",
            b"/temperature", b"/temperature 0.5", b"\xff\xfe\x80 \xf0\x9f\x98", b"\x1b[2J\x00hello\x07",
            b"a" * 1_000_000, b"hey " * 200, b"/save", b"/save no/such/folder/x.jsonl", b"/save talk.jsonl",
            b"/system Be brief", b"/clear", b"/save talk.jsonl", b"/quit", b"never read",
        ]
    )  # fmt: skip
    code, output, errors = run_chat("runs/talker", "--max-tokens", 8, lines=lines, folder=workplace)
    assert code == 0 and "Traceback" not in errors
    for said in ("/temperature N", "[temperature 0.5]", "[saved to talk.jsonl]"):
        assert said in errors and said not in output  # which has answers alone
    assert "Type a message" not in errors and "> " not in output  # no prompts in a pipe
    assert not any(unicodedata.category(c) == "Cc" for c in output + errors if c not in "\n\t")
    problems = [line for line in errors.splitlines() if line.startswith("error: ")]
    for number, part in enumerate(
        [
            "unknown command: '/dance'; known: /retry", "temperature needs a number, not warm",
            "temperature=nan must be a number from 0 to 10", "temperature=11", "a number, not nothing",
            "1,000,000 characters; at most 100,000",
            "the context of 128 must leave 8 for an answer; shorten it", "name a file", "No such file",
            "the conversation is empty",
        ]
    ):  # fmt: skip
        assert part in problems[number]
    assert len(problems) == 10 and max(map(len, errors.splitlines())) < 300
    saved = (workplace / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(saved) == 1
    messages = check_messages(json.loads(saved[0])["messages"])
    questions = [m["content"] for m in messages if m["role"] == "user"]
    assert set(questions) <= {"hi", "\ufffd\ufffd\ufffd \ufffd", "[2Jhello"}


def test_the_end_of_input_ends_the_session(workplace):
    code, output, errors = run_chat("runs/talker", "--max-tokens", 4, lines=b"hi", folder=workplace)
    assert code == 0 and "error" not in errors and output.strip()


def test_one_question_is_answered_and_the_same_way_again(workplace):
    first = run_chat("runs/talker", "-p", "hi", "--max-tokens", 8, "--temperature", 0, folder=workplace)
    assert first[0] == 0 and first[1].strip() and "error" not in first[2]
    assert "0.2M parameters" in first[2]
    assert (
        run_chat("runs/talker", "-p", "hi", "--max-tokens", 8, "--temperature", 0, folder=workplace) == first
    )


def test_one_question_that_cannot_be_answered_fails(workplace):
    code, output, errors = run_chat("runs/talker", "-p", "hey " * 200, folder=workplace)
    assert code == 65 and output == "" and "shorten it" in errors.splitlines()[-1]


def test_a_wrong_path_lists_the_models(workplace):
    code, output, errors = run_chat("runs/nothing", folder=workplace)
    assert code == 66 and output == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: no model at runs/nothing; found: runs/")
    assert "runs/base" in errors and "runs/talker" in errors


def test_without_a_path_the_newest_model_answers_and_a_bad_setting_is_one_line(workplace):
    os.utime(workplace / "runs" / "talker" / "config.json", (1, 1))
    code, output, errors = run_chat("--max-tokens", 4, lines=b"The quick\n/quit\n", folder=workplace)
    assert code == 0 and "[runs/base: " in errors and "base model: it continues text" in errors and output
    code, output, errors = run_chat("--temperature", "nan", folder=workplace)
    assert code == 2 and errors.startswith("error: --temperature nan must be")


def test_models_sample_by_default_and_take_the_likeliest_token_at_temperature_0():
    for base in (True, False):
        assert ChatConfig().sampling(base).temperature > 0
        assert ChatConfig(temperature=0.0).sampling(base).temperature == 0
    sampling = ChatConfig(top_k=7, top_p=0.5, min_p=0.1, max_tokens=9).sampling(base=False)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.max_tokens) == (7, 0.5, 0.1, 9)
    with pytest.raises(ValueError, match="seed=-1"):
        ChatConfig(seed=-1).sampling(base=True)


@pytest.mark.parametrize("question", ["", " \t"])
def test_an_empty_question_is_refused_before_the_model_is_loaded(question, workplace, monkeypatch):
    monkeypatch.setattr("hotlap.model.weights.load_model", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="the question of -p is empty"):
        program.open_session(ChatConfig(model=workplace / "runs" / "talker", prompt=question))


def test_the_first_note_says_whether_answers_are_filtered(workplace, tmp_path):
    _, _, errors = run_chat("runs/talker", "-p", "hi", folder=workplace)
    assert "answers are not filtered" in errors.splitlines()[0]
    (tmp_path / "list.txt").write_text("hi")
    arguments = ("runs/talker", "-p", "hi", "--moderation", tmp_path / "list.txt")
    code, output, errors = run_chat(*arguments, folder=workplace)
    assert code == BAD_DATA and output == "" and "not filtered" not in errors
    assert errors.splitlines()[-1] == "error: the filter blocked this text (list.txt:1)"


def test_python_without_a_sandbox_is_refused_before_the_model_is_loaded(workplace, monkeypatch):
    FakeSandbox(None).install(monkeypatch)
    monkeypatch.setattr("hotlap.model.weights.load_model", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="the tool python runs code .* and needs a sandbox"):
        program.open_session(ChatConfig(model=workplace / "runs" / "talker", prompt="hi", tools=("python",)))


def test_a_session_has_the_tools_of_its_flags_and_names_the_sandbox(workplace, monkeypatch, capsys):
    FakeSandbox(lambda code: None).install(monkeypatch)
    for tools in (("python", "calculator"), ("calculator",)):
        config = ChatConfig(model=workplace / "runs" / "talker", prompt="hi", tools=tools)
        assert tuple(program.open_session(config).chat.tools) == tools
    assert capsys.readouterr().err.count("[tools: python (sandbox: fake), calculator]") == 1
