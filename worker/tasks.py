"""Poll one account: begin, ask Khipu, decide, apply. Every step is a call to the module that owns it.

    message ─▶ begin ─▶ ask ─▶ decide ─┬▶ settle                      SUCCESS
                 │       │             ├▶ postpone                    RETRY, with the countdown
                 │       │             └▶ suspend, park, block        FAILURE, `DeadLettered`
               stale:    └▶ 202: accept; the callback's answer is decided on by `settle_answer`, the same way
               ignored

No rule and no number lives here. A task carries a token and returns nothing; what it raises shows in Flower, and is a
code and a type, never a balance, an account number or a secret.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from hashlib import sha256
from typing import NoReturn, TypeVar
from uuid import uuid4

import structlog
from celery import Task
from celery.exceptions import Ignore
from celery.exceptions import Retry as CeleryRetry
from celery.worker.request import Request

from worker import logs
from worker.accounts import Scheme
from worker.balances import DESCRIPTION_LIMIT, Accepted, Answer, check_currency, read_answer
from worker.celery import POLL_TASK, SETTLE_TASK, Wiring, app, wiring, worker_name
from worker.credentials import Credentials, Fingerprints, fingerprints, token_end
from worker.errors import (
    ConfigurationError,
    DeadLettered,
    KhipuFailure,
    Kind,
    MissingSecret,
    Outcome,
    PollCrashed,
    StoreUnavailable,
    Waiting,
)
from worker.khipu import never_shown
from worker.oauth import AccessToken
from worker.policy import TOKEN_ERROR, Block, Credential, DeadLetter, Publish, Retry, decide, is_contract_drift
from worker.settings import format_duration
from worker.stream import observed
from worker.timetable import (
    MISSING,
    Begun,
    CredentialRefused,
    Event,
    HeldBack,
    OtherScheme,
    Postponed,
    Suspension,
    Token,
    Unsettled,
    source_of,
)

log = structlog.get_logger()

#: Refusals in a row after which no host seems to hold another credential (design, §2: "the third refusal blocks").
MAX_REFUSALS = 3
#: How long a beginning, and a settling, waits for a server that is away; after that its message is pushed again.
BEGIN_PATIENCE_S = 60
SETTLE_PATIENCE_S = 60
#: Pause between two tries to tell the timetable how a poll ended, while the server is away.
PATIENCE_S = 0.5

#: A 202 to a request that named no callback: nothing will come, so it is asked again like an answer not understood.
UNEXPECTED_ACCEPTANCE = Outcome(Kind.UNREADABLE, code="UNREADABLE", description="202 without a CallbackUrl")
#: The timetable knows the AccountIds of this account, and the answer has another one.
FOREIGN_ANSWER = Outcome(Kind.FOREIGN, code="FOREIGN", description="AccountId or OperationId of another account")

T = TypeVar("T")


class UnacknowledgedRequest(Request):
    """A request that sends no acknowledgement.

    `Queue(no_ack=True)` alone does not stop them: kombu's virtual transports send MULTI/ZREM/HDEL/EXEC for each, and
    keep one tag per task for ever. Nothing is lost by it: the lease of the timetable brings a poll back.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True

    def reject(self, requeue: bool = False) -> None:  # noqa: ARG002 - Celery's signature
        self.acknowledged = True


class PollTask(Task):  # type: ignore[type-arg]
    """What all tasks of this package are: never acknowledged, without results, quiet about expected ends."""

    Request = "worker.tasks:UnacknowledgedRequest"
    ignore_result = True
    throws = (DeadLettered, PollCrashed)


class ShownRetry(CeleryRetry):
    """Marks a row RETRY, and shows there what is waited for; Celery's own shows itself, with that inside."""

    def __repr__(self) -> str:
        return repr(self.exc)


@dataclass(frozen=True, slots=True)
class Lease:
    """How long this worker may act on its token, by its own monotonic clock; started before the server's."""

    started_s: float
    ends_s: float

    @classmethod
    def lasting(cls, seconds: float) -> Lease:
        now_s = time.monotonic()
        return cls(now_s, now_s + seconds)

    @property
    def left_s(self) -> float:
        return self.ends_s - time.monotonic()

    @property
    def used_ms(self) -> int:
        return int((time.monotonic() - self.started_s) * 1000)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a poll, from its beginning to its decision; `is_answer`, from its callback to its decision."""

    wiring: Wiring
    begun: Begun
    lease: Lease
    fingerprints: Fingerprints
    credentials: Credentials | None = None
    callback_url: str | None = None
    is_answer: bool = False

    @property
    def token(self) -> Token:
        return self.begun.token


@app.task(name=POLL_TASK, base=PollTask)
def poll(login: str, account: str, poll: int, attempt: int) -> None:
    """Polls one account once, and leaves it with its next step in the timetable."""
    with fence(Token(login, account, poll, attempt)) as token:
        run(wiring(), token)


@app.task(name=SETTLE_TASK, base=PollTask)
def settle_answer(login: str, account: str, poll: int, attempt: int) -> None:
    """Settles the answers that callbacks brought for one attempt."""
    with fence(Token(login, account, poll, attempt)) as token:
        run_settling(wiring(), token)


@contextmanager
def fence(token: Token) -> Iterator[Token]:
    """Binds the log to the task, and lets nothing out but what Flower may show."""
    bound = {"task": token.task_id, "login": token.login, "account": token.account, "attempt": token.attempt}
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            yield token
        except (Ignore, CeleryRetry, DeadLettered):
            raise
        except StoreUnavailable as error:
            log.error("the server was away for too long", reason=str(error))
            raise PollCrashed(type(error).__name__) from None
        except Exception as error:
            # The last fence before Flower: a fault of ours. Its text may hold anything, so only its type goes out;
            # the lease brings the poll back.
            log.error("poll crashed", exc_info=error)
            raise PollCrashed(type(error).__name__) from None


def run(wiring: Wiring, token: Token) -> None:
    """begin → ask → conclude, or accept where the answer comes by callback."""
    attempt = begin(wiring, token)
    asked = ask(attempt)
    if isinstance(asked, Accepted):
        accept(attempt, asked)
    elif (end := conclude(attempt, *asked)) is not None:
        raise end


# ----------------------------------------------------------------------------------------------------------- begin

#: Scheme of each login as the timetable last said; begin corrects a wrong one before anything is begun.
_schemes: dict[str, Scheme] = {}


@dataclass(frozen=True, slots=True)
class Offer:
    """What this worker would send for a login; without `credentials`, `lack` says what is missing here."""

    credentials: Credentials | None
    fingerprints: Fingerprints
    lack: str = ""


def begin(wiring: Wiring, token: Token) -> Attempt:
    """Takes the token, with the credentials that this worker would send; a stale token ends here, ignored."""
    caller = f"{this_worker()} {uuid4().hex}"
    callback = new_callback(wiring)
    while True:
        scheme = _schemes.get(token.login, "api-key")
        offer = make_offer(wiring, token.login, scheme)
        prints = offer.fingerprints
        # Not before the offer: a new worker's first fingerprints wait for each other, and that is no time of the lease.
        call = partial(begin_once, wiring, token, caller, scheme, prints, callback.digest)
        lease_started_s, begun = patiently(Lease.lasting(BEGIN_PATIENCE_S), call)
        match begun:
            case OtherScheme():
                _schemes[token.login] = begun.scheme
            case CredentialRefused():
                refuse(wiring, token, begun, offer)
            case HeldBack():
                log.info("held back", why=begun.why, wait_s=round(begun.wait_ms / 1000))
                raise Ignore()
            case None:
                log.info("stale message ignored")
                raise Ignore()
            case Begun():
                assert offer.credentials is not None, "begin takes no missing credential"  # noqa: S101
                lease = Lease(lease_started_s, lease_started_s + begun.lease_ms / 1000)
                url = callback.url if begun.definition.mode == "callback" else None
                return Attempt(wiring, begun, lease, prints, offer.credentials, url)


def begin_once(
    wiring: Wiring, token: Token, caller: str, scheme: Scheme, prints: Fingerprints, callback: str
) -> tuple[float, Begun | OtherScheme | CredentialRefused | HeldBack | None]:
    """One call, and when it was made (monotonic): a repeated one is told what is left of the lease by then."""
    started_s = time.monotonic()
    return started_s, wiring.timetable.begin(
        token, caller=caller, scheme=scheme, bank=prints.bank, key=prints.key, callback=callback
    )


@dataclass(frozen=True, slots=True)
class Callback:
    """Where one attempt's answer is to be sent; the URL is a secret, Redis knows its digest only."""

    url: str | None
    digest: str


def this_worker() -> str:
    """The worker that runs this task, as it calls itself among those that are alive."""
    task = app.current_worker_task
    return worker_name(task.request.hostname if task else None)


def new_callback(wiring: Wiring) -> Callback:
    """A fresh token of 256 bits, where a webhook is configured."""
    base = wiring.settings.callback_url
    if base is None:
        return Callback(None, "")
    secret = secrets.token_urlsafe(32)
    return Callback(f"{base.rstrip('/')}/callbacks/{secret}", sha256(secret.encode()).hexdigest())


def make_offer(wiring: Wiring, login: str, scheme: Scheme) -> Offer:
    """The login's credentials as found here now, and what to call them in Redis."""
    try:
        credentials = usable_credentials(wiring, login, scheme)
    except (MissingSecret, ConfigurationError) as error:
        return Offer(None, Fingerprints(bank="", key=MISSING), lack=str(error))
    return Offer(credentials, fingerprints(credentials, wiring.salt))


def usable_credentials(wiring: Wiring, login: str, scheme: Scheme) -> Credentials:
    """The login's credentials as found here now. A token that has ended is none: Khipu would refuse it, and bill that.

    Raises MissingSecret and ConfigurationError as `CredentialStore.credentials` does.
    """
    credentials = wiring.credentials.credentials(login, scheme)
    end_s = token_end(credentials)
    if end_s is not None and end_s * 1000 <= wiring.timetable.now_ms():
        raise MissingSecret(f"login {login}: its token has ended; replace it")
    return credentials


def refuse(wiring: Wiring, token: Token, refused: CredentialRefused, offer: Offer) -> NoReturn:
    """Sends nothing: this credential already failed, or is missing. Another host may hold a better one."""
    log.warning("credential refused", credential=refused.credential, times=refused.times, lack=offer.lack)
    if refused.times < MAX_REFUSALS:
        raise Ignore()
    is_bank = refused.credential is Credential.BANK
    kind = Kind.LOG_ON_REFUSED if is_bank else Kind.KEY_REFUSED
    failed = offer.fingerprints.bank if is_bank else offer.fingerprints.key
    lack = offer.lack[:DESCRIPTION_LIMIT]
    description = lack or "no host offered another credential than the one that failed"
    outcome = Outcome(kind, code=kind, description=description)
    wiring.timetable.block(token, refused.credential, "" if failed == MISSING else failed, outcome, refused=True)
    raise DeadLettered(f"{outcome.code} (login blocked)")


# ------------------------------------------------------------------------------------------------------------- ask


def ask(attempt: Attempt) -> tuple[Outcome, Answer | None] | Accepted:
    """Asks Khipu once, unless too little of the lease is left: a worker that was frozen must not send any more."""
    deadline_s = attempt.begun.limits.request_deadline.total_seconds()
    if attempt.lease.left_s < deadline_s:
        log.warning("not sent: the lease is too short", left_s=round(attempt.lease.left_s, 1))
        raise Ignore()
    definition, url = attempt.begun.definition, attempt.callback_url
    try:
        answer = fetch(attempt, deadline_s)
        if isinstance(answer, Answer):
            check_currency(answer, definition.currency)
            return Outcome(Kind.OK, code="ok"), answer
    except KhipuFailure as failure:
        return ambiguous(failure) if url and is_ambiguous(failure) else (failure.outcome, None)
    return answer if url else (UNEXPECTED_ACCEPTANCE, None)


def fetch(attempt: Attempt, deadline_s: float) -> Answer | Accepted:
    """One request to Khipu; one more where it refuses an access token that was got for an earlier one."""
    credentials = attempt.credentials
    assert credentials is not None, "begin takes no missing credential"  # noqa: S101
    if credentials.scheme != "client-credentials":
        return send(attempt, credentials, deadline_s)
    ends_s = time.monotonic() + deadline_s
    token = access_token(attempt, credentials, ends_s)
    try:
        return send(attempt, token.credentials, ends_s - time.monotonic())
    except KhipuFailure as failure:
        if not is_token_refused(failure):
            raise
        attempt.wiring.access_tokens.forget(attempt.token.login, token)
        if not token.is_kept:
            raise
        another = access_token(attempt, credentials, ends_s)
        if another.credentials == token.credentials:
            raise
    log.warning("access token refused: asked again with another one")
    attempt.wiring.timetable.count("second requests")
    return send(attempt, another.credentials, ends_s - time.monotonic())


def access_token(attempt: Attempt, credentials: Credentials, ends_s: float) -> AccessToken:
    """A token for the login's client, kept or new."""
    url = attempt.begun.definition.token_url
    assert url is not None, "the accounts file is refused without it"  # noqa: S101
    left_s = ends_s - time.monotonic()
    return attempt.wiring.access_tokens.get(attempt.token.login, url, credentials, deadline_s=left_s)


def send(attempt: Attempt, credentials: Credentials, deadline_s: float) -> Answer | Accepted:
    """The one balance call."""
    definition, url = attempt.begun.definition, attempt.callback_url
    return attempt.wiring.khipu.fetch(definition, credentials, deadline_s=deadline_s, callback_url=url)


def is_token_refused(failure: KhipuFailure) -> bool:
    """Whether Khipu saw the token and did not take it."""
    outcome = failure.outcome
    return failure.sent and (outcome.kind is Kind.UNAUTHORIZED or outcome.code == TOKEN_ERROR)


def is_ambiguous(failure: KhipuFailure) -> bool:
    """Whether Khipu may well be at work although the request failed: then it must not be asked again before."""
    return failure.sent and failure.outcome.kind in {Kind.TIMEOUT, Kind.CONNECTION, Kind.SERVER_ERROR}


def ambiguous(failure: KhipuFailure) -> Accepted:
    """The failure taken for a 202 without `LifeSpan`."""
    log.warning("may have been accepted", code=failure.outcome.code, description=failure.outcome.description)
    return Accepted(operation_id="")


def accept(attempt: Attempt, accepted: Accepted) -> None:
    """Leaves the poll to its callback."""
    has_drift = bool(accepted.drift)
    timetable = attempt.wiring.timetable
    deadline_ms = patiently(
        attempt.lease, lambda: timetable.accept(attempt.begun, accepted.life_span, has_drift=has_drift)
    )
    log.info(
        "accepted",
        operation=accepted.operation_id,
        awaited_s=None if deadline_ms is None else round((deadline_ms - attempt.begun.now_ms) / 1000),
        unknown_fields=list(accepted.drift),
    )


# ---------------------------------------------------------------------------------------------------------- an answer


def run_settling(wiring: Wiring, token: Token) -> None:
    """Decides on a callback's body as on an answer to a request, then lets go of it.

    One body a message: each was announced by a message of its own. A repeated message finds nothing.
    """
    lease = Lease.lasting(SETTLE_PATIENCE_S)
    unsettled = patiently(lease, lambda: wiring.timetable.unsettled(token))
    if unsettled is None:
        raise Ignore()
    prints = Fingerprints(bank=unsettled.bank, key=unsettled.key)
    attempt = Attempt(wiring, unsettled.begun, lease, prints, is_answer=True)
    name, body = next(iter(unsettled.bodies.items()))
    end = conclude(attempt, *read_callback(wiring, unsettled, body))
    patiently(lease, lambda: wiring.timetable.forget_answer(token, [name]))
    if end is not None:
        raise end


def read_callback(wiring: Wiring, unsettled: Unsettled, body: bytes) -> tuple[Outcome, Answer | None]:
    """The body as an answer, or how it failed."""
    definition = unsettled.begun.definition
    try:
        # For what must not be shown of them, and without their fingerprints: those take a tenth of a second.
        credentials = wiring.credentials.credentials(definition.login, definition.scheme)
    except (MissingSecret, ConfigurationError):
        credentials = None
    try:
        answer = read_answer(body, unsettled.content_type, hide=never_shown(definition, credentials))
        check_currency(answer, definition.currency)
    except KhipuFailure as failure:
        return failure.outcome, None
    return Outcome(Kind.OK, code="ok"), answer


# ------------------------------------------------------------------------------------------------- decide and apply


def conclude(attempt: Attempt, outcome: Outcome, answer: Answer | None) -> Exception | None:
    """Decides what follows and applies it; returns what the task is to raise, so that Flower shows it."""
    begun = attempt.begun
    decision = decide(outcome, begun.counters, random.random(), begun.retry)  # noqa: S311 - jitter, no secret
    if not isinstance(decision, Publish):
        return fail(attempt, outcome, decision)
    if answer is None or not settle(attempt, answer):
        return conclude(attempt, FOREIGN_ANSWER, None)
    return None


def settle(attempt: Attempt, answer: Answer) -> bool:
    """Publishes the answer. False: it is another account's, and went nowhere."""
    definition = attempt.begun.definition
    fetched_at_ms = attempt.begun.now_ms + attempt.lease.used_ms
    event = Event(
        operation_id=answer.operation_id,
        source=source_of(definition),
        data=observed(definition, attempt.token.poll, answer, fetched_at_ms),
        fingerprint=answer.fingerprint(),
        account_ids=tuple(sorted({balance.account_id for balance in answer.balances})),
        fetched_at_ms=fetched_at_ms,
        as_of_ms=max((round(balance.as_of.timestamp() * 1000) for balance in answer.balances), default=None),
        has_drift=bool(answer.drift),
    )
    settled = patiently(attempt.lease, lambda: attempt.wiring.timetable.settle(attempt.begun, event))
    if settled is None:
        return False
    log.info(
        "settled",
        operation=answer.operation_id,
        result=settled.result,
        changed=settled.changed,
        unknown_fields=list(answer.drift),
        duration_s=attempt.lease.used_ms / 1000,
    )
    return True


def fail(attempt: Attempt, outcome: Outcome, decision: Retry | DeadLetter | Block) -> Exception:
    """Applies a decision that brings no balance, and returns what Flower shows of it."""
    timetable, token, begun, prints = attempt.wiring.timetable, attempt.token, attempt.begun, attempt.fingerprints
    applied = patiently(
        attempt.lease,
        lambda: timetable.conclude(
            token, outcome, decision, begun.retry, bank=prints.bank, key=prints.key, is_answer=attempt.is_answer
        ),
    )
    log.log(
        logs.LEVELS[type(decision)],
        "failed",
        code=outcome.code,
        type=outcome.type,
        description=outcome.description,
        **logs.decided(decision),
        drift=is_contract_drift(outcome),
        applied=applied if isinstance(applied, str) else type(applied).__name__,
        duration_s=attempt.lease.used_ms / 1000,
    )
    return shown(outcome, applied, begun.now_ms + attempt.lease.used_ms)


def shown(outcome: Outcome, applied: Postponed | Suspension | None, now_ms: int) -> Exception:
    """Flower's RETRY, FAILURE, or nothing for a stale token."""
    what = f"{outcome.code} {outcome.type}" if outcome.type else outcome.code
    match applied:
        case None:
            return Ignore()
        case Postponed():
            countdown_s = max(0, round((applied.due_ms - now_ms) / 1000))
            # Raised by hand it marks the row and sends nothing: beat sends the next attempt, under the same id.
            waiting = Waiting(f"{what}: again in {spoken(countdown_s)}")
            return ShownRetry(exc=waiting, when=countdown_s)  # type: ignore[arg-type]
        case "blocked":
            return DeadLettered(f"{what} (login blocked)")
        case _:
            return DeadLettered(what)


def spoken(seconds: int) -> str:
    """A duration as the accounts file writes it; from some minutes on without seconds, which say nothing then."""
    whole = timedelta(minutes=round(seconds / 60)) if seconds >= 600 else timedelta(seconds=seconds)
    return format_duration(whole)


def patiently(lease: Lease, call: Callable[[], T]) -> T:
    """Repeats `call` while the server is away, as long as the lease lasts: a paid answer is worth waiting for."""
    is_told = False
    while True:
        try:
            return call()
        except StoreUnavailable as error:
            if lease.left_s <= 0:
                raise
            if not is_told:
                log.warning("waiting for the server", reason=str(error))
            is_told = True
            time.sleep(PATIENCE_S)
