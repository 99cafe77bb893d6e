"""Find a login's secrets where this process may read them, and fingerprint them; it decides nothing and shows nothing.

    BALANCES_SECRET_ACME_API_KEY | BALANCES_SECRET_ACME_API_KEY_FILE | <secrets directory>/acme.api_key

One of them at most; without any, the same three of login `default`, but never for `account_credential`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from pydantic import JsonValue, SecretBytes, SecretStr

from worker.accounts import RESERVED_LOGIN, Scheme
from worker.errors import ConfigurationError, MissingSecret, Problem
from worker.settings import MAX_SECRET_FILE

PREFIX = "BALANCES_SECRET_"
FILE_SUFFIX = "_FILE"
#: Set by systemd for `LoadCredential=`; serves where BALANCES_SECRETS_DIR is unset.
SYSTEMD_DIRECTORY = "CREDENTIALS_DIRECTORY"


class SecretField(StrEnum):
    """The secrets a login may have."""

    API_KEY = "api_key"
    TOKEN = "token"  # noqa: S105 - a name, not a secret
    CLIENT_ID = "client_id"
    CLIENT_SECRET = "client_secret"  # noqa: S105 - a name, not a secret
    ACCOUNT_CREDENTIAL = "account_credential"


#: What each scheme needs.
FIELDS: dict[Scheme, tuple[SecretField, ...]] = {
    "api-key": (SecretField.API_KEY, SecretField.ACCOUNT_CREDENTIAL),
    "bearer": (SecretField.TOKEN,),
    "client-credentials": (SecretField.CLIENT_ID, SecretField.CLIENT_SECRET),
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one request of a login needs. `repr` shows the scheme only.

    `key`: the api key (scheme `api-key`), the token (`bearer`), or the client secret (`client-credentials`), until an
    access token got with it takes its place. `account_credential`: any JSON value, the bank log-on, sent as
    `AccountCredential` with `api-key` only; None with the other schemes. `client_id`: beside a client secret only.
    """

    scheme: Scheme
    key: SecretStr
    account_credential: JsonValue = None
    client_id: SecretStr | None = None

    def __repr__(self) -> str:
        return f"Credentials(scheme={self.scheme!r})"


class _File(NamedTuple):
    """A file of one secret as last read: `content`, or what is `wrong` with it."""

    content: SecretStr
    wrong: str = ""
    signature: tuple[int, ...] | None = None
    is_open: bool = False


class _Found(NamedTuple):
    """One secret: its `content`, or the `problem` with it; nothing at all where it is not here."""

    where: str = ""
    content: SecretStr | None = None
    problem: Problem | None = None


class CredentialStore:
    """The secrets of this process. A file that changes is read again; a variable cannot change.

    Plain text is held in `SecretStr` only, and every mistake is raised from a frame that holds none: tracebacks with
    local variables, such as log libraries write, show nothing.
    """

    def __init__(self, environ: Mapping[str, str], secrets_dir: Path | None) -> None:
        systemd = environ.get(SYSTEMD_DIRECTORY)
        self._directory = secrets_dir or (Path(systemd) if systemd else None)
        self._paths = {k: v for k, v in environ.items() if k.startswith(PREFIX) and k.endswith(FILE_SUFFIX)}
        self._variables = {k: SecretStr(v) for k, v in environ.items() if k.startswith(PREFIX) and k not in self._paths}
        self._files: dict[Path, _File] = {}

    def credentials(self, login: str, scheme: Scheme) -> Credentials:
        """What requests of `login` need. Raises MissingSecret where one is not here, ConfigurationError where it is
        wrong (two at once, unreadable, empty); both name variables and files only.
        """
        found = {field: self._get(login, field) for field in FIELDS[scheme]}
        match scheme:
            case "api-key":
                log_on = _parse(found[SecretField.ACCOUNT_CREDENTIAL])
                return Credentials(scheme, found[SecretField.API_KEY], log_on)
            case "bearer":
                return Credentials(scheme, found[SecretField.TOKEN])
            case "client-credentials":
                client_id = found[SecretField.CLIENT_ID]
                return Credentials(scheme, found[SecretField.CLIENT_SECRET], client_id=client_id)

    def problems(self, logins: Mapping[str, Scheme]) -> list[Problem]:
        """Every mistake in the secrets that `logins` need, and every variable that can be none of any login."""
        problems = self._unknown_variables()
        for login, scheme in logins.items():
            for field in FIELDS[scheme]:
                found = self._find(login, field)
                if found.problem is not None:
                    problems.append(found.problem)
                elif found.content is None:
                    problems.append(self._missing(login, field))
        return list(dict.fromkeys(problems))  # a mistake in `default` is one, however many logins meet it

    def warnings(self) -> list[str]:
        """The files read so far that more users of this host than need to can read or write."""
        open_ = sorted(path for path, file in self._files.items() if file.is_open)
        return [str(Problem(str(path), "other users of this host can read or write it", "chmod 600")) for path in open_]

    def _get(self, login: str, field: SecretField) -> SecretStr:
        found = self._find(login, field)
        if found.problem is not None:
            raise ConfigurationError([found.problem])
        if found.content is None:
            raise MissingSecret(str(self._missing(login, field)))
        return found.content

    def _find(self, login: str, field: SecretField) -> _Found:
        own = self._look(login, field)
        if own.where or field is SecretField.ACCOUNT_CREDENTIAL:
            return own
        return self._look(RESERVED_LOGIN, field)

    def _look(self, login: str, field: SecretField) -> _Found:
        """The secret under this very name, in the one place that has it."""
        places = self._places(_variable(login, field), f"{login}.{field}", field)
        if len(places) > 1:
            names = " and ".join(place.where for place in places)
            return _Found(names, problem=Problem(names, "hold the same secret", "keep one of them"))
        return places[0] if places else _Found()

    def _places(self, variable: str, file_name: str, field: SecretField) -> list[_Found]:
        """Each place that has the secret. A path given by a variable is not named: it might be the secret itself."""
        places = []
        if variable in self._variables:
            places.append(_checked(variable, field, _File(self._variables[variable])))
        if variable + FILE_SUFFIX in self._paths:
            given = self._read(Path(self._paths[variable + FILE_SUFFIX])) or _broken("names no file")
            places.append(_checked(variable + FILE_SUFFIX, field, given))
        if self._directory is not None:
            path = self._directory / file_name
            file = self._read(path)
            places += [] if file is None else [_checked(str(path), field, file)]
        return places

    def _read(self, path: Path) -> _File | None:
        """The file as it is now, or None where there is none."""
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            self._files.pop(path, None)
            return None
        except (OSError, ValueError) as error:
            return _broken(_reason(error))
        file = self._files.get(path)
        if file is None or file.signature != _signature(status):
            file = self._files[path] = _read_file(path, status)
        return file

    def _missing(self, login: str, field: SecretField) -> Problem:
        variable = _variable(login, field)
        file = f"write {self._directory}/{login}.{field}" if self._directory else f"set {variable}{FILE_SUFFIX}"
        return Problem(f"login {login}", f"has no {field} here", f"set {variable}, or {file}")

    def _unknown_variables(self) -> list[Problem]:
        ends = {field.upper() for field in SecretField}
        ends |= {end + FILE_SUFFIX for end in ends}
        return [
            Problem(name, "is no secret of a login", f"its name ends in {', '.join(f.upper() for f in SecretField)}")
            for name in sorted({*self._variables, *self._paths})
            if not any(name.endswith("_" + end) for end in ends)
        ]


def _variable(login: str, field: SecretField) -> str:
    return f"{PREFIX}{login}_{field}".replace("-", "_").upper()


def _signature(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written again, replaced, or given other permissions."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _is_open(status: os.stat_result) -> bool:
    """Whether others have more than they need. A group needs nothing, unless another user owns the file and gives it
    to this process by its group, as Kubernetes does."""
    needless = stat.S_IRGRP | stat.S_IWGRP if status.st_uid == os.geteuid() else stat.S_IWGRP
    return bool(status.st_mode & (needless | stat.S_IROTH | stat.S_IWOTH))


def _reason(error: OSError | ValueError) -> str:
    """Without the path, which may be a secret in the wrong variable."""
    return f"cannot be read ({getattr(error, 'strerror', None) or 'not a path'})"


def _broken(wrong: str) -> _File:
    return _File(SecretStr(""), wrong)


def _read_file(path: Path, status: os.stat_result) -> _File:
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        return _broken("is no regular file")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = SecretBytes(file.read(MAX_SECRET_FILE + 1))
    except OSError as error:
        return _broken(_reason(error))
    content, wrong = _decode(raw)
    return _File(content, wrong, _signature(status), _is_open(status))


def _decode(raw: SecretBytes) -> tuple[SecretStr, str]:
    """The text without its one trailing newline, and what is wrong with it."""
    if len(raw) > MAX_SECRET_FILE:
        return SecretStr(""), "is larger than 64 KiB"
    try:
        return SecretStr(raw.get_secret_value().decode().removesuffix("\n").removesuffix("\r")), ""
    except UnicodeDecodeError:
        return SecretStr(""), "is not UTF-8"


def _checked(where: str, field: SecretField, file: _File) -> _Found:
    wrong = file.wrong or _fault(field, file.content)
    if not wrong:
        return _Found(where, file.content)
    right = "write JSON" if field is SecretField.ACCOUNT_CREDENTIAL else f"write the {field} alone, in visible ASCII"
    return _Found(where, problem=Problem(where, wrong, right))


def _fault(field: SecretField, content: SecretStr) -> str:
    """What is wrong with the text of a secret; "" where nothing is."""
    if not content:
        return "is empty"
    if field is SecretField.ACCOUNT_CREDENTIAL:
        return "is not JSON, or null" if _parse(content) is None else ""
    # anything else, requests would refuse in a message that quotes the header
    return "" if re.fullmatch(r"[!-~]+", content.get_secret_value()) else "cannot stand in an HTTP header"


def _parse(content: SecretStr) -> JsonValue:
    """The JSON, or None: a JSONDecodeError holds the whole text and must not get out, not even as a context."""
    try:
        return cast(JsonValue, json.loads(content.get_secret_value(), parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


#: A year beyond which no `exp` is believed: it would be a number in another unit.
_LAST_END = 253_402_300_800


def token_end(credentials: Credentials) -> int | None:
    """When a bearer token ends (unix seconds): its claim `exp`, which nobody verifies here. None where it has none."""
    if credentials.scheme != "bearer":
        return None
    parts = credentials.key.get_secret_value().split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        end = claims["exp"]
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):  # no JWT, or one that does not say
        return None
    is_moment = isinstance(end, int | float) and not isinstance(end, bool) and 0 <= end < _LAST_END
    return int(end) if is_moment else None


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What tells one credential from another without telling it: 32 hex digits each; `bank` is "" without a log-on."""

    bank: str
    key: str


#: scrypt's cost: about 50 ms and 16 MiB for one guess, which a bank's short PIN needs.
_COST = {"n": 2**14, "r": 8, "p": 1, "dklen": 16, "maxmem": 64 * 1024 * 1024}
#: Fingerprints remembered, the oldest forgotten first: two for each login of the largest deployment, 20 MB.
MAX_REMEMBERED = 65_536

_remembered: dict[bytes, str] = {}
#: `json.dumps` would make an encoder for each secret.
_as_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
#: Held while scrypt runs: each secret is computed once, and a thousand threads do not take 16 GiB.
_computing = threading.Lock()


def fingerprints(credentials: Credentials, salt: bytes) -> Fingerprints:
    """The same on every host that has the same secrets and `salt`; slow once for each secret, then remembered."""
    secret = credentials.key.get_secret_value()
    client_id = credentials.client_id
    named: JsonValue = secret if client_id is None else [client_id.get_secret_value(), secret]
    key = _fingerprint(_canonical("key", named), salt)
    if credentials.account_credential is None:
        return Fingerprints("", key)
    return Fingerprints(_fingerprint(_canonical("bank", credentials.account_credential), salt), key)


def _canonical(domain: str, secret: JsonValue) -> SecretBytes:
    return SecretBytes(f"{domain}:{_as_json(secret)}".encode())


def _fingerprint(content: SecretBytes, salt: bytes) -> str:
    name = hashlib.sha256(hashlib.sha256(salt).digest() + content.get_secret_value()).digest()
    known = _remembered.get(name)
    if known is not None:
        return known
    with _computing:
        if name not in _remembered:
            while len(_remembered) >= MAX_REMEMBERED:
                del _remembered[next(iter(_remembered))]
            _remembered[name] = hashlib.scrypt(content.get_secret_value(), salt=salt, **_COST).hex()
        return _remembered[name]
