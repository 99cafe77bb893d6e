"""Time: a server whose clock jumps, the changes of the clock on the wall, and a leap day.

A jump is one of the server's own TIME: for these tests the scripts' reading of it adds the key `clock:jump`. The key
`clock:offset`, by which tests let time pass, is none: everybody's time passes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
import redis
from planted_faults import Patch, patched
from rounds import Beat
from world import LEASE_MS, MINUTE_MS, STREAM, Entry, World, accounts_file, read_entries

from worker.accounts import parse_accounts
from worker.beat import steady_s
from worker.clock import Jump
from worker.timetable import Begun, Timetable

HOUR_MS = 60 * MINUTE_MS
FOUR_HOURS_MS = 4 * HOUR_MS
JUMPS = [5 * HOUR_MS, -5 * HOUR_MS, 31_000, -31_000]
#: What a test's own calls take at most, on a machine that has other things to do as well.
SLACK_MS = 20_000

JUMPING = Patch(
    "shared",
    "return t[1] * 1000 + math.floor(t[2] / 1000)",
    "return t[1] * 1000 + math.floor(t[2] / 1000) + (tonumber(redis.call('GET', 'clock:jump')) or 0)",
)


class JumpingTimetable(Timetable):
    def now_ms(self) -> int:
        return super().now_ms() + int(self.client.get("clock:jump") or 0)


class JumpingWorld(World):
    def __post_init__(self) -> None:
        super().__post_init__()
        message, letter = self.template
        self.timetable = JumpingTimetable(self.client, stream=STREAM, message=message, letter=letter)

    def workers(self, threads: int) -> None:
        """Alive for long, whatever the clock says."""
        self.timetable.register_worker("test", threads, ttl_s=10**8)

    def jump(self, by_ms: int) -> None:
        self.client.incrby("clock:jump", by_ms)

    def left(self, alias: str) -> int:
        """Until the account's due time or deadline (ms)."""
        return int(self.account(alias)["due"]) - self.timetable.now_ms()

    def place_left(self, login: str) -> int:
        return int(self.client.zscore("timetable", login)) - self.timetable.now_ms()

    def jumps(self) -> int:
        return int(self.client.hget("counts", "clock jump") or 0)

    def end_hold(self) -> None:
        """Let a lease pass; the workers have said again that they are there."""
        self.pass_time(LEASE_MS)
        self.workers(100)


@pytest.fixture
def world(store: redis.Redis) -> Iterator[JumpingWorld]:
    """Every account on a login of its own, so that none waits for another."""
    with patched(JUMPING):
        world = JumpingWorld(store)
        entries = (Entry(alias, login=alias, mode="callback") for alias in ("idle", "waits", "polls", "called", "late"))
        world.apply(read_entries(*entries))
        yield world


@pytest.fixture
def beat(world: JumpingWorld) -> Beat:
    """A beat that has looked at the clock."""
    beat = Beat(world)
    beat.claim()
    return beat


def start(world: JumpingWorld, alias: str) -> Begun:
    world.due_now(alias)
    world.claim()
    begun = world.begin(world.token(alias))
    assert isinstance(begun, Begun), begun
    return begun


# ---------------------------------------------------------------------------------------------------------- a jump


@pytest.mark.parametrize("by_ms", JUMPS)
def test_a_jump_is_found_before_anything_is_claimed_and_nothing_is_for_one_lease(
    world: JumpingWorld, beat: Beat, by_ms: int
) -> None:
    world.due_now("idle")
    world.jump(by_ms)
    beat.claim()
    assert world.jumps() == 1
    assert world.state("idle") == "scheduled"
    world.workers(100)
    world.pass_time(LEASE_MS - SLACK_MS)
    beat.claim()
    assert world.state("idle") == "scheduled", "not for one lease"
    world.pass_time(SLACK_MS)
    beat.claim()
    assert world.state("idle") == "dispatched", "and not for longer"
    assert world.jumps() == 1


@pytest.mark.parametrize("by_ms", JUMPS)
def test_every_wait_and_lease_lasts_as_long_as_it_should(world: JumpingWorld, beat: Beat, by_ms: int) -> None:
    world.postpone(start(world, "waits").token, seconds=FOUR_HOURS_MS / 1000)
    start(world, "polls")
    world.timetable.accept(start(world, "called"), None)
    accounts, logins = ("idle", "waits", "called"), ("idle", "waits", "polls", "called")
    world.pass_time(10_000)
    beat.claim()
    before = [*map(world.left, accounts), *map(world.place_left, logins)]
    overdue_before = int(world.account("idle")["overdue_at"]) - world.timetable.now_ms()
    world.jump(by_ms)
    beat.claim()
    world.check()
    after = [*map(world.left, accounts), *map(world.place_left, logins)]
    assert all(0 <= was - is_ < SLACK_MS for was, is_ in zip(before, after, strict=True)), (before, after)
    assert 0 <= overdue_before - (int(world.account("idle")["overdue_at"]) - world.timetable.now_ms()) < SLACK_MS


@pytest.mark.parametrize("by_ms", JUMPS)
def test_no_four_hour_wait_ends_early(world: JumpingWorld, beat: Beat, by_ms: int) -> None:
    world.postpone(start(world, "waits").token, seconds=FOUR_HOURS_MS / 1000)
    passed_ms = HOUR_MS
    world.pass_time(passed_ms)
    beat.claim()
    world.jump(by_ms)
    beat.claim()
    world.pass_time(FOUR_HOURS_MS - passed_ms - SLACK_MS)
    world.workers(100)
    beat.claim()
    assert world.state("waits") == "waiting"
    world.pass_time(SLACK_MS)
    beat.claim()
    assert world.state("waits") == "dispatched"


@pytest.mark.parametrize("by_ms", JUMPS)
def test_what_was_written_after_the_jump_and_before_it_was_found_stands(
    world: JumpingWorld, beat: Beat, by_ms: int
) -> None:
    late, polls = start(world, "late"), start(world, "polls")
    world.claim()
    world.jump(by_ms)
    world.postpone(late.token, seconds=FOUR_HOURS_MS / 1000)
    world.timetable.accept(polls, None)
    before = world.left("late"), world.left("polls"), world.place_left("polls")
    beat.claim()
    world.check()
    after = world.left("late"), world.left("polls"), world.place_left("polls")
    assert world.jumps() == 1
    assert all(0 <= was - is_ < SLACK_MS for was, is_ in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("by_ms", JUMPS)
def test_two_beats_take_note_of_a_jump_once_even_if_one_was_frozen_for_long(
    world: JumpingWorld, beat: Beat, by_ms: int
) -> None:
    other, frozen = Beat(world), Beat(world)
    other.claim()
    frozen.claim()
    world.postpone(start(world, "waits").token, seconds=FOUR_HOURS_MS / 1000)
    world.pass_time(10_000)
    before = world.left("waits")
    world.jump(by_ms)
    seen = [world.timetable.claim(expected_ms=each._clock.expected_ms(steady_s())) for each in (beat, other)]
    assert [claim.dispatched for claim in seen] == [0, 0]
    beat.claim()
    other.claim()
    world.end_hold()
    frozen.claim()
    assert world.jumps() == 1
    assert 0 <= before - LEASE_MS - world.left("waits") < SLACK_MS


def test_two_beats_of_which_one_was_paused_with_its_clock_do_not_contradict_each_other_for_ever(
    world: JumpingWorld, beat: Beat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a hypervisor does it: snapshot, migration. No clock tells a minute that the machine was not there."""
    paused = Beat(world)
    paused.claim()
    world.due_now("idle")

    def claim_late() -> None:
        with monkeypatch.context() as late:
            late.setattr("worker.beat.steady_s", lambda: steady_s() - 60)
            paused.claim()

    for _ in range(3):
        claim_late()
        beat.claim()
        world.end_hold()
    assert world.jumps() == 1
    beat.claim()
    assert world.state("idle") == "dispatched"


def test_a_call_that_takes_note_of_a_jump_may_be_repeated(world: JumpingWorld) -> None:
    world.jump(HOUR_MS)
    claim = world.timetable.claim()
    jump = Jump(HOUR_MS, 1000)
    assert world.timetable.hold(jump, claim) == LEASE_MS
    left = world.left("idle")
    assert world.timetable.hold(jump, claim) is None
    assert left - world.left("idle") < SLACK_MS
    assert world.jumps() == 1


def test_a_jump_back_and_forth_leaves_everything_where_it_was(world: JumpingWorld, beat: Beat) -> None:
    before = world.left("idle")
    for by_ms in (HOUR_MS, -HOUR_MS):
        world.jump(by_ms)
        beat.claim()
    assert world.jumps() == 2
    assert 0 <= before - world.left("idle") < SLACK_MS
    world.end_hold()
    world.pass_time(before)
    beat.claim()
    assert world.state("idle") == "dispatched"


@pytest.mark.parametrize("by_ms", JUMPS)
def test_what_runs_ends_as_ever_and_lapses_only_when_its_lease_is_really_over(
    world: JumpingWorld, beat: Beat, by_ms: int
) -> None:
    ends, lost = start(world, "polls"), start(world, "late")
    queued = (world.due_now("idle"), world.claim(), world.token("idle"))[-1]
    beat.claim()
    world.jump(by_ms)
    beat.claim()
    begun = world.begin(queued)
    assert isinstance(begun, Begun), "what was dispatched may begin"
    assert [world.settle(each).result for each in (begun, ends)] == ["published", "published"]
    world.workers(100)
    world.pass_time(LEASE_MS - SLACK_MS)
    assert not world.claim().lapsed
    world.pass_time(SLACK_MS)
    assert [lapse.token for lapse in world.claim().lapsed] == [lost.token]
    world.check()


def test_a_claim_that_comes_too_late_does_nothing_and_is_no_jump(world: JumpingWorld, beat: Beat) -> None:
    """A server that stood still reads what was sent to it a minute ago."""
    world.due_now("idle")
    claim = world.timetable.claim()
    world.client.delete("balances.polls")
    world.due_now("late")
    refused = world.timetable.claim(expected_ms=claim.clock_ms - 60_000)
    assert (refused.dispatched, refused.wait_ms) == (0, 0)
    assert world.state("late") == "scheduled"
    beat.claim()
    assert world.state("late") == "dispatched"
    assert world.jumps() == 0


def test_the_hold_of_a_clock_that_jumped_back_unseen_does_not_last_for_ever(world: JumpingWorld, beat: Beat) -> None:
    """Every beat was away at that moment, so nobody could tell."""
    world.jump(24 * HOUR_MS)
    beat.claim()
    world.workers(100)
    world.jump(-24 * HOUR_MS)
    world.due_now("idle")
    Beat(world).claim()
    assert world.state("idle") == "dispatched"


def test_time_that_tests_let_pass_is_no_jump(world: JumpingWorld, beat: Beat) -> None:
    world.pass_time(FOUR_HOURS_MS)
    beat.claim()
    assert world.state("idle") == "dispatched"
    assert world.jumps() == 0


def test_while_nothing_is_claimed_nobody_is_told_overdue(world: JumpingWorld, beat: Beat) -> None:
    world.jump(FOUR_HOURS_MS)
    beat.claim()
    assert not world.timetable.tell_overdue().told
    world.end_hold()
    assert not world.timetable.tell_overdue().told, "their time moved with the clock"


@pytest.mark.parametrize("by_ms", JUMPS)
def test_a_dead_worker_is_believed_for_as_long_as_ever(world: JumpingWorld, beat: Beat, by_ms: int) -> None:
    world.client.delete("workers")
    world.timetable.register_worker("dead", 4, ttl_s=15)
    until_ms = int(world.client.zscore("workers", "dead 4"))
    world.jump(by_ms)
    beat.claim()
    # A jump is measured by two clocks to the millisecond, so it may be one less.
    assert -1 <= int(world.client.zscore("workers", "dead 4")) - by_ms - until_ms < SLACK_MS


# --------------------------------------------------------------------------------- the scripts alone, without a beat


@pytest.mark.parametrize("by_ms", JUMPS)
def test_holding_moves_what_was_written_before_the_jump_and_only_that(world: World, by_ms: int) -> None:
    """Here the jump is one of `clock:offset`, which the scripts cannot tell from any other."""
    world.apply(read_entries(*(Entry(alias, login=alias) for alias in "abc")))
    tokens = {alias: start(world, alias).token for alias in "ab"}
    world.postpone(tokens["a"], seconds=FOUR_HOURS_MS / 1000)
    idle_ms = int(world.account("c")["due"]) - world.timetable.now_ms()
    seen = world.claim()
    world.pass_time(by_ms)
    world.postpone(tokens["b"], seconds=FOUR_HOURS_MS / 1000)
    assert world.timetable.hold(Jump(by_ms, 5000), seen) == LEASE_MS
    world.check()
    left = [int(world.account(alias)["due"]) - world.timetable.now_ms() for alias in "abc"]
    assert all(
        0 <= was - is_ < SLACK_MS for was, is_ in zip((FOUR_HOURS_MS, FOUR_HOURS_MS, idle_ms), left, strict=True)
    )


def test_a_hold_that_was_noted_is_not_noted_again(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b")))
    seen = world.claim()
    world.pass_time(HOUR_MS)
    assert world.timetable.hold(Jump(HOUR_MS, 0), seen) == LEASE_MS
    due = world.due("a")
    assert world.timetable.hold(Jump(HOUR_MS, 0), seen) is None
    assert world.due("a") == due


def test_a_claim_at_another_time_than_expected_does_nothing(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b")))
    clock_ms = world.claim().clock_ms
    world.due_now("a")
    for off_ms in (-HOUR_MS, HOUR_MS):
        assert world.timetable.claim(expected_ms=clock_ms + off_ms).dispatched == 0
    assert world.timetable.claim(expected_ms=clock_ms).dispatched == 1


def test_nothing_is_claimed_while_held(world: World) -> None:
    world.apply(read_entries(Entry("a"), Entry("b")))
    world.timetable.hold(Jump(0, 0), world.claim())
    world.due_now("a")
    claim = world.claim()
    assert claim.dispatched == 0
    assert claim.wait_ms is not None
    assert LEASE_MS - SLACK_MS < claim.wait_ms <= LEASE_MS
    world.pass_time(LEASE_MS)
    world.workers(100)
    assert world.claim().dispatched == 1


# -------------------------------------------------------------------------------------------------------- trimming


@pytest.fixture
def old_entries(world: JumpingWorld) -> int:
    """How many entries of the stream are 20 days old, of the 30 that they are kept."""
    world.settle(start(world, "late"))
    [(_, fields)] = world.client.xrange(STREAM)
    world.client.delete(STREAM)
    seconds, _ = world.client.time()
    pipeline = world.client.pipeline()
    for number in range(1000):
        pipeline.xadd(STREAM, fields, id=f"{(seconds - 20 * 86400) * 1000 + number}-0")
    pipeline.execute()
    return 1000


def kept(world: JumpingWorld, old_entries: int) -> int:
    """Publish something; how many of the old entries are there then."""
    before = world.client.xlen(STREAM)
    world.settle(start(world, "idle"))
    return old_entries - (before + 1 - world.client.xlen(STREAM))


def test_a_jump_of_the_clock_trims_nothing_neither_unseen_nor_for_one_retention(
    world: JumpingWorld, beat: Beat, old_entries: int
) -> None:
    begun = start(world, "idle")
    world.jump(15 * 24 * HOUR_MS)
    world.settle(begun)
    assert world.client.xlen(STREAM) == old_entries + 1, "no beat has looked at the clock yet"
    beat.claim()
    world.end_hold()
    assert kept(world, old_entries) == old_entries, "they are 20 days old, whatever the clock says"
    world.pass_time(timedelta(days=29))
    assert kept(world, old_entries) == old_entries
    world.pass_time(timedelta(days=1))
    assert kept(world, old_entries) < old_entries, "and then as ever"


def test_nothing_is_trimmed_by_a_clock_at_which_no_beat_looks(world: JumpingWorld, old_entries: int) -> None:
    begun = start(world, "idle")
    world.jump(15 * 24 * HOUR_MS)
    world.settle(begun)
    assert world.client.xlen(STREAM) == old_entries + 1
    assert kept(world, old_entries) < old_entries, "a claim looked"


def test_an_hour_without_a_beat_trims_nothing(world: World) -> None:
    world.apply(read_entries(Entry("a", login="a"), Entry("b", login="b")))
    world.settle(start(world, "a"))
    [(_, fields)] = world.client.xrange(STREAM)
    world.client.delete(STREAM)
    pipeline = world.client.pipeline()
    for number in range(1000):
        pipeline.xadd(STREAM, fields, id=f"{number + 1}-0")
    pipeline.execute()
    begun = start(world, "b")
    world.pass_time(HOUR_MS)
    world.settle(begun)
    assert world.client.xlen(STREAM) == 1001
    world.settle(start(world, "a"))
    assert world.client.xlen(STREAM) < 1000


# ---------------------------------------------------------------------------------- the clock on the wall, a leap day


def moments(*texts: str) -> list[int]:
    return [round(datetime.fromisoformat(text).timestamp() * 1000) for text in texts]


@pytest.mark.parametrize(
    ("cron", "begin", "slots"),
    [
        (
            "30 * * * *",
            "2026-09-05T22:00-04:00",  # at 24:00 the clock goes on to 1:00
            ["2026-09-05T22:30-04:00", "2026-09-05T23:30-04:00", "2026-09-06T01:00-03:00", "2026-09-06T01:30-03:00"],
        ),
        ("0 0 * * *", "2026-09-05T12:00-04:00", ["2026-09-06T01:00-03:00", "2026-09-07T00:00-03:00"]),
        (
            "30 * * * *",
            "2027-04-03T22:00-03:00",  # at 24:00 the clock goes back to 23:00
            ["2027-04-03T22:30-03:00", "2027-04-03T23:30-03:00", "2027-04-04T00:30-04:00", "2027-04-04T01:30-04:00"],
        ),
        ("30 23 * * *", "2027-04-03T12:00-03:00", ["2027-04-03T23:30-03:00", "2027-04-04T23:30-04:00"]),
        (
            "0 9 * * *",
            "2028-02-28T12:00-03:00",
            ["2028-02-29T09:00-03:00", "2028-03-01T09:00-03:00", "2028-03-02T09:00-03:00"],
        ),
        ("0 9 29 2 *", "2027-03-01T12:00-03:00", ["2028-02-29T09:00-03:00", "2032-02-29T09:00-03:00"]),
    ],
    ids=["spring", "midnight-of-spring", "autumn", "hour-of-autumn", "leap-day", "only-on-leap-days"],
)
def test_cron_accounts_are_polled_at_their_slots_once_each(
    store: redis.Redis, cron: str, begin: str, slots: list[str]
) -> None:
    """A second before each slot nothing is claimed, a second after it one poll; and nothing in between."""
    world = World(store)
    [now_ms] = moments(begin)
    world.set_clock(now_ms)
    plan = f'cron = "{cron}"\ntimezone = "America/Santiago"'.encode()
    world.apply(parse_accounts(accounts_file("a").replace(b'every = "15m"', plan), "x.toml", callback_configured=False))
    for slot_ms in moments(*slots):
        world.set_clock(slot_ms - 2000)
        assert world.claim().dispatched == 0
        assert world.due("a") == slot_ms
        world.set_clock(slot_ms + 1000)
        assert world.claim().dispatched == 1
        begun = world.begin(world.token("a"))
        assert isinstance(begun, Begun)
        assert world.settle(begun).result == "published"
        world.pass_time(1000)
        assert world.claim().dispatched == 0
    assert len({event["data"]["poll"] for event in world.events()}) == len(slots)
