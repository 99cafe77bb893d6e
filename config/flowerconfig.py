"""Flower's settings, over the environment of the contract: read-only, bound to BALANCES_HOST, the dead letters shown.

`celery -A worker flower --conf=config/flowerconfig.py`
"""

import sys

from flower.views import BaseHandler

from worker.errors import ConfigurationError, Problem
from worker.policy import DeadLetterQueue
from worker.settings import is_loopback, load_settings
from worker.timetable import ANSWERS, POLLS

_settings = load_settings()

address = _settings.host
port = _settings.flower_port
#: Flower shows what is; `balances` changes it.
read_only = True
auto_refresh = True
purge_offline_workers = 300
max_tasks = 20_000
tasks_columns = "name,uuid,state,kwargs,received,started,runtime,worker,retries,exception"
#: A bank answers after 25 to 173 seconds; Flower's own buckets end at 10.
task_runtime_metric_buckets = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 90.0, 120.0, 180.0, 240.0]
if _settings.flower_auth is not None:
    basic_auth = [_settings.flower_auth.get_secret_value()]
elif not is_loopback(_settings.host):
    _problem = Problem("BALANCES_FLOWER_AUTH", "is not set", f"Flower on {_settings.host} needs it: user:password")
    print(f"balances: {ConfigurationError([_problem])}", file=sys.stderr)
    raise SystemExit(2)


def _queues(_self: BaseHandler) -> list[str]:
    """The Broker page shows the queues that workers consume; nobody consumes dead letters, and they matter most."""
    return [POLLS, ANSWERS, *DeadLetterQueue]


# A private method of Flower, which is therefore pinned; the page is tested in a browser.
BaseHandler.get_active_queue_names = _queues
