"""Tasks with a countdown: python countdown.py COUNT SECONDS."""

import sys

from celery_plain import fetch

for number in range(int(sys.argv[1])):
    fetch.apply_async((f"account-{number}",), countdown=int(sys.argv[2]))
