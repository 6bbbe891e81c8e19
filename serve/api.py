"""The HTTP API: OpenAI's routes, and what lm-eval and supervisors ask for.

Handlers run on the event loop and never block it. What takes time, such as tokenizing, runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from hotlap.common.log import log
from hotlap.serve.body import read_json
from hotlap.serve.errors import APIError, refused
from hotlap.serve.metrics import Metrics
from hotlap.serve.moderation import Blocked, Moderation, require_allowed
from hotlap.serve.protocol import Call, Served, chat_call, completion_call, texts_of
from hotlap.serve.responses import DONE, Reply, sse
from hotlap.serve.screen import Screen
from hotlap.serve.security import Gate, error_response, failure
from hotlap.serve.tokenizing import detokenized, tokenized, tokenizer_info
from hotlap.serve.worker import Ticket, Worker

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

QUIET = 10.0  # seconds of silence in a stream, after which a comment tells clients and proxies that it lives
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is nginx's

router = APIRouter()


@dataclass(frozen=True)
class Service:
    """What the routes work with."""

    worker: Worker
    served: Served
    metrics: Metrics
    moderate: Moderation | None


def create_app(
    worker: Worker,
    served: Served,
    metrics: Metrics,
    key: str | None = None,
    moderate: Moderation | None = None,
) -> FastAPI:
    """The application. key: the API key, or None for requests to this machine by its own names. moderate: the
    filter, or None.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = Service(worker, served, metrics, moderate)
    app.include_router(router)
    app.add_exception_handler(APIError, refusal)
    app.add_exception_handler(HTTPException, unknown_route)
    app.add_middleware(Gate, key=key, metrics=metrics)
    return app


async def refusal(request: Request, error: APIError) -> Response:
    return error_response(error)


async def unknown_route(request: Request, error: HTTPException) -> Response:
    """A path or method that there is not."""
    what = f"{request.method} does not work on" if error.status_code == 405 else "there is nothing at"
    return error_response(
        APIError(error.status_code, f"{what} {request.url.path[:200]}", headers=error.headers)
    )


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    return await answer(request, chat_call)


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    return await answer(request, completion_call)


async def answer(request: Request, check: Callable[[object, Served], Call]) -> Response:
    """Check a call, and answer it whole or as a stream."""
    service: Service = request.app.state.service
    worker, served = service.worker, service.served
    body = await read_json(request, served.limits.body)
    worker.require_room()  # before time is spent on the prompt
    call = await to_thread.run_sync(check, body, served)
    await check_input(call, service)
    ticket = worker.submit(call)
    reply = Reply(call, served.tokenizer)
    screen = Screen(ticket, served.tokenizer, service.moderate, service.metrics)
    if call.stream:
        return EventStream(ticket, reply, screen)
    async with heard(request.receive, ticket):
        while pieces := await ticket.take():
            for piece in await screen.checked(pieces):
                reply.add(piece)
    return JSONResponse(reply.whole(ticket.usage))


async def check_input(call: Call, service: Service) -> None:
    """Refuse a call with a message or a prompt that the filter does not allow."""
    if service.moderate is None:
        return
    tokenizer = service.served.tokenizer
    texts = [text for prompt in call.prompts for text in texts_of(prompt, tokenizer)]
    try:
        await to_thread.run_sync(require_allowed, texts, service.moderate)
    except Blocked as blocked:
        service.metrics.blocked.labels("input").inc()
        log.info("the filter blocked a request: %s", blocked.reason)
        field = "messages" if call.chat else "prompt"
        raise refused("the filter of this server does not allow this text", field, "content_filter") from None


@contextlib.asynccontextmanager
async def heard(receive: Receive, ticket: Ticket) -> AsyncIterator[None]:
    """Cancel the ticket when the client closes the connection, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        ticket.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, reply: Reply, screen: Screen):
        super().__init__(events(ticket, reply, screen), headers=STREAM_HEADERS)
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with heard(receive, self.ticket):
            await self.stream_response(send)


async def events(ticket: Ticket, reply: Reply, screen: Screen) -> AsyncIterator[str]:
    """The events of a stream. An error ends it, as its last event."""
    try:
        while True:
            try:
                with anyio.fail_after(QUIET):
                    pieces = await ticket.take()
            except TimeoutError:
                yield ": still working\n\n"
                continue
            if not pieces:
                break
            pieces = await screen.checked(pieces)
            # all that is there in one write: a client that cannot keep up makes less work
            if text := "".join(sse(chunk) for piece in pieces for chunk in reply.chunks(piece)):
                yield text
        if ticket.call.include_usage:
            yield sse(reply.usage_chunk(ticket.usage))
        yield DONE
    except APIError as error:
        yield sse(error.body)
    except Exception as error:
        yield sse(failure(error).body)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model(request.app.state.service)]})


@router.get("/v1/models/{name:path}")
async def one_model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    if name not in (service.served.name, service.served.alias):
        raise APIError(404, f"there is one model here: {service.served.name!r}", "model", "model_not_found")
    return JSONResponse(model(service))


def model(service: Service) -> dict:
    """The model as OpenAI describes one, with the length of its context as vLLM calls it.

    APIError 503 once the server is about to end: a page that asks for models must not offer it any more.
    """
    service.worker.require_up()
    served = service.served
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "hotlap",
        "max_model_len": served.context,
    }


@router.get("/health")
async def health() -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether a call would be answered."""
    is_ready = request.app.state.service.worker.ready
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    return await in_thread(request, tokenized)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    return await in_thread(request, detokenized)


@router.get("/tokenizer_info")
async def info(request: Request) -> Response:
    return JSONResponse(tokenizer_info(request.app.state.service.served))


async def in_thread(request: Request, function: Callable[[Any, Served], dict]) -> Response:
    """The response that a function makes of the body."""
    served: Served = request.app.state.service.served
    body = await read_json(request, served.limits.body)
    return JSONResponse(await to_thread.run_sync(function, body, served))
