"""What the exporter says at /metrics and /healthz, asked over HTTP, and that its table tells the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
import requests
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from served import served
from servers import ValkeyServer
from test_callbacks import CallbackWorld
from world import BANK, LEASE_MS, MINUTE_MS, STREAM, Entry, World, answer, read, read_entries

from worker import ops
from worker.accounts import Limits
from worker.errors import Kind, Outcome
from worker.exporter import BUCKETS, make_app
from worker.figures import STATES
from worker.policy import Counters, DeadLetterQueue
from worker.timetable import ANSWERS, POLLS, connect

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
NUMBER = "90000000"
#: Of which one name has two, and since when they are open (s).
BREAKERS = {"cl/business/one.cl": 1_800_000_000, "cl/personal/one.cl": 1_700_000_000}


@pytest.fixture
def url(store: redis.Redis) -> Iterator[str]:
    with served(make_app(store, STREAM)) as url:
        yield url


@pytest.fixture
def world(store: redis.Redis) -> World:
    """A world in which everything that can be counted has happened."""
    world = CallbackWorld(store, "z")
    world.apply(read_entries(*(Entry(alias, f"login-{alias}", mode="callback") for alias in "abcd")))
    world.timetable.register_worker("worker@one:1", 4, ttl_s=60)
    world.settle(world.start("a"))
    begun = world.start("a")
    drifted = replace(answer(begun, "777123", None, ("873458",), world.timetable.now_ms()), has_drift=True)
    world.timetable.settle(begun, drifted)
    world.timetable.postpone(
        world.start("d").token, 4 * 3_600_000, Counters(1), Outcome(Kind.ANSWERED, "E201", "ANOTHER_TYPE", NUMBER)
    )
    world.suspend(world.start("b").token)
    world.pass_time(MINUTE_MS)
    world.settle(world.start("c"))
    begun = world.start("c")
    world.accept(begun)
    begun = world.start("a")
    world.accept(begun)
    world.receive(begun.token)
    world.block(begun.token)
    store.zadd("token_expires", {"login-a": 1_900_000_000})
    store.sadd("overdue", "d")
    today = datetime.fromtimestamp(world.timetable.now_ms() / 1000, UTC).date()
    store.hset(f"requests:{today}", "*", 7)
    store.hset("config", "limits", Limits(daily_requests=9).model_dump_json())
    store.zadd("resting", {"login-d": world.timetable.now_ms() + MINUTE_MS, "login-c": world.timetable.now_ms() - 1})
    store.xgroup_create(STREAM, "ledger", "0")
    store.zadd("begins", {"worker@one:1": world.timetable.now_ms()})
    store.hset("budgets", mapping={"login-c": 2, "login-d": 9})
    store.hset(f"requests:{today}", mapping={"login-c": 2, "login-d": 8})
    store.sadd("breakers", *BREAKERS)
    for name, opened_s in BREAKERS.items():
        breaker = {"cause": "gateway", "opened_at": opened_s * 1000, "next_probe": opened_s * 1000 + 1}
        store.hset(f"breaker:{name}", mapping=breaker)
    return world


def scrape(url: str) -> dict[str, Metric]:
    response = requests.get(f"{url}/metrics", timeout=10)
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def values(families: dict[str, Metric], name: str) -> dict[tuple[str, ...], float]:
    """A metric's samples by their labels' values, in the order of the table; zeroes left out."""
    rows = table()
    _, labels = rows.get(name) or rows[f"{name}_total"]
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for sample in families[name].samples
        if sample.value
    }


def table() -> dict[str, tuple[str, list[str]]]:
    """Name → type and labels of every metric in docs/metrics.md."""
    rows = re.findall(r"^\| `(balances_\w+)` \| (\w+) \|([^|]*)\|", TABLE.read_text(), re.MULTILINE)
    return {name: (type_, re.findall(r"`(\w+)`", labels)) for name, type_, labels in rows}


def test_the_table_has_every_metric_and_each_is_as_it_says(world: World, url: str) -> None:
    families = scrape(url)
    world.timetable.pause_all()
    paused = scrape(url)
    assert families.keys() == paused.keys()
    said = {}
    for family in families.values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        samples = family.samples or paused[family.name].samples
        labels = {label for sample in samples for label in sample.labels}
        said[name] = (family.type, frozenset(labels - {"le"}))
        assert samples, f"{name} was never seen with a sample by this test"
    assert said == {name: (type_, frozenset(labels)) for name, (type_, labels) in table().items()}


@pytest.mark.usefixtures("world")
def test_help_texts_are_sentences_and_names_follow_the_conventions(url: str) -> None:
    for family in scrape(url).values():
        assert re.fullmatch(r"[A-Z].*\.", family.documentation), family.name
        assert not re.search(r"_(ms|minutes|hours|percent)\b", family.name)


def test_no_account_no_number_and_no_amount_is_in_it(world: World, url: str) -> None:
    text = requests.get(f"{url}/metrics", timeout=10).text
    labels = set(re.findall(r'="([^"]*)"', text))
    assert labels.isdisjoint(world.timetable.revisions())
    assert NUMBER not in text
    assert "777123" not in text
    assert "ANOTHER_TYPE" not in text, "whatever Khipu answers, the labels are few"


def test_the_numbers_are_those_of_the_world(world: World, url: str) -> None:
    families = scrape(url)
    assert values(families, "balances_accounts") == {
        (BANK, state): 1 for state in ("awaiting", "waiting", "suspended", "blocked")
    }
    assert values(families, "balances_accounts_awaiting") == {(): 1}
    assert values(families, "balances_attempts") == {(BANK, "callback"): 7}
    assert values(families, "balances_polls") == {
        (BANK, "callback", "ok", "none", "ok"): 3,
        (BANK, "callback", "answered", "other", "E2xx"): 1,
        (BANK, "callback", "answered", "DO_NOT_RETRY", "E4xx"): 1,
        (BANK, "callback", "answered", "DO_NOT_RETRY", "E1xx"): 1,
    }
    assert values(families, "balances_billed_requests") == {(BANK,): 6}
    assert values(families, "balances_contract_drift") == {("type",): 1, ("field",): 1}
    assert values(families, "balances_answers") == {("published",): 3}
    assert values(families, "balances_callbacks") == {("stored",): 1}
    assert values(families, "balances_unsettled_answers") == {(): 1}
    assert values(families, "balances_logins_blocked") == {("bank",): 1}
    assert values(families, "balances_logins_resting") == {(): 1}, "the other rest is over"
    assert values(families, "balances_dead_letters") == {(DeadLetterQueue.DO_NOT_RETRY,): 2}
    assert values(families, "balances_queue_messages").keys() <= {(POLLS,), (ANSWERS,)}
    assert values(families, "balances_token_expiry_timestamp_seconds") == {("login-a",): 1_900_000_000}
    assert values(families, "balances_workers") == {(): 2}
    assert values(families, "balances_worker_threads") == {("test",): 100, ("worker@one:1",): 4}
    assert values(families, "balances_stream_group_lag_entries")[("ledger",)] == world.client.xlen(STREAM)


def test_what_limits_do_is_told(world: World, url: str) -> None:
    families = scrape(url)
    assert values(families, "balances_paused") == values(families, "balances_settlers") == {}
    assert families["balances_paused"].samples
    assert not families["balances_paused_since_timestamp_seconds"].samples
    assert values(families, "balances_logins_budget_spent") == {(): 1}
    assert values(families, "balances_breakers_open") == {("one.cl",): 2}
    told = [tuple(sample.labels.values()) for sample in families["balances_breakers_open"].samples]
    assert told == [(BANK,), ("one.cl",)], "also where none is open"
    opened = values(families, "balances_breakers_open_oldest_timestamp_seconds")
    assert opened == {("one.cl", "gateway"): 1_700_000_000}
    world.timetable.register_worker("settler@one:4", 0, ttl_s=60)
    assert values(scrape(url), "balances_settlers") == {(): 1}


def test_while_everything_is_paused_operators_and_metrics_see_the_same(world: World, url: str) -> None:
    assert values(scrape(url), "balances_oldest_as_of_timestamp_seconds")
    world.timetable.pause_all()
    paused_s = world.timetable.now_ms() / 1000
    families = scrape(url)
    assert {row.state for row in ops.accounts(world.timetable)} == {"paused"}
    assert values(families, "balances_accounts") == {(BANK, "paused"): 4}
    assert values(families, "balances_accounts_overdue") == {}
    assert values(families, "balances_oldest_as_of_timestamp_seconds") == {}
    assert values(families, "balances_paused") == {(): 1}
    assert values(families, "balances_paused_since_timestamp_seconds")[()] == pytest.approx(paused_s, abs=5)
    world.timetable.resume_all()
    assert values(scrape(url), "balances_accounts") == {
        (BANK, state): 1 for state in ("awaiting", "waiting", "suspended", "blocked")
    }


@pytest.mark.usefixtures("world")
def test_every_state_of_an_institution_is_told_also_where_nobody_is(url: str) -> None:
    told = [tuple(sample.labels.values()) for sample in scrape(url)["balances_accounts"].samples]
    assert told == [(BANK, state) for state in STATES]


def test_moments_are_seconds_of_the_servers_clock(world: World, url: str) -> None:
    families = scrape(url)
    now_s = world.timetable.now_ms() / 1000
    for name in ("last_claim", "last_ok", "worker_last_begin", "accounts_awaiting_oldest", "unsettled_oldest"):
        [at_s] = values(families, f"balances_{name}_timestamp_seconds").values()
        assert now_s - 600 < at_s <= now_s


def test_a_histogram_adds_up(store: redis.Redis, url: str) -> None:
    world = World(store)
    world.apply(read("a"))
    for ms in (500, 40_000, LEASE_MS, 90_000_000):
        begun = world.start("a")
        world.pass_time(ms)
        world.settle(begun)
    samples = scrape(url)["balances_poll_duration_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert list(buckets) == [*(str(float(bound)) for bound in BUCKETS), "+Inf"]
    assert (buckets["1.0"], buckets["30.0"], buckets["45.0"], buckets["300.0"]) == (1, 1, 2, 3)
    assert (buckets["86400.0"], buckets["+Inf"]) == (3, 4)
    sums = {sample.name: sample.value for sample in samples if "_bucket" not in sample.name}
    assert sums["balances_poll_duration_seconds_count"] == 4
    assert sums["balances_poll_duration_seconds_sum"] == pytest.approx(90_000 + 290.5, abs=5)


def test_the_scripts_and_the_exporter_have_the_same_buckets() -> None:
    script = (Path(__file__).parents[2] / "worker" / "lua" / "shared.lua").read_text()
    [bounds] = re.findall(r"BUCKETS = \{ (.*) \}", script)
    assert tuple(map(float, bounds.split(","))) == BUCKETS


def test_what_is_not_there_has_no_moment(url: str) -> None:
    families = scrape(url)
    assert all(not family.samples for name, family in families.items() if name.endswith("_timestamp_seconds"))
    assert values(families, "balances_store_up") == {(): 1}


def test_without_redis_it_says_so_and_starts_all_the_same(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        address = server.url
    with served(make_app(connect(address), STREAM)) as url:
        families = scrape(url)
        assert {name: family.samples[0].value for name, family in families.items()} == {"balances_store_up": 0}
        assert requests.get(f"{url}/healthz", timeout=10).status_code == 503


def test_it_is_healthy_while_redis_answers(url: str) -> None:
    assert requests.get(f"{url}/healthz", timeout=10).json() == {"status": "ok"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz"])
def test_it_only_reads(url: str, method: str, path: str) -> None:
    assert requests.request(method, url + path, timeout=10).status_code == 405


def test_a_scrape_changes_nothing(world: World, url: str) -> None:
    before = world.snapshot(), world.client.info("commandstats").get("cmdstat_evalsha", {}).get("calls")
    scrape(url)
    assert (world.snapshot(), world.client.info("commandstats").get("cmdstat_evalsha", {}).get("calls")) == before
