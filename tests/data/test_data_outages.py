"""Servers that die, processes that are killed, disks that fill: no frame and no document is lost."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_beamline import FakeEiger, poisson, take

from bcmi_beamline import data
from bcmi_beamline.data import catalog as catalog_module
from bcmi_beamline.data import documents as documents_module


def assert_whole(run, eiger, points):
    """Every event once, in order, and every frame."""
    stream = run["primary"]
    np.testing.assert_array_equal(stream.read(["seq_num"])["seq_num"], np.arange(1, points + 1))
    np.testing.assert_allclose(stream.read(["phi"])["phi"], np.arange(points) * 0.1)
    np.testing.assert_array_equal(stream["eiger_image"][:], eiger.frames[:points])


def test_a_server_killed_during_a_scan_loses_nothing(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_module, "RETRY_S", 0.1)
    log = data.DocumentLog(tmp_path / "log")
    eiger = FakeEiger(tmp_path, poisson((90, 9, 7)), images_per_file=40)
    server = catalog._server._process
    seen = []

    def kill(name, doc):
        seen.append(name)
        if seen.count("event") == 45 and name == "event":
            writer.flush()  # a part is stored
            os.kill(server.pid, signal.SIGKILL)

    writer = data.BackgroundTiledWriter(catalog._connect, restore=lambda uid: catalog.restore(log.path(uid)))
    uid = take(eiger, {"phi": np.arange(90) * 0.1}, [log, writer, kill])
    writer.close()
    assert catalog._server._process is not server
    assert writer.failures == {}
    assert_whole(catalog.run(uid), eiger, 90)


def test_a_run_taken_while_no_server_answers_is_stored_when_one_does(catalog, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(catalog_module, "RETRY_S", 0.05)
    log, away = data.DocumentLog(tmp_path / "log"), [True]

    def connect():
        if away:
            raise data.CatalogError("no catalogue answers")
        return catalog.client

    def restore(uid):
        connect()
        return catalog.restore(log.path(uid))

    writer = data.BackgroundTiledWriter(connect, restore=restore)
    eiger = FakeEiger(tmp_path, poisson((5, 9, 7)))
    uid = take(eiger, {"phi": np.arange(5) * 0.1}, [log, writer])
    writer.flush()
    assert list(writer.failures) == [uid]
    assert "is not in the catalogue yet" in caplog.text  # the user is told
    away.clear()
    deadline = time.monotonic() + 30
    while writer.failures and time.monotonic() < deadline:
        time.sleep(0.05)
    assert_whole(catalog.run(uid), eiger, 5)
    writer.close()


def test_rows_stored_twice_are_put_right(catalog, tmp_path):
    """What Tiled's client may do when an answer is lost on the way."""
    from bluesky_tiled_plugins import TiledWriter

    log = data.DocumentLog(tmp_path / "log")
    eiger = FakeEiger(tmp_path, poisson((4, 9, 7)))
    uid = take(eiger, {"phi": np.arange(4) * 0.1}, [log])
    writer = TiledWriter(catalog.client, batch_size=1)
    for name, doc in data.read_log(log.path(uid)):
        writer(name, doc)
        if name == "event" and doc["seq_num"] == 2:
            writer(name, doc)
    assert len(catalog.run(uid)["primary"].read(["phi"])["phi"]) == 5
    assert catalog.restore(log.path(uid)) is True
    assert_whole(catalog.run(uid), eiger, 4)


SCAN = """
import sys
import numpy as np
from pathlib import Path
from fake_beamline import FakeEiger, poisson, take
from bcmi_beamline import data

folder = Path(sys.argv[1])
told = lambda name, doc: print(name, doc.get("seq_num", ""), flush=True)
eiger = FakeEiger(folder, poisson((5000, 9, 7)))
take(eiger, {"phi": np.arange(5000) * 0.1}, [data.DocumentLog(folder / "documents"), told])
"""


def test_a_process_killed_during_a_scan_loses_nothing(catalog, tmp_path):
    scan = subprocess.Popen(
        [sys.executable, "-c", SCAN, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    log = data.DocumentLog(tmp_path / "documents")
    seen = 0
    for line in scan.stdout:
        name, _, number = line.partition(" ")
        if name == "event" and (seen := int(number)) == 30:
            with pytest.raises(data.CatalogError, match="is still going on"):
                catalog.restore(log.paths()[0])
            scan.kill()
    assert scan.wait() == -signal.SIGKILL
    (path,) = log.paths()
    assert catalog.restore(path) is True
    assert catalog.restore(path) is False
    run = catalog[-1]
    assert run.metadata["stop"]["exit_status"] == "abort"
    events = run.metadata["stop"]["num_events"]["primary"]
    assert events >= seen >= 30  # everything that anybody was told of
    frames = FakeEiger(tmp_path, poisson((5000, 9, 7)))
    np.testing.assert_array_equal(run["primary"]["eiger_image"][:events], frames.frames[:events])
    assert len(run["primary"].read(["phi"])["phi"]) == events


class FullDisk:
    """A file on a disk that takes a few bytes of a line and then no more."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, line):
        if self.room[0] < len(line):
            written = self._file.write(line[: self.room[0]])
            self.room[0] = 0
            if not written:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written
        self.room[0] -= len(line)
        return self._file.write(line)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 2500])
def test_documents_wait_for_a_full_disk(tmp_path, monkeypatch, room):
    space, seen = [room], []

    def full(*arguments, **options):
        return FullDisk(open(*arguments, **options), space)

    monkeypatch.setattr(documents_module, "open", full, raising=False)
    log = data.DocumentLog(tmp_path / "log")

    def watch(name, doc):
        seen.append((name, doc))
        if name == "event" and doc["seq_num"] == 7:
            assert log.failures
            assert log.paths()[0].read_bytes()[-1:] in (b"", b"\n")  # whole lines only
            space[0] = 10**6

    uid = take(FakeEiger(tmp_path, poisson((9, 9, 7))), {"phi": np.arange(9) * 0.1}, [log, watch])
    assert log.failures == {}
    monkeypatch.undo()
    assert [name for name, _ in data.read_log(log.path(uid))] == [name for name, _ in seen]
    assert [doc["uid"] for n, doc in data.read_log(log.path(uid)) if n == "event"] == [
        doc["uid"] for n, doc in seen if n == "event"
    ]
