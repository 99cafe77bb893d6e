"""huey with its Redis storage and no results."""

import os

from huey import RedisHuey
from poll import poll

huey = RedisHuey(url=os.environ["BENCH_REDIS_URL"], results=False)


@huey.task(retries=3)
def fetch(number: str) -> None:
    poll(number)


def main(count: int) -> None:
    for number in range(count):
        fetch(f"account-{number}")
