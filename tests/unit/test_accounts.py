"""The accounts file: read strictly, every mistake reported at once with its place, never an account number."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.accounts import Accounts, Definition, Limits, Retry, load_accounts, parse_accounts
from worker.errors import ConfigurationError
from worker.policy import Ladders

EXAMPLE = Path(__file__).parents[2] / "config" / "accounts.example.toml"
NUMBER = "70031337"
LOGIN = "[logins.acme]\n"
ACCOUNT = f'[[accounts]]\nalias = "acme-operating"\ninstitution = "bank.cl"\nnumber = "{NUMBER}"\nlogin = "acme"\n'


def read(text: str | bytes, *, callback_configured: bool = False) -> Accounts:
    return parse_accounts(text, "accounts.toml", callback_configured=callback_configured)


def mistakes(text: str | bytes, *, callback_configured: bool = False) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(text, callback_configured=callback_configured)
    assert NUMBER not in str(caught.value)
    return [str(problem) for problem in caught.value.problems]


def one(**keys: str) -> Definition:
    """The definition of one account with these keys, written as TOML."""
    lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return read(LOGIN + ACCOUNT + lines).definitions["acme-operating"]


def test_the_built_in_defaults() -> None:
    accounts = read(LOGIN + ACCOUNT)
    definition = accounts.definitions["acme-operating"]
    assert definition == Definition(
        alias="acme-operating",
        country="cl",
        segment="business",
        institution="bank.cl",
        number=NUMBER,
        login="acme",
        every_ms=900_000,
    )
    assert definition.identity == ("cl", "business", "bank.cl", NUMBER, None, "acme")
    assert (accounts.retry, accounts.limits) == (Retry(), Limits())
    assert accounts.logins["acme"].scheme == "api-key"
    assert accounts.logins["acme"].token_days == 14


def test_the_defaults_of_the_contract() -> None:
    seconds = [[rung.total_seconds() for rung in ladder] for ladder in (Retry().immediately, Retry().transient)]
    assert seconds == [[5, 30, 120], [30, 120, 600, 1800]]
    assert (Retry().wait, Retry().max_waits, Retry().max_losses) == (timedelta(hours=4), 6, 3)
    limits = Limits()
    assert (limits.request_deadline_ms, limits.lease_margin_ms, limits.life_span_ms) == (190_000, 60_000, 1_800_000)
    assert (limits.callback_grace_ms, limits.login_hold_ms, limits.min_gap_ms) == (600_000, 600_000, 0)
    assert (limits.retention_ms, limits.rate, limits.daily_requests) == (30 * 86_400_000, None, None)


def test_retry_is_what_the_policy_asks_for() -> None:
    ladders: Ladders = Retry()
    assert ladders.max_waits == 6


def test_defaults_hold_for_every_account_and_an_account_overrides_them() -> None:
    text = (
        '[defaults]\ncountry = "pe"\nsegment = "personal"\nevery = "1h"\nlogin = "acme"\nmin_gap = "5m"\n'
        + LOGIN
        + '[[accounts]]\nalias = "a"\ninstitution = "bank.pe"\nnumber = "1"\n'
        + '[[accounts]]\nalias = "b"\ninstitution = "bank.pe"\nnumber = "2"\nevery = "90s"\nmin_gap = "0s"\n'
        + '[[accounts]]\nalias = "c"\ninstitution = "bank.pe"\nnumber = "3"\ncron = "0 9 * * *"\n'
    )
    a, b, c = read(text).definitions.values()
    assert (a.country, a.segment, a.login, a.every_ms, a.min_gap_ms) == ("pe", "personal", "acme", 3_600_000, 300_000)
    assert (b.every_ms, b.min_gap_ms) == (90_000, 0)
    assert (c.every_ms, c.cron, c.timezone) == (None, "0 9 * * *", "America/Santiago")


def test_an_account_with_every_overrides_a_default_cron() -> None:
    text = '[defaults]\ncron = "0 9 * * *"\ntimezone = "UTC"\n' + LOGIN + ACCOUNT
    by_cron = read(text).definitions["acme-operating"]
    assert (by_cron.cron, by_cron.timezone, by_cron.every_ms) == ("0 9 * * *", "UTC", None)
    by_interval = read(text + 'every = "1m"\n').definitions["acme-operating"]
    assert (by_interval.cron, by_interval.timezone, by_interval.every_ms) == (None, None, 60_000)


def test_the_gap_of_the_limits_holds_where_no_account_says_otherwise() -> None:
    assert read('[limits]\nmin_gap = "2m"\n' + LOGIN + ACCOUNT).definitions["acme-operating"].min_gap_ms == 120_000


def test_the_mode_follows_the_callback_address() -> None:
    assert read(LOGIN + ACCOUNT).definitions["acme-operating"].mode == "sync"
    assert read(LOGIN + ACCOUNT, callback_configured=True).definitions["acme-operating"].mode == "callback"
    sync = read(LOGIN + ACCOUNT + 'mode = "sync"', callback_configured=True)
    assert sync.definitions["acme-operating"].mode == "sync"
    (mistake,) = mistakes(LOGIN + ACCOUNT + 'mode = "callback"')
    assert "BALANCES_CALLBACK_URL" in mistake


def test_the_scheme_comes_from_the_login() -> None:
    text = '[logins.acme]\nscheme = "bearer"\ntoken_days = 3\n' + ACCOUNT
    assert read(text).definitions["acme-operating"].scheme == "bearer"
    assert read(text).logins["acme"].token_days == 3
    assert read(text).definitions["acme-operating"].token_days == 3
    assert read(LOGIN + ACCOUNT).definitions["acme-operating"].token_days is None


def test_the_token_url_comes_from_the_login() -> None:
    text = '[logins.acme]\nscheme = "client-credentials"\ntoken_url = "https://x.test/token"\n' + ACCOUNT
    definition = read(text).definitions["acme-operating"]
    assert (definition.scheme, definition.token_url) == ("client-credentials", "https://x.test/token")
    assert definition.revision != read(text.replace("x.test", "y.test")).definitions["acme-operating"].revision


def test_retry_and_limits_are_read() -> None:
    text = (
        '[retry]\nimmediately = ["1s"]\ntransient = ["1s", "500ms"]\nwait = "2s"\nmax_waits = 1\nmax_losses = 2\n'
        '[limits]\nrequest_deadline = "2s"\nlease_margin = "1s"\nretention = "1d"\nrate = 30\ndaily_requests = 9\n'
    )
    accounts = read(text + LOGIN + ACCOUNT)
    assert accounts.retry == Retry(
        immediately=(timedelta(seconds=1),),
        transient=(timedelta(seconds=1), timedelta(milliseconds=500)),
        wait=timedelta(seconds=2),
        max_waits=1,
        max_losses=2,
    )
    assert (accounts.limits.rate, accounts.limits.daily_requests) == (30, 9)
    assert accounts.limits.request_deadline_ms == 2000


def test_retry_limits_and_definitions_survive_json() -> None:
    retry, limits, definition = Retry(), Limits(rate=5), one(currency='"CLP"')
    assert Retry.model_validate_json(retry.model_dump_json()) == retry
    assert Limits.model_validate_json(limits.model_dump_json()) == limits
    assert Definition.model_validate_json(definition.model_dump_json()) == definition
    assert '"wait":"4h"' in retry.model_dump_json()
    assert '"request_deadline":"3m10s"' in limits.model_dump_json()


@given(st.lists(st.integers(100, 86_400_000), min_size=1, max_size=20), st.integers(1000, 30 * 86_400_000))
def test_any_ladder_survives_json(rungs_ms: list[int], wait_ms: int) -> None:
    rungs = tuple(timedelta(milliseconds=rung) for rung in rungs_ms)
    retry = Retry(immediately=rungs, wait=timedelta(milliseconds=wait_ms))
    assert Retry.model_validate_json(retry.model_dump_json()) == retry


def test_what_is_resolved_without_validation_is_valid() -> None:
    for definition in load_accounts(EXAMPLE, callback_configured=True).definitions.values():
        assert Definition.model_validate(definition.model_dump()) == definition


def test_definitions_show_no_number_and_cannot_be_changed() -> None:
    definition = one()
    assert NUMBER not in repr(definition) + str(definition)
    with pytest.raises(ValidationError) as caught:
        Definition.model_validate({**definition.model_dump(), "number": NUMBER * 9})
    assert NUMBER not in str(caught.value)
    with pytest.raises(ValidationError):
        definition.number = "1"


@pytest.mark.parametrize(
    "keys",
    [
        {"every": '"16m"'},
        {"currency": '"CLP"'},
        {"segment": '"personal"'},
        {"cron": '"0 9 * * *"'},
        {"min_gap": '"1s"'},
        {"send_currency": "true", "currency": '"CLP"'},
    ],
)
def test_a_change_changes_the_revision_and_the_digest(keys: dict[str, str]) -> None:
    lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
    assert one(**keys).revision != one().revision
    assert read(LOGIN + ACCOUNT + lines).digest != read(LOGIN + ACCOUNT).digest


@pytest.mark.parametrize("head", ["[retry]\nmax_waits = 5\n", '[limits]\nretention = "3d"\n', "[logins.other]\n"])
def test_tables_that_are_no_account_change_the_digest_too(head: str) -> None:
    assert read(head + LOGIN + ACCOUNT).digest != read(LOGIN + ACCOUNT).digest


def test_comments_spaces_order_and_spelt_out_defaults_change_no_digest() -> None:
    other = '[[accounts]]\nalias = "b"\ninstitution = "bank.cl"\nnumber = "2"\nlogin = "acme"\n'
    plain = read(LOGIN + ACCOUNT + other)
    same = read("# why\n\n" + other + ACCOUNT + ' every="900s" # note\nsegment = "business"\n[retry]\n' + LOGIN)
    assert same.digest == plain.digest
    assert same.definitions["b"].revision == plain.definitions["b"].revision


MISTAKES = [
    ("evry = '15m'", "evry: unknown key; did you mean every?"),
    ("password = 'x'", "password: unknown key; secrets are environment variables or files"),
    ("every = 900", "every: is an integer; write a duration"),
    ("every = '15x'", "every: '15x' is no duration; write a duration"),
    ("every = '500ms'", "every: '500ms' is not valid; write a duration from \"1s\""),
    ("every = ['15m']", "every: is an array"),
    ("min_gap = '-1s'", "min_gap: '-1s' is no duration"),
    ("currency = 'clp'", "currency: 'clp' is not valid; write three capital letters"),
    ("currency = 5", "currency: is an integer"),
    ("country = 'chile'", "country: 'chile' is not valid"),
    ("segment = '../x'", "segment: '../x' is not valid"),
    ("send_currency = 1", "send_currency: is an integer; write true or false"),
    ("send_currency = true", "send_currency: there is no currency to send"),
    ("mode = 'async'", 'mode: \'async\' is not valid; write "sync" or "callback"'),
    ("cron = '0 25 * * *'", "cron: '0 25 * * *' is no cron expression (bad hour)"),
    ("cron = '@daily'", "cron: '@daily' is no cron expression (not five fields)"),
    ("cron = '0 0 0 * * *'", "cron: '0 0 0 * * *' is no cron expression (not five fields)"),
    ("cron = '0 0 30 2 *'", "cron: '0 0 30 2 *' is no cron expression (bad day-of-month)"),
    ("cron = '0 9 * * *'\nevery = '5m'", "cron: is set, and so is every; keep one of the two"),
    ("timezone = 'America/Santigo'", "timezone: 'America/Santigo' is no known time zone"),
    ("timezone = '../etc/passwd'", "timezone: '../etc/passwd' is no known time zone"),
    ("timezone = 'America'", "timezone: 'America' is no known time zone"),
    ("timezone = ''", "timezone: '' is no known time zone"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES)
def test_a_mistake_in_an_account_has_its_place_and_its_line(line: str, expected: str) -> None:
    (mistake,) = mistakes(LOGIN + ACCOUNT + line + "\n")
    assert mistake.startswith(f"accounts.toml:7: accounts[0] (acme-operating).{expected}")


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("alias", "'Acme'", "'Acme' is not valid"),
        ("alias", "''", "'' is not valid"),
        ("institution", "'a/b'", "'a/b' is not valid"),
        ("institution", "'..'", "'..' is not valid"),
        ("number", NUMBER, "is an integer; write 1 to 20 characters in quotes"),
        ("number", f"'{NUMBER * 3}'", "is not valid; write 1 to 20 characters"),
        ("number", f"' {NUMBER}'", "is not valid"),
        ("number", f"'''{NUMBER}\n'''", "is not valid"),
        ("number", "''", "is not valid"),
        ("login", "'acne'", "'acne' has no table; did you mean acme?"),
        ("login", "'zzzzz'", "'zzzzz' has no table; known: acme"),
        ("login", "1", "is an integer; name one of the [logins] tables"),
    ],
)
def test_a_wrong_value_of_a_required_key(key: str, value: str, wrong: str) -> None:
    lines = [line for line in ACCOUNT.splitlines() if not line.startswith(key)]
    (mistake,) = mistakes(LOGIN + "\n".join([*lines, f"{key} = {value}"]))
    assert f".{key}: {wrong}" in mistake


@pytest.mark.parametrize("key", ["alias", "institution", "number", "login"])
def test_a_required_key_that_is_missing(key: str) -> None:
    lines = [line for line in ACCOUNT.splitlines() if not line.startswith(key)]
    (mistake,) = mistakes(LOGIN + "\n".join(lines))
    assert mistake.startswith("accounts.toml:2: accounts[0]")
    assert f".{key}: is missing; " in mistake


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("[retri]\n", "accounts.toml:1: retri: unknown table or key; did you mean retry?"),
        ("limits = 3\n", "accounts.toml: limits: is an integer; write a table, [limits]"),
        ("[retry]\nimmediately = []\n", "accounts.toml:2: retry.immediately: [] is not valid; write one to twenty"),
        ("[retry]\nwait='4h'\ntransient = ['5s', '0s']\n", "accounts.toml:3: retry.transient[1]: '0s' is not valid"),
        ("[retry]\nimmediately = '5s'\n", "accounts.toml:2: retry.immediately: is a string"),
        ("[retry]\nmax_waits = 0\n", "accounts.toml:2: retry.max_waits: 0 is not valid; write a whole number from 1"),
        ("[retry]\nmax_losses = true\n", "accounts.toml:2: retry.max_losses: is a boolean"),
        ("[limits]\nrequest_deadline = '31m'\n", "accounts.toml:2: limits.request_deadline: '31m' is not valid"),
        ("[limits]\nrate = 0\n", "accounts.toml:2: limits.rate: 0 is not valid"),
        ("[limits]\nretension = '1d'\n", "accounts.toml:2: limits.retension: unknown key; did you mean retention?"),
        ("[logins.b]\nscheme = 'jwt'\n", "accounts.toml:2: logins.b.scheme: 'jwt' is not valid"),
        ("[logins.b]\ntoken = 'x'\n", "accounts.toml:2: logins.b.token: unknown key; secrets are environment"),
        ("[logins.b]\ntoken_url = 'http://x.test'\n", "accounts.toml:2: logins.b.token_url: the address is plain http"),
        (
            "[logins.b]\nscheme = 'client-credentials'\n",
            'accounts.toml:2: logins.b.scheme: "client-credentials" needs a token_url; add token_url',
        ),
        (
            "[logins.b]\nscheme = 'bearer'\ntoken_url = 'https://x.test'\n",
            'accounts.toml:3: logins.b.token_url: the scheme "bearer" asks for no token; leave it out',
        ),
        ("[logins.default]\n", "accounts.toml:1: logins.default: is reserved"),
        ("[logins.B]\n", "accounts.toml:1: logins.B: 'B' is not valid"),
        ("[defaults]\nevery = '15'\n", "accounts.toml:2: defaults.every: '15' is no duration"),
        ("[defaults]\ninstitution = 5\n", "accounts.toml:2: defaults.institution: is an integer"),
        ("[defaults]\nevry = '15m'\n", "accounts.toml:2: defaults.evry: unknown key; did you mean every?"),
        ("[defaults]\nevery = '1m'\ncron = '0 9 * * *'\n", "accounts.toml:3: defaults.cron: is set, and so is every"),
    ],
)
def test_a_mistake_elsewhere_is_said_once(head: str, expected: str) -> None:
    (mistake,) = mistakes(head + LOGIN + ACCOUNT)
    assert mistake.startswith(expected)


def test_a_wrong_default_is_not_blamed_on_the_accounts() -> None:
    account = ACCOUNT.replace('institution = "bank.cl"\n', "")
    (mistake,) = mistakes("[defaults]\ninstitution = 5\n" + LOGIN + account)
    assert mistake.startswith("accounts.toml:2: defaults.institution: is an integer")


def test_all_mistakes_come_at_once() -> None:
    text = (
        "[retry]\nmax_waits = 0\n[defaults]\nmode = 'x'\n" + LOGIN + ACCOUNT + "evry = '1m'\ncountry = 'C'\n" + ACCOUNT
    )
    assert len(mistakes(text)) == 5


def test_an_alias_twice_and_an_account_under_two_aliases() -> None:
    (twice,) = mistakes(LOGIN + ACCOUNT + ACCOUNT.replace(NUMBER, "1"))
    assert twice.startswith("accounts.toml:8: accounts[1] (acme-operating).alias: 'acme-operating' stands here twice")
    (same,) = mistakes(LOGIN + ACCOUNT + ACCOUNT.replace("acme-operating", "acme-second"))
    assert same.startswith("accounts.toml:7: accounts[1] (acme-second): names the same account as acme-operating")


def test_an_account_with_a_mistake_of_its_own_is_compared_too() -> None:
    first, second, third, fourth = mistakes(
        LOGIN + ACCOUNT + "evry = '1m'\n" + ACCOUNT + "mode = 'callback'\nlogim = 'x'\n"
    )
    assert "accounts[0] (acme-operating).evry" in first
    assert "mode: 'callback' needs an address" in second
    assert "stands here twice" in third
    assert "logim: unknown key; did you mean login?" in fourth


def test_one_number_in_two_currencies_or_segments_is_two_accounts() -> None:
    text = LOGIN + ACCOUNT
    text += ACCOUNT.replace("operating", "usd") + 'currency = "USD"\n'
    text += ACCOUNT.replace("operating", "clp") + 'currency = "CLP"\n'
    text += ACCOUNT.replace("operating", "own") + 'segment = "personal"\n'
    assert len(read(text).definitions) == 4


def test_one_account_under_two_logins_is_still_one_account() -> None:
    other = ACCOUNT.replace("operating", "second").replace('login = "acme"', 'login = "b"')
    (mistake,) = mistakes(LOGIN + "[logins.b]\n" + ACCOUNT + other)
    assert "names the same account" in mistake


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "there are none; write at least one [[accounts]]"),
        (LOGIN, "there are none"),
        ("[accounts]\nalias = 'a'\n", "is a table; write [[accounts]], in double brackets"),
        ("accounts = [1]\n", "accounts[0]: is an integer; write a table"),
        ("a = \n", "is not TOML: Invalid value (at line 1, column 5)"),
        ("a = 1\na = 2\n", "is not TOML: Cannot overwrite a value (at line 2, column 6)"),
        ("a = " + "9" * 5000, "is not TOML: "),
        ("a = " + "[" * 100_000, "is nested too deeply"),
        (b"\xff\xfe", "is not UTF-8 (at byte 0)"),
        (b"#" * (32 * 1024 * 1024 + 1), "is larger than 32 MiB"),
    ],
)
def test_a_file_that_is_no_accounts_file(text: str | bytes, expected: str) -> None:
    assert expected in mistakes(text)[0]


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert read(b"\xef\xbb\xbf" + (LOGIN + ACCOUNT).encode()).definitions


def test_headers_that_cannot_be_counted_give_no_wrong_line() -> None:
    hidden = f"{LOGIN}[[accounts]]\nalias = 'a'\ninstitution = '''\n[[accounts]]\n'''\nnumber = '1'\nlogin = 'acme'\n"
    (mistake,) = mistakes(hidden)
    assert mistake.startswith("accounts.toml: accounts[0] (a).institution: ")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml: cannot be read \(No such file or directory\)"):
        load_accounts(tmp_path / "nowhere.toml", callback_configured=False)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_accounts(tmp_path, callback_configured=False)


def test_the_example_loads() -> None:
    accounts = load_accounts(EXAMPLE, callback_configured=False)
    assert list(accounts.definitions) == ["acme-operating", "acme-payroll", "beta-dollars"]
    assert accounts.retry == Retry()
    assert accounts.limits == Limits()


def test_ten_thousand_accounts_load() -> None:
    text = LOGIN + "".join(
        ACCOUNT.replace("operating", str(i)).replace(NUMBER, str(i)) + 'every = "15m"\n' for i in range(10_000)
    )
    assert len(read(text).definitions) == 10_000
