"""Stock beat, or RedBeat, with so many entries due at once: python stock_beat.py stock|redbeat COUNT

Prints, a second at a time, how many messages it has sent; BENCH_SECONDS of it.
"""

import os
import sys
import time
from datetime import timedelta

from celery import Celery
from celery.beat import PersistentScheduler, ScheduleEntry
from celery.schedules import schedule
from redbeat import RedBeatSchedulerEntry
from redbeat.schedulers import RedBeatScheduler

EVERY = timedelta(days=1)

app = Celery("stock_beat", broker=os.environ["BENCH_REDIS_URL"])
app.conf.redbeat_redis_url = os.environ["BENCH_REDIS_URL"]
app.conf.redbeat_lock_key = None


@app.task
def fetch(number: str) -> None:
    pass


def stock(count: int) -> PersistentScheduler:
    """Every entry last ran two days ago."""
    scheduler = PersistentScheduler(app, schedule_filename=f"stock-{count}", lazy=True)
    scheduler.setup_schedule()
    past = app.now() - 2 * EVERY
    for number in range(count):
        name = f"account-{number}"
        scheduler.schedule[name] = ScheduleEntry(
            name=name, task=fetch.name, args=(name,), schedule=schedule(EVERY), last_run_at=past, app=app
        )
    return scheduler


def redbeat(count: int) -> RedBeatScheduler:
    """The same, as its entries in Redis."""
    past = app.now() - 2 * EVERY
    for number in range(count):
        name = f"account-{number}"
        entry = RedBeatSchedulerEntry(name, fetch.name, schedule(EVERY), args=[name], app=app)
        entry.last_run_at = past
        entry.save()
    return RedBeatScheduler(app, lazy=True)


if __name__ == "__main__":
    kind, count = sys.argv[1], int(sys.argv[2])
    scheduler = {"stock": stock, "redbeat": redbeat}[kind](count)
    queue = app.connection_for_read().default_channel.client
    print("ready", flush=True)
    began = time.process_time(), time.monotonic()
    deadline = time.monotonic() + float(os.environ["BENCH_SECONDS"])
    while queue.llen("celery") < count and time.monotonic() < deadline:
        scheduler.tick()
    print(queue.llen("celery"), time.process_time() - began[0], time.monotonic() - began[1], flush=True)
