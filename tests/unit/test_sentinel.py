"""One address of Sentinels, as redis-py and as kombu want it."""

from __future__ import annotations

from kombu.utils.url import parse_url

from worker.sentinel import read_sentinel_address

URL = "sentinel://user:p%40%3B@a:26380,b.test,[::1]:26379/my-master.1/2"


def test_the_parts_of_an_address() -> None:
    address = read_sentinel_address(URL)
    assert address.hosts == (("a", 26380), ("b.test", 26379), ("::1", 26379))
    assert (address.master, address.database) == ("my-master.1", 2)
    assert (address.user, address.password) == ("user", "p@;")
    assert "p%40" not in repr(address)


def test_without_user_password_and_database() -> None:
    address = read_sentinel_address("sentinel://a/m")
    assert (address.user, address.password, address.database) == (None, None, 0)
    assert read_sentinel_address("sentinel://:p@a/m").password == "p"


def test_kombu_reads_the_same_out_of_it() -> None:
    urls = [parse_url(url) for url in read_sentinel_address(URL).for_kombu().split(";")]
    assert [(url["hostname"], url["port"]) for url in urls] == [("a", 26380), ("b.test", 26379), ("::1", 26379)]
    assert {(url["userid"], url["password"], url["virtual_host"]) for url in urls} == {("user", "p@;", "2")}
