"""Chat with a model in the terminal: python chat.py [MODEL] [-p QUESTION]."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from hotlap.common import options
from hotlap.common.errors import BAD_DATA, guarded
from hotlap.common.files import append
from hotlap.kernels.dispatch import default_device, kernel_choice
from hotlap.model.conversation import AnswerParts, parse_answer, render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import StreamDecoder
from hotlap.model.weights import find_models, load_model, model_folder, stage

HELP = """\
  /system TEXT       set the system message (no TEXT: remove it)
  /temperature N     0 takes the most likely token; higher is more random
  /clear             start a new conversation
  /save FILE         append the conversation to FILE as a line of JSON
  /help              list the commands
  /quit              quit (or Ctrl-D, /exit)
  Ctrl-C stops an answer."""
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the writing direction
LONGEST_MESSAGE = 100_000  # characters


@dataclass(frozen=True)
class ChatConfig:
    """Chat with a model."""

    model: tyro.conf.Positional[Path | None] = None
    """Run, checkpoint or model directory; the newest under runs/ by default."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and exit."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.0))

    def validate(self) -> ChatConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        self.sampling.validate()
        return self


class Chat:
    """A conversation with a chat model."""

    def __init__(self, engine: Engine, sampling: Sampling):
        self.engine, self.sampling = engine, sampling
        self.system = ""
        self.messages: list[dict] = []

    def answer(self, question: str) -> Iterator[str]:
        """Stream the answer as text. Question and answer (as far as it came) join the conversation."""
        self.messages.append({"role": "user", "content": question})
        ids: list[int] = []
        try:
            prompt, dropped = self.fitting_prompt()
            if dropped:
                yield f"[the context is full: dropped the first {dropped} questions and answers]\n"
            decoder, parts = StreamDecoder(self.engine.tokenizer), AnswerParts(self.engine.tokenizer)
            for token in self.engine.generate(prompt, self.sampling):
                ids.append(token)
                if parts.push(token) == "text":
                    yield decoder.push(token)
            yield decoder.finish()
        finally:
            messages = parse_answer(ids, self.engine.tokenizer)
            if messages:
                self.messages += messages
            else:
                self.messages.pop()

    def fitting_prompt(self) -> tuple[list[int], int]:
        """Drop the oldest turns until the conversation fits. Returns its ids, and how many were dropped."""
        context = self.engine.model.config.context
        room = min(self.sampling.max_tokens, context // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        for dropped, start in enumerate(turns):
            prompt = render_prompt(system + self.messages[start:], self.engine.tokenizer)
            if len(prompt) + room <= context:
                self.messages = self.messages[start:]
                return prompt, dropped
        raise ValueError(
            f"the message takes {len(prompt)} tokens, but the context of {context} must leave {room} for an "
            "answer; shorten it"
        )


class Continuation:
    """A base model, which continues text."""

    def __init__(self, engine: Engine, sampling: Sampling):
        self.engine, self.sampling = engine, sampling

    def answer(self, text: str) -> Iterator[str]:
        tokenizer = self.engine.tokenizer
        prompt = [tokenizer.bos, *tokenizer.encode(text)][-(self.engine.model.config.context * 3 // 4) :]
        decoder = StreamDecoder(tokenizer)
        for token in self.engine.generate(prompt, self.sampling):
            yield decoder.push(token)
        yield decoder.finish()


def printable(text: str) -> str:
    """text without characters that control the terminal or change the writing direction."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in TURNS))


def say(chat: Chat | Continuation, question: str) -> bool:
    """Print the answer as it comes; False after an error. Ctrl-C stops the answer, not the program."""
    stream = chat.answer(question)
    try:
        for piece in stream:
            print(printable(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        stream.close()
        print(" [stopped]")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def command(chat: Chat, line: str) -> bool:
    """Run a /command. False: quit."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        print(HELP)
    elif name == "/clear":
        chat.messages = []
        print("[new conversation]")
    elif name == "/system":
        chat.system = rest
        print(f"[system message: {rest!r}]" if rest else "[no system message]")
    elif name == "/temperature":
        try:
            chat.sampling = dataclasses.replace(chat.sampling, temperature=float(rest)).validate()
            print(f"[temperature {chat.sampling.temperature}]")
        except ValueError:
            print(f"error: /temperature {rest or '(nothing)'}: needs a number from 0 to 10", file=sys.stderr)
    elif name == "/save":
        save(chat, rest)
    else:
        print(f"error: unknown command {name}; /help lists them", file=sys.stderr)
    return True


def save(chat: Chat, name: str) -> None:
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    try:
        if not name:
            raise OSError("name a file, as in /save talk.jsonl")
        if not chat.messages:
            raise OSError("the conversation is empty")
        line = json.dumps({"messages": system + chat.messages}, ensure_ascii=False)
        append(Path(name), line + "\n")
        print(f"[saved to {name}]")
    except OSError as error:
        print(f"error: /save: {error}", file=sys.stderr)


def converse(chat: Chat | Continuation) -> None:
    """Answer lines until the end of input. The prompt is only shown on a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history, if Python has it
        print("type a message, or /help" if isinstance(chat, Chat) else "type text for the model to continue")
    while True:
        try:
            line = input("\n> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D to quit)")
            continue
        line = printable(line).strip()
        if len(line) > LONGEST_MESSAGE:
            print(f"error: {len(line):,} characters; at most {LONGEST_MESSAGE:,}", file=sys.stderr)
        elif line.startswith("/") and isinstance(chat, Chat):
            if not command(chat, line):
                return
        elif line in ("/quit", "/exit"):
            return
        elif line:
            say(chat, line)


def open_chat(config: ChatConfig) -> Chat | Continuation:
    """Load the model. A base model continues text instead of chatting."""
    config.validate()
    path = config.model
    if path is None:
        found = find_models(Path("runs"))
        path = found[-1] if found else Path("runs")
    folder = model_folder(path)
    device = default_device()
    model, tokenizer = load_model(folder, device)
    engine = Engine(model.for_inference(), tokenizer, slots=1)
    kernel_choice(device.type)  # logs the choice now, not during the first answer
    parameters = sum(p.numel() for p in engine.model.parameters())
    print(f"[{folder}: {parameters / 1e6:.1f}M parameters on {device}]", file=sys.stderr)
    if stage(folder) == "pretrain":
        print("[base model: it continues text; `hotlap sft` fine-tunes it for chat]", file=sys.stderr)
        return Continuation(engine, config.sampling)
    return Chat(engine, config.sampling)


def main(arguments: list[str]) -> int:
    """`hotlap chat`, and `python chat.py`."""
    config = options.parse(ChatConfig, arguments, command="chat")
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    chat = open_chat(config)
    if config.prompt is not None:
        return 0 if say(chat, config.prompt) else BAD_DATA
    converse(chat)
    return 0


if __name__ == "__main__":
    debug = "--debug" in sys.argv
    flags = [argument for argument in sys.argv[1:] if argument != "--debug"]
    raise SystemExit(guarded(lambda: main(flags), debug))
