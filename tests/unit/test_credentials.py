"""Secrets: found in exactly one place, read again when they change, fingerprinted, and never shown."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import JsonValue, SecretStr
from servers import wait_until

from worker import credentials as module
from worker.accounts import Scheme
from worker.credentials import Credentials, CredentialStore, Fingerprints, fingerprints, token_end
from worker.errors import BalancesError, ConfigurationError, MissingSecret

CANARY = "canary-77aa"
KEY, TOKEN, BANK = f"key-{CANARY}", f"token-{CANARY}", f'{{"user": "u", "pin": "{CANARY}"}}'
BANK_VARIABLE = {"BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL": BANK}


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    directory.mkdir()
    return directory


def put(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o600)
    return path


def everything_said(error: BaseException) -> str:
    """All that a log library might write of an exception: text, repr, causes, and the local variables of our frames."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True)
    ours = [frame for frame in trace.stack if f"{os.sep}worker{os.sep}" in frame.filename]
    hidden = [part for part in (error.__cause__, error.__context__) if part is not None]
    said = [str(error), repr(error), *(str(frame.locals) for frame in ours), *map(everything_said, hidden)]
    if isinstance(error, ConfigurationError):
        said += map(repr, error.problems)
    return "\n".join(said)


def failure(call: Callable[[], object]) -> BalancesError:
    with pytest.raises(BalancesError) as caught:
        call()
    assert CANARY not in everything_said(caught.value)
    return caught.value


def test_a_key_and_a_log_on_from_variables() -> None:
    store = CredentialStore({"BALANCES_SECRET_ACME_API_KEY": KEY, **BANK_VARIABLE}, None)
    found = store.credentials("acme", "api-key")
    assert found == Credentials("api-key", SecretStr(KEY), {"user": "u", "pin": CANARY})


def test_a_token_needs_no_log_on() -> None:
    store = CredentialStore({"BALANCES_SECRET_ACME_TOKEN": TOKEN, **BANK_VARIABLE}, None)
    assert store.credentials("acme", "bearer") == Credentials("bearer", SecretStr(TOKEN), None)


def test_hyphens_become_underscores() -> None:
    store = CredentialStore({"BALANCES_SECRET_ACME_NORTH_2_TOKEN": TOKEN}, None)
    assert store.credentials("acme-north-2", "bearer").key.get_secret_value() == TOKEN


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_file_may_end_in_one_newline(end: str, secrets_dir: Path) -> None:
    put(secrets_dir, "acme.token", TOKEN + end)
    assert CredentialStore({}, secrets_dir).credentials("acme", "bearer").key.get_secret_value() == TOKEN


def test_a_path_in_a_variable(tmp_path: Path) -> None:
    path = put(tmp_path, "anywhere", TOKEN)
    store = CredentialStore({"BALANCES_SECRET_ACME_TOKEN_FILE": str(path)}, None)
    assert store.credentials("acme", "bearer").key.get_secret_value() == TOKEN


def test_systemds_directory_serves_where_no_other_is_given(secrets_dir: Path, tmp_path: Path) -> None:
    put(secrets_dir, "acme.token", TOKEN)
    environ = {"CREDENTIALS_DIRECTORY": str(secrets_dir)}
    assert CredentialStore(environ, None).credentials("acme", "bearer").key.get_secret_value() == TOKEN
    failure(lambda: CredentialStore(environ, tmp_path).credentials("acme", "bearer"))


@pytest.mark.parametrize(
    "json_text", ['"pin"', "17", "false", '["u", "p"]', '{"deep": {"er": [1, 2.5, null]}}', ' {"a": 1}\n']
)
def test_a_log_on_is_any_json(json_text: str) -> None:
    environ = {"BALANCES_SECRET_A_API_KEY": KEY, "BALANCES_SECRET_A_ACCOUNT_CREDENTIAL": json_text}
    found = CredentialStore(environ, None).credentials("a", "api-key")
    assert found.account_credential is not None


def test_keys_and_tokens_fall_back_to_the_default_login(secrets_dir: Path) -> None:
    put(secrets_dir, "default.token", TOKEN)
    store = CredentialStore({"BALANCES_SECRET_DEFAULT_API_KEY": KEY, **BANK_VARIABLE}, secrets_dir)
    assert store.credentials("acme", "api-key").key.get_secret_value() == KEY
    assert store.credentials("acme", "bearer").key.get_secret_value() == TOKEN


def test_a_logins_own_secret_goes_before_the_default() -> None:
    store = CredentialStore({"BALANCES_SECRET_DEFAULT_TOKEN": "other", "BALANCES_SECRET_ACME_TOKEN": TOKEN}, None)
    assert store.credentials("acme", "bearer").key.get_secret_value() == TOKEN


def test_a_log_on_never_falls_back() -> None:
    environ = {"BALANCES_SECRET_DEFAULT_ACCOUNT_CREDENTIAL": BANK, "BALANCES_SECRET_DEFAULT_API_KEY": KEY}
    error = failure(lambda: CredentialStore(environ, None).credentials("acme", "api-key"))
    assert isinstance(error, MissingSecret)
    assert "BALANCES_SECRET_ACME_ACCOUNT_CREDENTIAL" in str(error)


def test_a_missing_secret_names_where_it_would_be(secrets_dir: Path) -> None:
    error = failure(lambda: CredentialStore(BANK_VARIABLE, None).credentials("acme", "api-key"))
    assert isinstance(error, MissingSecret)
    expected = "login acme: has no api_key here; "
    assert str(error) == expected + "set BALANCES_SECRET_ACME_API_KEY, or set BALANCES_SECRET_ACME_API_KEY_FILE"
    error = failure(lambda: CredentialStore(BANK_VARIABLE, secrets_dir).credentials("acme", "api-key"))
    assert str(error) == expected + f"set BALANCES_SECRET_ACME_API_KEY, or write {secrets_dir}/acme.api_key"


@pytest.mark.parametrize("login", ["acme", "default"])
@pytest.mark.parametrize("places", [("variable", "path"), ("variable", "file"), ("path", "file")])
def test_two_places_at_once_are_a_mistake(
    places: tuple[str, str], login: str, secrets_dir: Path, tmp_path: Path
) -> None:
    variable = f"BALANCES_SECRET_{login.upper()}_TOKEN"
    environ = {
        "variable": {variable: TOKEN},
        "path": {f"{variable}_FILE": str(put(tmp_path, "x", TOKEN))},
        "file": {},
    }
    if "file" in places:
        put(secrets_dir, f"{login}.token", TOKEN)
    store = CredentialStore(environ[places[0]] | environ[places[1]], secrets_dir)
    error = failure(lambda: store.credentials("acme", "bearer"))
    assert isinstance(error, ConfigurationError)
    assert "hold the same secret" in str(error)
    (problem,) = store.problems({"acme": "bearer"})
    assert problem == error.problems[0]


WRONG = [
    ("token", "", "is empty"),
    ("token", "\n", "is empty"),
    ("token", f"{CANARY} {CANARY}", "cannot stand in an HTTP header"),
    ("token", f"{CANARY}\n\n", "cannot stand in an HTTP header"),
    ("token", f"{CANARY}é", "cannot stand in an HTTP header"),
    ("token", CANARY.encode() + b"\xff", "is not UTF-8"),
    ("token", CANARY * 7000, "is larger than 64 KiB"),
    ("account_credential", f'{{"pin": "{CANARY}"', "is not JSON, or null"),
    ("account_credential", f'["{CANARY}", NaN]', "is not JSON, or null"),
    ("account_credential", f'"{CANARY}" "', "is not JSON, or null"),
    ("account_credential", "null", "is not JSON, or null"),
    ("account_credential", "[" * 60_000, "is not JSON, or null"),
    ("account_credential", "9" * 5_000, "is not JSON, or null"),
    ("account_credential", "", "is empty"),
]


@pytest.mark.parametrize(("field", "content", "wrong"), WRONG)
def test_a_wrong_file_is_named_without_its_content(
    field: str, content: str | bytes, wrong: str, secrets_dir: Path
) -> None:
    path = put(secrets_dir, f"acme.{field}", content)
    scheme: Scheme = "bearer" if field == "token" else "api-key"
    store = CredentialStore({"BALANCES_SECRET_ACME_API_KEY": KEY}, secrets_dir)
    error = failure(lambda: store.credentials("acme", scheme))
    assert f"{path}: {wrong}; write" in str(error)
    assert CANARY not in repr(store.problems({"acme": scheme}))


@pytest.mark.parametrize(("field", "value", "wrong"), [row for row in WRONG if isinstance(row[1], str)])
def test_a_wrong_variable_is_named_without_its_value(field: str, value: str, wrong: str) -> None:
    variable = f"BALANCES_SECRET_ACME_{field.upper()}"
    environ = {"BALANCES_SECRET_ACME_API_KEY": KEY, variable: value}
    scheme: Scheme = "bearer" if field == "token" else "api-key"
    if wrong in ("is larger than 64 KiB",) or value == "\n":  # these rules are about files
        return
    error = failure(lambda: CredentialStore(environ, None).credentials("acme", scheme))
    assert f"{variable}: {wrong}; write" in str(error)


@pytest.mark.parametrize("path", [f"/{CANARY}", CANARY, f"{CANARY}\0", CANARY * 100, "."])
def test_a_path_that_is_the_secret_itself_is_not_shown(path: str) -> None:
    store = CredentialStore({"BALANCES_SECRET_ACME_TOKEN_FILE": path}, None)
    error = failure(lambda: store.credentials("acme", "bearer"))
    assert str(error).startswith("BALANCES_SECRET_ACME_TOKEN_FILE: ")


def test_a_pipe_is_not_waited_for(secrets_dir: Path) -> None:
    os.mkfifo(secrets_dir / "acme.token")
    error = failure(lambda: CredentialStore({}, secrets_dir).credentials("acme", "bearer"))
    assert "is no regular file" in str(error)


def test_a_client_has_an_id_and_a_secret() -> None:
    environ = {"BALANCES_SECRET_DEFAULT_CLIENT_ID": "id", "BALANCES_SECRET_ACME_CLIENT_SECRET": KEY}
    store = CredentialStore(environ, None)
    found = store.credentials("acme", "client-credentials")
    assert found == Credentials("client-credentials", SecretStr(KEY), client_id=SecretStr("id"))
    assert store.problems({"acme": "client-credentials"}) == []
    assert "has no client_secret here" in str(failure(lambda: store.credentials("other", "client-credentials")))


def jwt(claims: str) -> Credentials:
    """A bearer token with this payload; nobody looks at the rest."""
    payload = base64.urlsafe_b64encode(claims.encode()).rstrip(b"=").decode()
    return Credentials("bearer", SecretStr(f"{CANARY}.{payload}.{CANARY}"))


@pytest.mark.parametrize(
    ("claims", "end"),
    [
        ('{"exp": 1795343684}', 1795343684),
        ('{"exp": 1795343684.9, "sub": "é"}', 1795343684),
        ('{"exp": 0}', 0),
        ("{}", None),
        ('{"exp": null}', None),
        ('{"exp": "1795343684"}', None),
        ('{"exp": true}', None),
        ('{"exp": -1}', None),
        ('{"exp": 1795343684000}', None),
        ('{"exp": NaN}', None),
        ('{"exp": 1e400}', None),
        ('{"exp": ' + "9" * 5000 + "}", None),
        ('["exp"]', None),
        ("17", None),
        ("exp", None),
        ("[" * 40_000, None),
    ],
)
def test_a_token_says_when_it_ends(claims: str, end: int | None) -> None:
    assert token_end(jwt(claims)) == end


@pytest.mark.parametrize("token", ["opaque", "a.b", "a.!!!.c", "..", "a.e30", ".", "a.eyJleHAiOjF9x.c"])
def test_a_token_that_is_no_jwt_does_not_say(token: str) -> None:
    assert token_end(Credentials("bearer", SecretStr(token))) is None


def test_only_a_bearer_token_ends() -> None:
    assert token_end(replace(jwt('{"exp": 1}'), scheme="api-key")) is None


def test_problems_names_every_mistake_once(secrets_dir: Path) -> None:
    put(secrets_dir, "default.api_key", "")
    environ = {"BALANCES_SECRET_ACME_APIKEY": KEY, "BALANCES_SECRET_B_ACCOUNT_CREDENTIAL": "{"}
    problems = CredentialStore(environ, secrets_dir).problems({"a": "api-key", "b": "api-key", "c": "bearer"})
    assert [problem.where for problem in problems] == [
        "BALANCES_SECRET_ACME_APIKEY",
        f"{secrets_dir}/default.api_key",
        "login a",
        "BALANCES_SECRET_B_ACCOUNT_CREDENTIAL",
        "login c",
    ]
    assert CANARY not in repr(problems)


def test_no_problems_where_all_is_well() -> None:
    environ = {"BALANCES_SECRET_ACME_API_KEY": KEY, "BALANCES_SECRET_B_TOKEN": TOKEN, **BANK_VARIABLE}
    store = CredentialStore(environ, None)
    assert store.problems({"acme": "api-key", "b": "bearer"}) == []
    assert store.warnings() == []


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o620, 0o644, 0o666])
def test_a_file_that_others_can_read_or_write_is_a_warning(secrets_dir: Path, mode: int) -> None:
    put(secrets_dir, "a.token", TOKEN)
    path = put(secrets_dir, "b.token", TOKEN)
    path.chmod(mode)
    store = CredentialStore({}, secrets_dir)
    assert store.problems({"a": "bearer", "b": "bearer"}) == []
    (warning,) = store.warnings()
    assert warning.startswith(f"{path}: other users of this host can read or write it")
    path.chmod(0o600)
    store.credentials("b", "bearer")
    assert store.warnings() == []


@pytest.mark.parametrize(("mode", "is_open"), [(0o440, False), (0o460, True), (0o444, True), (0o400, False)])
def test_a_file_that_another_user_gives_by_its_group_is_none(mode: int, is_open: bool) -> None:
    status = os.stat_result((0o100000 | mode, 1, 1, 1, os.geteuid() + 1, 1, 1, 1, 1, 1))
    assert module._is_open(status) is is_open


def test_a_secret_that_kubernetes_swaps_is_read_again(tmp_path: Path) -> None:
    """The file is a link into a link to a directory, and that link is replaced in one step."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        put(tmp_path / version, "acme.token", version)
        os.utime(tmp_path / version / "acme.token", (0, 0))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "acme.token").symlink_to("..data/acme.token")
    store = CredentialStore({}, tmp_path)
    assert store.credentials("acme", "bearer").key.get_secret_value() == "one"
    (tmp_path / "..next").symlink_to("two")
    (tmp_path / "..next").replace(tmp_path / "..data")
    assert store.credentials("acme", "bearer").key.get_secret_value() == "two"


def test_a_rewrite_of_the_same_size_with_its_old_time_is_seen(secrets_dir: Path) -> None:
    path = put(secrets_dir, "acme.token", "old")
    store = CredentialStore({}, secrets_dir)
    assert store.credentials("acme", "bearer").key.get_secret_value() == "old"
    before = path.stat()
    path.write_text("new")

    def has_its_old_time() -> bool:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return path.stat().st_ctime_ns != before.st_ctime_ns

    wait_until(has_its_old_time, what="a tick of the file system's clock")
    assert store.credentials("acme", "bearer").key.get_secret_value() == "new"


def test_a_changed_file_is_read_again(secrets_dir: Path) -> None:
    path = put(secrets_dir, "acme.token", "old")
    store = CredentialStore({}, secrets_dir)
    assert store.credentials("acme", "bearer").key.get_secret_value() == "old"
    put(secrets_dir, "new", "new").rename(path)  # the same size, as kubelet and careful editors replace a file
    assert store.credentials("acme", "bearer").key.get_secret_value() == "new"
    path.write_text("longer")
    assert store.credentials("acme", "bearer").key.get_secret_value() == "longer"
    path.unlink()
    failure(lambda: store.credentials("acme", "bearer"))
    put(secrets_dir, "acme.token", "back")
    assert store.credentials("acme", "bearer").key.get_secret_value() == "back"


def test_an_unchanged_file_is_read_once(secrets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read_file = module._read_file

    def counting(path: Path, status: os.stat_result) -> module._File:
        reads.append(path)
        return read_file(path, status)

    monkeypatch.setattr(module, "_read_file", counting)
    put(secrets_dir, "acme.token", TOKEN)
    store = CredentialStore({}, secrets_dir)
    for _ in range(3):
        store.credentials("acme", "bearer")
    assert len(reads) == 1


def test_a_mistake_in_a_file_heals_without_a_restart(secrets_dir: Path) -> None:
    path = put(secrets_dir, "acme.token", "")
    store = CredentialStore({}, secrets_dir)
    failure(lambda: store.credentials("acme", "bearer"))
    path.write_text(TOKEN)
    assert store.credentials("acme", "bearer").key.get_secret_value() == TOKEN


def test_nothing_shows_a_secret(secrets_dir: Path) -> None:
    put(secrets_dir, "acme.account_credential", BANK)
    store = CredentialStore({"BALANCES_SECRET_ACME_API_KEY": KEY}, secrets_dir)
    found = store.credentials("acme", "api-key")
    shown = [repr(thing) + str(thing) for thing in (store, found, vars(store), fingerprints(found, b"salt"))]
    assert CANARY not in "".join(shown)


def key_of(secret: str, salt: bytes = b"salt", bank: str | None = None) -> Fingerprints:
    scheme: Scheme = "bearer" if bank is None else "api-key"
    return fingerprints(Credentials(scheme, SecretStr(secret), bank), salt)


def test_a_fingerprint_is_scrypt_of_the_canonical_secret() -> None:
    expected = hashlib.scrypt(b'bank:{"a":1,"b":"x"}', salt=b"salt", n=2**14, r=8, p=1, dklen=16).hex()
    log_ons: tuple[JsonValue, ...] = ({"a": 1, "b": "x"}, {"b": "x", "a": 1})
    for log_on in log_ons:
        assert fingerprints(Credentials("api-key", SecretStr("k"), log_on), b"salt").bank == expected


def test_fingerprints_tell_secrets_salts_and_kinds_apart() -> None:
    assert key_of("a") == key_of("a")
    different = {key_of("a").key, key_of("b").key, key_of("a", b"other").key, key_of("x", bank="a").bank}
    assert len(different) == 4
    assert all(re.fullmatch(r"[0-9a-f]{32}", fingerprint) for fingerprint in different)


def test_a_clients_fingerprint_covers_id_and_secret() -> None:
    clients = [("a", "b"), ("a", "c"), ("b", "b"), ('a","b', "c")]
    prints = {
        fingerprints(Credentials("client-credentials", SecretStr(secret), client_id=SecretStr(name)), b"salt").key
        for name, secret in clients
    }
    assert len(prints | {key_of("b").key}) == 5


def test_a_token_has_no_bank_fingerprint() -> None:
    assert key_of("a").bank == ""


@pytest.fixture
def scrypt_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    scrypt = hashlib.scrypt

    def counting(password: bytes, *, salt: bytes, n: int, r: int, p: int, dklen: int, maxmem: int) -> bytes:
        calls.append(n)
        return scrypt(password, salt=salt, n=2, r=r, p=p, dklen=dklen, maxmem=maxmem)

    monkeypatch.setattr(hashlib, "scrypt", counting)
    monkeypatch.setattr(module, "_remembered", {})
    return calls


def test_many_threads_compute_one_secret_once(scrypt_calls: list[int]) -> None:
    start = threading.Barrier(8)

    def fingerprint(_: int) -> Fingerprints:
        start.wait(10)
        return key_of("one")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(fingerprint, range(8)))) == 1
    assert scrypt_calls == [2**14]


def test_the_memory_of_fingerprints_is_bounded_and_holds_no_secret(
    scrypt_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    for number in range(5):
        key_of(f"{CANARY}{number}")
    key_of(f"{CANARY}4")
    assert len(module._remembered) == 3
    assert len(scrypt_calls) == 5
    assert CANARY.encode() not in b"".join(module._remembered)
