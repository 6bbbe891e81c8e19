"""A model of ours as lm-eval asks models: how likely texts are, and what it writes."""

from __future__ import annotations

import json

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hotlap.common.gpu import widest
from hotlap.common.log import log
from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.tools import TOOLS
from hotlap.train.distributed.world import World
from hotlap.train.evaluation.batching import by_length, progress, shared
from hotlap.train.evaluation.core import Row, read_on, shared_length

GENERATION = {
    "do_sample",
    "until",
    "max_gen_toks",
    "temperature",
    "top_p",
    "top_k",
}  # of a task


class HotlapLM(LM):
    """Every rank gets all requests, answers its share of them, and returns all answers.

    Text begins with <|bos|>, as documents do in training. chat: contexts are conversations. lm-eval then
    holds their messages as JSON, and the special tokens between them are put in here: as text, a question
    could contain them. What does not fit in the context loses its beginning, and the log says how often.
    """

    def __init__(self, engine: Engine, world: World, chat: bool = False):
        super().__init__()
        self.engine, self.shared_world, self.chat = engine, world, chat
        self.tokenizer, self.context = engine.tokenizer, engine.model.config.context

    @property
    def tokenizer_name(self) -> str:
        """What identifies the template and the tokenizer in lm-eval's caches."""
        return f"hotlap {self.tokenizer.sha256}"

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ValueError("a task begins the assistant's answer (gen_prefix); run it without --chat")
        return json.dumps(chat_history)

    def prompt(self, context: str) -> list[int]:
        """The tokens of a context."""
        if self.chat:
            return render_prompt(json.loads(context), self.tokenizer)
        return [self.tokenizer.bos, *self.tokenizer.encode(context)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation of a context: its log-likelihood in nats, and whether it is the greedy one."""
        rows = [self.pair(*request.args) for request in requests]
        self.say_cropped(sum(len(row.ids) > self.context for row in rows))
        return self.read([self.cropped(row) for row in rows])

    def pair(self, context: str, continuation: str) -> Row:
        """A context and what is scored after it. Spaces between the two belong to the continuation, and so
        does a token across the boundary.
        """
        if self.chat:
            before = self.prompt(context)
            return Row(before + self.tokenizer.encode(continuation), len(before))
        bare = context.rstrip()
        before, whole = self.prompt(bare), self.prompt(context + continuation)
        return Row(whole, shared_length([before, whole]))

    def cropped(self, row: Row) -> Row:
        extra = max(0, len(row.ids) - self.context)
        if extra and row.start <= extra:
            raise ValueError(
                f"a task scores a text of {len(row.ids) - row.start} tokens, which does not fit in the "
                f"model's context of {self.context}"
            )
        return Row(row.ids[extra:], row.start - extra)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each text in nats, in windows of the model's context."""
        rows, texts = [], []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.tokenizer.bos, self.context - 1, 1):
                before, scored = make_disjoint_window(window)
                rows.append(Row(before + scored, len(before)))
                texts.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(texts, self.read(rows), strict=True):
            totals[i] += nats
        return totals

    def read(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """The log-likelihood of the scored tokens of each row, and whether all are the likeliest."""
        return shared(self.shared_world, rows, self.read_share)

    def read_share(self, rows: list[Row]) -> list[tuple[float, bool]]:
        found: list = [None] * len(rows)
        with progress(self.shared_world, "reading", len(rows), "text") as bar:
            for batch in by_length(range(len(rows)), lambda i: len(rows[i].ids)):
                scored = read_on(self.engine.model, [rows[i] for i in batch], self.tokenizer)
                for i, losses, likeliest in zip(batch, *scored, strict=True):
                    found[i] = -losses.to(widest(losses.device)).sum().item(), bool(likeliest.all())
                bar.update(len(batch))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to a stop string, which is not part of it."""
        asked = [
            (self.prompt(context), sampling_of(settings, i))
            for i, (context, settings) in enumerate(request.args for request in requests)
        ]
        room = [self.context - min(sampling.max_tokens, self.context // 2) for _, sampling in asked]
        self.say_cropped(sum(len(prompt) > most for (prompt, _), most in zip(asked, room, strict=True)))
        asked = [(prompt[-most:], sampling) for (prompt, sampling), most in zip(asked, room, strict=True)]
        return shared(self.shared_world, asked, self.write_share)

    def write_share(self, asked: list[tuple[list[int], Sampling]]) -> list[str]:
        engine, tools = self.engine, TOOLS if self.chat else {}
        added = [engine.add(prompt, sampling, tools) for prompt, sampling in asked]
        with progress(self.shared_world, "writing", len(added), "answer") as bar:
            while engine.busy:
                engine.step()
                bar.update(sum(request.finish_reason is not None for request in added) - bar.n)
        return [request.text for request in added]

    def say_cropped(self, count: int) -> None:
        if count:
            log.warning(
                "warning: %d texts do not fit in the model's context of %d tokens, and lose their beginning",
                count, self.context,
            )  # fmt: skip


def sampling_of(settings: dict, seed: int) -> Sampling:
    """How a task's generation_kwargs sample. ValueError for one that is unknown."""
    found = normalize_gen_kwargs(settings)
    if unknown := found.keys() - GENERATION:
        known = ", ".join(sorted(GENERATION))
        raise ValueError(f"a task sets {', '.join(sorted(unknown))} for generation; known: {known}")
    return Sampling(
        temperature=found.get("temperature", 0) if found["do_sample"] else 0,
        top_k=found.get("top_k", 0), top_p=found.get("top_p", 1.0),
        max_tokens=found["max_gen_toks"], seed=seed, stop=tuple(found["until"]),
    ).validate()  # fmt: skip
