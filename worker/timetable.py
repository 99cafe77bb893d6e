"""Keep the timetable: when each login is next due, and one Lua script for every change of that.

    scheduled ── claim ─▶ dispatched ── begin ─▶ polling ── accept ─▶ awaiting
        ▲                     ▲                     └────────┬───────────┘
        │                     │                              ├─ settle ───▶ scheduled, at its next slot
        │                     └── claim ── waiting ◀─────────┼─ postpone
        └── redrive, release ──── suspended, parked ◀────────┴─ suspend

The timetable is the truth, a Celery message is a hint. An account has exactly one next step, and it stands here: its
regular slot, a retry in seconds, the four-hour wait, and the end of a lease are all the same thing, a due time. A
token, (poll, attempt), tells whether a message or an answer still speaks of that step. The *login* is what the sorted
set `timetable` holds, because the bank log-on is what may have one request at a time.

The scripts live in `lua/`, with the keys described in `shared.lua` and arguments and results at each script's head;
`docs/states.md` has every state and every event, and each of its cells is a test. This module gives the scripts names
and types. It decides nothing: `worker.policy` does.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from typing import Any, Literal, TypeVar, assert_never, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ClusterDownError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry as ConnectionRetry

from worker import clock, policy, schedule, sentinel
from worker.accounts import Accounts, Definition, Limits, Retry, Scheme
from worker.errors import ConfigurationError, Outcome, Problem, Refused, StoreUnavailable
from worker.policy import Counters, Credential, DeadLetterQueue
from worker.scripts import LANES, Scripts, script_text
from worker.settings import to_ms

#: The queue that workers take polls from, and the one of answers that callbacks brought.
POLLS = "balances.polls"
ANSWERS = "balances.answers"
#: Logins that one claim looks at: a claim of 500 takes about 26 ms of the server's time.
CLAIM_BATCH = 500
#: Accounts that one call of `apply` defines, for the same reason.
APPLY_BATCH = 200
#: Accounts that one look for those that are overdue tells the ledger of, for the same reason.
OVERDUE_BATCH = 500
#: How long a stored answer waits before its settling is pushed again.
SETTLE_AGAIN_MS = 60_000
#: How long the server may take to write what it has taken in to its append-only file.
CONFIRM_MS = 3_000
#: How long it is remembered when a worker last began a poll, also of those that are gone.
REMEMBER_BEGINS_MS = 7 * 86_400_000
#: Of what is kept in Redis (`STATE_VERSION` of shared.lua).
STATE_VERSION = 1
#: Keys or entries that one call of `purge` is handed.
PURGE_BATCH = 500
#: Entries of the audit trail that one call reads.
AUDIT_BATCH = 200
#: Accounts whose definition a process keeps as it read it: it comes with every poll, and is the same nearly every time.
KNOWN_DEFINITIONS = 2_000
#: What a worker offers to begin with in place of a credential that it does not have.
MISSING = "missing"
#: What redis-py raises for a server that is away, or does not work now.
_AWAY = (
    redis.ConnectionError,
    redis.TimeoutError,
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
)
#: The server's refusals that pass by themselves, or by an operator's hand, without anything being wrong here.
_PASSING = ("OOM", "MISCONF", "READONLY", "LOADING", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "BUSY ", "WAITAOF")

T = TypeVar("T")

#: `json.dumps` would make an encoder for each text.
_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Token:
    """Which attempt of which poll of which account: all that a message ever carries."""

    login: str
    account: str
    poll: int
    attempt: int

    @property
    def task_id(self) -> str:
        return f"{self.account}.{self.poll}"

    @property
    def args(self) -> tuple[str, str, int, int]:
        return self.login, self.account, self.poll, self.attempt


@dataclass(frozen=True, slots=True)
class Lapse:
    """A token whose time is over: `state` is "polling" (its worker was lost) or "awaiting" (no callback came)."""

    token: Token
    state: Literal["polling", "awaiting"]
    counters: Counters


@dataclass(frozen=True, slots=True)
class News:
    """What happened to a limit.

    `what`: "breaker opened", "breaker closed", "login budget spent", "total budget spent", "login rests".
    """

    what: str
    institution: str = ""
    cause: str = ""
    logins: int = 0
    login: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one claim did. `wait_ms`: until the next login is due, None for an empty timetable.

    `clock_ms`: what the server's clock said (whatever tests do to it), `jumped_ms`: its jumps that are known.
    `news`: what the scripts have to say since the last claim, for the log.
    """

    dispatched: int
    resent: int
    wait_ms: int | None
    lapsed: tuple[Lapse, ...]
    clock_ms: int
    jumped_ms: int
    news: tuple[News, ...]


@dataclass(frozen=True, slots=True)
class Overdue:
    """A look for accounts that are overdue: which ones the ledger was told of, and whether there may be more."""

    told: tuple[str, ...]
    is_more: bool


@dataclass(frozen=True, slots=True)
class Begun:
    """A poll that may now be sent: its definition, and a lease of `lease_ms` from `now_ms` (server's time)."""

    token: Token
    now_ms: int
    lease_ms: int
    generation: int
    definition: Definition
    retry: Retry
    limits: Limits
    counters: Counters


@dataclass(frozen=True, slots=True)
class CredentialRefused:
    """The credential offered already failed and was not begun with; `times` in a row for this login."""

    credential: Credential
    times: int


@dataclass(frozen=True, slots=True)
class OtherScheme:
    """The login's scheme is this one, not the one offered; nothing was begun."""

    scheme: Scheme


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Over a limit for `wait_ms` more; nothing was begun, and nothing is lost.

    `why`: "rate", "breaker", "login budget", "total budget", "rest".
    """

    why: str
    wait_ms: int


@dataclass(frozen=True, slots=True)
class Breaker:
    """Why an institution is held and probed, since when, and when its next probe may go."""

    cause: str
    opened_at_ms: int
    next_probe_ms: int


@dataclass(frozen=True, slots=True)
class Reached:
    """The limits that are reached now.

    `paused_at_ms`: since when everything is paused. `breakers`: by institution ("cl/business/bank.cl"). `spent_logins`:
    those whose own daily budget is spent; `is_all_spent`: the one of all logins. `next_day`: when budgets begin anew.
    """

    paused_at_ms: int | None
    breakers: Mapping[str, Breaker]
    spent_logins: frozenset[str]
    is_all_spent: bool
    next_day: str


@dataclass(frozen=True, slots=True)
class Postponed:
    """The account is due again at this moment (ms, server's time)."""

    due_ms: int


@dataclass(frozen=True, slots=True)
class Settled:
    """`result`: "published" · "late" (published, the token was not current) · "repeated" (was published before)."""

    result: Literal["published", "late", "repeated"]
    changed: bool


@dataclass(frozen=True, slots=True)
class Event:
    """What `settle` puts on the stream: `data` lacks only `late` and `changed`, which the script knows.

    `as_of_ms`: the newest moment that the bank gives, None without a balance. `has_drift`: there were unknown fields.
    """

    operation_id: str
    source: str
    data: Mapping[str, object]
    fingerprint: str
    account_ids: tuple[str, ...]
    fetched_at_ms: int
    as_of_ms: int | None = None
    has_drift: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """What became of a callback's body; `task_id` is None for a token that nobody knows."""

    result: Literal["stored", "repeated", "full", "unknown"]
    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class Unsettled:
    """The answers that callbacks brought for one token: hash → body, and the poll as it was begun.

    `bank` and `key` are the fingerprints of what was sent.
    """

    begun: Begun
    content_type: str
    bank: str
    key: str
    bodies: Mapping[str, bytes]


Suspension = Literal["suspended", "parked", "blocked"]


def connect(url: str, *, connections: int = 2 * LANES, retries: int = 2) -> redis.Redis:
    """A client for `url` (`redis`, `rediss`, or `sentinel` as `worker.sentinel` has it), bounded in every way.

    Calls may be repeated: every script answers a repeated call as it answered the first, or refuses it.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "surrogateescape",  # a callback's body is bytes, whatever it says of itself
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "retry": ConnectionRetry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        "retry_on_error": [redis.ConnectionError, redis.TimeoutError],
    }
    if url.startswith(sentinel.SCHEME):
        return _connect_sentinel(url, options)
    pool = redis.BlockingConnectionPool.from_url(url, max_connections=connections, timeout=10, **options)
    return redis.Redis(connection_pool=pool)


def _connect_sentinel(url: str, options: dict[str, Any]) -> redis.Redis:
    """The current master, found anew after a failover."""
    from redis.sentinel import Sentinel

    address = sentinel.read_sentinel_address(url)
    master_for: Any = Sentinel(address.hosts, sentinel_kwargs=sentinel.ASKED).master_for  # type: ignore[no-untyped-call]
    who = {"username": address.user, "password": address.password, "db": address.database}
    return cast(redis.Redis, master_for(address.master, **who, **options))


class Timetable:
    """Every change and every reading of the timetable, over one client.

    `message`, `settling` and `letter` are the templates of the Celery messages of a poll, of the settling of its
    answer, and of a dead letter (`worker.celery` makes them); only who pushes needs them. `actor`: who gives orders
    through it, for the audit trail.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        stream: str,
        message: str = "",
        letter: str = "",
        settling: str = "",
        actor: str = "unknown",
    ) -> None:
        self.client = client
        self._stream = stream
        self._message = message
        self._letter = letter
        self._settling = settling
        self._actor = actor
        self._salt: bytes | None = None
        self._scripts = Scripts(client)

    def _run(self, script: str, *args: str | int) -> Any:
        return _guard(partial(self._scripts.run, script, *args))

    def check_version(self) -> None:
        """Raises `ConfigurationError` where Redis holds the state of a program that is not this one's version."""
        found = self._config("version", "retry")
        version = int(found["version"] or 0)
        if version == STATE_VERSION or found["retry"] is None:  # nothing was ever applied there
            return
        wrong = (
            f"holds state of version {version or '0 (before there were versions)'}, this program's is {STATE_VERSION}"
        )
        is_newer = version > STATE_VERSION
        right = "run the program that wrote it" if is_newer else "stop every process and run: balances migrate"
        raise ConfigurationError([Problem("Redis", wrong, right)])

    def migrate(self) -> bool:
        """Brings an older version's state to this one; whether there was anything to do. Raises `Refused`."""
        result, version = self._run("migrate", self._actor)
        if result == "refused":
            raise Refused(f"Redis holds state of version {version}, newer than this program's {STATE_VERSION}")
        return bool(result == "migrated")

    # ------------------------------------------------------------------------------------------------ beat

    def claim(self, most: int = CLAIM_BATCH, *, expected_ms: int | None = None) -> Claim:
        """Dispatches what is due, as far as the queue has room; returns what lapsed, for a decision.

        Does nothing where the server's clock, less its known jumps, is not about `expected_ms`.
        """
        expected = "" if expected_ms is None else expected_ms
        templates = (self._message, self._settling)
        row = self._run("claim", most, *templates, SETTLE_AGAIN_MS, expected, clock.TOLERANCE_MS)
        dispatched, resent, wait_ms, lapsed, clock_ms, jumped_ms, news = row
        rest = tuple(map(_read_lapse, lapsed)), clock_ms, jumped_ms, tuple(map(_read_news, news))
        return Claim(dispatched, resent, None if wait_ms < 0 else wait_ms, *rest)

    def hold(self, jump: clock.Jump, seen: Claim) -> int | None:
        """Takes note of a jump of the clock, as measured by what this claim saw; nothing is claimed for so long (ms).

        None: another beat had taken note of it already.
        """
        result = self._run("hold", jump.by_ms, seen.jumped_ms, seen.clock_ms - jump.within_ms)
        return int(result[1]) if result[0] == "held" else None

    def tell_overdue(self, most: int = OVERDUE_BATCH) -> Overdue:
        """Tells the ledger of accounts that have become overdue."""
        looked, told = self._run("overdue", self._stream, most)
        return Overdue(tuple(told), looked >= most)

    def apply(self, accounts: Accounts, *, force: bool = False, actor: str = "") -> int:
        """Makes Redis hold these definitions; returns how many accounts were added, changed or retired.

        Raises `Refused` where that would retire too many accounts at once, unless forced.
        """
        while True:
            known = self.revisions()
            gone = len(known.keys() - accounts.definitions.keys())
            if not force and policy.is_mass_removal(len(known), gone):
                raise Refused(
                    f"this would remove {gone} of {len(known)} accounts; if it is meant: balances sync --force"
                )
            changed = self._apply_once(accounts, actor or self._actor)
            if changed is not None:
                return changed

    def _apply_once(self, accounts: Accounts, actor: str) -> int | None:
        """One comparison, applied in batches; None when another apply came between."""
        config = self._config("serial")
        serial = config["serial"] or "0"
        changed = 0
        for event, batch in self._changes(accounts):
            result, count = self._run("apply", serial, event, *batch, actor)
            if result == "overtaken":
                return None
            changed += int(count)
        return changed

    def _changes(self, accounts: Accounts) -> Iterator[tuple[str, Sequence[str | int]]]:
        """The batches that lead from what Redis holds to `accounts`; the last one makes it the current content."""
        known = self.revisions()
        now_ms = self.now_ms()
        yield "prepare", _config_args(accounts)
        changed = (d for d in accounts.definitions.values() if known.get(d.alias) != d.revision)
        for batch in _batches(changed, APPLY_BATCH):
            yield "set", [part for definition in batch for part in _definition_args(definition, now_ms)]
        retired = (alias for alias in known if alias not in accounts.definitions)
        for aliases in _batches(retired, APPLY_BATCH):
            yield "retire", aliases
        yield "finish", _config_args(accounts)

    def revisions(self) -> dict[str, str]:
        """Every account defined now: alias → revision."""
        return cast(dict[str, str], _guard(lambda: self.client.hgetall("revisions")))

    def current_content(self) -> str | None:
        """Digest of the accounts file in force."""
        return self._config("content")["content"]

    def content_of_file(self, file: str) -> str | None:
        """Digest of what this accounts file holds, if it is in force and a beat has read it: `file_digest` names it."""
        config = self._config("content", "file", "file_content")
        return config["content"] if (config["file"], config["file_content"]) == (file, config["content"]) else None

    def remember_file(self, file: str, content: str) -> None:
        """Says what the file holds that a beat has read."""
        _guard(lambda: self.client.hset("config", mapping={"file": file, "file_content": content}))

    def knows_content(self, digest: str) -> bool:
        """Whether this accounts file was ever in force."""
        return _guard(lambda: self.client.zscore("contents", digest)) is not None

    def retry(self) -> Retry:
        """The `[retry]` table in force."""
        return Retry.model_validate_json(self._config("retry")["retry"] or "{}")

    # ---------------------------------------------------------------------------------------------- worker

    def begin(
        self, token: Token, *, caller: str, scheme: Scheme, bank: str, key: str, callback: str = ""
    ) -> Begun | OtherScheme | CredentialRefused | HeldBack | None:
        """Begins the poll, once per token; the same caller, "worker id", may repeat. None: the token is stale.

        `bank` and `key` are fingerprints of what this worker would send ('' for none, or `MISSING`); `callback` is the
        digest of the token that it would be called back with.
        """
        result = self._run("begin", *token.args, caller, scheme, bank, key, callback)
        match result[0]:
            case "begun":
                return _read_begun(token, result)
            case "scheme":
                return OtherScheme(result[1])
            case "refused":
                return CredentialRefused(Credential(result[1]), int(result[2]))
            case "held":
                return HeldBack(result[1], int(result[2]))
            case _:
                return None

    def accept(self, begun: Begun, life_span: datetime | None, *, has_drift: bool = False) -> int | None:
        """Leaves the poll to its callback; returns its deadline (ms), or None for a stale token.

        `has_drift`: the 202 had unknown fields, or no `LifeSpan` that can be read.
        """
        limits = begun.limits
        promised = "" if life_span is None else round(life_span.timestamp() * 1000)
        bounds = (limits.life_span_ms, limits.callback_grace_ms, limits.login_hold_ms)
        result = self._run("accept", *begun.token.args, promised, *bounds, "drift" if has_drift else "")
        return int(result[1]) if result[0] == "awaiting" else None

    def unsettled(self, token: Token) -> Unsettled | None:
        """The answers that wait for this token's settling, None when there are none."""
        key = _answer_key(token)
        pipeline = self.client.pipeline(transaction=False)
        pipeline.hgetall(key)
        pipeline.hmget(f"account:{token.account}", "tries", "waits", "losses", "last_outcome")
        pipeline.hget(f"login:{token.login}", "generic")
        pipeline.hmget("config", "retry", "limits")
        answer, counters, generic, config = _guard(pipeline.execute)
        return _read_unsettled(token, answer, (*counters, generic), config) if answer else None

    def forget_answer(self, token: Token, hashes: Iterable[str]) -> None:
        """Lets go of bodies that were settled; the rest, which came meanwhile, is settled by another message."""
        self._run("forget", *token.args, *hashes)

    def settle(self, begun: Begun, event: Event) -> Settled | None:
        """Publishes the answer, once per operation, whatever its token says. None: it is another account's."""
        data = _as_json(event.data)
        definition = begun.definition
        next_ms = _next_slot_ms(definition, begun.now_ms, event.fetched_at_ms)
        result = self._run(
            "settle",
            self._stream,
            *begun.token.args,
            begun.generation,
            event.operation_id,
            event.source,
            event.fetched_at_ms,
            data.removesuffix("}"),
            event.fingerprint,
            next_ms,
            _revision(definition),
            schedule.interval_ms(definition, next_ms),
            "" if event.as_of_ms is None else event.as_of_ms,
            "drift" if event.has_drift else "",
            *event.account_ids,
        )
        return None if result[0] == "foreign" else Settled(result[0], result[1] == "true")

    def postpone(
        self,
        token: Token,
        countdown_ms: int,
        counters: Counters,
        outcome: Outcome,
        *,
        rest: timedelta | None = None,
        is_answer: bool = False,
    ) -> Postponed | None:
        """Lets the account wait, and its login `rest`. None: the token is stale; at most the login rests."""
        tried = (counters.tries, counters.waits, counters.losses)
        ended = (outcome.code, _by(is_answer), policy.class_of(outcome), policy.cause_of(outcome) or "", _ms_of(rest))
        return _read_postponed(self._run("postpone", *token.args, countdown_ms, *tried, *ended))

    def conclude(
        self,
        token: Token,
        outcome: Outcome,
        decision: policy.Retry | policy.DeadLetter | policy.Block,
        retry: Retry,
        *,
        bank: str = "",
        key: str = "",
        is_answer: bool = False,
    ) -> Postponed | Suspension | None:
        """Applies what the policy decided of a failed attempt. None: the token is stale, nothing changed.

        `bank` and `key` are fingerprints of what was sent. `is_answer`: it is a callback's answer that failed; once
        one is there, nothing else decides.
        """
        match decision:
            case policy.Retry(countdown, counters, rest):
                return self.postpone(token, to_ms(countdown), counters, outcome, rest=rest, is_answer=is_answer)
            case policy.DeadLetter(queue, rest):
                short_ms = to_ms(retry.immediately[0])
                return self.suspend(token, queue, outcome, short_ms=short_ms, rest=rest, is_answer=is_answer)
            case policy.Block(credential):
                failed = bank if credential is Credential.BANK else key
                return self.block(token, credential, failed, outcome, short_ms=to_ms(retry.immediately[0]))
        assert_never(decision)

    def suspend(
        self,
        token: Token,
        queue: DeadLetterQueue,
        outcome: Outcome,
        *,
        short_ms: int = 0,
        rest: timedelta | None = None,
        is_answer: bool = False,
    ) -> Postponed | Suspension | None:
        """Suspends the account, or parks it in the queue of those that await a notification, with its letter.

        Returns the new state; or, where a release overtook the parking, a short wait of `short_ms`; or None for a
        stale token. Its login may `rest` as well.
        """
        state: Suspension = "parked" if queue is DeadLetterQueue.AFTER_NOTIFICATION else "suspended"
        return self._suspend(state, token, queue, outcome, short_ms, "", "", "", _by(is_answer), rest)

    def block(
        self,
        token: Token,
        credential: Credential,
        fingerprint: str,
        outcome: Outcome,
        *,
        short_ms: int = 0,
        refused: bool = False,
    ) -> Postponed | Suspension | None:
        """Blocks the login until `credential` is another one or forgiven, whatever the token says.

        `refused`: begin refused the credential too often, so that no host seems to have another. A failed credential
        that was replaced since blocks nothing: the account waits `short_ms` (or, with a stale token, None).
        """
        queue = DeadLetterQueue.DO_NOT_RETRY
        how = "refused" if refused else ""
        return self._suspend("blocked", token, queue, outcome, short_ms, credential, fingerprint, how)

    def _suspend(
        self,
        state: Suspension,
        token: Token,
        queue: DeadLetterQueue,
        outcome: Outcome,
        short_ms: int,
        credential: str,
        fingerprint: str,
        how: str,
        by: str = "",
        rest: timedelta | None = None,
    ) -> Postponed | Suspension | None:
        reason = {"code": outcome.code, "type": outcome.type or "", "description": outcome.description}
        # The letter is filled by the script, which knows the token; its queue and reason are placeholders as well.
        result = self._run(
            "suspend",
            state,
            self._stream,
            self._letter,
            queue,
            *token.args,
            json.dumps(reason),
            outcome.code,
            short_ms,
            credential,
            fingerprint,
            how,
            by,
            policy.class_of(outcome),
            policy.cause_of(outcome) or "",
            _ms_of(rest),
        )
        return cast(Suspension, result[0]) if result[0] == state else _read_postponed(result)

    def register_worker(self, name: str, threads: int, ttl_s: int) -> None:
        """Says that this worker is alive for `ttl_s` more seconds and how many polls it can run at once."""
        seconds, micros = _guard(self.client.time)
        until_ms = (seconds + ttl_s) * 1000 + micros // 1000
        member = f"{name} {threads}"
        _guard(lambda: self.client.zadd("workers", {member: until_ms}))
        _guard(lambda: self.client.zremrangebyscore("workers", "-inf", until_ms - ttl_s * 1000))
        _guard(lambda: self.client.zremrangebyscore("begins", "-inf", until_ms - REMEMBER_BEGINS_MS))

    def forget_worker(self, name: str, threads: int) -> None:
        """Takes the worker's threads out of the queue's room."""
        _guard(lambda: self.client.zrem("workers", f"{name} {threads}"))

    def workers(self) -> dict[str, int]:
        """Every worker that is believed to be alive: name → how many polls it can run at once, 0 for a settler."""
        seconds, micros = _guard(self.client.time)
        now_ms = seconds * 1000 + micros // 1000
        alive = cast(list[str], _guard(lambda: self.client.zrange("workers", now_ms, "+inf", byscore=True)))
        return {name: int(threads) for name, threads in (member.rsplit(" ", 1) for member in alive)}

    def waiting(self, queue: str) -> int:
        """How many messages the queue holds."""
        return _guard(lambda: self.client.llen(queue))

    def count(self, what: str) -> None:
        """One more of what no script sees."""
        _guard(lambda: self.client.hincrby("counts", what, 1))

    def note_token_end(self, login: str, end_s: int | None) -> None:
        """Says when the token of a defined login ends (unix seconds); None: it has none, or does not say."""
        key = f"login:{login}"
        if end_s is None:
            _guard(lambda: self.client.hdel(key, "token_expires"))
            _guard(lambda: self.client.zrem("token_expires", login))
        else:
            _guard(lambda: self.client.hset(key, "token_expires", end_s))
            _guard(lambda: self.client.zadd("token_expires", {login: end_s}))

    def salt(self) -> bytes:
        """The one salt of all credential fingerprints, made by whoever asks first."""
        if self._salt is None:
            _guard(lambda: self.client.set("salt", secrets.token_hex(16), nx=True))
            self._salt = bytes.fromhex(cast(str, _guard(lambda: self.client.get("salt"))))
        return self._salt

    # --------------------------------------------------------------------------------------------- webhook

    def knows_callback(self, digest: str) -> bool:
        """Whether a poll waits, or waited not long ago, for a callback with this token's digest."""
        return bool(_guard(partial(self.client.exists, f"callback:{digest}")))

    def receive(self, bodies: Sequence[tuple[str, bytes, str]], *, is_durable: bool) -> list[Received]:
        """Stores callbacks (digest, body, content type), and returns when the append-only file has them.

        Raises `StoreUnavailable` where it may not: then the sender must come again. Without `is_durable` the server
        keeps no such file, and nothing is waited for.
        """
        pipeline = self.client.pipeline(transaction=False)
        script = self.client.register_script(script_text("receive"))
        for digest, body, content_type in bodies:
            args = (digest, sha256(body).hexdigest(), body, content_type, self._settling, SETTLE_AGAIN_MS)
            script(args=args, client=pipeline)
        if is_durable:
            pipeline.execute_command("WAITAOF", 1, 0, CONFIRM_MS)  # type: ignore[no-untyped-call]
        results = _guard(lambda: _each_answered(pipeline))
        if is_durable and results.pop()[0] < 1:
            raise StoreUnavailable("Redis: not confirmed by the append-only file")
        return [_read_received(result) for result in results]

    # -------------------------------------------------------------------------------------------- operator

    def release(
        self,
        aliases: Sequence[str] = (),
        *,
        institution: str = "",
        login: str = "",
        spread_ms: int = 1000,
        actor: str = "",
    ) -> list[str]:
        """Brings parked accounts back, the first at once, each other `spread_ms` later; returns their aliases."""
        scope = (institution, login, *aliases)
        return cast(list[str], self._run("release", self._stream, spread_ms, *scope, actor or self._actor))

    def redrive(self, alias: str) -> str | None:
        """Brings a suspended account back. Returns None, or the state that refuses it."""
        return _read_refusal(self._run("redrive", self._stream, alias, self._actor))

    def discard(self, alias: str) -> str | None:
        """Throws the account's letter away and pauses it. Returns None, or the state that refuses it."""
        return _read_refusal(self._run("discard", alias, self._actor))

    def unblock(self, login: str) -> str | None:
        """Lifts the block and forgives what failed, and ends a rest. Returns None, or why not."""
        return _read_refusal(self._run("unblock", self._stream, login, "operator", "", self._actor))

    def unblock_with(self, login: str, credential: Credential, fingerprint: str, *, actor: str = "") -> str | None:
        """Lifts the block with a new credential of the kind that failed. Returns None, or why not."""
        who = actor or self._actor
        return _read_refusal(self._run("unblock", self._stream, login, credential, fingerprint, who))

    def pause(self, alias: str) -> str | None:
        """Pauses the account. Returns None, or the state that refuses it."""
        return _read_refusal(self._run("pause", alias, self._actor))

    def resume(self, alias: str) -> str | None:
        """Resumes the account. Returns None, or the state that refuses it."""
        return _read_refusal(self._run("resume", alias, self._actor))

    def pause_all(self) -> None:
        """Pauses everything, what is defined later included."""
        self._run("pause_all", self._actor)

    def resume_all(self) -> bool:
        """Takes off the pause that lies over everything. False: there was none."""
        return _read_refusal(self._run("resume_all", self._actor)) is None

    def poll(self, alias: str) -> str | None:
        """Makes a scheduled account due now. Returns None, or the state that refuses it."""
        return _read_refusal(self._run("poll", alias, self._actor))

    def purge(self, alias: str) -> str | None:
        """Deletes all that is kept of a retired account. Returns None, or the state that refuses it.

        Reads the whole stream and every callback's key. An interrupted purge is repeated: the account goes last.
        """
        for part, found in self._remains(alias):
            for batch in _batches(found, PURGE_BATCH):
                if reason := _read_refusal(self._run("purge", alias, *part, *batch, self._actor)):
                    return reason
        return _read_refusal(self._run("purge", alias, "account", self._actor))

    def _remains(self, alias: str) -> Iterator[tuple[tuple[str, ...], Iterator[str]]]:
        """What must be looked for: arguments of `purge`, and what they are about. Readers set aside in `….dead`."""
        for stream in (self._stream, f"{self._stream}.dead"):
            yield ("entries", stream), self._entries_of(stream, alias)
        yield ("callbacks",), self._callbacks_of(alias)

    def _entries_of(self, stream: str, alias: str) -> Iterator[str]:
        after = "-"
        while read := cast(list[Any], _guard(partial(self.client.xrange, stream, min=after, count=PURGE_BATCH))):
            yield from (entry for entry, fields in read if fields.get("subject") == alias)
            after = f"({read[-1][0]}"

    def _callbacks_of(self, alias: str) -> Iterator[str]:
        keys = self.client.scan_iter("callback:*", count=PURGE_BATCH)
        for batch in _batches(cast(Iterator[str], keys), PURGE_BATCH):
            pipeline = self.client.pipeline(transaction=False)
            for key in batch:
                pipeline.hget(key, "alias")
            owners = _guard(pipeline.execute)
            yield from (key.partition(":")[2] for key, owner in zip(batch, owners, strict=True) if owner == alias)

    # --------------------------------------------------------------------------------------------- reading

    def now_ms(self) -> int:
        """The one clock: the server's, moved by tests only."""
        pipeline = self.client.pipeline(transaction=False)
        pipeline.time()
        pipeline.get("clock:offset")
        (seconds, micros), offset = _guard(pipeline.execute)
        return int(seconds * 1000 + micros // 1000 + int(offset or 0))

    def claimed_at_ms(self) -> int | None:
        """When a beat last claimed, by the one clock; None where none ever did."""
        claimed_at = self._config("claimed_at")["claimed_at"]
        return None if claimed_at is None else int(claimed_at)

    def held_ms(self) -> int:
        """For how long nothing is claimed any more, after a jump of the clock; as `hold_left` of the scripts has it."""
        until, *lease = self._config("hold_until", "request_deadline_ms", "lease_margin_ms").values()
        left_ms = int(until or 0) - self.now_ms()
        return left_ms if 0 < left_ms <= sum(int(part or 0) for part in lease) else 0

    def accounts(self, aliases: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        """Every defined account (or those named), sorted, with the fields of its hash; an unknown one has none."""
        for batch in _batches(sorted(self.revisions() if aliases is None else aliases), 1000):
            yield from zip(batch, self._hashes([f"account:{alias}" for alias in batch]), strict=True)

    def logins(self, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
        """Every login (or those named), sorted, with the fields of its hash."""
        if names is None:
            names = cast(set[str], _guard(lambda: self.client.smembers("logins")))
        names = sorted(names)
        return dict(zip(names, self._hashes([f"login:{name}" for name in names]), strict=True))

    def is_paused(self) -> bool:
        """Whether everything is."""
        return self._config("paused_at")["paused_at"] is not None

    def reached(self) -> Reached:
        """The limits that are reached now."""
        now_ms = self.now_ms()
        today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
        pipeline = self.client.pipeline(transaction=False)
        pipeline.hmget("config", "paused_at", "daily_requests")
        pipeline.smembers("breakers")
        pipeline.hgetall("budgets")
        (paused_at, total), institutions, budgets = _guard(pipeline.execute)
        counted = ["*", *budgets]
        used = dict(zip(counted, _guard(lambda: self.client.hmget(f"requests:{today}", counted)), strict=True))
        names = sorted(institutions)
        breakers = zip(names, self._hashes([f"breaker:{name}" for name in names]), strict=True)
        return Reached(
            paused_at_ms=int(paused_at) if paused_at else None,
            breakers={name: _read_breaker(fields) for name, fields in breakers if fields},
            spent_logins=frozenset(name for name, most in budgets.items() if int(used[name] or 0) >= int(most)),
            is_all_spent=bool(total) and int(used["*"] or 0) >= int(total),
            next_day=f"{today + timedelta(days=1)}T00:00Z",
        )

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every login that has an account."""
        found: dict[str, Scheme] = {}
        for batch in _batches(sorted(cast(set[str], _guard(lambda: self.client.smembers("logins")))), 1000):
            pipeline = self.client.pipeline(transaction=False)
            for name in batch:
                pipeline.hget(f"login:{name}", "scheme")
                pipeline.exists(f"aliases:{name}")
            answers = _guard(pipeline.execute)
            has_accounts = zip(batch, answers[::2], answers[1::2], strict=True)
            found |= {name: scheme for name, scheme, is_used in has_accounts if is_used}
        return found

    def letters(self, most: int = 0) -> Iterator[tuple[DeadLetterQueue, dict[str, Any]]]:
        """Every dead letter, or the oldest `most` of each queue, oldest first, as the Celery message that it is."""
        for queue in DeadLetterQueue:
            texts = cast(list[str], _guard(partial(self.client.lrange, queue, -most, -1)))
            for text in reversed(texts):
                yield queue, json.loads(text)

    def groups(self, states: Sequence[str], institution: str = "") -> list[tuple[str, int]]:
        """The groups of accounts that are seen alike, by state and institution (one, or all), with their sizes."""
        names = [institution] if institution else sorted(self.institutions())
        keys = [f"state:{name}:{state}" for state in states for name in names]
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.scard(key)
        return list(zip(keys, cast(list[int], _guard(pipeline.execute)), strict=True))

    def members(self, group: str) -> set[str]:
        """The accounts of one of `groups`."""
        return cast(set[str], _guard(lambda: self.client.smembers(group)))

    def institutions(self) -> set[str]:
        """Every institution ever defined."""
        return cast(set[str], _guard(lambda: self.client.smembers("institutions")))

    def overdue(self) -> set[str]:
        """The accounts that are due for longer than their own interval."""
        return cast(set[str], _guard(lambda: self.client.smembers("overdue")))

    def longest_awaited(self, most: int) -> list[tuple[str, int]]:
        """The accounts whose callbacks are awaited for longest, and since when (ms)."""
        found = cast(list[Any], _guard(lambda: self.client.zrange("awaiting", 0, most - 1, withscores=True)))
        return [(alias, int(since_ms)) for alias, since_ms in found]

    def blocked(self) -> dict[str, str]:
        """Every blocked login, with the kind of credential that failed."""
        return cast(dict[str, str], _guard(lambda: self.client.hgetall("blocked")))

    def accounts_of(self, login: str) -> set[str]:
        """The login's accounts."""
        return cast(set[str], _guard(lambda: self.client.smembers(f"aliases:{login}")))

    def history(self, alias: str) -> list[str]:
        """The account's last attempts, newest first: "ended (ms) poll attempt duration (ms) outcome"."""
        return cast(list[str], _guard(partial(self.client.lrange, f"history:{alias}", 0, -1)))

    def audit(self) -> Iterator[dict[str, str]]:
        """Every order that was given, newest first: actor, action, subject, outcome, at (ms)."""
        before = "+"
        while read := cast(list[Any], _guard(partial(self.client.xrevrange, "audit", max=before, count=AUDIT_BATCH))):
            yield from (fields for _, fields in read)
            before = f"({read[-1][0]}"

    def latest(self) -> dict[str, str]:
        """Every account's newest balance: alias → the event's data, JSON as on the stream."""
        return cast(dict[str, str], _guard(lambda: self.client.hgetall("latest")))

    def _config(self, *names: str) -> dict[str, str | None]:
        values = cast(list[str | None], _guard(lambda: self.client.hmget("config", names)))
        return dict(zip(names, values, strict=True))

    def _hashes(self, keys: Sequence[str]) -> list[dict[str, str]]:
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return cast(list[dict[str, str]], _guard(pipeline.execute))


def _guard(call: Callable[[], T]) -> T:
    """Runs one call to the server; what passes by itself becomes `StoreUnavailable`, anything else is a fault."""
    try:
        return call()
    except _AWAY as error:
        raise StoreUnavailable(f"Redis: {type(error).__name__}") from error
    except redis.ResponseError as error:
        if str(error).startswith(_PASSING):
            raise StoreUnavailable(f"Redis: {str(error).split()[0]}") from error
        raise


def _each_answered(pipeline: redis.client.Pipeline) -> list[Any]:
    """The pipeline's results. Raises its first error as the server said it: redis-py writes the command before it."""
    results: list[Any] = pipeline.execute(raise_on_error=False)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _next_slot_ms(definition: Definition, begun_ms: int, after_ms: int) -> int:
    """The slot after this answer, no sooner than `min_gap` after the poll began."""
    return schedule.next_slot_ms(definition, max(after_ms, begun_ms + definition.min_gap_ms - 1))


def _definition_args(definition: Definition, now_ms: int) -> tuple[str | int, ...]:
    identity = sha256(json.dumps(definition.identity).encode()).hexdigest()
    slot_ms = schedule.next_slot_ms(definition, now_ms)
    plan = f"every {definition.every_ms}" if definition.every_ms else f"cron {definition.cron} {definition.timezone}"
    return (
        definition.alias,
        definition.model_dump_json(),
        definition.revision,
        identity,
        plan,
        slot_ms,
        definition.login,
        definition.institution,
        source_of(definition),
        definition.scheme,
        definition.token_days or "",
        schedule.interval_ms(definition, slot_ms),
        definition.min_gap_ms,
    )


def source_of(definition: Definition) -> str:
    """The `source` of the account's events."""
    return f"/khipu/{definition.country}/{definition.segment}/{definition.institution}"


def _config_args(accounts: Accounts) -> tuple[str | int, ...]:
    limits = accounts.limits
    budgets = {name: login.daily_requests for name, login in accounts.logins.items() if login.daily_requests}
    return (
        accounts.retry.model_dump_json(),
        limits.model_dump_json(),
        limits.request_deadline_ms,
        limits.lease_margin_ms,
        limits.retention_ms,
        limits.rate or "",
        limits.daily_requests or "",
        " ".join(f"{name} {requests}" for name, requests in sorted(budgets.items())),
        " ".join(str(to_ms(pause)) for pause in policy.probe_pauses(accounts.retry)),
        accounts.digest,
    )


def _read_lapse(row: Sequence[str]) -> Lapse:
    login, alias, poll, attempt, state, tries, waits, losses, generic = row
    counters = Counters(int(tries), int(waits), int(losses), int(attempt), generic=int(generic))
    return Lapse(Token(login, alias, int(poll), int(attempt)), cast(Literal["polling", "awaiting"], state), counters)


def _read_news(text: str) -> News:
    return News(**json.loads(text))


def _read_begun(token: Token, row: Sequence[str]) -> Begun:
    _, now_ms, lease_ms, generation, definition, retry, limits, tries, waits, losses, last, generic = row
    return Begun(
        token=token,
        now_ms=int(now_ms),
        lease_ms=int(lease_ms),
        generation=int(generation),
        definition=_read_definition(definition),
        retry=_read_retry(retry),
        limits=_read_limits(limits),
        counters=Counters(int(tries), int(waits), int(losses), token.attempt, last, int(generic)),
    )


@lru_cache(maxsize=KNOWN_DEFINITIONS)
def _read_definition(text: str) -> Definition:
    return Definition.model_validate_json(text)


@lru_cache(maxsize=KNOWN_DEFINITIONS)
def _revision(definition: Definition) -> str:
    return definition.revision


@lru_cache(maxsize=4)
def _read_retry(text: str) -> Retry:
    return Retry.model_validate_json(text)


@lru_cache(maxsize=4)
def _read_limits(text: str) -> Limits:
    return Limits.model_validate_json(text)


def _read_breaker(fields: Mapping[str, str]) -> Breaker:
    return Breaker(fields["cause"], int(fields["opened_at"]), int(fields["next_probe"]))


def _ms_of(rest: timedelta | None) -> int | str:
    return "" if rest is None else to_ms(rest)


def _by(is_answer: bool) -> str:
    return "answer" if is_answer else ""


def _answer_key(token: Token) -> str:
    return f"answer:{token.account} {token.poll} {token.attempt}"


def _read_unsettled(
    token: Token, answer: dict[str, str], counters: Sequence[str | None], config: Sequence[str | None]
) -> Unsettled:
    tries, waits, losses, last, generic = counters
    retry, limits = config
    begun = Begun(
        token=token,
        now_ms=int(answer["received_at"]),
        lease_ms=0,
        generation=int(answer["generation"]),
        definition=_read_definition(answer["definition"]),
        retry=_read_retry(retry or "{}"),
        limits=_read_limits(limits or "{}"),
        counters=Counters(
            int(tries or 0), int(waits or 0), int(losses or 0), token.attempt, last or "", int(generic or 0)
        ),
    )
    bodies = {
        name.removeprefix("body:"): text.encode("utf-8", "surrogateescape")
        for name, text in answer.items()
        if name.startswith("body:")
    }
    return Unsettled(begun, answer["content_type"], answer["bank"], answer["key"], bodies)


def _read_received(row: Sequence[str]) -> Received:
    task_id = f"{row[1]}.{row[2]}" if len(row) > 1 else None
    return Received(cast(Literal["stored", "repeated", "full", "unknown"], row[0]), task_id)


def _read_postponed(row: Sequence[str]) -> Postponed | None:
    return Postponed(int(row[1])) if row[0] == "postponed" else None


def _read_refusal(row: Sequence[str]) -> str | None:
    return row[1] if row[0] == "refused" else None
