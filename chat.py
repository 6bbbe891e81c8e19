"""Chat with a model in the terminal: python chat.py [MODEL] [-p QUESTION]; --web: in a browser; --serve."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

try:
    import tyro

    from hotlap import cli
except ImportError as error:
    raise SystemExit(
        f"error: {error}, in {sys.executable}; use the Python that hotlap is installed in, such as "
        ".venv/bin/python, or install it: pip install -e ."
    ) from None
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None

from hotlap.common.checks import at_least
from hotlap.common.errors import BAD_DATA
from hotlap.common.files import append
from hotlap.common.terminal import lenient, printable
from hotlap.model.config import Sampling
from hotlap.model.conversation import AnswerParts, parse_answer, render_prompt
from hotlap.model.streaming import StreamDecoder

if TYPE_CHECKING:
    from hotlap.model.engine import Engine

CONVERSATION_HELP = """\
  /system TEXT       set the system message (no TEXT: remove it)
  /clear             start a new conversation
  /save FILE         append the conversation to FILE as a line of JSON"""
HELP = """\
  /temperature N     0 takes the most likely token; higher is more random
  /help              list the commands
  /quit              quit (or Ctrl-D, /exit)
  Ctrl-C stops an answer."""
OF_CONVERSATIONS = ("/system", "/clear", "/save")
COMMANDS = (*OF_CONVERSATIONS, "/temperature", "/help", "/quit", "/exit")
LONGEST_MESSAGE = 100_000  # characters
BASE_TEMPERATURE = 0.8  # at 0, base models repeat themselves


@dataclass(frozen=True)
class ChatConfig:
    """Chat with a model. With --web in a browser instead, and with --serve over HTTP: `hotlap web --help` and
    `hotlap serve --help` have those flags.
    """

    model_field: ClassVar[str] = "model"
    model: Path | None = None
    """Run, checkpoint or model directory; the newest under runs/ by default."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and exit."""
    temperature: float | None = None
    """0 takes the most likely token. By default 0, and 0.8 for base models, which repeat themselves at 0."""
    top_k: int = Sampling.top_k
    """Sample from the k most likely tokens; 0: from all."""
    max_tokens: int = Sampling.max_tokens
    """Maximum length of an answer in tokens."""
    seed: int | None = None
    """Makes a session at a temperature above 0 repeatable; by default, every answer is another draw."""

    def sampling(self, base: bool) -> Sampling:
        temperature = self.temperature
        if temperature is None:
            temperature = BASE_TEMPERATURE if base else 0.0
        if self.seed is not None and not 0 <= self.seed < 1 << 62:
            raise ValueError(f"seed={self.seed} must be from 0 to 2^62 - 1")
        at_least(self, 1, "max_tokens")
        return Sampling(temperature, self.top_k, self.max_tokens).validate()

    def validate(self) -> ChatConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        self.sampling(base=False)
        return self


def seeds(first: int | None) -> Iterator[int]:
    """A seed for each answer: first, first + 1, ..., or random ones if `first` is None."""
    return iter(lambda: secrets.randbits(62), None) if first is None else itertools.count(first)


class Chat:
    """A conversation with a chat model."""

    def __init__(self, engine: Engine, sampling: Sampling, seed: int | None = None):
        """seed: of the first answer; sampling's own is not used."""
        self.engine, self.sampling, self.seeds = engine, sampling, seeds(seed)
        self.clear()
        self.system = ""

    def clear(self) -> None:
        self.messages: list[dict] = []
        self.dropped = 0  # questions that the context has no room for

    def answer(self, question: str) -> Iterator[str]:
        """Stream the answer as text. Question and answer (as far as it came) join the conversation."""
        self.messages.append({"role": "user", "content": question})
        ids: list[int] = []
        try:
            prompt, dropped = self.fitting_prompt()
            if dropped:
                note(f"the context is full: dropped the first {dropped} questions and answers")
                self.dropped += dropped
            decoder, parts = StreamDecoder(self.engine.tokenizer), AnswerParts(self.engine.tokenizer)
            for token in self.engine.generate(prompt, replace(self.sampling, seed=next(self.seeds))):
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

    def __init__(self, engine: Engine, sampling: Sampling, seed: int | None = None):
        """seed: of the first text; sampling's own is not used."""
        self.engine, self.sampling, self.seeds = engine, sampling, seeds(seed)

    def answer(self, text: str) -> Iterator[str]:
        tokenizer, room = self.engine.tokenizer, self.engine.model.config.context * 3 // 4
        prompt = [tokenizer.bos, *tokenizer.encode(text)]
        if len(prompt) > room:
            note(f"the text takes {len(prompt)} tokens; the model continues the last {room} of them")
        decoder = StreamDecoder(tokenizer)
        for token in self.engine.generate(prompt[-room:], replace(self.sampling, seed=next(self.seeds))):
            yield decoder.push(token)
        yield decoder.finish()


def note(text: str) -> None:
    print(printable(f"[{text}]"), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    print(printable(f"error: {text}"), file=sys.stderr, flush=True)


def say(chat: Chat | Continuation, question: str) -> bool:
    """Print the answer as it comes; False if there is none. Ctrl-C stops the answer, not the program."""
    if len(question) > LONGEST_MESSAGE:
        complain(f"{len(question):,} characters; at most {LONGEST_MESSAGE:,}")
        return False
    stream, spaces, said = chat.answer(question), "", False
    try:
        for piece in stream:
            text = spaces + printable(piece)
            if text.strip():
                print(text, end="", flush=True)
                spaces, said = "", True
            else:
                spaces = text  # shown if anything follows
        print("" if said else "[no answer]", flush=True)
    except KeyboardInterrupt:
        stream.close()
        print(" [stopped]", flush=True)
        return True
    except ValueError as error:
        complain(str(error))
        return False
    return said


def command(chat: Chat | Continuation, line: str) -> bool:
    """Run a /command. False: quit."""
    name, rest = [*line.split(maxsplit=1), ""][:2]
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        print(f"{CONVERSATION_HELP}\n{HELP}" if isinstance(chat, Chat) else HELP)
    elif name == "/temperature":
        try:
            chat.sampling = replace(chat.sampling, temperature=float(rest)).validate()
            print(f"[temperature {chat.sampling.temperature}]")
        except ValueError:
            complain(f"/temperature {rest or '(nothing)'}: needs a number from 0 to 10")
    elif name not in COMMANDS:
        complain(f"unknown command {name}; /help lists them")
    elif isinstance(chat, Continuation):
        complain(f"{name} needs a conversation, and a base model continues each text on its own")
    elif name == "/clear":
        chat.clear()
        print("[new conversation]")
    elif name == "/system":
        chat.system = rest
        print(f"[system message: {rest!r}]" if rest else "[no system message]")
    elif name == "/save":
        save(chat, rest)
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
        without = f" without the first {chat.dropped} questions, which were dropped" if chat.dropped else ""
        print(f"[saved to {name}{without}]")
    except OSError as error:
        complain(f"/save: {error}")


def converse(chat: Chat | Continuation) -> None:
    """Answer lines until the end of input. The prompt is only shown on a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing, history and pasted lines, if Python has it
        print(
            "type a message, or /help"
            if isinstance(chat, Chat)
            else "type text for the model to continue, or /help"
        )
    while True:
        try:
            line = input("\n> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/quit or Ctrl-D to quit)")
            continue
        line = printable(line).strip()
        name = line.split(maxsplit=1)[0] if line else ""
        if name in COMMANDS or (name.startswith("/") and isinstance(chat, Chat)):
            if not command(chat, line):
                return
        elif line:
            say(chat, line)


def open_chat(config: ChatConfig) -> Chat | Continuation:
    """Load the model. A base model continues text instead of chatting."""
    config.sampling(base=False)  # says what is wrong with the flags before torch is imported, in seconds
    with cli.importing():
        from hotlap.kernels.dispatch import default_device
        from hotlap.model.engine import Engine
        from hotlap.model.weights import load_model, model_folder, stage

    folder = model_folder(config.model)
    base = stage(folder) == "pretrain"
    if config.prompt is None and sys.stdin is None:
        raise ValueError("standard input is closed; ask with -p QUESTION")
    if config.prompt is not None and not config.prompt.strip() and not base:
        raise ValueError("the question of -p is empty")
    device = default_device()
    model, tokenizer = load_model(folder, device)
    engine = Engine(model.for_inference(), tokenizer, slots=1)
    if config.prompt is None:
        engine.choose_kernels()  # what it logs would stand between a question and its answer
    parameters = sum(p.numel() for p in engine.model.parameters())
    note(f"{folder}: {parameters / 1e6:.1f}M parameters on {device}")
    if base:
        note("base model: it continues text; `hotlap sft` fine-tunes it for chat")
    return (Continuation if base else Chat)(engine, config.sampling(base), config.seed)


def main(config: ChatConfig) -> int:
    """`hotlap chat`, and `python chat.py`."""
    for stream in (sys.stdin, sys.stdout):
        lenient(stream)
    chat = open_chat(config)
    if config.prompt is not None:
        return 0 if say(chat, printable(config.prompt)) else BAD_DATA
    converse(chat)
    return 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("--serve", "--web")]
    command = "web" if "--web" in sys.argv[1:] else "serve" if "--serve" in sys.argv[1:] else "chat"
    raise SystemExit(cli.main([command, *words]))
