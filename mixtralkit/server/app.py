"""The routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mixtralkit.engine.requests import Completion
from mixtralkit.server import protocol
from mixtralkit.server.answering import ChatWriter, CompletionWriter, Writer
from mixtralkit.server.asking import Asked
from mixtralkit.server.engine_thread import Answers
from mixtralkit.server.errors import ApiError, json_response, of_validation
from mixtralkit.server.guard import Guard
from mixtralkit.server.live import live
from mixtralkit.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mixtralkit.server.service import Service
from mixtralkit.server.stream import ClientLeft, EventStream, left
from mixtralkit.version import __version__

_CREATED = int(time.time())
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": protocol.ErrorAnswer, "description": "A fault of the request: 400, 401, 404, 413, 429."},
    "5XX": {"model": protocol.ErrorAnswer, "description": "500, or 503 while the model loads or when it cannot go on."},
}
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Or a stream of chunks."}


def make_app(service: Service) -> FastAPI:
    """The application; the service is started by whoever runs it."""
    app = FastAPI(title="MixtralKit", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS)
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_starlette)
    app.add_exception_handler(Exception, lambda _, error: ApiError(500, f"the request failed: {error}").response())
    app.add_exception_handler(ClientLeft, lambda *_: Response(status_code=499))  # nobody reads it
    app.add_middleware(Guard, options=service.options)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/", response_class=HTMLResponse, tags=["page"])
    async def page() -> HTMLResponse:
        """A page with a chat, and what the experts do."""
        return HTMLResponse(resources.files("mixtralkit.server").joinpath("page.html").read_text(encoding="utf-8"))

    @app.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while requests are taken, 503 otherwise."""
        service.check_ready()
        return json_response({"status": "ok"})

    @app.get("/metrics", tags=["state"], responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/live", tags=["page"], response_model=dict[str, Any])
    async def live_state() -> Response:
        """What the page shows, as JSON."""
        return json_response(live(service))

    @app.get("/v1/models", response_model=protocol.ModelList, tags=["OpenAI"])
    async def models() -> Response:
        """The one that is served."""
        return json_response({"object": "list", "data": [_card(service)]})

    @app.get("/v1/models/{model:path}", response_model=protocol.ModelCard, tags=["OpenAI"])
    async def model(model: str) -> Response:
        """The one that is served, by name."""
        service.check_model(model)
        return json_response(_card(service))

    @app.post("/v1/completions", response_model=protocol.Completion, responses={200: _STREAM}, tags=["OpenAI"])
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Goes on from prompts."""
        asked = await _asked(service, body, "completion")
        return await _answer(service, request, CompletionWriter(body, asked, service.name, service.tokenizer))

    @app.post("/v1/chat/completions", response_model=protocol.ChatCompletion, responses={200: _STREAM}, tags=["OpenAI"])
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers a dialog."""
        asked = await _asked(service, body, "chat")
        return await _answer(service, request, ChatWriter(body, asked, service.name, service.tokenizer))

    @app.post("/tokenize", response_model=protocol.TokenizeAnswer, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of messages."""
        service.check_ready()
        service.check_model(body.model)
        return json_response(await service.off_loop(_tokenized, service, body))

    @app.post("/detokenize", response_model=protocol.DetokenizeAnswer, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_ready()
        service.check_model(body.model)
        return json_response({"prompt": await service.off_loop(service.tokenizer.decode, body.tokens)})

    @app.get("/tokenizer_info", response_model=protocol.TokenizerInfo, tags=["tokens"])
    async def tokenizer_info() -> Response:
        """What lm-evaluation-harness asks of a remote tokenizer."""
        service.check_ready()
        words = service.tokenizer
        names = {"bos_token": words.piece(words.bos_id), "eos_token": words.piece(words.eos_id)}
        return json_response({**names, "chat_template": words.chat_template})


async def _asked(service: Service, body: CompletionRequest | ChatRequest, kind: str) -> Asked:
    service.check_ready()
    service.check_model(body.model)
    return await service.off_loop(getattr(service.asking, kind), body)


async def _answer(service: Service, request: Request, writer: Writer) -> Response:
    """Whole, or a stream, whose head waits for the first event, so that a refusal still has a status of its own."""
    answers = service.submit(writer.asked)
    if writer.body.stream:
        events = _chunks(service, answers, writer)
        first = await left(request, anext(events), lambda: _abort(service, answers))
        return EventStream(first, events, lambda: _abort(service, answers))
    done = await left(request, _collected(service, answers, writer), lambda: _abort(service, answers))
    return json_response(writer.whole(done))


async def _collected(service: Service, answers: Answers, writer: Writer) -> list[Completion]:
    done: dict[int, Completion] = {}
    async for index, event in _timed(service, answers):
        writer.note(index, event)
        if event.completion is not None:
            done[index] = event.completion
    return [done[index] for index in range(len(answers.requests))]


async def _chunks(service: Service, answers: Answers, writer: Writer) -> AsyncIterator[dict[str, Any]]:
    begun = False
    async for index, event in _timed(service, answers):
        writer.note(index, event)
        if not begun:
            for choice in writer.begin():
                yield writer.chunk(choice)
            begun = True
        for choice in writer.choices(index, event):
            yield writer.chunk(choice)
    if writer.tells_usage:
        yield writer.last_chunk()


async def _timed(service: Service, answers: Answers) -> AsyncIterator[tuple[int, Any]]:
    """The events one by one, with what they say of time told to the metrics."""
    metrics, first_s, last_s = service.metrics, {}, {}
    async for events in answers:
        for index, event, at_s in events:
            since = at_s - answers.started_s
            if index not in first_s:
                first_s[index] = since
                metrics.first_token.observe(since)
            else:
                metrics.between_tokens.observe(at_s - last_s[index])
            last_s[index] = at_s
            if event.completion is not None:
                metrics.ended(event.completion, len(answers.requests[index].prompt), first_s[index], since)
            yield index, event


def _abort(service: Service, answers: Answers) -> None:
    count = len(answers.open_ids)
    service.metrics.aborted.inc(count)
    service.thread.abort(answers)


def _tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    asking = service.asking
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, and not both", "prompt")
    if body.prompt is not None:
        ids = asking.text(body.prompt, body.add_special_tokens)
    else:
        ids = asking.dialog(body.messages, body.tools)
    names = [service.tokenizer.piece(id) for id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": asking.max_seq_len, "tokens": list(ids), "token_strs": names}


def _card(service: Service) -> dict[str, Any]:
    length = 0 if service.asking is None else service.asking.max_seq_len
    more = {"object": "model", "created": _CREATED, "owned_by": "mixtralkit", "max_model_len": length}
    return {"id": service.name, **more}


def _of_validation(request: Request, error: RequestValidationError) -> Response:
    return of_validation(error.errors(), request.headers.get("content-type", "")).response()


def _of_starlette(_: Request, error: HTTPException) -> Response:
    said = {404: "there is no such path", 405: "the path does not take this method"}
    status = 400 if error.status_code == 422 else error.status_code
    return ApiError(status, said.get(status, str(error.detail))).response(error.headers)
