"""Take callbacks in: store the answer, see it on disk, and only then say 2xx. It settles nothing and knows no secret.

    POST /callbacks/<token> ─▶ size, type, time ─▶ batch ─▶ receive … receive, WAITAOF ─▶ 200
                                                                                 └─▶ 503, Retry-After

Any number of webhooks may stand behind one address: all they share is Redis. Khipu's push works only against an
endpoint without authentication, so the URL itself is the secret: a token of 256 bits, of which Redis has the digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import uvicorn
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from worker import logs
from worker.celery import Wiring, exiting_on_mistakes, until_there, wiring
from worker.errors import StoreUnavailable
from worker.health import WEBHOOK_IS_WELL
from worker.processes import check_ports
from worker.timetable import Received, Timetable

log = structlog.get_logger()

#: A callback's body: an envelope has a few hundred bytes.
BODY_LIMIT = 1024 * 1024
#: A notification's body.
NOTIFICATION_LIMIT = 4096
#: From the connection to the end of the head.
HEAD_DEADLINE_S = 10.0
#: From the end of the head to the end of the body; an honest sender needs a fraction of a second.
BODY_DEADLINE_S = 10.0
#: Callbacks that wait for one confirmation together; beyond that a sender is asked to come again.
BATCH = 200
WAITING_LIMIT = 2_000
#: What a sender is told when an answer could not be confirmed.
RETRY_AFTER_S = 5
#: A token as `secrets.token_urlsafe(32)` makes it; anything else is nobody's.
TOKEN_LENGTH = 43


@dataclass(frozen=True, slots=True)
class Callback:
    """One body, and the future that tells its sender what became of it."""

    digest: str
    body: bytes
    content_type: str
    done: asyncio.Future[Received]


class Intake:
    """Stores callbacks in batches: one `WAITAOF` confirms all that were sent before it.

    With `appendfsync everysec` a confirmation takes up to a second; what arrives meanwhile shares the next one.
    """

    def __init__(self, timetable: Timetable, *, is_durable: bool) -> None:
        self._timetable = timetable
        self._is_durable = is_durable
        self._waiting: asyncio.Queue[Callback] = asyncio.Queue(WAITING_LIMIT)

    async def store(self, digest: str, body: bytes, content_type: str) -> Received:
        """Stores one callback and returns when it is safe. Raises `StoreUnavailable` when it may not be."""
        callback = Callback(digest, body, content_type, asyncio.get_running_loop().create_future())
        try:
            self._waiting.put_nowait(callback)
        except asyncio.QueueFull:
            raise StoreUnavailable("too many callbacks wait for their confirmation") from None
        return await callback.done

    async def run(self) -> None:
        """Goes on for ever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._store_batch(batch)

    async def _store_batch(self, batch: list[Callback]) -> None:
        bodies = [(callback.digest, callback.body, callback.content_type) for callback in batch]
        try:
            results = await run_in_threadpool(self._timetable.receive, bodies, is_durable=self._is_durable)
        except Exception as error:  # noqa: BLE001 - every sender is told of it, and the next batch may do better
            for callback in batch:
                if not callback.done.cancelled():
                    callback.done.set_exception(error)
            return
        for callback, result in zip(batch, results, strict=True):
            if not callback.done.cancelled():
                callback.done.set_result(result)


class Notification(BaseModel):
    """Which parked accounts a notification is about; what is given adds up."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    institution: str = ""
    login: str = ""
    alias: str = ""

    @model_validator(mode="after")
    def _names_something(self) -> Notification:
        if not (self.institution or self.login or self.alias):
            raise ValueError("name an institution, a login or an alias")
        return self


# ----------------------------------------------------------------------------------------------------------- endpoints


async def callback(request: Request) -> Response:
    """POST /callbacks/<token>"""
    timetable: Timetable = request.app.state.timetable
    token = request.path_params["token"]
    digest = digest_of(token)
    if len(token) != TOKEN_LENGTH:
        return refusal(404, "no such callback")
    if not await run_in_threadpool(timetable.knows_callback, digest):
        await run_in_threadpool(timetable.count, "callback unknown")
        return refusal(404, "no such callback")
    content_type = check_type(request)
    body = await read_body(request, BODY_LIMIT)
    parse_object(body)
    received = await request.app.state.intake.store(digest, body, content_type)
    log.info("callback", result=received.result, task=received.task_id)
    match received.result:
        case "unknown":
            return refusal(404, "no such callback")
        case "full":
            return refusal(409, "too many different bodies for one callback")
        case _:
            return JSONResponse({"result": received.result})


async def notification(request: Request) -> Response:
    """POST /notifications"""
    check_bearer(request)
    check_type(request)
    try:
        wanted = Notification.model_validate(parse_object(await read_body(request, NOTIFICATION_LIMIT)))
    except ValidationError as error:
        return refusal(422, "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()))
    timetable: Timetable = request.app.state.timetable
    aliases = [wanted.alias] if wanted.alias else []
    released = await run_in_threadpool(
        timetable.release, aliases, institution=wanted.institution, login=wanted.login, actor="notification"
    )
    log.info(
        "notification",
        released=len(released),
        institution=wanted.institution,
        login=wanted.login,
        alias=wanted.alias,
    )
    return JSONResponse({"released": len(released), "accounts": released})


async def healthz(_request: Request) -> Response:
    """GET /healthz: this process is alive, whatever became of Redis."""
    return JSONResponse(WEBHOOK_IS_WELL)


async def readyz(request: Request) -> Response:
    """GET /readyz: it can store a callback; 503 while Redis is away."""
    timetable: Timetable = request.app.state.timetable
    await run_in_threadpool(timetable.now_ms)
    return JSONResponse({"status": "ok"})


# ------------------------------------------------------------------------------------------------ what a stranger sends


def digest_of(token: str) -> str:
    """What Redis knows of a callback's token."""
    return hashlib.sha256(token.encode()).hexdigest()


def check_type(request: Request) -> str:
    """The content type, if it may be JSON and is not compressed; raises the right 4xx otherwise."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "a compressed body is not read")
    content_type = request.headers.get("content-type", "application/json")
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(415, "the body must be application/json")
    return content_type


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, within the limit and the deadline."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise HTTPException(413, f"at most {limit} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(413, f"at most {limit} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body took too long") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended early") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; what it says is judged when it is settled."""
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return value


def check_bearer(request: Request) -> None:
    """The notifications' own token; without one configured, nobody may notify."""
    expected: str | None = request.app.state.notification_token
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = expected is not None and secrets.compare_digest(given.encode(), expected.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


def refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


# ------------------------------------------------------------------------------------------------------------ the app


async def on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else
    return refusal(error.status_code, error.detail, dict(error.headers or {}))


async def on_store_unavailable(_request: Request, error: Exception) -> Response:
    log.error("not confirmed", reason=str(error))
    return refusal(503, "not stored; come again", {"Retry-After": str(RETRY_AFTER_S)})


def make_app(wiring: Wiring) -> Starlette:
    """The ASGI app. An append-only file, where the server keeps one, confirms every answer."""
    intake = Intake(wiring.timetable, is_durable=wiring.is_durable)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(intake.run())
        yield
        task.cancel()

    app = Starlette(
        routes=[
            Route("/callbacks/{token}", callback, methods=["POST"]),
            Route("/notifications", notification, methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
        ],
        exception_handlers={HTTPException: on_http_error, StoreUnavailable: on_store_unavailable},
        lifespan=lifespan,
    )
    token = wiring.settings.notification_token
    app.state.timetable = wiring.timetable
    app.state.intake = intake
    app.state.notification_token = None if token is None else token.get_secret_value()
    return app


# ----------------------------------------------------------------------------------------------------------- the server


class Protocol(H11Protocol):
    """uvicorn's HTTP protocol with a deadline for the head, which it has not itself; one request a connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self._close_headless)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _close_headless(self) -> None:
        if getattr(self, "cycle", None) is None:
            self.transport.abort()


def main() -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was begun."""
    logs.configure()
    with exiting_on_mistakes():
        parts = until_there(wiring)
        settings = parts.settings
        check_ports(settings.host, {"BALANCES_WEBHOOK_PORT": settings.webhook_port})
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn stops at these and then raises them again, for whoever was there before: for us they are over by then.
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        make_app(parts),
        host=settings.host,
        port=settings.webhook_port,
        http=Protocol,
        ws="none",
        access_log=False,  # a path holds a token
        log_config=None,
        server_header=False,
        headers=[("connection", "close")],
        timeout_graceful_shutdown=int(settings.grace.total_seconds()),
    )


if __name__ == "__main__":
    main()
