"""Assemble the Celery app that `celery -A worker` finds, its logging, and what its processes share.

Nothing waits in Celery: no countdown, no ETA, no acknowledgement. A message is a hint to look at the timetable, so the
queues are consumed without acknowledgements and the scripts of the timetable push the messages themselves, from the
template made here by Celery's and kombu's own code.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import celery.apps.worker as celery_worker
import redis
import structlog
from celery import Celery, signals
from celery.app.amqp import AMQP
from kombu import Connection, Exchange, Queue

from worker import logs, sentinel
from worker.credentials import CredentialStore
from worker.errors import ConfigurationError, StoreUnavailable
from worker.event_buffer import EventBuffer
from worker.khipu import KhipuClient
from worker.oauth import AccessTokens
from worker.server import require_fit
from worker.settings import Settings, load_settings
from worker.timetable import ANSWERS, POLLS, Timetable, connect

log = structlog.get_logger()

#: Pause between two looks for a server that is away.
AWAY_S = 0.5

POLL_TASK, SETTLE_TASK = "balances.poll", "balances.settle"

T = TypeVar("T")

#: Numbers that stand in a template for a number to come; nothing else in a message has nineteen digits.
_NUMBERS = {"poll": 7777777777777777771, "attempt": 7777777777777777772, "retries": 7777777777777777773}


@dataclass(frozen=True)
class Wiring:
    """What a process of this package works with. `is_durable`: the server keeps an append-only file."""

    settings: Settings
    timetable: Timetable
    khipu: KhipuClient
    access_tokens: AccessTokens
    credentials: CredentialStore
    is_durable: bool

    @cached_property
    def salt(self) -> bytes:
        """What fingerprints are made with: asked for by workers only, once; the others may not read it."""
        return self.timetable.salt()


@lru_cache(maxsize=1)
def wiring() -> Wiring:
    """This process's wiring, made when it is first asked for.

    Raises `ConfigurationError` for a server that must not be used, `StoreUnavailable` for one that is away.
    """
    settings = load_settings()
    client = connect(settings.store_url())
    is_durable = require_fit(client)
    timetable = Timetable(
        client,
        stream=settings.stream,
        message=poll_template(),
        letter=letter_template(),
        settling=settling_template(),
    )
    timetable.check_version()
    credentials = CredentialStore(os.environ, settings.secrets_dir)
    khipu = KhipuClient(settings.khipu_url)
    return Wiring(settings, timetable, khipu, AccessTokens(khipu), credentials, is_durable)


def until_there(call: Callable[[], T]) -> T:
    """What `call` returns, as soon as the server is there: a process that starts while it is away waits for it."""
    is_told = False
    while True:
        try:
            result = call()
        except StoreUnavailable as error:
            if not is_told:
                log.error("the server is away", reason=str(error))
            is_told = True
            time.sleep(AWAY_S)
        else:
            if is_told:
                log.info("the server is back")
            return result


def worker_name(hostname: str | None) -> str:
    """What this worker's process is called in Redis; `hostname` is Celery's, such as `worker@host`."""
    return f"{hostname}:{os.getpid()}"


def configuration() -> dict[str, Any]:
    """Celery's configuration; a mistake in ours stops the process with status 2, before anything has started."""
    with exiting_on_mistakes():
        settings = load_settings()
        url = settings.store_url()
    return {
        **_broker(url),
        "task_queues": [Queue(name, Exchange(name), routing_key=name, no_ack=True) for name in (POLLS, ANSWERS)],
        "task_default_queue": POLLS,
        "task_create_missing_queues": False,
        "task_ignore_result": True,
        "task_track_started": True,
        "worker_send_task_events": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "beat_scheduler": "worker.beat:TimetableScheduler",
        "worker_pool": "threads",
        "worker_concurrency": settings.concurrency,
        # A message is taken only when a thread is free: what waits, waits in the queue, where every worker can have it.
        "worker_disable_prefetch": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 2,
    }


def _broker(url: str) -> dict[str, Any]:
    """The broker's settings for `url`; kombu writes Sentinel's addresses its own way."""
    # One list per queue instead of four; beside that, a dead connection must not hold a worker for long.
    options: dict[str, Any] = {"priority_steps": [0], "socket_connect_timeout": 2, "socket_keepalive": True}
    if not url.startswith(sentinel.SCHEME):
        return {"broker_url": url, "broker_transport_options": options}
    address = sentinel.read_sentinel_address(url)
    return {
        "broker_url": address.for_kombu(),
        "broker_transport_options": {
            **options,
            "master_name": address.master,
            "sentinel_kwargs": sentinel.ASKED,
        },
    }


@contextmanager
def exiting_on_mistakes() -> Iterator[None]:
    """Ends the process with status 2 and every mistake on a line of its own, where the configuration is wrong."""
    try:
        yield
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"balances: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


class SteadyConnection(Connection):
    """A connection that comes back a second after its server; Celery's pause grows to thirty.

    A server that answers and refuses, for its disk or its memory is full, is away too: Celery's worker would end.
    """

    @property
    def connection_errors(self) -> tuple[type[Exception], ...]:
        return (*super().connection_errors, redis.ResponseError)

    @property
    def recoverable_connection_errors(self) -> tuple[type[Exception], ...]:
        return (*super().recoverable_connection_errors, redis.ResponseError)

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        return super().ensure_connection(*args, **{"interval_start": 1, "interval_step": 0, **kwargs})


class Amqp(AMQP):
    """Celery's broker side, with that connection."""

    Connection = SteadyConnection


#: Flower asks the environment for its settings where its command line names none: it is never open by omission.
FLOWER_SETTINGS = Path(__file__).parent.parent / "config" / "flowerconfig.py"
if FLOWER_SETTINGS.is_file():
    os.environ.setdefault("FLOWER_CONF", str(FLOWER_SETTINGS))

app = Celery("balances", amqp=Amqp, include=["worker.tasks", "worker.lifecycle"])
app.add_defaults(configuration)
app.steps["consumer"].add(EventBuffer)


# --------------------------------------------------------------------------------------------------- message templates


def poll_template() -> str:
    """The message of a poll as kombu's Redis transport would push it, with placeholders `@login@`, `@account@`,
    `@poll@`, `@attempt@`, `@retries@`."""
    return _with_placeholders(json.dumps(_as_pushed(POLL_TASK, "@account@.@poll@", POLLS)))


def settling_template() -> str:
    """The message that asks for a callback's answer to be settled, under the id `<alias>.<poll>.answer`."""
    return _with_placeholders(json.dumps(_as_pushed(SETTLE_TASK, "@account@.@poll@.answer", ANSWERS)))


def letter_template() -> str:
    """A dead letter: a poll's message addressed to `@queue@`, with the reason, JSON, in the header `reason`."""
    message = _as_pushed(POLL_TASK, "@account@.@poll@", "@queue@")
    message["headers"]["reason"] = "@reason@"
    return _with_placeholders(json.dumps(message)).replace('"@reason@"', "@reason@")


def _as_pushed(task: str, task_id: str, queue_name: str) -> dict[str, Any]:
    """What Celery hands to kombu for this task, and kombu's virtual transport to its queue."""
    kwargs = {"login": "@login@", "account": "@account@", "poll": _NUMBERS["poll"], "attempt": _NUMBERS["attempt"]}
    task_message = Celery("template", set_as_current=False).amqp.as_task_v2(
        task_id, task, (), kwargs, retries=_NUMBERS["retries"], ignore_result=True, origin="timetable"
    )
    with Connection("memory://") as connection:
        channel: Any = connection.channel()
        channel.body_encoding = None  # the body as plain text, so that it can be filled in
        queue = Queue("template", channel=channel, exclusive=True)
        queue.declare()
        connection.Producer(channel).publish(
            task_message.body,
            routing_key=queue.name,
            serializer="json",
            headers=task_message.headers,
            **task_message.properties,
        )
        message: dict[str, Any] = channel._get(queue.name)
    del message["properties"]["body_encoding"]
    message["properties"]["delivery_info"]["routing_key"] = queue_name
    message["properties"]["delivery_tag"] = "@account@.@poll@.@attempt@"
    return message


def _with_placeholders(text: str) -> str:
    for name, number in _NUMBERS.items():
        text = text.replace(str(number), f"@{name}@")
    return text


# ------------------------------------------------------------------------------------------------------------- logging


@signals.celeryd_init.connect
def _log_early(**_: object) -> None:
    """Celery warns of a superuser before it sets logging up."""
    logs.configure()


@signals.setup_logging.connect
def _setup_logging(loglevel: int | None = None, logfile: str | None = None, **_: object) -> None:
    logs.configure(loglevel or logging.INFO, logfile)
    if not sys.stderr.isatty():
        celery_worker.safe_say = _say  # type: ignore[attr-defined]  # celery-types lacks it


def _say(text: str, file: object = None) -> None:  # noqa: ARG001 - Celery's signature
    """What Celery writes past logging, from its signal handlers."""
    os.write(2, logs.line(text).encode())
