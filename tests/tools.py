"""Programs that only some machines have: without one, a test is skipped on a laptop and fails in CI."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(*names: str, package: str) -> str:
    """The path of the first of these programs that is here, in the tests' own environment or elsewhere."""
    own = Path(sys.executable).parent
    for name in names:
        if path := shutil.which(name, path=own) or shutil.which(name):
            return path
    missing = f"no {names[0]} on this machine ({package})"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}: .ci/run should have installed it")
    pytest.skip(missing)
