"""The /commands of a chat in the terminal."""

import io
import json
import re
from pathlib import Path
from shutil import copytree

import pytest
from helpers.talker import save_models, session_of, talker

from hotlap.chat import ChatConfig, open_session
from hotlap.model.config import Sampling
from hotlap.model.conversation import check_messages
from hotlap.serve.terminal.commands import SETTINGS, run
from hotlap.serve.terminal.conversation import Chat, Continuation
from hotlap.serve.terminal.printing import say
from hotlap.serve.terminal.session import converse


def test_saving_appends_conversations_that_can_be_trained_on(tiny_tokenizer, tmp_path):
    chat, path = talker(tiny_tokenizer, "Yes.", "No."), tmp_path / "talk file.jsonl"
    say(chat.answer("猫?"))
    assert run(session_of(chat), f"/save {path}") and run(session_of(chat), "/system Be brief.")
    say(chat.answer("b?"))
    assert run(session_of(chat), f"/save {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    roles = [[m["role"] for m in check_messages(json.loads(line)["messages"])] for line in lines]
    assert roles == [["user", "assistant"], ["system", "user", "assistant", "user", "assistant"]]


def test_saving_says_what_the_context_had_no_room_for(tiny_tokenizer, tmp_path, capsys):
    chat = talker(tiny_tokenizer, *["Yes."] * 10)
    for number in range(9):
        say(chat.answer(f"Q{number}?"))
    run(session_of(chat), f"/save {tmp_path / 'talk.jsonl'}")
    kept = len(chat.messages) // 2
    assert f"without the first {9 - kept} questions, which were dropped]" in capsys.readouterr().err
    run(session_of(chat), "/clear")
    say(chat.answer("again?"))
    run(session_of(chat), f"/save {tmp_path / 'talk.jsonl'}")
    assert "without" not in capsys.readouterr().err


def test_a_base_model_has_commands_but_no_conversation(capsys):
    base = Continuation(None, Sampling())
    assert run(session_of(base), "/temperature\t0.5") and base.sampling.temperature == 0.5
    assert run(session_of(base), "/help") and "/system" not in capsys.readouterr().err
    for name in ("/clear", "/system x", "/save file"):
        assert run(session_of(base), name) and "needs a conversation" in capsys.readouterr().err
    assert not run(session_of(base), "/quit")


def test_a_base_model_continues_text_that_only_looks_like_a_command(monkeypatch, capsys):
    base, said = Continuation(None, Sampling()), []
    lines = iter(["/usr/bin is", "/temperature 0.5", "  ", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    monkeypatch.setattr(base, "answer", lambda text: iter([said.append(text) or "."]))
    converse(session_of(base))
    assert said == ["/usr/bin is"] and base.sampling.temperature == 0.5


def test_an_interrupt_ends_a_session_in_a_pipe(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        converse(session_of(Chat(None, Sampling())))


def test_leaving():
    chat = Chat(None, Sampling())
    assert (
        not run(session_of(chat), "/quit")
        and not run(session_of(chat), "/exit")
        and run(session_of(chat), "/help")
    )


@pytest.mark.parametrize("name", [*SETTINGS, "seed"])
def test_every_setting_is_listed_changed_and_checked(name, capsys):
    session = session_of(Chat(None, Sampling()))
    before = session.chat.sampling
    for wrong in ("", "warm", "nan", "-3", "1e400", "9" * 400, "1 2"):
        assert run(session, f"/set {name} {wrong}")
        said = capsys.readouterr().err
        assert re.fullmatch(rf"error: {name}( needs|=\S+ must be) .*\n", said) and len(said) < 150
    assert session.chat.sampling == before and session.chat.seed is None
    run(session, f"/set {name.replace('_', '-')} 1")
    assert capsys.readouterr().err == f"[{name} 1]\n"
    run(session, "/set")
    assert re.search(rf"^  {name} +1(\.0)?$", capsys.readouterr().err, re.M)


def test_a_seed_that_is_set_repeats_what_follows(capsys):
    session = session_of(Chat(None, Sampling()))
    run(session, "/set seed 5")
    assert [next(session.chat.seeds) for _ in range(3)] == [5, 6, 7]
    run(session, "/set seed random")
    assert next(session.chat.seeds) != next(session.chat.seeds) and session.chat.seed is None


def test_an_answer_of_no_token_cannot_be_set(capsys):
    session = session_of(Chat(None, Sampling()))
    run(session, "/set max_tokens 0")
    assert capsys.readouterr().err == "error: max_tokens=0 must be at least 1\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("/retyr", "/retry"), ("/Quit", "/quit"), ("/set tempreature 1", "temperature"), ("/halp", "/help")],
)
def test_what_is_misspelt_gets_the_nearest_name(typed, hint, capsys):
    assert run(session_of(Chat(None, Sampling())), typed)
    assert f"did you mean '{hint}'?" in capsys.readouterr().err


def test_undo_says_what_is_dropped_and_what_is_the_last_now(tiny_tokenizer, capsys):
    session = session_of(talker(tiny_tokenizer, "Yes.", "No."))
    for question in ("a?", "b?"):
        session.show(session.chat.answer(question))
    for expected in (
        "[dropped: b?]\n[the last is now: a? -> Yes.]\n",
        "[dropped: a?]\n[the conversation is empty]\n",
        "error: there is no question to drop\n",
    ):
        run(session, "/undo")
        assert capsys.readouterr().err == expected


def test_retry_at_temperature_0_says_that_the_answer_is_the_same(tiny_tokenizer, capsys):
    session = session_of(talker(tiny_tokenizer, "Yes.", "Yes."))
    session.show(session.chat.answer("a?"))
    run(session, "/retry")
    assert capsys.readouterr() == ("Yes.\nYes.\n", "[at temperature 0 every answer is the same]\n")


def test_figures_are_shown_when_asked_for_and_after_each_answer_when_on(tiny_tokenizer, capsys):
    session = session_of(talker(tiny_tokenizer, "Yes.", "No.", "No."))
    figures = re.compile(r"\[\d+ tokens, the first after \d+\.\d\d s, .*context: \d+ of 64 tokens\]\n")
    run(session, "/stats")
    assert capsys.readouterr().err == "[no answer yet; context: 0 of 64 tokens]\n"
    session.show(session.chat.answer("a?"))
    assert capsys.readouterr().err == ""
    run(session, "/stats")
    assert figures.fullmatch(capsys.readouterr().err)
    run(session, "/stats on")
    capsys.readouterr()
    session.show(session.chat.answer("b?"))
    assert figures.fullmatch(capsys.readouterr().err)
    run(session, "/stats off")
    run(session, "/stats maybe")
    session.show(session.chat.answer("c?"))
    assert "error: /stats needs on, off or nothing, not maybe\n" in capsys.readouterr().err


@pytest.fixture
def loaded(tmp_path, tiny_tokenizer, monkeypatch):
    """A session with runs/talker, in a folder that also has runs/base."""
    save_models(tmp_path, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    return open_session(ChatConfig(Path("runs/talker"), temperature=0.0, max_tokens=8))


def test_another_chat_model_goes_on_with_the_conversation(loaded, capsys):
    loaded.chat.system = "S"
    loaded.show(loaded.chat.answer("a?"))
    messages, engine = list(loaded.chat.messages), loaded.chat.engine
    copytree("runs/talker", "runs/other")
    run(loaded, "/model")
    listed = capsys.readouterr().err.splitlines()[-3:]
    assert sorted(listed[:2]) == ["  runs/base", "  runs/other"] and listed[2] == "* runs/talker"
    run(loaded, "/model runs/other")
    assert "[runs/other: 0.2M parameters" in capsys.readouterr().err
    assert loaded.chat.messages == messages and loaded.chat.system == "S"
    assert loaded.chat.engine is not engine and loaded.folder == Path("runs/other")
    assert loaded.chat.sampling.max_tokens == 8


def test_a_base_model_ends_the_conversation_and_says_so(loaded, capsys):
    loaded.show(loaded.chat.answer("a?"))
    run(loaded, "/model runs/base")
    assert isinstance(loaded.chat, Continuation) and loaded.chat.sampling.temperature == 0
    assert "the conversation has ended" in capsys.readouterr().err
    run(loaded, "/model runs/talker")
    assert isinstance(loaded.chat, Chat) and loaded.chat.messages == []


@pytest.mark.parametrize("path", ["runs/none", "runs/talker/config.json", "runs/bad", "\x00", "x" * 5000])
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(path, loaded, capsys):
    copytree("runs/talker", "runs/bad")
    Path("runs/bad/config.json").write_text("{}")
    engine = loaded.chat.engine
    assert run(loaded, f"/model {path}")
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and loaded.chat.engine is engine
    assert loaded.folder == Path("runs/talker")


def test_a_stopped_load_leaves_the_old_model(loaded, capsys, monkeypatch):
    def stopped(folder):
        raise KeyboardInterrupt

    loaded.load, engine = stopped, loaded.chat.engine
    assert run(loaded, "/model runs/base")
    assert capsys.readouterr().err.endswith("[/model was stopped]\n") and loaded.chat.engine is engine


def test_a_bug_in_a_command_is_not_hidden(monkeypatch):
    session = session_of(Chat(None, Sampling()))
    with pytest.raises(AttributeError):  # there is no engine
        run(session, "/stats")
