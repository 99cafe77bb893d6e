"""Alert rules, dashboard and runbook hold together: every expression runs, every metric exists, every alert is told."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from tools import tool

from worker.cli import main

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
DASHBOARD = ROOT / "deploy/grafana/balances.json"
RUNBOOK = (ROOT / "deploy/runbook.md").read_text()

#: What Grafana fills in before it asks.
VARIABLES = {"$__rate_interval": "5m", "$institution": ".*"}


@pytest.fixture(scope="module")
def promtool() -> str:
    """The distribution's promtool."""
    return tool("promtool", package="Debian: apt-get install prometheus")


def alerts() -> list[dict[str, object]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    for name, value in VARIABLES.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    return expressions


def commands(group: click.Group, path: str = "balances") -> Iterator[str]:
    """Every command a person can type, as `balances dead list`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


def headings() -> dict[str, str]:
    """Heading → its text, of the runbook."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_rules_fire_and_keep_quiet(promtool: str) -> None:
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run([promtool, *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_every_expression_of_the_dashboard_is_valid(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": expression} for n, expression in enumerate(dashboard_expressions())]
    assert len(rules) > 20
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_metric_asked_for_exists() -> None:
    documented = set(re.findall(r"^\| `(balances_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    documented |= {f"{name}_bucket" for name in documented if name.endswith("_seconds")}
    expressions = [str(rule["expr"]) for rule in alerts()] + dashboard_expressions()
    asked = {name for text in expressions for name in re.findall(r"\bbalances_\w+", text)}
    assert asked - documented == set()


def test_every_alert_has_its_heading_and_every_heading_its_alert() -> None:
    named = {str(rule["alert"]) for rule in alerts()}
    assert named == {heading for heading in headings() if heading.startswith("Balances")}
    for rule in alerts():
        assert rule["annotations"]["runbook_url"] == f"deploy/runbook.md#{str(rule['alert']).lower()}"  # type: ignore[index]


@pytest.mark.parametrize("alert", [str(rule["alert"]) for rule in alerts()])
def test_every_heading_says_what_it_means_what_to_look_at_and_what_to_type(alert: str) -> None:
    text = headings()[alert]
    for part in ("**Means.**", "**Look.**", "**Do.**", "**Over when.**"):
        assert part in text, part


def test_every_command_appears_in_the_runbook() -> None:
    assert [command for command in commands(main) if command not in RUNBOOK] == []


def test_the_runbook_names_no_command_that_does_not_exist() -> None:
    known = set(commands(main))
    line = r"^    (?:\$ )?(balances [a-z]+(?: (?:list|show|redrive|discard)\b)?)"
    typed = set(re.findall(line, RUNBOOK, re.MULTILINE))
    assert typed
    assert typed - known == set()
