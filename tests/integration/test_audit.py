"""Every order is written down in the step that carries it out: who, what, on which account, what came of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner
from servers import ValkeyServer
from world import Entry, World, read, read_entries

from worker import ops
from worker.cli import main
from worker.policy import Credential

WHO = "anna@desk"
Order = Callable[[World], object]


@pytest.fixture
def world(store: object) -> World:
    return fresh(World(store))  # type: ignore[arg-type]


def fresh(world: World) -> World:
    """Two accounts, and no order yet."""
    world.apply(read("a", "b"))
    world.client.delete("audit")
    return world


def told(world: World) -> list[tuple[str, str, str, str]]:
    """Oldest first."""
    return [(row.actor, row.action, row.subject, row.outcome) for row in ops.audit(world.timetable)][::-1]


def suspended(world: World) -> None:
    world.suspend(world.start("a").token)


def parked(world: World) -> None:
    world.park(world.start("a").token)


def blocked(world: World) -> None:
    world.block(world.start("a").token)


def polling(world: World) -> None:
    world.start("a")
    world.client.delete("audit")


def nothing(_: World) -> None:
    """As it is."""


ORDERS: list[tuple[Callable[[World], None], Order, tuple[str, str, str]]] = [
    (nothing, lambda w: w.timetable.poll("a"), ("poll", "a", "due")),
    (polling, lambda w: w.timetable.poll("a"), ("poll", "a", "refused: polling")),
    (nothing, lambda w: w.timetable.pause("a"), ("pause", "a", "paused")),
    (nothing, lambda w: w.timetable.resume("a"), ("resume", "a", "refused: scheduled")),
    (lambda w: w.client.hset("account:a", "paused", 1), lambda w: w.timetable.resume("a"), ("resume", "a", "resumed")),
    (suspended, lambda w: w.timetable.redrive("a"), ("redrive", "a", "redriven")),
    (nothing, lambda w: w.timetable.redrive("a"), ("redrive", "a", "refused: scheduled")),
    (suspended, lambda w: w.timetable.discard("a"), ("discard", "a", "discarded")),
    (nothing, lambda w: w.timetable.discard("a"), ("discard", "a", "refused: scheduled")),
    (parked, lambda w: w.timetable.release(), ("release", "a", "released")),
    (nothing, lambda w: w.timetable.release(["a"]), ("release", "?", "nothing was parked")),
    (blocked, lambda w: w.timetable.unblock("acme"), ("unblock", "acme", "unblocked")),
    (nothing, lambda w: w.timetable.unblock("acme"), ("unblock", "acme", "refused: not blocked")),
    (nothing, lambda w: w.timetable.purge("a"), ("purge", "a", "refused: scheduled")),
    (lambda w: w.client.hdel("config", "version"), lambda w: w.timetable.migrate(), ("migrate", "state", "migrated")),
]


@pytest.mark.parametrize(("state", "order", "entry"), ORDERS, ids=[f"{e[0]} {e[2]}" for _, _, e in ORDERS])
def test_an_order_is_written_down_with_what_came_of_it(
    world: World, state: Callable[[World], None], order: Order, entry: tuple[str, str, str]
) -> None:
    state(world)
    world.client.delete("audit")
    order(world)
    assert told(world) == [(WHO, *entry)]


@pytest.mark.parametrize("name", ["pause", "resume", "poll", "redrive", "discard", "unblock", "purge"])
def test_a_name_that_nobody_knows_is_not_written_down(world: World, name: str) -> None:
    """It may be anything that an operator's clipboard held."""
    getattr(world.timetable, name)("11887755")
    [(who, action, subject, outcome)] = told(world)
    assert (who, action, subject) == (WHO, name, "?")
    assert outcome.startswith("refused: ")


def test_each_released_account_has_its_entry(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b", login="beta")))
    for alias in "ab":
        world.park(world.start(alias).token)
    world.client.delete("audit")
    world.timetable.release(actor="notification")
    assert told(world) == [("notification", "release", alias, "released") for alias in "ab"]


def test_a_new_credential_is_told_once_and_tries_that_change_nothing_are_not(world: World) -> None:
    blocked(world)
    world.client.delete("audit")
    for bank in ("bank-1", "bank-2", "bank-2"):
        world.timetable.unblock_with("acme", Credential.BANK, bank, actor="worker host-1")
    assert told(world) == [("worker host-1", "unblock", "acme", "unblocked")]


def test_an_accounts_file_in_force_is_told_with_its_digest(world: World) -> None:
    accounts = read("a", "b", "c")
    world.timetable.apply(accounts, actor="beat host-1")
    assert told(world) == [("beat host-1", "sync", "accounts file", f"applied {accounts.digest[:12]}")]


def test_an_actor_is_short_and_of_safe_characters(world: World) -> None:
    world.timetable.apply(read("a"), force=True, actor="é\n\x1b[31m" + "x" * 200)
    [(who, *_)] = told(world)
    assert len(who) == 80
    assert who.isascii()
    assert who.isprintable()


def test_the_trail_is_trimmed_by_age_and_never_by_count(world: World) -> None:
    old = {"actor": "x", "action": "y", "subject": "of old", "outcome": "o", "at": "1"}
    world.claim()  # nothing is trimmed by a clock that no beat looks at
    for number in range(1, 301):
        world.client.xadd("audit", old, id=f"{number}-1")
    for _ in range(300):
        world.timetable.poll("a")
    assert len(ops.audit(world.timetable, alias="a", limit=1000)) == 300
    assert len(ops.audit(world.timetable, alias="of old", limit=1000)) <= 100, "what shares a node with younger ones"


def test_who_gives_orders_is_the_user_of_this_host_and_who_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setattr("socket.gethostname", lambda: "host-1")
    monkeypatch.delenv("SUDO_USER", raising=False)
    assert ops.actor() == "root@host-1"
    monkeypatch.setenv("SUDO_USER", "anna")
    assert ops.actor() == "root@host-1 sudo anna"


def test_the_command_shows_it_in_80_columns_and_as_json(
    world: World, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALANCES_REDIS_URL", valkey_server.url)
    monkeypatch.setenv("COLUMNS", "80")
    runner = CliRunner()
    assert runner.invoke(main, ["pause", "a"]).exit_code == 0
    assert runner.invoke(main, ["poll", "b"]).exit_code == 0
    shown = runner.invoke(main, ["audit"]).output
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("who", "what", "outcome", "pause", "paused", "due"):
        assert word in shown
    assert runner.invoke(main, ["audit", "--alias", "nobody"]).output == "no order was given\n"
    [row] = ops.audit(world.timetable, alias="b")
    assert row.actor == ops.actor()
    about_a = runner.invoke(main, ["audit", "--json", "--alias", "a", "--limit", "1"])
    assert '"action": "pause"' in about_a.output
    assert '"action": "poll"' not in about_a.output
