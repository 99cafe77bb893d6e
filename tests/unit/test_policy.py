"""What follows each outcome, row by row, and what holds for every outcome there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import Kind, Outcome
from worker.policy import (
    Block,
    Counters,
    Credential,
    DeadLetter,
    DeadLetterQueue,
    Decision,
    ErrorType,
    Publish,
    Retry,
    decide,
    is_contract_drift,
    is_mass_removal,
)


def seconds(*counts: float) -> tuple[timedelta, ...]:
    return tuple(timedelta(seconds=count) for count in counts)


@dataclass(frozen=True)
class Rules:
    """A `[retry]` table; these are the contract's defaults."""

    immediately: tuple[timedelta, ...] = seconds(5, 30, 120)
    transient: tuple[timedelta, ...] = seconds(30, 120, 600, 1800)
    wait: timedelta = timedelta(hours=4)
    max_waits: int = 6
    max_losses: int = 3


RULES = Rules()
WAIT = RULES.wait
EXHAUSTED = DeadLetter(DeadLetterQueue.RETRIES_EXHAUSTED)
BAD_ANSWER = DeadLetter(DeadLetterQueue.BAD_ANSWER)
DO_NOT_RETRY = DeadLetter(DeadLetterQueue.DO_NOT_RETRY)
AFTER_NOTIFICATION = DeadLetter(DeadLetterQueue.AFTER_NOTIFICATION)
BLOCK_BANK, BLOCK_KEY = Block(Credential.BANK), Block(Credential.KEY)


def answered(error_type: str | None, code: str = "E200", retry_after: timedelta | None = None) -> Outcome:
    return Outcome(Kind.ANSWERED, code, error_type, retry_after=retry_after)


def of(kind: Kind, retry_after: timedelta | None = None) -> Outcome:
    return Outcome(kind, str(kind), retry_after=retry_after)


def after(outcome: Outcome, counters: Counters | None = None, jitter: float = 0.0, rules: Rules = RULES) -> Decision:
    return decide(outcome, counters or Counters(), jitter, rules)


def climb(outcome: Outcome, rules: Rules = RULES, counters: Counters | None = None) -> tuple[list[timedelta], Decision]:
    """The countdowns of an outcome that comes again and again, and what ends it."""
    countdowns: list[timedelta] = []
    counters = counters or Counters()
    while isinstance(decision := after(outcome, counters, rules=rules), Retry):
        countdowns.append(decision.countdown)
        counters = replace(decision.counters, attempt=counters.attempt + 1, last=outcome.code)  # as the timetable does
        assert len(countdowns) < 10_000
    return countdowns, decision


@pytest.mark.parametrize(
    ("error_type", "expected"),
    [
        ("RETRY_IMMEDIATELY", Retry(timedelta(seconds=5), Counters(tries=1))),
        ("WAIT_4_HOURS_BEFORE_RETRY", Retry(WAIT, Counters(waits=1))),
        ("DO_NOT_RETRY", DO_NOT_RETRY),
        ("RETRY_AFTER_NOTIFICATION", AFTER_NOTIFICATION),
        (None, Retry(WAIT, Counters(waits=1))),
        ("", Retry(WAIT, Counters(waits=1))),
        ("RETRY_TOMORROW", Retry(WAIT, Counters(waits=1))),
        ("do_not_retry", Retry(WAIT, Counters(waits=1))),
    ],
)
def test_the_type_decides(error_type: str | None, expected: Decision) -> None:
    assert after(answered(error_type)) == expected


@pytest.mark.parametrize("error_type", [*ErrorType, None, "RETRY_TOMORROW"])
@pytest.mark.parametrize(
    ("code", "blocked"),
    [
        ("E100", BLOCK_BANK),
        ("E101", BLOCK_BANK),
        ("E150", BLOCK_BANK),
        ("E199", BLOCK_BANK),
        ("A000", BLOCK_KEY),
        ("E200", None),
        ("E099", None),
        ("E99", None),
        ("E10", None),
        ("E1000", None),
        ("XE100", None),
        ("E100 ", None),
        ("E999", None),
        ("E000", None),
        ("A001", None),
        ("D000", None),
        ("T000", None),
        ("I001", None),
        ("", None),
    ],
)
def test_the_code_only_makes_it_stricter(code: str, blocked: Block | None, error_type: str | None) -> None:
    expected = blocked or after(answered(error_type, "E200"))
    assert after(answered(error_type, code)) == expected


@pytest.mark.parametrize("counters", [Counters(), Counters(tries=3), Counters(waits=6), Counters(losses=2, attempt=9)])
@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (of(Kind.OK), Publish()),
        (of(Kind.UNAUTHORIZED), BLOCK_KEY),
        (of(Kind.KEY_REFUSED), BLOCK_KEY),
        (of(Kind.LOG_ON_REFUSED), BLOCK_BANK),
        (of(Kind.FOREIGN), BAD_ANSWER),
        (answered("DO_NOT_RETRY"), DO_NOT_RETRY),
        (answered("RETRY_AFTER_NOTIFICATION"), AFTER_NOTIFICATION),
        (answered("RETRY_IMMEDIATELY", "E101"), BLOCK_BANK),
    ],
)
def test_what_is_final_is_final_whatever_came_before(outcome: Outcome, expected: Decision, counters: Counters) -> None:
    assert after(outcome, counters, jitter=0.5) == expected


TRANSIENT = (Kind.SERVER_ERROR, Kind.THROTTLED, Kind.TIMEOUT, Kind.CONNECTION, Kind.LIFESPAN_EXCEEDED)


@pytest.mark.parametrize(
    ("outcome", "countdowns", "end"),
    [
        (answered("RETRY_IMMEDIATELY"), [*RULES.immediately, *[WAIT] * 6], EXHAUSTED),
        (answered("WAIT_4_HOURS_BEFORE_RETRY"), [WAIT] * 6, EXHAUSTED),
        (answered(None), [WAIT] * 6, EXHAUSTED),
        *[(of(kind), [*RULES.transient, *[WAIT] * 6], EXHAUSTED) for kind in TRANSIENT],
        (of(Kind.UNREADABLE), [*RULES.transient, WAIT], BAD_ANSWER),
        (of(Kind.BAD_REQUEST), [*RULES.transient, WAIT], DO_NOT_RETRY),
        (of(Kind.NOT_FOUND), [*RULES.transient, WAIT], DO_NOT_RETRY),
        (of(Kind.LOST), [*RULES.transient[:2]], EXHAUSTED),
    ],
)
def test_the_whole_ladder_of_an_outcome_that_repeats(
    outcome: Outcome, countdowns: list[timedelta], end: Decision
) -> None:
    assert climb(outcome) == (countdowns, end)


@pytest.mark.parametrize("kind", [Kind.UNREADABLE, Kind.BAD_REQUEST, Kind.NOT_FOUND])
def test_what_comes_first_after_a_wait_for_something_else_is_no_repetition(kind: Kind) -> None:
    waited = Counters(waits=1, last="HTTP_503")
    assert after(of(kind), waited) == Retry(WAIT, Counters(waits=2, last="HTTP_503"))


@pytest.mark.parametrize("max_waits", [1, 2, 6])
def test_max_waits_bounds_the_waits(max_waits: int) -> None:
    rules = Rules(max_waits=max_waits)
    assert climb(answered("WAIT_4_HOURS_BEFORE_RETRY"), rules) == ([WAIT] * max_waits, EXHAUSTED)


@pytest.mark.parametrize(("max_losses", "retries"), [(1, 0), (2, 1), (3, 2)])
def test_max_losses_bounds_the_losses(max_losses: int, retries: int) -> None:
    assert climb(of(Kind.LOST), Rules(max_losses=max_losses)) == ([*RULES.transient[:retries]], EXHAUSTED)


def test_many_losses_climb_on_to_the_waits() -> None:
    assert climb(of(Kind.LOST), Rules(max_losses=100)) == ([*RULES.transient, *[WAIT] * 6], EXHAUSTED)


@pytest.mark.parametrize(
    ("outcome", "before", "counters"),
    [
        (answered("RETRY_IMMEDIATELY"), Counters(1, 0, 0, 4), Counters(2, 0, 0, 4)),
        (answered("RETRY_IMMEDIATELY"), Counters(3, 0, 2, 4), Counters(0, 1, 0, 4)),
        (answered("RETRY_IMMEDIATELY"), Counters(0, 2, 1, 1), Counters(0, 3, 0, 1)),
        (answered("WAIT_4_HOURS_BEFORE_RETRY"), Counters(2, 5, 1, 7), Counters(0, 6, 0, 7)),
        (of(Kind.TIMEOUT), Counters(3, 0, 2, 1), Counters(4, 0, 0, 1)),
        (of(Kind.TIMEOUT), Counters(4, 0, 0, 1), Counters(0, 1, 0, 1)),
        (of(Kind.UNREADABLE), Counters(0, 0, 2, 1), Counters(1, 0, 0, 1)),
        (of(Kind.LOST), Counters(0, 0, 0, 1), Counters(1, 0, 1, 1)),
        (of(Kind.LOST), Counters(2, 0, 1, 1), Counters(3, 0, 2, 1)),
        (of(Kind.LOST), Counters(0, 1, 1, 1), Counters(0, 2, 2, 1)),
    ],
)
def test_the_counters_after_a_retry(outcome: Outcome, before: Counters, counters: Counters) -> None:
    decision = after(outcome, before)
    assert isinstance(decision, Retry)
    assert decision.counters == counters


def test_after_a_wait_there_is_exactly_one_try() -> None:
    for outcome in (answered("RETRY_IMMEDIATELY"), *map(of, TRANSIENT)):
        decision = after(outcome, Counters(waits=1))
        assert decision == Retry(WAIT, Counters(waits=2))


@pytest.mark.parametrize(
    ("outcome", "counters", "asked", "countdown"),
    [
        (Kind.THROTTLED, Counters(), None, 30),
        (Kind.THROTTLED, Counters(), 0, 30),
        (Kind.THROTTLED, Counters(), -50, 30),
        (Kind.THROTTLED, Counters(), 10, 30),
        (Kind.THROTTLED, Counters(), 45, 45),
        (Kind.SERVER_ERROR, Counters(tries=1), 500, 500),
        (Kind.THROTTLED, Counters(), 10**9, 14_400),
        (Kind.THROTTLED, Counters(tries=4), 20_000, 14_400),
        (Kind.THROTTLED, Counters(waits=1), 10**9, 14_400),
    ],
)
def test_retry_after_is_honoured_and_clamped(
    outcome: Kind, counters: Counters, asked: int | None, countdown: int
) -> None:
    retry_after = None if asked is None else timedelta(seconds=asked)
    decision = after(of(outcome, retry_after), counters)
    assert isinstance(decision, Retry)
    assert decision.countdown == timedelta(seconds=countdown)


@pytest.mark.parametrize(
    ("outcome", "shortest", "longest"),
    [
        (answered("WAIT_4_HOURS_BEFORE_RETRY"), WAIT, WAIT * 1.05),
        (answered("RETRY_IMMEDIATELY"), timedelta(seconds=5), timedelta(seconds=6)),
        (of(Kind.TIMEOUT), timedelta(seconds=30), timedelta(seconds=36)),
    ],
)
def test_jitter_only_lengthens(outcome: Outcome, shortest: timedelta, longest: timedelta) -> None:
    exact, most = after(outcome), after(outcome, jitter=0.999_999)
    assert isinstance(exact, Retry)
    assert isinstance(most, Retry)
    assert exact.countdown == shortest
    assert shortest < most.countdown <= longest
    assert exact.counters == most.counters


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("error_type", [*ErrorType, None])
def test_every_kind_and_every_type_has_a_rule(kind: Kind, error_type: ErrorType | None) -> None:
    assert isinstance(after(Outcome(kind, "E500", error_type)), Publish | Retry | DeadLetter | Block)


def test_only_a_good_answer_is_published() -> None:
    published = [kind for kind in Kind if isinstance(after(of(kind)), Publish)]
    assert published == [Kind.OK]


def test_every_type_has_its_row() -> None:
    shapes = {error_type: after(answered(error_type)) for error_type in ErrorType}
    assert len(shapes) == 4
    assert len(set(map(str, shapes.values()))) == 4, "two types with one rule: is one of them forgotten?"


@pytest.mark.parametrize(
    ("outcome", "drifts"),
    [(answered(error_type), False) for error_type in ErrorType]
    + [(answered(None), True), (answered("RETRY_TOMORROW"), True), (of(Kind.TIMEOUT), False), (of(Kind.OK), False)],
)
def test_unknown_types_are_contract_drift(outcome: Outcome, drifts: bool) -> None:
    assert is_contract_drift(outcome) is drifts


@pytest.mark.parametrize(
    ("known", "gone", "is_mass"),
    [(0, 0, False), (2, 2, False), (3, 3, True), (10, 2, False), (15, 3, False), (14, 3, True), (100, 20, False)],
)
def test_more_than_two_and_more_than_a_fifth_is_a_mass_removal(known: int, gone: int, is_mass: bool) -> None:
    assert is_mass_removal(known, gone) is is_mass


CODES = st.one_of(st.text(max_size=8), st.from_regex(r"[A-Z][0-9]{3}", fullmatch=True))
TYPES = st.one_of(st.none(), st.sampled_from([*map(str, ErrorType)]), st.text(max_size=30))
OUTCOMES = st.builds(
    Outcome,
    kind=st.sampled_from(Kind),
    code=CODES,
    type=TYPES,
    description=st.just(""),
    retry_after=st.one_of(st.none(), st.timedeltas()),
)
COUNTERS = st.builds(
    Counters,
    tries=st.integers(0, 10**6),
    waits=st.integers(0, 10**6),
    losses=st.integers(0, 10**6),
    attempt=st.integers(1, 10**6),
)
JITTER = st.floats(0, 1, exclude_max=True)
LADDERS = st.lists(st.timedeltas(timedelta(milliseconds=100), timedelta(days=1)), min_size=1, max_size=20).map(tuple)
RULE_SETS = st.builds(
    Rules,
    immediately=LADDERS,
    transient=LADDERS,
    wait=st.timedeltas(timedelta(seconds=1), timedelta(days=30)),
    max_waits=st.integers(1, 20),
    max_losses=st.integers(1, 20),
)


@given(OUTCOMES, COUNTERS, JITTER, RULE_SETS)
def test_decide_never_raises_and_never_asks_at_once(
    outcome: Outcome, counters: Counters, jitter: float, rules: Rules
) -> None:
    decision = decide(outcome, counters, jitter, rules)
    if isinstance(decision, Retry):
        assert decision.countdown >= min(*rules.immediately, *rules.transient, rules.wait)
        assert decision.countdown <= max(*rules.immediately, *rules.transient, rules.wait) * 1.2
        if decision.counters.waits > counters.waits:
            assert decision.countdown >= rules.wait


@given(OUTCOMES, RULE_SETS)
def test_an_outcome_that_repeats_ends(outcome: Outcome, rules: Rules) -> None:
    countdowns, end = climb(outcome, rules)
    assert len(countdowns) <= max(len(rules.immediately), len(rules.transient)) + rules.max_waits
    assert isinstance(end, Publish) is (outcome.kind is Kind.OK)


FAILURES = [of(kind) for kind in Kind if kind is not Kind.OK] + [answered(error_type) for error_type in ErrorType]


@given(st.lists(st.sampled_from(FAILURES), min_size=60, max_size=60), RULE_SETS)
def test_any_row_of_failures_ends(outcomes: list[Outcome], rules: Rules) -> None:
    counters = Counters()
    for outcome in outcomes:
        decision = decide(outcome, counters, 0.0, rules)
        if not isinstance(decision, Retry):
            return
        counters = decision.counters
    raise AssertionError("sixty failures in a row, and still retrying")


@given(st.text(), COUNTERS, RULE_SETS)
def test_the_four_hours_are_never_shortened(code: str, counters: Counters, rules: Rules) -> None:
    decision = decide(answered("WAIT_4_HOURS_BEFORE_RETRY", code), counters, 0.0, rules)
    if isinstance(decision, Retry):
        assert decision.countdown >= rules.wait
