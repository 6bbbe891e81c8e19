"""What configures the server. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass

from hotlap.common.checks import at_least


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for. More is refused before it costs anything."""

    body: int = 1 << 20
    """Bytes of a request's body."""
    characters: int = 1 << 18
    """Characters of a prompt, or of a conversation's messages together; counted before they are tokenized."""
    prompts: int = 128
    """Prompts of one request to /v1/completions."""
    choices: int = 128
    """Answers of one request: its prompts times `n`."""
    stops: int = 16
    """Stop strings."""
    stop_characters: int = 256
    """Characters of a stop string."""
    biases: int = 1024
    """Entries of `logit_bias`."""
    top_logprobs: int = 20
    """Alternatives listed with each token."""
    tools: int = 128
    """Entries of `tools`, which may be sent with `tool_choice` none."""

    def validate(self) -> Limits:
        at_least(self, 1, "body", "characters", "prompts", "choices", "stops", "stop_characters")
        at_least(self, 0, "biases", "top_logprobs", "tools")
        return self
