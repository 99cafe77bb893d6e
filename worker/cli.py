"""Parse what an operator types, and print what `worker.ops` answers: tables for people, `--json` for programs.

Exit status: 0 done, 1 found wanting or refused (with the reason), 2 wrong use or configuration.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click
from rich.console import Console

from worker import ops, tables
from worker.accounts import load_accounts
from worker.credentials import CredentialStore
from worker.errors import BalancesError, ConfigurationError
from worker.policy import DeadLetterQueue
from worker.processes import printer
from worker.sandbox import PortUnavailable, serve
from worker.settings import Settings, load_settings
from worker.store import EmbeddedStore
from worker.stream import last_id, read
from worker.timetable import Timetable, connect
from worker.up import Machine, readable

P = ParamSpec("P")
R = TypeVar("R")

console = Console(highlight=False)
as_json = click.option("--json", "is_json", is_flag=True, help="Print JSON.")


def print_json(data: object) -> None:
    click.echo(json.dumps(data, ensure_ascii=False, indent=2))


class Group(click.Group):
    """Turns what this package raises on purpose into one line per problem and the right exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            for problem in error.problems:
                click.echo(f"balances: {problem}", err=True)
            ctx.exit(2)
        except BalancesError as error:
            click.echo(f"balances: {error}", err=True)
            ctx.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Polls bank balances over Khipu, unattended, and tells what it does."""


def with_timetable(command: Callable[..., R]) -> Callable[..., R]:
    """Hands the command the timetable of the configured server."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        settings = load_settings()
        return command(Timetable(connect(settings.store_url()), stream=settings.stream), *args, **kwargs)

    return run


# ----------------------------------------------------------------------------------------------------------- running


@main.command()
@click.option("--for", "for_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop after so many seconds.")
@as_json
def up(for_s: float | None, is_json: bool) -> None:
    """Run everything on this machine until Ctrl-C.

    Without accounts of your own it runs the sandbox's. Example: balances up --for 40
    """
    machine = Machine(load_settings(), os.environ)
    names = ("up", "beat", "worker", "flower", "sandbox")
    show = printer(names, sys.stdout)

    def on_line(name: str, line: str) -> None:
        if is_json:
            click.echo(json.dumps({"process": name, "line": line}, ensure_ascii=False))
        else:
            show(name, readable(line))

    if machine.settings.is_sandbox and not is_json:
        click.echo("This is the sandbox: a bank of our own making. To go live: config/accounts.example.toml")
    sys.exit(machine.run(for_s, on_line, lambda timetable: print_accounts(timetable, None, is_json)))


@main.command()
@as_json
def store(is_json: bool) -> None:
    """Run the embedded server alone, in the foreground. Example: balances store"""
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
    """Run the imitation of Khipu alone, in the foreground. Example: balances sandbox --latency 0.2s-3s"""
    settings = load_settings()
    try:
        serve("127.0.0.1", settings.sandbox_port, latency=latency, quiet=is_json)
    except PortUnavailable as error:
        raise click.ClickException(str(error)) from None


class until_interrupted:
    """Ends the block quietly at Ctrl-C or SIGTERM."""

    def __enter__(self) -> None:
        import signal

        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is KeyboardInterrupt or kind is BrokenPipeError


# ----------------------------------------------------------------------------------------------------------- looking


@main.command()
@as_json
def check(is_json: bool) -> None:
    """Look at configuration, secrets and server; exit 1 if something is wanting. Example: balances check"""
    settings = load_settings()
    accounts = load_accounts(settings.accounts_path, callback_configured=settings.callback_url is not None)
    credentials = CredentialStore(environment(settings), settings.secrets_dir)
    findings = ops.check(settings, accounts, credentials, connect(settings.store_url()))
    if is_json:
        print_json([ops.as_dict(finding) for finding in findings])
    else:
        console.print(tables.findings_table(findings))
    sys.exit(0 if all(finding.is_right for finding in findings) else 1)


def environment(settings: Settings) -> dict[str, str]:
    """The environment, with the sandbox's own secrets where the sandbox is what is configured."""
    from worker.sandbox import sandbox_secrets

    return {**os.environ, **(sandbox_secrets() if settings.is_sandbox else {})}


@main.command()
@click.argument("alias", required=False)
@as_json
@with_timetable
def accounts(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    """List accounts, trouble first. Example: balances accounts acme-operating"""
    print_accounts(timetable, alias, is_json)


def print_accounts(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    rows = ops.accounts(timetable, None if alias is None else [alias])
    if is_json:
        print_json([ops.as_dict(row) for row in rows])
    else:
        console.print(tables.accounts_table(rows, tables.utc(timetable.now_ms())))


@main.command()
@click.argument("alias", required=False)
@as_json
@with_timetable
def latest(timetable: Timetable, alias: str | None, is_json: bool) -> None:
    """Show the newest balance of every account. Example: balances latest acme-operating --json"""
    observations = ops.latest(timetable, alias)
    if is_json:
        print_json(observations)
    else:
        console.print(tables.observed_table(observations, tables.utc(timetable.now_ms())))


@main.command()
@click.option("--from", "start", default=None, metavar="ID", help="Begin after this entry; 0 is the oldest.")
@click.option("--alias", default=None, help="Only this account.")
@click.option("--follow/--no-follow", default=True, help="Go on for ever, or stop at the end of the stream.")
@as_json
def tail(start: str | None, alias: str | None, follow: bool, is_json: bool) -> None:
    """Follow the stream. Example: balances tail --from 0 --no-follow --json"""
    settings = load_settings()
    client = connect(settings.store_url())
    after = start or (last_id(client, settings.stream) if follow else "0")
    with until_interrupted():
        for entry in read(client, settings.stream, after=after, follow=follow):
            if alias not in {None, entry.attributes["subject"]}:
                continue
            if is_json:
                click.echo(json.dumps({**entry.attributes, "data": entry.data, "entry": entry.id}, ensure_ascii=False))
            else:
                click.echo(tables.event_line(entry.attributes, entry.data))


# ----------------------------------------------------------------------------------------------------------- ordering


def tell(results: Iterable[tuple[str, str | None]], done: str, is_json: bool) -> None:
    """Prints what became of each, and exits 1 if any was refused."""
    told = list(results)
    if is_json:
        print_json([{"name": name, "done": reason is None, "reason": reason} for name, reason in told])
    else:
        for name, reason in told:
            click.echo(f"{name}: {done}" if reason is None else f"{name}: refused: {reason}")
    sys.exit(1 if any(reason for _, reason in told) else 0)


def chosen(timetable: Timetable, aliases: tuple[str, ...], is_all: bool) -> list[str]:
    if is_all == bool(aliases):
        raise click.UsageError("name accounts, or say --all")
    return ops.all_aliases(timetable) if is_all else list(aliases)


@main.command()
@click.argument("alias")
@as_json
@with_timetable
def poll(timetable: Timetable, alias: str, is_json: bool) -> None:
    """Make a scheduled account due now. Example: balances poll acme-operating"""
    tell(ops.each([alias], timetable.poll), "due now", is_json)


@main.command()
@click.argument("aliases", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Every account.")
@as_json
@with_timetable
def pause(timetable: Timetable, aliases: tuple[str, ...], is_all: bool, is_json: bool) -> None:
    """Stop polling accounts; a poll under way ends as it would. Example: balances pause acme-operating"""
    tell(ops.each(chosen(timetable, aliases, is_all), timetable.pause), "paused", is_json)


@main.command()
@click.argument("aliases", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Every paused account.")
@as_json
@with_timetable
def resume(timetable: Timetable, aliases: tuple[str, ...], is_all: bool, is_json: bool) -> None:
    """Poll paused accounts again; a wait is not shortened. Example: balances resume acme-operating"""
    names = chosen(timetable, aliases, is_all)
    if is_all:
        names = [row.alias for row in ops.accounts(timetable) if row.state == "paused"]
    tell(ops.each(names, timetable.resume), "resumed", is_json)


@main.command()
@click.argument("aliases", nargs=-1)
@click.option("--institution", default="", help="Only parked accounts of this institution.")
@click.option("--login", default="", help="Only parked accounts of this login.")
@as_json
@with_timetable
def release(timetable: Timetable, aliases: tuple[str, ...], institution: str, login: str, is_json: bool) -> None:
    """Bring parked accounts back, the first at once; filters add up. Example: balances release --login acme"""
    released = timetable.release(aliases, institution=institution, login=login)
    refused = [alias for alias in aliases if alias not in released]
    results = [(alias, None) for alias in released] + [(alias, "it is not parked") for alias in refused]
    if not results and not is_json:
        click.echo("nothing was parked")
    tell(results, "released", is_json)


@main.command()
@click.argument("login")
@as_json
@with_timetable
def unblock(timetable: Timetable, login: str, is_json: bool) -> None:
    """Lift a login's block and forgive the credential that failed. Example: balances unblock acme"""
    ops.unblock(timetable, login)
    tell([(login, None)], "unblocked; one account goes first", is_json)


@main.command()
@click.option("--force", is_flag=True, help="Even if it removes many accounts.")
@as_json
@with_timetable
def sync(timetable: Timetable, force: bool, is_json: bool) -> None:
    """Put the accounts file into force. Example: balances sync"""
    accounts, changed = ops.sync(load_settings(), timetable, force=force)
    if is_json:
        print_json({"accounts": len(accounts.definitions), "changed": changed})
    else:
        click.echo(f"{len(accounts.definitions)} accounts in force, {changed} changed")


# ------------------------------------------------------------------------------------------------------- dead letters


@main.group()
def dead() -> None:
    """Look at dead letters, bring their accounts back, or throw them away."""


queue_option = click.option(
    "--queue", type=click.Choice([queue.removeprefix("balances.dead.") for queue in DeadLetterQueue]), default=None
)


def full_name(queue: str | None) -> str | None:
    return None if queue is None else f"balances.dead.{queue}"


@dead.command("list")
@queue_option
@as_json
@with_timetable
def dead_list(timetable: Timetable, queue: str | None, is_json: bool) -> None:
    """List dead letters. Example: balances dead list --queue bad-answer"""
    rows = ops.dead_letters(timetable, full_name(queue))
    if is_json:
        print_json([ops.as_dict(row) for row in rows])
    else:
        console.print(tables.letters_table(rows, tables.utc(timetable.now_ms())))


@dead.command("show")
@click.argument("name")
@as_json
@with_timetable
def dead_show(timetable: Timetable, name: str, is_json: bool) -> None:
    """Show the letter of an account, or of a blocked login. Example: balances dead show acme-operating"""
    row, message = ops.dead_letter(timetable, name)
    if is_json:
        print_json({**ops.as_dict(row), "message": message})
        return
    for key, value in {**ops.as_dict(row), "accounts": message["headers"]["reason"].get("accounts")}.items():
        if value is not None:
            click.echo(f"{key:<12} {', '.join(value) if isinstance(value, list) else value}")


@dead.command("redrive")
@click.argument("aliases", nargs=-1)
@queue_option
@as_json
@with_timetable
def dead_redrive(timetable: Timetable, aliases: tuple[str, ...], queue: str | None, is_json: bool) -> None:
    """Bring suspended accounts back. Example: balances dead redrive --queue retries-exhausted"""
    if bool(aliases) == bool(queue):
        raise click.UsageError("name accounts, or a --queue")
    names = list(aliases) or [row.alias for row in ops.dead_letters(timetable, full_name(queue)) if row.alias]
    tell(ops.each(names, lambda alias: ops.redrive(timetable, alias)), "redriven: due now", is_json)


@dead.command("discard")
@click.argument("aliases", nargs=-1, required=True)
@as_json
@with_timetable
def dead_discard(timetable: Timetable, aliases: tuple[str, ...], is_json: bool) -> None:
    """Throw letters away and pause their accounts. Example: balances dead discard acme-operating"""
    tell(ops.each(aliases, lambda alias: ops.discard(timetable, alias)), "discarded and paused", is_json)
