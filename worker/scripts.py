"""Run the timetable's Lua scripts, on connections that are kept for them.

    run ─▶ a free lane ─▶ EVALSHA, reply ─▶ the lane is free again
              └─ broken: connected anew, and asked once more; broken again: given up, and made anew by the next one

Most of what redis-py's client spends on a script goes to other things: its pool looks at a connection before and after
each use, with six calls to the system, it keeps statistics that nobody reads, and it encodes argument by argument. So
hiredis packs a script's call at once, which then talks to a connection itself, as kombu does. Every script answers a
repeated call as it answered the first, or refuses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha1
from importlib import resources
from queue import Empty, SimpleQueue
from typing import Any

import hiredis
import redis

#: Scripts that a process runs at once: a thousand threads that wait for their banks share these connections.
LANES = 16
#: Seconds that a script waits for one of them: as long as for a connection of the client's pool.
LANE_PATIENCE_S = 10

Lanes = SimpleQueue[redis.Connection | None]


@lru_cache
def script_text(name: str) -> str:
    """The script `name`, with what all of them share in front."""
    folder = resources.files("worker") / "lua"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("shared", name))


def lanes_of(pool: redis.ConnectionPool) -> Lanes:
    """The free ones of this process, None for one that is to be connected; at most half of what the pool may have.

    They stand on the pool, and go with it. A child begins with none: its parent's are the parent's.
    """
    name = f"lanes of process {os.getpid()}"
    lanes: Lanes | None = vars(pool).get(name)
    if lanes is None:
        made: Lanes = SimpleQueue()
        for _ in range(max(1, min(LANES, pool.max_connections // 2))):
            made.put(None)
        lanes = vars(pool).setdefault(name, made)
    return lanes


class Scripts:
    """The scripts by their names, over connections of this client's pool."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._scripts: dict[str, tuple[str, str]] = {}

    def run(self, name: str, *args: str | int) -> Any:
        """What the script returns. Raises what redis-py raises."""
        if name not in self._scripts:
            text = script_text(name)
            self._scripts[name] = text, sha1(text.encode(), usedforsecurity=False).hexdigest()
        text, sha = self._scripts[name]
        return self._run_on_lane(text, _packed("EVALSHA", sha, 0, *args))

    def _run_on_lane(self, text: str, call: bytes) -> Any:
        free = lanes_of(self._pool)
        try:
            lane = free.get(timeout=LANE_PATIENCE_S)
        except Empty:
            raise redis.ConnectionError("every connection for scripts is in use") from None
        clean = None  # until a whole reply was read: one that is still to come must not be read as the next script's
        try:
            if lane is None:
                lane = self._pool.get_connection()
            result = _ask(lane, text, call)
            clean = lane
        except redis.ResponseError:
            clean = lane
            raise
        else:
            return result
        finally:
            free.put(clean)
            if lane is not None and clean is None:
                _give_up(self._pool, lane)


def _give_up(pool: redis.ConnectionPool, lane: Any) -> None:
    """Back to the pool, which connects it anew: to another server, where a Sentinel says so."""
    lane.disconnect()
    pool.release(lane)


def _ask(lane: Any, text: str, call: bytes) -> Any:
    if lane.is_connected:
        try:
            return _evaluate(lane, text, call)
        except (redis.ConnectionError, redis.TimeoutError):
            lane.disconnect()
    lane.connect()  # with the retries of its client
    return _evaluate(lane, text, call)


def _evaluate(lane: Any, text: str, call: bytes) -> Any:
    """`call` evaluates the script `text`, by its digest."""
    try:
        return _reply(lane, call)
    except redis.exceptions.NoScriptError:  # a server that was started again, or is another one
        _reply(lane, _packed("SCRIPT", "LOAD", text))
        return _reply(lane, call)


def _reply(lane: Any, command: bytes) -> Any:
    lane.send_packed_command([command])
    return lane.read_response()


#: What it is declared to take is a tuple of one.
_pack: Callable[[tuple[str | bytes | int, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


def _packed(*command: str | int) -> bytes:
    """As it goes to the server. Text that is no UTF-8, as from somebody's argument, goes as the bytes that it was."""
    try:
        return _pack(command)
    except UnicodeEncodeError:
        return _pack(
            tuple(part.encode(errors="surrogateescape") if isinstance(part, str) else part for part in command)
        )
