"""Fixtures of the tests that talk to the sandbox: one process for each file of tests, as at its start for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sandbox_client import SandboxClient, running_sandbox


@pytest.fixture(scope="module")
def shared() -> Iterator[SandboxClient]:
    with running_sandbox() as client:
        yield client


@pytest.fixture
def sandbox(shared: SandboxClient) -> SandboxClient:
    shared.reset()
    return shared
