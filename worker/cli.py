"""Parse what an operator types, and print what `worker.ops` answers: tables for people, `--json` for programs.

Exit status: 0 done, 1 found wanting or refused (with the reason), 2 wrong use or configuration.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

import click
import redis
from click.shell_completion import CompletionItem
from rich.console import Console, RenderableType
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from worker import ops, stream, tables
from worker.accounts import load_accounts
from worker.credentials import CredentialStore
from worker.errors import BalancesError, ConfigurationError, Refused, StoreUnavailable
from worker.history import draw
from worker.live import Screen
from worker.policy import DeadLetterQueue
from worker.processes import printer
from worker.sandbox import PortUnavailable, sandbox_secrets, serve
from worker.settings import Settings, load_settings
from worker.store import EmbeddedStore
from worker.stream import last_id, read
from worker.timetable import STATE_VERSION, Timetable, connect
from worker.up import Machine, is_terminal, readable

P = ParamSpec("P")
R = TypeVar("R")
#: What became of each account or login: None, or why not.
Results = Iterable[tuple[str, str | None]]

#: A shell waits for a completion no longer than this, server or not.
COMPLETION_S = 0.7
SERVER_ADVICE = "is the server running, and is BALANCES_REDIS_URL right? See: balances check"
#: Where the processes of `up` write while the live view has the terminal, in the data directory.
LOG_FILE = "up.log"


class Terminal(Console):
    """A console that takes a reader who left (`| head`) for satisfied."""

    def on_broken_pipe(self) -> None:
        leave_quietly()


console = Terminal(highlight=False, soft_wrap=False)
as_json = click.option("--json", "is_json", is_flag=True, help="Print JSON.")


def leave_quietly(status: int = 0) -> NoReturn:
    """Ends with nothing more to say, although nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status)


def show(renderable: RenderableType) -> None:
    """Prints it without the spaces that fill a table's lines up: they would wrap where it is pasted."""
    with console.capture() as captured:
        console.print(renderable, crop=False)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_json(data: object) -> None:
    click.echo(json.dumps(data, ensure_ascii=False, indent=2))


class Group(click.Group):
    """Turns what this package raises on purpose into one line per problem and the right exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What is no text is nobody's name."""
        return super().parse_args(ctx, list(map(ops.as_text, args)))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            for problem in error.problems:
                click.echo(f"balances: {problem}", err=True)
            ctx.exit(2)
        except redis.RedisError as error:
            self._fail(ctx, f"Redis: {type(error).__name__}; {SERVER_ADVICE}")
        except StoreUnavailable as error:
            is_remote = isinstance(error.__cause__, redis.RedisError)
            self._fail(ctx, f"{error}; {SERVER_ADVICE}" if is_remote else str(error))
        except BalancesError as error:
            self._fail(ctx, str(error))
        except BrokenPipeError:
            leave_quietly()

    @staticmethod
    def _fail(ctx: click.Context, text: str) -> NoReturn:
        click.echo(f"balances: {text}", err=True)
        ctx.exit(1)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="""Exit status: 0 done, 1 found wanting or refused, 2 wrong use or configuration.

    \b
    Completion of commands, accounts, logins and queues, for bash (or zsh, fish):
      eval "$(_BALANCES_COMPLETE=bash_source balances)"
    """,
)
def main() -> None:
    """Polls bank balances over Khipu, unattended, and tells what it does.

    \b
    Examples:
      balances up            run everything on this machine
      balances accounts      how the accounts stand, trouble first
      balances dead list     what needs a person
    """


def with_timetable(command: Callable[..., R]) -> Callable[..., R]:
    """Hands the command the timetable of the configured server."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        return command(open_timetable(), *args, **kwargs)

    return run


def open_timetable() -> Timetable:
    timetable = unchecked_timetable()
    timetable.check_version()
    return timetable


def unchecked_timetable() -> Timetable:
    settings = load_settings()
    return Timetable(connect(settings.store_url()), stream=settings.stream, actor=ops.actor())


# --------------------------------------------------------------------------------------------------------- completion


def completed(names: Callable[[Timetable], Iterable[str]]) -> Callable[..., list[CompletionItem]]:
    """Completes from what the server knows; nothing, and without a word, where it does not answer in time."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found: list[str] = []

        def look() -> None:
            with suppress(Exception):  # a shell that completes has no place for a message
                found.extend(names(open_timetable()))

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(COMPLETION_S)
        return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]

    return complete


aliases_known = completed(ops.all_aliases)
logins_known = completed(lambda timetable: timetable.logins())
lettered = completed(lambda timetable: (row.alias or row.login for row in ops.dead_letters(timetable)))


# ----------------------------------------------------------------------------------------------------------- running


class Lines:
    """How `up` looks where no terminal is: one prefixed line after the other, or JSON."""

    def __init__(self, machine: Machine, is_json: bool) -> None:
        self._is_json = is_json
        self._show = printer(machine.names, sys.stdout)

    def line(self, name: str, line: str) -> None:
        if self._is_json:
            with suppress(OSError):
                click.echo(json.dumps({"process": name, "line": line}, ensure_ascii=False))
        elif text := readable(line):
            self._show(name, text)

    def showing(self, _timetable: Timetable, _statuses: Callable[[], dict[str, str]]) -> AbstractContextManager[None]:
        return nullcontext()

    def summary(self, timetable: Timetable) -> None:
        print_accounts(timetable, None, self._is_json)


@main.command()
@click.option("--for", "for_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop after so many seconds.")
@click.option("--plain", is_flag=True, help="Plain lines on a terminal, too.")
@as_json
def up(for_s: float | None, plain: bool, is_json: bool) -> None:
    """Run everything on this machine until Ctrl-C.

    Without accounts of your own it runs the sandbox's.

    \b
    Example:
      balances up --for 40
    """
    settings = load_settings()
    machine = Machine(settings, os.environ)
    header = opening(machine)
    if is_json or plain or not is_terminal():
        if not is_json:
            click.echo("\n".join(header))
        status = machine.run(for_s, Lines(machine, is_json))
    else:
        log = settings.data_dir / LOG_FILE
        status = machine.run(for_s, Screen(console, [*header, f"What the processes say: {log}"], log))
    try:
        sys.stdout.flush()
    except OSError:
        leave_quietly(status)
    sys.exit(status)


def opening(machine: Machine) -> list[str]:
    """What runs, how to go live where that is the sandbox, and where Flower is."""
    settings = machine.settings
    lines = [f"{len(machine.accounts.definitions)} accounts of {settings.accounts_path}"]
    if settings.is_sandbox:
        lines = [
            "This is the sandbox: a bank of our own making; no request leaves this machine.",
            "To go live: copy config/accounts.example.toml to config/accounts.toml, edit it.",
        ]
    return [*lines, f"Flower: {machine.flower_url} · Status: {machine.status_url} · Ctrl-C stops everything"]


@main.command()
@as_json
def store(is_json: bool) -> None:
    """Run the embedded server alone, in the foreground.

    \b
    Example:
      balances store
    """
    settings = load_settings()
    with EmbeddedStore(settings.data_dir) as embedded:
        told = {"pid": embedded.pid, "data_dir": str(embedded.data_dir)}
        print_json(told) if is_json else click.echo(f"server {embedded.pid} on {embedded.data_dir}; Ctrl-C stops it")
        with until_interrupted():
            while True:
                time.sleep(1)
                if said := embedded.heal():
                    click.echo(said, err=True)


@main.command()
@click.option("--latency", default="0s", help="How long every answer takes: 2s, or 0.2s-3s.")
@as_json
def sandbox(latency: str, is_json: bool) -> None:
    """Run the imitation of Khipu alone, in the foreground.

    \b
    Example:
      balances sandbox --latency 0.2s-3s
    """
    settings = load_settings()
    try:
        serve("127.0.0.1", settings.sandbox_port, latency=latency, quiet=is_json)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--latency") from None
    except PortUnavailable as error:
        raise click.UsageError(f"{error}; free it, or set BALANCES_SANDBOX_PORT to another") from None


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ends the block quietly at Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------------- looking


@main.command()
@as_json
def check(is_json: bool) -> None:
    """Look at everything that polling needs, here and outside.

    Configuration, secrets, server, clock, Khipu, webhook, processes. Sends no
    request that is billed, and takes ten seconds at most. Exit status 1 if
    something is wanting.

    \b
    Example:
      balances check && balances up
    """
    from worker import checks  # brings requests along, which takes longer to load than any other command
    from worker.khipu import KhipuClient

    settings = load_settings()
    accounts = load_accounts(settings.accounts_path, callback_configured=settings.callback_url is not None)
    credentials = CredentialStore(environment(settings), settings.secrets_dir)
    findings = checks.check(settings, accounts, credentials, KhipuClient(settings.khipu_url))
    if is_json:
        print_json([ops.as_dict(finding) for finding in findings])
    else:
        show(tables.findings_table(findings))
    sys.exit(0 if all(finding.is_right for finding in findings) else 1)


def environment(settings: Settings) -> dict[str, str]:
    """The environment, with the sandbox's own secrets where the sandbox is what is configured."""
    return {**os.environ, **(sandbox_secrets() if settings.is_sandbox else {})}


@main.command()
@click.argument("alias", required=False, shell_complete=aliases_known)
@as_json
@with_timetable
def accounts(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    """List accounts, trouble first, or tell one's story.

    \b
    Examples:
      balances accounts
      balances accounts acme-operating
    """
    if alias is None or is_json:
        print_accounts(timetable, alias, is_json)
    else:
        show(tables.account_story(ops.story(timetable, alias), now_of(timetable)))


def print_accounts(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    rows = ops.accounts(timetable, None if alias is None else [alias])
    if is_json:
        print_json([ops.as_dict(row) for row in rows])
    elif not rows:
        click.echo("no accounts yet: beat puts the accounts file into force, or `balances sync`")
    else:
        show(tables.accounts_table(rows, now_of(timetable)))
        show(tables.tally_rows(rows))


def now_of(timetable: Timetable) -> datetime:
    return tables.utc(timetable.now_ms())


@main.command()
@click.argument("alias", required=False, shell_complete=aliases_known)
@as_json
@with_timetable
def latest(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    """Show the newest balance of every account, or of ALIAS.

    \b
    Example:
      balances latest acme-operating --json
    """
    observations = ops.latest(timetable, alias)
    if is_json:
        print_json(observations)
    else:
        show(tables.observed_table(observations, now_of(timetable)))


@main.command()
@click.argument("alias", shell_complete=aliases_known)
@click.option("--count", default=20, show_default=True, type=click.IntRange(1, 1000), help="How many at most.")
@as_json
def history(alias: str, count: int, is_json: bool) -> None:
    """Draw an account's last balances.

    \b
    Example:
      balances history acme-operating --count 50
    """
    settings = load_settings()
    client = connect(settings.store_url())
    timetable = Timetable(client, stream=settings.stream)
    entries = stream.history(client, settings.stream, alias, count)
    if is_json:
        print_json([entry.data for entry in entries])
    elif entries:
        show(draw(entries, tables.utc(timetable.now_ms())))
    else:
        raise Refused(f"{alias}: {ops.lacking(timetable, alias, 'has no balance on the stream')}")


@main.command()
@click.option("--from", "start", default=None, metavar="ID", help="Begin after this entry; 0 is the oldest.")
@click.option("--alias", default=None, help="Only this account.", shell_complete=aliases_known)
@click.option("--follow/--no-follow", default=True, help="Go on for ever, or stop at the end of the stream.")
@as_json
def tail(start: str | None, alias: str | None, follow: bool, is_json: bool) -> None:
    """Follow the stream: balances, and what becomes of accounts.

    \b
    Examples:
      balances tail
      balances tail --from 0 --no-follow --json
    """
    if start is not None and not re.fullmatch(r"\d+(-\d+)?", start):
        raise click.BadParameter("an entry's id is 1795343555436-0, or 0", param_hint="--from")
    settings = load_settings()
    client = connect(settings.store_url())
    with until_interrupted():
        after = start or (last_id(client, settings.stream) if follow else "0")
        if follow:
            entries = ops.follow(client, settings.stream, after=after, is_away=say_away)
        else:
            entries = read(client, settings.stream, after=after)
        for entry in entries:
            if alias not in {None, entry.attributes["subject"]}:
                continue
            if is_json:
                click.echo(json.dumps({**entry.attributes, "data": entry.data, "entry": entry.id}, ensure_ascii=False))
            else:
                console.print(tables.event_line(entry.attributes, entry.data), soft_wrap=True)


def say_away() -> None:
    click.echo("balances: the server is away; trying again", err=True)


# ----------------------------------------------------------------------------------------------------------- ordering


def tell(results: Results, done: str, is_json: bool) -> NoReturn:
    """Prints what became of each, and exits 1 if any was refused."""
    told: list[tuple[str, str | None]] = []
    for name, reason in results:
        told.append((name, reason))
        if not is_json:
            click.echo(f"{name}: {done}" if reason is None else f"{name}: refused: {reason}")
    if is_json:
        print_json([{"name": name, "done": reason is None, "reason": reason} for name, reason in told])
    sys.exit(1 if any(reason for _, reason in told) else 0)


def need_names(aliases: tuple[str, ...], is_all: bool) -> None:
    if is_all == bool(aliases):
        raise click.UsageError("name accounts, or say --all")


@main.command()
@click.argument("alias", shell_complete=aliases_known)
@as_json
@with_timetable
def poll(timetable: Timetable, alias: str, is_json: bool) -> None:
    """Make a scheduled account due now.

    It never shortens a wait, and asks nothing of a paused or blocked account.

    \b
    Example:
      balances poll acme-operating
    """
    tell(ops.each(timetable, ops.poll(timetable), [alias]), "due now", is_json)


@main.command()
@click.argument("aliases", nargs=-1, shell_complete=aliases_known)
@click.option("--all", "is_all", is_flag=True, help="Everything at once, accounts to come included.")
@as_json
@with_timetable
def pause(timetable: Timetable, aliases: tuple[str, ...], is_all: bool, is_json: bool) -> None:
    """Stop polling accounts; a poll under way ends as it would.

    \b
    Example:
      balances pause acme-operating acme-payroll
    """
    need_names(aliases, is_all)
    if is_all:
        ops.pause_all(timetable)
        tell([(ops.EVERY_ACCOUNT, None)], "paused; go on with: balances resume --all", is_json)
    tell(ops.each(timetable, ops.pause(timetable), aliases), "paused", is_json)


@main.command()
@click.argument("aliases", nargs=-1, shell_complete=aliases_known)
@click.option("--all", "is_all", is_flag=True, help="Take `pause --all` off; without one, every paused account.")
@as_json
@with_timetable
def resume(timetable: Timetable, aliases: tuple[str, ...], is_all: bool, is_json: bool) -> None:
    """Poll paused accounts again; a wait is not shortened.

    \b
    Example:
      balances resume acme-operating
    """
    need_names(aliases, is_all)
    results = list(ops.resume_all(timetable)) if is_all else ops.each(timetable, ops.resume(timetable), aliases)
    if not results and not is_json:
        click.echo("nothing was paused")
    tell(results, "resumed", is_json)


@main.command()
@click.argument("aliases", nargs=-1, shell_complete=lettered)
@click.option("--institution", default="", help="Only parked accounts of this institution.")
@click.option("--login", default="", help="Only parked accounts of this login.", shell_complete=logins_known)
@as_json
@with_timetable
def release(timetable: Timetable, aliases: tuple[str, ...], institution: str, login: str, is_json: bool) -> None:
    """Bring parked accounts back, the first at once.

    The others follow one a second. Filters add up; without any, every parked account comes back.

    \b
    Example:
      balances release --institution bancosecurity.cl --login umbrella
    """
    results = ops.release(timetable, aliases, institution=institution, login=login)
    if not results and not is_json:
        click.echo("nothing was parked")
    tell(results, "released", is_json)


@main.command()
@click.argument("login", shell_complete=logins_known)
@as_json
@with_timetable
def unblock(timetable: Timetable, login: str, is_json: bool) -> None:
    """Lift a login's block and forgive the credential that failed; end a login's rest.

    \b
    Example:
      balances unblock hooli
    """
    done = ops.unblock(timetable, login)
    tell([(login, None)], f"{done}; one account goes first", is_json)


@main.command()
@click.option("--force", is_flag=True, help="Even if it removes many accounts.")
@as_json
@with_timetable
def sync(timetable: Timetable, force: bool, is_json: bool) -> None:
    """Put the accounts file into force.

    Even where another one, or `balances sync` elsewhere, has replaced it since.

    \b
    Example:
      balances sync --force
    """
    accounts, changed = ops.sync(load_settings(), timetable, force=force)
    if is_json:
        print_json({"accounts": len(accounts.definitions), "changed": changed})
    else:
        click.echo(f"{len(accounts.definitions)} accounts in force, {changed} changed")


@main.command()
@click.argument("alias", shell_complete=aliases_known)
@as_json
@with_timetable
def purge(timetable: Timetable, alias: str, is_json: bool) -> None:
    """Delete all that is kept of an account that was removed.

    Its entries go from the stream too, whether a consumer has read them or not. The audit trail keeps its name.

    \b
    Example:
      balances purge acme-operating
    """
    tell(ops.each(timetable, ops.purge(timetable), [alias]), "purged", is_json)


@main.command()
@as_json
def migrate(is_json: bool) -> None:
    """Bring an older version's state to this program's.

    Stop every process first, and back the server up.

    \b
    Example:
      balances migrate
    """
    is_changed = unchecked_timetable().migrate()
    if is_json:
        print_json({"version": STATE_VERSION, "changed": is_changed})
    else:
        click.echo(f"version {STATE_VERSION}{'' if is_changed else ' already'}")


@main.command()
@click.option("--alias", default=None, help="Only this account, or login.", shell_complete=aliases_known)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="How many at most.")
@as_json
@with_timetable
def audit(timetable: Timetable, alias: str | None, limit: int, is_json: bool) -> None:
    """Show who ordered what, and what came of it, the newest first.

    \b
    Example:
      balances audit --alias acme-operating
    """
    rows = ops.audit(timetable, alias=alias, limit=limit)
    if is_json:
        print_json([ops.as_dict(row) for row in rows])
    else:
        show(tables.audit_table(rows, now_of(timetable)))


# ------------------------------------------------------------------------------------------------------- dead letters


@main.group()
def dead() -> None:
    """Look at dead letters, redrive or discard them.

    \b
    Example:
      balances dead list
    """


queue_option = click.option(
    "--queue",
    type=click.Choice([queue.removeprefix("balances.dead.") for queue in DeadLetterQueue]),
    default=None,
    help="One of the four queues.",
)


def full_name(queue: str | None) -> str | None:
    return None if queue is None else f"balances.dead.{queue}"


@dead.command("list")
@queue_option
@as_json
@with_timetable
def dead_list(timetable: Timetable, queue: str | None, is_json: bool) -> None:
    """List dead letters, queue by queue, the oldest first.

    \b
    Example:
      balances dead list --queue bad-answer
    """
    rows = ops.dead_letters(timetable, full_name(queue))
    if is_json:
        print_json([ops.as_dict(row) for row in rows])
    else:
        show(tables.letters_table(rows, now_of(timetable)))


@dead.command("show")
@click.argument("name", shell_complete=lettered)
@as_json
@with_timetable
def dead_show(timetable: Timetable, name: str, is_json: bool) -> None:
    """Show the letter of an account, or of a blocked login.

    \b
    Example:
      balances dead show umbrella-savings
    """
    row, message = ops.dead_letter(timetable, name)
    if is_json:
        print_json({**ops.as_dict(row), "message": message})
        return
    for key, value in {**ops.as_dict(row), "accounts": message["headers"]["reason"].get("accounts")}.items():
        if value is not None:
            click.echo(f"{key:<12} {', '.join(value) if isinstance(value, list) else value}")


class Rate(click.ParamType[float]):
    """ "10/m": so many a second, minute or hour, as the pause between two, in seconds."""

    name = "N/UNIT"
    UNITS = {"s": 1, "m": 60, "h": 3600}  # noqa: RUF012 - a table

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"([1-9]\d{0,5})/([smh])", str(value))
        if not match:
            self.fail(f"{value!r} is no rate; write 10/m for ten a minute (or /s, /h)", param, ctx)
        return self.UNITS[match[2]] / int(match[1])


@dead.command("redrive")
@click.argument("aliases", nargs=-1, shell_complete=lettered)
@queue_option
@click.option("--rate", "pause_s", type=Rate(), default=None, help="At most so many: 10/m, 2/s, 100/h.")
@click.option("--dry-run", is_flag=True, help="Only say what would be brought back.")
@as_json
@with_timetable
def dead_redrive(
    timetable: Timetable,
    aliases: tuple[str, ...],
    queue: str | None,
    pause_s: float | None,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Bring suspended accounts back: by name, or all of a queue.

    Ctrl-C stops between two of them; the same command goes on with the rest.

    \b
    Examples:
      balances dead redrive umbrella-savings
      balances dead redrive --queue retries-exhausted --rate 10/m
      balances dead redrive --queue bad-answer --dry-run
    """
    if bool(aliases) == bool(queue):
        raise click.UsageError("name accounts, or a --queue")
    names = list(aliases) if queue is None else ops.redrivable(timetable, f"balances.dead.{queue}")
    results = ops.each(timetable, ops.redrive(timetable, dry_run=dry_run), names)
    if not names and not is_json:
        click.echo("nothing to redrive")
    if dry_run:
        tell_dry_run(list(results), is_json)
    with Between() as between:
        tell_some(between.each(results, len(names), pause_s or 0.0), len(names), is_json)


def tell_dry_run(results: Sequence[tuple[str, str | None]], is_json: bool) -> NoReturn:
    if is_json:
        print_json([{"name": name, "done": False, "would": not reason, "reason": reason} for name, reason in results])
        sys.exit(1 if any(reason for _, reason in results) else 0)
    tell(results, "would be redriven", is_json)


def tell_some(results: Results, count: int, is_json: bool) -> NoReturn:
    """`tell`, for what may be interrupted: says how far it came, and exits 1."""
    told: list[tuple[str, str | None]] = []

    def remembered() -> Iterator[tuple[str, str | None]]:
        for result in results:
            told.append(result)
            yield result

    try:
        # A bar and lines would write over each other: on a terminal the lines come when the bar is gone.
        tell(list(remembered()) if sys.stderr.isatty() else remembered(), "redriven: due now", is_json)
    except SystemExit:
        if len(told) == count:
            raise
        click.echo(f"balances: interrupted: {how_far(told, count)}", err=True)
        sys.exit(1)
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{error}: {how_far(told, count)}") from error.__cause__


def how_far(told: Sequence[tuple[str, str | None]], count: int) -> str:
    done = sum(reason is None for _, reason in told)
    return f"{done} of {count} redriven, the others are as they were"


class Between:
    """Lets Ctrl-C and SIGTERM stop a row of orders between two of them, never within one."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Between:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()

    def each(self, results: Results, count: int, pause_s: float) -> Iterator[tuple[str, str | None]]:
        """The results, `pause_s` apart, with a bar on a terminal; fewer of them after a signal."""
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task("redriving", total=count)
            if self._asked.is_set():
                return
            for number, result in enumerate(results, start=1):
                bar.advance(task)
                yield result
                if number < count and self._asked.wait(pause_s):
                    return


@dead.command("discard")
@click.argument("aliases", nargs=-1, required=True, shell_complete=lettered)
@as_json
@with_timetable
def dead_discard(timetable: Timetable, aliases: tuple[str, ...], is_json: bool) -> None:
    """Throw letters away and pause their accounts.

    \b
    Example:
      balances dead discard umbrella-savings
    """
    tell(ops.each(timetable, ops.discard(timetable), aliases), "discarded and paused", is_json)
