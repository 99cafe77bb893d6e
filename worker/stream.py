"""Name what stands on the stream `balances`, and look at it: one CloudEvent per entry, written by scripts only.

Looks without taking part: who reads as one of a consumer group uses `worker.reader`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import redis

from worker.accounts import Definition
from worker.balances import Answer

#: Entries that one read asks for, and how long it waits for the first of them.
READ_COUNT = 500
READ_BLOCK_MS = 1000
OBSERVED = "balance.observed.v1"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its id on the stream, the CloudEvent's attributes, and `data` as a JSON object."""

    id: str
    attributes: dict[str, str]
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GroupLag:
    """How far a consumer group is behind the stream, which forgets by age and does not wait for anybody.

    `pending`: delivered and not acknowledged. `lag`: not delivered yet and still there; None: the server cannot tell.
    `oldest_ms`: age of the oldest entry that the group has not dealt with, delivered or not; None: it has dealt with
    all. `lost`: entries that the stream forgot before the group saw them; the count starts anew with its next read.
    """

    group: str
    consumers: int
    pending: int
    lag: int | None
    oldest_ms: int | None
    retention_ms: int | None
    lost: int

    @property
    def share(self) -> float:
        """How much of the retention its oldest entry has used up: at 1 it falls off the end."""
        return (self.oldest_ms or 0) / self.retention_ms if self.retention_ms else 0.0


def observed(definition: Definition, poll: int, answer: Answer, fetched_at_ms: int) -> dict[str, object]:
    """The data of a `balance.observed.v1`, without `late` and `changed`, which `settle` knows.

    No account number: the alias is the only name used outside.
    """
    return {
        "account": definition.alias,
        "institution": definition.institution,
        "poll": poll,
        "operation_id": answer.operation_id,
        "balances": answer.payload(),
        "fetched_at": datetime.fromtimestamp(fetched_at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "additional_information": answer.additional_information,
    }


def read(client: redis.Redis, stream: str, *, after: str = "0", follow: bool = False) -> Iterator[Entry]:
    """Every entry after the id `after` ("0": from the beginning, "$": only new ones), oldest first.

    With `follow` it goes on for ever.
    """
    while True:
        block = READ_BLOCK_MS if follow else None
        read = cast(list[Any], client.xread({stream: after}, count=READ_COUNT, block=block))
        for entry_id, attributes in read[0][1] if read else []:
            after = entry_id
            yield Entry(entry_id, attributes, json.loads(attributes["data"]))
        if not read and not follow:
            return


def last_id(client: redis.Redis, stream: str) -> str:
    """The id of the newest entry, "0" for an empty stream: a following read from here on misses nothing."""
    newest = cast(list[Any], client.xrevrange(stream, count=1))
    return cast(str, newest[0][0]) if newest else "0"


def history(client: redis.Redis, stream: str, alias: str, count: int) -> list[Entry]:
    """The last `count` balances of the account that the stream remembers, oldest first.

    Reads back from the newest entry until it has them, in the worst case the whole stream.
    """
    found: list[Entry] = []
    before = "+"
    while len(found) < count and (read := cast(list[Any], client.xrevrange(stream, max=before, count=READ_COUNT))):
        for entry_id, attributes in read:
            if attributes.get("subject") == alias and attributes.get("type") == OBSERVED:
                found.append(Entry(entry_id, attributes, json.loads(attributes["data"])))
        before = f"({read[-1][0]}"
    return found[:count][::-1]


def group_lag(client: redis.Redis, stream: str) -> list[GroupLag]:
    """Every consumer group of the stream, sorted by name; none where there is no stream."""
    if not client.exists(stream):
        return []
    seconds, micros = client.time()
    retention = cast(str | None, client.hget("config", "retention_ms"))
    return [
        _group_lag(
            client, stream, group, seconds * 1000 + micros // 1000, None if retention is None else int(retention)
        )
        for group in sorted(cast(list[Any], client.xinfo_groups(stream)), key=lambda group: str(group["name"]))
    ]


def _group_lag(
    client: redis.Redis, stream: str, group: dict[str, Any], now_ms: int, retention_ms: int | None
) -> GroupLag:
    oldest = _oldest_ms(client, stream, group)
    lost = _lost(client.xinfo_stream(stream), group)
    return GroupLag(
        group=group["name"],
        consumers=group["consumers"],
        pending=group["pending"],
        lag=None if group["lag"] is None else max(0, group["lag"] - lost),
        oldest_ms=None if oldest is None else max(0, now_ms - oldest),
        retention_ms=retention_ms,
        lost=lost,
    )


def _oldest_ms(client: redis.Redis, stream: str, group: dict[str, Any]) -> int | None:
    """When the oldest entry came that the group has not dealt with: the time is the first half of its id."""
    new = cast(list[Any], client.xrange(stream, min=f"({group['last-delivered-id']}", count=1))
    pending = client.xpending(stream, group["name"])["min"] if group["pending"] else None
    ids = [entry_id for entry_id in (pending, new[0][0] if new else None) if entry_id]
    return min((int(entry_id.partition("-")[0]) for entry_id in ids), default=None)


def _lost(about: dict[str, Any], group: dict[str, Any]) -> int:
    """What was trimmed beyond what the group has read, as far as the server counts (`entries-read`)."""
    read = group["entries-read"]
    return 0 if read is None else max(0, int(about["entries-added"] - about["length"] - read))
