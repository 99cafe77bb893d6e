"""A machine whose processes can be asked for their health."""

from __future__ import annotations

import subprocess
import sys

from machine import PATIENCE_S, Machine


class CheckedMachine(Machine):
    """A machine whose processes can be asked for their health, as an orchestrator does it."""

    def check(self, process: str, *options: str) -> tuple[bool, str]:
        """Whether it is green, and the reason."""
        run = subprocess.run(
            [sys.executable, "-m", "worker.health", process, *options],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert run.returncode in {0, 1}, run.stderr
        assert run.stderr == ""
        assert run.stdout.count("\n") == 1, "one line of reason"
        return run.returncode == 0, run.stdout

    def is_ready(self, process: str) -> bool:
        return self.check(process)[0]

    def is_alive(self, process: str) -> bool:
        return self.check(process, "--alive")[0]
