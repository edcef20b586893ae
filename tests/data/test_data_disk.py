"""The disk watch: nothing starts without room, and a full disk pauses a scan instead of ending it."""

from collections import namedtuple
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import pytest
from bluesky import RunEngine
from fake_beamline import FakeEiger, poisson
from ophyd.sim import SynSignal

from bcmi_beamline.data import disk

Usage = namedtuple("Usage", "total used free")
Frames = namedtuple("Frames", "frames")
GB = 1e9


@pytest.fixture
def free(monkeypatch):
    """Bytes free on every disk, to be changed; looked at before each trigger."""
    room = [100 * GB]
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(0, 0, room[0]))
    monkeypatch.setattr(disk, "LOOK_EVERY_S", 0.0)
    return room


class Shutter(SynSignal):
    """Remembers what it was told."""

    def __init__(self):
        super().__init__(name="shutter")
        self.told = []
        self.put(1)

    def set(self, value, **kwargs):
        self.told.append(value)
        self.put(value)
        return self.trigger()

    def trigger(self):
        from ophyd.status import Status

        status = Status()
        status.set_finished()
        return status


class Eiger(FakeEiger):
    prepared = 0

    def prepare(self, plan):
        from ophyd.status import Status

        self.prepared = plan.frames
        status = Status()
        status.set_finished()
        return status


def scan(eiger, frames, events):
    def clean():
        events.append("cleaned")
        yield from bps.null()

    @bpp.finalize_decorator(clean)
    def inner():
        yield from bps.prepare(eiger, Frames(frames), wait=True)

        @bpp.stage_decorator([eiger])
        @bpp.run_decorator()
        def run():
            for _ in range(frames):
                yield from bps.trigger_and_read([eiger])

        return (yield from run())

    return (yield from inner())


def engine(watch):
    RE = RunEngine({}, context_managers=[], call_returns_result=True)
    RE.preprocessors.append(watch)
    return RE


def test_a_run_without_room_for_its_frames_does_not_begin(free, tmp_path):
    eiger, seen, events = Eiger(tmp_path, poisson((3, 9, 7))), [], []
    RE = engine(disk.DiskWatch(lambda: [tmp_path / "not" / "yet"], 40 * GB, reserve_bytes=2 * GB))
    RE.subscribe(lambda name, doc: seen.append(name))
    with pytest.raises(disk.NoRoomError, match=r"100\.00 GB are free, the frames need 120\.00 GB") as caught:
        RE(scan(eiger, 3, events))
    assert "\n" not in str(caught.value)
    assert (seen, eiger.prepared, events) == ([], 0, ["cleaned"])
    assert RE.state == "idle"
    free[0] = 122 * GB
    assert RE(scan(eiger, 3, events)).exit_status == "success"


def test_a_disk_that_fills_pauses_the_scan_with_the_shutter_closed(free, tmp_path, monkeypatch, caplog):
    eiger, shutter, waits = Eiger(tmp_path, poisson((5, 9, 7))), Shutter(), []

    def wait(seconds):
        waits.append(shutter.get())
        if len(waits) == 3:
            free[0] = 100 * GB
        return (yield from bps.null())

    monkeypatch.setattr(disk.bps, "sleep", wait)
    RE = engine(disk.DiskWatch(lambda: [tmp_path], 1.0, reserve_bytes=2 * GB, shutter=shutter))

    def fill(name, doc):
        if name == "event" and doc["seq_num"] == 2:
            free[0] = 1.9 * GB

    seen = []
    RE.subscribe(fill)
    RE.subscribe(lambda name, doc: seen.append(name))
    result = RE(scan(eiger, 5, []))
    assert (result.exit_status, seen.count("event")) == ("success", 5)
    assert waits == [0, 0, 0]
    assert shutter.told == [0, 1]
    assert "the scan waits" in caplog.text
    assert "goes on" in caplog.text


def test_the_operator_may_give_up_while_it_waits(free, tmp_path, monkeypatch):
    events = []

    def give_up(seconds):
        raise RuntimeError("given up")
        yield

    monkeypatch.setattr(disk.bps, "sleep", give_up)
    free[0] = 1.0
    watch = disk.DiskWatch(lambda: [Path("/")], 0.0)
    monkeypatch.setattr(watch, "check", lambda needed: None)
    with pytest.raises(RuntimeError, match="given up"):
        engine(watch)(scan(Eiger(tmp_path, poisson((2, 9, 7))), 2, events))
    assert events == ["cleaned"]
