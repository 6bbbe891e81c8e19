"""Conversations on disk, and what is made of them."""

import json
import multiprocessing
import os
import stat

import pytest
from helpers.page_functions import add_questions

from hotlap.common.errors import DataError
from hotlap.model.messages import check_messages
from hotlap.serve import saved_conversations as saved
from hotlap.serve.saved_conversations import Answer, Changed, Conversation, Turn
from hotlap.train.data.conversation_files import read_conversations

CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}
SUM = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def said(text: str, **fields) -> Answer:
    messages = [{"role": "assistant", "content": text}]
    return Answer(**{"messages": messages, "model": "tiny", "system": "", "tokens": 3, "first": 0.1,
                     "seconds": 0.2} | fields)  # fmt: skip


def talk(*turns: tuple[str, list[Answer]], **fields) -> Conversation:
    return Conversation(turns=[Turn(question, answers) for question, answers in turns], **fields)


def test_a_conversation_is_read_as_it_was_written(tmp_path):
    conversation = talk(("2 + 3?", [said("", messages=SUM, liked=True), said("six")]), system="Be kind.")
    saved.replace_last(conversation, "3 + 4?")
    name = saved.create(tmp_path, conversation)
    assert saved.load(tmp_path, name) == conversation
    assert saved.listed(tmp_path) == ({name: conversation}, [])


def test_only_the_user_can_look_into_the_folder(tmp_path):
    saved.create(tmp_path / "new" / "folder", talk(("Hi", [])))
    assert stat.S_IMODE(os.stat(tmp_path / "new" / "folder").st_mode) == 0o700


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "0" * 15, "0" * 17, "a/b", "0123456789abcdef\n"])
def test_a_made_up_name_leads_to_no_file(tmp_path, name):
    with pytest.raises(DataError, match="no such conversation"):
        saved.load(tmp_path, name)


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"turns": 3, "edited": []}', '{"turns": [], "edited": [], "more": 1}',
    '{"turns": [{"question": 3, "answers": []}], "edited": []}',
    '{"turns": [{"question": "a", "answers": [], "shown": 1}], "edited": []}',
])  # fmt: skip
def test_a_file_that_is_no_conversation_is_named_and_hides_no_other(tmp_path, text):
    (tmp_path / ("0" * 16 + ".json")).write_text(text)
    name = saved.create(tmp_path, talk(("Hi", [])))
    found, wrong = saved.listed(tmp_path)
    assert list(found) == [name] and len(wrong) == 1 and "0" * 16 in wrong[0]


def test_the_latest_conversation_comes_first(tmp_path):
    first, second = saved.create(tmp_path, talk()), saved.create(tmp_path, talk())
    with saved.changing(tmp_path, first) as conversation:
        conversation.title = "changed"
    assert list(saved.listed(tmp_path)[0]) == [first, second]


def test_what_was_decided_on_an_older_state_is_refused_and_changes_nothing(tmp_path):
    name = saved.create(tmp_path, talk(("a", [said("b")])))
    seen = saved.load(tmp_path, name)
    with saved.changing(tmp_path, name, seen) as conversation:
        saved.ask(conversation, "c")
    now = (tmp_path / f"{name}.json").read_bytes()
    with pytest.raises(Changed, match="another page"), saved.changing(tmp_path, name, seen) as conversation:
        saved.ask(conversation, "d")
    assert (tmp_path / f"{name}.json").read_bytes() == now
    saved.delete(tmp_path, name)
    with pytest.raises(Changed, match="deleted"), saved.changing(tmp_path, name):
        pass
    assert not (tmp_path / f"{name}.json").exists()


def test_changes_from_two_processes_at_once_are_all_kept(tmp_path):
    name = saved.create(tmp_path, talk())
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=add_questions, args=(tmp_path, name, letter, 20)) for letter in "ab"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    questions = [turn.question for turn in saved.load(tmp_path, name).turns]
    assert sorted(questions) == sorted(f"{letter}{i}" for letter in "ab" for i in range(20))


def test_the_first_question_is_the_title_unless_there_is_one():
    conversation = Conversation()
    saved.ask(conversation, "What\nis  " + "x" * 100)
    saved.ask(conversation, "b")
    assert conversation.title == ("What is " + "x" * 100)[: saved.TITLE]


def test_an_export_is_what_sft_reads(tmp_path):
    conversations = [
        talk(("2 + 3?", [said("", messages=SUM)]), ("And?", [said("no"), said("yes")]), system="Be kind."),
        talk(("unanswered", []), ("é\u2028", [said("ü")])),
        talk(("nothing", [])),
    ]
    text, left_out = saved.exported(conversations)
    (tmp_path / "talks.jsonl").write_text(text, encoding="utf-8")
    first, second = (messages for _, messages in read_conversations(tmp_path / "talks.jsonl"))
    assert left_out == 1
    assert first == check_messages([
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 3?"}, *SUM,
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "no"},
    ])  # fmt: skip
    assert [m["content"] for m in second] == ["é\u2028", "ü"]


def test_a_liked_and_a_disliked_answer_to_the_same_prompt_are_a_pair(tmp_path):
    conversation = talk(("a", [said("b")]), ("c", [said("good", liked=True), said("bad", liked=False)]))
    name = saved.create(tmp_path, conversation)
    saved.write_preferences(tmp_path)
    (line,) = (tmp_path / saved.PREFERENCES).read_text().splitlines()
    assert json.loads(line) == {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "c"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }  # fmt: skip
    assert not (tmp_path / saved.RATINGS).exists()
    saved.delete(tmp_path, name)
    assert (tmp_path / saved.PREFERENCES).read_text() == ""


def test_a_rating_alone_is_kept_with_its_conversation():
    (rating,) = saved.ratings(talk(("a", [said("b", liked=False), said("c")])))
    assert rating == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "liked": False,
    }


@pytest.mark.parametrize("other", [{"system": "Be brief."}, {"dropped": 1}])
def test_answers_to_different_prompts_are_no_pair(other):
    conversation = talk(
        ("a", [said("b")]), ("c", [said("good", liked=True), said("bad", liked=False, **other)])
    )
    assert saved.pairs(conversation) == []
    assert len(saved.ratings(conversation)) == 2


def test_ratings_outlive_an_edited_question():
    conversation = talk(("a", [said("good", liked=True), said("bad", liked=False)]))
    saved.replace_last(conversation, "b")
    assert [pair["prompt"][0]["content"] for pair in saved.pairs(conversation)] == ["a"]
    assert [turn.question for turn in conversation.turns] == ["b"]
