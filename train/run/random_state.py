"""The random state of a process, as JSON."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict:
    """State of Python's, NumPy's and torch's generators, and of this process's GPU."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": as_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = as_hex(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict) -> None:
    """Restore what random_state returned. Skips the GPU if the state or this process has none."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(from_hex(state["cuda"]))


def as_hex(tensor: Tensor) -> str:
    return tensor.numpy().tobytes().hex()


def from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
