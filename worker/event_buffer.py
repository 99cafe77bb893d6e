"""Send a worker's task events to Flower four times a second, all that came meanwhile in one message.

Celery flushes its buffer of them at nearly every turn of its loop, and kombu opens a client for each message: a fifth
of what a poll cost. Which events are sent, remote control and heartbeats are as they were.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

#: How long Flower may be behind.
FLUSH_EVERY_S = 0.25
#: Events that are not kept waiting: more than any worker makes in that time.
LIMIT = 10_000


class Waker:
    """Wakes Celery's loop, which sleeps while all threads are busy, to see that one is free: once, whoever else asks
    before it has looked."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._is_asked = False

    def wake(self) -> None:
        """From any thread. The loop looks at the threads after it has called `_look`, in the same turn."""
        if not self._is_asked:
            self._is_asked = True
            self._hub.call_soon(self._look)

    def _look(self) -> None:
        self._is_asked = False


class EventBuffer(bootsteps.StartStopStep):
    """Flushes the events that Celery's own step buffers from the consumer's timer, and the rest when that stops.

    A worker without events (no `-E`, heartbeat or gossip) has no dispatcher; there this does nothing.
    """

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._flushing: Any = None

    def start(self, parent: Any) -> None:
        """Called again after each loss of the server, with a new dispatcher."""
        if parent.event_dispatcher is not None:
            parent.event_dispatcher.buffer_limit = LIMIT
            # It woke for the flushes before; without a loop there is nobody to wake.
            parent.event_dispatcher.on_send_buffered = Waker(parent.hub).wake if parent.hub else None
            self._flushing = parent.timer.call_repeatedly(FLUSH_EVERY_S, parent.event_dispatcher.flush)

    def stop(self, parent: Any) -> None:
        """From here on no timer runs: what tasks say in the grace period goes out at once."""
        if self._flushing is not None:
            parent.timer.cancel(self._flushing)
            self._flushing = None
            parent.event_dispatcher.buffer_group = frozenset()
            parent.event_dispatcher.flush()
