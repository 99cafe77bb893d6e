"""Answer `POST /v1/{country}/banking/{segment}/{institution}/current/balances` as Khipu does.

    read ──▶ authorize ──▶ validate ──▶ log on at the bank ──▶ the account's next step ──▶ answer after its delay
      └─ 400 P00x ┴─ 401 ───────┘            └─ E101, E102          └──▶ with CallbackUrl: a 202, then `callbacks`

Khipu's P001–P003 are told apart here like this, which is our choice: P001 `AccountNumber`, P002 another field of the
body, P003 the body or the authentication as a whole. So is that a field which is null counts as one of a wrong type.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

from worker.sandbox import journal as states
from worker.sandbox.answers import Subject, accepted, error, render
from worker.sandbox.bank import Account, Bank, fingerprint, user_of
from worker.sandbox.behaviour import Behaviour, Step, Timing
from worker.sandbox.callbacks import Callbacks, Owed
from worker.sandbox.http import Exchange, Request, Response
from worker.sandbox.journal import Journal, Record, masked

log = logging.getLogger("sandbox")

ROUTE = re.compile(
    r"/v1/(?P<country>[a-z]{2})/banking/(?P<segment>business|personal|entrepreneur)"
    r"/(?P<institution>[a-z0-9][a-z0-9.-]*)/current/balances"
)
CURRENCY = re.compile(r"[A-Z]{3}")
ACCOUNT_NUMBER_LENGTH = 20
CALLBACK_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?([/?][!-~]*)?", re.ASCII)
CALLBACK_URL_LENGTH = 255
UNAUTHORIZED = Response(401, b'"Authorization failed"', "text/plain")


class Refused(Exception):
    """The request breaks a rule; `response` says so, and the journal keeps `label`."""

    def __init__(self, response: Response, label: str) -> None:
        self.response = response
        self.label = f"refused:{label}"
        super().__init__(label)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose body could be read: `data` is RequestData, `callback_url` as sent (None: not at all)."""

    data: dict[str, object]
    callback_url: object


class Endpoint:
    """The balances call. `hanging`: what waits for ever, by account number."""

    def __init__(self, bank: Bank, journal: Journal, callbacks: Callbacks) -> None:
        self._bank = bank
        self._journal = journal
        self._callbacks = callbacks
        self.hanging: dict[str, list[Callable[[Step], None]]] = {}

    def handle(self, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        record = self._journal.open()
        record.operation_id = str(uuid4())
        exchange.gone = partial(self._end, record, states.ABORTED)
        try:
            asked = self._read(exchange.request, record)
        except Refused as refused:
            record.behaviour = refused.label
            self._journal.begin(record)
            self._answer(exchange, record, refused.response)
            return
        self._journal.begin(record)
        self._perform(exchange, record, asked)

    def release(self, number: str, step: Step) -> int:
        """Answer the account's hanging requests with `step` now; how many there were."""
        waiting = self.hanging.pop(number, [])
        for answer in waiting:
            answer(step)
        return len(waiting)

    def _read(self, request: Request, record: Record) -> Asked:
        """Fill `record` with all that is known before refusing anything, then check in Khipu's order."""
        route = ROUTE.fullmatch(request.path)
        if route is None:
            raise Refused(Response(404, b"Not Found", "text/plain"), "404")
        record.country, record.segment, record.institution = route["country"], route["segment"], route["institution"]
        if request.method != "POST":
            raise Refused(Response(405, b"Method Not Allowed", "text/plain", {"Allow": "POST"}), "405")
        asked = _body(request)
        _note(asked, record)
        self._authorize(request, record)
        if asked is None:
            raise self._bad(record, "P003", "The body is no JSON object with RequestData.")
        self._validate(asked, record)
        record.log_on = self._session(asked, record)
        return asked

    def _authorize(self, request: Request, record: Record) -> None:
        key, bearer = request.headers.get("x-api-key"), request.headers.get("authorization")
        if key is not None and bearer is not None:
            raise self._bad(record, "P003", "Use x-api-key or Authorization, not both.")
        scheme, _, token = (bearer or "").partition(" ")
        secret = key or (token.strip() if scheme.lower() == "bearer" else "")
        if not secret:
            raise Refused(UNAUTHORIZED, "401")
        record.scheme, record.key_fingerprint = "api-key" if key else "bearer", fingerprint(secret)
        if not self._bank.admits(record.key_fingerprint):
            raise Refused(UNAUTHORIZED, "401")

    def _validate(self, asked: Asked, record: Record) -> None:
        number, currency, url = asked.data.get("AccountNumber"), asked.data.get("Currency"), asked.callback_url
        if not isinstance(number, str) or not 1 <= len(number) <= ACCOUNT_NUMBER_LENGTH:
            raise self._bad(record, "P001", "AccountNumber is a string of 1 to 20 characters.")
        if "Currency" in asked.data and not (isinstance(currency, str) and CURRENCY.fullmatch(currency)):
            raise self._bad(record, "P002", "Currency is three capital letters.")
        if record.scheme == "api-key" and asked.data.get("AccountCredential") is None:
            raise self._bad(record, "P002", "AccountCredential is required with x-api-key.")
        if url is not None and not (
            isinstance(url, str) and len(url) <= CALLBACK_URL_LENGTH and CALLBACK_URL.fullmatch(url)
        ):
            raise self._bad(record, "P002", "CallbackUrl is an http or https URL of at most 255 characters.")

    def _bad(self, record: Record, code: str, description: str) -> Refused:
        step = Step(behaviour=Behaviour.ERROR, code=code, type="DO_NOT_RETRY", description=description)
        return Refused(error(str(record.operation_id), step, status=400), f"400:{code}")

    def _session(self, asked: Asked, record: Record) -> str:
        """Whose session at the bank this is; with a token Khipu keeps the log-on, so the token stands for it."""
        if record.scheme == "bearer":
            return str(record.key_fingerprint)
        return log_on_of(record.institution, asked.data.get("AccountCredential"))

    def _perform(self, exchange: Exchange, record: Record, asked: Asked) -> None:
        account = self._bank.account(str(record.number))
        refused = None
        if record.scheme == "api-key":
            refused = self._bank.log_on(account, asked.data.get("AccountCredential"))
        step, delay_s = refused or self._bank.next_step(account)
        record.behaviour = step.label
        if asked.callback_url is not None and step.has_body:
            self._accept(exchange, record, account, step, delay_s, str(asked.callback_url))
        elif step.behaviour is Behaviour.HANG:
            self._hang(exchange, record, account)
        else:
            exchange.later(delay_s, partial(self._play, exchange, record, account, step))

    def _accept(
        self, exchange: Exchange, record: Record, account: Account, step: Step, delay_s: float, url: str
    ) -> None:
        """Callback mode: owe the answer, and send the 202, or what the step wants instead."""
        callback, now = step.callback, datetime.now(UTC)
        record.operation_id = step.operation_id or record.operation_id
        record.held = self._callbacks.rules.hold_log_on
        owed = Owed(record, _subject(record, account), step, url)
        react = partial(self._react, exchange, record, account, step, now)
        if callback.timing is Timing.EARLY:
            owed.before_accepting = partial(exchange.later, callback.accept_s, react)
        else:
            exchange.later(callback.accept_s, react)
        self._callbacks.owe(owed, now, delay_s)

    def _react(self, exchange: Exchange, record: Record, account: Account, step: Step, now: datetime) -> None:
        if record.over:  # the client left while the callback went ahead
            return
        instead = step.callback.but
        if instead is None:
            record.behaviour = "accepted"
            self._answer(exchange, record, accepted(str(record.operation_id), step.callback.life_span, now))
            return
        record.behaviour = instead.label
        if instead.behaviour is Behaviour.HANG:
            self._hang(exchange, record, account)
        else:
            self._play(exchange, record, account, instead)

    def _hang(self, exchange: Exchange, record: Record, account: Account) -> None:
        """Wait until the client leaves, or `release`."""
        play = partial(self._play, exchange, record, account)
        self.hanging.setdefault(account.number, []).append(play)

        def gone() -> None:
            if play in self.hanging.get(account.number, []):
                self.hanging[account.number].remove(play)
            self._end(record, states.ABORTED)

        exchange.gone = gone

    def _play(self, exchange: Exchange, record: Record, account: Account, step: Step) -> None:
        """Do what the step says, now."""
        if step.behaviour in (Behaviour.DROP, Behaviour.HANG):
            exchange.drop()
            self._end(record, states.DROPPED)
            return
        record.operation_id = step.operation_id or record.operation_id
        response = render(step, _subject(record, account))
        if step.behaviour is Behaviour.DRIP:
            exchange.drip(response, step.interval_s, partial(self._end, record, states.ANSWERED, response.status))
        else:
            self._answer(exchange, record, response)

    def _answer(self, exchange: Exchange, record: Record, response: Response) -> None:
        exchange.answer(response)
        self._end(record, states.ANSWERED, response.status)

    def _end(self, record: Record, state: str, status: int | None = None) -> None:
        self._journal.end(record, state, status)
        log.info(
            "%s %s %s %s %s %.3fs",
            record.institution or "-",
            masked(record.number),
            record.behaviour,
            state,
            status or "-",
            time.monotonic() - record.started_at,
        )


def log_on_of(institution: str, credential: object) -> str:
    """The name of a session at a bank: the fingerprint of institution and user (or of the credential without one)."""
    return fingerprint([institution, user_of(credential) or credential])


def _subject(record: Record, account: Account) -> Subject:
    return Subject(account.number, record.currency or "CLP", str(record.operation_id), account.amount)


def _body(request: Request) -> Asked | None:
    """The body as far as it has Khipu's shape."""
    try:
        body = json.loads(request.body)
    except ValueError:
        return None
    data = body.get("RequestData") if isinstance(body, dict) else None
    # A null is no string, and yet it is there: "" is refused like it.
    url = (body["CallbackUrl"] or "") if isinstance(body, dict) and "CallbackUrl" in body else None
    return Asked(data, url) if isinstance(data, dict) else None


def _note(asked: Asked | None, record: Record) -> None:
    """Keep what the body tells, right or wrong."""
    if asked is None:
        return
    number, currency = asked.data.get("AccountNumber"), asked.data.get("Currency")
    record.number = number if isinstance(number, str) else None
    record.currency = currency if isinstance(currency, str) else None
    record.callback = asked.callback_url is not None
    if asked.data.get("AccountCredential") is not None:
        record.credential_fingerprint = fingerprint(asked.data["AccountCredential"])
