"""dramatiq with its Redis broker."""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from poll import poll

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_REDIS_URL"]))


@dramatiq.actor(max_retries=3)
def fetch(number: str) -> None:
    poll(number)


def main(count: int) -> None:
    for number in range(count):
        fetch.send(f"account-{number}")
