"""State has a version: a program goes on with its own, migrates an older one when told to, and leaves a newer alone."""

from __future__ import annotations

from contextlib import suppress

import pytest
import redis
from click.testing import CliRunner
from servers import ValkeyServer
from world import World, read

from worker.celery import wiring
from worker.cli import main
from worker.errors import ConfigurationError, Refused
from worker.timetable import STATE_VERSION


@pytest.fixture
def world(store: redis.Redis) -> World:
    return begun(World(store))


def begun(world: World) -> World:
    world.apply(read("a"))
    return world


def plant(world: World, version: str | None) -> None:
    """State as another program would have left it."""
    if version is None:
        world.client.hdel("config", "version")
    else:
        world.client.hset("config", "version", version)


def test_the_first_accounts_file_stamps_the_version(store: redis.Redis) -> None:
    world = World(store)
    world.claim()  # a beat without accounts writes `config`, too
    world.timetable.check_version()
    assert store.hget("config", "version") is None
    world.apply(read("a"))
    assert store.hget("config", "version") == str(STATE_VERSION)
    world.timetable.check_version()


def test_an_accounts_file_does_not_stamp_state_that_is_older(world: World) -> None:
    plant(world, None)
    world.apply(read("a", "b"))
    assert world.client.hget("config", "version") is None


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (None, "version 0 (before there were versions), this program's is 1; stop every process and run: balances mig"),
        ("2", "holds state of version 2, this program's is 1; run the program that wrote it"),
    ],
)
def test_another_version_is_refused_with_what_to_do(world: World, version: str | None, told: str) -> None:
    plant(world, version)
    with pytest.raises(ConfigurationError, match="Redis: holds state of version") as caught:
        world.timetable.check_version()
    assert told in str(caught.value)


@pytest.mark.parametrize("version", [None, "2"])
def test_no_process_and_no_command_starts_on_another_version(
    world: World, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setenv("BALANCES_REDIS_URL", valkey_server.url)
    plant(world, version)
    before = world.snapshot()
    wiring.cache_clear()
    with pytest.raises(ConfigurationError):
        wiring()
    for command in (["accounts"], ["pause", "a"], ["sync"], ["audit"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert "holds state of version" in result.output
    assert world.snapshot() == before
    wiring.cache_clear()


def test_migrating_stamps_what_is_older_and_leaves_everything_else(
    world: World, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALANCES_REDIS_URL", valkey_server.url)
    before = world.snapshot()
    plant(world, None)
    assert CliRunner().invoke(main, ["migrate"]).output == "version 1\n"
    assert world.snapshot() == before
    world.timetable.check_version()
    assert CliRunner().invoke(main, ["migrate"]).output == "version 1 already\n"


def test_a_newer_programs_state_is_not_migrated(world: World) -> None:
    plant(world, "2")
    before = world.snapshot()
    with suppress(Refused):
        world.timetable.migrate()
    assert world.snapshot() == before
    with pytest.raises(Refused, match="version 2, newer than this program's 1"):
        world.timetable.migrate()
