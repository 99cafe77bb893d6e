"""The reader and the stream on a real server: what is delivered, when it is done, and who takes over from whom."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from servers import ValkeyServer, wait_until
from world import OUTCOMES, STREAM, World, read

from worker import reader as reader_module
from worker import timetable
from worker.balances import Answer, Balance
from worker.events import AccountResumed, AccountSuspended, BalanceObserved, Event, Unknown
from worker.reader import BalanceReader, Handler, TryLater
from worker.store import LOOPBACK, free_port
from worker.stream import group_lag, history, last_id, observed
from worker.timetable import source_of

GROUP = "ledger"
DEAD = f"{STREAM}.dead"
DAY_MS = 86_400_000


@pytest.fixture
def world(store: redis.Redis) -> World:
    return populated(store)


def populated(client: redis.Redis) -> World:
    world = World(client)
    world.apply(read("a", "b"))
    return world


@dataclass
class Handling:
    """A handler that remembers what it was handed, and fails as often as it is told to."""

    failures: dict[str, list[BaseException]] = field(default_factory=dict)
    handed: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.handed.append(event.id)
        if failures := self.failures.get(event.id):
            raise failures.pop(0)
        self.events.append(event)

    @property
    def done(self) -> list[str]:
        return [event.id for event in self.events]


@pytest.fixture
def handling() -> Handling:
    return Handling()


def publish(world: World, *operations: str, amount: str = "10000") -> list[str]:
    """An answer per operation; the ids of their entries."""
    for operation in operations:
        world.settle(world.start("a"), operation=operation, amount=amount)
    entries = world.client.xrevrange(STREAM, count=len(operations))
    return [entry for entry, _ in reversed(entries)]


@pytest.fixture
def make(valkey_server: ValkeyServer) -> Iterator[Callable[..., BalanceReader]]:
    """Readers of the group, with pauses of no length."""
    made: list[BalanceReader] = []

    def make(consumer: str = "one", **options: object) -> BalanceReader:
        chosen: dict = {"group": GROUP, "pause_s": 0, **options}
        made.append(BalanceReader(valkey_server.url, consumer=consumer, **chosen))
        return made[-1]

    yield make
    for reader in made:
        reader.close()


@contextmanager
def running(reader: BalanceReader, handler: Handler) -> Iterator[threading.Thread]:
    """The reader in a thread of its own, stopped at the end."""
    thread = threading.Thread(target=reader.run, args=(handler,), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        reader.stop()
        thread.join(10)
    assert not thread.is_alive()


def die_with(client: redis.Redis, consumer: str, count: int, *, times: int = 1, idle_ms: int = 3_600_000) -> None:
    """Another consumer takes entries, `times` times, and is not heard of again since `idle_ms`."""
    [[_, entries]] = client.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=count)
    ids = [entry for entry, _ in entries]
    client.xclaim(STREAM, GROUP, consumer, 0, ids, idle=idle_ms, retrycount=times, justid=True)


def pending(client: redis.Redis) -> dict[str, tuple[str, int]]:
    """Entry → who has it, and how often it was delivered."""
    found = client.xpending_range(STREAM, GROUP, "-", "+", 100)
    return {each["message_id"]: (each["consumer"], each["times_delivered"]) for each in found}


def dead(client: redis.Redis) -> list[tuple[str, str, str]]:
    """Entry, how often delivered, why; of everything set aside."""
    return [(each["entry"], each["deliveries"], each["reason"]) for _, each in client.xrange(DEAD)]


# ------------------------------------------------------------------------------------------------------------ delivery


def test_events_come_typed_in_the_order_of_the_stream_and_are_acknowledged(world: World, make, handling) -> None:
    entries = publish(world, "op-1", "op-2", amount="12345678901234567.89")
    world.suspend(world.start("a").token)
    world.timetable.redrive("a")
    make().run(handling, follow=False)
    first, _, suspended, resumed = handling.events
    assert [event.entry for event in handling.events[:2]] == entries
    assert isinstance(first.data, BalanceObserved)
    assert first.data.balances[0].amount == Decimal("12345678901234567.89")
    assert (first.data.late, first.data.changed, first.subject) == (False, True, "a")
    assert isinstance(suspended.data, AccountSuspended)
    assert (suspended.data.state, suspended.data.code) == ("suspended", "E401")
    assert isinstance(resumed.data, AccountResumed)
    assert resumed.data.by == "redrive"
    assert pending(world.client) == {}


def test_an_entry_is_acknowledged_after_its_handler_and_not_before(world: World, make) -> None:
    entries = publish(world, "op-1", "op-2")
    seen: list[dict] = []
    make().run(lambda _: seen.append(pending(world.client)), follow=False)
    assert seen == [dict.fromkeys(entries, ("one", 1)), {entries[1]: ("one", 1)}]


def test_a_group_goes_on_where_it_was_and_another_group_begins_anew(world: World, make, handling) -> None:
    publish(world, "op-1")
    make().run(handling, follow=False)
    publish(world, "op-2")
    make("two").run(handling, follow=False)
    assert handling.done == ["op-1", "op-2"]
    other = Handling()
    make(group="other").run(other, follow=False)
    assert other.done == ["op-1", "op-2"]


def test_a_group_may_begin_at_the_end_or_after_an_entry(world: World, make, handling) -> None:
    first, _, _ = publish(world, "op-1", "op-2", "op-3")
    make(start=first).run(handling, follow=False)
    assert handling.done == ["op-2", "op-3"]
    late = Handling()
    reader = make(group="late", start="$")
    reader.run(late, follow=False)
    assert late.done == []
    publish(world, "op-4")
    world.client.xgroup_destroy(STREAM, "late")
    publish(world, "op-5")
    reader.run(late, follow=False)
    reader.run(late, follow=False)
    assert late.done == ["op-4", "op-5"], "where it began, not where the stream ended when the group was lost"


def test_a_group_may_wait_for_a_stream_that_is_not_there_yet(store: redis.Redis, make, handling) -> None:
    with running(make(), handling):
        wait_until(lambda: store.exists(STREAM), what="a stream made for the group")
        publish(populated(store), "op-1")
        wait_until(lambda: handling.done == ["op-1"], what="the first entry")


def test_an_unknown_type_is_handed_over_and_a_field_more_does_no_harm(store: redis.Redis, make, handling) -> None:
    publish(populated(store), "op-1")
    [(_, fields)] = store.xrange(STREAM)
    store.delete(STREAM)
    store.xadd(STREAM, {**fields, "type": "balance.observed.v2", "id": "op-2", "traceparent": "00-1"})
    store.xadd(STREAM, {**fields, "data": fields["data"][:-1] + ',"overdraft":"5"}'})
    make().run(handling, follow=False)
    unknown, grown = handling.events
    assert isinstance(unknown.data, Unknown)
    assert unknown.data.model_extra is not None
    assert unknown.data.model_extra["account"] == "a"
    assert isinstance(grown.data, BalanceObserved)
    assert grown.data.model_extra == {"overdraft": "5"}
    assert dead(store) == []
    store.delete(STREAM)  # not for our own schemas


# ------------------------------------------------------------------------------------------------------------- failure


def test_what_fails_is_tried_again_first_and_nothing_overtakes_it(world: World, make, handling) -> None:
    publish(world, "op-1", "op-2", "op-3")
    handling.failures["op-2"] = [ValueError(), OSError()]
    make().run(handling, follow=False)
    assert handling.handed == ["op-1", "op-2", "op-2", "op-2", "op-3"]
    assert handling.done == ["op-1", "op-2", "op-3"]
    assert (pending(world.client), dead(world.client)) == ({}, [])


def test_what_fails_too_often_is_set_aside_with_the_type_of_the_exception_alone(
    world: World, make, handling, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = publish(world, "op-1", "op-2")
    handling.failures["op-1"] = [ValueError("money: 10000")] * 3
    with caplog.at_level(logging.DEBUG):
        make(deliveries=3).run(handling, follow=False)
    assert handling.handed == ["op-1"] * 3 + ["op-2"]
    assert dead(world.client) == [(first, "3", "ValueError")]
    assert pending(world.client) == {}
    [(_, kept)] = world.client.xrange(DEAD)
    [(_, original)] = world.client.xrange(STREAM, first, first)
    assert kept.items() >= original.items()
    assert kept["group"] == GROUP
    assert "money" not in caplog.text
    assert caplog.text.count(first) == 3


def test_what_is_not_the_entrys_fault_is_tried_for_as_long_as_it_takes(world: World, make, handling) -> None:
    publish(world, "op-1", "op-2")
    handling.failures["op-1"] = [*[TryLater()] * 7, ValueError(), TryLater(), ValueError()]
    make(deliveries=3).run(handling, follow=False)
    assert handling.handed == ["op-1"] * 11 + ["op-2"]
    assert handling.done == ["op-1", "op-2"]
    assert dead(world.client) == []


def test_pauses_double_up_to_a_limit_however_long_it_goes_on(world: World, make, handling, monkeypatch) -> None:
    publish(world, "op-1")
    handling.failures["op-1"] = [TryLater() for _ in range(1200)]
    reader = make(pause_s=1, idle_s=3600)
    waited: list[float] = []
    monkeypatch.setattr(reader, "_wait", waited.append)
    reader.run(handling, follow=False)
    assert waited[:7] == [1, 2, 4, 8, 16, 30, 30]
    assert set(waited[7:]) == {30}
    assert handling.done == ["op-1"]


MALFORMED = {
    "no fields of an event": {"data": "{}x"},
    "data that is no JSON": {"data": "{"},
    "data that is not what the type says": {"data": '{"account": "a"}'},
    "bytes that are no text": {"id": b"\xff\xfe", "data": b'{"account": "\xff"}'},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_entry_is_set_aside_at_once_and_keeps_nobody_waiting(
    world: World, make, handling, valkey_server: ValkeyServer, what: str
) -> None:
    publish(world, "op-1")
    [(_, fields)] = world.client.xrange(STREAM)
    fields = {} if what == "no fields of an event" else fields
    bad = world.client.xadd(STREAM, {**fields, **MALFORMED[what]})
    publish(world, "op-2")
    make().run(handling, follow=False)
    assert handling.done == ["op-1", "op-2"]
    assert pending(world.client) == {}
    with redis.Redis.from_url(valkey_server.url) as bytes_client:
        [(_, kept)] = bytes_client.xrange(DEAD)
        [(_, original)] = bytes_client.xrange(STREAM, bad, bad)
    assert kept.items() >= original.items()
    assert (kept[b"entry"], kept[b"reason"]) == (bad.encode(), b"MalformedEntry")
    world.client.xdel(STREAM, bad)


# ----------------------------------------------------------------------------------------------------- taking over


def test_what_a_dead_consumer_had_is_taken_over_first_and_one_by_one(world: World, make) -> None:
    entries = publish(world, "op-1", "op-2", "op-3", "op-4")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    die_with(world.client, "dead", 3)
    seen: list[tuple[str, dict[str, tuple[str, int]]]] = []
    make("two").run(lambda event: seen.append((event.entry, pending(world.client))), follow=False)
    assert [entry for entry, _ in seen] == entries
    assert seen[0][1] == {entries[0]: ("two", 2), entries[1]: ("dead", 1), entries[2]: ("dead", 1)}


def test_what_a_living_consumer_is_at_stays_with_it(world: World, make, handling) -> None:
    publish(world, "op-1", "op-2")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    die_with(world.client, "busy", 1, idle_ms=59_000)
    make("two").run(handling, follow=False)
    assert handling.done == ["op-2"]
    assert [consumer for consumer, _ in pending(world.client).values()] == ["busy"]


def test_a_consumer_that_comes_back_under_its_name_goes_on_at_once(world: World, make, handling) -> None:
    publish(world, "op-1", "op-2", "op-3")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    die_with(world.client, "one", 2, idle_ms=0)
    make().run(handling, follow=False)
    assert handling.done == ["op-1", "op-2", "op-3"]


def test_an_entry_that_kills_its_process_is_set_aside_unseen_and_its_neighbours_are_not(
    world: World, make, handling
) -> None:
    entries = publish(world, "op-1", "op-2", "op-3")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    die_with(world.client, "dead", 1, times=5)
    die_with(world.client, "dead", 1, times=4)
    make().run(handling, follow=False)
    assert handling.handed == ["op-2", "op-3"]
    assert dead(world.client) == [(entries[0], "6", "NotAcknowledged")]


@pytest.mark.parametrize("whose", ["own", "a dead consumer's"])
def test_what_the_stream_forgot_meanwhile_is_told(world: World, make, handling, whose: str) -> None:
    first, second = publish(world, "op-1", "op-2")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    die_with(world.client, "one" if whose == "own" else "dead", 1)
    world.client.xtrim(STREAM, minid=second, approximate=False)
    make().run(handling, follow=False)
    assert handling.done == ["op-2"]
    [(entry, _, reason)] = dead(world.client)
    assert (entry, reason) == (first, "Forgotten")
    assert pending(world.client) == {}


def test_a_batch_that_has_grown_old_is_asked_for_again(world: World, make, monkeypatch) -> None:
    entries = publish(world, "op-1", "op-2", "op-3")
    now, handed = [0.0], []
    monkeypatch.setattr(reader_module, "monotonic", lambda: now[0])

    def slow(event: Event) -> None:
        handed.append(event.id)
        if event.id == "op-1":
            now[0] += 31  # of 60, after which anybody may take over
            world.client.xclaim(STREAM, GROUP, "other", 0, [entries[1]], justid=True)

    make().run(slow, follow=False)
    assert handed == ["op-1", "op-3"], "op-2 is the other consumer's now"
    assert pending(world.client).keys() == {entries[1]}


# ------------------------------------------------------------------------------------------------- stopping, starting


def test_a_reader_that_stops_finishes_its_entry_and_gives_the_others_back(world: World, make, handling) -> None:
    entries = publish(world, "op-1", "op-2", "op-3")
    reader = make()

    def stop_at_once(event: Event) -> None:
        handling(event)
        reader.stop()

    reader.run(stop_at_once)
    assert handling.done == ["op-1"]
    assert pending(world.client) == dict.fromkeys(entries[1:], ("one", 1))
    make("two").run(handling, follow=False)
    assert handling.done == ["op-1", "op-2", "op-3"], "without waiting until they look abandoned"


def test_a_reader_that_has_finished_leaves_the_groups_list(world: World, make, handling) -> None:
    publish(world, "op-1")
    make().run(handling, follow=False)
    assert world.client.xinfo_consumers(STREAM, GROUP) == []


def test_an_interruption_ends_the_run_and_the_entry_is_not_lost(world: World, make, handling) -> None:
    publish(world, "op-1")
    handling.failures["op-1"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        make().run(handling)
    make("two").run(handling, follow=False)
    assert handling.done == ["op-1"]


@pytest.mark.parametrize("where", ["waiting for entries", "waiting after a failure"])
def test_a_signal_handler_stops_it_wherever_it_is(world: World, make, handling, where: str) -> None:
    reader = make(pause_s=3600, idle_s=7200)
    if where == "waiting after a failure":
        publish(world, "op-1")
        handling.failures["op-1"] = [ValueError()]
    before = signal.signal(signal.SIGUSR1, lambda *_: reader.stop())
    try:
        threading.Thread(target=signal_when_waiting, args=(world.client, handling, where)).start()
        started = time.monotonic()
        reader.run(handling)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handling.done == []
    assert time.monotonic() - started < reader_module.LONGEST_PAUSE_S / 2


def signal_when_waiting(client: redis.Redis, handling: Handling, where: str) -> None:
    if where == "waiting for entries":
        wait_until(lambda: client.info("clients")["blocked_clients"], what="a reader that waits")
    else:
        wait_until(lambda: handling.handed, what="a failure")
    os.kill(os.getpid(), signal.SIGUSR1)


def test_with_closes_what_it_opened_and_nothing_else(world: World, valkey_server: ValkeyServer) -> None:
    with BalanceReader(world.client, group=GROUP) as reader:
        reader.run(lambda _: None, follow=False)
    assert world.client.ping()
    with BalanceReader(valkey_server.url) as reader:
        assert reader.latest() == {}


def test_wrong_use_is_told_at_once(store: redis.Redis, valkey_server: ValkeyServer) -> None:
    with pytest.raises(ValueError, match="group"), BalanceReader(store) as reader:
        reader.run(lambda _: None)
    with redis.Redis.from_url(valkey_server.url) as client, pytest.raises(ValueError, match="decode_responses"):
        BalanceReader(client, group=GROUP)
    store.set(STREAM, "not a stream")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"), BalanceReader(store, group=GROUP) as reader:
        reader.run(lambda _: None)
    store.delete(STREAM)


def test_a_client_that_speaks_resp_3_will_do(world: World, valkey_server: ValkeyServer, handling) -> None:
    publish(world, "op-1", "op-2")
    handling.failures["op-1"] = [ValueError()]
    with redis.Redis.from_url(f"{valkey_server.url}?protocol=3", decode_responses=True) as client:
        BalanceReader(client, group=GROUP, pause_s=0).run(handling, follow=False)
    assert handling.done == ["op-1", "op-2"]


# ------------------------------------------------------------------------------------------------- a server that dies


def test_a_server_that_is_killed_and_keeps_its_file_loses_the_reader_nothing(tmp_path: Path, handling) -> None:
    with ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        with server.client() as client:
            publish(populated(client), "op-1")
        reader = BalanceReader(server.url, group=GROUP, pause_s=0)
        with running(reader, handling):
            wait_until(lambda: handling.done == ["op-1"], what="the first entry")
            server.kill()
            server.start()
            with server.client() as client:
                publish(World(client), "op-2")
            wait_until(lambda: handling.done[-1] == "op-2", what="an entry after the server's death")
        reader.close()
    assert set(handling.done) == {"op-1", "op-2"}


def test_a_server_that_comes_back_empty_gets_its_group_again(tmp_path: Path, handling) -> None:
    with ValkeyServer(tmp_path) as server:
        reader = BalanceReader(server.url, group=GROUP)
        with running(reader, handling):
            with server.client() as client:
                publish(populated(client), "op-1")
            wait_until(lambda: handling.done == ["op-1"], what="the first entry")
            server.kill()
            server.start()
            with server.client() as client:
                publish(populated(client), "op-2")
                wait_until(lambda: handling.done[-1] == "op-2", what="an entry of the new server")
                client.xgroup_destroy(STREAM, GROUP)
                publish(World(client), "op-3")
                wait_until(lambda: handling.done[-1] == "op-3", what="an entry after the group's end")
        reader.close()


def test_a_server_that_is_not_there_yet_is_waited_for(tmp_path: Path, handling) -> None:
    server = ValkeyServer(tmp_path)
    with BalanceReader(server.url, group=GROUP) as reader, running(reader, handling), server, server.client() as client:
        publish(populated(client), "op-1")
        wait_until(lambda: handling.done == ["op-1"], what="the first entry")
        reader.stop()


def test_a_server_that_has_no_room_is_waited_for_and_one_that_refuses_us_is_not(tmp_path: Path, handling) -> None:
    with ValkeyServer(tmp_path, requirepass="right") as server:
        stranger = BalanceReader(server.url.replace("right", "wrong"), group=GROUP)
        with stranger, pytest.raises(redis.AuthenticationError):
            stranger.run(handling)
        with server.client() as client, BalanceReader(server.url, group=GROUP) as reader:
            world = populated(client)
            publish(world, "op-1")
            client.config_set("maxmemory", 1)
            with running(reader, handling):
                wait_until(lambda: client.info("commandstats").get("cmdstat_xgroup|create"), what="a refused call")
                assert handling.handed == []
                client.config_set("maxmemory", 0)
                wait_until(lambda: handling.done == ["op-1"], what="the entry, now that there is room")


def test_latest_raises_where_no_server_is() -> None:
    with BalanceReader(f"redis://{LOOPBACK}:{free_port()}/0") as reader, pytest.raises(redis.ConnectionError):
        reader.latest()


# -------------------------------------------------------------------------------------------------------------- latest


def test_latest_needs_no_group_and_no_replay(world: World, make) -> None:
    reader = make(group=None)
    assert (reader.latest(), reader.latest("a")) == ({}, None)
    publish(world, "op-1", amount="1")
    publish(world, "op-2", amount="2")
    world.settle(world.start("b"), amount="3")
    newest = reader.latest("a")
    assert newest is not None
    assert (newest.operation_id, newest.balances[0].signed) == ("op-2", Decimal(2))
    assert {alias: data.balances[0].amount for alias, data in reader.latest().items()} == {"a": 2, "b": 3}


def test_latest_is_never_overwritten_by_an_older_answer(world: World, make) -> None:
    reader = make()
    old = world.start("a")
    world.timetable.postpone(old.token, 0, old.counters, OUTCOMES["postpone"])
    world.claim()
    new = world.begin(world.token("a"))
    assert (new.token.poll, new.token.attempt) == (old.token.poll, 2)
    world.settle(new, operation="new", amount="2")
    world.settle(old, operation="old", amount="1")
    assert reader.latest("a").operation_id == "new"
    following = world.start("a")
    world.settle(replace(following, token=new.token), operation="older-poll", amount="3")
    assert reader.latest("a").operation_id == "new"
    world.settle(following, operation="following", amount="2")
    assert reader.latest("a").operation_id == "following"
    told = [(event["id"], event["data"]["late"], event["data"]["changed"]) for event in world.events()]
    assert told == [
        ("new", False, True),
        ("old", True, False),
        ("older-poll", True, False),
        ("following", False, False),
    ]


def test_changed_is_right_across_restarts_of_everything(tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []
    with ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        for amount in ("10", "10.0", "11", "11", "10"):
            with server.client() as client:  # another worker on another server
                world = World(client)
                world.apply(read("a"))
                told.append((amount, settle_as_workers_do(world, amount)))
            with BalanceReader(server.url) as reader:
                newest = reader.latest("a")
                assert newest is not None
                assert (format(newest.balances[0].amount, "f"), newest.changed) == told[-1]
            server.kill()
            server.start()
    assert told == [("10", True), ("10.0", False), ("11", True), ("11", False), ("10", True)]


def settle_as_workers_do(world: World, amount: str) -> bool:
    """Whether the balance changed, by the fingerprint of the answer itself."""
    begun = world.start("a")
    balance = Balance("873458", "ClosingAvailable", "Credit", Decimal(amount), "CLP", datetime.now(UTC))
    answer, now_ms = Answer(str(uuid4()), (balance,)), world.timetable.now_ms()
    data = observed(begun.definition, begun.token.poll, answer, now_ms)
    source = source_of(begun.definition)
    event = timetable.Event(answer.operation_id, source, data, answer.fingerprint(), ("873458",), now_ms)
    settled = world.timetable.settle(begun, event)
    assert settled is not None
    return settled.changed


# -------------------------------------------------------------------------------------------- looking without reading


def test_history_is_the_accounts_last_balances_oldest_first(world: World, monkeypatch) -> None:
    monkeypatch.setattr("worker.stream.READ_COUNT", 2)
    publish(world, *(f"op-{number}" for number in range(1, 6)))
    world.settle(world.start("b"), operation="other")
    world.suspend(world.start("a").token)
    found = history(world.client, STREAM, "a", 3)
    assert [entry.data["operation_id"] for entry in found] == ["op-3", "op-4", "op-5"]
    assert [entry.data["operation_id"] for entry in history(world.client, STREAM, "a", 9)] == [
        f"op-{number}" for number in range(1, 6)
    ]
    assert history(world.client, STREAM, "nobody", 3) == []
    assert history(world.client, "no stream", "a", 3) == []


def test_a_groups_lag_says_how_near_the_end_it_is(world: World, make, handling) -> None:
    assert group_lag(world.client, "no stream") == []
    entries = publish(world, "op-1", "op-2", "op-3")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    world.client.xgroup_create(STREAM, "done", id=last_id(world.client, STREAM))
    die_with(world.client, "dead", 1)
    done, ledger = group_lag(world.client, STREAM)
    assert (done.group, done.pending, done.oldest_ms, done.share, done.lost) == ("done", 0, None, 0.0, 0)
    assert (ledger.group, ledger.consumers, ledger.pending, ledger.lag, ledger.lost) == (GROUP, 1, 1, 2, 0)
    assert ledger.retention_ms == 30 * DAY_MS
    assert age_ms(world.client, entries[0]) - 5000 <= (ledger.oldest_ms or 0) <= age_ms(world.client, entries[0])
    make(idle_s=0.001).run(handling, follow=False)
    assert group_lag(world.client, STREAM)[1].oldest_ms is None


def age_ms(client: redis.Redis, entry: str) -> int:
    seconds, micros = client.time()
    return int(seconds * 1000 + micros // 1000 - int(entry.split("-")[0]))


def test_a_group_near_the_end_has_used_up_its_retention(world: World) -> None:
    seconds, _ = world.client.time()
    world.client.xadd(STREAM, {"data": "{}"}, id=f"{seconds * 1000 - 27 * DAY_MS}-0")
    world.client.xgroup_create(STREAM, GROUP, id="0")
    [lag] = group_lag(world.client, STREAM)
    assert lag.share == pytest.approx(0.9, abs=0.001)


def test_what_fell_off_before_a_group_saw_it_is_counted(world: World, make, handling) -> None:
    publish(world, "op-1")
    make().run(handling, follow=False)
    entries = publish(world, "op-2", "op-3", "op-4")
    world.client.xtrim(STREAM, minid=entries[2], approximate=False)
    [lag] = group_lag(world.client, STREAM)
    assert (lag.lost, lag.lag) == (2, 1)
    make().run(handling, follow=False)
    [lag] = group_lag(world.client, STREAM)
    assert (lag.lost, lag.lag) == (0, 0)


def test_what_the_clock_of_the_tests_does_to_events_it_does_not_do_to_the_streams_age(store: redis.Redis) -> None:
    world = World(store)
    world.apply(read("a"))
    world.pass_time(timedelta(days=365))
    [entry] = publish(world, "op-1")
    [event] = world.events()
    assert datetime.fromisoformat(event["time"]) > datetime.now(UTC) + timedelta(days=300)
    assert age_ms(world.client, entry) < 60_000
    assert json.loads(world.client.hget("latest", "a"))["operation_id"] == "op-1"
