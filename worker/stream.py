"""Name what stands on the stream `balances`, and read it back: one CloudEvent per entry, written by scripts only."""

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its id on the stream, the CloudEvent's attributes, and `data` as a JSON object."""

    id: str
    attributes: dict[str, str]
    data: dict[str, Any]


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
