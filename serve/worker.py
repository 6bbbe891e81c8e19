"""The engine's thread, and the event loop's way to it.

The loop submits a call and gets a ticket, which yields the pieces of its answers. Only the thread touches the
engine, and only the loop touches tickets: the thread asks `Ticket.wants` between steps, and writes
`Ticket.usage` before it reports the last piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hotlap.common.log import log
from hotlap.serve.errors import APIError
from hotlap.serve.metrics import Metrics
from hotlap.serve.protocol import Call
from hotlap.serve.responses import Piece, Usage

if TYPE_CHECKING:
    from hotlap.model.engine import Engine, Request, Token

RETRY_AFTER = {"Retry-After": "2"}  # seconds
STUCK = 60.0  # seconds without a step, with requests running, after which the worker is not ready
LAST_STEP = 5.0  # seconds that the thread has to end after the last request did


def too_busy(message: str) -> APIError:
    return APIError(503, message, headers=RETRY_AFTER)


class Ticket:
    """A submitted call, whose pieces are read by `take`.

    It ends with the last choice's finish_reason, or with the APIError that ended it before. Pieces wait in
    memory until they are read: they are as many as the answers have tokens.
    """

    def __init__(self, call: Call, timeout: float, leave: Callable[[Ticket], None]):
        """timeout: seconds until it ends with an error. leave: called when it ends."""
        self.call = call
        self.usage = Usage(sum(map(len, call.prompts)), 0, 0)
        self.submitted = time.monotonic()
        self.choices = len(call.prompts) * call.n
        self.ended = False
        self._error: APIError | None = None
        self._unfinished = set(range(self.choices))
        self._leave = leave
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()  # there are pieces, or it has ended
        late = APIError(504, f"the answer was not complete after {timeout:g} seconds", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(timeout, self.end, late)

    async def take(self) -> list[Piece]:
        """Wait for pieces, and return all that are there; none at the end. Raises the error that ended it."""
        await self._news.wait()
        pieces, self._pieces = self._pieces, []
        if not self.ended:
            self._news.clear()
        elif not pieces and self._error:
            raise self._error
        return pieces

    def put(self, piece: Piece) -> None:
        """Add a piece. The last one of the last choice ends the ticket."""
        if not self.ended and piece.choice in self._unfinished:
            self._pieces.append(piece)
            self._news.set()
            if piece.finish_reason:
                self.drop(piece.choice)

    def drop(self, choice: int) -> None:
        """End a choice: it stops within a step, and no more comes of it. The last one ends the ticket."""
        self._unfinished.discard(choice)
        if not self._unfinished:
            self.end()

    def wants(self, choice: int) -> bool:
        """Whether a choice that has not finished shall go on."""
        return not self.ended and choice in self._unfinished

    def end(self, error: APIError | None = None) -> None:
        """Let the reader find the end, or an error, after what is there already. What is still generated for
        the call stops within a step. No effect if the ticket has ended.
        """
        if not self.ended:
            self.ended, self._error = True, error
            self._timer.cancel()
            self._news.set()
            self._leave(self)

    def cancel(self) -> None:
        """Stop generating: nobody waits for the answer."""
        self.end(APIError(499, "the client closed the connection", code="cancelled"))


@dataclass
class Choice:
    """One answer of a call, as the engine's thread knows it."""

    ticket: Ticket
    index: int
    request: Request
    last: float
    """When its last token was there, or when the call was submitted."""
    told: int | None = None
    """Characters of its text that were reported; None before its first piece."""


class Worker:
    """Runs an engine in a thread of its own, for calls of one event loop.

    Its methods are for the loop. Calls are begun in the order in which they came; those that find no slot
    wait, up to `queue` choices.
    """

    def __init__(self, engine: Engine, queue: int, timeout: float, metrics: Metrics):
        """timeout: seconds that a call may take, with the time in the queue."""
        self.engine, self.queue, self.timeout, self.metrics = engine, queue, timeout, metrics
        self.slots = len(engine.slots)
        self.tickets: set[Ticket] = set()  # that have not ended
        self.choices = 0  # of those
        self.stopping = False
        self.progress = time.monotonic()  # when the last step ended
        self.done: Future[None] = Future()  # of the thread
        self.failed = False
        self._running: list[Choice] = []  # the thread's
        self._arrived: list[Ticket] = []  # guarded by the condition, as the next one
        self._closed = False
        self._condition = threading.Condition()

    def start(self) -> None:
        """Start the thread. Calls come from the event loop that runs now."""
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Choices without a slot."""
        return max(0, self.choices - self.slots)

    @property
    def alive(self) -> bool:
        return not self.done.done()

    @property
    def ready(self) -> bool:
        """Whether a call would be answered: the engine is idle, or made a step lately."""
        moving = not self.tickets or time.monotonic() - self.progress < STUCK
        return self.alive and not self.stopping and moving

    def require_up(self) -> None:
        """Raise APIError 503 if the server is about to end."""
        if not self.alive:
            raise too_busy("the engine has failed, and the server ends; try again when it is up")
        if self.stopping:
            raise too_busy("the server is shutting down; try again when it is up")

    def require_room(self, choices: int = 1) -> None:
        """Raise APIError 503 if a call with so many choices is not accepted now. One that is larger than the
        queue is accepted when nothing else is there.
        """
        self.require_up()
        if self.choices and self.choices + choices > self.slots + self.queue:
            self.metrics.refused.inc()
            raise too_busy(f"{self.waiting} requests are waiting, and no more may; try again later")

    def submit(self, call: Call) -> Ticket:
        """Queue a call. APIError 503 if it is not accepted now."""
        self.require_room(len(call.prompts) * call.n)
        ticket = Ticket(call, self.timeout, self._left)
        if not self.tickets:
            self.progress = time.monotonic()  # a rest is not a step that takes long
        self.tickets.add(ticket)
        self.choices += ticket.choices
        with self._condition:
            self._arrived.append(ticket)
            self._condition.notify()
        return ticket

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those that are there finish for `grace` seconds, end the others with an
        error, and end the thread.
        """
        self.stopping = True
        until = time.monotonic() + grace
        while self.tickets and self.alive and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for ticket in [*self.tickets]:
            ticket.end(too_busy("the server shut down before the answer was complete"))
        with self._condition:
            self._closed = True
            self._condition.notify()
        await asyncio.wait([asyncio.wrap_future(self.done)], timeout=LAST_STEP)

    def _left(self, ticket: Ticket) -> None:
        self.tickets.discard(ticket)
        self.choices -= ticket.choices

    def _died(self) -> None:
        for ticket in [*self.tickets]:
            ticket.end(APIError(500, "the engine failed; the server's log says why", code="engine_failed"))

    # the rest runs in the thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        except BaseException as error:
            log.critical("the engine failed, and the server ends", exc_info=error)
            self.failed = True
            self._tell(self._died)
        self.done.set_result(None)

    def _tell(self, function: Callable, *arguments: object) -> None:
        """Call a function on the loop, unless the process ends and the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def _wait(self) -> bool:
        """Wait until there is something to do, begin what has arrived, and cancel what has ended. False if
        the worker was stopped.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._arrived or self._running or self._closed)
            arrived, self._arrived = self._arrived, []
        for ticket in arrived:
            if not ticket.ended:
                self._begin(ticket)
        for choice in self._running:
            if not choice.ticket.wants(choice.index):
                self.engine.cancel(choice.request)
        self._running = [choice for choice in self._running if not choice.request.finish_reason]
        return not self._closed

    def _begin(self, ticket: Ticket) -> None:
        call, now = ticket.call, ticket.submitted
        try:
            for index in range(ticket.choices):
                sampling = replace(call.sampling, seed=call.sampling.seed + index)
                request = self.engine.add(
                    call.prompts[index // call.n], sampling, call.tools, call.logprobs, call.echo
                )
                self._running.append(Choice(ticket, index, request, now))
        except ValueError as error:
            self._tell(ticket.end, APIError(400, str(error)))

    def _step(self) -> None:
        """One step of the engine, if it has requests; what is new goes to the tickets."""
        if not self._running:
            return
        new: dict[Request, list[Token]] = defaultdict(list)
        for request, token in self.engine.step():
            new[request].append(token)
        self.progress = time.monotonic()
        changed = [
            choice for choice in self._running if choice.request in new or choice.request.finish_reason
        ]
        pieces = [(choice.ticket, self._piece(choice, new[choice.request])) for choice in changed]
        self._running = [choice for choice in self._running if not choice.request.finish_reason]
        if pieces:
            self._tell(deliver, pieces)

    def _piece(self, choice: Choice, tokens: list[Token]) -> Piece:
        """What is new of a choice."""
        call, request, metrics = choice.ticket.call, choice.request, self.metrics
        first, text = choice.told is None, request.text
        metrics.count_tokens(first, len(tokens), self.progress - choice.last)
        piece = Piece(choice.index, text[choice.told or 0 :], tokens, request.finish_reason)
        choice.told, choice.last = len(text), self.progress
        if first:
            metrics.count_prompt(len(request.prompt), request.cached)
            if choice.index % call.n == 0:
                choice.ticket.usage.cached_tokens += request.cached
            if call.echo:
                prompt = self.engine.tokenizer.decode(request.prompt)
                piece = piece._replace(text=prompt + piece.text, tokens=[*request.echoed, *tokens])
        choice.ticket.usage.completion_tokens += len(tokens)
        return piece


def deliver(pieces: list[tuple[Ticket, Piece]]) -> None:
    """Hand out the pieces of a step."""
    for ticket, piece in pieces:
        ticket.put(piece)
