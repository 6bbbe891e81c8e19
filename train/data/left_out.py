"""Conversations or pairs that cannot be used: counted by reason, so that none is lost without a word."""

from __future__ import annotations

from collections import Counter


class LeftOut:
    """kind: what they are, in the plural."""

    def __init__(self, kind: str):
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def reasons(self, kept: int) -> list[str]:
        """A sentence for each reason, with the first place. kept: how many others there are."""
        total = kept + self.counts.total()
        return [
            f"{count:,} of {total:,} {self.kind} {reason} ({self.first[reason]})"
            for reason, count in self.counts.items()
        ]
