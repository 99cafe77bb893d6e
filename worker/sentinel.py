"""Read the address of a server that Sentinels know, once for all who connect: redis-py and kombu take its parts apart.

    sentinel://[user:password@]host:port[,host:port…]/master[/database]

User and password are the server's, percent-encoded as in any URL; the Sentinels themselves are asked without.
A Sentinel that is away is not asked again and again, as redis-py would, for four seconds: the next one knows as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from redis.backoff import NoBackoff
from redis.retry import Retry

SCHEME = "sentinel://"
PORT = 26379
#: How a Sentinel is asked, by redis-py's own client.
ASKED: dict[str, Any] = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": Retry(NoBackoff(), 0)}

_ADDRESS = re.compile(
    r"sentinel://(?:(?P<credentials>[^@/\s]*)@)?(?P<hosts>[^@/\s]+)/(?P<master>[\w.-]+)(?:/(?P<database>\d{0,4}))?"
)
_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """`hosts`: the Sentinels, each a name or an address and a port; `credentials` as written, "" for none."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    database: int
    credentials: str = field(repr=False)

    @property
    def user(self) -> str | None:
        return unquote(self.credentials.partition(":")[0]) or None

    @property
    def password(self) -> str | None:
        return unquote(self.credentials.partition(":")[2]) or None

    def for_kombu(self) -> str:
        """One URL for each Sentinel, as kombu writes them; the master's name is an option of its transport."""
        at = f"{self.credentials}@" if self.credentials else ""
        hosts = ((f"[{name}]" if ":" in name else name, port) for name, port in self.hosts)
        return ";".join(f"{SCHEME}{at}{name}:{port}/{self.database}" for name, port in hosts)


def read_sentinel_address(url: str) -> SentinelAddress:
    """Raises ValueError, without quoting the address."""
    found = _ADDRESS.fullmatch(url)
    if found is None:
        raise ValueError("is no address of a server that Sentinels know")
    hosts = tuple(map(_read_host, found["hosts"].split(",")))
    return SentinelAddress(hosts, found["master"], int(found["database"] or 0), found["credentials"] or "")


def _read_host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found["port"] or PORT) if found else 0
    if found is None or not 0 < port < 65536:
        raise ValueError("names a Sentinel that is no host:port")
    return found["name"].strip("[]"), port
