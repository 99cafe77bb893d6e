"""Tell Prometheus, and whoever is on call, how it goes: all of it read from Redis when it is asked for, nothing kept.

    GET /metrics ─▶ figures ─▶ metric families         docs/metrics.md has the table
    GET /        ─▶ status page
    GET /healthz ─▶ 200, or 503 while Redis is away

Any number of them may run; none has to, for anything to be counted. It orders nothing, and needs no secret.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import redis
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from worker import figures, logs, page, status
from worker.celery import exiting_on_mistakes
from worker.errors import Kind, StoreUnavailable
from worker.figures import Durations, Figures
from worker.ops import Wanted
from worker.processes import check_ports
from worker.settings import load_settings
from worker.timetable import Timetable, connect

#: Upper bounds in seconds, as the scripts count them.
BUCKETS = (1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 150, 190, 300, 600, 1800, 3600, 14400, 86400)
#: What an answer, a callback and a stale call may be counted as.
ANSWERS = ("published", "late", "repeated", "foreign")
CALLBACKS = ("stored", "repeated", "full", "unknown")
STALE = {
    "accept": "accept",
    "begin": "begin",
    "postpone": "postpone",
    "suspend": "suspended",
    "park": "parked",
    "block": "blocked",
}

#: Of what a visitor asks for, so much is read.
LONGEST_QUERY = 64

Labelled = Mapping[Any, float]  #: the labels' values, a tuple → the metric's


@dataclass(frozen=True, slots=True)
class FromRedis(Collector):
    """Everything, each time anew. Without Redis: only that it is away."""

    client: redis.Redis
    stream: str

    def collect(self) -> Iterator[Metric]:
        started_s = time.perf_counter()
        try:
            found = figures.read(self.client, self.stream)
        except (redis.RedisError, StoreUnavailable):
            yield _up(0)
            return
        yield _up(1)
        yield _gauge(
            "scrape_duration_seconds",
            "How long reading Redis took for this scrape.",
            time.perf_counter() - started_s,
        )
        yield from families(found)


def families(found: Figures) -> Iterator[Metric]:
    """Every metric of the table but the two about the scrape itself."""
    yield from _about_accounts(found)
    yield from _about_balances(found)
    yield from _about_polls(found)
    yield from _about_answers(found)
    yield from _about_logins(found)
    yield from _about_queues(found)
    yield from _about_the_stream(found)
    yield from _about_processes(found)
    yield from _about_limits(found)


def _about_accounts(found: Figures) -> Iterator[Metric]:
    yield _gauges(
        "accounts",
        "Accounts by state as operators see it: paused and blocked lie over the others.",
        ("institution", "state"),
        found.accounts,
    )
    yield _gauge("accounts_parked", "Accounts that wait for a notification, also under a pause.", found.parked)
    yield _gauge("accounts_overdue", "Accounts that are due for longer than their own interval.", found.overdue.count)
    yield _moment(
        "accounts_overdue_oldest",
        "When the account that is overdue for longest became due.",
        found.overdue.oldest_ms,
    )
    yield _gauge(
        "accounts_awaiting",
        "Accounts whose request Khipu has taken and whose callback has not come.",
        found.awaiting.count,
    )
    yield _moment(
        "accounts_awaiting_oldest",
        "When the longest-awaited callback began to be awaited.",
        found.awaiting.oldest_ms,
    )


def _about_balances(found: Figures) -> Iterator[Metric]:
    yield _moments(
        "last_ok",
        "When an account of this institution was last polled with success.",
        "institution",
        found.last_ok_ms,
    )
    yield _moments(
        "oldest_as_of",
        "The bank's own moment of the oldest newest balance among the accounts that are being polled.",
        "institution",
        found.as_of_ms,
    )


def _about_polls(found: Figures) -> Iterator[Metric]:
    yield _counters("attempts", "Attempts that a worker has begun.", ("institution", "mode"), found.attempts)
    yield _counters(
        "polls",
        "Attempts that have ended, each once, by how they ended.",
        ("institution", "mode", "outcome", "type", "code"),
        found.polls,
    )
    yield _counters(
        "billed_requests",
        "Attempts that have ended and that Khipu may bill: all but those that found no connection.",
        ("institution",),
        _billed(found.polls),
    )
    yield _counters(
        "second_requests",
        "Requests that an attempt sent once more, with another access token.",
        (),
        {(): found.counts.get("second requests", 0)},
    )
    histogram = HistogramMetricFamily(
        "balances_poll_duration_seconds",
        "From the beginning of an attempt to its end, in callback mode with the wait for the callback.",
        labels=("institution", "mode"),
    )
    for whose, durations in found.durations.items():
        histogram.add_metric(whose, list(_cumulative(durations)), durations.sum_ms / 1000)
    yield histogram


def _billed(polls: Mapping[tuple[str, ...], int]) -> Labelled:
    not_sent = {kind.lower() for kind in (Kind.CONNECTION, Kind.LOG_ON_REFUSED, Kind.KEY_REFUSED)}
    billed = {(institution,): 0 for institution, *_ in polls}
    for (institution, _, outcome, *_), number in polls.items():
        billed[(institution,)] += 0 if outcome in not_sent else number
    return billed


def _cumulative(durations: Durations) -> Iterator[tuple[str, float]]:
    total = 0
    for bound in BUCKETS:
        total += durations.within.get(bound, 0)
        yield str(float(bound)), total
    yield "+Inf", total + durations.later


def _about_answers(found: Figures) -> Iterator[Metric]:
    yield _counters(
        "answers",
        "Answers by what became of them: published, late, repeated, or another account's.",
        ("result",),
        {(result,): found.counts.get(f"answer {result}", 0) for result in ANSWERS},
    )
    yield _counters(
        "callbacks",
        "Callbacks by what became of them: stored, repeated, too many for one token, or of no known token.",
        ("result",),
        {(result,): found.counts.get(f"callback {result}", 0) for result in CALLBACKS},
    )
    yield _gauge(
        "unsettled_answers",
        "Callbacks' answers that are stored and not yet settled.",
        found.unsettled.count,
    )
    yield _moment("unsettled_oldest", "When the oldest unsettled answer was stored.", found.unsettled.oldest_ms)
    yield _counters(
        "contract_drift",
        "Answers that differ from Khipu's documented contract: an undocumented error type or field, or a 202 without a "
        "LifeSpan that can be read.",
        ("kind",),
        {("type",): _unknown_types(found.polls), ("field",): found.counts.get("drift field", 0)},
    )
    yield _counters(
        "stale_calls",
        "Calls with a token that is no longer current, which changed nothing.",
        ("call",),
        {(call,): found.counts.get(f"stale {name}", 0) for call, name in STALE.items()},
    )
    yield _counters(
        "clock_jumps",
        "Times that the server's clock was found to have jumped.",
        (),
        {(): found.counts.get("clock jump", 0)},
    )


def _unknown_types(polls: Mapping[tuple[str, ...], int]) -> int:
    return sum(number for (*_, type_, _code), number in polls.items() if type_ == "other")


def _about_logins(found: Figures) -> Iterator[Metric]:
    yield _gauges(
        "logins_blocked",
        "Logins of which nothing goes out, by the credential that failed.",
        ("credential",),
        {(kind,): number for kind, number in found.blocked_by.items()},
    )
    yield _gauge(
        "logins_resting",
        "Logins that rest after three generic failures in a row, behind which a bad password may hide.",
        found.resting,
    )
    yield _gauge("logins_due", "Logins whose next step is due now and was not taken yet.", found.logins_due)
    yield _moments(
        "token_expiry",
        "When the login's token ends, for logins whose token says so.",
        "login",
        {login: expires_s * 1000 for login, expires_s in found.token_expiry_s.items()},
    )


def _about_queues(found: Figures) -> Iterator[Metric]:
    yield _gauges(
        "dead_letters",
        "Letters in a dead-letter queue.",
        ("queue",),
        {(queue,): some.count for queue, some in found.letters.items()},
    )
    oldest = {str(queue): some.oldest_ms for queue, some in found.letters.items() if some.oldest_ms is not None}
    yield _moments("dead_letters_oldest", "When the oldest letter of the queue was written.", "queue", oldest)
    yield _gauges(
        "queue_messages",
        "Messages that wait in a queue for a worker.",
        ("queue",),
        {(queue,): number for queue, number in found.queues.items()},
    )


def _about_the_stream(found: Figures) -> Iterator[Metric]:
    yield _gauge("stream_entries", "Entries on the stream.", found.entries)
    retention_s = None if found.retention_ms is None else found.retention_ms / 1000
    yield _gauge("stream_retention_seconds", "How long the stream keeps an entry.", retention_s)
    groups = {(lag.group,): lag for lag in found.groups}
    yield _gauges(
        "stream_group_lag_entries",
        "Entries that the consumer group has not been given yet, where the server can tell.",
        ("group",),
        {group: lag.lag for group, lag in groups.items() if lag.lag is not None},
    )
    yield _gauges(
        "stream_group_pending_entries",
        "Entries that were given to the consumer group and are not acknowledged.",
        ("group",),
        {group: lag.pending for group, lag in groups.items()},
    )
    yield _gauges(
        "stream_group_retention_used_ratio",
        "Age of the oldest entry that the consumer group has not dealt with, as a share of the retention.",
        ("group",),
        {group: lag.share for group, lag in groups.items()},
    )
    yield _gauges(
        "stream_group_lost_entries",
        "Entries that the stream forgot before the consumer group was given them.",
        ("group",),
        {group: lag.lost for group, lag in groups.items()},
    )


def _about_processes(found: Figures) -> Iterator[Metric]:
    yield _moment("last_claim", "When a beat last claimed.", found.claimed_at_ms)
    yield _gauge("workers", "Live workers that take polls.", len(found.workers))
    yield _gauge("settlers", "Live workers that take callbacks' answers and no polls.", found.settlers)
    yield _gauges(
        "worker_threads",
        "Polls that the live worker can run at once.",
        ("worker",),
        {(name,): worker.threads for name, worker in found.workers.items()},
    )
    begins = {name: worker.last_begin_ms for name, worker in found.workers.items() if worker.last_begin_ms is not None}
    yield _moments("worker_last_begin", "When the live worker last began a poll.", "worker", begins)


def _about_limits(found: Figures) -> Iterator[Metric]:
    yield _gauge("paused", "Whether an operator has paused everything.", int(found.is_paused))
    yield _moment("paused_since", "When everything was paused.", found.limits.paused_at_ms)
    yield _gauges(
        "breakers_open",
        "Breakers that are open: the institution is held and probed with one poll at a time.",
        ("institution",),
        _open_breakers(found),
    )
    yield _gauges(
        "breakers_open_oldest_timestamp_seconds",
        "When the institution's breaker that is open for longest was opened.",
        ("institution", "cause"),
        _opened(found),
    )
    yield _gauge(
        "logins_budget_spent",
        "Logins of which nothing goes out until tomorrow (UTC), because their own daily budget is spent.",
        len(found.limits.spent_logins),
    )
    yield _gauge("requests_today", "Requests counted against today's budget.", found.requests_today)
    yield _gauge("requests_daily_limit", "The budget of requests a day, where one is configured.", found.daily_requests)


def _open_breakers(found: Figures) -> Labelled:
    numbers = {(institution,): 0 for institution, _ in found.accounts}
    for name in found.limits.breakers:
        numbers[(_name_of(name),)] = numbers.get((_name_of(name),), 0) + 1
    return numbers


def _opened(found: Figures) -> Labelled:
    """The newest first, so that the oldest has the last word."""
    by_age = sorted(found.limits.breakers.items(), key=lambda each: -each[1].opened_at_ms)
    return {(_name_of(name), breaker.cause): breaker.opened_at_ms / 1000 for name, breaker in by_age}


def _name_of(institution: str) -> str:
    """The name in the accounts file, of "country/segment/name"."""
    return institution.rpartition("/")[2]


# ------------------------------------------------------------------------------------------------------------- families


def _up(value: int) -> Metric:
    return _gauge("store_up", "Whether Redis answered this scrape; if not, nothing else is said.", value)


def _gauge(name: str, help_: str, value: float | None) -> Metric:
    return _gauges(name, help_, (), {} if value is None else {(): value})


def _gauges(name: str, help_: str, labels: Iterable[str], values: Labelled) -> Metric:
    family = GaugeMetricFamily(f"balances_{name}", help_, labels=tuple(labels))
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _counters(name: str, help_: str, labels: Iterable[str], values: Labelled) -> Metric:
    family = CounterMetricFamily(f"balances_{name}", help_, labels=tuple(labels))
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _moment(name: str, help_: str, ms: int | None) -> Metric:
    return _gauge(f"{name}_timestamp_seconds", help_, None if ms is None else ms / 1000)


def _moments(name: str, help_: str, label: str, moments: Mapping[str, int]) -> Metric:
    values = {(value,): ms / 1000 for value, ms in moments.items()}
    return _gauges(f"{name}_timestamp_seconds", help_, (label,), values)


# ----------------------------------------------------------------------------------------------------------- endpoints


def metrics(request: Request) -> Response:
    """GET /metrics"""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.registry), media_type=None, headers={"Content-Type": content_type})


def healthz(request: Request) -> Response:
    """GET /healthz"""
    try:
        request.app.state.client.ping()
    except (redis.RedisError, StoreUnavailable):
        return JSONResponse({"status": "Redis is away"}, 503)
    return JSONResponse({"status": "ok"})


def status_page(request: Request) -> Response:
    """GET /, with `state`, `institution`, `q` and `page` as asked for"""
    asked = {name: value[:LONGEST_QUERY] for name, value in request.query_params.items()}
    wanted = Wanted(asked.get("state", ""), asked.get("institution", ""), asked.get("q", "").strip().lower())
    number = max(1, int(text)) if (text := asked.get("page", "1")).isdecimal() else 1
    timetable = Timetable(request.app.state.client, stream=request.app.state.stream)
    try:
        found = status.read(timetable, request.app.state.stream, wanted, number)
    except (redis.RedisError, StoreUnavailable):
        return HTMLResponse(page.without_redis(), 503, page.HEADERS)
    return HTMLResponse(page.of_status(found), headers=page.HEADERS)


def make_app(client: redis.Redis, stream: str) -> Starlette:
    """The ASGI app. Its endpoints read, so each runs in a thread."""
    app = Starlette(
        routes=[
            Route("/", status_page, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
        ],
    )
    app.state.client = client
    app.state.stream = stream
    app.state.registry = CollectorRegistry()
    app.state.registry.register(FromRedis(client, stream))
    return app


def main() -> None:
    """Serves until SIGTERM or SIGINT. Starts also while Redis is away, and says so when asked."""
    logs.configure()
    with exiting_on_mistakes():
        settings = load_settings()
        client = connect(settings.store_url())
        check_ports(settings.host, {"BALANCES_EXPORTER_PORT": settings.exporter_port})
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn stops at these and then raises them again, for whoever was there before: for us they are over by then.
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        make_app(client, settings.stream),
        host=settings.host,
        port=settings.exporter_port,
        http="h11",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=32,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
