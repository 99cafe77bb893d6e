"""The short version of `make torture`: everything that can be broken is broken for half a minute, and adds up after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from servers import wait_until
from torture.reconcile import Asked, Attempt, Evidence, Life
from torture.torture import ATTACKS, PATIENCE_S, Victims, planned, report, torture

SEED = 2
#: Few accounts, polled often: as many polls a second as the long run's.
EVERY_S = (2, 3, 4)


def test_half_a_minute_of_torture_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    run, figures = torture(
        tmp_path, seed=SEED, seconds=30, accounts=60, logins=20, webhooks=1, every_s=EVERY_S, is_hurried=True
    )
    text = report(run, figures)
    print("\n".join(run.diary), text, sep="\n")
    assert not run.findings, text
    assert figures["requests"] > figures["published"] > 0, text
    assert figures["lost"] == figures["doubled"] == 0, text


def test_processes_that_start_while_the_server_is_away_wait_for_it(tmp_path: Path) -> None:
    """What the torture found: a beat and a webhook restarted at such a moment ended with an uncaught error."""
    with Victims(tmp_path, SEED, accounts=2, logins=2, webhooks=1, every_s=EVERY_S) as victims:
        victims.server.kill()
        processes = [victims.bring(name) for name in victims.names if name != "beat-2"]
        for process in processes:
            wait_until(lambda process=process: "the server is away" in process.text(), PATIENCE_S, process.name)
        victims.server.start()
        victims.until_entries("a000", 1)
        victims.until_entries("a001", 1)
        assert all(process.is_alive for process in processes)


def test_a_number_says_what_is_attacked_and_when() -> None:
    assert planned(SEED, 30) == planned(SEED, 30) != planned(SEED + 1, 30)
    assert planned(SEED, 60)[: len(planned(SEED, 30))] == planned(SEED, 30)
    assert {attack.kind for attack in planned(SEED, 600)} == set(ATTACKS)


# ----------------------------------------------------------------------------------------- what the reconciling finds

REQUEST = Asked(
    seq=1,
    alias="a",
    login="l",
    operation="op-1",
    sender="key",
    is_callback=False,
    behaviour="ok",
    state="answered",
    status=200,
    started_s=100.0,
    ended_s=101.0,
    called_s=None,
    acknowledged=(),
)
LOST = Attempt("a", "7", "1", begun_s=99.9, ended_s=104.9, outcome="LOST")
ENTRY = {"operation_id": "op-1", "late": False}


def evidence(*requests: Asked, **known: object) -> Evidence:
    """What is known of these requests: by default of one lost attempt, and of nothing that would explain it."""
    nothing = {"entries": [], "lives": {}, "outages": [], "decided": set(), "attempts": [LOST]}
    return Evidence(requests=list(requests), lease_s=5, hold_s=2, **{**nothing, **known})


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"entries": [ENTRY]}, "published"),
        ({"entries": [{**ENTRY, "late": True}]}, "late"),
        ({}, "lost"),
        ({"lives": {"key": Life("worker", killed_s=101.5)}}, "abandoned: killed"),
        ({"lives": {"key": Life("worker", killed_s=99.0)}}, "lost"),
        ({"lives": {"another": Life("worker", killed_s=101.5)}}, "lost"),
        ({"lives": {"key": Life("worker", frozen=[(100.5, 108.0)])}}, "abandoned: frozen"),
        ({"outages": [(100.5, 106.0)]}, "abandoned: cut"),
        ({"outages": [(90.0, 99.0)]}, "lost"),
        ({"attempts": [replace(LOST, outcome="ok")]}, "lost"),
        ({"attempts": [replace(LOST, outcome="E201")]}, "lost"),
        ({"attempts": [replace(LOST, outcome="TIMEOUT")]}, "failed"),
        ({"attempts": []}, "lost"),
    ],
)
def test_a_good_answer_is_published_or_its_own_worker_was_hit(known: dict[str, object], expected: str) -> None:
    assert evidence(REQUEST, **known).class_of(REQUEST) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"attempts": [replace(LOST, outcome="E201")]}, "failed"),
        ({}, "lost"),
        ({"decided": {("a", "7", "1")}}, "overtaken"),
        ({"attempts": []}, "lost"),
    ],
)
def test_a_bad_answer_has_a_decision(known: dict[str, object], expected: str) -> None:
    bad = replace(REQUEST, behaviour="error:E201:RETRY_IMMEDIATELY")
    assert evidence(bad, **known).class_of(bad) == expected


def test_nothing_excuses_an_acknowledged_callback_that_is_not_on_the_stream() -> None:
    accepted = replace(REQUEST, is_callback=True, behaviour="accepted", status=202, acknowledged=("ok",))
    known = {"outages": [(0.0, 999.0)], "lives": {"key": Life("worker", killed_s=101.5)}}
    assert evidence(accepted, **known).class_of(accepted) == "lost"


def test_an_operation_twice_or_out_of_nowhere_is_found() -> None:
    assert evidence(REQUEST, entries=[ENTRY, ENTRY]).doubled() == ["op-1"]
    assert evidence(REQUEST, entries=[{**ENTRY, "operation_id": "op-9"}]).unasked() == ["op-9"]


def test_two_requests_of_one_attempt_are_found() -> None:
    second = replace(REQUEST, seq=2, started_s=102.0)
    assert evidence(REQUEST, second).sent_twice() == [(REQUEST, second)]


def test_a_request_that_nobody_had_begun_is_found() -> None:
    assert evidence(REQUEST, attempts=[]).unbegun() == [REQUEST]
    assert not evidence(REQUEST).unbegun()


def test_an_attempt_that_ended_well_without_a_balance_is_found() -> None:
    well = replace(LOST, outcome="ok")
    entry = {**ENTRY, "account": "a", "poll": 7}
    assert evidence(attempts=[well]).unpublished() == [well]
    assert evidence(attempts=[well], entries=[{**entry, "late": True}]).unpublished() == [well]
    assert not evidence(attempts=[well], entries=[entry]).unpublished()


def test_two_requests_of_one_login_at_once_are_found_unless_the_first_one_s_worker_stood_still() -> None:
    other = replace(REQUEST, seq=2, alias="b", sender="key-2", started_s=100.5)
    assert evidence(REQUEST, other).overlaps() == [(REQUEST, other)]
    assert not evidence(REQUEST, replace(other, started_s=101.0)).overlaps()
    assert not evidence(REQUEST, replace(other, login="m")).overlaps()
    assert not evidence(REQUEST, other, lives={"key": Life("worker", frozen=[(100.2, 106.0)])}).overlaps()


def test_a_session_at_the_bank_lasts_until_its_callback_or_login_hold() -> None:
    accepted = replace(REQUEST, is_callback=True, behaviour="accepted", status=202)
    assert accepted.session_end_s(2) == 103.0
    assert replace(accepted, called_s=101.5).session_end_s(2) == 101.5
