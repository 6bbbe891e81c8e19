"""Conversations to ids and back, and what carries loss."""

import itertools
import re

import pytest

from hotlap.common.errors import DataError
from hotlap.model.conversation import parse_answer, render, render_prompt, spoken
from hotlap.model.messages import tool_call
from hotlap.model.tokenizer import SPECIAL_TOKENS


def user(content="Hi"):
    return {"role": "user", "content": content}


def assistant(content="Hello."):
    return {"role": "assistant", "content": content}


def system(content="Be brief."):
    return {"role": "system", "content": content}


def tool(content="5"):
    return {"role": "tool", "content": content}


def call(expression="2+3", content=""):
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function}],
    }


def python(code, content=""):
    return {"role": "assistant", "content": content, "tool_calls": [tool_call("python", code)]}


def spelled(tokenizer, *pieces: str) -> list[int]:
    """Ids of pieces: a name like `user_start` is that mark, anything in quotes is text."""
    ids = []
    for piece in pieces:
        ids += tokenizer.encode(piece[1:-1]) if piece[0] == "'" else [tokenizer.special[f"<|{piece}|>"]]
    return ids


def test_only_what_the_assistant_says_carries_loss(tiny_tokenizer):
    ids, said = render([system(), user(), assistant(), user("2+3?"), assistant("5.")], tiny_tokenizer)
    t = tiny_tokenizer
    expected = spelled(
        t, "bos", "system_start", "'Be brief.'", "system_end", "user_start", "'Hi'", "user_end",
        "assistant_start", "'Hello.'", "assistant_end", "user_start", "'2+3?'", "user_end",
        "assistant_start", "'5.'", "assistant_end",
    )  # fmt: skip
    assert ids == expected and len(said) == len(ids)
    spoken = [t for t, s in zip(ids, said, strict=True) if s]
    assert spoken == spelled(t, "'Hello.'", "assistant_end", "'5.'", "assistant_end")


def test_the_assistant_says_its_calls_and_not_their_results(tiny_tokenizer):
    messages = [
        user("2+3?"),
        call("2+3", "Let me see: "),
        tool("5"),
        call("5*1"),
        tool("5"),
        assistant("It is 5."),
    ]
    ids, said = render(messages, tiny_tokenizer)
    t = tiny_tokenizer
    first = ("'Let me see: '", "tool_start", "'2+3'", "tool_end")
    second, last = ("tool_start", "'5*1'", "tool_end"), ("'It is 5.'", "assistant_end")
    result = ("result_start", "'5'", "result_end")
    assert ids == spelled(
        t,
        "bos",
        "user_start",
        "'2+3?'",
        "user_end",
        "assistant_start",
        *first,
        *result,
        *second,
        *result,
        *last,
    )
    assert [i for i, s in zip(ids, said, strict=True) if s] == spelled(t, *first, *second, *last)


def test_a_call_of_python_names_it_and_carries_loss_as_its_result_does_not(tiny_tokenizer):
    t = tiny_tokenizer
    ids, said = render([user("2+3?"), python("print(2 + 3)"), tool("5"), assistant("5.")], t)
    code = ("tool_start", "'python: print(2 + 3)'", "tool_end")
    expected = spelled(
        t, "bos", "user_start", "'2+3?'", "user_end", "assistant_start", *code,
        "result_start", "'5'", "result_end", "'5.'", "assistant_end",
    )  # fmt: skip
    assert ids == expected
    assert [i for i, s in zip(ids, said, strict=True) if s] == spelled(t, *code, "'5.'", "assistant_end")


def test_arguments_may_be_a_string_of_json(tiny_tokenizer):
    message = call("2+3")
    message["tool_calls"][0]["function"]["arguments"] = '{"expression": "2+3"}'
    rest = [tool(), assistant()]
    assert render([user(), message, *rest], tiny_tokenizer) == render(
        [user(), call("2+3"), *rest], tiny_tokenizer
    )


def test_a_prompt_ends_where_the_assistant_begins(tiny_tokenizer):
    messages = [system(), user(), assistant("So."), user("Why?")]
    prompt = render_prompt(messages, tiny_tokenizer)
    whole, _ = render([*messages, assistant("Because.")], tiny_tokenizer)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == spelled(tiny_tokenizer, "'Because.'", "assistant_end")


@pytest.mark.parametrize("nothing", ["", " ", None])
def test_a_conversation_goes_on_after_an_empty_answer_but_is_no_data(nothing, tiny_tokenizer):
    messages = [user(), assistant(nothing), user("Why?")]
    start = [*render_prompt([user()], tiny_tokenizer), *tiny_tokenizer.encode(nothing or "")]
    assert render_prompt(messages, tiny_tokenizer)[: len(start)] == start
    with pytest.raises(DataError, match=r"says nothing|without `content`"):
        render(messages, tiny_tokenizer)


@pytest.mark.parametrize(
    "messages", [[], None, "Hi", [user(), assistant()], [user(), call(), tool()], [system()]]
)
def test_a_prompt_needs_a_question(messages, tiny_tokenizer):
    with pytest.raises(DataError):
        render_prompt(messages, tiny_tokenizer)


def test_marks_inside_messages_stay_text(tiny_tokenizer):
    text = "".join(SPECIAL_TOKENS)
    messages = [system(text), user(text), call(text, text), tool(text), assistant(text)]
    ids, _ = render(messages, tiny_tokenizer)
    plain, _ = render([system("x"), user("x"), call("x", "x"), tool("x"), assistant("x")], tiny_tokenizer)
    marks = [i for i in ids if i >= tiny_tokenizer.text_size]
    assert marks == [i for i in plain if i >= tiny_tokenizer.text_size]


def test_a_conversation_is_checked_before_it_is_rendered(tiny_tokenizer):
    with pytest.raises(DataError, match="message 1: two messages from 'user'"):
        render([user(), user()], tiny_tokenizer)


ANSWERS = {
    "plain": [assistant("It is 5.")],
    "one call": [call("2+3"), tool("5"), assistant("It is 5.")],
    "a word before": [call("2+3", "Let me see: "), tool("5"), assistant("It is 5.")],
    "python": [python("for i in 'a: b':\n    print(i)\n", "So: "), tool("5"), assistant("It is 5.")],
    "python, spaces first": [python("  python: 1"), tool(""), assistant("It is 5.")],
    "python, no code": [python(""), tool(""), assistant("Nothing.")],
    "both": [call("2+3"), tool("5"), python("print(5)"), tool("5"), assistant("It is 5.")],
    "two calls": [call("2+3"), tool("5"), call("5*5", "So "), tool("25"), assistant("It is 25.")],
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_parsing_an_answer_is_the_inverse_of_rendering_it(answer, tiny_tokenizer):
    prompt = render_prompt([user()], tiny_tokenizer)
    ids, _ = render([user(), *answer], tiny_tokenizer)
    assert parse_answer(ids[len(prompt) : -1], tiny_tokenizer) == answer


def test_half_a_call_is_dropped(tiny_tokenizer):
    t = tiny_tokenizer
    pieces = ["'Let me see'", "tool_start", "'2+'", "tool_end", "result_start", "'5'"]
    for end in range(1, len(pieces) + 1):
        assert parse_answer(spelled(t, *pieces[:end]), t) == [assistant("Let me see")]
    for end in range(1, len(pieces)):
        assert parse_answer(spelled(t, *pieces[1 : end + 1]), t) == []
    whole = spelled(t, *pieces, "result_end")
    assert parse_answer(whole, t) == []  # a call without a closing word
    assert parse_answer([*whole, *spelled(t, "'So '")], t)[-1] == assistant("So")


def test_whatever_a_model_writes_becomes_a_conversation_that_can_go_on(tiny_tokenizer):
    """All sequences of five pieces: marks in any order, and text. What is remembered is what was read."""
    pieces = ("tool_start", "tool_end", "result_start", "result_end", "user_start", "'2+3'")
    for sequence in itertools.product(pieces, repeat=5):
        ids = spelled(tiny_tokenizer, *sequence)
        answer = parse_answer(ids, tiny_tokenizer)
        if answer:
            assert answer[-1]["role"] == "assistant" and not answer[-1].get("tool_calls")
            render_prompt([user(), *answer, user()], tiny_tokenizer)
            said = "".join(m["content"] for m in answer if m["role"] == "assistant")
            assert said == spoken(ids, tiny_tokenizer)


@pytest.mark.parametrize(
    "pieces, text",
    [
        ("'It is 5.'", "It is 5."),
        ("'So: ' tool_start '2+3' tool_end result_start '5' result_end 'five. '", "So: five."),
        ("'So: ' tool_start '2+3' tool_start '4' result_end 'four'", "So: four"),
        ("'So' tool_start '2+3' tool_end result_start '5'", "So"),
        ("'a' tool_end 'b' result_start 'c' result_end 'd'", "abcd"),
    ],
)
def test_calls_and_results_are_not_for_reading(pieces, text, tiny_tokenizer):
    pieces = re.findall(r"'[^']*'|\w+", pieces)
    assert spoken(spelled(tiny_tokenizer, *pieces), tiny_tokenizer) == text
