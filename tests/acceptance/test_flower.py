"""What an operator sees in Flower, in a real browser, of polls that succeed, wait, fail or block; and what nobody sees.

One deployment of real processes and a Chromium serve all of these tests; each has accounts of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests
from machine import AMOUNT, OK, PATIENCE_S, Account, Machine, Process, canaries_in
from playwright.sync_api import Browser, Page, Response
from servers import ROOT, ValkeyServer, wait_until

from worker.policy import DeadLetterQueue
from worker.store import LOOPBACK, free_port, tethered
from worker.timetable import ANSWERS, POLLS

USER, PASSWORD = "operator", "flower-canary"
QUEUES = [POLLS, ANSWERS, *DeadLetterQueue]
BARE_FLOWER = ("-m", "celery", "-A", "worker", "flower")
FLOWER = (*BARE_FLOWER, f"--conf={ROOT}/config/flowerconfig.py")

#: So long that no account comes up by itself, wherever in it its slot lies.
EVERY = "365d"
LATER = "error:E201:RETRY_IMMEDIATELY:The bank is slow."
ACCOUNTS = [
    Account("climbs", (LATER, LATER, OK), every=EVERY),
    Account("fine", every=EVERY),
    Account("waits", ("error:E202:WAIT_4_HOURS_BEFORE_RETRY",), every=EVERY),
    Account("dead", ("error:E401:DO_NOT_RETRY:NUMBER-CANARY-0004",), every=EVERY),
    Account("dead-too", ("error:E401:DO_NOT_RETRY",), every=EVERY),
    Account("blocked", ("error:E101:DO_NOT_RETRY",), every=EVERY),
    Account("parked", ("error:E203:RETRY_AFTER_NOTIFICATION",), every=EVERY),
    Account("foreign", (f"ok:{AMOUNT}:USD",), every=EVERY),
    Account("hangs", ("hang",), every=EVERY),
    Account("hangs-too", ("hang",), every=EVERY),
    Account("queued", every=EVERY),
]
#: Polled once before the first test.
SETTLED = ["fine", "waits", "dead", "dead-too", "blocked", "parked", "foreign"]
RETRY = {"immediately": ["20s", "40s"], "transient": ["20s"], "wait": "4h"}


class Watched(Machine):
    """A machine with a Flower, which has heard of the worker before anything is polled."""

    worker_process: Process

    def __enter__(self) -> Watched:
        super().__enter__()
        self.url = f"http://{LOOPBACK}:{(port := free_port())}"
        environ = {"BALANCES_FLOWER_PORT": str(port), "BALANCES_FLOWER_AUTH": f"{USER}:{PASSWORD}"}
        self.flower = self.start("flower", *FLOWER, **environ)
        wait_until(self._flower_listens_to_events, PATIENCE_S, "a Flower that listens to events")
        self.worker_process = self.worker(BALANCES_CONCURRENCY="2")
        wait_until(lambda: 'flower_worker_online{worker="worker@' in self.get("/metrics"), PATIENCE_S, "its worker")
        self.beat()
        return self

    def _flower_listens_to_events(self) -> bool:
        assert self.flower.is_alive, self.flower.text()
        return bool(self.store.execute_command("PUBSUB", "NUMPAT"))

    def get(self, path: str) -> str:
        """A page or an answer of Flower's API, as an operator gets it."""
        with suppress(requests.ConnectionError):
            answer = requests.get(self.url + path, auth=(USER, PASSWORD), timeout=PATIENCE_S)
            assert answer.ok, answer.text
            return answer.text
        return ""

    def task_id(self, alias: str) -> str:
        return f"{alias}.{self.account(alias)['poll']}"

    def poll(self, *aliases: str) -> None:
        """Poll them once and wait for the end of it."""
        self.kick(*aliases)
        for alias in aliases:
            wait_until(lambda alias=alias: self.outcomes(alias), PATIENCE_S, f"an attempt of {alias}")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with Watched(tmp_path_factory.mktemp("flower"), ACCOUNTS, retry=RETRY) as machine:
        machine.poll(*SETTLED)
        yield machine


@pytest.fixture
def page(browser: Browser, machine: Watched) -> Iterator[Page]:
    """A browser's page of an operator who has logged in, and whose scripts all run."""
    credentials = {"username": USER, "password": PASSWORD}
    with browser.new_context(http_credentials=credentials, viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        errors: list[Any] = []
        page.on("pageerror", lambda error: errors.append(error))  # a function of its own: playwright marks it
        page.goto(f"{machine.url}/tasks")
        yield page
        assert errors == []


def rows(page: Page, search: str) -> list[dict[str, str]]:
    """The rows of the Tasks page that a search finds, by the names of their columns, as they are shown."""
    with page.expect_response("**/tasks/datatable"):
        page.reload()
    box = page.get_by_role("searchbox")
    if box.input_value() != search:  # after the first time the browser remembers it
        with page.expect_response(lambda answer: searched(answer) == search):
            box.fill(search)
    page.wait_for_function("() => $.active === 0")
    columns = page.eval_on_selector_all("#tasks-table thead th", "all => all.map(th => th.dataset.column)")
    cells = page.eval_on_selector_all(
        "#tasks-table tbody tr[id]", "all => all.map(tr => [...tr.cells].map(td => td.innerText.trim()))"
    )
    return [dict(zip(columns, row, strict=True)) for row in cells]


def searched(answer: Response) -> str:
    """What the table's data that this answer brings were searched for."""
    return parse_qs(answer.request.post_data or "").get("search[value]", [""])[0]


def until_row(page: Page, task_id: str, **fields: str) -> dict[str, str]:
    """The only row of an account, as soon as it has these fields."""
    found: list[dict[str, str]] = []

    def is_shown() -> bool:
        found[:] = rows(page, task_id)
        return len(found) == 1 and fields.items() <= found[0].items()

    wait_until(is_shown, PATIENCE_S, f"a row {task_id} with {fields}; last seen: {found}")
    return found[0]


def test_a_poll_is_one_row_that_goes_from_retry_to_success(page: Page, machine: Watched) -> None:
    machine.poll("climbs")
    task_id = machine.task_id("climbs")
    for retries in range(2):
        row = until_row(page, task_id, state="RETRY", retries=str(retries))
        assert re.fullmatch(r"E201 RETRY_IMMEDIATELY: again in \d\ds", row["exception"])
        assert row["uuid"] == task_id
        machine.move_clock(60)
    row = until_row(page, task_id, state="SUCCESS", retries="2")
    assert row["exception"] == "", "what was waited for is over"
    assert re.search(r"\d", row["runtime"])
    assert len(rows(page, "climbs")) == 1, "one poll, one row"


@pytest.mark.parametrize(
    ("alias", "state", "why"),
    [
        ("fine", "SUCCESS", ""),
        ("waits", "RETRY", r"E202 WAIT_4_HOURS_BEFORE_RETRY: again in 4h(\d+m)?"),
        ("dead", "FAILURE", "E401 DO_NOT_RETRY"),
        ("blocked", "FAILURE", r"E101 DO_NOT_RETRY \(login blocked\)"),
        ("parked", "FAILURE", "E203 RETRY_AFTER_NOTIFICATION"),
        ("foreign", "FAILURE", "FOREIGN"),
    ],
)
def test_a_row_says_how_the_poll_ended_and_no_more(
    page: Page, machine: Watched, alias: str, state: str, why: str
) -> None:
    row = until_row(page, machine.task_id(alias), state=state)
    assert re.fullmatch(why, row["exception"])
    page.get_by_role("link", name=row["uuid"]).click()
    shown = page.locator("#task-page").inner_text()
    assert row["uuid"] in shown
    assert "Traceback" not in shown, "an operator has no use for our code"


def test_an_account_is_found_by_its_name(page: Page, machine: Watched) -> None:
    found = rows(page, "dead")
    assert {row["uuid"] for row in found} == {machine.task_id("dead"), machine.task_id("dead-too")}
    found = rows(page, "kwargs:account=dead")
    assert {row["uuid"] for row in found} == {machine.task_id("dead")}
    assert {row["state"] for row in rows(page, "state:FAILURE dead")} == {"FAILURE"}


def test_the_broker_page_has_both_queues_and_all_dead_letters(page: Page, machine: Watched) -> None:
    machine.kick("hangs", "hangs-too")
    for alias in ("hangs", "hangs-too"):
        machine.requests(alias, 1, ended=False)
    machine.kick("queued")  # both threads are taken, so it waits in the queue
    wait_until(lambda: machine.store.llen(POLLS) == 1, PATIENCE_S, "a poll in the queue")
    page.get_by_role("link", name="Broker").click()
    table = [row.split("\t")[:2] for row in page.locator("#queue-table tbody").inner_text().splitlines()]
    assert table == [
        [POLLS, "1"],
        [ANSWERS, "0"],
        [DeadLetterQueue.DO_NOT_RETRY, "3"],  # two accounts, and one login
        [DeadLetterQueue.AFTER_NOTIFICATION, "1"],
        [DeadLetterQueue.RETRIES_EXHAUSTED, "0"],
        [DeadLetterQueue.BAD_ANSWER, "1"],
    ]
    lengths = requests.get(f"{machine.url}/api/queues/length", auth=(USER, PASSWORD), timeout=PATIENCE_S).json()
    assert [[queue["name"], str(queue["messages"])] for queue in lengths["active_queues"]] == table
    for alias in ("hangs", "hangs-too"):
        machine.sandbox.answer_hanging(machine.number(alias), OK)
    machine.until_state("queued", "scheduled")


def test_no_page_and_no_answer_has_a_secret_a_number_or_an_amount(page: Page, machine: Watched) -> None:
    tasks = [machine.task_id(alias) for alias in SETTLED]
    wait_until(lambda: all(task in machine.get("/api/tasks") for task in tasks), PATIENCE_S, "all polls")
    worker = re.findall(r'flower_worker_online\{worker="([^"]+)"', machine.get("/metrics"))[0]
    paths = ["/", "/tasks", "/broker", "/api/tasks", "/api/workers?refresh=1", "/api/queues/length", "/metrics"]
    paths += [f"/worker/{worker}", *(f"/task/{task}" for task in tasks), *(f"/api/task/info/{task}" for task in tasks)]
    pages = [path for path in paths if not path.startswith(("/api", "/metrics"))]
    answers = {path: machine.get(path) for path in paths}
    assert all(answers.values())
    assert {path: leaks for path, text in answers.items() if (leaks := canaries_in(text))} == {}
    assert not any(PASSWORD in text for text in answers.values())
    shown = []
    for path in pages:
        page.goto(machine.url + path, wait_until="networkidle" if path == "/tasks" else "load")
        shown.append(page.content())
    assert "dead-too" in "".join(shown)
    assert canaries_in("".join(shown)) == []
    lines = [json.loads(line) for line in machine.flower.text().splitlines()]
    assert {"Visit me at " + machine.url} < {line["event"] for line in lines}
    assert canaries_in(machine.flower.text()) == []


def test_it_changes_nothing_and_asks_who_is_there(machine: Watched) -> None:
    worker = re.findall(r'flower_worker_online\{worker="([^"]+)"', machine.get("/metrics"))[0]
    for path in ("/tasks", "/broker", "/", "/api/tasks", "/api/workers"):
        assert requests.get(machine.url + path, timeout=PATIENCE_S).status_code == 401
        assert requests.get(machine.url + path, auth=(USER, "wrong"), timeout=PATIENCE_S).status_code == 401
    for path in (f"worker/shutdown/{worker}", f"worker/pool/grow/{worker}", "task/send-task/balances.poll"):
        answer = requests.post(f"{machine.url}/api/{path}", auth=(USER, PASSWORD), data="{}", timeout=PATIENCE_S)
        assert answer.status_code == 403
    assert machine.worker_process.is_alive


def test_the_runtime_histogram_reaches_as_far_as_banks_do(machine: Watched) -> None:
    buckets = re.findall(r'flower_task_runtime_seconds_bucket\{le="([^"]+)"', machine.get("/metrics"))
    assert list(dict.fromkeys(buckets))[-4:] == ["120.0", "180.0", "240.0", "+Inf"]


# -------------------------------------------------------------------------------------------------- without a browser


def start_flower(
    directory: Path, *options: str, command: tuple[str, ...] = FLOWER, **environ: str
) -> subprocess.Popen[bytes]:
    """A Flower by itself, with nothing of the tests' own environment; it writes to `flower.log`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
    with (directory / "flower.log").open("wb") as log:
        return subprocess.Popen(
            tethered([sys.executable, *command, *options]),
            cwd=directory,
            env={**inherited, "PYTHONPATH": str(ROOT), "BALANCES_FLOWER_PORT": str(free_port()), **environ},
            stdout=log,
            stderr=log,
        )


@pytest.mark.parametrize(
    ("options", "environ", "told"),
    [
        (
            (),
            {"BALANCES_HOST": "192.0.2.1"},
            "BALANCES_FLOWER_AUTH: is not set; Flower on 192.0.2.1 needs it: user:passw",
        ),
        (("--address=::",), {}, "BALANCES_FLOWER_AUTH: is not set; Flower on :: needs it: user:passw"),
        ((), {"BALANCES_FLOWER_AUTH": "secret-canary"}, "BALANCES_FLOWER_AUTH: its value is not user:password; "),
        ((), {"BALANCES_FLOWER_AUTH": "ünï:secret-canary"}, "BALANCES_FLOWER_AUTH: its value is not ASCII"),
        ((), {"BALANCES_FLOWER_PORT": "70000"}, "BALANCES_FLOWER_PORT: '70000' is not valid; give a port"),
        ((), {"BALANCES_REDIS_URL": "secret-canary"}, "BALANCES_REDIS_URL: its value "),
        ((), {"BALANCES_REDIS_URL": "redis://127.0.0.1:1/0", "BALANCES_FLOWER_PORT": "busy"}, "Address already in use"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    tmp_path: Path, valkey_server: ValkeyServer, options: tuple[str, ...], environ: dict[str, str], told: str
) -> None:
    if environ.get("BALANCES_FLOWER_PORT") == "busy":
        environ = {**environ, "BALANCES_FLOWER_PORT": str(valkey_server.port)}
    flower = start_flower(tmp_path, *options, **{"BALANCES_REDIS_URL": valkey_server.url, **environ})
    status = flower.wait(PATIENCE_S)
    said = (tmp_path / "flower.log").read_text()
    assert status == 2, said
    assert told in said
    assert said.startswith("balances: ")
    assert len(said.splitlines()) == 1
    assert "secret-canary" not in said


def test_without_its_settings_named_it_has_them_all_the_same(tmp_path: Path, valkey_server: ValkeyServer) -> None:
    environ = {"BALANCES_REDIS_URL": valkey_server.url, "BALANCES_HOST": "192.0.2.1"}
    flower = start_flower(tmp_path, command=BARE_FLOWER, **environ)
    assert flower.wait(PATIENCE_S) == 2
    assert "Flower on 192.0.2.1 needs it" in (tmp_path / "flower.log").read_text()


def test_a_server_that_is_away_at_the_start_and_later_is_waited_for(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path, requirepass="redis-canary")
    url = f"http://{LOOPBACK}:{(port := free_port())}"
    log = tmp_path / "flower.log"
    flower = start_flower(tmp_path, BALANCES_REDIS_URL=server.url, BALANCES_FLOWER_PORT=str(port))

    def page() -> str:
        with suppress(requests.ConnectionError):
            return requests.get(f"{url}/broker", timeout=PATIENCE_S).text
        return ""

    def until_without_server(count: int) -> None:
        wait_until(lambda: "No queue data is available" in page(), PATIENCE_S, "a page without a server")
        said = "no events, trying again in 2 s: "  # and never less often, however long it takes
        wait_until(lambda: log.read_text().count(said) >= count, PATIENCE_S, f"{count} failures to get events")

    try:
        until_without_server(1)
        with server, server.client() as client:
            client.rpush(DeadLetterQueue.BAD_ANSWER, *"abc")
            wait_until(lambda: all(queue in page() for queue in QUEUES), PATIENCE_S, "the queues' lengths")
            assert "redis-canary" not in page()
            wait_until(lambda: client.execute_command("PUBSUB", "NUMPAT"), PATIENCE_S, "events captured again")
        until_without_server(3)
        assert requests.get(f"{url}/api/tasks", timeout=PATIENCE_S).status_code == 401, "no API without a password"
        flower.terminate()
        assert flower.wait(PATIENCE_S) == 0, "its threads wait for the server; it does not wait for them"
    finally:
        flower.kill()
        flower.wait()
    assert "redis-canary" not in log.read_text()
    assert "Traceback" not in log.read_text()
