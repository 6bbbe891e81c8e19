"""Chats with scripted models."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.tools import ScriptedModel, script, tiny_config

from hotlap.model.config import Sampling
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import save_model
from hotlap.serve.terminal.conversation import Chat, Continuation
from hotlap.serve.terminal.session import Session


def talker(tokenizer, *answers: str, context: int = 64, max_tokens: int = 8) -> Chat:
    """A chat with a model that gives these answers, each to a conversation that it fits."""
    chat = Chat(None, Sampling(temperature=0.0, max_tokens=max_tokens))
    chat.replies = iter(answers)

    class Replying(Engine):
        def generate(self, prompt, sampling, tools):
            end = self.tokenizer.special["<|assistant_end|>"]
            self.model.scripts = [script(len(prompt), self.tokenizer.encode(next(chat.replies)))]
            self.model.fed, self.model.otherwise = [[]], end
            return super().generate(prompt, sampling, tools)

    chat.engine = Replying(ScriptedModel(tiny_config(context=context), [], 0), tokenizer, slots=1)
    return chat


def session_of(chat: Chat | Continuation) -> Session:
    """A session of a chat that has no other models."""
    return Session(chat, Path("runs/talker"), lambda folder: None)


def save_models(folder: Path, tokenizer: Tokenizer) -> None:
    """runs/talker, which converses, and runs/base, which does not."""
    for name, stage in (("base", "pretrain"), ("talker", "sft")):
        (folder / "runs" / name).mkdir(parents=True)
        save_model(folder / "runs" / name, GPT(tiny_config(context=128)).init_weights(3), tokenizer)
        (folder / "runs" / name / "state.json").write_text(json.dumps({"stage": stage}))
