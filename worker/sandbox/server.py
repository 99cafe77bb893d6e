"""Run the sandbox as a process: listen, say where, stop at once when told to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import sys

from worker.sandbox import control, scenarios
from worker.sandbox.bank import Bank
from worker.sandbox.callbacks import Callbacks
from worker.sandbox.endpoint import Endpoint
from worker.sandbox.http import Connection, Exchange, json_response
from worker.sandbox.journal import HISTORY, Journal
from worker.sandbox.notation import parse_plan
from worker.sandbox.reading import parse_latency
from worker.sandbox.tokens import PATH as TOKEN_PATH
from worker.sandbox.tokens import Tokens

#: Connections that may wait to be taken: a whole test's worth at once.
BACKLOG = 8192
STOPS = (signal.SIGTERM, signal.SIGINT)


class PortUnavailable(Exception):
    """The sandbox cannot listen where it was told to; the message names the address and the reason."""


class Sandbox:
    """Everything behind the port: the balances call, access tokens for it, and the control API beside them."""

    def __init__(self, latency: str = "0s", history: int = HISTORY) -> None:
        default = parse_plan({"script": ["ok"]}, parse_latency(latency))
        plans = {number: parse_plan(plan) for number, plan in scenarios.plans().items()}
        journal = Journal(history)
        bank = Bank(plans, scenarios.log_ons(), default)
        callbacks = Callbacks(journal)
        self._endpoint = Endpoint(bank, journal, callbacks)
        self._tokens = Tokens(bank)
        self._control = control.Control(bank, self._endpoint, callbacks, journal, self._tokens)

    def __call__(self, exchange: Exchange) -> None:
        """Take one request."""
        path = exchange.request.path
        if path == "/healthz":
            exchange.answer(json_response({"status": "ok"}))
        elif path.startswith(f"{control.PREFIX}/"):
            self._control.handle(exchange)
        elif path == TOKEN_PATH:
            exchange.answer(self._tokens.handle(exchange.request))
        else:
            self._endpoint.handle(exchange)


def serve(
    host: str = "127.0.0.1", port: int = 8089, *, latency: str = "0s", history: int = HISTORY, quiet: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT. Port 0 takes a free one. Raises PortUnavailable, NotationError.

    Needs the main thread, and leaves both signals blocked: the process is about to end.
    Prints `sandbox listening on http://HOST:PORT` when it is ready; logs one line per request unless `quiet`.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s sandbox %(message)s")
    logging.getLogger("sandbox").setLevel(logging.WARNING if quiet else logging.INFO)
    _allow_many_connections()
    asyncio.run(_serve(host, port, Sandbox(latency, history)))


async def _serve(host: str, port: int, sandbox: Sandbox) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    _stop_on_signal(loop, stop)
    try:
        server = await loop.create_server(lambda: Connection(sandbox), host, port, backlog=BACKLOG)
    except OSError as error:
        reason = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise PortUnavailable(f"sandbox: cannot listen on {host}:{port}: {reason}") from error
    print(f"sandbox listening on http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()  # and no waiting: the end of the process closes what hangs


def _stop_on_signal(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Not asyncio's own handlers: they are gone before the process is, and Ctrl-C often comes with a SIGTERM behind it,
    which would then end a clean stop with -15."""

    def stopping(_: int, __: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # SIG_IGN would complain of a second one already on its way
        loop.call_soon_threadsafe(stop.set)

    for number in STOPS:
        signal.signal(number, stopping)


def _allow_many_connections() -> None:
    """Each waiting answer holds a descriptor: take as many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
