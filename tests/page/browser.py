"""A headless Chromium, driven through the DevTools protocol over a pipe: no package is needed for it. One tab at a time."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESK = (390, 844), (1440, 900)
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Escape": 27, "Tab": 9}


def find_browser() -> str | None:
    """The command of a Chromium; None where there is none. MINIPAGED_CHROMIUM names another."""
    chosen = os.environ.get("MINIPAGED_CHROMIUM")
    return chosen or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser process and its tab."""

    def __init__(self, command: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minipaged-browser-", ignore_cleanup_errors=True)
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-extensions"
        flags += " --disable-background-networking --disable-component-update --remote-debugging-pipe"
        line = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, command, self._folder.name],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._rest = b""
        self._number = 0
        self._session = ""
        self._frames: list[str] = []  # sessions of frames that have a process of their own
        self.requests: list[str] = []  # addresses that the page asked for
        self.complaints: list[str] = []  # errors of scripts, and what the policy refused
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """One command, and its answer. What happens meanwhile is noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session or self._session:
            message["sessionId"] = session or self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                result: dict[str, Any] = found["result"]
                return result
            self._note(found)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError("the browser does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser has ended with code {self._process.wait()}")
            self._rest += part
        one, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif message["method"] == "Target.attachedToTarget":
            self._frames.append(params["sessionId"])
        elif message["method"] == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])

    def open(self, url: str, size: tuple[int, int] = DESK, *, dark: bool = False, ready: str = "") -> None:
        """Go to a page, and wait until `ready` (an expression) is true of it."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)
        self.until(ready or "document.readyState === 'complete'")

    def in_frame(self, expression: str) -> Any:
        """The value of an expression in the page's only frame."""
        frames = self.call("Page.getFrameTree")["frameTree"].get("childFrames", [])
        if not frames:
            return self.run(expression, session=self._frames[-1])
        world = self.call("Page.createIsolatedWorld", frameId=frames[0]["frame"]["id"])
        return self.run(expression, contextId=world["executionContextId"])

    def run(self, expression: str, *, session: str = "", **where: Any) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", session, expression=expression, returnByValue=True, awaitPromise=True, **where
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:800])
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{expression} is not true after {seconds} s; {self.complaints}")
            time.sleep(0.01)

    def press(self, *keys: str) -> None:
        """Keys of the keyboard, one after another; then the page has painted."""
        for key in keys:
            common: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def accessible(self, role: str) -> list[str]:
        """The names that a screen reader is given of the nodes with that role."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == role and n.get("name")]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """What is seen, as PNG. whole: to the page's end."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the process."""
        for end in (self._out, self._in):
            os.close(end)
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
