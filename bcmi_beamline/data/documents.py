"""The document log: every run as JSON lines on local disk, whatever happens to the catalogue."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

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
    """The file of one run; a full disk is reported and does not stop the scan."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self.failure = ""

    def __call__(self, name: str, doc: Document) -> None:
        if self.failure:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  closed at stop
            self._file.write(to_json([name, doc]) + "\n")
            self._file.flush()
            if name == "stop":
                self._file.close()
        except (OSError, ValueError) as error:
            self.failure = str(error)
            logger.error("%s: document log: %s; the scan goes on without it", self._path, error)


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
        What went wrong, by run uid; such a run's log ends early.
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
            log = self._logs[run]
            log(name, doc)
            if log.failure:
                self.failures[run] = log.failure
            if name == "stop":
                del self._logs[run]
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


def read_log(path: str | Path) -> Iterator[tuple[str, Document]]:
    """Yield (name, document) of one logged run; a last line cut short by a crash is left out.

    Raises
    ------
    FileError
        When the file cannot be read or a line in it is not a document.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise file_error(path, "file", f"cannot be read ({error})", "name a document log") from None
    whole, rest = lines[:-1], lines[-1]
    for number, line in enumerate(whole, 1):
        try:
            name, doc = json.loads(line)
        except ValueError:
            raise file_error(path, f"line {number}", "is not [name, document]", "remove that line") from None
        yield name, doc
    if rest:
        logger.warning("%s: its last line is cut short and left out", path)


def replay(path: str | Path, writer: Writer) -> str:
    """Hand a logged run to `writer`, document by document, and return its uid.

    Parameters
    ----------
    path : str or Path
        File of one run.
    writer : callable
        Called with (name, document); what it raises is raised. A run that a crash cut off is ended with a
        stop document whose ``exit_status`` is ``"abort"``.
    """
    run, last, events, stopped = "", 0.0, {}, False
    streams: dict[str, str] = {}
    for name, doc in read_log(path):
        if name == "start":
            run = doc["uid"]
        elif name == "descriptor":
            streams[doc["uid"]] = doc["name"]
            events.setdefault(doc["name"], 0)
        elif name == "event":
            events[streams[doc["descriptor"]]] += 1
        elif name == "event_page":
            events[streams[doc["descriptor"]]] += len(doc["seq_num"])
        last = doc.get("time", last) if isinstance(doc.get("time"), int | float) else last
        stopped = stopped or name == "stop"
        writer(name, doc)
    if not run:
        raise file_error(path, "file", "holds no run", "name a document log")
    if not stopped:
        writer(
            "stop",
            {
                "uid": str(uuid.uuid5(uuid.NAMESPACE_OID, run)),
                "run_start": run,
                "time": last,
                "exit_status": "abort",
                "reason": "the document log ends here",
                "num_events": events,
            },
        )
    return run
