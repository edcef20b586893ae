"""The catalogue of runs: a Tiled server of its own on loopback, and a writer that no scan waits for."""

from __future__ import annotations

import copy
import json
import logging
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from bcmi_beamline.data._hdf5 import file_error
from bcmi_beamline.data.documents import Document, Runs, Writer, read_log, replay

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
BATCH_SIZE = 25
"""Events handed to Tiled at once: 0.1-1 ms each, where one by one they cost 42-72 ms."""


class CatalogError(RuntimeError):
    """The catalogue cannot do what was asked; one line says why and what to do."""


class _RunWriter:
    """Hands the documents of one run to Tiled until one fails; the rest of that run is dropped."""

    def __init__(self, run: str, connect: Callable[[], Any], batch_size: int) -> None:
        self._run = run
        self._connect = connect
        self._batch_size = batch_size
        self._write: Writer | None = None
        self.failure = ""

    def __call__(self, name: str, doc: Document) -> None:
        if self.failure:
            return
        try:
            if self._write is None:
                from bluesky_tiled_plugins import TiledWriter

                self._write = TiledWriter(self._connect(), batch_size=self._batch_size)
            self._write(name, doc)
        except Exception as error:
            self.failure = " ".join(f"{name}: {error}".split())
            logger.error(
                "run %s is not in the catalogue (%s); restore it from its document log",
                self._run,
                self.failure,
            )


class BackgroundTiledWriter:
    """RunEngine callback that stores documents in Tiled from a thread of its own.

    It only queues: whatever storage does, the scan neither waits nor fails. A run that could not be stored is
    noted in `failures` and can be restored from the document log.

    Parameters
    ----------
    connect : callable
        Returns the Tiled client; called in the thread when a run starts.
    batch_size : int
        Events, or frames, sent at once.

    Attributes
    ----------
    failures : dict of str to str
        What went wrong, by run uid.
    """

    def __init__(self, connect: Callable[[], Any], *, batch_size: int = BATCH_SIZE) -> None:
        self._connect = connect
        self._batch_size = batch_size
        self._queue: queue.SimpleQueue[tuple[str, Document] | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.failures: dict[str, str] = {}

    def __call__(self, name: str, doc: Document) -> None:
        """Queue a copy of one document; never raises, never blocks."""
        try:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tiled writer", daemon=True)
                self._thread.start()
            self._queue.put((name, copy.deepcopy(doc)))
        except Exception:
            logger.exception("a %s document was not queued for the catalogue", name)

    def _work(self) -> None:
        runs, writers = Runs(), dict[str, _RunWriter]()
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            name, doc = item
            try:
                run = runs(name, doc)
                if name == "start":
                    writers[run] = _RunWriter(run, self._connect, self._batch_size)
                writers[run](name, doc)
                if writers[run].failure:
                    self.failures[run] = writers[run].failure
                if name == "stop":
                    del writers[run]
            except Exception:
                logger.exception("a %s document was not stored in the catalogue", name)

    def flush(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until everything queued so far has been handed over; runs that ended are then stored.

        Raises
        ------
        CatalogError
            When that takes longer than `timeout_s`; what is queued stays queued.
        """
        done = threading.Event()
        self._queue.put(done)
        if self._thread is not None and not done.wait(timeout_s):
            raise CatalogError(
                f"the catalogue has not stored everything within {timeout_s:g} s; wait longer, or restore "
                "the run from its document log"
            )

    def close(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Store what is queued, for at most `timeout_s`, and end the thread."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error(
                "the catalogue did not store everything; restore what is missing from the document log"
            )
        self._thread = None


class _Server:
    """The subprocess that serves one folder; ends with its parent."""

    def __init__(self, directory: Path, readable: Iterable[str | Path]) -> None:
        (directory / "data").mkdir(parents=True, exist_ok=True)
        listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.api_key = secrets.token_hex(32)
        self.log = directory / "server.log"
        with listener, open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bcmi_beamline.data._server"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the scan; the server leaves when its input closes
            )
            settings = {
                "directory": str(directory),
                "readable": [str(Path(folder).absolute()) for folder in readable],
                "api_key": self.api_key,
                "socket": listener.fileno(),
            }
            self._stdin = self._process.stdin
            assert self._stdin is not None
            self._stdin.write(json.dumps(settings).encode() + b"\n")
            self._stdin.flush()

    def wait(self) -> None:
        """Wait until it answers."""
        import httpx

        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self.uri}/healthz", timeout=1.0, trust_env=False).raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.02)
        self.stop()
        last = self.log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        raise CatalogError(f"the catalogue's server did not start ({last or 'no message'}); see {self.log}")

    def stop(self) -> None:
        """Let it leave, and end it if it does not."""
        if self._stdin is not None:
            self._stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Catalog:
    """An open catalogue; made by `open_catalog`. ``catalog[-1]`` is the latest run.

    Attributes
    ----------
    uri : str
        Where the server listens.
    writer : BackgroundTiledWriter
        Callback to subscribe to a RunEngine.
    """

    def __init__(self, uri: str, api_key: str | None = None, server: _Server | None = None) -> None:
        self.uri = uri
        self._api_key = api_key
        self._server = server
        self._lock = threading.Lock()
        self.writer = BackgroundTiledWriter(lambda: self.client)

    @property
    def client(self) -> Any:
        """The Tiled client, a ``CatalogOfBlueskyRuns``; the first use waits for the server."""
        with self._lock:
            return self._client

    @cached_property
    def _client(self) -> Any:
        import httpx
        from tiled.client import from_uri

        if self._server is not None:
            self._server.wait()
        try:
            httpx.get(
                self.uri, timeout=10.0
            )  # fails at once where Tiled's client would try for half a minute
            return from_uri(self.uri, api_key=self._api_key)
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CatalogError(f"{self.uri}: no catalogue answers ({first}); check the address") from None

    def __getitem__(self, key: int | str) -> Any:
        """Return the run with this uid or scan id, or counted from the latest with -1, -2, ..."""
        return self.client[key]

    def __len__(self) -> int:
        return len(self.client)

    def run(self, uid: str) -> Any:
        """Return the run whose uid is, or starts with, `uid`.

        Raises
        ------
        CatalogError
            When there is none, or more than one.
        """
        self.writer.flush()
        if why := next((why for run, why in self.writer.failures.items() if run.startswith(uid)), None):
            raise CatalogError(f"run {uid!r} was not stored ({why}); restore it from its document log")
        try:
            return self.client.uid[uid]
        except (KeyError, ValueError) as error:
            text = " ".join(str(error).strip("'\"").split())
            raise CatalogError(
                f"run {uid!r} is not in the catalogue {self.uri} ({text}); check the uid"
            ) from None

    def restore(self, log: str | Path) -> bool:
        """Store a logged run that is not here, or only in part; False if it was here whole.

        Parameters
        ----------
        log : path
            File of one run, written by `DocumentLog`.

        Raises
        ------
        FileError
            When it is no such file.
        """
        from bluesky_tiled_plugins import TiledWriter

        uid = next((doc["uid"] for name, doc in read_log(log) if name == "start"), None)
        if uid is None:
            raise file_error(log, "file", "holds no run", "name a document log")
        client = self.client
        if uid in client:
            if client[uid].metadata.get("stop"):
                return False
            client.delete_contents([uid], recursive=True, external_only=False)  # else the server answers 409
        replay(log, TiledWriter(client, batch_size=10 * BATCH_SIZE))
        self.writer.failures.pop(uid, None)
        return True

    def flush(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every document so far is stored; raises `CatalogError` after `timeout_s`."""
        self.writer.flush(timeout_s)

    def close(self) -> None:
        """Store what is pending and stop the server that was started here."""
        self.writer.close()
        if self._server is not None:
            self._server.stop()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Catalog({self.uri})"


def open_catalog(
    directory: str | Path = "", *, readable: Iterable[str | Path] = (), uri: str | None = None
) -> Catalog:
    """Open the catalogue kept in a folder, or the one that a Tiled server elsewhere serves.

    Parameters
    ----------
    directory : path
        Holds the databases; made if absent. Its server is started in the background with a key that only this
        process knows and listens on loopback only.
    readable : iterable of path
        Folders that detectors write into; the server opens files nowhere else.
    uri : str, optional
        An external Tiled server; `directory` is then not used. ``TILED_API_KEY`` holds its key.
    """
    if uri is not None:
        return Catalog(uri, os.environ.get("TILED_API_KEY"))
    server = _Server(Path(directory).absolute(), readable)
    return Catalog(server.uri, server.api_key, server)
