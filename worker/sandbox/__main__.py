"""Start the sandbox from a shell: `python -m worker.sandbox --host 127.0.0.1 --port 8089`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from worker.sandbox.journal import HISTORY
from worker.sandbox.reading import NotationError
from worker.sandbox.server import PortUnavailable, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; 0 after a signal, 2 with one line of reason if it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m worker.sandbox", description="A faithful imitation of Khipu.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8089, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--latency", default="0s", help="of accounts that are told nothing, such as 2s or 0.2s-3s")
    parser.add_argument("--history", type=int, default=HISTORY, help="requests remembered (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no line per request")
    options = parser.parse_args(arguments)
    try:
        serve(options.host, options.port, latency=options.latency, history=options.history, quiet=options.quiet)
    except (PortUnavailable, NotationError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
