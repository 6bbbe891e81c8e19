"""Chat with a model in the terminal: python chat.py [MODEL] [-p QUESTION]; --web: in a browser; --serve."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

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

from hotlap.common.errors import BAD_DATA
from hotlap.common.log import log
from hotlap.common.terminal import lenient, printable
from hotlap.model.tools import DEFAULT_TOOLS, check_tools, described, named_tools
from hotlap.serve.config import SamplingFlags
from hotlap.serve.moderation import load_moderation
from hotlap.serve.terminal.conversation import Chat, Continuation
from hotlap.serve.terminal.printing import note
from hotlap.serve.terminal.session import Model, Session, converse


@dataclass(frozen=True)
class ChatConfig(SamplingFlags):
    """Chat with a model. With --web in a browser instead, and with --serve over HTTP: `hotlap web --help` and
    `hotlap serve --help` have those flags.
    """

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Answer this and exit."""
    tools: tuple[str, ...] = DEFAULT_TOOLS
    """What the model may call: calculator, and python, which runs its code in a sandbox."""
    moderation: str | None = None
    """Filter for questions and answers: a file of words, or package.module:function. By default none."""

    def validate(self) -> ChatConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        self.sampling(base=False)
        check_tools(self.tools)
        return self


def load(folder: Path, moderation: str | None) -> Model:
    """Load the model in a folder, and say which it is, and by what its answers are filtered."""
    from hotlap.kernels.dispatch import default_device
    from hotlap.model.engine import Engine
    from hotlap.model.weights import load_model, stage

    base = stage(folder) == "pretrain"
    device = default_device()
    model, tokenizer = load_model(folder, device)
    engine = Engine(model.for_inference(), tokenizer, slots=1)
    parameters = sum(p.numel() for p in engine.model.parameters())
    filtered = f"filter: {moderation}" if moderation else "answers are not filtered"
    note(f"{folder}: {parameters / 1e6:.1f}M parameters on {device}; {filtered}")
    if base:
        note("base model: it continues text; `hotlap sft` fine-tunes it for chat")
    return Model(folder, engine, base)


def open_session(config: ChatConfig) -> Session:
    """Load the model that the flags ask for. What is wrong with them or the question is said before."""
    config.validate()
    tools = named_tools(config.tools)
    moderate = load_moderation(config.moderation) if config.moderation else None
    with cli.importing():
        import hotlap.model.engine  # noqa: F401  torch takes seconds to import
        from hotlap.model.weights import model_folder, stage

    folder = model_folder(config.model)
    base = stage(folder) == "pretrain"
    if config.prompt is None and sys.stdin is None:
        raise ValueError("standard input is closed; ask with -p QUESTION")
    if config.prompt is not None and not config.prompt.strip() and not base:
        raise ValueError("the question of -p is empty")
    model = load(folder, config.moderation)
    if "python" in tools:
        note(f"tools: {described(config.tools)}")
    if config.prompt is None:
        model.engine.choose_kernels()  # now, so that the first answer need not wait for it
    chat = (Continuation if base else Chat)(model.engine, config.sampling(base), config.seed, moderate, tools)
    return Session(chat, folder, partial(load, moderation=config.moderation))


def main(config: ChatConfig) -> int:
    """`hotlap chat`, and `python chat.py`."""
    for stream in (sys.stdin, sys.stdout):
        lenient(stream)
    log.setLevel("WARNING")  # which kernels were chosen would stand between a question and its answer
    session = open_session(config)
    if config.prompt is not None:
        return 0 if session.show(session.chat.answer(printable(config.prompt))) else BAD_DATA
    converse(session)
    return 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("--serve", "--web")]
    command = "web" if "--web" in sys.argv[1:] else "serve" if "--serve" in sys.argv[1:] else "chat"
    raise SystemExit(cli.main([command, *words]))
