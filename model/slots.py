"""Which sequences the slots of a cache hold, and what a new one can take over from them."""

from __future__ import annotations

from typing import NamedTuple

from hotlap.model.decoding import Row
from hotlap.model.kv_cache import KVCache

BLOCK = 16  # tokens; prefixes are shared in whole blocks, because a few tokens are read faster than copied


class Prefix(NamedTuple):
    """The beginning of a prompt that a slot holds, or will hold."""

    slot: int
    length: int


class Slots:
    """A slot that is given back keeps its keys and values until another sequence takes it. A new sequence
    that begins with the same tokens takes that slot, or copies them if it is in use. Tokens are compared, so
    nothing else can match.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.held: list[list[int]] = [[] for _ in range(cache.slots)]
        """The tokens in each slot."""
        self.prompts: list[list[int]] = [[] for _ in range(cache.slots)]
        """What each slot in use is reading, or has read."""
        self.free = list(range(cache.slots))  # given back longest ago first

    def prefix(self, prompt: list[int]) -> Prefix | None:
        """The longest beginning of a prompt that is in a slot, or is being read into one. It leaves at least
        one token to read.
        """
        best = Prefix(0, 0)
        for slot, held in enumerate(self.held):
            sequence = max(held, self.prompts[slot], key=len)
            length = min(common(prompt, sequence), (len(prompt) - 1) // BLOCK * BLOCK)
            if length > best.length and (len(held) < length or self.cache.holds(len(held), length)):
                best = Prefix(slot, length)
        return best if best.length else None

    def is_read(self, prefix: Prefix) -> bool:
        return len(self.held[prefix.slot]) >= prefix.length

    def take(self, prompt: list[int], prefix: Prefix | None) -> int:
        """A free slot for a prompt. It holds the prefix, which must have been read."""
        slot = prefix.slot if prefix and prefix.slot in self.free else self.free[0]
        if prefix and slot != prefix.slot:
            self.cache.copy(prefix.slot, slot, prefix.length)
        self.free.remove(slot)
        self.held[slot] = prompt[: prefix.length] if prefix else []
        self.prompts[slot] = prompt
        return slot

    def hold(self, row: Row) -> None:
        """Note the token that a pass has written, or written again."""
        self.held[row.slot][row.length :] = [row.token]

    def give_back(self, slot: int) -> None:
        self.prompts[slot] = []
        self.free.append(slot)

    def spare(self) -> int:
        """A free slot to overwrite."""
        self.held[self.free[0]] = []
        return self.free[0]


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common at the start, in whole blocks."""
    most, length = min(len(one), len(other)), 0
    while length + BLOCK <= most and one[length : length + BLOCK] == other[length : length + BLOCK]:
        length += BLOCK
    return length
