"""What a server counts, in the format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from hotlap.serve.worker import Worker

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)  # buckets


class Metrics:
    """Counters of one server. They may be changed from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = {"registry": self.registry}
        self.requests = Counter("hotlap_requests", "HTTP requests by status.", ["status"], **to)
        self.refused = Counter("hotlap_queue_full", "Calls refused because the queue was full.", **to)
        self.blocked = Counter(
            "hotlap_blocked", "Requests and answers that the filter blocked.", ["direction"], **to
        )
        self.read = Counter("hotlap_prompt_tokens", "Tokens of prompts.", **to)
        self.cached = Counter("hotlap_cached_tokens", "Tokens of prompts that the cache had.", **to)
        self.written = Counter("hotlap_completion_tokens", "Tokens of answers.", **to)
        self.first = Histogram(
            "hotlap_time_to_first_token_seconds",
            "From the arrival of a call to the first token of a choice.",
            buckets=SECONDS, **to,
        )  # fmt: skip
        self.between = Histogram(
            "hotlap_time_between_tokens_seconds", "Between tokens of a choice.", buckets=SECONDS, **to
        )

    def watch(self, worker: Worker) -> None:
        """Add what a worker has at the moment."""
        values = {
            "slots": ("Choices that can be generated at once.", lambda: worker.slots),
            "running": ("Choices in a slot.", lambda: worker.choices - worker.waiting),
            "waiting": ("Choices without a slot.", lambda: worker.waiting),
        }
        for name, (text, function) in values.items():
            Gauge(f"hotlap_{name}", text, registry=self.registry).set_function(function)

    def count_prompt(self, tokens: int, cached: int) -> None:
        self.read.inc(tokens)
        self.cached.inc(cached)

    def count_tokens(self, first: bool, tokens: int, seconds: float) -> None:
        """Tokens of a choice, the first ones or later ones. seconds: since the ones before."""
        if tokens:
            self.written.inc(tokens)
            (self.first if first else self.between).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
