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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bcmi_beamline.data._hdf5 import FileError
from bcmi_beamline.data.documents import (
    Document,
    DocumentLog,
    Runs,
    Tally,
    Writer,
    being_written,
    count,
    replay,
)

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
BATCH_SIZE = 25
"""Events handed to Tiled at once: 0.1-1 ms each, where one by one they cost 42-72 ms."""
RETRY_S = 5.0
"""How often a server that went away is asked whether it is back."""


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
                "run %s is not in the catalogue yet (%s); its document log has it",
                self._run,
                self.failure,
            )


class BackgroundTiledWriter:
    """RunEngine callback that stores documents in Tiled from a thread of its own.

    It only queues: whatever storage does, the scan neither waits nor fails. A run that could not be stored is
    noted in `failures` and, once the server is back, restored from the document log.

    Parameters
    ----------
    connect : callable
        Returns the Tiled client; called in the thread when a run starts.
    batch_size : int
        Events, or frames, sent at once.
    restore : callable, optional
        Called with a run's uid after its end: stores it from the document log unless it is there whole.

    Attributes
    ----------
    failures : dict of str to str
        What went wrong, by run uid, until the run is stored.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        batch_size: int = BATCH_SIZE,
        restore: Callable[[str], object] | None = None,
    ) -> None:
        self._connect = connect
        self._batch_size = batch_size
        self._restore = restore
        self._unconfirmed: list[str] = []
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
        while True:
            try:
                item = self._queue.get(timeout=RETRY_S if self._unconfirmed else None)
            except queue.Empty:
                self._confirm()
                continue
            if item is None:
                break
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
                    self._unconfirmed.append(run)
                    self._confirm()
            except Exception:
                logger.exception("a %s document was not stored in the catalogue", name)
        self._confirm()

    def _confirm(self) -> None:
        """Make sure that the runs which ended are stored whole; ask again later where the server is away."""
        if self._restore is None:
            self._unconfirmed.clear()
        for run in list(self._unconfirmed):
            try:
                self._restore(run)  # pyright: ignore[reportOptionalCall]
            except FileError as error:  # its log is no help; asking again is none either
                self.failures.setdefault(run, str(error))
            except Exception as error:
                self.failures[run] = " ".join(str(error).split())
                return
            else:
                if self.failures.pop(run, None):
                    logger.warning("run %s is in the catalogue after all", run)
            self._unconfirmed.remove(run)

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
        if self._thread.is_alive() or self.failures:
            why = next(iter(self.failures.values()), "it is still being written to")
            logger.error("the catalogue lacks a run (%s); bcmi replay stores what is missing", why)
        self._thread = None


class _Server:
    """The subprocess that serves one folder; ends with its parent, and is started again if it dies."""

    def __init__(self, directory: Path, readable: Iterable[str | Path], database: str | None) -> None:
        (directory / "data").mkdir(parents=True, exist_ok=True)
        self.api_key = secrets.token_hex(32)
        self.log = directory / "server.log"
        self._settings = {
            "directory": str(directory),
            "readable": [str(Path(folder).absolute()) for folder in readable],
            "api_key": self.api_key,
            "database": database,
        }
        self._answered = self._stopping = False
        self.log.unlink(missing_ok=True)
        self._port = 0
        self._start()
        self.uri = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._watch, name="tiled watch", daemon=True).start()

    def _start(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        with listener, open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bcmi_beamline.data._server"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the scan; the server leaves when its input closes
            )
            self._stdin = self._process.stdin
            assert self._stdin is not None
            self._stdin.write(json.dumps({**self._settings, "socket": listener.fileno()}).encode() + b"\n")
            self._stdin.flush()

    def _watch(self) -> None:
        while True:
            born = time.monotonic()
            status = self._process.wait()
            if self._stopping or not self._answered:
                return
            logger.error("the catalogue's server ended with status %s; starting it again", status)
            time.sleep(max(0.0, RETRY_S - (time.monotonic() - born)))
            try:
                self._start()
            except OSError as error:
                logger.error("the catalogue's server cannot be started again (%s); see %s", error, self.log)
                return

    def wait(self) -> None:
        """Wait until it answers."""
        import httpx

        deadline = time.monotonic() + START_TIMEOUT_S
        # without certificates: to read them takes longer than to ask, and the server needs the time itself
        with httpx.Client(timeout=1.0, trust_env=False, verify=False) as client:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    client.get(f"{self.uri}/healthz").raise_for_status()
                    self._answered = True
                    return
                except httpx.HTTPError:
                    time.sleep(0.05)
        self.stop()
        last = self.log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        raise CatalogError(f"the catalogue's server did not start ({last or 'no message'}); see {self.log}")

    def stop(self) -> None:
        """Let it leave, and end it if it does not."""
        self._stopping = True
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

    def __init__(
        self,
        uri: str,
        api_key: str | None = None,
        server: _Server | None = None,
        log: DocumentLog | None = None,
    ) -> None:
        self.uri = uri
        self._api_key = api_key
        self._server = server
        self._lock = threading.Lock()
        restore = None if log is None else lambda uid: self.restore(log.path(uid))
        self.writer = BackgroundTiledWriter(self._connect, restore=restore)

    @property
    def client(self) -> Any:
        """The Tiled client, a ``CatalogOfBlueskyRuns``; the first use waits for the server."""
        with self._lock:
            return self._client

    @cached_property
    def _client(self) -> Any:
        from tiled.client import from_uri

        if self._server is not None:
            self._server.wait()
        self._ask()
        try:
            return from_uri(self.uri, api_key=self._api_key)
        except Exception as error:
            raise self._silent(error) from None

    def _ask(self) -> None:
        """Fail at once where Tiled's own client would try for most of a minute."""
        import httpx

        try:
            httpx.get(self.uri, timeout=10.0, follow_redirects=True)
        except Exception as error:
            raise self._silent(error) from None

    def _silent(self, error: Exception) -> CatalogError:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return CatalogError(f"{self.uri}: no catalogue answers ({first}); check the address")

    def _connect(self) -> Any:
        client = self.client
        self._ask()
        return client

    @property
    def broker(self) -> Any:
        """The same runs as databroker's ``Broker``: ``broker[-1].table()``, ``.data("eiger_image")``."""
        from databroker import Broker

        # Broker changes which class stands for a run, in a mapping that all clients of the process share
        # (and copies of it share, too): it gets one of its own
        shared = self.client.structure_clients
        own = type(shared)({kind: partial(shared.__getitem__, kind) for kind in shared})
        client = self.client.new_variation(structure_clients=own)
        return Broker(client)  # pyright: ignore[reportCallIssue]  its __new__ takes a client

    def search(
        self,
        *,
        sample: str | None = None,
        plan: str | None = None,
        scan_id: int | None = None,
        since: float | str | None = None,
        until: float | str | None = None,
    ) -> Any:
        """Return the runs that match everything given, as a catalogue of their own.

        Parameters
        ----------
        sample, plan : str, optional
            ``sample`` and ``plan_name`` of the start document.
        scan_id : int, optional
            The latest run with this number.
        since, until : float or str, optional
            Times of the start: seconds since 1970 (UTC) or ``"2026-03-27 14:00"``.
        """
        from bluesky_tiled_plugins.queries import ScanID, TimeRange
        from tiled.queries import Key

        found = self.client
        for key, value in (("sample", sample), ("plan_name", plan)):
            found = found if value is None else found.search(Key(f"start.{key}") == value)
        if since is not None or until is not None:
            found = found.search(TimeRange(since=since, until=until))
        return found if scan_id is None else found.search(ScanID(scan_id))

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
        """Store a logged run that is not here, or not whole; False if it was here whole.

        Parameters
        ----------
        log : path
            File of one run, written by `DocumentLog`.

        Raises
        ------
        FileError
            When it is no such file.
        CatalogError
            When the run is not over, or no catalogue answers.
        """
        from bluesky_tiled_plugins import TiledWriter

        tally = count(log)
        if being_written(log):
            raise CatalogError(f"{log}: run {tally.run[:8]} is still going on; replay it when it has ended")
        client = self._connect()
        if tally.run in client:
            if _is_whole(client[tally.run], tally):
                return False
            client.delete_contents([tally.run], recursive=True, external_only=False)  # else it answers 409
        replay(log, TiledWriter(client, batch_size=10 * BATCH_SIZE))
        self.writer.failures.pop(tally.run, None)
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


def _is_whole(run: Any, tally: Tally) -> bool:
    """Whether a stored run has its end, every event once and every frame."""
    if not run.metadata.get("stop"):
        return False
    import dask.config  # heavy, and needed here alone

    # dask's own pool takes no work while the interpreter ends, which is when a session at a prompt closes
    with dask.config.set(scheduler="synchronous"):
        for stream, events in tally.events.items():
            if events:
                stored = run[stream].read(["seq_num"])["seq_num"].values if stream in run else ()
                if sorted(stored) != list(range(1, events + 1)):
                    return False
    return all(run[stream][key].shape[0] == frames for (stream, key), frames in tally.frames.items())


def open_catalog(
    directory: str | Path = "",
    *,
    readable: Iterable[str | Path] = (),
    uri: str | None = None,
    log: DocumentLog | None = None,
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
        ``http...``: a Tiled server elsewhere, `directory` is then not used and ``TILED_API_KEY`` holds its
        key. ``postgresql://user:password@host/database``: runs and events are kept there, arrays in
        `directory`. By default what ``BCMI_CATALOG`` says; SQLite in `directory` where that is not set.
    log : DocumentLog, optional
        From which runs are restored when the server was away.
    """
    uri = os.environ.get("BCMI_CATALOG") if uri is None else uri
    if uri and not uri.startswith("postgresql"):
        return Catalog(uri, os.environ.get("TILED_API_KEY"), log=log)
    server = _Server(Path(directory).absolute(), readable, uri or None)
    return Catalog(server.uri, server.api_key, server, log)
