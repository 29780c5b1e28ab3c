"""A page of the report in a real browser without a window: what it shows, what it complains of, a picture of it.

    python tests/browser.py PAGE.html PICTURE.png [--width 1200] [--height 900] [--dark]

Chromium is spoken to through two pipes, in JSON that ends with a zero byte (its DevTools protocol).
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0  # seconds that an answer may take


def installed() -> str | None:
    """The path of a Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """One tab. A context manager; `complaints` are errors in the console, and addresses that a page asked for."""

    def __enter__(self) -> "Browser":
        program = installed()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # Chromium reads from its file 3 and writes to its file 4; the shell puts them there. A sandbox is for pages of
        # others, and needs rights that a container does not give.
        switches = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *switches, f"--user-data-dir={self._profile.name}"],
            pass_fds=[read, write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._pending, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of that size, in CSS pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setScrollbarsHidden", hidden=True)
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self._ask("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self._events))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON can have it."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """The text that a reader sees: not what is folded or hidden."""
        return str(self.value("document.body.innerText"))

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), answers)
        assert "error" not in answers[0], (method, answers[0])
        return answers[0]["result"]

    def _until(self, done: Callable[[], bool], answers: list[dict[str, Any]] | None = None) -> None:
        """Reads messages until something is so; the answer to the latest question goes to `answers`."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            if b"\0" not in self._pending:
                assert select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0], "no answer"
                chunk = os.read(self._read, 1 << 16)
                assert chunk, "the browser has ended"
                self._pending += chunk
                continue
            text, self._pending = self._pending.split(b"\0", 1)
            message = json.loads(text)
            if message.get("id") == self._number and answers is not None:
                answers.append(message)
            elif "method" in message:
                self._events.append(message)
                self._listen(message["method"], message["params"])

    def _listen(self, method: str, given: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(given["args"]))
        elif method == "Network.requestWillBeSent" and not given["request"]["url"].startswith("file:"):
            self.complaints.append(f"asks for {given['request']['url']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--at", help="a CSS selector of what to scroll to")
    args = parser.parse_args()
    with Browser() as browser:
        browser.open(args.page, args.width, args.height, args.dark)
        if args.at:
            browser.value(f"document.querySelector({json.dumps(args.at)}).scrollIntoView()")
        browser.picture(args.picture)
        print("\n".join(browser.complaints) or "no complaints")


if __name__ == "__main__":
    main()
