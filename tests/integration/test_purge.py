"""A removed account leaves nothing behind but its name in the audit trail; and nothing of another account goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from test_callbacks import CallbackWorld
from world import STREAM, World, read

from worker.timetable import POLLS, Timetable


@pytest.fixture
def world(store: redis.Redis) -> CallbackWorld:
    return lived(store)


def lived(store: redis.Redis) -> CallbackWorld:
    """Two accounts with balances; one of them has been parked, released, suspended, and awaits what never came."""
    world = CallbackWorld(store, "gone", "stays")
    for alias in ("gone", "stays"):
        world.settle(world.start(alias), operation=f"of-{alias}")
        [(_, fields)] = store.xrevrange(STREAM, count=1)
        store.xadd(f"{STREAM}.dead", {**fields, "reason": "ValueError"})
    world.park(world.start("gone").token)
    world.timetable.release(["gone"])
    world.suspend(world.start("gone").token)
    world.timetable.redrive("gone")
    return world


def retire(world: World) -> None:
    """Take it out of the accounts file; what is still in the queues is a hint that workers take and ignore."""
    world.client.delete(POLLS)
    world.apply(_only("stays"))


def _only(*aliases: str) -> Any:
    return read(*aliases, more='mode = "callback"')


def mentions(client: redis.Redis, word: str) -> list[str]:
    """Every key that has the word in its name or in what it holds; but the audit trail."""
    dumps: dict[str, Callable[[str], Any]] = {
        "string": client.get,
        "hash": client.hgetall,
        "list": lambda key: client.lrange(key, 0, -1),
        "set": client.smembers,
        "zset": lambda key: client.zrange(key, 0, -1),
        "stream": client.xrange,
    }
    found = ((key, dumps[client.type(key)](key)) for key in client.scan_iter(count=1000))
    return sorted(key for key, value in found if key != "audit" and word in f"{key} {value}")


def test_nothing_is_left_of_a_purged_account_but_its_name_in_the_audit_trail(world: CallbackWorld) -> None:
    number = world.known("gone").definition.number
    retire(world)
    before = {key: world.client.dump(key) for key in mentions(world.client, "stays") if "gone" not in key}
    assert len(mentions(world.client, "gone")) >= 6
    assert world.timetable.purge("gone") is None
    assert mentions(world.client, "gone") == []
    assert [key for key in mentions(world.client, number) if "stays" not in key] == []
    assert before.keys() <= set(mentions(world.client, "stays"))
    assert [event["subject"] for event in world.events()] == ["stays"]
    assert world.client.xlen(f"{STREAM}.dead") == 1
    assert [fields["subject"] for fields in world.timetable.audit()][:1] == ["gone"]
    world.check()


def test_only_what_is_retired_and_over_is_purged(world: CallbackWorld) -> None:
    before = world.snapshot()
    assert world.timetable.purge("gone") == "scheduled"
    assert world.timetable.purge("nobody") == "unknown"
    assert world.snapshot() == before


def test_what_is_under_way_refuses(world: CallbackWorld) -> None:
    begun = world.start("gone")
    retire(world)
    assert world.timetable.purge("gone") == "polling"
    assert world.settle(begun).result == "late"  # type: ignore[union-attr]
    assert world.timetable.purge("gone") is None
    assert mentions(world.client, "gone") == []


def test_an_answer_that_is_not_settled_refuses(world: CallbackWorld) -> None:
    world.client.zadd("answers", {"gone 1 1": 1})
    retire(world)
    assert world.timetable.purge("gone") == "awaiting"


def test_a_blocked_logins_letter_that_names_it_refuses(world: CallbackWorld) -> None:
    world.block(world.start("gone").token)
    retire(world)
    assert world.timetable.purge("gone") == "blocked"
    assert world.timetable.unblock("acme") is None
    assert world.timetable.purge("gone") is None
    assert mentions(world.client, "gone") == []


def test_an_interrupted_purge_is_repeated(world: CallbackWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    retire(world)
    real = Timetable._run

    def dies(self: Timetable, script: str, *args: str | int) -> Any:
        if "account" in args:
            raise KeyboardInterrupt
        return real(self, script, *args)

    monkeypatch.setattr(Timetable, "_run", dies)
    with pytest.raises(KeyboardInterrupt):
        world.timetable.purge("gone")
    monkeypatch.undo()
    assert world.timetable.purge("gone") is None
    assert mentions(world.client, "gone") == []


def test_more_entries_than_a_batch_go_too(world: CallbackWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.timetable.PURGE_BATCH", 2)
    for _ in range(5):
        world.settle(world.start("gone"))
    retire(world)
    assert world.timetable.purge("gone") is None
    assert mentions(world.client, "gone") == []


def test_an_alias_that_comes_back_is_polled_anew_and_no_poll_number_is_used_twice(world: CallbackWorld) -> None:
    last = int(world.account("gone")["poll"])
    retire(world)
    world.timetable.purge("gone")
    world.pass_time(1000)
    world.apply(_only("gone", "stays"))
    begun = world.start("gone")
    assert begun.token.poll > last
    assert begun.generation == 1
    world.check()
