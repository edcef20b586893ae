"""The document log: every run as JSON lines on local disk, whatever happens to the catalogue."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from bcmi_beamline.data._hdf5 import file_error, to_json

Document = dict[str, Any]
Writer = Callable[[str, Document], Any]

logger = logging.getLogger(__name__)


class Runs:
    """Tells which run a document belongs to, for any number of runs at once."""

    def __init__(self) -> None:
        self._run_of: dict[str, str] = {}

    def __call__(self, name: str, doc: Document) -> str:
        """Return the uid of the run of `doc`; KeyError where its run was never started."""
        if name == "start":
            run = doc["uid"]
        elif name in ("descriptor", "stop", "resource", "stream_resource"):
            run = doc["run_start"]
        elif name in ("event", "event_page"):
            run = self._run_of[doc["descriptor"]]
        else:
            run = self._run_of[doc["stream_resource" if name == "stream_datum" else "resource"]]
        if name in ("descriptor", "resource", "stream_resource"):
            self._run_of[doc["uid"]] = run
        if name == "stop":
            self._run_of = {uid: other for uid, other in self._run_of.items() if other != run}
        return run


class _RunLog:
    """The file of one run; what a full disk refuses waits in memory and is written when there is room.

    The file is locked while the run lasts; the lock ends with the process, whatever ends that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._size = 0
        self._waiting: deque[bytes] = deque()
        self._stopped = False
        self.failure = ""

    def __call__(self, name: str, doc: Document) -> None:
        self._waiting.append(to_json([name, doc]).encode() + b"\n")
        self._stopped = name == "stop"
        self.write()

    @property
    def done(self) -> bool:
        """Whether the whole run is on disk."""
        return self._stopped and not self._waiting

    def write(self) -> None:
        """Write what waits, whole lines only."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  closed at stop
                with contextlib.suppress(OSError):  # not every network file system has locks
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while self._waiting:
                self._append(self._file, self._waiting[0])
                self._waiting.popleft()
            if self.failure:
                logger.warning("%s: document log: complete again", self._path)
            self.failure = ""
            if self._stopped:
                self._file.close()
        except OSError as error:
            if not self.failure:
                logger.error("%s: document log: %s; documents wait in memory", self._path, error)
            self.failure = str(error)

    def _append(self, file: FileIO, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            file.truncate(self._size)
            raise
        self._size += len(line)


class DocumentLog:
    """RunEngine callback that appends each document to the file of its run, flushed one by one.

    Parameters
    ----------
    directory : str or Path
        Made when the first run starts. A run's file is ``<UTC time>_<run uid>.jsonl``; each line is
        ``[name, document]``.

    Attributes
    ----------
    failures : dict of str to str
        Why documents of a run wait in memory, by run uid; an entry goes when they are on disk.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.failures: dict[str, str] = {}
        self._runs = Runs()
        self._logs: dict[str, _RunLog] = {}

    def __call__(self, name: str, doc: Document) -> None:
        """Log one document; never raises."""
        try:
            run = self._runs(name, doc)
            if name == "start":
                stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(doc["time"]))
                self._logs[run] = _RunLog(self.directory / f"{stamp}_{run}.jsonl")
            self._logs[run](name, doc)
            for other in self.failures:
                self._logs[other].write()
            self.failures = {run: log.failure for run, log in self._logs.items() if log.failure}
            self._logs = {run: log for run, log in self._logs.items() if not log.done}
        except Exception:
            logger.exception("document log: a %s document was not logged; the scan goes on", name)

    def paths(self) -> list[Path]:
        """Every logged run, oldest first."""
        return sorted(self.directory.glob("*.jsonl"))

    def path(self, run_uid: str) -> Path:
        """File of the run whose uid starts with `run_uid`.

        Raises
        ------
        FileError
            When there is none, or more than one.
        """
        found = [path for path in self.paths() if path.stem.split("_", 1)[-1].startswith(run_uid)]
        if len(found) != 1:
            wrong = f"{len(found)} logged runs start with {run_uid!r}"
            raise file_error(self.directory, "document log", wrong, "give more of the uid or another folder")
        return found[0]


def being_written(path: str | Path) -> bool:
    """Whether the run of this log is still going on, in whatever process."""
    return _locked(path) is True


def left_behind(path: str | Path) -> bool:
    """Whether nobody writes this log any more; False, too, where the file system cannot tell."""
    return _locked(path) is False


def _locked(path: str | Path) -> bool | None:
    """Whether a writer holds the file; None where that cannot be told."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def read_log(path: str | Path) -> Iterator[tuple[str, Document]]:
    """Yield (name, document) of one logged run; a last line cut short by a crash is left out.

    Raises
    ------
    FileError
        When the file cannot be read or a line in it is not a document.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    logger.warning("%s: its last line is cut short and left out", path)
                    return
                try:
                    name, doc = json.loads(line)
                    if not (isinstance(name, str) and isinstance(doc, dict)):
                        raise TypeError
                except (ValueError, TypeError, RecursionError):
                    wrong, mend = "is not [name, document]", "remove that line"
                    raise file_error(path, f"line {number}", wrong, mend) from None
                yield name, doc
    except OSError as error:
        raise file_error(path, "file", f"cannot be read ({error})", "name a document log") from None


class Tally:
    """What a run's documents amount to, counted as they pass.

    Attributes
    ----------
    run : str
        Uid, "" before the start document.
    stopped : bool
    events : Counter
        Events of each stream.
    frames : Counter
        Frames of each (stream, data key) kept in files.
    """

    def __init__(self) -> None:
        self.run, self.last, self.stopped = "", 0.0, False
        self.events: Counter[str] = Counter()
        self.frames: Counter[tuple[str, str]] = Counter()
        self._streams: dict[str, str] = {}
        self._keys: dict[str, str] = {}

    def __call__(self, name: str, doc: Document) -> None:
        """Count one document."""
        if name == "start":
            self.run = doc["uid"]
        elif name == "descriptor":
            self._streams[doc["uid"]] = doc["name"]
            self.events[doc["name"]] += 0
        elif name == "event":
            self.events[self._streams[doc["descriptor"]]] += 1
        elif name == "event_page":
            self.events[self._streams[doc["descriptor"]]] += len(doc["seq_num"])
        elif name == "stream_resource":
            self._keys[doc["uid"]] = doc["data_key"]
        elif name == "stream_datum":
            key = self._streams[doc["descriptor"]], self._keys[doc["stream_resource"]]
            self.frames[key] += doc["indices"]["stop"] - doc["indices"]["start"]
        self.last = doc["time"] if isinstance(doc.get("time"), int | float) else self.last
        self.stopped = self.stopped or name == "stop"


def count(path: str | Path) -> Tally:
    """Count what a logged run holds.

    Raises
    ------
    FileError
        When the file is no log of a run.
    """
    tally = Tally()
    try:
        for name, doc in read_log(path):
            tally(name, doc)
    except (KeyError, TypeError) as error:
        raise file_error(path, "document", f"lacks {error}", "restore the log") from None
    if not tally.run:
        raise file_error(path, "file", "holds no run", "name a document log")
    return tally


def replay(path: str | Path, writer: Writer) -> str:
    """Hand a logged run to `writer`, document by document, and return its uid.

    Parameters
    ----------
    path : str or Path
        File of one run.
    writer : callable
        Called with (name, document); what it raises is raised. A run that a crash cut off is ended with a
        stop document whose ``exit_status`` is ``"abort"``.

    Raises
    ------
    FileError
        When the file is no log of a run; nothing has been handed over then.
    """
    tally = count(path)
    for name, doc in read_log(path):
        writer(name, doc)
    if not tally.stopped:
        writer(
            "stop",
            {
                "uid": str(uuid.uuid5(uuid.NAMESPACE_OID, tally.run)),
                "run_start": tally.run,
                "time": tally.last,
                "exit_status": "abort",
                "reason": "the document log ends here",
                "num_events": dict(tally.events),
            },
        )
    return tally.run
