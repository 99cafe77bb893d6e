"""The status page in a real browser, from a real exporter: what is wrong first, filters with a script and without.

The server is real, and what happens on it goes through the timetable's scripts; one test has a real worker, too.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import requests
from click.testing import CliRunner
from machine import PATIENCE_S, Account, Machine
from playwright.sync_api import Browser, BrowserContext, Page, expect
from servers import ROOT, ValkeyServer, wait_until
from world import BANK, Entry, World, read_entries

from worker.cli import main
from worker.clock import Jump
from worker.errors import Kind, Outcome
from worker.policy import Counters, DeadLetterQueue
from worker.store import LOOPBACK, free_port, tethered

DAY_MS = 86_400_000
NUMBER, AMOUNT = "70017001", "424242"
SCRIPT = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


@dataclass
class Exporter:
    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_exporter(server: ValkeyServer, directory: Path) -> Iterator[Exporter]:
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
    mine = {"BALANCES_REDIS_URL": server.url, "BALANCES_EXPORTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    log = directory / "exporter.log"
    with log.open("wb") as out:
        command = tethered([sys.executable, "-m", "worker.exporter"])
        process = subprocess.Popen(command, cwd=directory, env={**inherited, **mine}, stdout=out, stderr=out)
    exporter = Exporter(f"http://{LOOPBACK}:{port}", process)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(requests.get(f"{exporter.url}/healthz", timeout=5).status_code)
        except requests.ConnectionError:
            return False

    try:
        wait_until(answers, PATIENCE_S, f"an exporter; see {log}")
        yield exporter
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def exporter(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    with running_exporter(valkey_server, tmp_path_factory.mktemp("exporter")) as exporter:
        yield exporter
        exporter.process.send_signal(signal.SIGTERM)
        assert exporter.process.wait(timeout=PATIENCE_S) == 0


@contextmanager
def opened(browser: Browser, **options: object) -> Iterator[Page]:
    """A page that asks nobody but its own server, and whose scripts all run."""
    with browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}) as context:
        yield from _watched(context)


def _watched(context: BrowserContext) -> Iterator[Page]:
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    yield page
    assert wrong == []
    assert {url.split("/")[2] for url in asked if not url.startswith("data:")} <= {page.url.split("/")[2]}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with opened(browser) as page:
        yield page


@pytest.fixture
def world(store: redis.Redis) -> World:
    """Thirteen accounts, of which some have failed in every way; beat has just claimed and a worker is alive."""
    world = World(store)
    logins = {"dead": "acme", "waits": "umbrella", "parks": "hooli", "pauses": "stark"}
    entries = [Entry(alias, login) for alias, login in logins.items()]
    entries += [Entry("fine", "acme", NUMBER), *(Entry(f"calm-{n}", f"calm-{n}") for n in range(6))]
    entries += [Entry(alias, "initech", institution="bice.cl") for alias in ("locked", "locked-too")]
    world.apply(read_entries(*entries))
    world.settle(world.start("fine"), amount=AMOUNT)
    token = world.start("dead").token
    world.timetable.suspend(
        token, DeadLetterQueue.DO_NOT_RETRY, Outcome(Kind.ANSWERED, "E401", "DO_NOT_RETRY", f"Unknown. {SCRIPT}")
    )
    world.postpone(world.start("waits").token, 4 * 3600)
    world.park(world.start("parks").token)
    world.block(world.start("locked").token)
    world.timetable.pause("pauses")
    world.pass_time(60_000)
    world.claim()
    return world


def rows(page: Page) -> list[str]:
    """The aliases of the table, from the top."""
    return page.locator("tbody td.who b").all_inner_texts()


def row(page: Page, alias: str) -> str:
    return page.locator("tr", has=page.locator("td.who b", has_text=alias)).first.inner_text()


def commands(page: Page) -> list[str]:
    return page.locator("#troubles code").all_inner_texts()


@pytest.mark.usefixtures("world")
def test_what_is_wrong_comes_first_with_what_to_type(page: Page, exporter: Exporter) -> None:
    page.goto(exporter.url)
    assert page.locator("h1").inner_text() == "3 things are wrong"
    assert page.locator("#troubles h2").all_inner_texts() == [
        "1 login blocked",
        "1 dead letter in do-not-retry",
        "1 dead letter in after-notification",
    ]
    assert {"balances unblock initech", "balances dead redrive dead", "balances release parks"} <= set(commands(page))
    assert page.title() == "3 things are wrong · balances"
    headings, table = page.locator("#troubles").bounding_box(), page.locator("table").bounding_box()
    assert headings["y"] < table["y"]


@pytest.mark.usefixtures("world")
def test_every_command_that_it_names_can_be_typed(page: Page, exporter: Exporter) -> None:
    page.goto(exporter.url)
    for command in set(page.locator("code").all_inner_texts()):
        program, *words = command.split()
        assert program == "balances"
        result = CliRunner().invoke(main, [*words, "--help"])
        assert result.exit_code == 0, command + result.output


@pytest.mark.usefixtures("world")
def test_an_account_has_its_state_its_age_its_next_step_and_the_reason(page: Page, exporter: Exporter) -> None:
    page.goto(exporter.url)
    assert rows(page)[:6] == ["locked", "locked-too", "dead", "parks", "waits", "pauses"], "trouble first"
    assert "waiting" in row(page, "waits")
    assert re.search(r"in 3 h 5[89] min\n\d\d:\d\d:\d\d UTC", row(page, "waits"))
    assert "after E201; next is attempt 2" in row(page, "waits")
    assert "ago" in row(page, "fine")
    assert "E401 DO_NOT_RETRY: Unknown." in row(page, "dead")
    assert "on redrive" in row(page, "dead")
    assert "E101 DO_NOT_RETRY: bad credentials" in row(page, "locked-too")
    assert "paused while scheduled" in row(page, "pauses")
    assert "none yet" in row(page, "calm-1")
    absolute = page.locator("td time small").first.inner_text()
    assert absolute.endswith(" UTC")


def test_when_nothing_is_wrong_it_says_so(page: Page, store: redis.Redis, exporter: Exporter) -> None:
    world = World(store)
    world.apply(read_entries(Entry("fine")))
    world.claim()
    page.goto(exporter.url)
    assert page.locator("h1").inner_text() == "Nothing is wrong"
    assert page.locator("#troubles").inner_text() == ""


@pytest.mark.parametrize(
    ("ail", "title"),
    [
        (lambda w: w.pass_time(31_000), "Beat is silent"),
        (lambda w: w.client.delete("workers"), "No worker is alive"),
        (lambda w: _idle(w), "Workers are alive and consume nothing"),
        (lambda w: w.client.sadd("overdue", "calm-1"), "1 account overdue"),
        (lambda w: _await(w), "Callbacks are missing"),
        (lambda w: w.client.zadd("received", {"calm-1 1 1": 1}), "1 answer not settled"),
        (lambda w: w.client.zadd("token_expires", {"acme": 1_800_000_000}), "1 token about to end"),
        (lambda w: _fall_behind(w), "1 consumer group behind"),
        (lambda w: _await(w), "No settler is alive"),
        (lambda w: w.client.zadd("received", {"calm-1 1 1": 1}), "No settler is alive"),
        (lambda w: w.client.hset("budgets", "stark", 0), "A daily budget is spent"),
        (lambda w: w.client.hset("config", "daily_requests", 0), "A daily budget is spent"),
        (lambda w: w.timetable.hold(Jump(3_600_000, 0), w.claim()), "Nothing is claimed after a jump of the clock"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_trouble_is_seen(page: Page, world: World, exporter: Exporter, ail: object, title: str) -> None:
    page.goto(exporter.url)
    expect(page.locator("h2", has_text=title)).to_have_count(0)
    ail(world)
    page.reload()
    expect(page.locator("h2", has_text=title)).to_have_count(1)


def _idle(world: World) -> None:
    world.client.lpush("balances.polls", "{}")
    world.client.zadd("begins", {"test": world.timetable.now_ms() - 6 * 60_000})


def _await(world: World) -> None:
    world.bank = "bank-2"
    begun = world.start("calm-2")
    world.timetable.accept(begun, None)
    world.client.zadd("awaiting", {"calm-2": world.timetable.now_ms() - 31 * 60_000})


def _fall_behind(world: World) -> None:
    world.client.xgroup_create("balances", "ledger", "0")
    world.client.hset("config", "retention_ms", 1)


def test_a_settler_that_is_alive_is_not_missed(page: Page, world: World, exporter: Exporter) -> None:
    _await(world)
    world.timetable.register_worker("settler@one:4", 0, ttl_s=60)
    page.goto(exporter.url)
    expect(page.locator("h2", has_text="Callbacks are missing")).to_have_count(1)
    expect(page.locator("h2", has_text="No settler is alive")).to_have_count(0)


def test_a_pause_over_everything_comes_first_and_lies_over_every_account(
    page: Page, world: World, exporter: Exporter
) -> None:
    world.client.sadd("overdue", "calm-1")
    world.timetable.pause_all()
    page.goto(exporter.url)
    banner = page.locator("#troubles article").first
    assert banner.locator("h2").inner_text() == "Everything is paused"
    assert banner.locator("code").all_inner_texts() == ["balances resume --all"]
    assert re.search(r"paused · .* UTC", banner.locator("li").inner_text())
    expect(page.locator("h2", has_text="overdue")).to_have_count(0)
    assert set(page.locator("tbody td[data-is=state]").all_inner_texts()) == {"paused"}
    assert "paused while waiting" in row(page, "waits")
    assert "balances resume --all" in row(page, "waits")
    assert page.locator("nav a").all_inner_texts() == ["all 13", "paused 13"]
    page.get_by_label("state").select_option("paused")
    expect(page.locator("tbody tr")).to_have_count(13)
    page.get_by_label("state").select_option("waiting")
    expect(page.locator("tbody tr")).to_have_count(0)
    world.timetable.resume_all()
    page.get_by_label("state").select_option("")
    expect(page.locator("h2", has_text="Everything is paused")).to_have_count(0)
    assert "scheduled" in row(page, "fine")


def test_an_institution_that_is_held_is_told_with_its_cause_and_its_next_probe(
    page: Page, store: redis.Redis, exporter: Exporter
) -> None:
    world = World(store)
    world.apply(read_entries(*(Entry(f"a{number}", f"login-{number}", f"1{number}") for number in range(6))))
    for number in range(5):
        token = world.start(f"a{number}").token
        world.timetable.postpone(token, DAY_MS, Counters(), Outcome(Kind.ANSWERED, "E201", "RETRY_IMMEDIATELY"))
    world.claim()
    page.goto(exporter.url)
    held = page.locator("#troubles article", has=page.locator("h2", has_text="1 institution held"))
    case = held.locator("li").inner_text()
    told = rf"cl/business/{re.escape(BANK)} · next probe in \d+s; unavailable since · .* UTC"
    assert re.fullmatch(told, case, re.DOTALL)
    assert held.locator("code").count() == 0, "nothing needs to be typed"
    world.client.hset(f"breaker:cl/business/{BANK}", "next_probe", 1)
    page.reload()
    assert "the next probe may go now" in held.locator("li").inner_text()


def test_a_budget_that_is_spent_is_told_with_whose_and_until_when(page: Page, world: World, exporter: Exporter) -> None:
    world.client.hset("budgets", "stark", 0)
    world.client.hset("config", "daily_requests", 0)
    page.goto(exporter.url)
    spent = page.locator("#troubles article", has=page.locator("h2", has_text="A daily budget is spent"))
    told = spent.locator("li").all_inner_texts()
    assert [text.partition(" · ")[0] for text in told] == ["all logins", "stark"]
    assert all(re.search(r"spent until \d{4}-\d\d-\d\dT00:00Z$", text) for text in told)
    assert spent.locator("code").all_inner_texts() == ["balances sync"]


@pytest.mark.usefixtures("world")
def test_filters_work_while_they_are_typed(page: Page, exporter: Exporter) -> None:
    page.goto(exporter.url)
    found, text = page.locator("tbody td.who b"), page.get_by_label("alias, or login")
    text.fill("locked")
    expect(found).to_have_text(["locked", "locked-too"])
    assert page.url.endswith("?q=locked")
    text.fill("umbrella")
    expect(found).to_have_text(["waits"])  # a login's accounts
    text.fill("")
    page.get_by_label("state").select_option("suspended")
    expect(found).to_have_text(["dead"])
    page.get_by_label("state").select_option("")
    page.get_by_label("institution").select_option("bice.cl")
    expect(found).to_have_text(["locked", "locked-too"])
    assert page.url.endswith("?institution=bice.cl")
    page.get_by_role("link", name="all 13").click()
    expect(found).to_have_count(13)


@pytest.mark.usefixtures("world")
def test_filters_work_without_a_script(browser: Browser, exporter: Exporter) -> None:
    with opened(browser, java_script_enabled=False) as page:
        page.goto(exporter.url)
        page.get_by_label("state").select_option("blocked")
        page.get_by_role("button", name="Show").click()
        expect(page.locator("tbody td.who b")).to_have_text(["locked", "locked-too"])
        assert page.get_by_label("state").input_value() == "blocked", "the form remembers what was asked for"
        page.goto(f"{exporter.url}/?state=no-such-state&q=%F0%9F%92%A9&page=-7")
        assert page.locator("#accounts .card").inner_text() == "No account fits."


def test_it_is_shown_anew_and_says_when_it_cannot_be(
    page: Page, world: World, valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    with running_exporter(valkey_server, tmp_path) as exporter:
        page.goto(exporter.url)
        world.timetable.unblock("initech")
        page.get_by_label("alias, or login").fill("locked")
        expect(page.locator("h1")).to_have_text("2 things are wrong")
        expect(page.locator("#lost")).to_be_hidden()
        exporter.process.kill()
        page.get_by_label("alias, or login").fill("dead")
        expect(page.locator("#lost")).to_be_visible()


def test_while_redis_is_away_it_says_so_and_comes_back(page: Page, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server, running_exporter(server, tmp_path) as exporter:
        with server.client() as client:
            World(client).apply(read_entries(Entry("fine")))
        server.kill()
        answer = page.goto(exporter.url)
        assert answer is not None
        assert answer.status == 503
        assert page.locator("h1").inner_text() == "Redis is away"
        server.start()
        page.get_by_label("alias, or login").fill("x")
        expect(page.locator("h1")).not_to_have_text("Redis is away", timeout=PATIENCE_S * 1000)


@pytest.mark.usefixtures("world")
def test_whatever_comes_from_outside_is_only_text(page: Page, exporter: Exporter) -> None:
    page.goto(f"{exporter.url}/?q=dead&institution=%22%3E{SCRIPT}")
    page.goto(f"{exporter.url}/?q=%22%3E%3Cscript%3Edocument.title%3D'run'%3C%2Fscript%3E")
    assert page.get_by_label("alias, or login").input_value().startswith('"><script>')
    page.goto(exporter.url)
    assert SCRIPT in page.locator("#troubles").inner_text()
    assert page.locator("img").count() == 0
    assert "run" not in page.title()
    policy = requests.get(exporter.url, timeout=10).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_no_number_and_no_amount_is_on_it(world: World, exporter: Exporter) -> None:
    for path in ("/", "/?q=fine", "/metrics"):
        text = requests.get(exporter.url + path, timeout=10).text
        assert NUMBER not in text
        assert AMOUNT not in text
    assert AMOUNT in str(world.timetable.latest()), "it was there to be shown"


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Browser, world: World, exporter: Exporter, width: int
) -> None:
    with opened(browser, viewport={"width": width, "height": 700}, is_mobile=True, has_touch=True) as page:
        page.goto(exporter.url)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("td.who").first.bounding_box()["width"] > 0.8 * (width - 60)
        assert page.evaluate("innerWidth") == width, "the page asks for the phone's own width"
        world.timetable.apply(read_entries(Entry("a" * 63, "b" * 40, institution="c" * 60)), force=True)
        world.bank = "bank-2"
        world.block(world.start("a" * 63).token)
        page.reload()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "however long the names are"


@pytest.mark.usefixtures("world")
def test_it_is_dark_where_the_person_likes_it_dark(browser: Browser, exporter: Exporter) -> None:
    backs = []
    for scheme in ("light", "dark"):
        with opened(browser, color_scheme=scheme) as page:
            page.goto(exporter.url)
            backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, back.removeprefix("rgb(").removesuffix(")").split(","))) for back in backs)
    assert dark < 150 < 600 < light


def test_many_accounts_come_page_by_page(page: Page, store: redis.Redis, exporter: Exporter) -> None:
    world = World(store)
    world.apply(read_entries(*(Entry(f"account-{n:03}", f"login-{n}", f"{n:08}") for n in range(450))))
    page.goto(exporter.url)
    assert len(rows(page)) == 200
    assert "1 to 200 of 450; 250 more" in page.locator(".pages").inner_text()
    page.get_by_role("link", name="next").click()
    page.get_by_role("link", name="next").click()
    assert rows(page) == [f"account-{n:03}" for n in range(400, 450)]
    assert "401 to 450 of 450; 0 more" in page.locator(".pages").inner_text()
    page.get_by_label("alias, or login").fill("account-44")
    expect(page.locator("tbody tr")).to_have_count(10)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_ordered(exporter: Exporter, method: str) -> None:
    assert requests.request(method, exporter.url, timeout=10).status_code == 405


def test_a_busy_port_stops_the_start_and_is_named(valkey_server: ValkeyServer, tmp_path: Path) -> None:
    environ = {"BALANCES_REDIS_URL": valkey_server.url, "BALANCES_EXPORTER_PORT": str(valkey_server.port)}
    done = subprocess.run(
        [sys.executable, "-m", "worker.exporter"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert f"BALANCES_EXPORTER_PORT: port {valkey_server.port} on 127.0.0.1" in done.stderr


def test_a_real_poll_is_counted_with_its_worker(tmp_path: Path) -> None:
    with Machine(tmp_path, [Account("fine", every="365d")]) as machine:
        worker = machine.worker()
        machine.beat()
        machine.kick("fine")
        machine.until_entries("fine", 1)
        machine.until_state("fine", "scheduled")
        with running_exporter(machine.server, tmp_path) as exporter:
            text = requests.get(f"{exporter.url}/metrics", timeout=10).text
    [begun] = [line for line in text.splitlines() if line.startswith("balances_worker_last_begin_timestamp_seconds{")]
    assert begun.split('"')[1].endswith(f":{worker.pid}")
    assert 'code="ok"' in text
    assert "balances_poll_duration_seconds_count{" in text
