"""Take the README's pictures of a sandbox run: `.venv/bin/python docs/screenshots.py` (needs Chromium)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Error, Page, ViewportSize, sync_playwright

from worker.store import free_port

DOCS = Path(__file__).parent
WIDTH = 1360
PATIENCE_S = 60.0
#: The rows that a picture shows, and the states that should be among them; a number: of that many retries.
ROWS = 14
STATES = {"FAILURE 0", "RETRY 0", "SUCCESS 0", "SUCCESS 2"}
#: Headings on the status page, and the phone that shows it.
TROUBLES = 3
PHONE: ViewportSize = {"width": 390, "height": 844}
COLUMNS = "all => all.map(tr => [...tr.cells].map(td => td.innerText.trim()))"


def main() -> None:
    ports = {f"BALANCES_{name}_PORT": free_port() for name in ("FLOWER", "EXPORTER", "SANDBOX", "WEBHOOK")}
    with tempfile.TemporaryDirectory() as directory:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCES_")}
        environ = {name: str(port) for name, port in ports.items()}
        command = [sys.executable, "-c", "from worker.cli import main; main()", "up", "--for", str(int(PATIENCE_S))]
        up = subprocess.Popen(command, cwd=directory, env={**inherited, **environ}, stdout=subprocess.DEVNULL)  # noqa: S603
        try:
            take(*(f"http://127.0.0.1:{ports[f'BALANCES_{name}_PORT']}" for name in ("FLOWER", "EXPORTER")))
        finally:
            up.terminate()
            up.wait()


def take(url: str, status_url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 700})
        until_it_is_interesting(page, url)
        picture(page, f"#tasks-table tbody tr:nth-child({ROWS})", "flower-tasks.png")
        page.goto(f"{url}/broker")
        picture(page, ".broker-table-card", "flower-broker.png", margin=20)
        page.set_viewport_size({"width": 1180, "height": 1080})
        until_something_is_wrong(page, status_url)
        page.screenshot(path=DOCS / "status-page.png")
        phone = browser.new_page(viewport=PHONE, device_scale_factor=2, color_scheme="dark")
        phone.goto(status_url)
        phone.screenshot(path=DOCS / "status-phone.png")
        browser.close()


def until_it_is_interesting(page: Page, url: str) -> None:
    """Leaves the page of tasks open, as soon as it has all that an operator should know by sight."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(Error):  # Flower is not there yet
            page.goto(f"{url}/tasks", wait_until="networkidle")
            rows = page.eval_on_selector_all("#tasks-table tbody tr[id]", COLUMNS)[:ROWS]
            if {f"{state} {retries}" for _, state, retries, *_ in rows} >= STATES:
                return
        time.sleep(0.2)
    sys.exit("the rows did not come together this time: run it again")


def until_something_is_wrong(page: Page, url: str) -> None:
    """Leaves the status page open, as soon as a login is blocked and letters lie in two queues."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        page.goto(url)
        if page.locator("#troubles h2").count() >= TROUBLES:
            return
        time.sleep(0.5)
    sys.exit("too little went wrong this time: run it again")


def picture(page: Page, last: str, name: str, margin: int = 0) -> None:
    """The page from its top to the end of an element, and so many pixels."""
    box = page.locator(last).bounding_box()
    assert box is not None, last  # noqa: S101
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + margin}
    page.screenshot(path=DOCS / name, clip=clip, full_page=True)  # type: ignore[arg-type]
    print(DOCS / name, (DOCS / name).stat().st_size)


if __name__ == "__main__":
    main()
