"""Name what is polled: read the accounts file strictly, and report every mistake in it at once; it knows no secret.

accounts.toml ──▶ tables, each validated once ──▶ Accounts | ConfigurationError(every problem, with its line)
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from worker.errors import ConfigurationError, Problem
from worker.settings import Duration, check_http_url, did_you_mean, parse_duration, to_ms

#: Bytes; 100,000 accounts take about 15 MB.
MAX_FILE = 32 * 1024 * 1024
#: Characters; a cron expression has a few dozen, and a long one costs time at every slot.
MAX_CRON = 100
#: Secrets under this name serve every login that has none of its own, so no login may bear it.
RESERVED_LOGIN = "default"
BUILT_IN_EVERY = timedelta(minutes=15)
#: Keys whose values never appear in a message.
PRIVATE_KEYS = frozenset({"number"})
SECRET_KEYS = frozenset({"api_key", "token", "client_id", "client_secret", "account_credential", "password"})

Scheme = Literal["api-key", "bearer", "client-credentials"]
Mode = Literal["sync", "callback"]


@lru_cache(maxsize=1024)
def _cron(expression: str) -> str:
    """Five fields, as in every crontab; cronsim also takes six, and finds out late that a date never comes."""
    if len(expression.split()) != 5:
        raise ValueError(f"{expression!r} is no cron expression (not five fields)")
    try:
        next(CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"{expression!r} is no cron expression ({str(error).lower()})") from None
    except StopIteration:
        raise ValueError(f"{expression!r} is a date that never comes") from None
    return expression


@lru_cache(maxsize=1024)
def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # unknown, leading out of the database, one of its directories
        raise ValueError(f"{name!r} is no known time zone") from None
    return name


def _url(url: str) -> str:
    try:
        return check_http_url(url)
    except ValueError as error:
        raise ValueError(f"the address {error}") from None


def _text(pattern: str, right: str) -> Any:
    return Field(pattern=pattern, description=right)


def _span(shortest: str, longest: str) -> Any:
    """The bounds of a duration, and the words for them."""
    right = f'write a duration from "{shortest}" to "{longest}", such as "15m" or "1h30m"'
    return Field(ge=parse_duration(shortest), le=parse_duration(longest), description=right)


def _count(least: int, most: int) -> Any:
    return Field(ge=least, le=most, description=f"write a whole number from {least} to {most}")


_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_NAME_WORDS = 'write 1 to 63 lower-case letters, digits and "-"'
_RUNGS = 'write one to twenty durations from "100ms" to "1d", such as ["5s", "30s", "2m"]'

Alias = Annotated[str, _text(_NAME, _NAME_WORDS)]
LoginName = Annotated[str, _text(_NAME, _NAME_WORDS)]
Country = Annotated[str, _text(r"^[a-z]{2}$", 'write two lower-case letters, such as "cl"')]
Segment = Annotated[str, _text(r"^[a-z][a-z-]{0,31}$", 'write a part of the path, such as "business"')]
Institution = Annotated[
    str, _text(r"^[a-z0-9][a-z0-9.-]{0,62}$", 'write a part of the path, such as "bancosecurity.cl"')
]
Number = Annotated[
    str, Field(repr=False), _text(r"^\S(.{0,18}\S)?$", 'write 1 to 20 characters in quotes, such as "00123456"')
]
Currency = Annotated[str | None, _text(r"^[A-Z]{3}$", 'write three capital letters, such as "CLP"')]
Flag = Annotated[bool, Field(description="write true or false")]
Every = Annotated[Duration | None, _span("1s", "366d")]
Gap = Annotated[Duration, _span("0s", "366d")]
CronField = Annotated[str, Field(max_length=MAX_CRON), AfterValidator(_cron)]
Cron = Annotated[CronField | None, Field(description='write five fields, such as "0 9-18 * * 1-5"')]
ZoneField = Annotated[str, AfterValidator(_timezone)]
Zone = Annotated[ZoneField, Field(description='write a name of the tz database, such as "America/Santiago"')]
Rungs = Annotated[
    tuple[Annotated[Duration, _span("100ms", "1d")], ...],
    Field(strict=False, min_length=1, max_length=20, description=_RUNGS),
]
UrlField = Annotated[str, AfterValidator(_url)]


class Definition(BaseModel):
    """One account as Redis holds it and `begin` hands it to a worker: everything that is not secret, resolved.

    Exactly one of `every_ms` and `cron` is set; `timezone` with `cron` only; `token_url` with the scheme
    `client-credentials`, `token_days` with `bearer` only.
    `number` and the money it leads to never reach a log: it is kept out of `repr`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    alias: Alias
    country: Country
    segment: Segment
    institution: Institution
    number: Number
    currency: Currency = None
    send_currency: bool = False
    login: LoginName
    scheme: Scheme = "api-key"
    token_url: str | None = None
    token_days: int | None = None
    mode: Mode = "sync"
    every_ms: int | None = None
    cron: str | None = None
    timezone: str | None = None
    min_gap_ms: int = 0

    @property
    def identity(self) -> tuple[str, str, str, str, str | None, str]:
        """What makes it the same account with the same log-on; another identity is a new generation."""
        return self.country, self.segment, self.institution, self.number, self.currency, self.login

    @property
    def revision(self) -> str:
        """A digest that changes when anything here does. It covers the number: not for logs."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """The one JSON of this content: declared order, nothing that is None."""
        return self.model_dump_json(exclude_none=True).encode()


class Table(BaseModel):
    """A table of the file: unknown keys and wrong types are mistakes. A field's description is what it should hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class AccountTable(Table):
    """One `[[accounts]]` table over `[defaults]`, as written."""

    alias: Alias
    country: Country = "cl"
    segment: Segment = "business"
    institution: Institution
    number: Number
    currency: Currency = None
    send_currency: Flag = False
    login: Annotated[str, Field(description="name one of the [logins] tables")]
    every: Every = None
    cron: Cron = None
    timezone: Zone = "America/Santiago"
    mode: Annotated[Mode | None, Field(description='write "sync" or "callback"')] = None
    min_gap: Annotated[Gap | None, _span("0s", "366d")] = None


class Retry(Table):
    """`[retry]`: the ladders that `policy.decide` climbs."""

    immediately: Rungs = (timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=2))
    transient: Rungs = (timedelta(seconds=30), timedelta(minutes=2), timedelta(minutes=10), timedelta(minutes=30))
    wait: Annotated[Duration, _span("1s", "30d")] = timedelta(hours=4)
    max_waits: Annotated[int, _count(1, 1000)] = 6
    max_losses: Annotated[int, _count(1, 1000)] = 3


class Limits(Table):
    """`[limits]`: how long things may take, and how often Khipu may be asked."""

    request_deadline: Annotated[Duration, _span("1s", "30m")] = timedelta(seconds=190)
    lease_margin: Annotated[Duration, _span("1s", "1h")] = timedelta(seconds=60)
    life_span: Annotated[Duration, _span("1s", "7d")] = timedelta(minutes=30)
    callback_grace: Annotated[Duration, _span("0s", "7d")] = timedelta(minutes=10)
    login_hold: Annotated[Duration, _span("1s", "7d")] = timedelta(minutes=10)
    retention: Annotated[Duration, _span("1m", "366d")] = timedelta(days=30)
    min_gap: Gap = timedelta(0)
    rate: Annotated[int | None, _count(1, 1_000_000)] = None  #: requests a minute to one institution
    daily_requests: Annotated[int | None, _count(1, 1_000_000_000)] = None

    @property
    def request_deadline_ms(self) -> int:
        return to_ms(self.request_deadline)

    @property
    def lease_margin_ms(self) -> int:
        return to_ms(self.lease_margin)

    @property
    def life_span_ms(self) -> int:
        return to_ms(self.life_span)

    @property
    def callback_grace_ms(self) -> int:
        return to_ms(self.callback_grace)

    @property
    def login_hold_ms(self) -> int:
        return to_ms(self.login_hold)

    @property
    def retention_ms(self) -> int:
        return to_ms(self.retention)

    @property
    def min_gap_ms(self) -> int:
        return to_ms(self.min_gap)


class Login(Table):
    """`[logins.X]`: how requests of this login say who we are, and how many of them a day there may be.

    `token_days`: warn so long before a token ends. `token_url`: where `client-credentials` get their access tokens.
    """

    scheme: Annotated[Scheme, Field(description='write "api-key", "bearer" or "client-credentials"')] = "api-key"
    token_days: Annotated[int, _count(1, 366)] = 14
    token_url: Annotated[UrlField | None, Field(description="write https://…, or http:// to loopback only")] = None
    daily_requests: Annotated[int | None, _count(1, 1_000_000_000)] = None


@dataclass(frozen=True, slots=True)
class Accounts:
    """A whole accounts file, resolved. `digest`: sha256 of the content, whatever its comments and its order."""

    definitions: dict[str, Definition]
    retry: Retry
    limits: Limits
    logins: dict[str, Login]
    digest: str

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every login that an account uses: what secrets are needed."""
        return {login: self.logins[login].scheme for login in {d.login for d in self.definitions.values()}}


def load_accounts(path: Path, *, callback_configured: bool) -> Accounts:
    """The accounts that the file names. Raises ConfigurationError with every mistake in it."""
    return parse_accounts(read_file(path), str(path), callback_configured=callback_configured)


def read_file(path: Path) -> bytes:
    """The file as it is, or the beginning of one that is too large. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise _failure(path, f"cannot be read ({error.strerror})", "set BALANCES_ACCOUNTS to a file") from error


def file_digest(content: bytes, *, callback_configured: bool) -> str:
    """A name for the file's very bytes, as this module understands them: the same name means the same accounts.

    For 100,000 accounts it takes hundredths of a second; to read them takes many.
    """
    understanding = hashlib.sha256(Path(__file__).read_bytes() + bytes([callback_configured]))
    return hashlib.sha256(understanding.digest() + content).hexdigest()


def parse_accounts(text: bytes | str, source: str, *, callback_configured: bool) -> Accounts:
    """The accounts in `text`; `source` names it in messages. Raises ConfigurationError with every mistake in it."""
    content = text.encode() if isinstance(text, str) else text
    if len(content) > MAX_FILE:
        raise _failure(source, "is larger than 32 MiB", "split it over several deployments")
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _failure(source, f"is not UTF-8 (at byte {error.start})", "save it as UTF-8") from None
    try:
        tables = tomllib.loads(decoded)
    except RecursionError:
        raise _failure(source, "is nested too deeply", "write plain tables") from None
    except ValueError as error:  # besides TOMLDecodeError, a number of thousands of digits
        raise _failure(
            source,
            f"is not TOML: {error}",
            "correct the syntax there; text, and a number with leading zeros, stands in quotes",
        ) from None
    return _Reader(_Report(source, decoded), callback_configured).read(tables)


def _failure(where: Path | str, wrong: str, right: str) -> ConfigurationError:
    return ConfigurationError([Problem(str(where), wrong, right)])


@dataclass(frozen=True, slots=True)
class _Place:
    """A table of the file and a key in it. `table` as in a header; `index` counts tables of that name from 0."""

    table: str
    key: str = ""
    index: int | None = None
    name: str = ""

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        name = f" ({self.name})" if self.name else ""
        return f"{self.table}{index}{name}{'.' if self.key else ''}{self.key}"


class _Report:
    """Collects problems, and finds the lines they stand on when there are any."""

    _HEADER = re.compile(r"""^[ \t]*\[\[?[ \t]*([\w.\-"' \t]+?)[ \t]*\]""", re.MULTILINE)

    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._text = text
        self._found: list[tuple[_Place, str, str]] = []

    def add(self, place: _Place, wrong: str, right: str) -> None:
        self._found.append((place, wrong, right))

    def finish(self, accounts: int) -> None:
        """Raise what was collected; `accounts` is how many tables TOML saw, to tell whether counting headers works."""
        if not self._found:
            return
        tables = self._tables()
        if len(tables.get("accounts", ())) != accounts:  # inline tables, or a header inside a string
            tables.pop("accounts", None)
        problems = [
            Problem(f"{self._source}{self._line(place, tables)}: {place}", wrong, right)
            for place, wrong, right in self._found
        ]
        raise ConfigurationError(problems)

    def _tables(self) -> dict[str, list[tuple[int, int, int]]]:
        """For each header: its line, and where its table begins and ends in the text."""
        tables: dict[str, list[tuple[int, int, int]]] = {}
        headers = list(self._HEADER.finditer(self._text))
        line, counted = 1, 0
        for number, header in enumerate(headers):
            line += self._text.count("\n", counted, header.start())
            counted = header.start()
            end = headers[number + 1].start() if number + 1 < len(headers) else len(self._text)
            name = re.sub(r"[\"' \t]", "", header[1])
            tables.setdefault(name, []).append((line, counted, end))
        return tables

    def _line(self, place: _Place, tables: Mapping[str, list[tuple[int, int, int]]]) -> str:
        spans = tables.get(place.table, [])
        if (place.index or 0) >= len(spans):
            return ""
        line, start, end = spans[place.index or 0]
        key = re.escape(place.key.partition("[")[0])
        found = re.compile(rf"""^[ \t]*["']?{key}["']?[ \t]*=""", re.MULTILINE).search(self._text, start, end)
        if place.key and found:
            line += self._text.count("\n", start, found.start())
        return f":{line}"


_Model = TypeVar("_Model", bound=Table)


#: What tells one account from another, with the built-in defaults.
_IDENTITY = (("country", "cl"), ("segment", "business"), ("institution", ""), ("number", ""), ("currency", ""))
_TABLES = frozenset({"defaults", "retry", "limits", "logins", "accounts"})


class _Reader:
    """Turns the tables of one file into `Accounts`, reporting as it goes."""

    def __init__(self, report: _Report, callback_configured: bool) -> None:
        self._report = report
        self._callback_configured = callback_configured
        self._aliases: set[str] = set()
        self._identities: dict[tuple[str, ...], _Place] = {}

    def read(self, tables: dict[str, Any]) -> Accounts:
        for key in sorted(tables.keys() - _TABLES):
            self._report.add(_Place(key), "unknown table or key", did_you_mean(key, _TABLES))
        retry = self._one(Retry, "retry", tables) or Retry()
        self._limits = self._one(Limits, "limits", tables) or Limits()
        self._logins = self._read_logins(tables)
        self._defaults, self._bad_defaults = self._read_defaults(tables)
        entries = self._entries(tables)
        definitions = self._read_accounts(entries)
        self._report.finish(len(entries))
        digest = _digest(definitions, retry, self._limits, self._logins)
        return Accounts(definitions, retry, self._limits, self._logins, digest)

    def _table(self, value: object, place: _Place) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self._report.add(place, f"is {_toml_type(value)}", f"write a table, [{place.table}]")
        return {}

    def _one(self, model: type[_Model], name: str, tables: Mapping[str, Any]) -> _Model | None:
        place = _Place(name)
        return self._validate(model, self._table(tables.get(name, {}), place), place)

    def _validate(
        self,
        model: type[_Model],
        table: Mapping[str, Any],
        place: _Place,
        quiet: Callable[[ErrorDetails], bool] | None = None,
    ) -> _Model | None:
        """The table as a model, or None and its mistakes in the report, but for those that `quiet` waves through."""
        try:
            return model.model_validate(table)
        except ValidationError as error:
            for mistake in error.errors(include_url=False):
                if quiet is None or not quiet(mistake):
                    self._mistake(model, mistake, place)
        return None

    def _mistake(self, model: type[Table], mistake: ErrorDetails, place: _Place) -> None:
        key, *rest = mistake["loc"]
        path = str(key) + "".join(f"[{part}]" for part in rest if isinstance(part, int))
        there = _Place(place.table, path, place.index, place.name)
        self._report.add(there, *_words(str(key), mistake, model.model_fields))

    def _read_logins(self, tables: Mapping[str, Any]) -> dict[str, Login]:
        logins = {}
        for name, value in self._table(tables.get("logins", {}), _Place("logins")).items():
            place = _Place(f"logins.{name}")
            if not re.fullmatch(_NAME, name):
                self._report.add(place, f"{name!r} is not valid", _NAME_WORDS)
            if name == RESERVED_LOGIN:
                self._report.add(place, "is reserved: its secrets serve every login", "take another name")
            login = self._validate(Login, self._table(value, place), place)
            if login is not None:
                self._check_token_url(login, place)
            logins[name] = login or Login()
        return logins

    def _check_token_url(self, login: Login, place: _Place) -> None:
        is_needed = login.scheme == "client-credentials"
        if is_needed and login.token_url is None:
            wrong = '"client-credentials" needs a token_url'
            self._at(place, "scheme", wrong, "add token_url, the address that gives access tokens")
        if not is_needed and login.token_url is not None:
            wrong = f'the scheme "{login.scheme}" asks for no token'
            self._at(place, "token_url", wrong, 'leave it out, or set scheme = "client-credentials"')

    def _read_defaults(self, tables: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """`[defaults]` without its mistakes, and the keys that had one."""
        place = _Place("defaults")
        table = self._table(tables.get("defaults", {}), place)
        bad: set[str] = set()

        def quiet(mistake: ErrorDetails) -> bool:
            if mistake["type"] != "missing":
                bad.add(str(mistake["loc"][0]))
            return mistake["type"] == "missing"

        self._validate(AccountTable, table, place, quiet)
        self._check_timing(table, place)
        return {key: value for key, value in table.items() if key not in bad}, bad

    def _check_timing(self, table: Mapping[str, Any], place: _Place) -> None:
        if "every" in table and "cron" in table:
            there = _Place(place.table, "cron", place.index, place.name)
            self._report.add(there, "is set, and so is every", "keep one of the two")

    def _entries(self, tables: Mapping[str, Any]) -> list[Any]:
        entries = tables.get("accounts", [])
        if not isinstance(entries, list):
            self._report.add(_Place("accounts"), f"is {_toml_type(entries)}", "write [[accounts]], in double brackets")
            return []
        if not entries:
            self._report.add(_Place("accounts"), "there are none", "write at least one [[accounts]] table")
        return entries

    def _read_accounts(self, entries: list[Any]) -> dict[str, Definition]:
        definitions: dict[str, Definition] = {}
        for index, entry in enumerate(entries):
            place = _Place("accounts", index=index, name=_alias_of(entry))
            definition = self._read_account(self._table(entry, place), place)
            if definition is not None:
                definitions[definition.alias] = definition
        return definitions

    def _read_account(self, entry: dict[str, Any], place: _Place) -> Definition | None:
        def quiet(mistake: ErrorDetails) -> bool:  # said already, of [defaults]
            return mistake["type"] == "missing" and mistake["loc"][0] in self._bad_defaults

        merged = self._over_defaults(entry)
        self._check_timing(entry, place)
        self._check_sense(merged, place)
        self._check_twice(merged, place)
        table = self._validate(AccountTable, merged, place, quiet)
        login = None if table is None else self._logins.get(table.login)
        return None if table is None or login is None else self._resolve(table, login)

    def _over_defaults(self, entry: dict[str, Any]) -> dict[str, Any]:
        """An account that says `every` or `cron` means neither of the defaults'."""
        merged = self._defaults | entry
        if "every" in entry or "cron" in entry:
            for key in {"every", "cron"} - entry.keys():
                merged.pop(key, None)
        return merged

    def _check_sense(self, merged: Mapping[str, Any], place: _Place) -> None:
        login = merged.get("login")
        if isinstance(login, str) and login not in self._logins:
            self._at(place, "login", f"{_shorten(repr(login))} has no table", did_you_mean(login, self._logins))
        if merged.get("mode") == "callback" and not self._callback_configured:
            self._at(place, "mode", "'callback' needs an address", "set BALANCES_CALLBACK_URL")
        if merged.get("send_currency") is True and "currency" not in merged:
            self._at(place, "send_currency", "there is no currency to send", "add currency")

    def _check_twice(self, merged: Mapping[str, Any], place: _Place) -> None:
        """On raw values, so that an account with another mistake is compared, too."""
        if place.name in self._aliases:
            self._at(place, "alias", f"{place.name!r} stands here twice", "give each account its own")
        elif place.name:
            self._aliases.add(place.name)
        identity = tuple(str(merged.get(key, default)) for key, default in _IDENTITY)
        first = self._identities.setdefault(identity, place)
        if {"institution", "number"} <= merged.keys() and first.name != place.name:
            wrong = (
                f"names the same account as {first.name or first!s} (country, segment, institution, number, currency)"
            )
            self._at(place, "", wrong, "keep one of the two")

    def _resolve(self, table: AccountTable, login: Login) -> Definition:
        every = table.every or (BUILT_IN_EVERY if table.cron is None else None)
        gap = self._limits.min_gap if table.min_gap is None else table.min_gap
        # every field was validated a moment ago: validating 100,000 accounts twice would cost a second
        return Definition.model_construct(
            alias=table.alias,
            country=table.country,
            segment=table.segment,
            institution=table.institution,
            number=table.number,
            currency=table.currency,
            send_currency=table.send_currency,
            login=table.login,
            scheme=login.scheme,
            token_url=login.token_url,
            token_days=login.token_days if login.scheme == "bearer" else None,
            mode=table.mode or ("callback" if self._callback_configured else "sync"),
            every_ms=None if every is None else to_ms(every),
            cron=table.cron,
            timezone=table.timezone if table.cron else None,
            min_gap_ms=to_ms(gap),
        )

    def _at(self, place: _Place, key: str, wrong: str, right: str) -> None:
        self._report.add(_Place(place.table, key, place.index, place.name), wrong, right)


def _words(key: str, mistake: ErrorDetails, fields: Mapping[str, FieldInfo]) -> tuple[str, str]:
    """What is wrong and what would be right, in our words; pydantic's would quote a number."""
    kind, value = mistake["type"], mistake["input"]
    if kind == "extra_forbidden":
        secret = "secrets are environment variables or files, never in here"  # noqa: S105 - says so
        return "unknown key", secret if key in SECRET_KEYS else did_you_mean(key, fields)
    right = fields[key].description or ""
    if kind == "missing":
        return "is missing", right
    if kind.endswith("_type"):
        return f"is {_toml_type(value)}", right
    if key in PRIVATE_KEYS:
        return "is not valid", right
    if kind == "value_error":
        return str(mistake["ctx"]["error"]), right
    return f"{_shorten(repr(value))} is not valid", right


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"


def _toml_type(value: object) -> str:
    names: dict[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "an array",
        dict: "a table",
        datetime: "a date and time",
        date: "a date",
        time: "a time",
    }
    return names.get(type(value), "of another type")


def _alias_of(entry: object) -> str:
    alias = entry.get("alias") if isinstance(entry, dict) else None
    return alias if isinstance(alias, str) and re.fullmatch(_NAME, alias) else ""


def _digest(definitions: Mapping[str, Definition], retry: Retry, limits: Limits, logins: Mapping[str, Login]) -> str:
    hasher = hashlib.sha256()
    for alias in sorted(definitions):
        hasher.update(definitions[alias].canonical() + b"\n")
    for name in sorted(logins):
        hasher.update(f"{name} {logins[name].model_dump_json(exclude_none=True)}\n".encode())
    for table in (retry, limits):
        hasher.update(table.model_dump_json(exclude_none=True).encode() + b"\n")
    return hasher.hexdigest()
