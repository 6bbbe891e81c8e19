"""Conversations: what is remembered, dropped, asked again and forgotten."""

import random

import pytest
from helpers.talker import session_of, talker
from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.common.terminal import printable
from hotlap.model.config import Sampling
from hotlap.model.conversation import check_messages, render_prompt
from hotlap.model.engine import Engine
from hotlap.model.tokenizer import train_characters
from hotlap.serve.moderation import load_moderation
from hotlap.serve.terminal import printing
from hotlap.serve.terminal.commands import run
from hotlap.serve.terminal.conversation import Chat, Continuation
from hotlap.serve.terminal.printing import say


def test_an_answer_is_remembered_for_the_next_question(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, "Yes.", "No.")
    chat.system = "S"
    assert say(chat.answer("a?")) and say(chat.answer("b?"))
    assert capsys.readouterr().out == "Yes.\nNo.\n"
    assert [m["content"] for m in chat.messages] == ["a?", "Yes.", "b?", "No."]
    asked = [{"role": "system", "content": "S"}, *chat.messages[:3]]
    assert chat.engine.sequences.held[0][: -len("No.")] == render_prompt(asked, tiny_tokenizer)
    chat.clear()
    assert chat.messages == [] and chat.system == "S"


def test_a_full_context_forgets_whole_turns_and_says_so(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, *["Yes."] * 9)
    for number in range(9):
        assert say(chat.answer(f"Q{number}?"))
        assert chat.messages[0]["role"] == "user"  # never half a turn
        prompt = render_prompt(chat.messages[:-1], tiny_tokenizer)
        assert len(prompt) + 8 <= 64
        assert chat.engine.sequences.held[0][: len(prompt)] == prompt
    assert "[the context is full: dropped the first 1 questions" in capsys.readouterr().err
    assert chat.messages[-2]["content"] == "Q8?" and 1 < len(chat.messages) // 2 < 9
    check_messages(chat.messages)


def test_a_question_too_long_for_any_context_changes_nothing(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, "Yes.")
    say(chat.answer("a?"))
    before = list(chat.messages)
    assert not say(chat.answer("too long " * 50))
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
        monkeypatch.setattr(printing, "printable", interrupting)
    say(chat.answer("a?"))
    assert capsys.readouterr().out == "abc [stopped]\n"
    kept = "abc" if inside else "abcd"
    assert chat.messages == [{"role": "user", "content": "a?"}, {"role": "assistant", "content": kept}]
    assert say(chat.answer("b?")) and capsys.readouterr().out == "Yes.\n"


def test_an_interrupt_before_the_first_word_forgets_the_question(tiny_tokenizer, capsys, monkeypatch):
    chat = talker(tiny_tokenizer, "never said", "Yes.")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "__call__", interrupted)
        say(chat.answer("a?"))
    assert chat.messages == [] and capsys.readouterr().out == " [stopped]\n"
    assert say(chat.answer("b?")) and capsys.readouterr().out == "Yes.\n"


def test_calls_are_not_shown_and_their_results_are_remembered(tiny_tokenizer, capsys):
    chat, t = talker(tiny_tokenizer), tiny_tokenizer
    prompt = render_prompt([{"role": "user", "content": "?"}], t)
    call = [t.special["<|tool_start|>"], *t.encode("2+3"), t.special["<|tool_end|>"]]
    after = len(prompt) + len(call) + 3  # the result is one digit between two marks
    scripted = script(len(prompt), call) | script(after, t.encode("Five."))
    model = ScriptedModel(tiny_config(), [scripted], t.special["<|assistant_end|>"])
    chat = Chat(Engine(model, t), Sampling(temperature=0.0, max_tokens=30))
    say(chat.answer("?"))
    assert capsys.readouterr().out == "Five.\n"
    assert [m["role"] for m in check_messages(chat.messages)] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["content"] == "5"


@pytest.mark.parametrize("answer", ["", " \n ", "\x1b\x07"], ids=["nothing", "spaces", "controls"])
def test_an_empty_answer_says_so(answer, tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, answer, "Yes.")
    assert not say(chat.answer("a?"))
    assert capsys.readouterr().out == "[no answer]\n"
    assert say(chat.answer("b?")) and capsys.readouterr().out == "Yes.\n"


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


def test_names_and_errors_steer_no_terminal(tiny_tokenizer, capsys):
    printing.note("runs/\x1b[2J\x9b: 1M parameters")
    run(session_of(Chat(None, Sampling())), "/sa\x1b[2Jve")
    chat = talker(train_characters("hi"), "h")
    say(chat.answer("\x9b?"))
    printed = capsys.readouterr().err
    assert printable(printed) == printed and printed.count("\n") == 3


def test_a_base_model_continues_the_end_of_a_long_text_and_says_so(tiny_tokenizer, capsys):
    t = tiny_tokenizer
    text = "The quick brown fox. " * 30
    model = ScriptedModel(tiny_config(), [script(48, t.encode("And so on."))], t.bos)
    continuation = Continuation(Engine(model, t), Sampling(temperature=0.0, max_tokens=16))
    assert "".join(continuation.answer(text)) == "And so on."
    assert model.fed[0][:48] == t.encode(text)[-48:]
    count = len(t.encode(text)) + 1
    assert f"[the text takes {count} tokens; the model continues the last 48" in capsys.readouterr().err


class Expected:
    """What a conversation should hold, as pairs of questions and answers; "" is no answer."""

    def __init__(self):
        self.turns, self.unanswered = [], None

    def ask(self, question: str, answer: str) -> None:
        self.unanswered = None if answer else question
        self.turns += [[question, answer]] if answer else []

    def undo(self) -> None:
        if self.unanswered is None and self.turns:
            self.turns.pop()
        self.unanswered = None

    def retry(self, answer: str) -> None:
        if self.unanswered is not None:
            self.ask(self.unanswered, answer)
        elif self.turns and answer:
            self.turns[-1][1] = answer


@pytest.mark.parametrize("seed", range(6))
def test_questions_retries_and_undos_in_any_order_leave_whole_turns(seed, tiny_tokenizer, capsys):
    dice, answers, expected = random.Random(seed), [], Expected()
    chat = talker(tiny_tokenizer, context=1024)
    chat.replies = iter(answers)  # which grows
    for number in range(25):
        action = dice.choice(["ask", "ask", "retry", "undo"])
        answer = dice.choice(["", f"A{number}."])
        asks = action == "ask" or (action == "retry" and (expected.turns or expected.unanswered))
        answers += [answer] if asks else []
        if action == "ask":
            expected.ask(f"Q{number}?", answer)
            say(chat.answer(f"Q{number}?"))
        elif action == "retry":
            expected.retry(answer)
            say(chat.retry())
        else:
            expected.undo()
            chat.undo()
        assert [m["content"] for m in chat.messages] == [text for turn in expected.turns for text in turn]
        assert chat.unanswered == expected.unanswered


def test_retry_asks_the_same_again_and_leaves_everything_before_it(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer, "One.", "Two.", "Three.", "Four.")
    say(chat.answer("a?"))
    say(chat.answer("b?"))
    before, prompt = list(chat.messages), list(chat.engine.sequences.held[0][: -len("Two.")])
    assert say(chat.retry()) and say(chat.retry())
    assert chat.messages == [*before[:-1], {"role": "assistant", "content": "Four."}]
    assert chat.engine.sequences.held[0][: len(prompt)] == prompt
    assert capsys.readouterr().out == "One.\nTwo.\nThree.\nFour.\n"


def test_retry_without_an_answer_keeps_the_earlier_one(tiny_tokenizer):
    chat = talker(tiny_tokenizer, "One.", "", "Three.")
    say(chat.answer("a?"))
    assert not say(chat.retry())
    assert [m["content"] for m in chat.messages] == ["a?", "One."]
    assert say(chat.retry()) and [m["content"] for m in chat.messages] == ["a?", "Three."]


def test_retry_asks_a_question_again_that_got_no_answer(tiny_tokenizer):
    chat = talker(tiny_tokenizer, "One.", "", "Three.")
    say(chat.answer("a?"))
    assert not say(chat.answer("b?")) and say(chat.retry())
    assert [m["content"] for m in chat.messages] == ["a?", "One.", "b?", "Three."]


def test_retry_and_undo_without_a_question_say_so(tiny_tokenizer, capsys):
    chat = talker(tiny_tokenizer)
    assert chat.undo() is None and not say(chat.retry())
    assert not say(Continuation(None, Sampling()).retry())
    assert capsys.readouterr().err.count("error: there is no ") == 2


def test_retry_is_another_draw(random_model, tiny_tokenizer):
    engine = Engine(random_model(tiny_config()), tiny_tokenizer, slots=1)
    chat = Chat(engine, Sampling(temperature=2.0, top_k=0, max_tokens=8), seed=3)
    answers = {"".join(chat.answer("again?"))} | {"".join(chat.retry()) for _ in range(4)}
    assert len(answers) > 3 and len(chat.messages) == 2


def test_figures_count_the_tokens_of_the_answer_and_of_the_context(tiny_tokenizer):
    chat = talker(tiny_tokenizer, "Yes.", context=128)
    assert chat.stats is None and chat.used() == 0
    say(chat.answer("a?"))
    assert chat.stats.tokens == len(tiny_tokenizer.encode("Yes.")) and chat.stats.first <= chat.stats.seconds
    assert chat.used() == chat.stats.prompt + chat.stats.tokens + 1  # the mark of its end
    assert str(chat.stats).startswith(f"{chat.stats.tokens} tokens, the first after ")


def test_an_answer_steers_no_terminal(capsys):
    say(iter(["\x1b]0;a title\x07", "\x1b", "]52;c;aGk=\x07 \x9b31m", "red\u202e"]))
    assert capsys.readouterr().out == "]0;a title]52;c;aGk= 31mred\n"


def filtered(chat, *words: str, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(words))
    chat.moderate = load_moderation(str(tmp_path / "list.txt"))
    return chat


def test_what_the_filter_blocks_is_neither_shown_nor_remembered(tiny_tokenizer, tmp_path, capsys):
    chat = talker(tiny_tokenizer, "Fine, dog.", "A cat.", max_tokens=30)
    filtered(chat, "dog", "mouse", tmp_path=tmp_path)
    assert not say(chat.answer("Hm?")) and not say(chat.answer("a Mouse"))
    printed = capsys.readouterr()
    assert "dog" not in printed.out and "Fine, dog.".startswith(printed.out.strip())
    assert "the rest of this answer (list.txt:1)" in printed.err and "this text (list.txt:2)" in printed.err
    assert chat.messages == []
    assert say(chat.answer("b?")) and capsys.readouterr().out == "A cat.\n"
    assert [m["content"] for m in chat.messages] == ["b?", "A cat."]
    chat.system = "a mouse"
    assert not say(chat.answer("b?")) and "this text" in capsys.readouterr().err


def test_a_base_model_is_filtered_too(tiny_tokenizer, tmp_path, capsys):
    t = tiny_tokenizer
    prompt = [t.bos, *t.encode("Go")]
    model = ScriptedModel(tiny_config(), [script(len(prompt), t.encode("And the dog."))], t.bos)
    base = Continuation(Engine(model, t), Sampling(temperature=0.0, max_tokens=16))
    filtered(base, "dog", tmp_path=tmp_path)
    assert not say(base.answer("Go")) and not say(base.answer("dog"))
    printed = capsys.readouterr()
    assert "dog" not in printed.out and printed.err.count("the filter blocked") == 2


def test_a_retry_that_the_filter_blocks_keeps_the_earlier_answer(tiny_tokenizer, tmp_path):
    chat = talker(tiny_tokenizer, "A cat.", "A dog.", max_tokens=30)
    filtered(chat, "dog", tmp_path=tmp_path)
    assert say(chat.answer("b?")) and not say(chat.retry())
    assert [m["content"] for m in chat.messages] == ["b?", "A cat."]
