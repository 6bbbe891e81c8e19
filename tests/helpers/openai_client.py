"""The `openai` client of a running server, and what its answers say."""

from __future__ import annotations

import openai

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]


def client_of(running, kind=openai.OpenAI, key: str = "not needed", **options):
    return kind(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=key, timeout=30, **options)


def text_of(completion) -> str:
    return completion.choices[0].message.content


def joined(chunks, choice: int = 0) -> str:
    """The streamed text of a choice."""
    deltas = (c for chunk in chunks for c in chunk.choices if c.index == choice)
    return "".join(c.delta.content or "" for c in deltas)
