"""The limit: a loop with requests and redis-py, without any queue.

python bare.py COUNT, after which it waits for the next COUNT on standard input
"""

import sys

from poll import poll

for line in sys.stdin:
    for number in range(int(line)):
        poll(f"account-{number}")
