"""Callback mode end to end, in every order that a 202, a callback, a deadline and a death can come: real processes.

Khipu's imitation calls our webhook back; each account is on a login of its own unless its test says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from machine import OK, PATIENCE_S, Account, Machine, Process, canaries_in, each_once
from servers import wait_until

from worker.policy import DeadLetterQueue
from worker.store import free_port
from worker.timetable import ANSWERS, SETTLE_AGAIN_MS

#: So short a LifeSpan, with the grace below, that a test may wait for the deadline.
SHORT = "life-span 1s Z"
ERRORS = {
    "error-immediately": (["error:E201:RETRY_IMMEDIATELY", "ok"], "scheduled"),
    "error-wait": (["error:E202:WAIT_4_HOURS_BEFORE_RETRY"], "waiting"),
    "error-final": (["error:E401:DO_NOT_RETRY"], "suspended"),
    "error-notification": (["error:E203:RETRY_AFTER_NOTIFICATION"], "parked"),
    "error-unknown": (["error:E201:RETRY_TOMORROW"], "waiting"),
    "error-log-on": (["error:E101:RETRY_IMMEDIATELY"], "blocked scheduled"),
    "error-null": (["error:null"], "waiting"),
    "unreadable": (["schema", "ok"], "scheduled"),
    "foreign": (["ok", "foreign"], "scheduled"),
}
ACCOUNTS = [
    Account("on-time", ("ok@300ms",)),
    Account("early", ("ok | early",)),
    Account("twice", ("ok | twice at once",)),
    Account("other-operation", ("ok | other-operation",)),
    Account("wrong-token", (f"ok | wrong-token | {SHORT}", "ok")),
    Account("late", (f"{OK} | late 3s | {SHORT}", "ok")),
    Account("never", (f"ok | never | {SHORT}",)),
    Account("ambiguous", ("ok@300ms | but http:504",)),
    Account("ambiguous-drop", ("ok@300ms | but drop",)),
    Account("paused-meanwhile", ("ok | never",)),
    Account("blocked-meanwhile", ("ok | never",)),
    Account("removed-meanwhile", ("ok | never",)),
    Account("redefined-meanwhile", ("ok | never", "ok")),
    Account("suspended-meanwhile", (f"ok | never | {SHORT}", "error:E401:DO_NOT_RETRY")),
    Account("worker-dies", ("ok@1s",)),
    Account("webhook-dies", ("ok@300ms",)),
    Account("message-lost", ("ok@300ms",)),
    Account("holding", ("ok | never",), login="shared"),
    Account("held", ("ok",), login="shared"),
    *(Account(alias, tuple(steps)) for alias, (steps, _) in ERRORS.items()),
]


class Site(Machine):
    """A machine with a webhook, a worker for polls and one for answers, as in the Procfile."""

    port = free_port()

    def env(self) -> dict[str, str]:
        return {
            **super().env(),
            "BALANCES_CALLBACK_URL": f"http://127.0.0.1:{self.port}",
            "BALANCES_WEBHOOK_PORT": str(self.port),
        }

    def stand_up(self) -> None:
        """Whoever died in a test is started again before the next."""
        self.trap_path.unlink(missing_ok=True)
        if not self.is_up("beat"):
            self.beat()
        if not self.is_up("worker"):
            self.worker("worker", "-E", "--loglevel", "INFO", "-Q", "balances.polls", traps=True)
        if not self.is_up("settler"):
            self.settler()
        if not self.is_up("webhook"):
            self.webhook()

    def is_up(self, name: str) -> bool:
        return any(process.is_alive for process in self.processes if process.name == name)

    def running(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name and process.is_alive)

    def settler(self) -> Process:
        return self.begin_worker("settler", "-E", "--loglevel", "INFO", "-Q", ANSWERS, "-c", "2")

    def webhook(self) -> Process:
        webhook = self.start("webhook", "-m", "worker.webhook")
        wait_until(lambda: self.answers(webhook), PATIENCE_S, "a webhook")
        return webhook

    def answers(self, webhook: Process) -> bool:
        assert webhook.is_alive, webhook.text()
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/healthz", timeout=5).ok
        except requests.ConnectionError:
            return False

    def await_callback(self, alias: str) -> None:
        """Poll the account and come to where its callback is awaited."""
        self.kick(alias)
        self.until_state(alias, "awaiting")

    def send(self, alias: str) -> None:
        """The callback that was held back comes now."""
        assert self.sandbox.send_callbacks(self.number(alias)) == 1

    def until_settled(self, alias: str, count: int = 1) -> list[dict]:
        entries = self.until_entries(alias, count)
        assert each_once(entries)
        wait_until(lambda: not self.store.exists("answers"), PATIENCE_S, "no answer that is not settled")
        return entries


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = {"callback_grace": "1s", "login_hold": "2s", "life_span": "2m"}
    with Site(
        tmp_path_factory.mktemp("callbacks"), ACCOUNTS, limits=limits, retry={"max_waits": 1, "wait": "2s"}
    ) as site:
        yield site


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    whole_site.stand_up()
    yield whole_site
    whole_site.show_logs()


@pytest.mark.parametrize("alias", ["on-time", "early", "twice", "other-operation", "ambiguous", "ambiguous-drop"])
def test_one_request_brings_one_balance(site: Site, alias: str) -> None:
    site.kick(alias)
    (entry,) = site.until_settled(alias)
    site.until_state(alias, "scheduled")
    assert (entry["late"], entry["changed"]) == (False, True)
    assert len(site.requests(alias)) == 1
    assert site.outcomes(alias) == ["1 ok"]


@pytest.mark.parametrize("alias", ERRORS)
def test_an_error_in_the_callback_ends_like_any_other(site: Site, alias: str) -> None:
    state = ERRORS[alias][1]
    site.kick(alias)
    site.until_entries(alias, 1 if state == "scheduled" else 0)
    site.until_state(alias, state)
    if alias == "foreign":
        site.kick(alias)
        site.until_state(alias, "suspended")
        assert site.letter(alias)[0] == DeadLetterQueue.BAD_ANSWER
    wait_until(lambda: not site.store.exists("answers"), PATIENCE_S, "no answer that is not settled")


def test_a_callback_after_the_deadline_is_late_and_disturbs_nothing(site: Site) -> None:
    site.kick("late")
    late = next(iter(e for e in site.until_settled("late", 2) if e["late"]))
    newer = next(iter(e for e in site.entries("late") if not e["late"]))
    assert late["changed"] is False
    assert site.timetable.latest()["late"].find(newer["operation_id"]) > 0
    assert site.outcomes("late")[0] == "1 LIFESPAN_EXCEEDED"
    site.until_state("late", "scheduled")


def test_a_callback_with_a_wrong_token_is_nobodys(site: Site) -> None:
    site.kick("wrong-token")
    site.until_settled("wrong-token")
    assert site.outcomes("wrong-token") == ["1 LIFESPAN_EXCEEDED", "2 ok"]


def test_without_any_callback_retries_are_bounded(site: Site) -> None:
    site.kick("never")
    site.until_state("never", "suspended")
    assert site.letter("never")[0] == DeadLetterQueue.RETRIES_EXHAUSTED
    assert len(site.requests("never")) == 4, "two rungs of the ladder, one wait, one last try"


def test_a_paused_account_is_settled_and_stays_paused(site: Site) -> None:
    site.await_callback("paused-meanwhile")
    assert site.timetable.pause("paused-meanwhile") is None
    site.send("paused-meanwhile")
    site.until_settled("paused-meanwhile")
    site.until_state("paused-meanwhile", "paused scheduled")


def test_an_account_of_a_blocked_login_is_settled(site: Site) -> None:
    site.await_callback("blocked-meanwhile")
    site.store.hset("login:blocked-meanwhile", mapping={"blocked": "bank", "fingerprint": "x"})
    site.send("blocked-meanwhile")
    (entry,) = site.until_settled("blocked-meanwhile")
    site.until_state("blocked-meanwhile", "blocked scheduled")
    assert entry["late"] is False


def test_a_suspended_account_stays_suspended(site: Site) -> None:
    site.kick("suspended-meanwhile")
    site.until_state("suspended-meanwhile", "suspended")
    site.send("suspended-meanwhile")
    (entry,) = site.until_settled("suspended-meanwhile")
    assert entry["late"] is True
    assert site.state("suspended-meanwhile") == "suspended"


def test_removed_and_redefined_accounts_are_settled_late(site: Site) -> None:
    for alias in ("removed-meanwhile", "redefined-meanwhile"):
        site.await_callback(alias)
    removed, redefined = (site.accounts[alias] for alias in ("removed-meanwhile", "redefined-meanwhile"))
    del site.accounts["removed-meanwhile"]
    site.accounts["redefined-meanwhile"] = Account(
        "redefined-meanwhile", login="redefined-meanwhile", number="NUMBER-CANARY-X"
    )
    site.write_accounts()
    wait_until(lambda: site.account("removed-meanwhile")["state"] == "retired", PATIENCE_S)
    for account in (removed, redefined):
        site.sandbox.send_callbacks(account.number)
        (entry,) = site.until_settled(account.alias)
        assert entry["late"] is True
    assert not {"removed-meanwhile", "redefined-meanwhile"} & site.timetable.latest().keys()
    assert site.state("redefined-meanwhile") == "scheduled"


def test_the_other_accounts_of_a_login_wait_for_login_hold_and_no_longer(site: Site) -> None:
    site.await_callback("holding")
    site.kick("held")
    site.until_settled("held")
    assert site.state("holding") == "awaiting"
    (first,), (second,) = site.requests("holding", 1), site.requests("held", 1)
    assert second["started_at"] - first["started_at"] >= 2, "login_hold"
    site.send("holding")
    site.until_settled("holding")
    site.until_state("holding", "scheduled")


def test_a_worker_that_dies_between_the_202_and_accept_loses_nothing(site: Site) -> None:
    site.arm("answered", "worker-dies")
    site.kick("worker-dies")
    site.until_sprung()
    (entry,) = site.until_settled("worker-dies")
    site.until_state("worker-dies", "scheduled")
    assert entry["late"] is False
    assert len(site.requests("worker-dies")) == 1


def test_a_webhook_that_dies_between_store_and_2xx_is_called_again(site: Site) -> None:
    site.running("settler").kill()
    site.kick("webhook-dies")
    wait_until(lambda: site.store.exists("answers"), PATIENCE_S, "a stored answer")
    site.running("webhook").kill()
    site.webhook()
    site.settler()
    (callback,) = site.sandbox.wait_for_callbacks(1, number=site.number("webhook-dies"))
    site.until_settled("webhook-dies")
    assert callback["state"] == "acknowledged"


def test_a_settling_whose_message_was_lost_is_asked_for_again(site: Site) -> None:
    site.running("settler").kill()
    site.kick("message-lost")
    wait_until(lambda: site.store.llen(ANSWERS), PATIENCE_S, "a message")
    site.store.delete(ANSWERS)
    site.settler()
    site.move_clock(SETTLE_AGAIN_MS / 1000)
    (entry,) = site.until_settled("message-lost")
    assert entry["late"] is False


def test_no_canary_and_no_callback_token_is_in_any_log(site: Site) -> None:
    """The last test of this file: after everything above."""
    tokens = [key.removeprefix("callback:") for key in site.store.keys("callback:*")]
    assert tokens
    for process in site.processes:
        assert canaries_in(process.text()) == [], process.name
        assert "/callbacks/" not in process.text(), process.name
