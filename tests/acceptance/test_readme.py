"""Whatever README tells a newcomer to type works, and what it says of failures is what the policy does."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import ROOT, wait_until

from worker.accounts import Retry
from worker.errors import Kind, Outcome
from worker.policy import Counters, DeadLetter, Decision, ErrorType, decide
from worker.policy import Retry as RetryDecision
from worker.store import free_port, tethered

README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Commands stand in indented blocks, or in backquotes within a sentence.
COMMANDS = sorted(set(re.findall(r"(?:^ {4}|`)((?:make|\.venv/bin/balances) [^`\n]+)", README, re.MULTILINE)))
#: The test run itself, what a person stops by hand, and what takes many minutes (a short version of each is a test).
NOT_HERE = {"make test", "make run", ".venv/bin/balances up", "make torture", "make bench"}
RUN = "make run FOR=40"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The newcomer's environment, but for ports and a data directory that are this test's own."""
    ports = {f"BALANCES_{name}_PORT": str(free_port()) for name in ("WEBHOOK", "FLOWER", "EXPORTER", "SANDBOX")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
    return {**clean, **ports, "BALANCES_DATA_DIR": str(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def running(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`make run FOR=40` as README gives it; at its end it must have left by itself, cleanly."""
    log = tmp_path_factory.mktemp("run") / "output"
    with log.open("wb") as out:
        process = subprocess.Popen(tethered(shlex.split(RUN)), cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        wait_until(lambda: accounts(environment), timeout=30, what=f"accounts; see {log}")
        yield log
        assert process.wait(timeout=90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def balances(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def accounts(environment: dict[str, str]) -> list[dict[str, object]]:
    done = balances(".venv/bin/balances accounts --json", environment)
    return json.loads(done.stdout) if done.returncode == 0 else []


def states(environment: dict[str, str]) -> list[str]:
    return sorted(str(account["state"]) for account in accounts(environment))


def test_the_sandbox_shows_every_fate_within_its_forty_seconds(running: Path, environment: dict[str, str]) -> None:
    def has_all() -> bool:
        found = states(environment)
        return [found.count(state) for state in ("waiting", "parked", "suspended", "blocked")] == [1, 1, 1, 2]

    wait_until(has_all, timeout=35, what=f"every fate; see {running}")

    def has_balances() -> bool:
        observed = json.loads(balances(".venv/bin/balances latest --json", environment).stdout)
        return len({each["account"] for each in observed}) >= 5

    wait_until(has_balances, timeout=35, what=f"five balances; see {running}")  # fates may come first


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith(".venv") and each not in NOT_HERE])
@pytest.mark.usefixtures("running")
def test_a_command_of_the_readme_works(command: str, environment: dict[str, str]) -> None:
    done = balances(command, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_of_the_readme_is_executed() -> None:
    assert {each for each in COMMANDS if not each.startswith(".venv")} == NOT_HERE - {".venv/bin/balances up"} | {RUN}
    assert set(COMMANDS) >= NOT_HERE


# ----------------------------------------------------------------------------------------------------- the table


def table() -> dict[str, str]:
    """`Error.Type` → what happens, as README says it."""
    section = README.partition("## What happens to a failed request")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `?([A-Z_0-9]{8,}|unknown or missing)`? \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {name: f"{what} | {where}" for name, what, where in rows}


def decided(error_type: str | None) -> Decision:
    return decide(Outcome(Kind.ANSWERED, "E200", error_type), Counters(), 0, Retry())


def test_the_table_has_every_type() -> None:
    assert set(table()) == {*ErrorType, "unknown or missing"}


@pytest.mark.parametrize("error_type", [*ErrorType, "unknown or missing"])
def test_the_table_says_what_the_policy_does(error_type: str) -> None:
    row = table()[error_type]
    match decided(None if error_type == "unknown or missing" else error_type):
        case DeadLetter(queue):
            assert f"`{queue}`" in row
            assert "FAILURE" in row
        case RetryDecision(countdown):
            waits = countdown >= Retry().wait
            assert ("5 s" in row) != waits
            assert ("4 hours" in row or "like `WAIT_4_HOURS_BEFORE_RETRY`" in row) == waits
            assert "waiting" in row
        case other:
            pytest.fail(f"no row can say {other}")
