"""Headless Chromium through chromedriver's own HTTP interface, as much of it as the page's tests need."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip
HAS_CHROMIUM = bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One page."""

    def __init__(self, port: int, session: str):
        self._url = f"http://127.0.0.1:{port}/session/{session}"

    def _call(self, path: str, body: dict | None = None):
        return call(self._url + path, body)

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *args):
        """What a script returns."""
        return self._call("/execute/sync", {"script": script, "args": list(args)})

    def wait(self, script: str, *, timeout: float = 120.0):
        """The script's value once it is true."""
        deadline = time.monotonic() + timeout
        while True:
            value = self.run(script)
            if value:
                return value
            assert time.monotonic() < deadline, (script, self.errors(), self.run("return document.body.innerText"))
            time.sleep(0.05)

    def type(self, selector: str, text: str) -> None:
        element = self._call("/element", {"using": "css selector", "value": selector})
        self._call(f"/element/{next(iter(element.values()))}/value", {"text": text})

    def size(self, width: int, height: int) -> None:
        """The page's own size, whatever the window's least is."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def dark(self, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def errors(self) -> list[str]:
        """What the console complained about since the last look."""
        return [
            one["message"]
            for one in self._call("/se/log", {"type": "browser"})
            if one["level"] in ("SEVERE", "WARNING")
        ]

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("/screenshot")))


def call(url: str, body: dict | None = None, method: str | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["value"]


@contextmanager
def open_browser(folder: Path):
    """A browser with an empty profile in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(folder)}
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        for _ in range(200):
            try:
                call(f"http://127.0.0.1:{port}/status")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        options = {"args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = call(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(port, session)
        finally:
            call(f"http://127.0.0.1:{port}/session/{session}", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(10)
