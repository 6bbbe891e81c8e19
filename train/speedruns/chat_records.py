"""What nanochat's models scored after each stage, as published, with sources.

Names of tasks are those of `hotlap eval`. `spelling` is nanochat's SpellingBee, whose questions are others
than ours. ChatCORE is the mean over five tasks, or over six where SpellingBee is one: these are two scores.
"""

from __future__ import annotations

from dataclasses import dataclass

NANOCHAT = "karpathy/nanochat"
README = f"{NANOCHAT} README.md at 3a5e0bc"
NEKOCHU = "the model card of Nekochu/nanochat-d24"
TASKS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling")
FIVE, SIX = "chatcore", "chatcore with spelling"


@dataclass(frozen=True)
class ChatRecord:
    """A stage of another project's model."""

    model: str
    date: str
    """Month and year; empty if it is not known."""
    stage: str
    """base, midtraining, SFT or RL."""
    scores: dict[str, float]
    source: str
    own: bool = True
    """By the makers of a fork or model, and checked by nobody else. False: by nanochat's maintainer."""
    approximate: bool = False

    @property
    def name(self) -> str:
        marks = " [own]" * self.own + " (approximate)" * self.approximate
        return ", ".join(filter(None, (self.model, self.date, self.stage))) + marks


def of(*values: float | None) -> dict[str, float]:
    """The scores of TASKS, in their order; None is one that was not published."""
    return {task: value for task, value in zip(TASKS, values, strict=False) if value is not None}


def d20(stage: str, scores: dict[str, float]) -> ChatRecord:
    """A stage of nanochat's first speedrun, the one for $100."""
    return ChatRecord("d20", "Oct 2025", stage, scores, README, own=False)


def pull(number: int, model: str, date: str, stage: str, scores: dict[str, float]) -> ChatRecord:
    return ChatRecord(model, date, stage, scores, f"{NANOCHAT} pull request #{number}")


def card(
    model: str, date: str, stage: str, scores: dict[str, float], approximate: bool = False
) -> ChatRecord:
    # Its ChatCORE has five tasks, of which SpellingBee is one and HumanEval is none: neither FIVE nor SIX.
    return ChatRecord(model, date, stage, scores, NEKOCHU, approximate=approximate)


CHAT_RECORDS = (
    d20("base", {"core": 0.2219}),
    d20("midtraining", of(0.3561, 0.2875, 0.3111, 0.0250, 0.0671) | {FIVE: 0.0730}),
    d20("SFT", of(0.3876, 0.2807, 0.3151, 0.0455, 0.0854) | {FIVE: 0.0884}),
    d20("RL", {"gsm8k": 0.0758}),
    pull(190, "d20, fork", "", "base", {"core": 0.202}),
    pull(190, "d20, fork", "", "SFT", of(0.423, 0.311, 0.323, 0.055, 0.067) | {FIVE: 0.107}),
    pull(190, "d20, fork", "", "RL", {"gsm8k": 0.075}),
    pull(237, "d20 class, fork", "", "base", {"core": 0.186}),
    pull(237, "d20 class, fork", "", "SFT", of(0.393, 0.306, 0.311, 0.054, 0.073) | {FIVE: 0.095}),
    pull(237, "d20 class, fork", "", "RL", {"gsm8k": 0.090}),
    pull(350, "d20", "Nov 2025", "SFT", of(0.399, 0.283, 0.317, 0.042, 0.037, 0.977) | {SIX: 0.231}),
    pull(490, "d20, plain", "", "SFT", of(0.327, 0.284, 0.293, 0.005, 0.073, 0.961) | {SIX: 0.208}),
    pull(490, "d20, for safety", "", "SFT", of(0.328, 0.306, 0.302, 0.013, 0.079, 0.977) | {SIX: 0.219}),
    pull(492, "d24", "Feb 2026", "base", {"core": 0.263}),
    pull(492, "d24", "Feb 2026", "SFT", of(0.490, 0.385, 0.348, 0.047, 0.146, 0.988) | {SIX: 0.302}),
    card("d24, one RTX 5090", "Mar 2026", "base", {"bpb": 0.830}),
    card("d24, one RTX 5090", "Mar 2026", "SFT", of(0.526, 0.425, 0.353, 0.102, None, 0.797)),
    card("d24, one RTX 5090", "Mar 2026", "RL", of(0.529, 0.419, 0.356, 0.165, None, 0.871)),
    card("d30, community", "", "base", {"bpb": 0.705}, approximate=True),
    card("d30, community", "", "SFT", of(0.70, None, 0.40, 0.20), approximate=True),
)
