"""Celery the usual way: its tutorial's task with its retries, the threads pool that a poller would choose."""

import os

import requests
from celery import Celery
from poll import poll

app = Celery("celery_plain", broker=os.environ["BENCH_REDIS_URL"])
app.conf.task_ignore_result = True
if "BENCH_VISIBILITY_S" in os.environ:
    app.conf.broker_transport_options = {"visibility_timeout": int(os.environ["BENCH_VISIBILITY_S"])}


@app.task(autoretry_for=(requests.RequestException,), retry_backoff=True, max_retries=3)
def fetch(number: str) -> None:
    poll(number)


def main(count: int) -> None:
    for number in range(count):
        fetch.delay(f"account-{number}")
