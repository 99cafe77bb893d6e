"""Read the environment once into frozen settings, and report every mistake at once; no account, no login's secret.

environ ──▶ load_settings ──▶ Settings | ConfigurationError(every problem)
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, SecretStr
from pydantic import ValidationError as PydanticValidationError
from pydantic_core import PydanticCustomError

from worker import sentinel
from worker.errors import ConfigurationError, Problem

WEBHOOK_PORT = 8080
KHIPU_URL = "https://api.khipu.com"
ACCOUNTS_FILE = Path("config/accounts.toml")
SANDBOX_FILE = Path("config/sandbox.toml")
SANDBOX_PORT = 8089
#: The embedded server writes its address, password included, into this file of the data directory.
STORE_URL_FILE = "redis.url"

PREFIX = "BALANCES_"
#: Variables that others read: logins' secrets (credentials) and what only tests set.
FOREIGN_PREFIXES = ("BALANCES_SECRET_", "BALANCES_TEST_")
#: Bytes; a file that holds one secret is never larger.
MAX_SECRET_FILE = 64 * 1024
#: Khipu takes at most 255 characters of `CallbackUrl`; the rest is for `/callbacks/` and the token.
MAX_CALLBACK_BASE = 200

MAX_DURATION = timedelta(days=366)
_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]{{1,12}}){unit}(?![a-z]))?" for unit in _UNITS_MS))


@lru_cache(maxsize=1024)
def parse_duration(text: str) -> timedelta:
    """`"15m"`, `"1h30m"`, `"500ms"`: units d, h, m, s, ms, each at most once and the largest first; zero to 366 days.

    Raises ValueError, whose text quotes `text`.
    """
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text[:40]!r} is no duration")
    counts = zip(match.groups(), _UNITS_MS.values(), strict=True)
    total_ms = sum(int(count or 0) * unit_ms for count, unit_ms in counts)
    if total_ms > to_ms(MAX_DURATION):
        raise ValueError(f"{text!r} is longer than {format_duration(MAX_DURATION)}")
    return timedelta(milliseconds=total_ms)


def format_duration(duration: timedelta) -> str:
    """The inverse of `parse_duration`, to the millisecond: `"4h"`, `"1h30m"`, `"0s"`; negative ones begin with `-`."""
    rest_ms = abs(to_ms(duration))
    text = ""
    for unit, unit_ms in _UNITS_MS.items():
        count, rest_ms = divmod(rest_ms, unit_ms)
        text += f"{count}{unit}" if count else ""
    sign = "-" if text and duration < timedelta(0) else ""
    return sign + (text or "0s")


def to_ms(duration: timedelta) -> int:
    """Whole milliseconds, towards minus infinity."""
    return duration // timedelta(milliseconds=1)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What would be right instead of the unknown `word`. A `prefix` that all names share makes none of them alike."""
    names = sorted(name.removeprefix(prefix) for name in known)
    close = difflib.get_close_matches(word.removeprefix(prefix), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known: {', '.join(prefix + name for name in names) or 'none'}"


def _duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        return parse_duration(value)
    raise PydanticCustomError("duration_type", "not a duration")


#: A `timedelta` that configuration and JSON write as `"1h30m"`.
Duration = Annotated[
    timedelta, BeforeValidator(_duration), PlainSerializer(format_duration, return_type=str, when_used="json")
]


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without port) is this machine; looks nothing up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_http_url(url: str) -> str:
    """`url` without its trailing slash, if it is https, or http to loopback. Raises ValueError without quoting it."""
    parts = _split(url)
    if parts is None or parts.scheme not in ("https", "http") or parts.username is not None:
        raise ValueError("is no http address")
    if parts.query or parts.fragment or re.search(r"[^!-~]", url):
        raise ValueError("is no plain base address")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("is plain http to another machine")
    return url.rstrip("/")


def _split(url: str) -> SplitResult | None:
    """`url` in parts, or None where it has no host or no valid port; urllib's own message would quote it."""
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0  # reading it is what checks it
    except ValueError:
        return None
    return parts if parts.hostname and has_port else None


def _redis_url(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    if ";" in text:
        raise ValueError("holds a semicolon, at which kombu would cut it: in a password, it is %3B")
    if text.startswith(sentinel.SCHEME):
        sentinel.read_sentinel_address(text)
        return url
    parts = _split(text)
    if parts is None or parts.scheme not in ("redis", "rediss"):
        raise ValueError("is no address of a server")
    if not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        raise ValueError("names a database that is no number")
    return url


#: First words of the keys that are the timetable's (worker/lua/shared.lua says what each is), Celery's and kombu's.
TAKEN = frozenset(
    """
    account aliases answer answers as_of attempts audit awaiting begins blocked breaker breakers budgets
    callback celery celeryev clock config contents counts due durations failed failing failures history
    institutions last_ok latest licences login logins news operation overdue parked pins polls received
    released releases requests resting revisions salt slots state timetable token_expires workers
    """.split()  # noqa: SIM905 - as strings they would fill a page
)
TAKEN_BEGINNINGS = ("balances.polls", "balances.answers", "balances.dead.", "_kombu.", "unacked", "/")


def _stream(name: str) -> str:
    if re.split("[:.]", name)[0] in TAKEN or name.startswith(TAKEN_BEGINNINGS):
        raise ValueError("is the name of a key that the timetable or Celery uses")
    return name


def _flower_auth(value: SecretStr) -> SecretStr:
    user, _, password = value.get_secret_value().partition(":")
    if not user or not password:
        raise ValueError("is not user:password")
    if not value.get_secret_value().isascii():
        raise ValueError("is not ASCII, which is all that Flower compares")
    return value


def _token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError("cannot stand in an HTTP header")
    return value


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("is no directory")
    return path


_Port = Annotated[int, Field(ge=1, le=65535, description="give a port from 1 to 65535")]
_Url = Annotated[str, AfterValidator(check_http_url)]
_RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
_Stream = Annotated[str, AfterValidator(_stream)]
_FlowerAuth = Annotated[SecretStr, AfterValidator(_flower_auth)]
_Token = Annotated[SecretStr, AfterValidator(_token)]
_Directory = Annotated[Path, AfterValidator(_directory)]
_Grace = Annotated[Duration, Field(le=timedelta(hours=1))]
_CallbackUrl = Annotated[_Url, Field(max_length=MAX_CALLBACK_BASE)]


class Settings(BaseModel):
    """What the environment says. A field's description is what its variable should hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    redis_url: _RedisUrl | None = Field(
        None, description="write redis://host:port/0, rediss:// or sentinel://host:port,host:port/master/0"
    )
    stream: _Stream = Field(
        "balances", pattern=r"^[!-~]{1,200}$", description="give a key's name without spaces, such as balances"
    )
    accounts_path: Path
    is_sandbox: bool = False
    khipu_url: _Url = Field(KHIPU_URL, description="write https://host, or http:// to loopback only")
    callback_url: _CallbackUrl | None = Field(
        None, description=f"write https://host, or http:// to loopback only, at most {MAX_CALLBACK_BASE} characters"
    )
    secrets_dir: _Directory | None = Field(None, description="name a directory that exists")
    data_dir: Path = Path(".data")
    concurrency: int = Field(16, ge=1, le=5000, description="give a whole number of threads from 1 to 5000")
    grace: _Grace = Field(timedelta(seconds=30), description="give a duration up to 1h, such as 30s or 1m30s")
    host: str = Field("127.0.0.1", pattern=r"^[A-Za-z0-9.:_-]{1,253}$", description="give a host name or an address")
    webhook_port: _Port = WEBHOOK_PORT
    flower_port: _Port = 5555
    exporter_port: _Port = 9464
    sandbox_port: _Port = SANDBOX_PORT
    flower_auth: _FlowerAuth | None = Field(None, description="write user:password")
    notification_token: _Token | None = Field(None, description="give visible ASCII characters without spaces")

    def store_url(self) -> str:
        """The server's address: the one given, else the embedded server's. Raises ConfigurationError if neither is."""
        if self.redis_url is not None:
            return self.redis_url.get_secret_value()
        try:
            url = (self.data_dir / STORE_URL_FILE).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            url = ""
        if not url:
            where = str(self.data_dir / STORE_URL_FILE)
            right = "run `balances up` or `balances store`, or set BALANCES_REDIS_URL"
            raise ConfigurationError([Problem(where, "there is no server", right)])
        return url


#: Every variable of the contract but those of `FILES`, with its field.
VARIABLES = {
    "BALANCES_ACCOUNTS": "accounts_path",
    **{
        PREFIX + field.upper(): field for field in Settings.model_fields if field not in ("accounts_path", "is_sandbox")
    },
}
_SECRET_VARIABLES = ("BALANCES_REDIS_URL", "BALANCES_FLOWER_AUTH", "BALANCES_NOTIFICATION_TOKEN")
#: A secret may stand in a file instead, which this variable names; with the variable that it replaces.
FILES = {f"{variable}_FILE": variable for variable in _SECRET_VARIABLES}


class _Read(NamedTuple):
    """Raw values by field, and what is wrong so far."""

    values: dict[str, object]
    problems: list[Problem]


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process. Relative paths are relative to the current directory.

    Raises ConfigurationError with every mistake: the variable, its value unless it is secret, what would be right.
    """
    environ = os.environ if environ is None else environ
    values, problems = _read_variables(environ)
    values |= _where_accounts_are(values)
    if values["is_sandbox"]:
        values.setdefault("khipu_url", f"http://127.0.0.1:{values.get('sandbox_port', SANDBOX_PORT)}")
        values.setdefault("callback_url", f"http://127.0.0.1:{values.get('webhook_port', WEBHOOK_PORT)}")
    settings = _validate(values, environ, problems)
    if settings is None or problems:
        raise ConfigurationError(problems)
    return settings


def _read_variables(environ: Mapping[str, str]) -> _Read:
    known = {name: value for name, value in environ.items() if name in VARIABLES or name in FILES}
    problems = _unknown_variables(environ)
    problems += [Problem(name, "is empty", "unset it, or give it a value") for name in known if not known[name]]
    values: dict[str, object] = {VARIABLES[name]: value for name, value in known.items() if value and name in VARIABLES}
    for file, variable in FILES.items():
        if known.get(file) and known.get(variable):
            problems.append(Problem(variable, f"is set, and so is {file}", "set one of the two"))
        elif known.get(file):
            values[VARIABLES[variable]] = _read_secret(file, known[file], problems)
    return _Read(values, problems)


def _unknown_variables(environ: Mapping[str, str]) -> list[Problem]:
    known = {*VARIABLES, *FILES}
    return [
        Problem(name, "is no variable of this program", did_you_mean(name, known, PREFIX))
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known and not name.startswith(FOREIGN_PREFIXES)
    ]


def _read_secret(variable: str, path: str, problems: list[Problem]) -> SecretStr | None:
    """The one line of the file, or None and one more problem."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_SECRET_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        problems.append(Problem(variable, f"{_shown(variable, path)} cannot be read ({reason})", "name a file"))
        return None
    secret = content.decode("utf-8", "replace").strip()
    if not secret or len(content) > MAX_SECRET_FILE:
        wrong = f"{_shown(variable, path)} is empty or too large"
        problems.append(Problem(variable, wrong, "it holds the secret alone"))
        return None
    return SecretStr(secret)


def _where_accounts_are(values: Mapping[str, object]) -> dict[str, object]:
    """The accounts file; without any, the sandbox's own, which also lies beside the package in a checkout."""
    if "accounts_path" in values:
        return {"is_sandbox": False}
    if ACCOUNTS_FILE.exists():
        return {"accounts_path": ACCOUNTS_FILE, "is_sandbox": False}
    return {"accounts_path": SANDBOX_FILE if SANDBOX_FILE.exists() else _beside_package(), "is_sandbox": True}


def _beside_package() -> Path:
    return Path(__file__).parent.parent / SANDBOX_FILE


def is_sandbox_file(path: Path) -> bool:
    """Whether this is the sandbox's own accounts file, which `balances up` names to its processes."""
    return path.resolve() in {SANDBOX_FILE.resolve(), _beside_package().resolve()}


def _validate(values: Mapping[str, object], environ: Mapping[str, str], problems: list[Problem]) -> Settings | None:
    variables = {field: name for name, field in VARIABLES.items()}
    try:
        return Settings.model_validate(values)
    except PydanticValidationError as error:
        for mistake in error.errors(include_url=False):
            field = str(mistake["loc"][0])
            variable = variables[field]
            if variable not in environ and f"{variable}_FILE" in FILES:
                variable += "_FILE"
            # a default made from a wrong value is wrong too, but only the variable that was set is a mistake
            if variable in environ:
                cause = mistake.get("ctx", {}).get("error")
                problems.append(_problem(variable, field, environ[variable], cause))
    return None


def _problem(variable: str, field: str, value: str, cause: object) -> Problem:
    right = Settings.model_fields[field].description or "see the README"
    if variable in FILES:
        return Problem(variable, "what the file holds " + str(cause), right)
    wrong = str(cause) if cause else "is not valid"
    if wrong.startswith(repr(value)[:40]):  # a duration's mistake quotes it already
        return Problem(variable, wrong, right)
    return Problem(variable, f"{_shown(variable, value)} {wrong}", right)


def _shown(variable: str, value: str) -> str:
    """The value, unless it is secret or might hold a log-on."""
    if variable in _SECRET_VARIABLES or set("@?#") & set(value):
        return "its value"
    return repr(value if len(value) <= 80 else value[:80] + "…")
