"""A headless Chromium, driven through chromedriver's HTTP protocol (W3C WebDriver) with the standard library alone."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
# A busy machine takes long to start it.
PATIENCE = 120


def missing() -> str | None:
    """Why no browser can be driven here; None where one can."""
    if browser() is None:
        return f"no browser on this machine: none of {', '.join(NAMES)}"
    return None if shutil.which("chromedriver") else "chromedriver is not installed beside the browser"


def browser() -> str | None:
    """The browser's program."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if Path(MAC).exists() else None)


class Page:
    """One window."""

    def __init__(self, base: str) -> None:
        self._base = base

    def open(self, path: Path) -> None:
        """Show a local file."""
        _call("POST", f"{self._base}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a function body returns in the page."""
        return _call("POST", f"{self._base}/execute/sync", {"script": script, "args": []})

    def prefer(self, scheme: str) -> None:
        """Emulate ``prefers-color-scheme``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        parameters = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        _call("POST", f"{self._base}/goog/cdp/execute", parameters)

    def resize(self, width: int, height: int = 900) -> None:
        """Lay the page out for a screen of this size, a phone's too."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        _call("POST", f"{self._base}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})


@contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A window with a new profile; both programs end with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [str(shutil.which("chromedriver")), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(f"http://127.0.0.1:{port}/status")
        options = {"binary": browser(), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = _call("POST", f"http://127.0.0.1:{port}/session", asked)["sessionId"]
        base = f"http://127.0.0.1:{port}/session/{session}"
        try:
            yield Page(base)
        finally:
            _call("DELETE", base)
    finally:
        driver.terminate()
        driver.wait()


def _wait(address: str) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if _call("GET", address)["ready"]:
                return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _call(method: str, address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    # The driver is on this machine: no proxy stands between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=PATIENCE) as answer:
        return json.load(answer)["value"]
