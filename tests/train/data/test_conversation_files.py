"""Conversations in users' files: what is read, and what an error says."""

import json
import os

import pytest
from helpers.small_runs import conversation

from hotlap.common.errors import DataError
from hotlap.train.data import file_documents
from hotlap.train.data.conversation_files import accepted, read_conversations

TALK = conversation("é?", "€ 😀")
GOOD = json.dumps({"messages": TALK}, ensure_ascii=False)
CALL = {"function": {"name": "calculator", "arguments": {"expression": "2+3"}}}


def record(**fields) -> str:
    return json.dumps({"messages": TALK} | fields)


BAD_LINES = {
    '{"messages": [': "not JSON .* at character 15",
    "{'messages': []}": "not JSON .* double quotes",
    "user,assistant": "not JSON .*; each line must be",
    '{"a": %s}' % ("1" * 5000): "not JSON .a number is too long",
    "[" * 100_000: "nested too deeply",
    "{": "JSON over several lines; .*jq -c",
    "[": "a JSON array; .*jq -c",
    f"[{GOOD},": "a JSON array; .*jq -c",
    f"[{GOOD}]": "a JSON array; .*jq -c",
    "[]": "a JSON array; .*jq -c",
    json.dumps(TALK): "a list of messages; write",
    "5": "5; each line must be",
    '{"message": []}': "rename 'message' to 'messages'",
    '{"Messages": []}': "rename 'Messages' to 'messages'",
    '{"conversations": []}': "'conversations'; this is ShareGPT's format: rename",
    '{"prompt": "a", "completion": "b"}': "'prompt', 'completion'; .* contents of a user's",
    '{"instruction": "a", "output": "b"}': "'instruction', 'output'; .* output of an assistant's",
    '{"text": "a"}': "'text'; text without roles is for `hotlap pretrain`",
    '{"id": 1}': "needs a \"messages\" list, not an object with the keys 'id'",
    '{"messages": [], "messages": []}': "'messages' is there twice",
    record(messages=[]): "list of at least one message, not a list of 0",
    record(messages="hello"): "must be a list .*not 'hello'",
    record(system="Be brief."): "'system' beside `messages` would be lost",
    record(tools=[{}]): "'tools' beside `messages` would be lost",
    record(messages=TALK[:1]): "does not end with the assistant's answer, but with a message from 'user'",
    record(messages=[TALK[0], {"role": "assistant", "tool_calls": [CALL]}]): "but with a call",
    record(messages=TALK[::-1]): "message 0: from 'assistant' at the start",
    record(messages=[{"role": "user", "text": "a"}, TALK[1]]): "message 0: unknown key 'text'",
    record(messages=conversation("cut off \ud83d", "a")): r"message 0: .*ud83d' is half of a character",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_what_was_found_and_what_is_needed(tmp_path, line):
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"talks\.jsonl:3: .*{BAD_LINES[line]}") as error:
        list(read_conversations(path))
    assert len(str(error.value)) < 500 + len(str(path))


MARK = "\ufeff"
ENCODED = {
    "utf-8": GOOD.encode(),
    "mark": f"{MARK}{GOOD}\n{GOOD}".encode(),
    "windows": f"{MARK}{GOOD}\r\n\r\n{GOOD}\r\n".encode(),
    "old mac": f"{GOOD}\r{GOOD}\r".encode(),
    "joined": f"{MARK}{GOOD}\n{MARK}{GOOD}\n".encode(),
    "utf-16": f"{GOOD}\r\n{GOOD}".encode("utf-16"),
    "utf-16-be": f"{MARK}{GOOD}\n{GOOD}".encode("utf-16-be"),
    "utf-32": f"{GOOD}\n{GOOD}\n".encode("utf-32"),
    "escapes": json.dumps({"messages": TALK}).encode(),
}


@pytest.mark.parametrize("name", ENCODED)
def test_files_are_read_as_editors_save_them(tmp_path, name):
    path = tmp_path / "talks.jsonl"
    path.write_bytes(ENCODED[name])
    assert [talk for _, talk in read_conversations(path)] in ([TALK], [TALK, TALK])


@pytest.mark.parametrize(
    "content, match",
    [
        (f"{GOOD}\n\n".encode() + b'{"a": "\xe9"}\n', r"not UTF-8 at byte \d+ \(line 3: 0xe9\); convert it"),
        (GOOD.encode("utf-16")[:-1], "not UTF-16 at byte"),
        (GOOD.encode("utf-16-le"), "binary or compressed"),
        (b"\x1f\x8b\x08", r"talks\.jsonl, after 0 bytes of what is in it, is cut short"),
        (b"PAR1\0", "parquet without that ending"),
        (b"", "holds no conversation"),
        (b"\n \r\n", "holds no conversation"),
        (MARK.encode(), "holds no conversation"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, content, match):
    path = tmp_path / "talks.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(read_conversations(path))


def test_a_path_is_a_file_whatever_its_characters_and_nothing_else(tmp_path):
    path = tmp_path / "talks [1]* é?.jsonl"
    path.write_text(GOOD)
    assert list(read_conversations(path)) == [(f"{path}:1", TALK)]
    with pytest.raises(FileNotFoundError, match=r"no conversations at .*none\.jsonl; name"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        list(read_conversations(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe, socket or device"):
        list(read_conversations(tmp_path / "pipe"))


def test_a_line_without_end_is_refused_before_all_of_it_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(file_documents, "LONGEST_LINE", 1000)
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{GOOD}\n[{'{}, ' * 500}")
    with pytest.raises(DataError, match=r"talks.jsonl:2: a line of over 1,000 characters"):
        list(read_conversations(path))


def test_other_keys_of_records_are_ignored_with_a_line_that_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join([record(id=1, source="x"), record(id=2, tools=None), GOOD]))
    assert len(list(read_conversations(path))) == 3
    (line,) = caplog.messages
    assert "ignored keys beside `messages`" in line and line.endswith("'id' (2), 'source' (1)")


def test_a_parquet_file_of_messages_is_read_like_lines(tmp_path):
    from helpers.hub_data import write_talks

    pytest.importorskip("pyarrow")
    talks = [conversation(f"{i}", "b") for i in range(20)]
    path = write_talks(tmp_path / "a.PARQUET", talks)
    assert list(read_conversations(path)) == [(f"{path}:{i}", talk) for i, talk in enumerate(talks, 1)]
    path = write_talks(tmp_path / "bad.parquet", [*talks, talks[0][:1]])
    with pytest.raises(DataError, match=r"bad\.parquet:21: the conversation does not end with"):
        list(read_conversations(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged, or not a parquet file"):
        list(read_conversations(path))


@pytest.mark.parametrize(
    "columns, match",
    [
        ({"text": ["a"]}, r"columns \['text'\]; it needs `messages`"),
        ({"messages": ["a"]}, r"a\.parquet:1: `messages` must be a list .* not 'a'"),
        ({"messages": [None]}, r"a\.parquet:1: `messages` must be a list .* not null"),
        ({"messages": [TALK], "system": ["Be brief."]}, "column 'system' beside `messages` would be lost"),
        ({"messages": []}, "holds no conversation"),
    ],
)
def test_a_parquet_file_of_something_else_is_refused(tmp_path, columns, match):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=match):
        list(read_conversations(tmp_path / "a.parquet"))


def test_nulls_that_parquet_adds_to_messages_are_as_if_they_were_not_there(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    talk = [TALK[0], call, {"role": "tool", "content": "5", "name": "calculator"}, TALK[1]]
    parquet.write_table(pyarrow.table({"messages": [TALK, talk]}), tmp_path / "a.parquet")
    (_, first), (_, second) = read_conversations(tmp_path / "a.parquet")
    assert first == TALK
    assert second[1]["content"] == "" and second[1]["tool_calls"] == [CALL | {"type": "function"}]


def test_a_public_file_of_which_nothing_is_refused_says_nothing(tmp_path, caplog):
    path = tmp_path / "talks.jsonl"
    path.write_text(GOOD)
    assert len(list(accepted(path))) == 1 and not caplog.text
