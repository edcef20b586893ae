"""A run while it is taken: from its document log as each point is written, or from the catalogue."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from bcmi_beamline.data._hdf5 import FileError, file_error
from bcmi_beamline.data._load import IMAGE, GrowingScan, Scan, local_files
from bcmi_beamline.data.catalog import Catalog
from bcmi_beamline.data.documents import Document, DocumentLog, left_behind

LOG_WAIT_S = 0.02
"""Between two looks at a document log."""

CATALOG_WAIT_S = 1.0
"""Between two looks at the catalogue, to which points come many at a time."""


class _LoggedStream:
    """The stream ``primary`` of a logged run by now: readings of the events, and where the frames are."""

    def __init__(self) -> None:
        self.keys: Document = {}
        self.events: list[Document] = []
        self.files: list[Document] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def read(self, keys: list[str]) -> dict[str, Any]:
        """Readings of the events, arrays called ``values``."""
        return {key: SimpleNamespace(values=np.array([event[key] for event in self.events])) for key in keys}

    def __getitem__(self, key: str) -> _LoggedImage:
        return _LoggedImage(self.keys[key], self.files)


class _LoggedImage:
    """Frames that a logged run tells of, and the files they are in. It has none itself."""

    def __init__(self, key: Document, files: list[Document]) -> None:
        self.shape = (0, *key["shape"][-2:])
        self.dtype = key["dtype_numpy"]
        self._files = files

    def data_sources(self) -> list[Any]:
        """As of the catalogue's arrays: one source of all files, none before the first."""
        assets = [SimpleNamespace(num=n, data_uri=doc["uri"]) for n, doc in enumerate(self._files)]
        return [SimpleNamespace(parameters=doc["parameters"], assets=assets) for doc in self._files[:1]]


class LoggedRun:
    """A run as its document log has it by now, in the form in which the catalogue gives one.

    Parameters
    ----------
    log : DocumentLog
    uid : str
        Or its beginning.

    Raises
    ------
    FileError
        When the log has no such run.
    """

    def __init__(self, log: DocumentLog, uid: str) -> None:
        self._path, self._position = log.path(uid), 0
        self.metadata: dict[str, Any] = {}
        self.parent = _Logged(log)
        self._primary: set[str] = set()
        self._stream = _LoggedStream()
        self.refresh()

    def refresh(self) -> tuple[bool, bool]:
        """Read what was added; return whether there was any, and whether the run or its writer has ended.

        Raises
        ------
        FileError
            For a line that is no document.
        """
        before = self._position
        ended = left_behind(self._path)  # asked first: what was written until then is read below
        try:
            with open(self._path, "rb") as file:
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    self._take(*json.loads(line))
                    self._position += len(line)
        except OSError as error:
            raise file_error(self._path, "file", f"cannot be read ({error})", "restore it") from None
        except (ValueError, KeyError, TypeError) as error:
            wrong, mend = f"is no document ({error})", "follow the run from the catalogue"
            raise file_error(self._path, f"byte {self._position}", wrong, mend) from None
        over = bool(self.metadata) and (ended or "stop" in self.metadata)
        return self._position > before, over

    def _take(self, name: str, doc: Document) -> None:
        if name in ("start", "stop"):
            self.metadata[name] = doc
        elif name == "descriptor" and doc["name"] == "primary":
            self._primary.add(doc["uid"])
            self._stream.keys = doc["data_keys"]
        elif name == "event" and doc["descriptor"] in self._primary:
            self._stream.events.append(doc["data"])
        elif name == "stream_resource" and doc["data_key"] == IMAGE:
            self._stream.files.append(doc)

    @property
    def usable(self) -> bool:
        """Whether the runs that it continues are logged, too, and all frames there are in files here."""
        image = self._stream[IMAGE] if IMAGE in self._stream.keys else None
        if image is not None and image.data_sources() and not local_files(image)[0]:
            return False
        earlier = self.metadata.get("start", {}).get("continues")
        try:
            return earlier is None or self.parent[earlier].usable
        except KeyError:
            return False

    def __contains__(self, name: str) -> bool:
        return name == "primary" and bool(self._primary)

    def __getitem__(self, name: str) -> _LoggedStream:
        return self._stream


class _Logged(dict[str, LoggedRun]):
    """Runs of a document log by uid, each read once."""

    def __init__(self, log: DocumentLog) -> None:
        super().__init__()
        self._log = log

    def __missing__(self, uid: str) -> LoggedRun:
        try:
            self[uid] = LoggedRun(self._log, uid)
        except FileError:
            raise KeyError(uid) from None
        return self[uid]


def watch(
    uid: str,
    catalog: Callable[[], Catalog] | None = None,
    log: DocumentLog | None = None,
    *,
    log_wait_s: float = LOG_WAIT_S,
    catalog_wait_s: float = CATALOG_WAIT_S,
) -> Iterator[Scan]:
    """Yield the scan of a run each time it has grown, and once more when it has ended.

    Each frame is read once. What is yielded is what `load` would give then, and stays as it is.

    Parameters
    ----------
    uid : str
        Of the run, or its beginning. It may be over: then there is one scan.
    catalog : callable, optional
        Opens the catalogue. It is asked for only where the log is no help; points come to it 25 at a time.
    log : DocumentLog, optional
        Read where it has the run and the frames are in files on this machine: points are there at once.
    log_wait_s, catalog_wait_s : float
        Between two looks.

    Raises
    ------
    FileError
        In one line, what `load` finds missing in a run that is over.
    CatalogError
        When neither log nor catalogue has such a run.
    ValueError
        When the log is no help and there is no catalogue.
    """
    scan, seen, missing = GrowingScan(), 0, True
    for run, changed, over in _looks(uid, catalog, log, log_wait_s, catalog_wait_s):
        if not (changed or missing or over):
            continue
        try:
            found = scan(run)
        except FileError:
            if over:
                raise
            missing = True  # a frame that this machine does not see yet, or no point so far
            continue
        missing = False
        if over or len(found.frames) > seen:
            seen = len(found.frames)
            yield found


def _looks(
    uid: str,
    catalog: Callable[[], Catalog] | None,
    log: DocumentLog | None,
    log_wait_s: float,
    catalog_wait_s: float,
) -> Iterator[tuple[Any, bool, bool]]:
    """Yield the run as it is, whether it may have changed, and whether it is over; after that nothing."""
    logged = _logged(uid, log, needed=catalog is None)
    while logged is not None:
        changed, over = logged.refresh()
        if not logged.usable:
            break
        yield logged, changed, over
        if over:
            return
        time.sleep(log_wait_s)
    if catalog is None:
        raise ValueError(f"run {uid[:8]}: its frames are not on this machine; give the catalogue")
    opened, over = catalog(), False
    while not over:
        run = opened.run(uid)
        over = bool(run.metadata.get("stop"))
        yield run, True, over
        if not over:
            time.sleep(catalog_wait_s)


def _logged(uid: str, log: DocumentLog | None, needed: bool) -> LoggedRun | None:
    try:
        return None if log is None else LoggedRun(log, uid)
    except FileError:
        if needed:
            raise
        return None
