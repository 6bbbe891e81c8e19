"""Answers for the web page: threads that ask the API, and keep what comes of it."""

import os

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from helpers.openai_client import client_of
from helpers.running_server import running_server, served, wait_until
from helpers.scripted_engine import ScriptedEngine

from hotlap.model.messages import tool_call
from hotlap.serve import answering
from hotlap.serve import saved_conversations as saved
from hotlap.serve.blocklist import Blocklist
from hotlap.serve.saved_conversations import Answer, Conversation, Turn

CALL = ("2+3", "5")


@pytest.fixture
def engine(tiny_tokenizer):
    return ScriptedEngine(tiny_tokenizer)


@pytest.fixture
def server(engine, tiny_tokenizer):
    with running_server(engine, served(tiny_tokenizer, context=64), grace=0) as it:
        yield it


@pytest.fixture
def client(server):
    with client_of(server, max_retries=0) as it:
        yield it


@pytest.fixture
def answered(client, tmp_path):
    """Answers the last turn of a conversation. Returns it as it is then, and the Answering."""

    def run(*turns: Turn, during=lambda it: None, **fields):
        name = saved.create(tmp_path, Conversation(turns=[*turns]))
        running = answering.begin(client, tmp_path, name, turns[-1].name, {"model": "tiny", **fields})
        during(running)
        assert running.ended.wait(10)
        return saved.load(tmp_path, name), running

    yield run
    answering.RUNNING.clear()


def turn(question: str, answer: str) -> Turn:
    return Turn(question, [Answer([{"role": "assistant", "content": answer}], "tiny", "", 1, 0.1, 0.2)])


def test_an_answer_is_kept_with_its_calls_and_times(answered, engine):
    engine.answers.append(["So: ", CALL, "five."])
    conversation, running = answered(Turn("2 + 3?"))
    answer = conversation.turns[0].answer
    assert [m["content"] for m in answer.messages] == ["So: ", "5", "five."]
    assert answer.messages[0]["tool_calls"][0]["function"]["arguments"] == {"expression": "2+3"}
    assert answer.end == "stop" and answer.tokens == len(engine.started[0].tokens)
    assert 0 < answer.first <= answer.seconds and not running.error and not answering.RUNNING


def test_the_oldest_turns_are_left_out_if_the_context_has_no_room(answered, engine):
    engine.answers.append("yes")
    conversation, _ = answered(turn("q" * 60, "a" * 10), turn("r", "b"), Turn("s"), max_tokens=20)
    answer = conversation.turns[-1].answer
    assert answer.text == "yes" and answer.dropped == 1


def test_turns_are_left_out_until_a_quarter_of_the_context_is_left_for_the_answer(answered, engine):
    engine.answers += ["x" * 60, "x" * 20]
    conversation, _ = answered(turn("q" * 30, "a" * 10), Turn("s" * 3), max_tokens=20)
    answer = conversation.turns[-1].answer
    assert answer.dropped == 1 and answer.text == "x" * 20


def test_a_question_that_does_not_fit_alone_is_refused_in_the_servers_words(answered):
    conversation, running = answered(turn("q", "a"), Turn("s" * 100))
    assert not conversation.turns[-1].answers
    assert "maximum context length is 64 tokens" in running.error and "status 400" in running.error


def test_an_answer_that_is_stopped_before_its_first_text_leaves_the_question(answered, engine, server):
    engine.gate.clear()
    engine.answers.append("never")
    conversation, running = answered(Turn("Hi"), during=lambda it: it.stop())
    engine.gate.set()
    assert not conversation.turns[0].answers and not running.error
    wait_until(server.quiet)


def test_a_server_that_ends_in_the_middle_leaves_a_partial_answer(answered, engine, server):
    engine.pace = 0.02
    engine.answers.append("x" * 50)

    def end(running):
        wait_until(lambda: running.messages[-1]["content"])
        server.stop()

    conversation, running = answered(Turn("Hi"), during=end)
    assert conversation.turns[0].answer.end == "error" and "x" in conversation.turns[0].answer.text
    assert "shut down" in running.error


def test_no_answer_is_said(answered, engine):
    engine.answers.append([CALL, " "])
    conversation, running = answered(Turn("Hi"))
    assert not conversation.turns[0].answers and running.error == "The model gave no answer."


@pytest.mark.parametrize(("script", "kept"), [("It is fine. Damn it.", "It is fine. "), ("Damn.", "")])
def test_what_the_filter_ends_is_kept_as_far_as_it_came(script, kept, engine, tiny_tokenizer, tmp_path):
    (tmp_path / "words.txt").write_text("damn\n")
    engine.answers.append(script)
    name = saved.create(tmp_path / "talks", Conversation(turns=[Turn("Hi")]))
    filtered = {"moderate": Blocklist(tmp_path / "words.txt"), "grace": 0}
    with (
        running_server(engine, served(tiny_tokenizer, context=64), **filtered) as server,
        client_of(server, max_retries=0) as client,
    ):
        asked = saved.load(tmp_path / "talks", name).turns[0].name
        running = answering.begin(client, tmp_path / "talks", name, asked, {"model": "tiny"})
        assert running.ended.wait(10)
    answers = saved.load(tmp_path / "talks", name).turns[0].answers
    if kept:
        assert answers[0].text.strip() and kept.startswith(answers[0].text)
        assert answers[0].end == "content_filter" and not running.error
    else:
        assert not answers and running.error == "The filter let nothing pass."
    answering.RUNNING.clear()


def test_an_answer_to_a_question_that_was_edited_meanwhile_stays_with_it(answered, engine, tmp_path):
    engine.pace = 0.02
    engine.answers.append("x" * 20)

    def edit(running):
        wait_until(lambda: running.messages[-1]["content"])
        with saved.changing(tmp_path, running.name) as conversation:
            saved.replace_last(conversation, "Ho")

    conversation, _ = answered(Turn("Hi"), during=edit)
    assert conversation.edited[0][1].answer.text == "x" * 20 and not conversation.turns[0].answers


def test_an_answer_that_cannot_be_kept_is_still_shown(answered, engine, tmp_path, monkeypatch):
    engine.answers.append("precious")

    def full(*given):
        raise OSError(28, os.strerror(28), "talk.json")

    def fill(running):
        monkeypatch.setattr(saved, "write", full)

    engine.gate.clear()
    _, running = answered(Turn("Hi"), during=lambda it: (fill(it), engine.gate.set()))
    assert "No space left" in running.error and running.lost[-1]["content"] == "precious"


def test_one_answer_of_a_conversation_at_a_time(answered, engine, client, tmp_path):
    engine.pace = 0.01
    engine.answers += ["one", "two"]

    def again(running):
        assert answering.begin(client, tmp_path, running.name, running.turn, {"model": "tiny"}) is running

    conversation, _ = answered(Turn("Hi"), during=again)
    assert [answer.text for answer in conversation.turns[0].answers] == ["one"]


def test_only_what_our_tools_can_have_done_is_taken_from_a_server():
    good = {"type": "calculator", "arguments": '{"expression": "2+3"}', "output": "5"}
    bad = [
        "x", {}, good | {"type": "search"}, good | {"output": 5}, good | {"arguments": "{"},
        good | {"arguments": None}, good | {"arguments": "[]"}, good | {"arguments": '{"other": 1}'},
        good | {"type": "python"}, good | {"type": ["calculator"]},
    ]  # fmt: skip
    code = {"type": "python", "arguments": '{"code": "print(5)"}', "output": "5\x1b"}
    assert answering.is_call(code) and answering.messages_of([code, "So 5."]) == [
        {"role": "assistant", "content": "", "tool_calls": [tool_call("python", "print(5)")]},
        {"role": "tool", "content": "5"}, {"role": "assistant", "content": "So 5."},
    ]  # fmt: skip
    assert answering.is_call(good) and not [tool for tool in bad if answering.is_call(tool)]
