"""`balances`: what it prints for people and programs, its exit status, and never a traceback.

The server is a real one; the states on it are made by the timetable's scripts, without worker or beat. A process of its
own takes half a second to start, so it is one where that matters: pipes, signals, terminals, completion.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from click.testing import CliRunner
from servers import ROOT, ValkeyServer, wait_until
from world import STREAM, World, accounts_file

from worker import cli as cli_module
from worker.accounts import parse_accounts
from worker.cli import main
from worker.store import LOOPBACK, free_port
from worker.timetable import connect

BALANCES = str(Path(sys.executable).parent / "balances")
ALIASES = ("acme-operating", "acme-payroll", "umbrella-operating")


class Cli:
    """Runs `balances` with a terminal of 80 columns that is none."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.accounts = directory / "accounts.toml"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("BALANCES_", "NO_COLOR"))}
        self.env |= {
            "BALANCES_REDIS_URL": url,
            "BALANCES_ACCOUNTS": str(self.accounts),
            "BALANCES_DATA_DIR": str(directory / "data"),
            "BALANCES_KHIPU_URL": f"http://{LOOPBACK}:1",
            "COLUMNS": "80",
            "TERM": "xterm-256color",
            "TZ": "UTC",
        }

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BALANCES, *arguments],
            cwd=ROOT,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def process(self, *arguments: str, status: int = 0, **env: str) -> str:
        """What it printed, on both streams; its exit status is checked, and that it has no traceback."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in out + err
        assert process.returncode == status, (process.returncode, out, err)
        return out + err

    def __call__(self, *arguments: str, status: int = 0, **env: str) -> str:
        """The same, in this process: whatever would be a traceback is raised."""
        without = {name: None for name in os.environ if name.startswith("BALANCES_")}
        result = CliRunner().invoke(main, arguments, env={**without, **self.env, **env}, prog_name="balances")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, (result.exit_code, result.output)
        return result.output

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status))


@pytest.fixture
def world(store: redis.Redis) -> World:
    world = World(store)
    text = accounts_file(*ALIASES[:2]) + accounts_file(ALIASES[2], login="umbrella", number="777")
    world.apply(parse_accounts(text, "accounts.toml", callback_configured=False))
    return world


@pytest.fixture(autouse=True)
def utc_and_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The terminal's zone is UTC; what a command leaves to the end of its process is closed here."""
    opened: list[redis.Redis] = []
    monkeypatch.setattr(cli_module, "connect", lambda url: opened.append(connect(url)) or opened[-1])
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    for client in opened:
        client.connection_pool.disconnect()
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def cli(valkey_server: ValkeyServer, world: World, tmp_path: Path) -> Cli:  # noqa: ARG001
    cli = Cli(tmp_path, valkey_server.url)
    cli.accounts.write_bytes(accounts_file(*ALIASES[:2]) + accounts_file(ALIASES[2], login="umbrella", number="777"))
    return cli


def suspend(world: World, *aliases: str) -> None:
    for alias in aliases:
        world.suspend(world.start(alias).token)


# ------------------------------------------------------------------------------------------------------------ reading


def test_the_contract_of_accounts_is_the_same_for_all_and_for_one(cli: Cli, world: World) -> None:
    world.settle(world.start("acme-operating"))
    rows = cli.json("accounts")
    names = ["alias", "institution", "login", "state", "attempt", "poll", "next_due", "last_ok", "last_outcome"]
    assert [list(row) for row in rows] == [[*names, "overdue"]] * 3
    assert cli.json("accounts", "acme-operating") == [row for row in rows if row["alias"] == "acme-operating"]


def test_people_see_a_table_and_one_accounts_story(cli: Cli, world: World) -> None:
    suspend(world, "umbrella-operating")
    lines = cli("accounts").splitlines()
    assert lines[0].split() == ["account", "state", "outcome", "last", "balance", "next", "due", "at", "(UTC)"]
    assert lines[1].split() == ["umbrella-operating", "suspended", "E401", "-", "on", "redrive"]
    assert lines[-1] == "3 accounts: 1 suspended, 2 scheduled"
    story = cli("accounts", "umbrella-operating")
    assert "It is suspended: E401 DO_NOT_RETRY, no such account" in story
    assert "  balances dead redrive umbrella-operating" in story


def test_dead_list_is_the_contract_and_show_has_the_message(cli: Cli, world: World) -> None:
    suspend(world, "umbrella-operating")
    [letter] = cli.json("dead", "list")
    names = ["alias", "login", "queue", "poll", "code", "type", "description", "attempts", "first_at", "last_at"]
    assert list(letter) == names
    assert cli.json("dead", "list", "--queue", "bad-answer") == []
    shown = cli.json("dead", "show", "umbrella-operating")
    assert {name: shown[name] for name in names} == letter
    assert shown["message"]["headers"]["task"] == "balances.poll"
    assert "no such account" in cli("dead", "list")
    assert "code         E401" in cli("dead", "show", "umbrella-operating")


def test_latest_and_tail_tell_balances(cli: Cli, world: World) -> None:
    begun = world.start("acme-operating")
    balance = {"type": "ClosingAvailable", "indicator": "Debit", "amount": "12345678901234567.89", "currency": "CLP"}
    event = {**balance, "account_id": "1", "as_of": "2026-11-22T06:33:00-04:00"}
    publish(world, begun, event)
    suspend(world, "umbrella-operating")
    assert "-12345678901234567.89  CLP" in cli("latest")
    assert cli.json("latest", "acme-operating")[0]["balances"] == [event]
    first, second = cli("tail", "--from", "0", "--no-follow").splitlines()
    assert re.fullmatch(
        r"\d\d \w{3} [\d:]{8} UTC  acme-operating +-12345678901234567.89 CLP ClosingAvailable, changed", first
    )
    assert second.endswith("umbrella-operating  suspended: E401")
    [line] = cli("tail", "--no-follow", "--alias", "umbrella-operating", "--json").splitlines()
    assert json.loads(line)["type"] == "account.suspended.v1"


def test_history_draws_an_accounts_last_balances(cli: Cli, world: World) -> None:
    for amount in ("1000", "3000", "2000"):
        world.settle(world.start("acme-operating"), amount=amount)
    drawn = cli("history", "acme-operating")
    assert all(amount in drawn.replace(",", "") for amount in ("1000", "3000", "2000"))
    amounts = [entry["balances"][0]["amount"] for entry in cli.json("history", "acme-operating", "--count", "2")]
    assert amounts == ["3000", "2000"]
    assert "has no balance on the stream" in cli("history", "acme-payroll", status=1)


def publish(world: World, begun: Any, balance: dict[str, str]) -> None:
    from worker.timetable import Event

    data = {
        "account": begun.token.account,
        "institution": "bancosecurity.cl",
        "poll": begun.token.poll,
        "operation_id": "op",
        "balances": [balance],
        "fetched_at": "2026-11-22T10:33:00+00:00",
        "additional_information": None,
    }
    settled = world.timetable.settle(
        begun, Event("op", "/khipu/cl/business/bancosecurity.cl", data, "fp", ("1",), world.timetable.now_ms())
    )
    assert settled is not None


# ----------------------------------------------------------------------------------------------------------- ordering


def test_orders_are_done_or_refused_with_the_reason_and_exit_1(cli: Cli) -> None:
    assert cli.process("poll", "acme-operating") == "acme-operating: due now\n"
    assert cli("pause", "acme-operating", "acme-payroll") == "acme-operating: paused\nacme-payroll: paused\n"
    refused = cli.process("poll", "acme-operating", status=1)
    assert refused == "acme-operating: refused: it is paused; go on with: balances resume acme-operating\n"
    assert cli.json("resume", "--all") == [
        {"name": alias, "done": True, "reason": None} for alias in ("acme-operating", "acme-payroll")
    ]
    results = cli.json("poll", "nobody", status=1)
    assert results == [{"name": "nobody", "done": False, "reason": "no such account; see: balances accounts"}]
    assert cli("pause", status=2).endswith("Error: name accounts, or say --all\n")


def test_a_name_or_a_user_that_is_no_text_makes_no_traceback(cli: Cli) -> None:
    for command in ("pause", "accounts"):
        assert "no such account" in cli.process(command, "acme\udcff", status=1)
    cli.process("pause", "acme-operating", SUDO_USER="jos\udce9")


def test_a_block_is_named_and_lifted(cli: Cli, world: World) -> None:
    world.block(world.start("acme-operating").token)
    assert "its login acme is blocked; after the fix: balances unblock acme" in cli("poll", "acme-payroll", status=1)
    assert cli("unblock", "acme") == "acme: unblocked; one account goes first\n"
    assert cli("unblock", "acme", status=1) == "balances: acme: not blocked\n"


def test_parked_accounts_are_released_by_filter(cli: Cli, world: World) -> None:
    world.park(world.start("umbrella-operating").token)
    assert cli("release", "--login", "acme") == "nothing was parked\n"
    assert cli("release", "--login", "umbrella") == "umbrella-operating: released\n"


def test_discard_throws_the_letter_away(cli: Cli, world: World) -> None:
    suspend(world, "umbrella-operating")
    assert cli("dead", "discard", "umbrella-operating") == "umbrella-operating: discarded and paused\n"
    assert cli("dead", "list") == "no dead letters\n"


def test_sync_says_what_changed_and_refuses_a_mass_removal(cli: Cli) -> None:
    assert cli("sync") == "3 accounts in force, 0 changed\n"
    cli.accounts.write_bytes(accounts_file("other"))
    refused = cli("sync", status=1)
    assert refused == "balances: this would remove 3 of 3 accounts; if it is meant: balances sync --force\n"
    assert cli.json("sync", "--force") == {"accounts": 1, "changed": 4}


# ------------------------------------------------------------------------------------------------------------ redrive


@pytest.fixture
def suspended(world: World, cli: Cli) -> list[str]:
    """Twelve accounts in a dead-letter queue, the oldest first; each has a login of its own."""
    names = [f"account-{number:02}" for number in range(12)]
    text = b"".join(accounts_file(name, login=name, number=f"5{name[-2:]}") for name in names)
    cli.accounts.write_bytes(text)
    world.apply(parse_accounts(text, "accounts.toml", callback_configured=False))
    suspend(world, *names)
    return names


def states(world: World) -> list[str]:
    return [fields["state"] for _, fields in world.timetable.accounts()]


def test_a_dry_run_changes_nothing(cli: Cli, world: World, suspended: list[str]) -> None:
    told = cli("dead", "redrive", "--queue", "do-not-retry", "--dry-run")
    assert told.splitlines() == [f"{name}: would be redriven" for name in suspended]
    assert cli.json("dead", "redrive", suspended[0], "--dry-run") == [
        {"name": suspended[0], "done": False, "would": True, "reason": None}
    ]
    assert set(states(world)) == {"suspended"}


def test_a_queue_comes_back_at_the_rate_asked_for(cli: Cli, world: World, suspended: list[str]) -> None:
    started = time.monotonic()
    told = cli.json("dead", "redrive", "--queue", "do-not-retry", "--rate", "20/s")
    assert [each["name"] for each in told if each["done"]] == suspended
    assert time.monotonic() - started >= 11 / 20
    assert set(states(world)) == {"scheduled"}
    assert cli("dead", "redrive", "--queue", "do-not-retry") == "nothing to redrive\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_redrive_says_how_far_it_came_and_can_be_said_again(
    cli: Cli, world: World, suspended: list[str], number: signal.Signals
) -> None:
    process = cli.start("dead", "redrive", "--queue", "do-not-retry", "--rate", "1/h")
    wait_until(lambda: "scheduled" in states(world))
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (1, f"{suspended[0]}: redriven: due now\n")
    assert err == "balances: interrupted: 1 of 12 redriven, the others are as they were\n"
    assert states(world).count("suspended") == 11
    assert len(cli.json("dead", "redrive", "--queue", "do-not-retry")) == 11


def test_a_redrive_whose_server_goes_says_how_far_it_came(cli: Cli, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server, server.client() as client:
        world = World(client)
        world.apply(parse_accounts(cli.accounts.read_bytes(), "accounts.toml", callback_configured=False))
        suspend(world, "acme-operating", "umbrella-operating")
        names = ("acme-operating", "umbrella-operating")
        process = cli.start("dead", "redrive", *names, "--rate", "1/s", BALANCES_REDIS_URL=server.url)
        wait_until(lambda: "scheduled" in world.state("acme-operating"))
        server.kill()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "acme-operating: redriven: due now\n")
    assert err.startswith("balances: Redis: ConnectionError: 1 of 2 redriven, the others are as they were; ")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "name accounts, or a --queue"),
        (["a", "--queue", "bad-answer"], 2, "name accounts, or a --queue"),
        (["a", "--rate", "10"], 2, "'10' is no rate; write 10/m for ten a minute (or /s, /h)"),
        (["--queue", "after-notification"], 1, "what waits there is parked; bring it back with: balances release"),
        (["acme-payroll"], 1, "acme-payroll: refused: it is not suspended"),
    ],
)
def test_what_cannot_be_redriven_is_refused(cli: Cli, arguments: list[str], status: int, words: str) -> None:
    assert words in cli("dead", "redrive", *arguments, status=status)


# ------------------------------------------------------------------------------------------- what goes wrong, in words


def test_no_server_is_one_line(cli: Cli) -> None:
    for command in (["accounts"], ["poll", "a"], ["tail", "--no-follow"], ["dead", "list", "--json"]):
        said = cli(*command, status=1, BALANCES_REDIS_URL=f"redis://{LOOPBACK}:{free_port()}/0")
        assert re.fullmatch(r"balances: .*ConnectionError.*\n", said), said
        assert "balances check" in said


def test_something_else_on_the_port_is_one_line(cli: Cli) -> None:
    http = [sys.executable, "-m", "http.server", "0", "--bind", LOOPBACK]
    with subprocess.Popen(http, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1) as server:
        port = server_port(server)
        said = cli.process("accounts", status=1, BALANCES_REDIS_URL=f"redis://{LOOPBACK}:{port}/0")
        server.kill()
    assert re.fullmatch(r"balances: .*balances check\n", said), said


def server_port(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    os.set_blocking(server.stdout.fileno(), True)
    found = re.search(r"port (\d+)", server.stdout.readline())
    assert found
    return int(found[1])


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("BALANCES_REDIS_URL", "http://example", "is no address of a server"),
        ("BALANCES_CONCURENCY", "3", "did you mean BALANCES_CONCURRENCY?"),
        ("BALANCES_ACCOUNTS", "/nowhere/accounts.toml", "cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_configuration_is_one_line_each_and_exit_2(cli: Cli, variable: str, value: str, words: str) -> None:
    said = cli.process("check", status=2, **{variable: value})
    assert said.startswith("balances: ")
    assert words in said
    assert said.count("\n") == 1


def test_a_server_that_was_never_started_is_named(cli: Cli) -> None:
    del cli.env["BALANCES_REDIS_URL"]
    said = cli("accounts", status=2)
    assert said.startswith("balances: ")
    assert "run `balances up` or `balances store`" in said


def test_an_unknown_alias_is_refused(cli: Cli) -> None:
    assert cli("accounts", "nobody", status=1) == "balances: nobody: no such account; see: balances accounts\n"
    assert cli("latest", "nobody", status=1) == "balances: nobody: no such account; see: balances accounts\n"
    assert cli("history", "nobody", status=1) == "balances: nobody: no such account; see: balances accounts\n"
    assert cli("dead", "show", "nobody", status=1).startswith("balances: nobody: has no dead letter")


def test_a_wrong_entry_is_wrong_use(cli: Cli) -> None:
    assert "an entry's id is" in cli("tail", "--from", "yesterday", status=2)
    assert "latency" in cli("sandbox", "--latency", "soon", status=2)


@pytest.mark.parametrize("arguments", [["tail", "--from", "0"], ["tail", "--from", "0", "--json"], ["accounts"]])
def test_a_reader_that_leaves_is_no_trouble(cli: Cli, world: World, arguments: list[str]) -> None:
    for _ in range(2000):
        suspend_event(world)
    process = cli.start(*arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(10) == 0


def suspend_event(world: World) -> None:
    """An entry as `suspend` writes it, without an account to suspend."""
    kind = "account.suspended.v1"
    data = {"account": "a", "institution": "b", "poll": 1, "state": "parked", "code": "E203", "queue": "q"}
    attributes = {
        "specversion": "1.0",
        "id": f"a.1.{kind}",
        "source": "/khipu/cl/business/b",
        "type": kind,
        "subject": "a",
        "time": "2026-11-22T10:33:04.500Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:balance-poller:{kind}",
    }
    world.client.xadd(STREAM, {**attributes, "data": json.dumps(data)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_tail_quietly(cli: Cli, world: World, number: signal.Signals) -> None:
    suspend_event(world)
    process = cli.start("tail", "--from", "0")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


def test_tail_goes_on_when_the_server_comes_back(cli: Cli, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, appendonly="yes", appendfsync="always") as server, server.client() as client:
        process = cli.start("tail", "--from", "0", BALANCES_REDIS_URL=server.url)
        assert process.stdout is not None
        suspend_event(World(client))
        assert "parked" in process.stdout.readline()
        server.kill()
        assert process.stderr is not None
        assert "the server is away" in process.stderr.readline()
        server.start()
        suspend_event(World(client))
        assert "parked" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 0


# -------------------------------------------------------------------------------------------------- help, completion


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


ALL = dict(commands(main))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_an_example_and_its_help_fits_80_columns(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*path, "--help"], terminal_width=80, prog_name="balances")
    assert result.exit_code == 0
    assert re.search(r"Examples?:\n( +balances.*\n)+", result.output), result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for example in re.findall(r"^ +balances ([^&|\n]*?)(?:   .*)?$", result.output, re.MULTILINE):
        name = next(known for known in sorted(ALL, reverse=True) if tuple(example.split()[: len(known)]) == known)
        assert name[: len(path)] == path


@pytest.mark.parametrize("path", [path for path in ALL if not isinstance(ALL[path], click.Group)], ids=" ".join)
def test_every_command_speaks_json(path: tuple[str, ...]) -> None:
    assert "--json" in [option for param in ALL[path].params for option in param.opts]


def complete(cli: Cli, *words: str, **env: str) -> list[str]:
    text = " ".join(["balances", *words])
    out = cli.process(_BALANCES_COMPLETE="bash_complete", COMP_WORDS=text, COMP_CWORD=str(len(words)), **env)
    return [line.partition(",")[2] for line in out.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("acc",), ["accounts"]),
        (("accounts", "acme"), ["acme-operating", "acme-payroll"]),
        (("unblock", ""), ["acme", "umbrella"]),
        (("release", "--login", "u"), ["umbrella"]),
        (("dead", "list", "--queue", "re"), ["retries-exhausted"]),
        (("dead", "redrive", "um"), ["umbrella-operating"]),
    ],
    ids=" ".join,
)
def test_names_complete_from_the_server(cli: Cli, world: World, words: tuple[str, ...], found: list[str]) -> None:
    suspend(world, "umbrella-operating")
    assert complete(cli, *words) == found


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "nonsense", "redis://127.0.0.1:{silent}/0"])
def test_completion_is_silent_and_soon_over_without_a_server(cli: Cli, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = url.format(silent=silent.getsockname()[1])
        assert complete(cli, "accounts", "a", BALANCES_REDIS_URL=address) == []
    assert "complete -o nosort -F" in cli.process(_BALANCES_COMPLETE="bash_source")


# ---------------------------------------------------------------------------------------------------------- terminals


def on_terminal(cli: Cli, *arguments: str, ends: Callable[[str], bool] = lambda _: False, **env: str) -> str:
    """What it writes to a terminal until its end, or until `ends` says that this is enough; then Ctrl-C."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(BALANCES, [BALANCES, *arguments], {**cli.env, **env})  # noqa: S606
    text, deadline = b"", time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                try:
                    chunk = os.read(terminal, 65536)
                except OSError:  # Linux's end of file
                    chunk = b""
                text += chunk
                if not chunk:
                    break
                if ends(text.decode(errors="replace")):
                    os.kill(process, signal.SIGINT)
                    ends = lambda _: False  # noqa: E731
    finally:
        os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 1}
    assert b"Traceback" not in text
    return text.decode()


def test_colours_are_for_terminals_only_and_can_be_refused(cli: Cli, world: World) -> None:
    suspend(world, "umbrella-operating")
    assert "\x1b[31m" in on_terminal(cli, "accounts")
    assert "\x1b[31m" not in on_terminal(cli, "accounts", NO_COLOR="1")
    assert "\x1b" not in cli.process("accounts")


@pytest.mark.usefixtures("suspended")
def test_a_redrive_shows_a_bar_on_a_terminal(cli: Cli) -> None:
    text = on_terminal(
        cli,
        "dead",
        "redrive",
        "--queue",
        "do-not-retry",
        "--rate",
        "1/h",
        ends=lambda text: re.search(r"1/12", text) is not None,
    )
    assert "interrupted: 1 of 12 redriven" in text
