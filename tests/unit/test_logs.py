"""A line has types and frames, never what an exception says; and every event of ours is documented."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis
import requests
from servers import ROOT

from worker import logs
from worker.policy import Block, Counters, Credential, DeadLetter, DeadLetterQueue, Publish, Retry

SECRET = "secret-canary"
LEVELS = {"log", "debug", "info", "warning", "error", "critical", "exception"}


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error, as if it had been raised here."""
    try:
        raise error from cause  # noqa: TRY301 - a traceback is all that is wanted of it
    except BaseException as caught:  # noqa: BLE001
        return caught


@pytest.fixture
def lines() -> Iterator[list[dict[str, object]]]:
    """The JSON lines of the logger "someone", as a process would write them; filled in at the end of `with`."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter(is_terminal=False))
    handler.addFilter(logs.without_values)
    someone = logging.getLogger("someone")
    someone.addHandler(handler)
    someone.propagate = False

    class Lines(list[dict[str, object]]):
        def read(self) -> Lines:
            self[:] = [json.loads(line) for line in stream.getvalue().splitlines()]
            return self

    yield Lines()
    someone.removeHandler(handler)
    someone.propagate = True


@pytest.mark.parametrize(
    "error",
    [
        ValueError(SECRET),
        redis.ResponseError(f"ERR Error running script: {SECRET}"),
        requests.ConnectionError(SECRET, request=requests.Request("POST", f"https://khipu/{SECRET}")),
        OSError(111, SECRET),
        KeyError(SECRET),
        ExceptionGroup(SECRET, [ValueError(SECRET)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_of_what_an_exception_says_is_written(lines: list[dict[str, object]], error: Exception) -> None:
    someone, error = logging.getLogger("someone"), raised(error, raised(RuntimeError(SECRET)))
    someone.error("lost: %s", error)
    someone.error("lost: %r", error)
    someone.error("lost: %(why)s", {"why": error})
    someone.error(error)
    someone.error("lost", exc_info=error, stack_info=True, extra={"data": SECRET})
    written = lines.read()
    assert len(written) == 5
    assert SECRET not in str(written)
    assert all(type(error).__name__ in str(entry) for entry in written)
    assert {entry["logger"] for entry in written} == {"someone"}
    assert str(written[-1]["error"]).endswith(" < RuntimeError")
    assert re.fullmatch(r"unit/test_logs\.py:\d+ raised", written[-1]["at"][-1])


def test_celerys_trace_of_a_task_says_no_more_than_a_type(lines: list[dict[str, object]]) -> None:
    task = {"id": "a.1", "exc": f"KeyError('{SECRET}')", "traceback": SECRET, "args": SECRET, "kwargs": SECRET}
    record = logging.LogRecord("celery.app.trace", 40, "", 0, "%(id)s %(exc)s %(args)s %(traceback)s", (task,), None)
    logging.getLogger("someone").handle(record)
    assert [entry["event"] for entry in lines.read()] == ["a.1 KeyError"]


def test_a_chain_of_causes_ends_even_where_it_is_a_ring() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert logs.types(one) == "ValueError < KeyError < ValueError < KeyError < ValueError"
    assert logs.types(raised(ConnectionRefusedError(111, "x"))) == "ConnectionRefusedError (Connection refused)"
    quiet = ValueError()
    quiet.__context__, quiet.__suppress_context__ = KeyError(), True
    assert logs.types(quiet) == "ValueError"


def test_what_json_has_no_word_for_is_not_shown() -> None:
    entry = json.loads(logs.line("odd", value=ValueError(SECRET), path=Path(SECRET)))
    assert entry.items() >= {"event": "odd", "level": "info", "value": "ValueError", "path": "PosixPath"}.items()


@pytest.mark.parametrize(
    ("decision", "fields"),
    [
        (Publish(), {}),
        (Retry(timedelta(seconds=20.04), Counters()), {"countdown_s": 20.0}),
        (DeadLetter(DeadLetterQueue.BAD_ANSWER), {"queue": "balances.dead.bad-answer"}),
        (Block(Credential.KEY), {"credential": "key"}),
    ],
)
def test_a_decision_is_told_with_what_follows_it(
    decision: Publish | Retry | DeadLetter | Block, fields: dict[str, object]
) -> None:
    assert logs.decided(decision) == {"decision": type(decision).__name__, **fields}
    assert type(decision) in logs.LEVELS


# ------------------------------------------------------------------------------------------ in a process of its own

STRAYS = f"""
import logging, sys, threading, warnings
from celery.exceptions import SecurityWarning
from worker import logs
logs.configure()
warnings.warn("{SECRET}", UserWarning)
warnings.warn("run as\\n\\nanother user", SecurityWarning)
class Undead:
    def __del__(self):
        raise KeyError("{SECRET}")
Undead()
thread = threading.Thread(target=lambda: int("{SECRET}"), name="presence")
thread.start(); thread.join()
logging.getLogger("someone").info("%d", "{SECRET}")
logs.log.info("hello", account="acme")
raise RuntimeError("{SECRET}")
"""


def test_warnings_and_errors_that_nobody_caught_are_lines_too() -> None:
    done = subprocess.run([sys.executable, "-c", STRAYS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert SECRET not in done.stderr
    written = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(list(entry)[:3] == ["timestamp", "level", "event"] for entry in written)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}Z", entry["timestamp"]) for entry in written)
    told = [(entry["event"], entry.get("category") or entry.get("error"), entry.get("text")) for entry in written]
    assert told == [
        ("warning", "UserWarning", ""),
        ("warning", "SecurityWarning", "run as another user"),
        ("uncaught error", "KeyError", None),
        ("uncaught error", "ValueError", None),
        ("hello", None, None),
        ("uncaught error", "RuntimeError", None),
    ]
    assert written[3]["thread"] == "presence"
    assert written[2]["at"][-1].endswith("__del__")


UNRENDERED = """
import logging, sys
import structlog
from worker import logs
log = structlog.get_logger()
logs.configure()
log.info("before")
logs.configure(logfile=sys.argv[1])
ring = []
ring.append(ring)
log.info("a ring", ring=ring)
log.info("after")
logging.getLogger().setLevel(logging.WARNING)
log.info("not wanted")
"""


def test_a_line_that_cannot_be_rendered_stops_nobody_and_a_logger_follows_its_configuration(tmp_path: Path) -> None:
    """Used before or not: a worker's loggers are made at import, and Celery configures logging after that."""
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", UNRENDERED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["before"]
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["after"]


def test_on_a_terminal_it_reads_well() -> None:
    program = """
import logging
from worker import logs
logs.configure()
logs.log.warning("failed", code="E401", task="acme.1")
logging.getLogger("celery.beat").info("beat: Starting...")
"""
    ours, theirs = pty.openpty()
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=theirs, check=True, env=environ)
    os.close(theirs)
    said = b""
    while chunk := read(ours):
        said += chunk
    os.close(ours)
    plain = re.sub(r"\x1b\[\d+m", "", said.decode())
    assert plain != said.decode(), "in colour"
    first, second = plain.splitlines()
    assert re.fullmatch(r"20\S+Z \[warning +\] failed +code=E401 task=acme\.1", first.strip())
    assert re.search(r"\[info +\] beat: Starting\.\.\.", second)


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's end of a terminal that nobody writes to any more
        return b""


# ---------------------------------------------------------------------------------------------------------- the table


def said_in_the_code() -> dict[str, set[str]]:
    """Event → fields, of every call of a `log` in the package but the sandbox, which imitates another program."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "worker").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in LEVELS:
                    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
                    fields = found.setdefault(texts[0], set())
                    for keyword in call.keywords:
                        fields |= names(keyword)
    return found


def names(keyword: ast.keyword) -> set[str]:
    match keyword.arg:
        case None:
            return {"decision", "countdown_s", "queue", "credential"}
        case "exc_info":
            return {"error", "at"}
        case name:
            return {name}


def test_every_event_and_its_fields_are_documented() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([\w, ]+) \| [\w, ]+ \|([^|]*)\|", (ROOT / "docs/logs.md").read_text(), re.M)
    documented = {event: set(re.findall(r"`(\w+)`", fields)) for event, _, fields in rows}
    in_the_code = said_in_the_code()
    assert documented.keys() == in_the_code.keys()
    assert documented == in_the_code
    assert len(in_the_code) > 15
