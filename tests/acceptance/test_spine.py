"""The spine on real processes: where each answer leads, what brings accounts back, who waits for whom, what leaks.

One machine plays every scenario at once, each on an account and a login of its own: two workers (one started as in the
Procfile, one bare), beat, Valkey, the sandbox. Two more machines have the clock moved and a thousand accounts.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from machine import (
    AMOUNT,
    OK,
    PATIENCE_S,
    WRONG,
    Account,
    Machine,
    Process,
    canaries_in,
    credential,
    each_once,
    started_at,
    write_secret,
)
from redis.client import PubSub
from sandbox_client import JsonObject, fingerprint
from servers import wait_until

from worker.policy import DeadLetterQueue

#: The machine's long wait; the spread on top of it is positive only.
WAIT_S = 6.0
FOUR_HOURS_S = 4 * 3600
#: Longer than SECRETS_EVERY_S of worker/lifecycle.py, and than three refusals in a row.
NEW_SECRET_S = 75.0

#: Requests that are seen of two large logins, after the small ones were served.
MORE = 12

IMMEDIATELY = "error:E201:RETRY_IMMEDIATELY"
WAIT = "error:E202:WAIT_4_HOURS_BEFORE_RETRY"
NOTIFIED = "error:E203:RETRY_AFTER_NOTIFICATION"
NEVER = "error:E401:DO_NOT_RETRY"
#: A bank that quotes in its error whatever it was sent.
QUOTING = f"{NEVER}:NUMBER-CANARY-SAID of user-canary-quoting with password-canary-right and key-canary-1"

CHANGED = [f"changed-{number}" for number in range(1, 6)]
HALVES = [f"halves-{number}" for number in range(1, 4)]

#: What ends in a dead letter: steps → queue, code, requests until then. Ladders have two rungs here, and one long wait
#: is all there is (`max_waits`): two requests are a wait and its one try, four a ladder before that.
DEAD = {
    "do-not-retry": ((NEVER,), DeadLetterQueue.DO_NOT_RETRY, "E401", 1),
    "quoting": ((QUOTING,), DeadLetterQueue.DO_NOT_RETRY, "E401", 1),
    "after-notification": ((NOTIFIED,), DeadLetterQueue.AFTER_NOTIFICATION, "E203", 1),
    "waited-in-vain": ((WAIT,), DeadLetterQueue.RETRIES_EXHAUSTED, "E202", 2),
    "climbed-in-vain": ((IMMEDIATELY,), DeadLetterQueue.RETRIES_EXHAUSTED, "E201", 4),
    "unknown-type": (("error:E299:SOMETHING_NEW",), DeadLetterQueue.RETRIES_EXHAUSTED, "E299", 2),
    "missing-type": (("error:E299:null",), DeadLetterQueue.RETRIES_EXHAUSTED, "E299", 2),
    "no-error-at-all": (("error:null",), DeadLetterQueue.RETRIES_EXHAUSTED, "UNKNOWN", 2),
    "http-404": (("http:404",), DeadLetterQueue.DO_NOT_RETRY, "HTTP_404", 4),
    "http-400": (("http:400:no",), DeadLetterQueue.DO_NOT_RETRY, "HTTP_400", 4),
    "http-400-with-type": (("http:400",), DeadLetterQueue.DO_NOT_RETRY, "P002", 1),
    "http-504": (("http:504",), DeadLetterQueue.RETRIES_EXHAUSTED, "HTTP_504", 4),
    "malformed": (("malformed",), DeadLetterQueue.BAD_ANSWER, "UNREADABLE", 4),
    "other-schema": (("schema",), DeadLetterQueue.BAD_ANSWER, "UNREADABLE", 4),
    "other-currency": ((f"ok:{AMOUNT}:USD",), DeadLetterQueue.BAD_ANSWER, "FOREIGN", 1),
    "other-account-id": ((OK, "foreign"), DeadLetterQueue.BAD_ANSWER, "FOREIGN", 2),
}
#: What blocks the login: step → which credential, code.
BLOCKED = {
    "e101": ("error:E101:DO_NOT_RETRY", "bank", "E101"),
    "e150-retry": ("error:E150:RETRY_IMMEDIATELY", "bank", "E150"),
    "a000": ("error:A000:RETRY_IMMEDIATELY", "key", "A000"),
    "http-401": ("http:401", "key", "HTTP_401"),
    "bearer-a000": ("error:A000:DO_NOT_RETRY", "key", "A000"),
}
#: What is published: steps → how each attempt ended.
PUBLISHED = {
    "plain": ((OK,), ["1 ok"]),
    "bearer": ((OK,), ["1 ok"]),
    "immediately": ((IMMEDIATELY, OK), ["1 E201", "2 ok"]),
    "immediately-thrice": ((*[IMMEDIATELY] * 3, OK), ["1 E201", "2 E201", "3 E201", "4 ok"]),
    "http-500": (("http:500", OK), ["1 HTTP_500", "2 ok"]),
    "dropped": (("drop", OK), ["1 CONNECTION", "2 ok"]),
    "one-bad-deploy": ((*["malformed"] * 3, OK), [*(f"{n} UNREADABLE" for n in (1, 2, 3)), "4 ok"]),
    "exact": (("ok:12345678901234567.89",), ["1 ok"]),
    "null-data": (("no-data",), ["1 ok"]),
    "empty-balance": (("empty",), ["1 ok"]),
}

ACCOUNTS = [
    *(Account(alias, steps, every="2s" if len(steps) > 1 else "300d") for alias, (steps, *_) in DEAD.items()),
    *(Account(alias, (step,)) for alias, (step, *_) in BLOCKED.items()),
    *(Account(alias, steps) for alias, (steps, _) in PUBLISHED.items()),
    Account("waits", (WAIT, OK), every="2s"),
    Account("repeats", ({"behaviour": "ok", "amount": AMOUNT, "operation_id": "one-and-the-same"},), every="2s"),
    Account("redriven", (NEVER, OK)),
    Account("released", (NOTIFIED, OK)),
    Account("unblocked-1", ("error:E101:DO_NOT_RETRY", OK), login="unblocked"),
    Account("unblocked-2", login="unblocked"),
    *(Account(alias, (IMMEDIATELY, OK), login="changed") for alias in CHANGED),
    *(Account(alias, every="2s", login="halves") for alias in HALVES),
]
ACCOUNTS = [
    Account("quoting", (QUOTING,), number="NUMBER-CANARY-SAID") if a.alias == "quoting" else a for a in ACCOUNTS
]


class Town(Machine):
    """Every scenario at once. Of the workers `old` and `bare` only `bare` gets the right log-on of halves."""

    old: Process
    bare: Process
    ears: PubSub
    letters_at_first: dict[str, tuple[DeadLetterQueue, JsonObject]]

    def open(self) -> None:
        """Start everything. Two log-ons fail at the old worker: one is then mended for both, one for the other only."""
        for login in ("changed", "halves"):
            self.sandbox.set_log_on(f"user-canary-{login}", credential(login))
            for directory in ("old", "new"):
                write_secret(self.directory / directory, login, credential(login, WRONG))
        self.ears = self.store.pubsub()
        self.ears.psubscribe("*")
        self.beat()
        self.old = self.worker("old", BALANCES_SECRETS_DIR=str(self.directory / "old"))
        self.kick_scheduled(*CHANGED, *HALVES)
        for alias in (*CHANGED, *HALVES):
            self.until_state(alias, "blocked scheduled")
        self.letters_at_first = {login: self.letter(f"{login}-1") for login in ("changed", "halves")}
        self.mend("changed", "old", "new")
        self.mend("halves", "new")
        self.bare = self.worker("bare", "--loglevel", "INFO", BALANCES_SECRETS_DIR=str(self.directory / "new"))
        self.kick_scheduled(*(alias for alias in self.accounts if alias not in (*CHANGED, *HALVES)))

    def mend(self, login: str, *workers: str) -> None:
        """Give these workers the login's right log-on."""
        for directory in workers:
            write_secret(self.directory / directory, login, credential(login))

    def kick_scheduled(self, *aliases: str) -> None:
        """Make accounts due now, but for those which were due already."""
        for alias in aliases:
            self.timetable.poll(alias)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with ExitStack() as stack:
        town = stack.enter_context(
            Town(
                tmp_path_factory.mktemp("town"),
                ACCOUNTS,
                retry={"max_waits": 1},
                bearer=("bearer", "bearer-a000"),
                own_keys=("a000", "http-401"),
            )
        )
        town.open()
        stack.callback(town.ears.close)
        yield town


@pytest.fixture
def town(opened: Town) -> Iterator[Town]:
    yield opened
    opened.show_logs()


def gaps(machine: Machine, alias: str) -> list[float]:
    """Seconds from each answer to the next request."""
    asked = machine.requests(alias)
    return [started_at(after) - before["ended_at"] for before, after in pairwise(asked)]


def countdowns(town: Town, alias: str) -> list[float]:
    """Seconds that each failure of the account was decided to wait, in order, as the workers tell."""
    told = [*town.old.said("failed", account=alias), *town.bare.said("failed", account=alias)]
    return [
        entry["countdown_s"] for entry in sorted(told, key=lambda entry: entry["attempt"]) if "countdown_s" in entry
    ]


# --------------------------------------------------------------------------------------- where each answer leads


@pytest.mark.parametrize("alias", PUBLISHED)
def test_an_answer_is_published_once_under_the_poll_that_asked_first(town: Town, alias: str) -> None:
    entries = town.until_entries(alias, 1)
    town.until_state(alias, "scheduled")
    _, outcomes = PUBLISHED[alias]
    assert town.outcomes(alias) == outcomes
    asked = town.requests(alias)
    assert len(asked) == len(outcomes)
    assert [entry["operation_id"] for entry in entries] == [asked[-1]["operation_id"]]
    polls = {line.split()[1] for line in town.timetable.history(alias)}
    assert polls == {str(entries[0]["poll"])}, "a retry keeps the id of its poll"
    assert not entries[0]["late"]


def test_no_data_is_published_as_no_balances_and_is_no_error(town: Town) -> None:
    for alias in ("null-data", "empty-balance"):
        [entry] = town.until_entries(alias, 1)
        assert entry["balances"] == []


def test_an_amount_arrives_digit_by_digit(town: Town) -> None:
    [entry] = town.until_entries("exact", 1)
    assert entry["balances"][0]["amount"] == "12345678901234567.89"


def test_a_spent_ladder_ends_in_the_long_wait_after_which_there_is_one_try(town: Town) -> None:
    for alias in ("immediately-thrice", "one-bad-deploy"):
        town.until_entries(alias, 1)
        *_, wait = gaps(town, alias)
        assert wait >= WAIT_S
        # What was decided, because how long a pause turned out decides the load of the machine, too.
        short, longer, wait = countdowns(town, alias)
        assert 0.3 <= short < 0.6 <= longer < 1.0 < WAIT_S <= wait


def test_nothing_asks_during_the_long_wait_although_the_account_is_polled_every_two_seconds(town: Town) -> None:
    first, *_ = town.until_entries("waits", 2)
    assert gaps(town, "waits")[0] >= WAIT_S
    assert first["operation_id"] == town.requests("waits")[1]["operation_id"]


def test_an_operation_that_the_bank_answers_with_again_is_published_once(town: Town) -> None:
    town.requests("repeats", 3)
    town.settle_down("repeats")
    assert [entry["operation_id"] for entry in town.entries("repeats")] == ["one-and-the-same"]
    assert set(town.outcomes("repeats")) == {"1 ok"}


@pytest.mark.parametrize("alias", DEAD)
def test_a_failure_ends_in_its_dead_letter_queue(town: Town, alias: str) -> None:
    steps, queue, code, requests = DEAD[alias]
    account = town.until_state(alias, "suspended", "parked")
    assert account["state"] == ("parked" if queue is DeadLetterQueue.AFTER_NOTIFICATION else "suspended")
    found, reason = town.letter(alias)
    assert (found, reason["code"]) == (queue, code)
    asked = town.requests(alias)
    assert len(asked) == requests
    assert len(town.entries(alias)) == sum(request["behaviour"] == "ok" for request in asked) - (
        code == "FOREIGN" and requests == 1
    )
    if requests > 1 and OK not in steps:
        assert gaps(town, alias)[-1] >= WAIT_S
        *short, wait = countdowns(town, alias)
        assert wait >= WAIT_S > max(short, default=0.0)
    [told] = town.entries(alias, "account.suspended.v1")
    assert (told["state"], told["code"], told["queue"]) == (account["state"], code, queue)


def test_a_type_that_nobody_knows_is_told_as_contract_drift(town: Town) -> None:
    for alias in ("unknown-type", "missing-type", "no-error-at-all"):
        town.until_state(alias, "suspended")
        said = town.old.said("failed", account=alias) + town.bare.said("failed", account=alias)
        assert [entry["drift"] for entry in said] == [True, True]
    town.until_state("waited-in-vain", "suspended")
    assert not (town.old.said("failed", drift=True, account="waited-in-vain"))


def test_what_the_bank_quotes_of_our_secrets_reaches_no_letter(town: Town) -> None:
    town.until_state("quoting", "suspended")
    _, reason = town.letter("quoting")
    assert reason["description"] == "# of # with # and #"


@pytest.mark.parametrize("alias", BLOCKED)
def test_a_failed_credential_blocks_its_login_at_the_first_answer(town: Town, alias: str) -> None:
    _, kind, code = BLOCKED[alias]
    town.until_state(alias, "blocked scheduled")
    assert town.login(alias)["blocked"] == kind
    queue, reason = town.letter(alias)
    assert (queue, reason["code"], reason["accounts"]) == (DeadLetterQueue.DO_NOT_RETRY, code, [alias])
    assert len(town.requests(alias)) == 1
    assert town.entries(alias) == []


# ------------------------------------------------------------------------------------------- what brings them back


def test_a_redriven_account_comes_back_without_its_letter(town: Town) -> None:
    town.until_state("redriven", "suspended")
    done = town.balances("dead", "redrive", "redriven", "--json")
    assert done.returncode == 0, done.stderr
    town.until_entries("redriven", 1)
    with pytest.raises(AssertionError, match="no dead letter"):
        town.letter("redriven")
    assert [event["by"] for event in town.entries("redriven", "account.resumed.v1")] == ["redrive"]


def test_a_released_account_comes_back_without_its_letter(town: Town) -> None:
    town.until_state("released", "parked")
    done = town.balances("release", "released", "--json")
    assert done.returncode == 0, done.stderr
    town.until_entries("released", 1)
    with pytest.raises(AssertionError, match="no dead letter"):
        town.letter("released")
    assert [event["by"] for event in town.entries("released", "account.resumed.v1")] == ["release"]


def test_an_unblocked_login_comes_back_with_all_its_accounts(town: Town) -> None:
    town.until_state("unblocked-1", "blocked scheduled")
    asked_before = len(town.requests("unblocked-1"))
    done = town.balances("unblock", "unblocked", "--json")
    assert done.returncode == 0, done.stderr
    town.until_state("unblocked-1", "scheduled")
    town.kick_scheduled("unblocked-1", "unblocked-2")
    town.until_entries("unblocked-1", 1)
    town.until_entries("unblocked-2", 1)
    assert asked_before == 1
    with pytest.raises(AssertionError, match="no dead letter"):
        town.letter("unblocked-1")


# ------------------------------------------------------------------------------------------------- dead letters


def test_a_bare_worker_leaves_dead_letters_alone(town: Town) -> None:
    for alias in DEAD:
        town.until_state(alias, "suspended", "parked")

    def letters() -> dict[str, list[str]]:
        """All that lies in the queues, but for the login that blocks and unblocks."""
        return {
            queue: [
                text for text in town.store.lrange(queue, 0, -1) if '"halves' not in text and '"changed' not in text
            ]
            for queue in DeadLetterQueue
        }

    before = letters()
    assert all(before.values())
    settled = len(town.bare.said("settled"))
    count = len(town.entries("plain"))

    def is_polled_by_the_bare_worker() -> bool:
        town.kick_scheduled("plain")
        return len(town.bare.said("settled")) > settled + 2

    wait_until(is_polled_by_the_bare_worker, PATIENCE_S, "polls of the bare worker")
    assert letters() == before
    assert len(town.entries("plain")) > count
    assert each_once(town.entries())


# ------------------------------------------------------------------------------------------------------ the clock


def test_nothing_asks_for_four_hours_and_then_exactly_one_request_goes_out(tmp_path: Path) -> None:
    accounts = [
        Account("patient", (WAIT,), every="2s"),
        Account("parked", (NOTIFIED,), every="2s"),
        Account("suspended", (NEVER,), every="2s"),
    ]
    with Machine(tmp_path, accounts, retry={"wait": "4h"}) as machine:

        def pass_time(delta: timedelta) -> None:
            """Move the clock, and see beat look at the timetable with the new time."""
            machine.move_clock(delta.total_seconds())
            now_ms = machine.timetable.now_ms()
            wait_until(lambda: int(machine.store.hget("config", "claimed_at")) >= now_ms, PATIENCE_S, "a claim")

        def is_left_alone(times: int) -> bool:
            """Not asked more often, and nothing on its way: a claim would have changed the state at once."""
            return machine.state("patient") == "waiting" and len(machine.requests("patient", ended=False)) == times

        machine.beat()
        machine.worker()
        waiting = machine.until_state("patient", "waiting")
        machine.until_state("parked", "parked")
        machine.until_state("suspended", "suspended")
        wait_s = (int(waiting["due"]) - int(waiting["last_at"])) / 1000
        assert FOUR_HOURS_S <= wait_s <= FOUR_HOURS_S * 1.06
        for _ in range(2):
            pass_time(timedelta(hours=1, minutes=59))
            assert is_left_alone(1)
        left_ms = int(waiting["due"]) - machine.timetable.now_ms()
        pass_time(timedelta(milliseconds=left_ms - 5000))
        assert is_left_alone(1)
        pass_time(timedelta(seconds=5))
        machine.requests("patient", 2)
        again = machine.until_state("patient", "waiting")
        assert (again["waits"], again["poll"]) == ("2", waiting["poll"])
        assert int(again["due"]) - int(again["last_at"]) >= FOUR_HOURS_S * 1000
        pass_time(timedelta(hours=3, minutes=59))
        assert is_left_alone(2)
        assert [len(machine.requests(alias, ended=False)) for alias in ("parked", "suspended")] == [1, 1]


# ---------------------------------------------------------------------------------------------------- who waits


def dispatched_ms(machine: Machine, accounts: Iterable[Account]) -> list[int]:
    """When each of them was sent out last: the number of its poll."""
    return [int(machine.account(account.alias)["poll"]) for account in accounts]


def test_two_logins_with_five_hundred_accounts_each_delay_no_other_and_have_one_request_at_a_time(
    tmp_path: Path,
) -> None:
    logins = ("large-1", "large-2")
    large = [Account(f"{login}-{number}", every="1h", login=login) for login in logins for number in range(500)]
    small = [Account(f"small-{number:02}", every="1h") for number in range(20)]
    with Machine(tmp_path, [*large, *small], latency="200ms") as machine:
        machine.beat()
        machine.beat("second-beat")
        machine.worker(BALANCES_CONCURRENCY="32")  # room for all that is due at once
        first = max((request["seq"] for request in machine.sandbox.requests()), default=0)
        machine.move_clock(3600)
        moved_ms = machine.timetable.now_ms()
        numbers = {machine.number(account.alias) for account in small}

        def served() -> set[str]:
            return {request["number"] for request in machine.sandbox.requests(first)} & numbers

        wait_until(lambda: served() == numbers, PATIENCE_S, "a request for each of the twenty")
        asked = machine.sandbox.requests(first)
        last_small = max(request["seq"] for request in asked if request["number"] in numbers)
        last_small_ms = max(dispatched_ms(machine, small))
        for login in logins:
            own = [account for account in large if account.login == login]
            earlier = [moment for moment in dispatched_ms(machine, own) if moved_ms <= moment < last_small_ms]
            assert len(earlier) <= 1, "the twenty waited for the two"
        machine.sandbox.wait_for(MORE, since=last_small)
        stats = machine.sandbox.stats()
        assert len(stats["log_ons"]) == 22
        assert stats["overlaps"] == 0
        assert {count["max_in_flight"] for count in stats["log_ons"].values()} == {1}
        since = [request["log_on"] for request in machine.sandbox.requests(last_small)]
        for login in logins:
            assert since.count(machine.log_on(login)) > MORE / 3, "one of the two waits for the other"


# ------------------------------------------------------------------------------------------ credentials that fail


def test_a_bad_log_on_costs_one_request_for_all_accounts_and_a_changed_secret_brings_them_back(town: Town) -> None:
    """With a good log-on each account fails once more at first: until one has succeeded, no other is asked."""
    queue, reason = town.letters_at_first["changed"]
    assert (queue, reason["code"], reason["accounts"]) == (DeadLetterQueue.DO_NOT_RETRY, "E101", CHANGED)
    wait_until(lambda: all(town.entries(alias) for alias in CHANGED), NEW_SECRET_S, "a balance of each")
    asked = [request for request in town.sandbox.requests() if request["log_on"] == town.log_on("changed")]
    assert [request["behaviour"] for request in asked[:3]] == ["error:E101:DO_NOT_RETRY", IMMEDIATELY, "ok"]
    assert asked[1]["number"] == asked[2]["number"], "another account was asked before the first one had succeeded"
    assert len({request["number"] for request in asked[1:]}) == len(CHANGED)
    assert town.sandbox.log_ons()["user-canary-changed"]["wrong"] == 1
    with pytest.raises(AssertionError, match="no dead letter"):
        town.letter(CHANGED[0])


def test_a_failed_log_on_is_sent_once_though_one_worker_still_has_it(town: Town) -> None:
    def both_had_their_turn() -> bool:
        is_tempted = town.old.said("credential refused", login="halves", credential="bank")
        return bool(is_tempted) and all(len(town.entries(alias)) > 1 for alias in HALVES)

    wait_until(both_had_their_turn, NEW_SECRET_S, "balances, and polls that the old worker refused to begin")
    for alias in HALVES:
        town.timetable.pause(alias)
    asked = [request for request in town.sandbox.requests() if request["log_on"] == town.log_on("halves")]
    sent = [request["credential_fingerprint"] for request in asked]
    assert sent.count(fingerprint(credential("halves", WRONG))) == 1
    assert sent.count(fingerprint(credential("halves"))) == len(sent) - 1 > len(HALVES)
    assert not town.old.said("settled", login="halves")


# ---------------------------------------------------------------------------------------------------- what leaks


def test_no_secret_number_or_amount_is_anywhere_but_where_it_belongs(town: Town) -> None:
    """After all of the above: logs, everything that was ever written to Redis, every Celery event and message."""
    for alias in DEAD:
        town.until_state(alias, "suspended", "parked")
    for alias in PUBLISHED:
        town.until_entries(alias, 1)
    for process in town.processes:
        assert canaries_in(process.text()) == [], process.name
    found = set()
    for command in town.written():
        for place, kinds in leaks(command):
            assert kinds <= MAY_HOLD.get(place, set()), (place, kinds)
            found |= kinds
    assert found == {"an account number", "an amount"}, "what may be somewhere is found there: the search works"
    town.store.publish(NO_MORE, "")
    heard = list(messages(town.ears))
    assert sum("task-succeeded" in text for text in heard) > 5, "the workers' events"
    assert canaries_in("\n".join(heard)) == []


#: A channel of this test's own: what comes after a message on it is not waited for.
NO_MORE = "no more"


def messages(ears: PubSub) -> Iterator[str]:
    """Everything that was broadcast, Celery's events and remote control; kombu writes a body in base64."""
    while (message := ears.get_message(timeout=PATIENCE_S)) is not None and message["channel"] != NO_MORE:
        if message["type"] == "pmessage":
            sent = json.loads(message["data"])
            yield f"{sent['headers']} {sent['properties']} {b64decode(sent['body']).decode()}"


#: Where design.md lets them stand.
MAY_HOLD = {
    "account:… definition": {"an account number"},
    "stream": {"an amount"},
    "latest": {"an amount"},
}


def leaks(command: list[bytes]) -> Iterator[tuple[str, set[str]]]:
    """Where in a command which kinds of secrets stand."""
    name, key = command[0].upper(), command[1].decode() if len(command) > 1 else ""
    place = {b"XADD": "stream"}.get(name, key) if key == "balances" else key
    for before, part in pairwise(command):
        kinds = set(canaries_in(part))
        if kinds:
            is_definition = key.startswith("account:") and before == b"definition"
            yield "account:… definition" if is_definition else place, kinds
