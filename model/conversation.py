"""Render conversations to token ids and a loss mask, and parse answers back to messages.

A conversation is a list of messages (messages.py). An assistant's call of a tool, the result and what the
assistant says then are one turn:

    <|bos|> <|user_start|> What is 2 + 3? <|user_end|>
    <|assistant_start|> <|tool_start|> 2+3 <|tool_end|> <|result_start|> 5 <|result_end|> 2 + 3 is 5.
    <|assistant_end|>

A call of Python is `python: ` and the code; a call that names no tool is the calculator's.

Prompts are built from ids, not text, so text can never become one of these special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hotlap.common.errors import DataError
from hotlap.model.messages import call_text, check_messages, split_call, tool_call

if TYPE_CHECKING:  # the engine runs where the tokenizer's libraries are not installed
    from hotlap.model.tokenizer import Tokenizer


def render(messages: list[dict], tokenizer: Tokenizer, silence: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation and its loss mask, True for tokens that carry loss.

    These are the assistant's text, its tool calls and the end of its turn; not the start of its turn, nor
    tool results. silence: as in `check_messages`. DataError if the messages are not in a valid order.
    """
    ids, loss_mask = [tokenizer.bos], [False]

    def mark(name: str, by_assistant: bool = False) -> None:
        ids.append(tokenizer.special[f"<|{name}|>"])
        loss_mask.append(by_assistant)

    def text(content: str, by_assistant: bool = False) -> None:
        new = tokenizer.encode(content)
        ids.extend(new)
        loss_mask.extend([by_assistant] * len(new))

    before = None
    for message in check_messages(messages, silence):
        role, content = message["role"], message["content"]
        if role in ("system", "user"):
            mark(f"{role}_start")
            text(content)
            mark(f"{role}_end")
        elif role == "tool":
            mark("result_start")
            text(content)
            mark("result_end")
        else:
            if before != "tool":
                mark("assistant_start")
            text(content, by_assistant=True)
            if message.get("tool_calls"):
                mark("tool_start", by_assistant=True)
                text(call_text(message), by_assistant=True)
                mark("tool_end", by_assistant=True)
            else:
                mark("assistant_end", by_assistant=True)
        before = role
    return ids, loss_mask


def render_prompt(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation that ends with a user message, up to the start of the assistant's turn.
    Messages may be empty: models give such answers, and the conversation goes on.
    """
    if check_messages(messages, silence=True)[-1]["role"] != "user":
        raise DataError("a prompt must end with a message from the user")
    return [*render(messages, tokenizer, silence=True)[0], tokenizer.special["<|assistant_start|>"]]


class AnswerParts:
    """Splits an answer, token by token, into text to show and hidden tool calls and results.

    `part` is the current part: "text", which is shown, or a tool's "call", "called" (between call and
    result) or "result", which are hidden. <|result_end|> always returns to text, even if special tokens
    before it were out of order. `call` and `result` hold the ids of the latest call and result.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.marks = {
            tokenizer.special[f"<|{name}|>"]: name
            for name in ("tool_start", "tool_end", "result_start", "result_end")
        }
        self.part = "text"
        self.call: list[int] = []
        self.result: list[int] = []

    def push(self, token: int) -> str:
        """The part that the token belongs to; a special token belongs to the part that it starts."""
        mark = self.marks.get(token)
        if mark == "tool_start":
            self.part, self.call = "call", []
        elif mark == "tool_end" and self.part == "call":
            self.part = "called"
        elif mark == "result_start" and self.part == "called":
            self.part, self.result = "result", []
        elif mark == "result_end":
            self.part = "text"
        elif self.part == "call":
            self.call.append(token)
        elif self.part == "result":
            self.result.append(token)
        return self.part


def spoken(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """The text of an answer, without tool calls and results."""
    parts = AnswerParts(tokenizer)
    return tokenizer.decode(token for token in ids if parts.push(token) == "text").strip()


def parse_answer(ids: list[int], tokenizer: Tokenizer) -> list[dict]:
    """A generated answer as messages: text, calls of tools and their results.

    A truncated answer is kept; an incomplete call at its end is dropped.
    """
    parts, text, messages = AnswerParts(tokenizer), [], []
    for token in ids:
        before = parts.part
        if parts.push(token) != "text":
            continue
        if before == "result":
            call = tool_call(*split_call(tokenizer.decode(parts.call)))
            messages += [
                {"role": "assistant", "content": tokenizer.decode(text), "tool_calls": [call]},
                {"role": "tool", "content": tokenizer.decode(parts.result)},
            ]
            text = []
        text.append(token)
    last = tokenizer.decode(text).strip()
    # calls without text after them are dropped
    return [*messages, {"role": "assistant", "content": last}] if last else []
