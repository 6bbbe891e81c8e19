"""Stands in for the sandbox: a function says the outcome of code."""

from __future__ import annotations

from collections.abc import Callable

import hotlap.model.sandbox
from hotlap.model.sandbox import Outcome


class FakeSandbox:
    """outcome: of some code; None: no sandbox works here."""

    tier = "fake"

    def __init__(self, outcome: Callable[[str], Outcome] | None):
        self.outcome = outcome

    def run(self, code: str, seconds: float = 5.0, stdin: str = "", cancelled=None) -> Outcome:
        return self.outcome(code)

    def require(self, what: str) -> FakeSandbox:
        if self.outcome is None:
            raise ValueError(f"{what} runs code that the model writes, and needs a sandbox; none works here")
        return self

    def install(self, patch) -> None:
        """Let this be the sandbox of this machine."""
        patch.setattr(hotlap.model.sandbox, "require_sandbox", self.require)
        patch.setattr(hotlap.model.sandbox, "find_sandbox", lambda: self if self.outcome else None)
