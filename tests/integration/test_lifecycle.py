"""A worker's presence while the server is away: it is believed to be there again at once, not at its next round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import ValkeyServer, wait_until
from structlog.testing import capture_logs
from world import STREAM

from worker import lifecycle
from worker.lifecycle import Presence
from worker.timetable import Timetable, connect


def test_a_worker_is_present_as_soon_as_the_server_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "PRESENT_EVERY_S", 3600)
    server = ValkeyServer(tmp_path)
    timetable = Timetable(connect(server.url), stream=STREAM)
    presence = Presence(SimpleNamespace(timetable=timetable), "host:1", 16)  # type: ignore[arg-type]
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
