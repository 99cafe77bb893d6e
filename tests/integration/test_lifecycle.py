"""A worker's presence while the server is away: it is believed to be there again at once, not at its next round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from servers import ValkeyServer, wait_until
from structlog.testing import capture_logs
from world import STREAM

from worker import lifecycle
from worker.lifecycle import STALLED_LOOKS, Consumption, Presence
from worker.timetable import POLLS, Timetable, connect


def test_a_worker_is_present_as_soon_as_the_server_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "PRESENT_EVERY_S", 3600)
    server = ValkeyServer(tmp_path)
    timetable = Timetable(connect(server.url), stream=STREAM)
    wiring: Any = SimpleNamespace(timetable=timetable)
    presence = Presence(wiring, "host:1", 16, Consumption(timetable, [POLLS], 16))
    with capture_logs() as logs:
        presence.start()
        wait_until(lambda: logs, what="a server that is away")
        with server, server.client() as client:
            wait_until(lambda: client.zrange("workers", 0, -1) == ["host:1 16"], what="a worker that is present")
            presence.leave()
            presence.join(10)
            assert not client.exists("workers")
    told = [(entry["log_level"], entry["event"], entry.get("reason")) for entry in logs]
    assert told == [("error", "the server is away", "Redis: ConnectionError"), ("info", "the server is back", None)]
    timetable.client.close()


def test_messages_that_waited_for_the_server_are_no_sign_of_a_worker_that_stalls(store: redis.Redis) -> None:
    """Looks follow each other quickly while the server is away, and the consumer needs a second to come back."""
    store.lpush(POLLS, "a message")
    consumption = Consumption(Timetable(store, stream=STREAM), [POLLS], 16)
    assert [consumption.is_stalled() for _ in range(STALLED_LOOKS)][-1]
    consumption.start_over()
    assert not any(consumption.is_stalled() for _ in range(STALLED_LOOKS - 1))
