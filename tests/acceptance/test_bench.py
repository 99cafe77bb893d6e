"""The benchmark runs, every section of it, with a handful of accounts. It says nothing about speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from servers import ROOT

PAGE = ROOT / "docs" / "performance.md"
BENCH = ROOT / "tests" / "bench" / "bench.py"


def run(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env})


def test_every_section_runs_and_finds_its_place_on_the_page(tmp_path: Path) -> None:
    """Without what we are compared with, which `make test` does not install."""
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    done = run("--tiny", "--page", str(page), BENCH_ENVIRONMENTS=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    titles = [line for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert [line for line in page.read_text().splitlines() if line.startswith("## ")] == titles


def test_a_section_that_does_not_exist_is_named() -> None:
    done = run("--only", "speed")
    assert done.returncode == 2
    assert "speed" in done.stderr
