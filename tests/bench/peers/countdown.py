"""Four-hour countdowns, so many: python countdown.py COUNT."""

import sys

from celery_plain import fetch

for number in range(int(sys.argv[1])):
    fetch.apply_async((f"account-{number}",), countdown=14400)
