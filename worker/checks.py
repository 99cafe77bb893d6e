"""Look at everything that polling needs, on the server and outside; over within ten seconds, whatever hangs.

    ops.check ─▶ clocks, hold ─▶ beat, workers, settlers ──┐
    Khipu ──┬── each on a thread of its own ───────────────┴──▶ findings
    token URLs, webhook

To Khipu it connects and sends nothing: every request is billed, and Khipu documents none that is not. What was never
started on this server is no mistake: so `balances check` is of use before the first start.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import redis
import requests

from worker import health, ops
from worker.accounts import Accounts
from worker.credentials import CredentialStore
from worker.errors import KhipuFailure, Kind, StoreUnavailable
from worker.khipu import KhipuClient
from worker.server import Finding, compare_clocks
from worker.settings import Settings, is_loopback
from worker.timetable import ANSWERS, POLLS, Timetable, connect
from worker.transport import Reply

#: All of it is over within this.
DEADLINE_S = 10.0
#: One address outside: its name, the connection, TLS, and the webhook's answer.
REACH_S = 5.0
#: The webhook's certificate is told of so long before it ends.
CERTIFICATE_LEFT = timedelta(days=14)
#: What `khipu` says of a broken connection, in a sentence.
BROKEN = {
    "certificate": "its certificate is not trusted, or not for that name",
    "TLS": "it does not speak TLS",
    "name resolution": "its name leads to no address",
    "connect": "nothing accepts a connection there",
}
NOT_STARTED = "not started yet"

T = TypeVar("T")


class Inside(NamedTuple):
    """What was found here and on the server. `has_run`: there was a beat or a worker on this server before."""

    findings: list[Finding]
    has_run: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Something outside, and how to look at it. `is_ours`: it is no mistake before the first start."""

    name: str
    look: Callable[[], Finding]
    is_ours: bool = False


class Look(Generic[T]):
    """A look that was begun, on a thread that nobody waits for at the end: a resolver knows no deadline."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._found: Future[T] = Future()
        self._call = call
        threading.Thread(target=self._run, name="check", daemon=True).start()

    def _run(self) -> None:
        try:
            self._found.set_result(self._call())
        except Exception as error:  # noqa: BLE001 - raised again by whoever asks
            self._found.set_exception(error)

    def result(self, until_s: float) -> T | None:
        """What was found, or None where it takes too long."""
        done, _ = wait([self._found], max(0.0, until_s - time.monotonic()))
        return self._found.result() if done else None


def check(settings: Settings, accounts: Accounts, credentials: CredentialStore, khipu: KhipuClient) -> list[Finding]:
    """Looks at everything that must be right before, and while, the processes run. The configuration was read.

    Raises ConfigurationError where no server is configured, and the embedded one was never started.
    """
    until_s = time.monotonic() + DEADLINE_S
    client = connect(settings.store_url(), retries=0)
    looks = [(place, Look(place.look)) for place in _places(settings, accounts, khipu)]
    store = Look(partial(_look_inside, settings, accounts, credentials, client))
    inside = store.result(until_s) or Inside([_mute("server")], has_run=True)
    outside = [_judged(place, look.result(until_s) or _mute(place.name), inside.has_run) for place, look in looks]
    return [*inside.findings, *outside]


def _judged(place: Place, finding: Finding, has_run: bool) -> Finding:
    if finding.is_right or has_run or not place.is_ours:
        return finding
    return replace(finding, is_right=True, detail=f"{NOT_STARTED}: {finding.detail}")


def _mute(name: str) -> Finding:
    return Finding(name, False, f"no answer in {DEADLINE_S:g} s")


# ------------------------------------------------------------------------------------------------------------- inside


def _look_inside(settings: Settings, accounts: Accounts, credentials: CredentialStore, client: redis.Redis) -> Inside:
    """Files and server; and the processes, by what the server knows of them, where it can be trusted."""
    findings = ops.check(settings, accounts, credentials, client)
    if any(finding.name == "server" and not finding.is_right for finding in findings):
        return Inside(findings, has_run=True)
    timetable = Timetable(client, stream=settings.stream)
    try:
        has_run = _has_run(timetable)
        findings.append(compare_clocks(client))
        findings += _check_hold(timetable)
        findings += _check_processes(timetable, _uses_callbacks(accounts), has_run)
    except (StoreUnavailable, redis.RedisError) as error:
        findings.append(Finding("server", False, f"cannot be asked any more: {type(error).__name__}"))
        return Inside(findings, has_run=True)
    return Inside(findings, has_run)


def _has_run(timetable: Timetable) -> bool:
    return timetable.claimed_at_ms() is not None or bool(timetable.workers())


def _uses_callbacks(accounts: Accounts) -> bool:
    return any(definition.mode == "callback" for definition in accounts.definitions.values())


def _check_hold(timetable: Timetable) -> Iterator[Finding]:
    left_ms = timetable.held_ms()
    if left_ms:
        detail = f"the server's clock jumped: nothing is claimed for {left_ms / 1000:.0f} s more; let NTP set it"
        yield Finding("hold", False, detail)


def _check_processes(timetable: Timetable, has_settlers: bool, has_run: bool) -> Iterator[Finding]:
    looks = {"beat": _check_beat, "workers": _check_workers, **({"settlers": _check_settlers} if has_settlers else {})}
    for name, look in looks.items():
        yield look(timetable) if has_run else Finding(name, True, NOT_STARTED)


def _check_beat(timetable: Timetable) -> Finding:
    beat = health.beat(timetable)
    return Finding("beat", beat.is_well, beat.reason if beat.is_well else f"{beat.reason}; is one running?")


def _check_workers(timetable: Timetable) -> Finding:
    threads = health.present(timetable, takes_polls=True).values()
    room = f"{len(threads)} present, {sum(threads)} threads" if threads else f"none is present: {health.ABSENT}"
    return Finding("workers", bool(threads), f"{room}; {timetable.waiting(POLLS)} polls wait")


def _check_settlers(timetable: Timetable) -> Finding:
    count = len(health.present(timetable, takes_polls=False))
    room = f"{count} present" if count else f"none is present: {health.ABSENT}"
    return Finding("settlers", count > 0, f"{room}; {timetable.waiting(ANSWERS)} answers wait")


# ------------------------------------------------------------------------------------------------------------ outside


def _places(settings: Settings, accounts: Accounts, khipu: KhipuClient) -> Iterator[Place]:
    reach = partial(_reach, khipu)
    url = settings.khipu_url
    yield Place("khipu", partial(reach, "khipu", url, "BALANCES_KHIPU_URL"), is_ours=settings.is_sandbox)
    for site, login in sorted(_token_sites(accounts).items()):
        yield Place("token_url", partial(reach, "token_url", site, f"token_url of login {login}"))
    yield _webhook_place(settings, accounts, khipu)


def _token_sites(accounts: Accounts) -> dict[str, str]:
    """Each host that gives access tokens, with one of the logins that get theirs there."""
    urls = {login: accounts.logins[login].token_url for login in accounts.schemes}
    return {_site(url): login for login, url in sorted(urls.items()) if url is not None}


def _site(url: str) -> str:
    """Scheme, host and port: the rest is nobody's business."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reach(khipu: KhipuClient, name: str, url: str, setting: str) -> Finding:
    """Whether a connection comes about, certificate included."""
    try:
        khipu.reach(url, deadline_s=REACH_S)
    except KhipuFailure as failure:
        return Finding(name, False, f"{_site(url)}: {_why(failure)}; is {setting} right, and may this host go there?")
    return Finding(name, True, f"{_site(url)} accepts connections; nothing was sent")


def _why(failure: KhipuFailure) -> str:
    if failure.outcome.kind is Kind.TIMEOUT:
        return f"no answer in {REACH_S:g} s"
    return BROKEN.get(failure.outcome.description, failure.outcome.description)


def _webhook_place(settings: Settings, accounts: Accounts, khipu: KhipuClient) -> Place:
    url = settings.callback_url
    if url is None or not _uses_callbacks(accounts):
        return Place("webhook", lambda: Finding("webhook", True, "not needed: no account is in callback mode"))
    if _is_here(url) and not _is_here(settings.khipu_url):
        wrong = f"Khipu cannot call {url}; BALANCES_CALLBACK_URL is to be the webhook's public address"
        return Place("webhook", lambda: Finding("webhook", False, wrong))
    return Place("webhook", partial(_ask_webhook, khipu, url), is_ours=True)


def _is_here(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")


def _ask_webhook(khipu: KhipuClient, url: str) -> Finding:
    """Whether our webhook answers at its public address, as Khipu would call it: verified, and without a redirect."""
    until_s = time.monotonic() + REACH_S
    try:
        certificate_end = khipu.reach(url, deadline_s=REACH_S)
        request = requests.Request("GET", f"{url}/healthz").prepare()
        reply = khipu.exchange(request, deadline_s=until_s - time.monotonic())
    except KhipuFailure as failure:
        wrong = f"{url}: {_why(failure)}; is it running, and BALANCES_CALLBACK_URL its public address?"
        return Finding("webhook", False, wrong)
    if not _is_webhook(reply):
        wrong = (
            f"{url}/healthz is not our webhook's (HTTP {reply.status}); is BALANCES_CALLBACK_URL its public address?"
        )
        return Finding("webhook", False, wrong)
    if certificate_end is not None and certificate_end - datetime.now(UTC) < CERTIFICATE_LEFT:
        return Finding(
            "webhook", False, f"{url}: its certificate ends at {certificate_end:%Y-%m-%d %H:%M} UTC; renew it"
        )
    return Finding("webhook", True, f"{url} is ours")


def _is_webhook(reply: Reply) -> bool:
    try:
        return reply.status == 200 and json.loads(reply.body or b"") == health.WEBHOOK_IS_WELL
    except (ValueError, RecursionError):
        return False
