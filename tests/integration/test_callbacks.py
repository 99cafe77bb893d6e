"""Callbacks at the timetable's door: every order of 202, callback, deadline and settling, on a real server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import redis
from servers import ValkeyServer
from world import MINUTE_MS, OUTCOMES, World, read

from worker.celery import settling_template
from worker.timetable import Begun, Token, Unsettled, connect

BODY = b'{"OperationId": "op-1", "Status": "OK"}'
HOUR = timedelta(hours=1)


class CallbackWorld(World):
    """A world whose accounts are polled in callback mode, and a webhook's view of it."""

    def __init__(self, client: redis.Redis, *aliases: str) -> None:
        super().__init__(client)
        self.timetable._settling = settling_template()
        self.define(*aliases)

    def define(self, *aliases: str, **changes: str) -> None:
        self.apply(read(*aliases, more='mode = "callback"', **changes))

    def accept(self, begun: Begun, life_span: timedelta | None = None) -> int | None:
        moment = datetime.fromtimestamp(self.timetable.now_ms() / 1000, UTC) + life_span if life_span else None
        return self.timetable.accept(begun, moment)

    def receive(self, token: Token, body: bytes = BODY) -> str:
        (received,) = self.timetable.receive([(self.callback(token), body, "application/json")], is_durable=False)
        return received.result

    def settle_answer(self, token: Token, operation: str = "op-1") -> str:
        """What a worker does with one body."""
        unsettled = self.timetable.unsettled(token)
        assert isinstance(unsettled, Unsettled)
        settled = self.settle(unsettled.begun, operation=operation)
        self.timetable.forget_answer(token, list(unsettled.bodies)[:1])
        assert settled is not None
        return settled.result

    def settle_messages(self) -> list[str]:
        return [message["headers"]["id"] for message in self.messages("balances.answers")]


@pytest.fixture
def world(store: redis.Redis) -> CallbackWorld:
    return CallbackWorld(store, "a", "b")


def test_a_202_leaves_the_account_awaiting_until_its_life_span_and_grace(world: CallbackWorld) -> None:
    begun = world.start("a")
    deadline = world.accept(begun, HOUR)
    assert world.state("a") == "awaiting"
    assert deadline == pytest.approx(world.timetable.now_ms() + 70 * MINUTE_MS, abs=5000)


@pytest.mark.parametrize(
    ("life_span", "minutes"),
    [(None, 30 + 10), (-HOUR, 0 + 10), (timedelta(days=9), 2 * 24 * 60 + 10), (timedelta(minutes=5), 5 + 10)],
)
def test_a_life_span_is_clamped(world: CallbackWorld, life_span: timedelta | None, minutes: int) -> None:
    deadline = world.accept(world.start("a"), life_span)
    assert deadline == pytest.approx(world.timetable.now_ms() + minutes * MINUTE_MS, abs=5000)


def test_an_answer_that_is_awaited_settles_the_poll(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    assert world.receive(begun.token) == "stored"
    assert world.settle_messages() == [f"{begun.token.task_id}.answer"]
    world.check()
    assert world.settle_answer(begun.token) == "published"
    assert world.state("a") == "scheduled"
    assert world.timetable.unsettled(begun.token) is None
    assert not world.client.exists("answers")
    world.check()


def test_a_callback_may_come_before_its_202_was_read(world: CallbackWorld) -> None:
    begun = world.start("a")
    assert world.receive(begun.token) == "stored"
    assert world.accept(begun) is not None
    world.check()
    assert world.settle_answer(begun.token) == "published"
    assert world.state("a") == "scheduled"


def test_a_202_read_after_the_answer_was_settled_changes_nothing(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.receive(begun.token)
    world.settle_answer(begun.token)
    assert world.accept(begun) is None
    assert world.state("a") == "scheduled"
    world.check()


def test_the_same_body_again_is_taken_once(world: CallbackWorld) -> None:
    begun = world.start("a")
    assert [world.receive(begun.token) for _ in range(3)] == ["stored", "repeated", "repeated"]
    world.settle_answer(begun.token)
    assert world.receive(begun.token) == "repeated"
    assert len(world.settle_messages()) == 1


def test_two_bodies_of_one_token_are_settled_one_after_the_other(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    assert [world.receive(begun.token, body) for body in (BODY, b"{}")] == ["stored", "stored"]
    assert world.settle_answer(begun.token, "op-1") == "published"
    assert world.settle_answer(begun.token, "op-2") == "late"
    assert world.timetable.unsettled(begun.token) is None


def test_whoever_holds_the_url_cannot_fill_the_memory(world: CallbackWorld) -> None:
    begun = world.start("a")
    results = [world.receive(begun.token, f'{{"n": {n}}}'.encode()) for n in range(6)]
    assert results == ["stored"] * 4 + ["full"] * 2


def test_an_unknown_token_stores_nothing(world: CallbackWorld) -> None:
    before = set(world.client.keys())
    assert world.receive(Token("acme", "a", 1, 1)) == "unknown"
    assert set(world.client.keys()) == before | {"counts"}, "that somebody came, nothing else"


def test_a_body_that_is_no_text_comes_back_as_it_was(world: CallbackWorld, valkey_server: ValkeyServer) -> None:
    world.timetable.client = connect(valkey_server.url)
    begun = world.start("a")
    world.receive(begun.token, b"\xff\x00\xfe{}")
    unsettled = world.timetable.unsettled(begun.token)
    assert unsettled is not None
    assert list(unsettled.bodies.values()) == [b"\xff\x00\xfe{}"]


def test_without_a_callback_the_deadline_is_a_lapse(world: CallbackWorld) -> None:
    world.timetable.pause("b")
    begun = world.start("a")
    world.accept(begun)
    world.pass_time(39 * MINUTE_MS)
    assert not world.claim().lapsed
    world.pass_time(2 * MINUTE_MS)
    (lapse,) = [lapse for lapse in world.claim().lapsed if lapse.token.account == "a"]
    assert lapse.state == "awaiting"
    assert world.postpone(lapse.token) is not None
    assert world.state("a") == "waiting"
    world.check()


def test_a_callback_after_the_deadline_is_published_late_and_disturbs_nothing(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    world.pass_time(41 * MINUTE_MS)
    world.postpone(begun.token)
    due = world.due("a")
    assert world.receive(begun.token) == "stored"
    assert world.settle_answer(begun.token) == "late"
    assert (world.state("a"), world.due("a")) == ("waiting", due)
    assert world.events()[-1]["data"]["late"] is True
    world.check()


def test_once_the_answer_is_there_no_deadline_applies(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    world.pass_time(41 * MINUTE_MS)
    world.receive(begun.token)
    assert not [lapse for lapse in world.claim().lapsed if lapse.token.account == "a"]
    assert world.postpone(begun.token) is None, "beat had seen the lapse a moment before"
    assert world.suspend(begun.token) is None
    assert world.settle_answer(begun.token) == "published"


def test_a_poll_whose_worker_died_after_the_callback_is_no_loss(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.receive(begun.token)
    world.pass_time(15 * MINUTE_MS)
    assert not [lapse for lapse in world.claim().lapsed if lapse.token.account == "a"]
    assert world.settle_answer(begun.token) == "published"
    world.check()


def test_the_login_is_held_for_login_hold_and_then_its_next_account_goes(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    world.due_now("b")
    world.pass_time(9 * MINUTE_MS)
    assert world.claim().dispatched == 0
    world.pass_time(2 * MINUTE_MS)
    assert world.claim().dispatched == 1
    assert (world.state("a"), world.state("b")) == ("awaiting", "dispatched")
    assert world.due("a") is not None
    world.check()
    world.receive(begun.token)
    assert world.settle_answer(begun.token) == "published"
    assert world.state("b") == "dispatched", "the answer frees only its own place"
    world.check()


def test_a_settling_whose_message_was_lost_is_pushed_again(world: CallbackWorld) -> None:
    begun = world.start("a")
    world.accept(begun)
    world.receive(begun.token)
    world.client.delete("balances.answers")
    world.claim()
    assert world.settle_messages() == []
    world.pass_time(2 * MINUTE_MS)
    world.claim()
    assert world.settle_messages() == [f"{begun.token.task_id}.answer"]


@pytest.mark.parametrize("is_answer", [False, True])
def test_only_the_answer_itself_decides_once_it_is_there(world: CallbackWorld, is_answer: bool) -> None:
    begun = world.start("a")
    world.accept(begun)
    world.receive(begun.token)
    applied = world.timetable.postpone(begun.token, 1000, begun.counters, OUTCOMES["postpone"], is_answer=is_answer)
    assert (applied is not None) == is_answer


def test_answers_of_paused_removed_redefined_suspended_and_blocked_accounts_settle_too(store: redis.Redis) -> None:
    def pause(world: CallbackWorld, _: Begun) -> None:
        world.timetable.pause("a")

    def remove(world: CallbackWorld, _: Begun) -> None:
        world.define("b")

    def redefine(world: CallbackWorld, _: Begun) -> None:
        world.define("a", number="55555555")

    def suspend(world: CallbackWorld, begun: Begun) -> None:
        world.suspend(begun.token)

    def block(world: CallbackWorld, _: Begun) -> None:
        world.block(world.token("b"))

    expected = [
        (pause, "published", "paused scheduled"),
        (remove, "late", "retired"),
        (redefine, "late", "scheduled"),
        (suspend, "late", "suspended"),
        (block, "published", "blocked scheduled"),
    ]
    for event, result, state in expected:
        store.flushall()
        world = CallbackWorld(store, "a", "b")
        begun = world.start("a")
        world.accept(begun)
        event(world, begun)
        assert world.receive(begun.token) == "stored"
        assert (world.settle_answer(begun.token), world.state("a")) == (result, state), event.__name__
        if event is not redefine:
            world.check()


def test_pause_and_resume_of_an_awaiting_account_keep_its_deadline(world: CallbackWorld) -> None:
    begun = world.start("a")
    deadline = world.accept(begun)
    world.timetable.pause("a")
    world.pass_time(11 * MINUTE_MS)
    world.claim()
    assert world.due("a") is None
    world.timetable.resume("a")
    assert world.due("a") == deadline
    world.check()
