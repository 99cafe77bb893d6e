"""Settings: every variable read, every mistake named at once, no secret shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.errors import ConfigurationError, Problem
from worker.policy import DeadLetterQueue
from worker.settings import (
    TAKEN,
    TAKEN_BEGINNINGS,
    Settings,
    format_duration,
    is_loopback,
    load_settings,
    parse_duration,
)
from worker.timetable import ANSWERS, POLLS

CANARY = "canary-5f3a"


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(environ: Mapping[str, str]) -> tuple[Problem, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("15m", timedelta(minutes=15)),
        ("1h30m", timedelta(minutes=90)),
        ("500ms", timedelta(milliseconds=500)),
        ("1m5ms", timedelta(minutes=1, milliseconds=5)),
        ("90s", timedelta(seconds=90)),
        ("1d2h3m4s5ms", timedelta(days=1, hours=2, minutes=3, seconds=4, milliseconds=5)),
        ("0s", timedelta(0)),
        ("366d", timedelta(days=366)),
    ],
)
def test_durations_are_read(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    [
        "",
        "15",
        "m",
        "15x",
        "-5m",
        "+5m",
        "1.5h",
        " 5m",
        "5m ",
        "5m\n",
        "5 m",
        "30m1h",
        "1m1m",
        "5M",
        "٥m",
        "367d",
        "9" * 50 + "s",
    ],
)
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no duration|is longer than"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(hours=4), "4h"),
        (timedelta(seconds=190), "3m10s"),
        (timedelta(0), "0s"),
        (timedelta(microseconds=1500), "1ms"),
        (timedelta(microseconds=5), "0s"),
        (timedelta(seconds=-90), "-1m30s"),
    ],
)
def test_durations_are_written(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text


@given(st.integers(0, 366 * 86_400_000))
def test_a_written_duration_is_read_back(ms: int) -> None:
    duration = timedelta(milliseconds=ms)
    assert parse_duration(format_duration(duration)) == duration


def test_nothing_set_means_the_sandbox_with_the_documented_defaults() -> None:
    settings = load_settings({})
    assert settings.is_sandbox
    assert settings.accounts_path.parts[-2:] == ("config", "sandbox.toml")
    assert settings.khipu_url == "http://127.0.0.1:8089"
    assert (settings.redis_url, settings.stream, settings.data_dir) == (None, "balances", Path(".data"))
    assert (settings.concurrency, settings.grace, settings.host) == (16, timedelta(seconds=30), "127.0.0.1")
    ports = (settings.webhook_port, settings.flower_port, settings.exporter_port, settings.sandbox_port)
    assert ports == (8080, 5555, 9464, 8089)
    assert settings.callback_url == "http://127.0.0.1:8080"  # the webhook that the sandbox calls
    assert settings.secrets_dir is None
    assert settings.flower_auth is None
    assert settings.notification_token is None


def test_every_variable_is_read(tmp_path: Path) -> None:
    settings = load_settings(
        {
            "BALANCES_REDIS_URL": "rediss://:pw@store:6380/1",
            "BALANCES_STREAM": "bank:balances",
            "BALANCES_ACCOUNTS": "/etc/accounts.toml",
            "BALANCES_KHIPU_URL": "https://khipu.test/",
            "BALANCES_CALLBACK_URL": "https://hook.test/base",
            "BALANCES_SECRETS_DIR": str(tmp_path),
            "BALANCES_DATA_DIR": "/var/lib/balances",
            "BALANCES_CONCURRENCY": "1000",
            "BALANCES_GRACE": "1m30s",
            "BALANCES_HOST": "::1",
            "BALANCES_WEBHOOK_PORT": "1",
            "BALANCES_FLOWER_PORT": "2",
            "BALANCES_EXPORTER_PORT": "3",
            "BALANCES_SANDBOX_PORT": "65535",
            "BALANCES_FLOWER_AUTH": "ops:pass:word",
            "BALANCES_NOTIFICATION_TOKEN": "t0ken",
            "BALANCES_SECRET_ACME_API_KEY": "not ours",
            "BALANCES_TEST_CLOCK": "not ours",
            "HOME": "/root",
        }
    )
    assert settings.store_url() == "rediss://:pw@store:6380/1"
    assert settings.khipu_url == "https://khipu.test"
    assert settings.grace == timedelta(seconds=90)
    assert settings.sandbox_port == 65535
    assert settings.flower_auth is not None
    assert settings.flower_auth.get_secret_value() == "ops:pass:word"
    assert not settings.is_sandbox


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings({}).concurrency = 3


def test_the_accounts_file_of_the_directory_ends_the_sandbox(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "sandbox.toml").touch()
    assert load_settings({}).accounts_path == Path("config/sandbox.toml")
    (tmp_path / "config" / "accounts.toml").touch()
    settings = load_settings({})
    assert (settings.accounts_path, settings.is_sandbox) == (Path("config/accounts.toml"), False)
    assert settings.khipu_url == "https://api.khipu.com"


def test_the_sandbox_is_asked_on_its_own_port_unless_another_address_is_given() -> None:
    assert load_settings({"BALANCES_SANDBOX_PORT": "9000"}).khipu_url == "http://127.0.0.1:9000"
    assert load_settings({"BALANCES_KHIPU_URL": "https://a.test"}).khipu_url == "https://a.test"


WRONG = [
    ("REDIS_URL", "http://host:1"),
    ("REDIS_URL", "redis://"),
    ("REDIS_URL", "redis://host:port"),
    ("REDIS_URL", "redis://host:99999"),
    ("REDIS_URL", "redis://host/name"),
    ("REDIS_URL", "redis://[host"),
    ("REDIS_URL", "redis://:p;w@host:1"),
    ("REDIS_URL", "sentinel://a:1;sentinel://b:2"),
    ("REDIS_URL", "sentinel://a:1"),
    ("REDIS_URL", "sentinel://a:1,/master"),
    ("REDIS_URL", "sentinel://a:0/master"),
    ("REDIS_URL", "sentinel://a:port/master"),
    ("REDIS_URL", "sentinel://a:1/master/name"),
    ("REDIS_URL", "sentinel://a b:1/master"),
    ("STREAM", "two words"),
    ("STREAM", "latest"),
    ("STREAM", "login:acme"),
    ("STREAM", "balances.polls"),
    ("STREAM", "celery.pidbox"),
    ("KHIPU_URL", "http://api.khipu.com"),
    ("KHIPU_URL", "ftp://127.0.0.1"),
    ("KHIPU_URL", "api.khipu.com"),
    ("KHIPU_URL", "https://"),
    ("KHIPU_URL", "https://user:pw@host"),
    ("KHIPU_URL", "https://host?x=1"),
    ("KHIPU_URL", "https://ho st"),
    ("CALLBACK_URL", "http://hook.test"),
    ("CALLBACK_URL", "https://hook.test/" + "x" * 200),
    ("SECRETS_DIR", "/no/such/directory"),
    ("CONCURRENCY", "0"),
    ("CONCURRENCY", "5001"),
    ("CONCURRENCY", "many"),
    ("GRACE", "30"),
    ("GRACE", "2h"),
    ("HOST", "http://host"),
    ("WEBHOOK_PORT", "0"),
    ("FLOWER_PORT", "65536"),
    ("EXPORTER_PORT", "-1"),
    ("SANDBOX_PORT", "http"),
    ("FLOWER_AUTH", "nobody"),
    ("FLOWER_AUTH", ":password"),
    ("FLOWER_AUTH", "user:"),
    ("NOTIFICATION_TOKEN", "two words"),
    ("GRACE", ""),
    ("ACCOUNTS", ""),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_one_problem_of_its_variable(name: str, value: str) -> None:
    (problem,) = problems({f"BALANCES_{name}": value})
    assert problem.where == f"BALANCES_{name}"
    assert problem.wrong
    assert problem.right


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:p@h:6379/0",
        "rediss://user:p%40@h/15?ssl_cert_reqs=required",
        "sentinel://a:26379/master",
        "sentinel://user:p%40%3B@a:26379,b,[::1]:26379/my-master.1/0",
        "redis://[::1]:6379",
    ],
)
def test_these_servers_are_accepted(url: str) -> None:
    assert load_settings({"BALANCES_REDIS_URL": url}).store_url() == url


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.9/x", "http://[::1]:80"])
def test_plain_http_may_go_to_loopback(url: str) -> None:
    assert load_settings({"BALANCES_CALLBACK_URL": url}).callback_url == url


@pytest.mark.parametrize("host", ["localhost.evil.test", "128.0.0.1", "0.0.0.0", "", "::2"])  # noqa: S104
def test_other_hosts_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_all_mistakes_come_at_once() -> None:
    names = [f"BALANCES_{name}" for name in ("REDIS_URL", "CONCURRENCY", "GRACE", "SANDBOX_PORT", "FOO")]
    assert {problem.where for problem in problems(dict.fromkeys(names, "!"))} == set(names)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("BALANCES_CONCURENCY", "did you mean BALANCES_CONCURRENCY?"),
        ("BALANCES_REDIS_URL_FIL", "did you mean BALANCES_REDIS_URL_FILE?"),
        ("BALANCES_XYZZY_PLUGH", "known: BALANCES_ACCOUNTS, "),
    ],
)
def test_an_unknown_variable_is_a_mistake_and_its_value_stays_unsaid(name: str, right: str) -> None:
    (problem,) = problems({name: CANARY})
    assert problem.where == name
    assert problem.right.startswith(right)
    assert CANARY not in str(problem)


def test_the_server_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://:pw@h/0\n")
    assert load_settings({"BALANCES_REDIS_URL_FILE": "url"}).store_url() == "redis://:pw@h/0"


@pytest.mark.parametrize("content", ["", f"http://{CANARY}", f"{CANARY} {CANARY}", CANARY * 10_000, None])
def test_a_wrong_file_is_named_without_its_content(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "url").write_text(content)
    (problem,) = problems({"BALANCES_REDIS_URL_FILE": "url"})
    assert problem.where == "BALANCES_REDIS_URL_FILE"
    assert CANARY not in str(problem)


@pytest.mark.parametrize(
    ("name", "secret", "wrong"),
    [("FLOWER_AUTH", "user:password", CANARY), ("NOTIFICATION_TOKEN", "token", f"{CANARY} {CANARY}")],
)
def test_any_secret_may_stand_in_a_file(name: str, secret: str, wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(secret + "\n")
    settings = load_settings({f"BALANCES_{name}_FILE": str(file)})
    assert getattr(settings, name.lower()).get_secret_value() == secret

    file.write_text(wrong)
    (problem,) = problems({f"BALANCES_{name}_FILE": str(file)})
    assert problem.where == f"BALANCES_{name}_FILE"
    assert wrong not in str(problem)


def test_two_addresses_of_the_server_are_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://h")
    (problem,) = problems({"BALANCES_REDIS_URL": "redis://h", "BALANCES_REDIS_URL_FILE": "url"})
    assert "BALANCES_REDIS_URL_FILE" in problem.wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"http://:{CANARY}@h"),
        ("REDIS_URL", f"redis://:{CANARY}@h:port"),
        ("REDIS_URL_FILE", f"redis://:{CANARY}@h"),
        ("KHIPU_URL", f"https://u:{CANARY}@h"),
        ("CALLBACK_URL", f"https://h?token={CANARY}"),
        ("FLOWER_AUTH", CANARY),
        ("NOTIFICATION_TOKEN", f"{CANARY} x"),
    ],
)
def test_no_message_shows_a_secret(name: str, value: str) -> None:
    environ = {f"BALANCES_{name}": value, "BALANCES_CONCURRENCY": "x"}
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ)
    assert len(caught.value.problems) == 2
    assert CANARY not in str(caught.value) + repr(caught.value)


def test_settings_show_no_secret() -> None:
    settings = load_settings(
        {
            "BALANCES_REDIS_URL": f"redis://:{CANARY}@h",
            "BALANCES_FLOWER_AUTH": f"u:{CANARY}",
            "BALANCES_NOTIFICATION_TOKEN": CANARY,
        }
    )
    assert CANARY not in repr(settings) + str(settings) + settings.model_dump_json()


def test_the_embedded_server_is_found_through_its_file(tmp_path: Path) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "redis.url").write_text("redis://:pw@127.0.0.1:5000/0\n")
    assert load_settings({}).store_url() == "redis://:pw@127.0.0.1:5000/0"


def test_without_a_server_the_way_to_one_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"`balances up` or `balances store`, or set BALANCES_REDIS_URL"):
        load_settings({}).store_url()


def test_every_field_that_can_be_wrong_says_what_is_right() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description or name in {"accounts_path", "is_sandbox", "data_dir"}, name


def test_no_key_of_the_timetable_can_be_the_stream() -> None:
    """The head of shared.lua names them all."""
    head = (resources.files("worker") / "lua" / "shared.lua").read_text().partition("-- <institution> is")[0]
    kinds = "hash|set|sorted set|string|list|stream"
    keys = re.findall(rf"(?:^--   |  )([a-z_]+)[\w:<>]*\s+(?:{kinds})\b", head, re.MULTILINE)
    assert len(set(keys)) > 40
    assert set(keys) <= TAKEN
    assert all(name.startswith(TAKEN_BEGINNINGS) for name in (POLLS, ANSWERS, *DeadLetterQueue))


@pytest.mark.parametrize("name", ["balances", "balances.acme", "acme:balances", "latest-balances"])
def test_these_streams_are_accepted(name: str) -> None:
    assert load_settings({"BALANCES_STREAM": name}).stream == name
