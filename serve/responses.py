"""What goes out: replies and streamed chunks in OpenAI's two forms, built from what the engine reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hotlap.model.conversation import AnswerParts
from hotlap.model.messages import ARGUMENTS, split_call
from hotlap.serve.logprobs import ChatLogprobs, CompletionLogprobs

if TYPE_CHECKING:  # the engine imports torch
    from hotlap.model.engine import Token
    from hotlap.model.tokenizer import Tokenizer
    from hotlap.serve.protocol import Call

DONE = "data: [DONE]\n\n"


class Piece(NamedTuple):
    """What is new of one choice. With echo, its first piece begins with the prompt's text and tokens."""

    choice: int
    text: str
    tokens: list[Token]
    """All of them, those of hidden tool calls and the one that ends the answer too."""
    finish_reason: str | None
    """stop, length or content_filter in a choice's last piece, else None."""


@dataclass
class Usage:
    """Tokens that a call has read and written, of all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were reused."""

    def fields(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def sse(event: dict) -> str:
    """A server-sent event. Only ASCII: some clients take U+2028 and its like for the end of a line."""
    return f"data: {json.dumps(event, allow_nan=False, separators=(',', ':'))}\n\n"


class Choice:
    """One answer so far."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        form = ChatLogprobs if call.chat else CompletionLogprobs
        self.logprobs = None if call.logprobs is None else form(tokenizer)
        self.text: list[str] = []
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.tokenizer, self.parts = tokenizer, AnswerParts(tokenizer) if call.chat else None
        self.executed: list[dict] = []

    def executed_in(self, tokens: list[Token]) -> list[dict]:
        """The tool calls whose result ends in these tokens, in the form of Groq's `executed_tools`."""
        found = []
        for token in tokens if self.parts else []:
            before = self.parts.part
            if self.parts.push(token.id) == "text" and before == "result":
                name, text = split_call(self.tokenizer.decode(self.parts.call))
                found.append({
                    "index": len(self.executed) + len(found),
                    "type": name,
                    "arguments": json.dumps({ARGUMENTS[name]: text}),
                    "output": self.tokenizer.decode(self.parts.result),
                })  # fmt: skip
        self.executed += found
        return found


class Reply:
    """The response to a call: `chunks` for each piece if it streams, else `add` each piece, then `whole`."""

    def __init__(self, call: Call, tokenizer: Tokenizer):
        self.call, self.tokenizer = call, tokenizer
        self.choices: dict[int, Choice] = {}

    def chunks(self, piece: Piece) -> list[dict]:
        """The role, when a chat's choice begins; what is new, if anything; the reason, when it ends."""
        found = []
        if self.call.chat and piece.choice not in self.choices:
            found.append(self.chunk(piece.choice, {"role": "assistant", "content": ""}))
        choice = self.choice(piece.choice)
        logprobs = choice.logprobs.of(piece.tokens) if choice.logprobs and piece.tokens else None
        executed = choice.executed_in(piece.tokens)
        if executed or piece.text or (logprobs and any(logprobs.values())):
            tools = {"executed_tools": executed} if executed else {}
            found.append(self.chunk(piece.choice, {"content": piece.text, **tools}, logprobs))
        if piece.finish_reason:
            found.append(self.chunk(piece.choice, {}, None, piece.finish_reason))
        return found

    def chunk(
        self, index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None
    ) -> dict:
        new = {"delta": delta} if self.call.chat else {"text": delta.get("content", "")}
        choice = {"index": index, **new, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.call.include_usage else {}
        return self.head(streaming=True) | {"choices": [choice]} | usage

    def usage_chunk(self, usage: Usage) -> dict:
        """The last chunk, if `include_usage` asks for it: without choices."""
        return self.head(streaming=True) | {"choices": [], "usage": usage.fields()}

    def add(self, piece: Piece) -> None:
        """Keep a piece for `whole`."""
        choice = self.choice(piece.choice)
        choice.text.append(piece.text)
        choice.tokens += piece.tokens
        choice.executed_in(piece.tokens)
        choice.finish_reason = piece.finish_reason

    def whole(self, usage: Usage) -> dict:
        """The reply, once every choice has ended."""
        choices = [self.whole_choice(i, choice) for i, choice in sorted(self.choices.items())]
        return self.head(streaming=False) | {"choices": choices, "usage": usage.fields()}

    def whole_choice(self, index: int, choice: Choice) -> dict:
        text = "".join(choice.text)
        tools = {"executed_tools": choice.executed} if choice.executed else {}
        message = {"message": {"role": "assistant", "content": text, **tools}}
        return {
            "index": index,
            **(message if self.call.chat else {"text": text}),
            "logprobs": choice.logprobs.of(choice.tokens) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice(self.call, self.tokenizer))

    def head(self, streaming: bool) -> dict:
        kind = "text_completion"
        if self.call.chat:
            kind = "chat.completion.chunk" if streaming else "chat.completion"
        return {"id": self.call.id, "object": kind, "created": self.call.created, "model": self.call.model}
