"""Read the stream as one of a consumer group: every event at least once, acknowledged after its handler.

    own pending ──▶ pending of the dead ──▶ new        looked for in this order
         │ one by one, counted                │ in batches
         └───────────▶ handler ◀──────────────┘
              returned: acknowledged · raised: again after a pause · too often, or malformed: <stream>.dead

Needs a server and nothing else of this package: no settings, no Celery. Decides nothing about balances.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any, Self, cast, overload

import redis
from redis.backoff import NoBackoff
from redis.exceptions import MasterDownError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

from worker.errors import BalancesError
from worker.events import BalanceObserved, Event, MalformedEntry, read_event

#: New entries that one read asks for, and how long it waits for the first of them: `stop` takes as long at most.
BATCH = 100
BLOCK_MS = 1000
#: After a failure the reader waits `pause_s`, doubling to this.
LONGEST_PAUSE_S = 30.0
#: The same while the server is away.
AWAY_S, LONGEST_AWAY_S = 0.1, 5.0
#: What was set aside is kept as long as the stream keeps its entries by default.
DEAD_KEPT_MS = 30 * 86_400_000
#: What a reader that stops has not handled is made to look idle for this long, so that others take it at once.
GIVEN_BACK_MS = 86_400_000
#: What passes by itself, or by somebody's hand: by its class, and by its first word where redis-py leaves it there.
_PASSING = (redis.ConnectionError, redis.TimeoutError, MasterDownError, OutOfMemoryError, ReadOnlyError)
_REFUSED = ("NOGROUP", "UNBLOCKED", "MISCONF", "NOREPLICAS", "BUSY ")

Handler = Callable[[Event], object]
_log = logging.getLogger(__name__)


class TryLater(BalancesError):
    """Raised by a handler where the entry is not at fault (its database is away): tried again and not counted."""


@dataclass(frozen=True, slots=True)
class _Delivery:
    """An entry as it was delivered, for the `times`th time; without fields when the stream has forgotten it."""

    entry: str
    fields: dict[str, str]
    times: int


class BalanceReader:
    """One consumer of the group `group`; `latest` needs none.

    `server`: a URL, or a client with `decode_responses=True` that does not repeat calls by itself for long.
    `consumer`: unique in the group; a process that comes back under the same name goes on with what it had not
    finished, otherwise others take that over after `idle_s`. A handler may take as long. `start`: where a group that
    does not exist yet begins: "0" at the oldest entry, "$" after the newest, or after the entry of that id.
    `deliveries`: how often an entry is tried before it is set aside.
    """

    def __init__(
        self,
        server: str | redis.Redis,
        *,
        group: str | None = None,
        consumer: str | None = None,
        stream: str = "balances",
        start: str = "0",
        idle_s: float = 60.0,
        deliveries: int = 5,
        pause_s: float = 1.0,
    ) -> None:
        self._is_own_client = isinstance(server, str)
        self._client = _connect(server) if isinstance(server, str) else server
        if not self._client.get_encoder().decode_responses:
            raise ValueError("the client must have decode_responses=True")
        self._group = group or ""
        self._consumer = consumer or f"{socket.gethostname()}-{os.getpid()}"
        self._stream = stream
        self._start = start
        self._idle_s, self._deliveries, self._pause_s = idle_s, deliveries, pause_s
        self._is_stopping = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_member, self._has_pending = False, True
        self._claim_at = self._read_at = 0.0
        self._failures = self._refusals = 0

    # ------------------------------------------------------------------------------------------------ the newest

    @overload
    def latest(self) -> dict[str, BalanceObserved]: ...
    @overload
    def latest(self, alias: str) -> BalanceObserved | None: ...
    def latest(self, alias: str | None = None) -> BalanceObserved | dict[str, BalanceObserved] | None:
        """The newest balance of the account, None before its first; without alias that of every account.

        Raises what the client raises, at once.
        """
        if alias is not None:
            text = cast(str | None, self._client.hget("latest", alias))
            return None if text is None else BalanceObserved.model_validate_json(text)
        texts = cast(dict[str, str], self._client.hgetall("latest"))
        return {name: BalanceObserved.model_validate_json(text) for name, text in sorted(texts.items())}

    # ------------------------------------------------------------------------------------------------ coming and going

    def run(self, handler: Handler, *, follow: bool = True) -> None:
        """Hand every event to `handler` until `stop`; without `follow`, until nothing is left.

        An exception of the handler leaves the entry pending and is told by its type only; `KeyboardInterrupt` and its
        like end the run. Raises `redis.AuthenticationError` and whatever else will not pass by itself.
        """
        if not self._group:
            raise ValueError("a reader that runs is one of a group: BalanceReader(…, group=…)")
        try:
            while not self._is_stopping and (self._turn(handler, follow) or follow):
                pass
        finally:
            self._leave()

    def stop(self) -> None:
        """End `run` after the entry it is at. For a signal handler or another thread."""
        self._is_stopping = True
        self._wake.put(None)  # may interrupt a `get`, as `Event.set` may not interrupt a `wait`

    def close(self) -> None:
        """Close the connections that were made from a URL."""
        if self._is_own_client:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self.close()

    # ------------------------------------------------------------------------------------------------ one turn

    def _turn(self, handler: Handler, follow: bool) -> bool:
        """Handle what is next; False where nothing was. A server that is away is waited for."""
        try:
            deliveries = self._next(BLOCK_MS if follow else None)
            for delivery in deliveries:
                if self._is_stopping or self._is_late() or not self._deliver(delivery, handler):
                    self._has_pending = True  # so nothing overtakes the rest of the batch
                    break
        except redis.RedisError as error:
            if not _is_passing(error):
                raise
            self._await_server(error)
            return True
        self._refusals = 0
        return bool(deliveries)

    def _next(self, block_ms: int | None) -> list[_Delivery]:
        self._join()
        return self._own() or self._abandoned() or self._new(block_ms)

    def _is_late(self) -> bool:
        """Whether others may soon take over what was read: then it is read again, which tells whose it is."""
        return monotonic() - self._read_at > self._idle_s / 2

    def _deliver(self, delivery: _Delivery, handler: Handler) -> bool:
        """Hand it over, acknowledge it or set it aside; False where it is to be tried again."""
        if not delivery.fields:
            return self._set_aside(delivery, "Forgotten")
        if delivery.times > self._deliveries:
            return self._set_aside(delivery, "NotAcknowledged")
        try:
            event = read_event(delivery.entry, delivery.fields)
        except MalformedEntry as error:
            return self._set_aside(delivery, type(error).__name__)
        try:
            handler(event)
        except TryLater as error:
            return self._try_again(delivery, error, delivery.times - 1)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other entries are not to suffer
            if delivery.times >= self._deliveries:
                return self._set_aside(delivery, type(error).__name__)
            return self._try_again(delivery, error, delivery.times)
        self._client.xack(self._stream, self._group, delivery.entry)
        self._failures = 0
        return True

    def _try_again(self, delivery: _Delivery, error: Exception, times: int) -> bool:
        if times < delivery.times:
            self._claim([delivery.entry], retrycount=times)
        pause_s = min(_doubled(self._pause_s, self._failures, LONGEST_PAUSE_S), self._idle_s / 2)
        self._failures += 1
        _log.warning("%s failed with %s, again in %.1f s", delivery.entry, type(error).__name__, pause_s)
        self._wait(pause_s)
        return False

    def _set_aside(self, delivery: _Delivery, reason: str) -> bool:
        """Copy it to the dead and acknowledge it, in one step."""
        seconds, _ = self._client.time()
        about = {"entry": delivery.entry, "group": self._group, "deliveries": delivery.times, "reason": reason}
        with self._client.pipeline(transaction=True) as steps:
            oldest = max(0, seconds * 1000 - DEAD_KEPT_MS)
            # As bytes: what is no text cannot be sent as one by redis-py's C parser.
            fields = {_raw(name): _raw(value) for name, value in delivery.fields.items()}
            steps.xadd(f"{self._stream}.dead", cast(Any, {**fields, **about}), minid=oldest)
            steps.xack(self._stream, self._group, delivery.entry)
            steps.execute()
        self._failures = 0
        _log.error("%s was set aside: %s", delivery.entry, reason)
        return True

    # ------------------------------------------------------------------------------------------------ what is next

    def _own(self) -> list[_Delivery]:
        """The first entry that was delivered to this consumer and not acknowledged."""
        if not self._has_pending:
            return []
        found = self._read("0", 1)
        self._has_pending = bool(found)
        return [self._redelivered(*found[0])] if found else []

    def _abandoned(self) -> list[_Delivery]:
        """One entry of a consumer that has not been heard of for `idle_s`, looked for twice in that time.

        One by one: where an entry kills its process, the others of a batch would count a delivery each time.
        """
        if monotonic() < self._claim_at:
            return []
        for found, forgotten in self._claims():
            for entry in forgotten:  # the server has acknowledged it already
                self._set_aside(_Delivery(entry, {}, 0), "Forgotten")
            if found:
                self._read_at = monotonic()
                return [self._redelivered(*found[0])]
        self._claim_at = monotonic() + self._idle_s / 2
        return []

    def _claims(self) -> Iterator[tuple[list[Any], list[str]]]:
        cursor, claim = "", (self._stream, self._group, self._consumer, int(self._idle_s * 1000))
        while cursor != "0-0":
            cursor, found, *forgotten = cast(Any, self._client.xautoclaim(*claim, cursor or "0-0", count=1))
            yield found, forgotten[0] if forgotten else []

    def _new(self, block_ms: int | None) -> list[_Delivery]:
        return [_Delivery(entry, fields, 1) for entry, fields in self._read(">", BATCH, block_ms)]

    def _read(self, after: str, count: int, block_ms: int | None = None) -> list[Any]:
        streams: Any = {self._stream: after}
        reply = cast(
            Any, self._client.xreadgroup(self._group, self._consumer, streams, count=count, block=cast(Any, block_ms))
        )
        self._read_at = monotonic()
        if isinstance(reply, dict):  # RESP 3
            return cast(list[Any], reply[self._stream][0]) if reply else []
        return cast(list[Any], reply[0][1]) if reply else []

    def _claim(self, entries: list[str], **what: int) -> None:
        """Change what the server counts of entries that are this consumer's."""
        options = cast(dict[str, Any], what)
        self._client.xclaim(self._stream, self._group, self._consumer, 0, cast(Any, entries), justid=True, **options)

    def _redelivered(self, entry: str, fields: dict[str, str] | None) -> _Delivery:
        pending = cast(list[Any], self._client.xpending_range(self._stream, self._group, entry, entry, 1))
        return _Delivery(entry, fields or {}, pending[0]["times_delivered"] if pending else 1)

    # ------------------------------------------------------------------------------------------------ group and server

    def _join(self) -> None:
        """Make the group where it is missing: at the beginning, or, with "$", where this reader first looked."""
        if self._is_member:
            return
        if self._start == "$":
            newest = cast(list[Any], self._client.xrevrange(self._stream, count=1))
            self._start = newest[0][0] if newest else "0"
        try:
            self._client.xgroup_create(self._stream, self._group, id=self._start, mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._is_member = True

    def _await_server(self, error: redis.RedisError) -> None:
        """Wait for a server that is away, or came back without what it knew."""
        pause_s = _doubled(AWAY_S, self._refusals, LONGEST_AWAY_S)
        self._refusals += 1
        self._is_member, self._has_pending = False, True
        _log.warning("the server refuses: %s, again in %.1f s", type(error).__name__, pause_s)
        self._wait(pause_s)

    def _wait(self, seconds: float) -> None:
        if not self._is_stopping:
            with suppress(Empty):
                self._wake.get(timeout=seconds)

    def _leave(self) -> None:
        """Give back what is not handled, for others to take; with nothing left, leave the group's list."""
        with suppress(redis.RedisError):
            pending = self._client.xpending_range(
                self._stream, self._group, "-", "+", BATCH, consumername=self._consumer
            )
            if ids := [each["message_id"] for each in cast(list[Any], pending)]:
                self._claim(ids, idle=GIVEN_BACK_MS)
            else:
                self._client.xgroup_delconsumer(self._stream, self._group, self._consumer)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _doubled(first_s: float, times: int, longest_s: float) -> float:
    return min(first_s * 2.0 ** min(times, 20), longest_s)  # 2 to the power of a long outage is no float any more


def _connect(url: str) -> redis.Redis:
    """A client that never waits long; bytes that are no UTF-8 reach `read_event`, which refuses them."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        encoding_errors="surrogateescape",
        socket_timeout=BLOCK_MS / 1000 + 4,
        socket_connect_timeout=2,
        retry=Retry(NoBackoff(), 0),
    )


def _is_passing(error: redis.RedisError) -> bool:
    if isinstance(error, redis.AuthenticationError):  # which is a ConnectionError, too
        return False
    return isinstance(error, _PASSING) or str(error).startswith(_REFUSED)
