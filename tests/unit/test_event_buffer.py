"""The buffer of task events: nothing goes out one by one, nothing stays in it when the worker stops."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.events import EventDispatcher
from kombu import Connection, Exchange, Queue
from kombu.asynchronous import Hub
from kombu.asynchronous.timer import Timer

from worker.celery import app
from worker.event_buffer import FLUSH_EVERY_S, EventBuffer


class Loop(Hub):
    """Celery's event loop, which counts how often it is woken."""

    woken = 0

    def call_soon(self, callback: Any, *args: Any) -> Any:
        self.woken += 1
        return super().call_soon(callback, *args)


class Worker(SimpleNamespace):
    """What the step sees of a consumer: Celery's own dispatcher, timer and loop, on a broker in memory."""

    event_dispatcher: EventDispatcher
    timer: Timer
    hub: Loop

    def sent(self) -> list[list[dict[str, Any]]]:
        """The events of each message that has left."""
        messages = iter(lambda: self.queue.get(no_ack=True), None)
        return [body if isinstance(body := message.decode(), list) else [body] for message in messages]


@pytest.fixture
def worker() -> Iterator[Worker]:
    celery = Celery("events", broker="memory://", set_as_current=False)
    with Connection("memory://") as connection:
        exchange = Exchange("celeryev", type="topic")
        queue = Queue("heard", exchange, routing_key="#", channel=connection.channel())
        queue.declare()
        dispatcher = celery.events.Dispatcher(connection, buffer_group=["task"], on_send_buffered=pytest.fail)
        hub = Loop()
        yield Worker(event_dispatcher=dispatcher, timer=Timer(), queue=queue, hub=hub)
        hub.close()
        queue.delete()


def test_task_events_leave_together_when_the_timer_fires(worker: Worker) -> None:
    EventBuffer(worker).start(worker)
    for number in range(100):
        worker.event_dispatcher.send("task-succeeded", uuid=number)
    assert worker.sent() == []
    (entry,) = worker.timer.queue
    entry.entry()
    assert [[event["uuid"] for event in message] for message in worker.sent()] == [list(range(100))]


def test_the_timer_fires_again_and_again(worker: Worker) -> None:
    EventBuffer(worker).start(worker)
    (entry,) = worker.timer.queue
    entry.entry()
    assert len(worker.timer.queue) == 2  # the one that has just fired, and its successor
    assert FLUSH_EVERY_S < 1  # what Flower shows is not older


def test_a_task_that_ends_wakes_the_loop_which_may_take_another_message_now(worker: Worker) -> None:
    """While all threads are busy the loop listens to no queue; what it learns of is the end of a task."""
    EventBuffer(worker).start(worker)
    worker.event_dispatcher.send("task-succeeded", uuid=1)
    assert worker.hub.woken == 1
    assert worker.sent() == []


def test_a_loop_that_will_look_anyhow_is_not_woken_again(worker: Worker) -> None:
    EventBuffer(worker).start(worker)
    for turn in (1, 2):
        for number in range(3):
            worker.event_dispatcher.send("task-succeeded", uuid=number)
        assert worker.hub.woken == turn
        for callback in worker.hub._pop_ready():
            callback()


def test_a_worker_without_a_loop_needs_no_waking(worker: Worker) -> None:
    worker.hub = None  # type: ignore[assignment]
    EventBuffer(worker).start(worker)
    worker.event_dispatcher.send("task-succeeded", uuid=1)


def test_a_heartbeat_does_not_wait(worker: Worker) -> None:
    EventBuffer(worker).start(worker)
    worker.event_dispatcher.send("worker-heartbeat")
    assert [message[0]["type"] for message in worker.sent()] == ["worker-heartbeat"]


def test_a_stopping_worker_keeps_nothing_back(worker: Worker) -> None:
    step = EventBuffer(worker)
    step.start(worker)
    worker.event_dispatcher.send("task-started", uuid=1)
    step.stop(worker)
    assert [message[0]["uuid"] for message in worker.sent()] == [1]
    worker.event_dispatcher.send("task-succeeded", uuid=1)
    assert [message[0]["type"] for message in worker.sent()] == ["task-succeeded"]


def test_a_worker_without_events_has_nothing_to_buffer() -> None:
    silent = Worker(event_dispatcher=None, timer=Timer(), hub=None)
    step = EventBuffer(silent)
    step.start(silent)
    step.stop(silent)
    assert not silent.timer.queue


def test_a_worker_that_never_connected_has_nothing_to_stop(worker: Worker) -> None:
    EventBuffer(worker).stop(worker)
    assert worker.sent() == []


def test_every_worker_has_it() -> None:
    assert EventBuffer in app.steps["consumer"]
