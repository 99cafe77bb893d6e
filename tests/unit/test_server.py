"""What the server's INFO tells of it, without a server: versions that cannot be installed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from worker.server import REFUSED, problems_of, read_info


def told(**other: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sections of a server that is as it should be, but for some."""
    right = {"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "9.1.2"}
    return {"server": right, "memory": {"maxmemory_policy": "noeviction"}, "persistence": {"aof_enabled": 1}, **other}


def wrong(**other: Mapping[str, Any]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in read_info(told(**other)) if not finding.is_right}


@pytest.mark.parametrize(
    ("name", "version", "is_right"),
    [
        ("redis", "7.2.4", True),
        ("redis", "7.0.15", False),
        ("redis", "6.2.0", False),
        ("redis", "10.0.0", True),
        ("valkey", "8.0.0", True),
        ("valkey", "7.2.5", False),
        ("keydb", "6.3.4", False),
    ],
)
def test_too_old_a_server_is_found(name: str, version: str, is_right: bool) -> None:
    server = {"server_name": name, "redis_version": "7.2.4" if name == "valkey" else version}
    found = wrong(server={**server, "valkey_version": version} if name == "valkey" else server)
    assert ("server" not in found) == is_right
    assert is_right or version in found["server"]


def test_redis_before_it_had_a_name_is_found_by_its_version() -> None:
    assert wrong(server={"redis_version": "6.2.0"}) == {"server": "redis 6.2.0; at least 7.2"}


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_every_policy_that_evicts_is_found(policy: str) -> None:
    """Also one that takes keys with a time to live only: a dedupe key has one."""
    assert wrong(memory={"maxmemory_policy": policy}) == {
        "eviction": f"maxmemory-policy is {policy}; it must be noeviction"
    }


def test_what_is_refused_names_the_setting_and_what_would_be_right() -> None:
    found = read_info(told(memory={"maxmemory_policy": "allkeys-lru"}, persistence={"aof_enabled": 0}))
    problems = problems_of(finding for finding in found if finding.name in REFUSED)
    assert list(map(str, problems)) == [
        "BALANCES_REDIS_URL: eviction: maxmemory-policy is allkeys-lru; it must be noeviction; see: balances check"
    ]
