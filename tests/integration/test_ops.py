"""What operators ask and order, on a real server: every state against every order, and the reason of each refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from schemas import FILLER
from servers import ValkeyServer
from world import EVERY_S, STREAM, World, accounts_file, read

from worker import ops
from worker.accounts import Limits, parse_accounts
from worker.credentials import CredentialStore
from worker.errors import Kind, Outcome, Refused
from worker.policy import Counters, Credential
from worker.settings import Settings, load_settings
from worker.timetable import connect

DEAD = "balances.dead.do-not-retry"
PARKED = "balances.dead.after-notification"


@pytest.fixture
def world(store: redis.Redis) -> World:
    """Two accounts of one login, `one` and `two`."""
    world = World(store)
    world.apply(read("one", "two"))
    return world


def scheduled(world: World) -> None:
    pass


def dispatched(world: World) -> None:
    world.due_now("one")
    world.claim()


def polling(world: World) -> None:
    world.start("one")


def waiting(world: World) -> None:
    world.postpone(world.start("one").token)


def suspended(world: World) -> None:
    world.suspend(world.start("one").token)


def parked(world: World) -> None:
    world.park(world.start("one").token)


def blocked(world: World) -> None:
    world.block(world.start("one").token)


def paused(world: World) -> None:
    world.timetable.pause("one")


def blocked_and_suspended(world: World) -> None:
    suspended(world)
    world.block(world.start("two").token)


def retired(world: World) -> None:
    world.apply(read("two"))


STATES: list[Callable[[World], None]] = [
    scheduled,
    dispatched,
    polling,
    waiting,
    suspended,
    parked,
    blocked,
    paused,
    blocked_and_suspended,
    retired,
]

UNBLOCK = "its login acme is blocked; after the fix: balances unblock acme"
REDRIVE = "it is suspended; bring it back with: balances dead redrive one"
RELEASE = "it awaits a notification; bring it back with: balances release one"
GONE = "it is no longer in the accounts file"
WAITS = "it waits for its next try at <due>, and a wait is never shortened"
NOT = {"resume": "it is not paused; ", "redrive": "it is not suspended; ", "discard": "it has no dead letter; "}
QUEUED, UNDER_WAY = "its poll is about to begin", "its poll is under way"

#: State → order → the reason of its refusal; an order that is not named is done.
REFUSALS: dict[Callable[[World], None], dict[str, str]] = {
    scheduled: {order: NOT[order].removesuffix("; ") for order in NOT},
    dispatched: {"poll": QUEUED, **{order: NOT[order] + QUEUED for order in NOT}},
    polling: {"poll": UNDER_WAY, **{order: NOT[order] + UNDER_WAY for order in NOT}},
    waiting: {"poll": WAITS, **{order: NOT[order] + WAITS for order in NOT}},
    suspended: {"poll": REDRIVE, "resume": NOT["resume"] + REDRIVE},
    parked: {"poll": RELEASE, "resume": NOT["resume"] + RELEASE, "redrive": NOT["redrive"] + RELEASE},
    blocked: {"poll": UNBLOCK, **{order: NOT[order] + UNBLOCK for order in NOT}},
    paused: {
        "poll": "it is paused; go on with: balances resume one",
        "redrive": "it is not suspended",
        "discard": "it has no dead letter",
    },
    blocked_and_suspended: {"poll": f"{REDRIVE}; {UNBLOCK}", "resume": f"{NOT['resume']}{REDRIVE}; {UNBLOCK}"},
    retired: dict.fromkeys(("poll", "pause", "resume", "redrive", "discard"), GONE),
}
ORDERS = (ops.poll, ops.pause, ops.resume, ops.redrive, ops.discard)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_an_order_is_done_or_refused_with_a_reason(
    world: World, state: Callable[[World], None], order: Callable[..., ops.Order]
) -> None:
    state(world)
    due = world.account("one").get("due", "0")
    [(alias, reason)] = ops.each(world.timetable, order(world.timetable), ["one"])
    assert alias == "one"
    expected = REFUSALS[state].get(order.__name__)
    due_words = ops.iso(int(due))[:19].replace("T", " ") + " UTC"
    assert reason == (expected and expected.replace("<due>", due_words))
    world.check()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_an_unknown_alias_is_refused_by_every_order(world: World, order: Callable[..., ops.Order]) -> None:
    [(_, reason)] = ops.each(world.timetable, order(world.timetable), ["nobody"])
    assert reason == "no such account; see: balances accounts"


def test_orders_are_given_one_by_one_so_that_a_caller_may_stop(world: World) -> None:
    results = ops.each(world.timetable, ops.pause(world.timetable), ["one", "two"])
    assert next(results) == ("one", None)
    assert [world.state("one"), world.state("two")] == ["paused scheduled", "scheduled"]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_dry_run_says_what_a_redrive_would_do_and_does_nothing(world: World, state: Callable[[World], None]) -> None:
    state(world)
    before = world.state("one"), world.account("one")
    [dry] = ops.each(world.timetable, ops.redrive(world.timetable, dry_run=True), ["one"])
    assert (world.state("one"), world.account("one")) == before
    [real] = ops.each(world.timetable, ops.redrive(world.timetable), ["one"])
    assert dry == real


def test_the_letter_of_a_login_is_pointed_to_its_unblock(world: World) -> None:
    blocked(world)
    for order in (ops.redrive, ops.discard):
        [(_, reason)] = ops.each(world.timetable, order(world.timetable), ["acme"])
        assert reason == "this is a login, and its letter goes with its block: balances unblock acme"


def test_what_a_queue_can_give_back_are_its_accounts_and_no_login(world: World) -> None:
    blocked_and_suspended(world)
    assert ops.redrivable(world.timetable, DEAD) == ["one"]
    with pytest.raises(Refused, match="bring it back with: balances release"):
        ops.redrivable(world.timetable, PARKED)


# ------------------------------------------------------------------------------------------------------------ release


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({}, None),
        ({"login": "acme", "institution": "bancosecurity.cl"}, None),
        ({"login": "globex"}, "it is parked, but not of that institution or login"),
    ],
)
def test_release_by_name_says_why_not(world: World, filters: dict[str, str], reason: str | None) -> None:
    parked(world)
    chosen = {"institution": "", "login": "", **filters}
    assert ops.release(world.timetable, ["one"], **chosen) == [("one", reason)]


def test_release_of_what_is_not_parked_says_what_it_is_instead(world: World) -> None:
    paused(world)
    assert ops.release(world.timetable, ["one", "two", "nobody"], institution="", login="") == [
        ("one", "it is not parked; it is on its regular schedule"),
        ("two", "it is not parked; it is on its regular schedule"),
        ("nobody", "no such account; see: balances accounts"),
    ]


def test_unblock_refuses_what_is_no_login_and_what_is_not_blocked(world: World) -> None:
    with pytest.raises(Refused, match="nobody: no such login"):
        ops.unblock(world.timetable, "nobody")
    with pytest.raises(Refused, match="acme: not blocked"):
        ops.unblock(world.timetable, "acme")
    blocked(world)
    ops.unblock(world.timetable, "acme")
    assert world.state("one") == "scheduled"


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("state", "shown", "is_planned"),
    [
        (scheduled, "scheduled", True),
        (dispatched, "dispatched", False),
        (polling, "polling", False),
        (waiting, "waiting", True),
        (suspended, "suspended", False),
        (parked, "parked", False),
        (blocked, "blocked", False),
        (paused, "paused", False),
        (blocked_and_suspended, "blocked", False),
    ],
)
def test_a_row_is_the_contracts(world: World, state: Callable[[World], None], shown: str, is_planned: bool) -> None:
    state(world)
    [row] = ops.accounts(world.timetable, ["one"])
    told = ops.as_dict(row)
    contract = ["alias", "institution", "login", "state", "attempt", "poll", "next_due", "last_ok", "last_outcome"]
    assert list(told) == [*contract, "overdue"]
    assert told["state"] == shown
    assert (told["next_due"] is not None) == is_planned
    assert not told["overdue"]


def test_what_was_polled_has_its_last_balance_and_outcome(world: World) -> None:
    world.settle(world.start("one"))
    [row] = ops.accounts(world.timetable, ["one"])
    assert row.last_outcome == "ok"
    assert row.last_ok is not None
    assert row.last_ok.endswith("Z")
    assert (row.attempt, row.poll) == (1, int(world.account("one")["poll"]))


def test_overdue_is_due_for_longer_than_its_own_interval(world: World) -> None:
    world.due_now("one")
    world.pass_time(EVERY_S * 1000 - 1000)
    assert not ops.accounts(world.timetable, ["one"])[0].overdue
    world.pass_time(2000)
    assert ops.accounts(world.timetable, ["one"])[0].overdue


@pytest.mark.parametrize(("name", "why"), [("nobody", "no such account"), ("one", "no longer in the accounts file")])
def test_an_account_that_is_not_defined_is_refused(world: World, name: str, why: str) -> None:
    retired(world)
    for read_it in (lambda: ops.accounts(world.timetable, [name]), lambda: ops.story(world.timetable, name)):
        with pytest.raises(Refused, match=f"{name}: .*{why}"):
            read_it()


def test_letters_are_the_contracts_and_a_logins_letter_has_no_alias(world: World) -> None:
    suspended(world)
    world.block(world.start("two").token)
    letters = ops.dead_letters(world.timetable)
    contract = ["alias", "login", "queue", "poll", "code", "type", "description", "attempts", "first_at", "last_at"]
    assert [list(ops.as_dict(letter)) for letter in letters] == [contract] * 2
    assert [(letter.alias, letter.login, letter.code) for letter in letters] == [
        ("one", "acme", "E401"),
        (None, "acme", "E101"),
    ]
    assert {letter.queue for letter in letters} == {DEAD}
    assert ops.dead_letters(world.timetable, PARKED) == []
    assert ops.dead_letter(world.timetable, "acme")[0] == letters[1]
    with pytest.raises(Refused, match="two: has no dead letter"):
        ops.dead_letter(world.timetable, "two")


def test_latest_is_every_newest_balance_or_one(world: World) -> None:
    with pytest.raises(Refused, match="has no balance yet; see: balances accounts one"):
        ops.latest(world.timetable, "one")
    world.settle(world.start("one"), amount="7")
    [newest] = ops.latest(world.timetable)
    assert [each["amount"] for each in newest["balances"]] == ["7"]
    assert ops.latest(world.timetable, "one") == [newest]


# -------------------------------------------------------------------------------------------------------------- story


@pytest.mark.parametrize(
    ("state", "underneath", "commands"),
    [
        (scheduled, "scheduled", ["poll one", "pause one"]),
        (dispatched, "dispatched", ["pause one"]),
        (polling, "polling", ["pause one"]),
        (waiting, "waiting", ["pause one"]),
        (suspended, "suspended", ["dead redrive one", "dead discard one", "pause one"]),
        (parked, "parked", ["release one", "dead discard one", "pause one"]),
        (blocked, "scheduled", ["unblock acme", "pause one"]),
        (paused, "scheduled", ["resume one"]),
        (blocked_and_suspended, "suspended", ["unblock acme", "dead redrive one", "dead discard one", "pause one"]),
    ],
)
def test_a_story_names_what_can_be_typed_and_each_of_it_is_done(
    world: World, state: Callable[[World], None], underneath: str, commands: list[str]
) -> None:
    state(world)
    story = ops.story(world.timetable, "one")
    assert story.underneath == underneath
    assert story.commands == tuple(f"balances {command}" for command in commands)
    orders = {"poll": ops.poll, "pause": ops.pause, "resume": ops.resume, "dead redrive": ops.redrive}
    first = commands[0].rpartition(" ")[0]
    if first in orders:
        assert list(ops.each(world.timetable, orders[first](world.timetable), ["one"])) == [("one", None)]


def test_a_story_tells_the_reason_of_a_dead_letter(world: World) -> None:
    suspended(world)
    story = ops.story(world.timetable, "one")
    assert story.reason is not None
    told = {name: value for name, value in asdict(story.reason).items() if name != "since"}
    assert told == {"code": "E401", "type": "DO_NOT_RETRY", "description": "no such account", "queue": DEAD}
    assert story.block is None


@pytest.mark.parametrize(("credential", "is_manual"), [(Credential.BANK, True), (Credential.KEY, False)])
def test_a_story_tells_the_block_and_who_may_lift_it(world: World, credential: Credential, is_manual: bool) -> None:
    for bank in ("bank-1", "bank-2"):
        world.bank = bank
        world.block(world.start("one").token, credential=credential)
        if bank == "bank-1":
            world.timetable.unblock_with("acme", credential, f"{credential}-2")
            world.key = "key-2"
    story = ops.story(world.timetable, "two")
    assert story.block is not None
    assert (story.block.code, story.block.description) == ("E101", "bad credentials")
    assert (story.blocked_by, story.is_manual) == (credential, is_manual)


def test_a_story_has_the_last_polls_newest_first_and_the_counters(world: World) -> None:
    world.settle(world.start("one"))
    begun = world.start("one")
    world.pass_time(1500)
    world.postpone(begun.token)
    story = ops.story(world.timetable, "one")
    assert [(each.attempt, each.outcome) for each in story.attempts] == [(1, "E201"), (1, "ok")]
    assert 1.5 <= story.attempts[0].duration_s < 3
    assert (story.tries, story.waits, story.losses, story.max_waits) == (1, 0, 0, 6)
    assert story.interval == "every 15m"


def test_a_story_names_the_account_that_its_login_is_busy_with(world: World) -> None:
    world.start("two")
    assert ops.story(world.timetable, "one").holder == "two"


def test_a_story_tells_a_cron_with_its_zone(world: World) -> None:
    text = accounts_file("one", "two").decode().replace('every = "15m"', 'cron = "0 9 * * 1-5"')
    world.apply(parse_accounts(text, "accounts.toml", callback_configured=False))
    assert ops.story(world.timetable, "one").interval == "cron 0 9 * * 1-5 in America/Santiago"


# ------------------------------------------------------------------------------------------------------- check, follow


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "accounts.toml"
    path.write_bytes(accounts_file("one", "two"))
    return load_settings({"BALANCES_ACCOUNTS": str(path), "BALANCES_DATA_DIR": str(tmp_path)})


def findings(settings: Settings, client: redis.Redis, **environ: str) -> dict[str, tuple[bool, str]]:
    accounts = read("one", "two")
    credentials = CredentialStore(environ, settings.secrets_dir)
    found = ops.check(settings, accounts, credentials, client)
    return {finding.name: (finding.is_right, finding.detail) for finding in reversed(found)}  # the first of a name


def test_check_finds_a_missing_secret_a_moved_clock_and_a_file_that_is_not_kept(
    settings: Settings, store: redis.Redis
) -> None:
    found = findings(settings, store)
    assert [name for name, (is_right, _) in found.items() if not is_right] == ["persistence", "secrets"]
    assert "BALANCES_SECRET_ACME_API_KEY" in found["secrets"][1]
    store.set("clock:offset", 1)
    credential = json.dumps({"username": "u", "password": "p"})
    secrets = {"BALANCES_SECRET_ACME_API_KEY": "k", "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL": credential}
    found = findings(settings, store, **secrets)
    assert [name for name, (is_right, _) in found.items() if not is_right] == ["clock", "persistence"]
    assert found["secrets"] == (True, "found for 1 logins")


def test_check_finds_a_server_that_evicts(settings: Settings, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, appendonly="yes", maxmemory_policy="allkeys-lru") as server, server.client() as client:
        found = findings(settings, client)
    assert found["eviction"] == (False, "maxmemory-policy is allkeys-lru; it must be noeviction")
    assert found["persistence"][0]


def test_check_finds_a_group_that_falls_behind(settings: Settings, store: redis.Redis, world: World) -> None:
    world.settle(world.start("one"))
    store.xgroup_create(STREAM, "ledger", "0")
    assert findings(settings, store)["consumer group"][0]
    store.hset("config", "retention_ms", 1)
    assert findings(settings, store)["consumer group"][0] is False


def test_check_finds_an_impossible_load_and_every_limit_that_is_reached(
    settings: Settings, store: redis.Redis, world: World
) -> None:
    file = replace(read("one", "two"), limits=Limits(daily_requests=1))
    world.apply(file)
    generic = Outcome(Kind.ANSWERED, "E999", "RETRY_IMMEDIATELY")
    world.timetable.postpone(world.start("one").token, 1000, Counters(), generic, rest=timedelta(hours=4))
    world.timetable.pause_all()
    found = ops.check(settings, file, CredentialStore({}, None), store)
    wrong = {finding.name: finding.detail for finding in found if not finding.is_right}
    assert wrong["load"] == "all logins: 2 accounts ask 192 times a day, limits.daily_requests allows 1"
    assert wrong["pause"].startswith("everything is paused since 20")
    assert wrong["budget"].startswith("daily budget of all logins spent until 20")
    assert wrong["login"].startswith("login acme rests until 20")


def test_check_finds_a_server_that_does_not_answer(settings: Settings) -> None:
    found = findings(settings, redis.Redis.from_url("redis://127.0.0.1:1/0"))
    assert found["server"] == (False, "ConnectionError; is it running, new enough, and BALANCES_REDIS_URL right?")


def test_sync_puts_the_file_into_force_and_refuses_a_mass_removal(settings: Settings, world: World) -> None:
    many = [f"account-{number}" for number in range(10)]
    world.apply(read(*many))
    with pytest.raises(Refused, match=r"this would remove 10 of 10 accounts; if it is meant: balances sync --force"):
        ops.sync(settings, world.timetable, force=False)
    accounts, changed = ops.sync(settings, world.timetable, force=True)
    assert (sorted(accounts.definitions), changed) == (["one", "two"], 12)
    assert ops.all_aliases(world.timetable) == ["one", "two"]


def test_following_goes_on_where_it_was_when_the_server_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "AWAY_S", 0.01)
    away = []
    with (
        ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server,
        server.client() as client,
        connect(server.url) as reader,
    ):

        def come_back() -> None:
            if not away:
                server.start()
            away.append(True)

        first = client.xadd(STREAM, FILLER)
        entries = ops.follow(reader, STREAM, after="0", is_away=come_back)
        assert next(entries).id == first
        server.kill()
        server.start()
        second = client.xadd(STREAM, FILLER)
        server.kill()
        assert next(entries).id == second
        reader.connection_pool.disconnect()
    assert away
