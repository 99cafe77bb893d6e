"""Flower's settings, over the environment of the contract: read-only, bound to BALANCES_HOST, the dead letters shown.

`celery -A worker flower --conf=config/flowerconfig.py`; what follows on that line wins over what stands here, so
`--read_only=False` lets Flower shut workers down and revoke tasks. It remembers what it saw since it was started, and
writes nothing to disk: the timetable and the stream are what is kept.
"""

import os
import re
import signal
import time
from logging import getLogger

from celery.events import EventReceiver
from celery.events.state import Task
from flower import command
from flower.events import Events
from flower.views import BaseHandler
from flower.views.tasks import TASK_COLUMNS
from tornado.options import options

from worker import logs
from worker.celery import exiting_on_mistakes
from worker.errors import ConfigurationError, Problem
from worker.policy import DeadLetterQueue
from worker.processes import check_ports
from worker.settings import is_loopback, load_settings
from worker.timetable import ANSWERS, POLLS

logs.configure("CRITICAL" if options.logging == "none" else options.logging.upper())
getLogger("flower.command").addFilter(lambda record: not str(record.msg).startswith("Registered tasks"))
with exiting_on_mistakes():
    _settings = load_settings()

address = _settings.host
port = _settings.flower_port
if _settings.flower_auth is not None:
    basic_auth = [_settings.flower_auth.get_secret_value()]
#: Flower shows what is; `balances` changes it.
read_only = True
persistent = False
purge_offline_workers = 300
max_tasks = 20_000
#: A bank answers after 25 to 173 seconds; Flower's own buckets end at 10.
task_runtime_metric_buckets = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 90.0, 120.0, 180.0, 240.0]

tasks_columns = "uuid,state,retries,runtime,received,exception"
TASK_COLUMNS.update(uuid="Account.poll", exception="Why")
#: These exceptions are our words for the operator; any other keeps its type, which is all that it says.
_WORDS = re.compile(r"(?:DeadLettered|Waiting)\((['\"])(.*)\1\)")


def format_task(task: Task) -> Task:
    """A task as the pages show it: why it waits or failed, as long as it does, and none of our code."""
    words = _WORDS.fullmatch(task.exception or "")
    task.exception = words[2] if words else task.exception
    task.traceback = None
    if task.state not in {"RETRY", "FAILURE"}:
        task.exception = None
    return task


def _queues(_self: BaseHandler) -> list[str]:
    """The Broker page shows the queues that workers consume; nobody consumes dead letters, and they matter most."""
    return [POLLS, ANSWERS, *DeadLetterQueue]


# A private method of Flower, which is therefore pinned; the page is tested in a browser.
BaseHandler.get_active_queue_names = _queues


#: Seconds between two tries to hear the workers' events.
_PAUSE_S = 2


def _capture(self: Events) -> None:
    """Flower's own loop but for its pause, which doubles without end: after a night's outage it saw nothing all day."""
    while True:
        try:
            with self.capp.connection() as connection:
                receiver = EventReceiver(connection, handlers={"*": self.on_event}, app=self.capp)
                receiver.capture(limit=None, timeout=None, wakeup=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, seeing nothing is worse than trying again
            getLogger("flower.events").error("no events, trying again in %s s: %s", _PAUSE_S, error)
            time.sleep(_PAUSE_S)


Events.run = _capture


def _leave(*_: object) -> None:
    """Ends at once: there is nothing to save, and Flower's threads would wait for a server that is away."""
    os.write(2, logs.line("Flower stops").encode())
    os._exit(0)


def _check() -> None:
    """Refuses to be open to others, or to start on a busy port; by now the rest of the command line is read too."""
    is_closed = options.basic_auth or options.auth or options.unix_socket or is_loopback(options.address)
    with exiting_on_mistakes():
        if not is_closed:
            where = f"Flower on {options.address or 'all addresses'} needs it"
            raise ConfigurationError([Problem("BALANCES_FLOWER_AUTH", "is not set", f"{where}: user:password")])
        if not options.unix_socket:
            check_ports(options.address, {"BALANCES_FLOWER_PORT": options.port})
    if not options.persistent:
        command.sigterm_handler = _leave
        signal.signal(signal.SIGINT, _leave)


options.add_parse_callback(_check)
