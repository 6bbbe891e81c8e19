"""Answers of the API for the web page, each in a thread, so that it outlives reruns and reloads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import openai

from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.messages import ARGUMENTS, tool_call
from hotlap.serve.saved_conversations import Answer, Changed, changing, load

TOO_LONG = "context_length_exceeded"
RUNNING: dict[tuple[Path, str], Answering] = {}  # the last one of each conversation, until it ended well
ONE_AT_A_TIME = threading.Lock()


class Answering:
    """The answer to a turn of a conversation. It is kept when it ends, and as far as it came when it is
    stopped or fails.

    fields: of the request, besides its messages. `error`: what went wrong, for the user. `lost`: what came of
    the answer, if it could not be kept.
    """

    def __init__(self, client: openai.OpenAI, folder: Path, name: str, turn: str, fields: dict):
        self.client, self.folder, self.name, self.turn, self.fields = client, folder, name, turn, fields
        self.parts: list[str | dict] = []
        self.error, self.lost = "", []
        self.ended = threading.Event()
        self.kept = threading.Lock()

    @property
    def messages(self) -> list[dict]:
        """The answer so far."""
        return messages_of(self.parts)

    def run(self) -> None:
        """Ask without the oldest turns if the context has no room for them."""
        try:
            conversation = load(self.folder, self.name)
            turn = conversation.turns[-1]
            if turn.name != self.turn:
                raise Changed("another page has asked something else")
            self.system, at = conversation.system, len(conversation.turns) - 1
            for dropped in range(at + 1):
                self.dropped = dropped
                before = conversation.messages(at, dropped=dropped)
                if self.ask([*before, {"role": "user", "content": turn.question}], dropped < at):
                    break
            self.end(self.reason)
        except Exception as error:  # whatever it is, the user is told
            log.debug("no answer", exc_info=True)
            self.end("error", told(error, self.client))

    def ask(self, messages: list[dict], can_drop: bool) -> bool:
        """Stream an answer. False if the prompt leaves it no room, and could be shorter."""
        self.parts, self.tokens, self.reason = [], 0, ""
        self.began, self.first = time.perf_counter(), 0.0
        try:
            stream = self.client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **self.fields
            )
        except openai.BadRequestError as error:
            if error.code == TOO_LONG and can_drop:
                return False
            raise
        prompt = 0
        with stream:
            for chunk in stream:
                if self.ended.is_set():
                    return True
                if chunk.usage:
                    prompt, self.tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                for choice in chunk.choices:
                    self.add(choice)
        if not self.reason:
            raise ValueError("the server closed the connection before the answer was complete")
        room = min(self.fields.get("max_tokens") or prompt, (prompt + self.tokens) // 4)
        return not (can_drop and self.reason == "length" and self.tokens < room)

    def add(self, choice: object) -> None:
        """A choice of a chunk."""
        new = [choice.delta.content] if choice.delta.content else []
        new += [*filter(is_call, getattr(choice.delta, "executed_tools", None) or [])]
        if new:
            self.first = self.first or time.perf_counter() - self.began
            self.parts += new
            self.tokens += 1  # until the server says how many
        self.reason = choice.finish_reason or self.reason

    def stop(self) -> None:
        """End the answer here. The request ends with the next chunk."""
        self.end("stopped")

    def end(self, reason: str, error: str = "") -> None:
        """Keep the answer, once."""
        with self.kept:
            if self.ended.is_set():
                return
            self.error, messages = error, self.messages
            try:
                if messages[-1]["content"].strip():
                    self.keep(messages, reason)
                elif not error and reason != "stopped":
                    filtered = reason == "content_filter"
                    self.error = "The filter let nothing pass." if filtered else "The model gave no answer."
            except (OSError, ValueError) as failure:
                self.error, self.lost = f"The answer could not be kept: {failure}", messages
            if not self.error and RUNNING.get((self.folder, self.name)) is self:
                del RUNNING[self.folder, self.name]
            self.ended.set()

    def keep(self, messages: list[dict], reason: str) -> None:
        seconds = time.perf_counter() - self.began
        answer = Answer(
            messages, printable(self.fields["model"]), self.system, self.tokens, self.first, seconds, reason,
            self.dropped,
        )  # fmt: skip
        with changing(self.folder, self.name) as conversation:
            turn = conversation.turn(self.turn)
            turn.answers.append(answer)
            turn.shown = len(turn.answers) - 1


def begin(client: openai.OpenAI, folder: Path, name: str, turn: str, fields: dict) -> Answering:
    """Start an answer, unless one of the conversation is being written. Returns the one that is."""
    with ONE_AT_A_TIME:
        answering = RUNNING.get((folder, name))
        if answering is None or answering.ended.is_set():
            RUNNING[folder, name] = answering = Answering(client, folder, name, turn, fields)
            threading.Thread(target=answering.run, daemon=True).start()
        return answering


def stop_all() -> None:
    """Keep what there is of all answers."""
    for answering in [*RUNNING.values()]:
        answering.stop()


def is_call(tool: object) -> bool:
    """Whether it is a call of a tool, with its result, as our API lists them."""
    if not isinstance(tool, dict) or not isinstance(tool.get("output"), str):
        return False
    try:
        wanted = ARGUMENTS[tool["type"]]
        arguments = json.loads(tool["arguments"])
    except (KeyError, TypeError, ValueError):
        return False
    return isinstance(arguments, dict) and [*arguments] == [wanted]


def messages_of(parts: list[str | dict]) -> list[dict]:
    """Pieces of text, and calls, as messages: the last one is the text after the last call."""
    messages, text = [], ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        (argument,) = json.loads(part["arguments"]).values()
        call = tool_call(part["type"], printable(str(argument)))
        messages += [
            {"role": "assistant", "content": printable(text), "tool_calls": [call]},
            {"role": "tool", "content": printable(part["output"])},
        ]
        text = ""
    return [*messages, {"role": "assistant", "content": printable(text)}]


def told(error: Exception, client: openai.OpenAI) -> str:
    """What went wrong with a request, for the user."""
    if isinstance(error, openai.APITimeoutError):
        return f"The server at {client.base_url} took too long."
    if isinstance(error, openai.APIConnectionError):
        return f"The server at {client.base_url} does not answer. Is it running?"
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return f"The server says: {body.get('message') or error.message} (status {error.status_code})"
    if isinstance(error, ValueError | OSError | openai.OpenAIError):
        return f"The answer was cut off: {error}"
    return f"The answer was cut off: {type(error).__name__}: {error}"
