"""What a health check says of real processes: at work, idle, frozen, and without a server; see also test_stalled.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checked import CheckedMachine
from machine import PATIENCE_S, Account, frozen
from servers import wait_until

from worker.health import CLAIM_WITHIN_S
from worker.lifecycle import PRESENT_TTL_S
from worker.store import LOOPBACK, free_port

SETTLER = ("-n", "settler@%h", "-Q", "balances.answers", "-c", "2")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[CheckedMachine]:
    with CheckedMachine(tmp_path, [Account("acme")]) as machine:
        yield machine


def test_an_idle_worker_is_green_a_frozen_one_red_and_without_a_server_nobody_is_killed(
    machine: CheckedMachine,
) -> None:
    assert machine.check("worker") == machine.check("worker", "--alive")
    assert "no worker" in machine.check("worker")[1]
    beat, worker, settler = machine.beat(), machine.worker(), machine.worker("settler", *SETTLER)
    for process in ("beat", "worker", "settler"):
        assert machine.is_ready(process), machine.check(process)
        assert machine.is_alive(process)

    with frozen(worker):
        wait_until(lambda: not machine.is_ready("worker"), PRESENT_TTL_S + PATIENCE_S, "a red worker")
        assert not machine.is_alive("worker")
        assert machine.is_ready("settler"), "each process is judged by itself"
    wait_until(lambda: machine.is_ready("worker"), PATIENCE_S, "a worker that is back")

    with frozen(beat):
        machine.move_clock(CLAIM_WITHIN_S + 1)
        assert not machine.is_ready("beat")
        assert not machine.is_alive("beat")
    wait_until(lambda: machine.is_ready("beat"), PATIENCE_S, "a beat that is back")

    machine.server.kill()
    for process in ("beat", "worker", "settler"):
        assert not machine.is_ready(process)
        assert machine.is_alive(process), machine.check(process, "--alive")
    machine.server.start()
    assert all(process.is_alive for process in (beat, worker, settler))


def test_a_server_that_is_mute_blames_nobody_and_holds_no_check(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, free_port())) as mute:
        port = mute.getsockname()[1]
        env = {**os.environ, "BALANCES_REDIS_URL": f"redis://{LOOPBACK}:{port}/0"}
        command = [sys.executable, "-m", "worker.health", "worker"]
        for options, status in (((), 1), (("--alive",), 0)):
            run = subprocess.run(
                [*command, *options], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert (run.returncode, run.stdout) == (status, "worker: away: no answer from Redis in 5 s\n"), run.stderr


def test_a_mistake_in_the_settings_is_named(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "worker.health", "worker", "--alive"],
        env={**os.environ, "BALANCES_REDIS_URL": "redis://127.0.0.1:1/0", "BALANCES_GRACE": "soon"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 1
    assert run.stdout.startswith("worker: BALANCES_GRACE: ")


def test_a_check_loads_no_celery() -> None:
    code = "import sys, worker.health; sys.exit(bool({'celery', 'kombu', 'requests'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S).returncode == 0
