"""Run the timetable's Lua scripts, on connections that are kept for them.

    run ─▶ a free lane ─▶ EVALSHA, reply ─▶ the lane is free again
              └─ broken: closed, and the call repeated on a new connection, as often as the client's `retry` says

Half of what redis-py's client spends on a script goes to other things: its pool looks at a connection before and after
each use, with six calls to the system, and it keeps statistics that nobody reads. So a script talks to a connection
itself, as kombu does. Every script answers a repeated call as it answered the first, or refuses it.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from hashlib import sha1
from importlib import resources
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

import redis

#: Scripts that a process runs at once: a thousand threads that wait for their banks share these connections.
LANES = 16


@lru_cache
def script_text(name: str) -> str:
    """The script `name`, with what all of them share in front."""
    folder = resources.files("worker") / "lua"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("shared", name))


Lanes = SimpleQueue[redis.Connection | None]

_lanes: WeakKeyDictionary[redis.ConnectionPool, Lanes] = WeakKeyDictionary()


def lanes_of(pool: redis.ConnectionPool) -> Lanes:
    """The free ones; None for one that has no connection yet. They end with the pool's connections."""
    lanes = _lanes.get(pool)
    if lanes is None:
        made: Lanes = SimpleQueue()
        for _ in range(LANES):
            made.put(None)
        lanes = _lanes.setdefault(pool, made)
    return lanes


class Scripts:
    """The scripts by their names, over connections of this client's pool, which must have more than `LANES`."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._free = lanes_of(self._pool)
        self._scripts: dict[str, tuple[str, str]] = {}

    def run(self, name: str, *args: str | int) -> Any:
        """What the script returns. Raises what redis-py raises."""
        if name not in self._scripts:
            text = script_text(name)
            self._scripts[name] = text, sha1(text.encode(), usedforsecurity=False).hexdigest()
        lane = self._free.get()
        try:
            if lane is None or lane.pid != os.getpid():  # after a fork it is the parent's
                lane = self._pool.get_connection()
            return _run_on(lane, *self._scripts[name], *args)
        finally:
            self._free.put(lane)


def _run_on(lane: Any, text: str, sha: str, *args: str | int) -> Any:
    try:
        return lane.retry.call_with_retry(partial(_evaluate, lane, text, sha, *args), lambda _: lane.disconnect())
    except redis.ResponseError:
        raise
    except BaseException:
        lane.disconnect()  # a reply that is still to come must not be read as the next script's
        raise


def _evaluate(lane: Any, text: str, sha: str, *args: str | int) -> Any:
    try:
        return _call(lane, "EVALSHA", sha, 0, *args)
    except redis.exceptions.NoScriptError:  # a server that was started again, or is another one
        _call(lane, "SCRIPT", "LOAD", text)
        return _call(lane, "EVALSHA", sha, 0, *args)


def _call(lane: Any, *command: str | int) -> Any:
    lane.send_command(*command)
    return lane.read_response()
