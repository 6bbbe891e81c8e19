"""chat.py as its user meets it: in a pipe, with odd input, and stopped in the middle."""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap import chat as program
from hotlap.chat import Chat, ChatConfig, Continuation, command, say
from hotlap.common.errors import BAD_DATA
from hotlap.common.terminal import printable
from hotlap.model.conversation import check_messages, render_prompt
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import train_characters
from hotlap.model.weights import save_model
from hotlap.serve.moderation import load_moderation

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
    for name, stage in (("base", "pretrain"), ("talker", "sft")):
        (folder / "runs" / name).mkdir(parents=True)
        save_model(folder / "runs" / name, GPT(tiny_config(context=128)).init_weights(3), tiny_tokenizer)
        (folder / "runs" / name / "state.json").write_text(json.dumps({"stage": stage}))
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
    assert "/temperature N" in output and "[temperature 0.5]" in output and "[saved to talk.jsonl]" in output
    assert "type a message" not in output and "> " not in output  # no prompts in a pipe
    assert not any(unicodedata.category(c) == "Cc" for c in output + errors if c not in "\n\t")
    problems = [line for line in errors.splitlines() if line.startswith("error: ")]
    for number, part in enumerate(
        [
            "unknown command /dance; /help", "/temperature warm: needs a number from 0 to 10",
            "/temperature nan", "/temperature 11", "(nothing)", "1,000,000 characters; at most 100,000",
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
    first = run_chat("runs/talker", "-p", "hi", "--max-tokens", 8, folder=workplace)
    assert first[0] == 0 and first[1].strip() and "error" not in first[2]
    assert "0.2M parameters" in first[2]
    assert run_chat("runs/talker", "-p", "hi", "--max-tokens", 8, folder=workplace) == first


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


def talker(tokenizer, *answers: str, context: int = 64, max_tokens: int = 8) -> Chat:
    """A chat with a model that gives these answers, each to a conversation that it fits."""
    chat = Chat(None, Sampling(temperature=0.0, max_tokens=max_tokens))
    replies = iter(answers)

    class Replying(Engine):
        def generate(self, prompt, sampling):
            end = self.tokenizer.special["<|assistant_end|>"]
            self.model.scripts = [script(len(prompt), self.tokenizer.encode(next(replies)))]
            self.model.fed, self.model.otherwise = [[]], end
            return super().generate(prompt, sampling)

    chat.engine = Replying(ScriptedModel(tiny_config(context=context), [], 0), tokenizer, slots=1)
    return chat


def test_an_answer_is_remembered_for_the_next_question(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, "Yes.", "No.")
    chat.system = "S"
    assert say(chat, "a?") and say(chat, "b?")
    assert capsys.readouterr().out == "Yes.\nNo.\n"
    assert [m["content"] for m in chat.messages] == ["a?", "Yes.", "b?", "No."]
    asked = [{"role": "system", "content": "S"}, *chat.messages[:3]]
    assert chat.engine.sequences.held[0][: -len("No.")] == render_prompt(asked, tiny_tokenizer)
    command(chat, "/clear")
    assert chat.messages == [] and chat.system == "S"


def test_a_full_context_forgets_whole_turns_and_says_so(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, *["Yes."] * 9)
    for number in range(9):
        assert say(chat, f"Q{number}?")
        assert chat.messages[0]["role"] == "user"  # never half a turn
        prompt = render_prompt(chat.messages[:-1], tiny_tokenizer)
        assert len(prompt) + 8 <= 64
        assert chat.engine.sequences.held[0][: len(prompt)] == prompt
    assert "[the context is full: dropped the first 1 questions" in capsys.readouterr().err
    assert chat.messages[-2]["content"] == "Q8?" and 1 < len(chat.messages) // 2 < 9
    check_messages(chat.messages)


def test_a_question_too_long_for_any_context_changes_nothing(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, "Yes.")
    say(chat, "a?")
    before = list(chat.messages)
    assert not say(chat, "too long " * 50)
    assert chat.messages == before and "shorten it" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [True, False], ids=["while the model works", "while text is printed"])
def test_an_interrupt_stops_the_answer_and_keeps_the_session(inside, tiny_tokenizer, capsys, monkeypatch):
    chat = talker(tiny_tokenizer, "abcdef", "Yes.")
    count = 0

    def interrupting(text):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return text

    if inside:
        forward = ScriptedModel.__call__
        monkeypatch.setattr(ScriptedModel, "__call__", lambda *args, **kw: interrupting(forward(*args, **kw)))
    else:
        monkeypatch.setattr(program, "printable", interrupting)
    say(chat, "a?")
    assert capsys.readouterr().out == "abc [stopped]\n"
    kept = "abc" if inside else "abcd"
    assert chat.messages == [{"role": "user", "content": "a?"}, {"role": "assistant", "content": kept}]
    assert say(chat, "b?") and capsys.readouterr().out == "Yes.\n"


def test_an_interrupt_before_the_first_word_forgets_the_question(tiny_tokenizer, capsys, monkeypatch):
    chat = talker(tiny_tokenizer, "never said", "Yes.")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "__call__", interrupted)
        say(chat, "a?")
    assert chat.messages == [] and capsys.readouterr().out == " [stopped]\n"
    assert say(chat, "b?") and capsys.readouterr().out == "Yes.\n"


def test_calls_are_not_shown_and_their_results_are_remembered(tiny_tokenizer, capsys):
    chat, t = talker(tiny_tokenizer), tiny_tokenizer
    prompt = render_prompt([{"role": "user", "content": "?"}], t)
    call = [t.special["<|tool_start|>"], *t.encode("2+3"), t.special["<|tool_end|>"]]
    after = len(prompt) + len(call) + 3  # the result is one digit between two marks
    scripted = script(len(prompt), call) | script(after, t.encode("Five."))
    model = ScriptedModel(tiny_config(), [scripted], t.special["<|assistant_end|>"])
    chat = Chat(Engine(model, t), Sampling(temperature=0.0, max_tokens=30))
    say(chat, "?")
    assert capsys.readouterr().out == "Five.\n"
    assert [m["role"] for m in check_messages(chat.messages)] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["content"] == "5"


def test_saving_appends_conversations_that_can_be_trained_on(tiny_tokenizer, tmp_path):
    chat, path = talker(tiny_tokenizer, "Yes.", "No."), tmp_path / "talk file.jsonl"
    say(chat, "猫?")
    assert command(chat, f"/save {path}") and command(chat, "/system Be brief.")
    say(chat, "b?")
    assert command(chat, f"/save {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    roles = [[m["role"] for m in check_messages(json.loads(line)["messages"])] for line in lines]
    assert roles == [["user", "assistant"], ["system", "user", "assistant", "user", "assistant"]]


def test_saving_says_what_the_context_had_no_room_for(tiny_tokenizer, tmp_path, capsys):
    chat = talker(tiny_tokenizer, *["Yes."] * 10)
    for number in range(9):
        say(chat, f"Q{number}?")
    command(chat, f"/save {tmp_path / 'talk.jsonl'}")
    kept = len(chat.messages) // 2
    assert f"without the first {9 - kept} questions, which were dropped]" in capsys.readouterr().out
    command(chat, "/clear")
    say(chat, "again?")
    command(chat, f"/save {tmp_path / 'talk.jsonl'}")
    assert "without" not in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["", " \n ", "\x1b\x07"], ids=["nothing", "spaces", "controls"])
def test_an_empty_answer_says_so(answer, tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, answer, "Yes.")
    assert not say(chat, "a?")
    assert capsys.readouterr().out == "[no answer]\n"
    assert say(chat, "b?") and capsys.readouterr().out == "Yes.\n"


def drawn(random_chat, seed: int | None) -> list[str]:
    """Answers to the same question, at a temperature above 0."""
    chat = Chat(random_chat.engine, random_chat.sampling, seed)
    answers = []
    for _ in range(4):
        answers.append("".join(chat.answer("again?")))
        chat.clear()
    return answers


def test_every_answer_is_another_draw_and_a_seed_repeats_the_session(random_model, tiny_tokenizer):
    engine = Engine(random_model(tiny_config()), tiny_tokenizer, slots=1)
    chat = Chat(engine, Sampling(temperature=2.0, top_k=0, max_tokens=8))
    assert len({*drawn(chat, None), *drawn(chat, None)}) > 4
    seeded = drawn(chat, 3)
    assert len(set(seeded)) > 1 and drawn(chat, 3) == seeded and drawn(chat, 4)[:3] == seeded[1:]


def test_base_models_sample_by_default_and_chat_models_do_not():
    assert ChatConfig().sampling(base=True).temperature > 0 == ChatConfig().sampling(base=False).temperature
    assert ChatConfig(temperature=0.0).sampling(base=True).temperature == 0
    with pytest.raises(ValueError, match="seed=-1"):
        ChatConfig(seed=-1).sampling(base=True)


def test_a_base_model_has_commands_but_no_conversation(capsys):
    base = Continuation(None, Sampling())
    assert command(base, "/temperature\t0.5") and base.sampling.temperature == 0.5
    assert command(base, "/help") and "/system" not in capsys.readouterr().out
    for name in ("/clear", "/system x", "/save file"):
        assert command(base, name) and "needs a conversation" in capsys.readouterr().err
    assert not command(base, "/quit")


def test_a_base_model_continues_text_that_only_looks_like_a_command(monkeypatch, capsys):
    base, said = Continuation(None, Sampling()), []
    lines = iter(["/usr/bin is", "/temperature 0.5", "  ", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(program, "say", lambda chat, line: said.append(line))
    program.converse(base)
    assert said == ["/usr/bin is"] and base.sampling.temperature == 0.5


def test_an_interrupt_ends_a_session_in_a_pipe(monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        program.converse(Chat(None, Sampling()))


def test_names_and_errors_steer_no_terminal(tiny_tokenizer, capsys):
    program.note("runs/\x1b[2J\x9b: 1M parameters")
    command(Chat(None, Sampling()), "/sa\x1b[2Jve")
    chat = talker(train_characters("hi"), "h")
    say(chat, "\x9b?")
    printed = capsys.readouterr().err
    assert printable(printed) == printed and printed.count("\n") == 3


@pytest.mark.parametrize("question", ["", " \t"])
def test_an_empty_question_is_refused_before_the_model_is_loaded(question, workplace, monkeypatch):
    monkeypatch.setattr("hotlap.model.weights.load_model", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="the question of -p is empty"):
        program.open_chat(ChatConfig(model=workplace / "runs" / "talker", prompt=question))


def filtered(chat, *words: str, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(words))
    chat.moderate = load_moderation(str(tmp_path / "list.txt"))
    return chat


def test_what_the_filter_blocks_is_neither_shown_nor_remembered(tiny_tokenizer, tmp_path, capsys):
    chat = talker(tiny_tokenizer, "Fine, dog.", "A cat.", max_tokens=30)
    filtered(chat, "dog", "mouse", tmp_path=tmp_path)
    assert not say(chat, "Hm?") and not say(chat, "a Mouse")
    printed = capsys.readouterr()
    assert "dog" not in printed.out and "Fine, dog.".startswith(printed.out.strip())
    assert "the rest of this answer (list.txt:1)" in printed.err and "this text (list.txt:2)" in printed.err
    assert chat.messages == []
    assert say(chat, "b?") and capsys.readouterr().out == "A cat.\n"
    assert [m["content"] for m in chat.messages] == ["b?", "A cat."]
    chat.system = "a mouse"
    assert not say(chat, "b?") and "this text" in capsys.readouterr().err


def test_a_base_model_is_filtered_too(tiny_tokenizer, tmp_path, capsys):
    t = tiny_tokenizer
    prompt = [t.bos, *t.encode("Go")]
    model = ScriptedModel(tiny_config(), [script(len(prompt), t.encode("And the dog."))], t.bos)
    base = Continuation(Engine(model, t), Sampling(temperature=0.0, max_tokens=16))
    filtered(base, "dog", tmp_path=tmp_path)
    assert not say(base, "Go") and not say(base, "dog")
    printed = capsys.readouterr()
    assert "dog" not in printed.out and printed.err.count("the filter blocked") == 2


def test_the_first_note_says_whether_answers_are_filtered(workplace, tmp_path):
    _, _, errors = run_chat("runs/talker", "-p", "hi", folder=workplace)
    assert "answers are not filtered" in errors.splitlines()[0]
    (tmp_path / "list.txt").write_text("hi")
    arguments = ("runs/talker", "-p", "hi", "--moderation", tmp_path / "list.txt")
    code, output, errors = run_chat(*arguments, folder=workplace)
    assert code == BAD_DATA and output == "" and "not filtered" not in errors
    assert errors.splitlines()[-1] == "error: the filter blocked this text (list.txt:1)"


def test_leaving():
    chat = Chat(None, Sampling())
    assert not command(chat, "/quit") and not command(chat, "/exit") and command(chat, "/help")


def test_a_base_model_continues_the_end_of_a_long_text_and_says_so(tiny_tokenizer, capsys):
    t = tiny_tokenizer
    text = "The quick brown fox. " * 30
    model = ScriptedModel(tiny_config(), [script(48, t.encode("And so on."))], t.bos)
    continuation = Continuation(Engine(model, t), Sampling(temperature=0.0, max_tokens=16))
    assert "".join(continuation.answer(text)) == "And so on."
    assert model.fed[0][:48] == t.encode(text)[-48:]
    count = len(t.encode(text)) + 1
    assert f"[the text takes {count} tokens; the model continues the last 48" in capsys.readouterr().err
