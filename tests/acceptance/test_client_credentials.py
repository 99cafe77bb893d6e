"""Client credentials with real processes: one token for many polls, and a secret replaced under a running worker."""

from __future__ import annotations

from pathlib import Path

from machine import PATIENCE_S, Account, Machine, canaries_in
from servers import wait_until

RIGHT, WRONG = "password-canary-right", "password-canary-wrong"


def write(path: Path, secret: str) -> None:
    """Replace the file in one step."""
    draft = path.with_suffix(".draft")
    draft.touch(0o600)
    draft.write_text(secret)
    draft.replace(path)


def test_a_wrong_client_secret_costs_no_request_and_the_right_one_is_found_without_a_restart(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    write(secrets / "acme.client_secret", WRONG)
    accounts = [Account("a", login="acme"), Account("b", login="acme")]
    env = {"BALANCES_SECRETS_DIR": str(secrets)}
    with Machine(tmp_path, accounts, clients=["acme"], env=env) as machine:
        machine.sandbox.set_tokens(clients={"user-canary-acme": RIGHT})
        machine.beat()
        worker = machine.worker()
        machine.kick("a")
        wait_until(lambda: worker.said("failed"), PATIENCE_S, "a block, and the line that tells of it")
        [failed] = worker.said("failed")
        assert (failed["code"], failed["credential"]) == ("TOKEN_HTTP_401", "key")

        write(secrets / "acme.client_secret", RIGHT)
        wait_until(lambda: worker.said("unblocked with a new credential", login="acme"), PATIENCE_S, "an unblocking")
        machine.until_entries("a", 1)
        machine.kick("b")
        machine.until_entries("b", 1)
        machine.sandbox.revoke_tokens()
        machine.kick("a")
        machine.until_entries("a", 2)
        statuses = [request["status"] for request in machine.sandbox.requests()]
        assert statuses == [200, 200, 401, 200]
        assert machine.sandbox.stats()["tokens"] == {"given": 2, "refused": 1}
        assert worker.said("access token refused: asked again with another one", account="a")
        assert canaries_in(worker.text()) == []
        assert "access-" not in worker.text()
