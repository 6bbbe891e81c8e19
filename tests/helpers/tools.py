"""Helpers that tests import: `from tools import tiny_config`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotlap.model.config import GPTConfig

if TYPE_CHECKING:
    from hotlap.model.tokenizer import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is 2 + 3? It is 5. What is 12 * 12? It is 144.",
    "def add(a, b):\n    return a + b\n",
    "Je préfère les gâteaux à la crème; 私は猫が好きです。",
]


def tiny_config(**fields) -> GPTConfig:
    """2 layers, 64 wide, 2 heads of 32, context 64, a table of 320 ids; every extra on."""
    shape = {"vocab_size": 320, "context": 64, "layers": 2, "width": 64, "heads": 2, "kv_heads": 2}
    return GPTConfig(**(shape | fields)).validate()


def train_tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    from hotlap.model.tokenizer import train_bpe

    return train_bpe(LINES * 20, 300)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact| in the Frobenius norm."""
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-12))


def assert_as_good(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """actual is at most twice as far from exact (float64) as the plain implementation in the same dtype."""
    # plain may be exact by luck; what a GPU computes of float32 besides sums and products is approximate
    floor = max(torch.finfo(actual.dtype).eps / 2, 2**-21 if actual.is_cuda else 0)
    error, allowed = relative_error(actual, exact), 2 * max(relative_error(plain, exact), floor)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"


class ScriptedModel(torch.nn.Module):
    """Stands in for a GPT in `Engine`: at each position of a slot it is sure of the token in its script.

    scripts: for each slot, {position: id}; where a script says nothing, `otherwise` is the likeliest.
    """

    def __init__(self, config: GPTConfig, scripts: list[dict[int, int]], otherwise: int):
        super().__init__()
        self.config, self.scripts, self.otherwise = config, scripts, otherwise
        self.compute_dtype = torch.float32
        self.embedding, self.head = torch.nn.Embedding(1, 1), torch.nn.Linear(1, 1)
        self.fed: list[list[int]] = [[] for _ in scripts]  # the tokens that each slot was given

    def forward(self, ids: Tensor, cache, only: Tensor | None = None) -> Tensor:
        slots = torch.cat([span.slots.repeat_interleave(span.tokens) for span in cache.spans]).tolist()
        logits = torch.zeros(1, ids.shape[1], self.config.vocab_size)
        tokens, positions = ids[0].tolist(), cache.positions[0].tolist()
        for i, slot in enumerate(slots):  # what follows is padding
            token, position = tokens[i], positions[i]
            self.fed[slot].append(token)
            logits[0, i, self.scripts[slot].get(position + 1, self.otherwise)] = 100
        return logits if only is None else logits[:, only]


def script(start: int, ids: list[int]) -> dict[int, int]:
    """A script that says ids from position start on."""
    return dict(enumerate(ids, start))
