"""The accounts file under a running beat: what is applied, what is not, and that nobody else's next step is touched.

Most of it drives beat's `DefinitionsFile` by hand, with a clock of its own, on a real server; the rest are real beats.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from servers import ROOT, ValkeyServer, wait_until
from structlog.testing import capture_logs
from world import STREAM, World, accounts_file

from worker import beat as beat_module
from worker import ops
from worker.accounts import MAX_FILE, load_accounts
from worker.beat import QUIET_S, REMOVAL_QUIET_S, DefinitionsFile
from worker.errors import StoreUnavailable
from worker.store import tethered

TEN = tuple(f"account-{number}" for number in range(10))


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Watched:
    """A beat's view of one accounts file, turn by turn."""

    def __init__(self, world: World, path: Path, clock: Clock) -> None:
        self.world, self.path, self.clock = world, path, clock
        settings = SimpleNamespace(accounts_path=path, callback_url=None)
        self.file = DefinitionsFile(SimpleNamespace(timetable=world.timetable, settings=settings))  # type: ignore[arg-type]

    def turn(self, after_s: float = 0.0) -> list[dict[str, Any]]:
        """What beat logs in the turn that comes after so many seconds."""
        self.clock.now += after_s
        with capture_logs() as logs:
            self.file.apply_when_changed()
        return [dict(entry) for entry in logs]

    def settle(self) -> list[dict[str, Any]]:
        """The turns until every change that is going to be believed was."""
        return [*self.turn(), *self.turn(QUIET_S), *self.turn(REMOVAL_QUIET_S)]

    @property
    def aliases(self) -> list[str]:
        return ops.all_aliases(self.world.timetable)


@pytest.fixture
def world(store: redis.Redis) -> World:
    return World(store)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "accounts.toml"
    path.write_bytes(accounts_file(*TEN))
    return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(beat_module, "time", clock)
    return clock


@pytest.fixture
def watched(world: World, path: Path, clock: Clock) -> Watched:
    """A beat that has just put ten accounts into force."""
    watched = Watched(world, path, clock)
    [applied] = watched.turn()
    assert applied["event"] == "accounts applied"
    assert watched.aliases == sorted(TEN)
    return watched


# ------------------------------------------------------------------------------------------------------ what is applied


def in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def by_rename(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.replace(path)


def through_a_link(path: Path, content: bytes) -> None:
    """As Kubernetes replaces a mounted ConfigMap."""
    target, link = path.with_suffix(".new"), path.with_suffix(".link")
    target.write_bytes(content)
    link.symlink_to(target)
    link.replace(path)


def deleted_and_made_anew(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("write", [in_place, by_rename, through_a_link, deleted_and_made_anew])
def test_a_new_account_is_polled_within_seconds_however_the_file_is_written(
    watched: Watched, write: Callable[[Path, bytes], None]
) -> None:
    write(watched.path, accounts_file(*TEN, "new"))
    assert watched.turn() == []
    [applied] = watched.turn(QUIET_S)
    assert (applied["event"], applied["accounts"], applied["changed"]) == ("accounts applied", 11, 1)
    assert "new" in watched.aliases
    assert watched.settle() == []


def test_one_account_removed_and_one_changed_leave_all_others_as_they_were(watched: Watched) -> None:
    world = watched.world
    world.postpone(world.start("account-0").token)
    world.suspend(world.start("account-1").token)
    world.park(world.start("account-2").token)
    world.timetable.pause("account-3")
    world.start("account-4")
    others = [alias for alias in TEN if alias not in {"account-8", "account-9"}]
    before = [world.account(alias) for alias in others], world.due("account-5"), [*world.timetable.letters()]
    text = accounts_file(*TEN[:9]).decode()
    eighth = text.index('"account-8"')
    watched.path.write_text(text[:eighth] + text[eighth:].replace("15m", "30m"))
    [applied] = watched.settle()
    assert applied["changed"] == 2
    assert watched.aliases == sorted(TEN[:9])
    after = [world.account(alias) for alias in others], world.due("account-5"), [*world.timetable.letters()]
    assert after == before
    assert json.loads(world.account("account-8")["definition"])["every_ms"] == 30 * 60_000
    world.check()


def test_a_blocked_login_stays_blocked(watched: Watched) -> None:
    watched.world.block(watched.world.start("account-0").token)
    before = watched.world.login()
    watched.path.write_bytes(accounts_file(*TEN, "new"))
    watched.settle()
    assert watched.world.login() == before
    assert watched.world.state("new") == "blocked scheduled"


def test_a_rewrite_of_the_same_size_with_its_old_time_is_seen(watched: Watched) -> None:
    status = watched.path.stat()
    watched.path.write_bytes(watched.path.read_bytes().replace(b"15m", b"17m"))
    os.utime(watched.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [entry["event"] for entry in watched.settle()] == ["accounts applied"]


def test_a_change_is_not_lost_while_the_server_is_away(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.path.write_bytes(accounts_file(*TEN, "new"))
    watched.turn()
    with monkeypatch.context() as patch:
        patch.setattr(watched.world.timetable, "revisions", away)
        with pytest.raises(StoreUnavailable):
            watched.turn(QUIET_S)
    assert [entry["event"] for entry in watched.turn()] == ["accounts applied"]


def away() -> None:
    raise StoreUnavailable("Redis: ConnectionError")


# -------------------------------------------------------------------------------------------------- what is not applied


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def conflicting(path: Path) -> None:
    path.write_bytes(accounts_file(*TEN) + accounts_file("twin", number="90000001").partition(b"\n")[2])


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_FILE + 1)


def deleted(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    """For root, too."""
    path.unlink()
    path.mkdir()


def binary(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def halved(path: Path) -> None:
    path.write_bytes(accounts_file(*TEN[:5]))


NOT_APPLIED = [
    (truncated, "is not TOML"),
    (empty, "there are none"),
    (conflicting, "names the same account as account-1"),
    (huge, "is larger than 32 MiB"),
    (deleted, "cannot be read (No such file or directory)"),
    (unreadable, "cannot be read (Is a directory)"),
    (binary, "is not UTF-8"),
    (halved, "this would remove 5 of 10 accounts; if it is meant: balances sync --force"),
]


@pytest.mark.parametrize(("harm", "reason"), NOT_APPLIED, ids=[harm.__name__ for harm, _ in NOT_APPLIED])
def test_a_bad_file_is_told_once_and_the_last_good_one_stays(
    watched: Watched, harm: Callable[[Path], None], reason: str
) -> None:
    good = watched.path.read_bytes()
    harm(watched.path)
    [told] = watched.settle()
    assert (told["event"], told["log_level"]) == ("accounts file not applied", "error")
    assert reason in told["problems"][0]
    assert watched.settle() == []
    assert watched.aliases == sorted(TEN)
    if watched.path.is_dir():
        watched.path.rmdir()
    watched.path.write_bytes(good)
    watched.settle()
    watched.path.write_bytes(good + accounts_file("new", login="other", number="777"))
    assert [entry["event"] for entry in watched.settle()] == ["accounts applied"]
    assert watched.aliases == sorted([*TEN, "new"])


def test_of_many_mistakes_a_line_names_some_and_counts_all(watched: Watched) -> None:
    watched.path.write_bytes(accounts_file(*(f"WRONG-{number}" for number in range(100))))
    [told] = watched.settle()
    assert len(told["problems"]) < told["count"] == 100


def test_a_refused_mass_removal_can_be_forced(watched: Watched) -> None:
    watched.path.write_bytes(accounts_file(*TEN[:5]))
    watched.settle()
    accounts = load_accounts(watched.path, callback_configured=False)
    assert watched.world.timetable.apply(accounts, force=True) == 5
    assert watched.settle() == []
    assert watched.aliases == sorted(TEN[:5])


def test_a_file_that_is_touched_while_it_waits_to_be_believed_is_applied_all_the_same(watched: Watched) -> None:
    watched.path.write_bytes(accounts_file(*TEN[:9]))
    assert watched.turn() + watched.turn(QUIET_S) == []
    watched.path.touch()
    [applied] = watched.settle()
    assert applied["accounts"] == 9


def test_a_file_that_was_broken_while_it_waited_to_be_believed_is_applied_when_it_is_whole(watched: Watched) -> None:
    watched.path.write_bytes(accounts_file(*TEN[:9]))
    assert watched.turn() + watched.turn(QUIET_S) == []
    watched.path.write_bytes(b"[[accounts")
    assert [told["event"] for told in watched.settle()] == ["accounts file not applied"]
    watched.path.write_bytes(accounts_file(*TEN[:9]))
    [applied] = watched.settle()
    assert applied["accounts"] == 9


# ---------------------------------------------------------------------------------------------- a file known already


def test_a_beat_that_starts_with_the_file_in_force_does_not_read_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read 100,000 accounts takes longer than to be ready may."""
    monkeypatch.setattr(beat_module, "parse_accounts", pytest.fail)
    again = Watched(watched.world, watched.path, watched.clock)
    assert again.settle() == []
    again.path.touch()
    assert again.settle() == []


def test_a_beat_that_did_not_read_its_file_applies_the_next_one(watched: Watched) -> None:
    again = Watched(watched.world, watched.path, watched.clock)
    again.path.write_bytes(accounts_file(*TEN, "new"))
    [applied] = again.settle()
    assert applied["changed"] == 1


def test_a_beat_that_did_not_read_its_file_applies_a_rollback(watched: Watched) -> None:
    """Somebody puts the old file back while it runs: no deploy is reverted by accident."""
    old = watched.path.read_bytes()
    watched.path.write_bytes(accounts_file(*TEN, "new"))
    watched.settle()
    again = Watched(watched.world, watched.path, watched.clock)
    again.path.write_bytes(old)
    [applied] = again.settle()
    assert (applied["event"], again.aliases) == ("accounts applied", sorted(TEN))


def test_the_same_file_is_read_where_it_means_something_else(watched: Watched) -> None:
    """With a webhook every account without a mode of its own is polled by callback."""
    settings = SimpleNamespace(accounts_path=watched.path, callback_url="https://balances.example")
    watched.file = DefinitionsFile(SimpleNamespace(timetable=watched.world.timetable, settings=settings))  # type: ignore[arg-type]
    [applied] = watched.settle()
    assert applied["changed"] == len(TEN)


def test_the_file_that_was_in_force_before_is_read_and_told_of(watched: Watched) -> None:
    old = watched.path.read_bytes()
    watched.path.write_bytes(accounts_file(*TEN, "new"))
    watched.settle()
    watched.path.write_bytes(old)
    [told] = Watched(watched.world, watched.path, watched.clock).settle()
    assert "in force before" in told["event"]


# ------------------------------------------------------------------------------------------------------- half a file


def test_a_file_that_somebody_has_open_for_writing_is_not_read(watched: Watched) -> None:
    """The first half is a file that reads well and lacks only two accounts: no mass removal."""
    whole = accounts_file(*TEN, "new")
    half = whole.index(b'"account-8"') - len('[[accounts]]\nalias = ""')
    with watched.path.open("wb") as file:
        file.write(whole[:half])
        file.flush()
        load_accounts(watched.path, callback_configured=False)
        assert watched.settle() == []
        [told] = watched.turn(3600)
        assert told["event"] == "accounts file not applied yet: another process has it open for writing"
        assert watched.turn(3600) == []
        file.write(whole[half:])
    [applied] = watched.settle()
    assert applied["accounts"] == 11
    assert watched.aliases == sorted([*TEN, "new"])


def test_a_half_that_was_closed_removes_nothing_if_the_rest_comes_within_seconds(watched: Watched) -> None:
    whole = accounts_file(*TEN)
    half = whole.index(b'"account-8"') - len('[[accounts]]\nalias = ""')
    watched.path.write_bytes(whole[:half])
    assert watched.turn() + watched.turn(QUIET_S) + watched.turn(REMOVAL_QUIET_S - QUIET_S - 0.1) == []
    with watched.path.open("ab") as file:
        file.write(whole[half:])
    assert watched.settle() == []
    assert watched.aliases == sorted(TEN)


def test_a_beat_that_starts_on_half_a_file_does_not_remove_either(watched: Watched) -> None:
    watched.path.write_bytes(accounts_file(*TEN[:8]))
    restarted = Watched(watched.world, watched.path, watched.clock)
    assert restarted.turn() + restarted.turn(REMOVAL_QUIET_S - 0.1) == []
    assert restarted.aliases == sorted(TEN)
    assert [entry["event"] for entry in restarted.turn(0.2)] == ["accounts applied"]
    assert restarted.aliases == sorted(TEN[:8])


# ----------------------------------------------------------------------------------------------- beats with other files


@pytest.fixture
def deployed(watched: Watched, tmp_path: Path) -> Watched:
    """Another beat, which came later with a newer file."""
    path = tmp_path / "newer.toml"
    path.write_bytes(accounts_file(*TEN, "new"))
    newer = Watched(watched.world, path, watched.clock)
    assert [entry["event"] for entry in newer.turn()] == ["accounts applied"]
    return newer


def touched(path: Path) -> None:
    path.touch()


def changed_in_a_comment(path: Path) -> None:
    path.write_bytes(b"# nothing new\n" + path.read_bytes())


def copied_over_itself(path: Path) -> None:
    by_rename(path, path.read_bytes())


@pytest.mark.parametrize("touch", [touched, changed_in_a_comment, copied_over_itself])
def test_an_old_file_whose_content_is_no_other_does_not_revert_a_deploy(
    watched: Watched, deployed: Watched, touch: Callable[[Path], None]
) -> None:
    touch(watched.path)
    assert watched.settle() == []
    assert deployed.aliases == sorted([*TEN, "new"])


def test_a_restarted_old_beat_warns_and_names_the_way_back(watched: Watched, deployed: Watched) -> None:
    restarted = Watched(watched.world, watched.path, watched.clock)
    [told] = restarted.settle()
    assert told["log_level"] == "warning"
    assert told["event"].endswith("to go back to it: balances sync")
    assert deployed.aliases == sorted([*TEN, "new"])
    watched.path.write_bytes(accounts_file(*TEN, "newest"))
    assert [entry["event"] for entry in restarted.settle()] == ["accounts applied"]
    assert restarted.aliases == sorted([*TEN, "newest"])


def test_a_file_that_is_changed_and_changed_back_is_in_force_again(watched: Watched) -> None:
    before = watched.path.read_bytes()
    watched.path.write_bytes(accounts_file(*TEN, "new"))
    watched.settle()
    watched.path.write_bytes(before)
    assert [entry["event"] for entry in watched.settle()] == ["accounts applied"]
    assert watched.aliases == sorted(TEN)


# ---------------------------------------------------------------------------------------------------------- real beats


class Beat:
    """`celery -A worker beat` with an accounts file of its own."""

    def __init__(self, directory: Path, name: str, url: str) -> None:
        self.directory, self.name, self.url = directory, name, url
        self.path = directory / f"{name}.toml"
        self.log = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Beat:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
        more = {"BALANCES_REDIS_URL": self.url, "BALANCES_ACCOUNTS": str(self.path), "BALANCES_STREAM": STREAM}
        schedule = str(self.directory / f"{self.name}.schedule")
        command = [sys.executable, "-m", "celery", "-A", "worker", "-q", "beat", "-l", "INFO", "--schedule", schedule]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                tethered(command), cwd=ROOT, env={**inherited, **more}, stdout=out, stderr=subprocess.STDOUT
            )
        return self

    def until(self, words: str, count: int = 1) -> None:
        wait_until(lambda: self.log.read_text().count(words) >= count, 20, f"{words!r} in\n{self.log.read_text()}")

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(10) == 0


@pytest.fixture
def beats(valkey_server: ValkeyServer, world: World, tmp_path: Path) -> Iterator[Callable[..., Beat]]:
    world.workers(0)
    started: list[Beat] = []

    def start(name: str, *aliases: str) -> Beat:
        beat = Beat(tmp_path, name, valkey_server.url)
        beat.path.write_bytes(accounts_file(*aliases))
        started.append(beat)
        return beat.start()

    yield start
    for beat in started:
        assert beat.process is not None
        beat.process.kill()
        beat.process.wait()


def test_real_beats_apply_their_files_and_an_old_one_does_not_revert_a_deploy(
    beats: Callable[..., Beat], world: World
) -> None:
    old = beats("old", *TEN)
    old.until("accounts applied")
    old.path.write_bytes(accounts_file(*TEN, "added"))
    old.until("accounts applied", 2)
    assert "added" in ops.all_aliases(world.timetable)
    newer = beats("newer", *TEN, "added", "deployed")
    newer.until("accounts applied")
    old.stop()
    old.start().until("balances sync")
    assert "deployed" in ops.all_aliases(world.timetable)
    old.path.write_bytes(b"[[accounts]\n")
    old.until("accounts file not applied")
    assert old.process is not None
    assert old.process.poll() is None
    assert "deployed" in ops.all_aliases(world.timetable)


def test_a_beat_does_not_start_on_a_wrong_file(beats: Callable[..., Beat], world: World) -> None:
    beat = beats("wrong", "UPPER")
    assert beat.process is not None
    assert beat.process.wait(20) == 2
    assert "write 1 to 63 lower-case letters" in beat.log.read_text()
    assert ops.all_aliases(world.timetable) == []
