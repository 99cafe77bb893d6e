"""Say how an account behaves, in a language small enough for a test's one line. `notation` reads it.

A *step* is one answer, written as a string, or as a JSON object where a string is too narrow:

    step      what["@"latency]{" | "modifier}    "ok", "ok@2s", "http:504@0.2s-3s", "ok@2s | twice | life-span 10s"
    latency   duration["-"duration]       fixed, or drawn anew for each answer; 150ms, 2s, 3m, 48h
    what      ok[:AMOUNT[:CURRENCY[:ACCOUNT_ID[:TYPE]]]]     ok:12345678901234567.89, ok::USD; the amount is sent as it
                                                             is written; without one the balance drifts by itself
              no-data                                        Status OK, Data null
              empty                                          Status OK, Data.Balance []
              error:CODE:TYPE[:DESCRIPTION]                  error:E201:RETRY_IMMEDIATELY; any type; TYPE may be null
              error:null                                     Status ERROR, Error null
              http:STATUS[:BODY]                             http:401, http:504, http:200:{"Amount":NaN}
              malformed                                      a 200 that is not JSON
              schema                                         a 200 that is JSON, but not the envelope
              too-large[:BYTES]                              a good answer of 8 MiB, of unannounced length
              foreign[:ACCOUNT_ID]                           another account's balance
              hang                                           no answer until someone leaves (or /answer is called)
              drop                                           the connection is closed
              drip[:DURATION]                                a good answer, one byte each 100ms

An empty argument is the default. A last argument may hold colons; a string with an `@` or ` | ` in its text needs the
object: `{"behaviour": "ok", "amount": "10.50", "latency": "2s", ...}`, with the names above in lower case, and besides
`indicator`, `date_time`, `balances` (a list of objects with the balance fields) for `ok` and `foreign`,
`operation_id` and `additional_information` for every envelope, `content_type` and `headers` for `http`, and `callback`.

**Callback mode.** A request with `CallbackUrl` gets a 202 at once, and the step's answer is POSTed to that URL
`latency` after it, with the 202's OperationId; a failed log-on at the bank comes in the callback too. `http` from 300,
`hang` and `drop` are no bodies: they happen instead of the 202, and no callback follows; of `http` below 300 the body
and its headers are sent, `drip` sends byte by byte, `too-large` announces its length. Without `CallbackUrl` the
modifiers do nothing. They may be combined:

    early               the callback is sent, `latency` after the request, before the 202: that one follows as soon as
                        all of it was answered, or a first try failed
    late DURATION       so long after LifeSpan (its default, where it is not a moment), instead of `latency`
    never               not until `POST /_sandbox/accounts/{number}/callbacks` asks for it, as it does for all waiting
    twice [DURATION]    the same bytes again, as soon as the first ones are dealt with (or so long after that)
    twice at once       the same bytes on two connections at the same moment
    then STEP           after the first, another answer with the same OperationId; STEP's latency is a pause before it
    and STEP            another answer at the same moment
    other-operation     the callback has another OperationId than the 202
    wrong-token         the last part of the URL's path is another one, of the same length
    accept DURATION     the 202 takes so long
    but STEP            this happens instead of the 202 (`but drop`, `but http:504`, `but hang`), and yet the callback
                        comes: the client cannot know
    life-span WHEN      LifeSpan of the 202: DURATION from now, also -DURATION, with an offset if wanted (`10s +0900`,
                        `10s Z`, `10s naive`; -0400 without); `null`, `absent`, `unreadable`. Default: 30m

The object's `callback` has the same names with `_`: `{"early": true, "twice": "at once", "then": step, "life_span":
"10s Z"}`; flags and a plain `twice` are true, and `life_span` may be `{"literal": JSON}`, sent as it is.

A *plan* is a list of steps, one per request, of which the last repeats (or all do, with `cycle`), or weighted chance
with a seed: `{"script": [...], "cycle": true, "latency": "1s"}`, `{"random": {"weights": {"ok": 9, "hang": 1},
"seed": 7}}`. Everything is read strictly: what is not understood raises NotationError.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from random import Random

TOO_LARGE_BYTES = 8 * 1024 * 1024
DRIP_INTERVAL_S = 0.1
#: Seconds from now that a 202 promises by itself; Khipu's own figure is unknown.
LIFE_SPAN_S = 1800.0
#: The offset of Khipu's own example.
LIFE_SPAN_OFFSET = "-0400"


class Behaviour(StrEnum):
    """What a step does; the drawing is in the module's docstring."""

    OK = "ok"
    NO_DATA = "no-data"
    EMPTY = "empty"
    ERROR = "error"
    HTTP = "http"
    MALFORMED = "malformed"
    SCHEMA = "schema"
    TOO_LARGE = "too-large"
    FOREIGN = "foreign"
    HANG = "hang"
    DROP = "drop"
    DRIP = "drip"


@dataclass(frozen=True, slots=True)
class Latency:
    """How long an answer takes, in seconds: anything from `low_s` to `high_s`."""

    low_s: float
    high_s: float

    def draw(self, random: Random) -> float:
        """One answer's latency in seconds."""
        return self.low_s if self.low_s == self.high_s else random.uniform(self.low_s, self.high_s)


NO_LATENCY = Latency(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Money:
    """One element of `Data.Balance`; None means what the account gives by itself."""

    amount: str | None = None
    currency: str | None = None
    account_id: str | None = None
    type: str | None = None
    indicator: str | None = None
    date_time: str | None = None


@dataclass(frozen=True, slots=True)
class LifeSpan:
    """`LifeSpan` of a 202: `in_s` seconds from now (less than 0: past), or `literal`, JSON text ("": no such field).

    `offset`: as `+0900` or `Z`; "" for UTC without saying so.
    """

    in_s: float = LIFE_SPAN_S
    offset: str = LIFE_SPAN_OFFSET
    literal: str | None = None


class Timing(StrEnum):
    """When a callback is sent."""

    ON_TIME = "on-time"
    EARLY = "early"
    LATE = "late"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """How a step is delivered in callback mode; each field is a modifier of the module's docstring.

    `second`: another answer besides the first, `twice`: the first one again; `at_once` or `pause_s` after it.
    """

    timing: Timing = Timing.ON_TIME
    late_s: float = 0.0
    twice: bool = False
    second: Step | None = None
    at_once: bool = False
    pause_s: float = 0.0
    other_operation: bool = False
    wrong_token: bool = False
    accept_s: float = 0.0
    but: Step | None = None
    life_span: LifeSpan = LifeSpan()

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What is not as usual, for records."""
        return tuple(self._names())

    def _names(self) -> Iterator[str]:
        if self.timing is not Timing.ON_TIME:
            yield self.timing.value
        if self.twice:
            yield "twice at once" if self.at_once else "twice"
        if self.second is not None:
            yield f"{'and' if self.at_once else 'then'} {self.second.label}"
        if self.other_operation:
            yield "other-operation"
        if self.wrong_token:
            yield "wrong-token"
        if self.but is not None:
            yield f"but {self.but.label}"


AS_USUAL = Callback()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One answer. Fields of other behaviours keep their defaults; `null_error` is `error:null`."""

    behaviour: Behaviour
    latency: Latency | None = None
    balances: tuple[Money, ...] = (Money(),)
    operation_id: str | None = None
    additional_information: str | None = None
    code: str = ""
    type: str | None = None
    description: str | None = None
    null_error: bool = False
    status: int = 0
    body: str | None = None
    content_type: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    size: int = TOO_LARGE_BYTES
    interval_s: float = DRIP_INTERVAL_S
    callback: Callback = AS_USUAL

    @property
    def label(self) -> str:
        """The step's name in records and logs: no amount, no text."""
        match self.behaviour:
            case Behaviour.ERROR:
                return "error:null" if self.null_error else f"error:{self.code}:{self.type or 'null'}"
            case Behaviour.HTTP:
                return f"http:{self.status}"
            case _:
                return self.behaviour.value

    @property
    def has_body(self) -> bool:
        """Whether a callback can carry it; what cannot happens instead of the 202."""
        match self.behaviour:
            case Behaviour.HANG | Behaviour.DROP:
                return False
            case Behaviour.HTTP:
                return self.status < 300
            case _:
                return True


@dataclass(frozen=True, slots=True)
class Plan:
    """What an account answers, request by request. With `weights` (one per step) chance chooses, seeded by `seed`."""

    steps: tuple[Step, ...]
    cycle: bool = False
    weights: tuple[float, ...] = ()
    seed: int = 0
    latency: Latency | None = None

    def step(self, number: str, position: int) -> Step:
        """The step for the account's request `position` (from 0): the same one in every run."""
        if self.weights:
            return self.random(number, position).choices(self.steps, self.weights)[0]
        if self.cycle:
            return self.steps[position % len(self.steps)]
        return self.steps[min(position, len(self.steps) - 1)]

    def delay_s(self, step: Step, number: str, position: int) -> float:
        """How long that step takes."""
        latency = step.latency or self.latency or NO_LATENCY
        return latency.draw(self.random(f"{number}:latency", position))

    def random(self, salt: str, position: int) -> Random:
        """Chance that depends on nothing but its arguments, so that interleaved accounts do not disturb each other."""
        return Random(f"{self.seed}:{salt}:{position}")  # noqa: S311 - behaviour, not secrecy
