"""Fixtures that any test may use: a real server, and a client on an empty database."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis
from schemas import validate_stream
from servers import ValkeyServer

from worker import store as worker_store
from worker.errors import StoreUnavailable
from worker.store import server_binary


def pytest_configure() -> None:
    """Each of pytest's processes has ports of its own: nobody takes the port of a server that another one killed."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    worker_store.PORTS = worker_store.PORTS[number :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """One server for all tests that do not harm it. Without a binary: skipped on a laptop, failed in CI."""
    try:
        server_binary()
    except StoreUnavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with ValkeyServer(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def store(valkey_server: ValkeyServer) -> Iterator[redis.Redis]:
    """A client on an emptied server; loaded scripts stay. What a test published there is held against its schema."""
    with valkey_server.client() as client:
        client.flushall()
        yield client
        validate_stream(client)
