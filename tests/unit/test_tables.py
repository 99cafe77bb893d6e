"""What operators see, as snapshots of a terminal with 80 columns; moments are local, and say so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from worker import tables
from worker.ops import AccountRow, AttemptRow, LetterRow, Reason, Story, iso
from worker.server import Finding

NOW = datetime(2026, 11, 22, 10, 33, 10, tzinfo=UTC)  # a Sunday


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal in Santiago: three hours behind UTC in November."""
    monkeypatch.setenv("TZ", "America/Santiago")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def shown(renderable: RenderableType, width: int = 80, *, terminal: bool = False) -> str:
    out = StringIO()
    Console(file=out, width=width, force_terminal=terminal, highlight=False, legacy_windows=False).print(renderable)
    lines = out.getvalue().splitlines()
    assert terminal or all(cell_len(line.rstrip()) <= width for line in lines), lines
    return "\n".join(line.rstrip() for line in lines)


def at(**delta: float) -> str:
    return iso(round((NOW + timedelta(**delta)).timestamp() * 1000))


def row(alias: str, state: str = "scheduled", *, due: float | None = None, ok: float | None = None) -> AccountRow:
    return AccountRow(
        alias=alias,
        institution="bancosecurity.cl",
        login=alias.partition("-")[0],
        state=state,
        attempt=1,
        poll=1795343565418,
        next_due=None if due is None else at(seconds=due),
        last_ok=None if ok is None else at(seconds=-ok),
        last_outcome="ok" if ok is not None else "E101",
        overdue=False,
    )


SANDBOX = [
    row("acme-operating", due=3, ok=6),
    row("acme-usd", "polling", ok=3700),
    row("hooli-operating", "blocked"),
    row("umbrella-savings", "suspended"),
    row("umbrella-operating", "parked"),
    replace(row("initech-operating", "waiting", due=4 * 3600 + 200), last_outcome="HTTP_504"),
    replace(row("wonka-uf", due=-90000, ok=200000), overdue=True),
    row("globex-reserve", "paused", ok=59),
]

AT_80 = """\
account             state      outcome   last balance  next due      at (UTC-3)
wonka-uf            overdue    ok        2 d ago       1 d ago       Sat 06:33
hooli-operating     blocked    E101      -             on unblock
umbrella-savings    suspended  E101      -             on redrive
umbrella-operating  parked     E101      -             on release
initech-operating   waiting    HTTP_504  -             in 4 h 3 min  11:36
acme-usd            polling    ok        1 h ago       now
globex-reserve      paused     ok        59 s ago      on resume
acme-operating      scheduled  ok        6 s ago       in 3 s        07:33"""

AT_60 = """\
account             state      outcome   next due
wonka-uf            overdue    ok        1 d ago
hooli-operating     blocked    E101      on unblock
umbrella-savings    suspended  E101      on redrive
umbrella-operating  parked     E101      on release
initech-operating   waiting    HTTP_504  in 4 h 3 min
acme-usd            polling    ok        now
globex-reserve      paused     ok        on resume
acme-operating      scheduled  ok        in 3 s"""


@pytest.mark.parametrize(("width", "text"), [(80, AT_80), (60, AT_60)])
def test_accounts_stand_by_trouble_and_no_alias_is_folded(width: int, text: str) -> None:
    assert shown(tables.accounts_table(SANDBOX, NOW), width) == text


def test_a_wide_terminal_has_logins_and_institutions_too() -> None:
    heading = shown(tables.accounts_table(SANDBOX, NOW), 140).splitlines()[0].split()
    assert heading[:4] == ["account", "login", "institution", "state"]


def test_an_alias_of_63_characters_stands_on_one_line() -> None:
    long = "a" * 63
    assert shown(tables.accounts_table([row(long, due=3)], NOW)).splitlines()[1] == f"{long}  scheduled"


def test_the_tally_counts_trouble_first() -> None:
    assert shown(tables.tally_rows(SANDBOX)) == (
        "8 accounts: 1 overdue, 1 blocked, 1 suspended, 1 parked, 1 waiting, 1 polling, 1\npaused, 1 scheduled"
    )
    assert shown(tables.tally({"scheduled": 1})) == "1 account: 1 scheduled"


def letter(alias: str | None, queue: str, code: str, description: str) -> LetterRow:
    when = at(minutes=-5)
    return LetterRow(alias, "hooli", f"balances.dead.{queue}", 7, code, "DO_NOT_RETRY", description, 1, when, when)


LETTERS = """\
account               code               what was said                 since
do-not-retry
  (login hooli)       E101               Bad credentials.              5 min ago
  umbrella-savings    E401               DO_NOT_RETRY                  5 min ago
retries-exhausted
  umbrella-operating  LIFESPAN_EXCEEDED  no callback in time, and      5 min ago
                                         three more words than fit"""


def test_letters_stand_queue_by_queue() -> None:
    letters = [
        letter(None, "do-not-retry", "E101", "Bad credentials."),
        letter("umbrella-savings", "do-not-retry", "E401", ""),
        letter(
            "umbrella-operating",
            "retries-exhausted",
            "LIFESPAN_EXCEEDED",
            "no callback in time, and three more words than fit",
        ),
    ]
    assert shown(tables.letters_table(letters, NOW)) == LETTERS
    assert shown(tables.letters_table([], NOW)) == "no dead letters"


def test_findings_wrap_between_words() -> None:
    text = shown(tables.findings_table([Finding("secrets", False, "login acme: " + "word " * 20)]))
    assert text.splitlines()[1].startswith("wrong  secrets  login acme: word")
    assert text.splitlines()[2].startswith(" " * 16 + "word")


BALANCES = """\
account         type               amount       as of (UTC-3)  fetched
acme-operating  ClosingAvailable      100  CLP  07:33          6 s ago
acme-operating  ClosingBooked       -7.25  CLP  Fri 21:00      6 s ago
acme-taxes      -                 no data                      2 h ago"""


def observed(account: str, seconds: float, *balances: tuple[str, str, str, str], **more: bool) -> dict[str, object]:
    names = ("type", "indicator", "amount", "as_of")
    return {
        "account": account,
        "fetched_at": at(seconds=-seconds),
        "balances": [{**dict(zip(names, each, strict=True)), "currency": "CLP"} for each in balances],
        "late": False,
        "changed": False,
        **more,
    }


TWO = (
    ("ClosingAvailable", "Credit", "100", "2026-11-22T06:33:00-04:00"),
    ("ClosingBooked", "Debit", "7.25", "2026-11-21T00:00:00+00:00"),
)


def test_balances_have_their_sign_and_a_local_moment() -> None:
    table = tables.observed_table([observed("acme-operating", 6, *TWO), observed("acme-taxes", 7300)], NOW)
    assert shown(table) == BALANCES
    assert shown(tables.observed_table([], NOW)) == "no balance yet"


EVENTS = [
    (
        "balance.observed.v1",
        observed("a", 0, *TWO, changed=True),
        "100 CLP ClosingAvailable, -7.25 CLP ClosingBooked, changed",
    ),
    ("balance.observed.v1", observed("a", 0, late=True), "no data, late"),
    ("account.suspended.v1", {"state": "suspended", "code": "E401"}, "suspended: E401"),
    ("account.suspended.v1", {"state": "parked", "code": "E203"}, "parked: E203"),
    ("account.suspended.v1", {"state": "blocked", "code": "E101"}, "its login is blocked: E101"),
    ("account.resumed.v1", {"by": "redrive"}, "resumed by redrive"),
    ("account.overdue.v1", {"since": "2026-11-22T10:00:00.000Z"}, "overdue since 22 Nov 07:00:00"),
]


@pytest.mark.parametrize(("kind", "data", "words"), EVENTS, ids=[f"{kind}-{words[:9]}" for kind, _, words in EVENTS])
def test_an_event_is_one_readable_line(kind: str, data: dict[str, object], words: str) -> None:
    attributes = {"type": kind, "subject": "acme-operating", "time": "2026-11-22T10:33:04.500Z"}
    line = tables.event_line(attributes, data).plain
    assert line == f"22 Nov 07:33:04 UTC-3  acme-operating      {words}"


# ------------------------------------------------------------------------------------------------------------- stories


def story(state: str = "scheduled", **more: object) -> Story:
    shown_row = row("acme-operating", state, due=3 if state in {"scheduled", "waiting"} else None, ok=6)
    facts: dict[str, object] = {
        "row": shown_row,
        "underneath": state,
        "due": at(seconds=3),
        "interval": "every 10s",
        "holder": "",
        "reason": None,
        "block": None,
        "blocked_by": "",
        "is_manual": False,
        "tries": 0,
        "waits": 0,
        "max_waits": 6,
        "losses": 0,
        "attempts": (),
        "commands": ("balances poll acme-operating",),
    }
    return Story(**{**facts, **more})  # type: ignore[arg-type]


WHOLE = """\
acme-operating  scheduled
bancosecurity.cl · login acme · every 10s

Next poll: in 3 s (07:33:13 UTC-3).
Last balance: 6 s ago (07:33:04 UTC-3).

last polls (UTC-3)
  ended     poll           attempt  outcome  took
  07:33:04  1795343565418  2        ok       0.65 s
  07:32:04  1795343565418  1        E201     25.00 s

what you can type
  balances poll acme-operating"""


def test_a_whole_story() -> None:
    attempts = (
        AttemptRow(at(seconds=-6), 1795343565418, 2, 0.65, "ok"),
        AttemptRow(at(seconds=-66), 1795343565418, 1, 25.0, "E201"),
    )
    assert shown(tables.account_story(story(attempts=attempts), NOW)) == WHOLE


SUSPENDED = Reason("E401", "DO_NOT_RETRY", "The account does not exist.", at(minutes=-5), "balances.dead.do-not-retry")
BLOCK = Reason("A000", "", "", at(minutes=-5), "balances.dead.do-not-retry")
SENTENCES = [
    (
        story("waiting", waits=2, tries=1, losses=1, row=replace(row("a", "waiting", due=3), last_outcome="E202")),
        [
            "It waits after E202; next try: in 3 s (07:33:13 UTC-3).",
            "Since its last balance: long wait 2 of 6, short retry 1, 1 poll lost with a worker.",
            "It has no balance yet.",
        ],
    ),
    (
        story("suspended", reason=SUSPENDED),
        [
            "It is suspended: E401 DO_NOT_RETRY, The account does not exist; 5 min ago (07:28:10 UTC-3).",
            "Its letter is in balances.dead.do-not-retry; its next poll comes when it is redriven.",
            "Last balance: 6 s ago (07:33:04 UTC-3).",
        ],
    ),
    (
        story("blocked", underneath="scheduled", due=at(seconds=-9), block=BLOCK, blocked_by="key"),
        [
            "Its login acme is blocked: A000; 5 min ago (07:28:10 UTC-3).",
            "Its key or token towards Khipu failed and is not sent again, for any account that uses it.",
            "Another one, put where the workers find it, lifts the block within a minute; or an operator does.",
            "Next poll: at once, but only when its login is unblocked.",
        ],
    ),
    (
        story("blocked", underneath="polling", block=BLOCK, blocked_by="bank", is_manual=True),
        [
            "Its log-on at the bank failed and is not sent again, for any account that uses it.",
            "Only an operator lifts this block, when the bank takes the log-on again.",
            "Its poll is under way (attempt 1).",
        ],
    ),
    (
        story("paused", underneath="waiting"),
        [
            "It is paused; underneath it is waiting. Nothing is asked before it is resumed.",
            "It waits after ok; next try: in 3 s (07:33:13 UTC-3), but only when it is resumed.",
        ],
    ),
    (story("dispatched"), ["Its poll is in the queue, for the next free worker."]),
    (story("awaiting"), ["Khipu took the request; its callback is awaited: in 3 s (07:33:13 UTC-3) at the latest."]),
    (
        story(holder="acme-usd", due=at(seconds=-1)),
        ["Its login is busy with acme-usd; one account of a login is polled at a time."],
    ),
    (
        story(row=replace(row("a", due=-90000), overdue=True), due=at(hours=-25)),
        [
            "Next poll: 1 d ago (Sat 06:33:10 UTC-3).",
            "It is overdue by more than its own interval: is a worker running? See: balances check",
        ],
    ),
]


@pytest.mark.parametrize(("told", "sentences"), SENTENCES, ids=[str(told.row.state) for told, _ in SENTENCES])
def test_a_story_says_why_and_what_comes_next(told: Story, sentences: list[str]) -> None:
    lines = shown(tables.account_story(told, NOW), 120).splitlines()
    assert [line for line in lines if line in sentences] == sentences, lines


# -------------------------------------------------------------------------------------------------- moments, distances


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        ({"seconds": 0}, "now"),
        ({"seconds": 0.4}, "now"),
        ({"seconds": 3.4}, "in 3 s"),
        ({"seconds": 59}, "in 59 s"),
        ({"seconds": 119}, "in 1 min"),
        ({"hours": 4, "minutes": 3, "seconds": 20}, "in 4 h 3 min"),
        ({"hours": 4, "seconds": 20}, "in 4 h"),
        ({"days": 3, "hours": 4, "minutes": 5}, "in 3 d 4 h"),
        ({"seconds": -12}, "12 s ago"),
        ({"hours": -23, "minutes": -59}, "23 h ago"),
        ({"days": -30}, "30 d ago"),
    ],
)
def test_a_distance_has_two_units_ahead_and_one_behind(delta: dict[str, float], words: str) -> None:
    assert tables.distance(at(**delta), NOW) == words
    assert tables.distance(None, NOW) == "-"


@pytest.mark.parametrize(
    ("delta", "words"),
    [({"hours": 4}, "11:33"), ({"hours": 20}, "Mon 03:33"), ({"days": -2}, "Fri 07:33"), ({"days": 9}, "2026-12-01")],
)
def test_a_moment_is_local_and_has_its_day_where_that_is_another(delta: dict[str, float], words: str) -> None:
    assert tables.moment(at(**delta), NOW) == words


@pytest.mark.parametrize(
    ("name", "words"),
    [("UTC", "UTC"), ("America/Santiago", "UTC-3"), ("Asia/Kolkata", "UTC+5:30"), ("America/St_Johns", "UTC-3:30")],
)
def test_the_zone_is_said_by_its_distance(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.setenv("TZ", name)
    time.tzset()
    assert tables.zone(NOW) == words


def test_colours_are_for_terminals_and_respect_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tables.accounts_table(SANDBOX, NOW)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in shown(table)
    assert "\x1b[1;31mblocked" in shown(table, terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in shown(table, terminal=True)
