"""The task events that Flower lives on, as they leave a real worker: all of them, whenever it is stopped."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import redis
from machine import OK, Account, Machine


def test_a_poll_that_ends_in_the_grace_period_is_shown_as_ended(tmp_path: Path) -> None:
    with Machine(tmp_path, [Account("short", (f"{OK}@2s",))]) as machine, machine.store.pubsub() as heard:
        heard.psubscribe("/*celeryev/*")
        worker = machine.worker()
        machine.beat()
        machine.kick("short")
        machine.requests("short", 1, ended=False)
        worker.stop()
        machine.until_entries("short", 1)
        assert states(heard) == ["task-received", "task-started", "task-succeeded"]


def states(heard: redis.client.PubSub) -> list[str]:
    """The types of all task events until now, in order."""
    events: list[dict[str, Any]] = []
    while (message := heard.get_message(timeout=0.1)) is not None:
        if message["type"] == "pmessage":
            body = json.loads(b64decode(json.loads(message["data"])["body"]))
            events += body if isinstance(body, list) else [body]
    return [event["type"] for event in events if event["type"].startswith("task-")]
