"""The Celery app: how it comes back to a server that was away."""

from __future__ import annotations

from typing import Any

import pytest
from kombu import Connection

from worker.celery import app


def test_a_worker_looks_for_its_server_every_second_however_long_it_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Connection, "_ensure_connection", lambda _, *args, **kwargs: asked.append(kwargs))  # noqa: ARG005
    app.amqp.Connection("redis://127.0.0.1:1/0").ensure_connection(None, None, callback=None)
    assert (asked[0]["interval_start"], asked[0]["interval_step"]) == (1, 0)
