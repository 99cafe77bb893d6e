"""Every cell of docs/states.md, on a real server: the document is the expectation, so neither can drift alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from world import MINUTE_MS, World
from world import read as read_accounts

from worker.accounts import Accounts
from worker.celery import settling_template
from worker.policy import Credential
from worker.timetable import Begun, CredentialRefused, Postponed, Timetable


def read(*aliases: str, **changes: str) -> Accounts:
    """Accounts in callback mode: they go through every state that there is."""
    return read_accounts(*aliases, more='mode = "callback"', **changes)


DOCUMENT = Path(__file__).parents[2] / "docs" / "states.md"

# ------------------------------------------------------------------------------------- rows: how to come to a state


def unknown(world: World) -> None:
    world.apply(read("b"))


def scheduled(world: World) -> None:
    world.apply(read("a", "b"))


def dispatched(world: World) -> None:
    scheduled(world)
    world.due_now("a")
    world.claim()


def polling(world: World) -> None:
    scheduled(world)
    world.start("a")


def waiting(world: World) -> None:
    polling(world)
    assert world.postpone(world.token("a"))


def awaiting(world: World) -> None:
    polling(world)
    assert world.timetable.accept(world.known("a"), None)


def suspended(world: World) -> None:
    polling(world)
    assert world.suspend(world.token("a")) == "suspended"


def parked(world: World) -> None:
    polling(world)
    assert world.park(world.token("a")) == "parked"


def retired(world: World) -> None:
    """In flight until a moment ago: the case in which a retired account can still be heard of."""
    polling(world)
    world.apply(read("b"))


def paused(below: Callable[[World], None]) -> Callable[[World], None]:
    def arrange(world: World) -> None:
        below(world)
        assert world.timetable.pause("a") is None

    return arrange


def blocked(below: Callable[[World], None]) -> Callable[[World], None]:
    """Blocked by the other account's late E101, so that this account keeps what it was doing."""

    def arrange(world: World) -> None:
        below(world)
        assert world.block(world.token("b")) == "blocked"

    return arrange


ROWS: dict[str, Callable[[World], None]] = {
    "unknown": unknown,
    "scheduled": scheduled,
    "dispatched": dispatched,
    "polling": polling,
    "awaiting": awaiting,
    "waiting": waiting,
    "suspended": suspended,
    "parked": parked,
    "retired": retired,
    "paused scheduled": paused(scheduled),
    "paused polling": paused(polling),
    "paused awaiting": paused(awaiting),
    "paused waiting": paused(waiting),
    "paused suspended": paused(suspended),
    "paused parked": paused(parked),
    "blocked scheduled": blocked(scheduled),
    "blocked polling": blocked(polling),
    "blocked awaiting": blocked(awaiting),
    "blocked waiting": blocked(waiting),
    "blocked suspended": blocked(suspended),
    "blocked parked": blocked(parked),
    "paused blocked scheduled": blocked(paused(scheduled)),
    "paused blocked waiting": blocked(paused(waiting)),
}

# ------------------------------------------------------------------------- columns: what happens, and what it answers


def claim(world: World) -> str:
    """A quarter of an hour later: due times and leases of this world are over by then."""
    world.client.delete("balances.polls")
    world.timetable.pause("b")
    world.pass_time(15 * MINUTE_MS)
    lapsed = [lapse.token.account for lapse in world.claim().lapsed]
    sent = [message["headers"]["id"].split(".")[0] for message in world.messages()]
    return "lapsed" if "a" in lapsed else "sent" if "a" in sent else "-"


def begin(world: World, caller: str = "another") -> str:
    result = world.begin(world.token("a"), caller)
    return {Begun: "begun", CredentialRefused: "refused"}.get(type(result), "stale")


def begin_repeated(world: World) -> str:
    """The same delivery asks again, because the first reply was lost."""
    return begin(world, "caller")


def settle(world: World) -> str:
    result = world.settle(world.known("a"))
    return result.result if result else "foreign"


def settle_stale(world: World) -> str:
    """An answer to the poll before this one."""
    known = world.known("a")
    result = world.settle(replace(known, token=replace(known.token, poll=known.token.poll - 1)))
    return result.result if result else "foreign"


def settle_foreign(world: World) -> str:
    """An answer with another AccountId than the one first seen."""
    world.client.sadd("pins:a:1", "another")
    return settle(world)


def accept(world: World) -> str:
    """A 202, without LifeSpan."""
    return "stale" if world.timetable.accept(world.known("a"), None) is None else "awaiting"


def receive(world: World) -> str:
    """A callback for the account's last token."""
    callback = (world.callback(world.token("a")), b"{}", "application/json")
    world.timetable._settling = settling_template()
    return world.timetable.receive([callback], is_durable=False)[0].result


def receive_and_claim(world: World) -> str:
    """A callback, and then an hour in which nobody settles it."""
    receive(world)
    world.pass_time(60 * MINUTE_MS)
    return "lapsed" if "a" in [lapse.token.account for lapse in world.claim().lapsed] else "-"


def overdue(world: World) -> str:
    """Half a day later, in which nobody claims; this account's interval is a quarter of an hour."""
    world.pass_time(12 * 60 * MINUTE_MS)
    return "told" if "a" in world.timetable.tell_overdue().told else "-"


def applied(result: object) -> str:
    return "stale" if result is None else "postponed" if isinstance(result, Postponed) else str(result)


def postpone(world: World) -> str:
    return applied(world.postpone(world.token("a")))


def suspend(world: World) -> str:
    return applied(world.suspend(world.token("a")))


def park(world: World) -> str:
    return applied(world.park(world.token("a")))


def block(world: World) -> str:
    return applied(world.block(world.token("a")))


def block_replaced(world: World) -> str:
    """The credential that failed has been replaced meanwhile."""
    world.client.hset("login:acme", "bank", "bank-2")
    return block(world)


def operator(call: Callable[[Timetable], object]) -> Callable[[World], str]:
    def run(world: World) -> str:
        refusal = call(world.timetable)
        return "done" if refusal is None else f"refused: {refusal}"

    return run


def release(world: World) -> str:
    return "done" if world.timetable.release(["a"]) else "-"


def release_all(world: World) -> str:
    return "done" if world.timetable.release(institution="bancosecurity.cl", login="acme") else "-"


def define(*aliases: str, **changes: str) -> Callable[[World], str]:
    def run(world: World) -> str:
        world.apply(read(*aliases, **changes))
        return "done"

    return run


EVENTS: dict[str, Callable[[World], str]] = {
    "claim": claim,
    "begin": begin,
    "begin, repeated": begin_repeated,
    "settle": settle,
    "settle, older token": settle_stale,
    "settle, foreign": settle_foreign,
    "accept": accept,
    "receive": receive,
    "receive, claim": receive_and_claim,
    "overdue": overdue,
    "postpone": postpone,
    "suspend": suspend,
    "park": park,
    "block": block,
    "block, replaced": block_replaced,
    "poll": operator(lambda timetable: timetable.poll("a")),
    "pause": operator(lambda timetable: timetable.pause("a")),
    "resume": operator(lambda timetable: timetable.resume("a")),
    "release": release,
    "release, by filter": release_all,
    "redrive": operator(lambda timetable: timetable.redrive("a")),
    "discard": operator(lambda timetable: timetable.discard("a")),
    "unblock": operator(lambda timetable: timetable.unblock("acme")),
    "unblock, new secret": operator(lambda timetable: timetable.unblock_with("acme", Credential.BANK, "bank-2")),
    "unblock, new key": operator(lambda timetable: timetable.unblock_with("acme", Credential.KEY, "key-2")),
    "define, the same": define("a", "b"),
    "define, other interval": define("a", "b", every="10m"),
    "define, other number": define("a", number="55555555"),
    "define, other login": define("a", "b", login="beta"),
    "remove": define("b"),
}


def happen(world: World, row: str, event: str) -> str:
    """Come to the row's state, let the event happen, and say what it answered and what the state is then."""
    ROWS[row](world)
    world.check()
    before = world.state("a")
    assert before == row
    answer = EVENTS[event](world)
    world.check()
    after = world.state("a")
    return answer if after == before else f"{answer} → {after}"


# ---------------------------------------------------------------------------------------------------- the document


def cells() -> Iterator[tuple[str, str, str]]:
    """(row, event, expectation) of every cell of every table in the document."""
    events: list[str] = []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        columns = [column.strip() for column in line.strip().strip("|").split("|")]
        if line.startswith("| state "):
            events = columns[1:]
        elif line.startswith("| ") and columns[0] in ROWS:
            for event, expected in zip(events, columns[1:], strict=True):
                yield columns[0], event, expected


CELLS = list(cells()) if DOCUMENT.exists() else []


@pytest.mark.parametrize(("row", "event", "expected"), CELLS, ids=[f"{row}: {event}" for row, event, _ in CELLS])
def test_cell(store: redis.Redis, row: str, event: str, expected: str) -> None:
    assert happen(World(store), row, event) == expected


def test_the_document_has_every_cell() -> None:
    assert {(row, event) for row, event, _ in CELLS} == {(row, event) for row in ROWS for event in EVENTS}
    assert len(CELLS) == len(ROWS) * len(EVENTS)
