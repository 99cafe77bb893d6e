"""Serve an ASGI app from a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from servers import wait_until
from starlette.applications import Starlette

from worker.store import LOOPBACK, free_port


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The app's base address, while it is served."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host=LOOPBACK, port=port, http="h11", ws="none", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, 10, "a server that listens")
        yield f"http://{LOOPBACK}:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
