"""Every hostile answer, from a server that really sends it, through a worker's whole path onto a real timetable.

Each ends as the right decision, with what was wrong named; publishes nothing, shows nothing, disturbs no other login,
holds little memory, and leaves the worker able to poll.
"""

from __future__ import annotations

import runpy
import ssl
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import redis
from hostile import Hostile, Peer, certificate
from hostile_answers import OK, ROWS, Row, answering
from poller import Poller
from servers import ROOT
from structlog.testing import capture_logs

from worker.accounts import Retry as Ladders
from worker.errors import Kind, Outcome
from worker.policy import Block, Counters, DeadLetter, Publish, Retry, decide
from worker.transport import BODY_LIMIT

NUMBER, TOKEN = "11887755", "canary-token"
ACCOUNTS = """
[limits]
request_deadline = "{deadline}"

[logins.acme]
scheme = "bearer"

[logins.globex]
scheme = "bearer"

[defaults]
institution = "bancosecurity.cl"
currency = "CLP"
mode = "sync"

[[accounts]]
alias = "a"
number = "11887755"
login = "acme"

[[accounts]]
alias = "b"
number = "22887755"
login = "globex"
"""
#: The salt of the fingerprints: the same for all rows, so that scrypt runs once.
SALT = "00" * 16
#: Of all that Python holds for one answer: the largest body, read, inflated, decoded and parsed.
MEMORY = 10 * BODY_LIMIT
GOOD = OK.replace(b"6baf6c19", b"good")


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


class Scene:
    """One row's server, and a second host that nobody may ask; `poller` has polled what the row wants polled before."""

    def __init__(self, row: Row, store: redis.Redis, pem: Path) -> None:
        self.row = row
        self.scripts = [*map(answering, (*row.before, *row.other)), row.script]
        self.server = Hostile(self._serve, _tls(pem) if row.tls else None)
        self.elsewhere = Hostile(answering(OK))
        self.server.elsewhere = self.elsewhere.url
        store.set("salt", SALT)
        accounts = ACCOUNTS.format(deadline="1s" if row.is_slow else "30s")
        verify = str(pem) if row.tls and "nobody" not in row.sent else True
        secrets = {"BALANCES_SECRET_ACME_TOKEN": TOKEN, "BALANCES_SECRET_GLOBEX_TOKEN": "another"}
        url = row.url.format(port=self.server.port)
        self.poller = Poller(store, accounts, url, secrets, verify=verify)

    def _serve(self, peer: Peer) -> None:
        (self.scripts.pop(0) if self.scripts else answering(GOOD))(peer)

    def prepare(self) -> None:
        for alias, answers in (("a", self.row.before), ("b", self.row.other)):
            for _ in answers:
                assert self.poller.poll(alias) is None

    def watched_poll(self) -> tuple[BaseException | None, int, list[Any]]:
        """Poll; returns what was raised, the most memory held meanwhile, and the log."""
        tracemalloc.start()
        try:
            with capture_logs() as logs:
                end = self.poller.poll("a")
            return end, tracemalloc.get_traced_memory()[1], logs
        finally:
            tracemalloc.stop()

    def others(self) -> dict[str, object]:
        """All that Redis holds of the other login."""
        held = self.poller.world.snapshot()
        return {key: value for key, value in held.items() if key.endswith((":b", ":globex", ":b:1"))}


def _tls(pem: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.sent)
def test_a_hostile_answer(row: Row, store: redis.Redis, pem: Path) -> None:
    scene = Scene(row, store, pem)
    with scene.elsewhere, scene.server:
        scene.prepare()
        earlier, asked, others = scene.poller.published(), len(scene.server.requests), scene.others()
        end, memory, logs = scene.watched_poll()

        check_decision(row, scene, end, logs)
        check_published(row, scene, len(earlier))
        assert scene.others() == others
        assert scene.elsewhere.connections == 0
        assert len(scene.server.requests) - asked <= 1
        assert memory < MEMORY
        assert TOKEN not in scene.poller.everything() + repr(logs) + repr(end)
        assert NUMBER not in repr(logs) + repr(end)
        check_worker_goes_on(row, scene)


def check_decision(row: Row, scene: Scene, end: BaseException | None, logs: list[Any]) -> None:
    """What was decided stands in the log, in the timetable, and in what Flower is shown."""
    account, login = scene.poller.world.account("a"), scene.poller.world.login("acme")
    outcome = Outcome(row.kind, row.expected_code, row.type)
    decision = decide(outcome, Counters(), 0.0, Ladders())
    [entry] = [entry for entry in logs if entry["event"] in {"failed", "settled"}]
    assert ("blocked" in login) == isinstance(decision, Block)
    if isinstance(decision, Publish):
        assert (end, account["state"], entry["event"]) == (None, "scheduled", "settled")
        assert entry["unknown_fields"] == list(row.drift)
        return
    assert (entry["code"], entry["type"]) == (row.expected_code, row.type)
    assert row.named in entry["description"]
    assert entry["decision"] == type(decision).__name__
    assert row.expected_code in repr(end)
    assert account["last_outcome"] == row.expected_code
    match decision:
        case Retry(countdown, counters):
            assert (account["state"], int(account["tries"]), int(account["waits"])) == (
                "waiting",
                counters.tries,
                counters.waits,
            )
            assert entry["countdown_s"] >= countdown.total_seconds()
        case DeadLetter(queue):
            assert (account["state"], account["queue"]) == ("suspended", queue)
        case Block(credential):
            assert login["blocked"] == credential


def check_published(row: Row, scene: Scene, earlier: int) -> None:
    new = [fields for fields in scene.poller.published()[earlier:] if fields["type"] == "balance.observed.v1"]
    assert len(new) == row.published
    for fields, amount in zip(new, row.amounts, strict=bool(row.amounts)):
        assert f'"amount":"{amount}"' in fields["data"]


def check_worker_goes_on(row: Row, scene: Scene) -> None:
    """The same thread polls the other login, where the server is one that it can talk to."""
    if row.url.startswith("https"):
        return
    before = len(scene.poller.published())
    assert scene.poller.poll("b") is None
    assert len(scene.poller.published()) == before + 1


def test_every_kind_of_answer_is_tried() -> None:
    """What only arises without an answer, or after a good one, is tried elsewhere."""
    ours = {Kind.LOST, Kind.LIFESPAN_EXCEEDED, Kind.LOG_ON_REFUSED, Kind.KEY_REFUSED}
    assert {row.kind for row in ROWS} == set(Kind) - ours
    assert len({row.sent for row in ROWS}) == len(ROWS)


def test_the_table_in_security_md_is_that_of_the_rows() -> None:
    """Run `.venv/bin/python docs/hostile_table.py` where it is not."""
    maker = runpy.run_path(str(ROOT / "docs" / "hostile_table.py"))
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert page == maker["filled"](page)
