"""``bcmi monitor``: a live web page of what the beamline is doing.

It reads the document log that every session writes, nothing else, so it can watch a session in another
process, survive it, and never disturb it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any

RUNS_SHOWN = 40
POINTS_SHOWN = 2000


@dataclass
class WatchedRun:
    """One run as far as its log has been read."""

    path: Path
    offset: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    stop: dict[str, Any] = field(default_factory=dict)
    primary: str = ""
    x: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    last_time: float = 0.0

    def read_on(self) -> None:
        """Take what has been logged since the last look; a line still being written waits."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self._take(*json.loads(line))

    def _take(self, name: str, doc: dict[str, Any]) -> None:
        if name == "start":
            self.start, self.last_time = doc, doc["time"]
        elif name == "stop":
            self.stop, self.last_time = doc, doc["time"]
        elif name == "descriptor" and doc["name"] == "primary":
            self.primary = doc["uid"]
        elif name == "event" and doc["descriptor"] == self.primary:
            data = doc["data"]
            motor = next(iter(self.start.get("motors") or [""]))
            self.x.append(float(data.get(motor, len(self.x))))
            self.counts.append(float(data.get("eiger_total", 0.0)))
            self.last_time = doc["time"]

    def summary(self) -> dict[str, Any]:
        """One row of the list of runs."""
        return {
            "uid": self.start.get("uid", ""),
            "scan_id": self.start.get("scan_id"),
            "plan": self.start.get("plan_name", "run"),
            "act": self.start.get("experiment_act") or self.start.get("scan_kind", ""),
            "modulator": self.start.get("modulator", ""),
            "begun": self.start.get("time"),
            "seconds": round(self.last_time - self.start.get("time", self.last_time), 1),
            "points": len(self.counts),
            "of": self.start.get("num_points"),
            "status": self.stop.get("exit_status", "running"),
            "reason": self.stop.get("reason", ""),
        }


class Watch:
    """Follows a folder of run logs.

    Parameters
    ----------
    directory : path
        ``documents`` of a session's folder; it may not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._runs: dict[Path, WatchedRun] = {}
        self._lock = Lock()

    def state(self) -> dict[str, Any]:
        """The newest runs, newest first, and the curve of the newest; JSON-serialisable."""
        with self._lock:
            paths = sorted(self._directory.glob("*.jsonl"))[-RUNS_SHOWN:]
            self._runs = {path: self._runs.get(path) or WatchedRun(path) for path in paths}
            for run in self._runs.values():
                if not run.stop:
                    run.read_on()
            runs = [run for run in reversed(self._runs.values()) if run.start]
            newest = runs[0] if runs else None
            every = 1 if newest is None else -(-len(newest.x) // POINTS_SHOWN) or 1
            return {
                "beamline": newest.start.get("beamline", "") if newest else "",
                "runs": [run.summary() for run in runs],
                "x_name": next(iter(newest.start.get("motors") or ["point"])) if newest else "",
                "x": newest.x[::every] if newest else [],
                "counts": newest.counts[::every] if newest else [],
            }


def make_server(directory: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a web server of the page on loopback, not yet serving.

    Parameters
    ----------
    directory : path
        A session's folder.
    port : int
        0 takes a free one; ``server.server_port`` tells which.

    Raises
    ------
    OSError
        When the port is taken.
    """
    watch = Watch(directory / "documents")
    page = (resources.files("bcmi_beamline") / "report" / "monitor.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page or with the state."""
            if self.path == "/":
                self._send(page, "text/html; charset=utf-8")
            elif self.path == "/state.json":
                self._send(json.dumps(watch.state()).encode(), "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
