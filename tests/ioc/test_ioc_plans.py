"""Plans over Channel Access, on frames that the simulated beamline computes from the pose."""

import dataclasses
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import epics
import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky.utils import RunEngineInterrupted

from bcmi_beamline.config import ConfigError
from bcmi_beamline.data import DocumentLog
from bcmi_beamline.devices import connect, make_devices
from bcmi_beamline.plans import (
    PoorFit,
    align_modulator,
    calibrate_modulator,
    dry_run,
    find_bragg_peak,
    insert_modulator,
    retract_modulator,
    rocking_scan,
)
from bcmi_beamline.session import Session, make_suspenders

pytestmark = pytest.mark.ioc

WINDOW = 256


@pytest.fixture(scope="module")
def devices(simulated_beamline):
    return connect(make_devices(simulated_beamline.beamline), timeout=20.0)


@pytest.fixture(scope="module")
def hidden(simulated_beamline):
    return simulated_beamline.preset.sim.hidden


class Recorder:
    """A RunEngine and the documents of the plans it runs."""

    def __init__(self):
        self.engine = RunEngine({}, call_returns_result=True)
        self.documents = []
        self.engine.subscribe(lambda name, doc: self.documents.append((name, doc)))

    def __call__(self, plan):
        return self.engine(plan).plan_result

    def all(self, name):
        return [doc for kind, doc in self.documents if kind == name]

    def column(self, key):
        return np.array([doc["data"][key] for doc in self.all("event")])


@pytest.fixture
def record(devices):
    recorder = Recorder()
    yield recorder
    if recorder.engine.state != "idle":
        recorder.engine.abort()
    assert not devices.shutter.is_open
    assert not int(devices.eiger.cam.armed.get())


@pytest.fixture(scope="module")
def bragg(devices):
    return Recorder()(find_bragg_peak(devices, points=21, half_range_deg=0.1, window=WINDOW))


def test_the_bragg_peak_is_where_it_was_hidden(devices, hidden, bragg):
    nominal = devices.beamline.reflection.rocking_nominal_deg
    assert bragg.peak_deg == pytest.approx(nominal + hidden.bragg_offset_deg, abs=0.006)
    assert devices.diffractometer.rock.position == pytest.approx(bragg.peak_deg, abs=5e-4)
    assert bragg.fit.height > 100 * bragg.fit.background


def test_a_spiral_of_frames(devices, bragg, record):
    record(insert_modulator(devices))
    result = record(calibrate_modulator(devices, (2.0, 1.5), 0.35, 0.2, window=WINDOW))
    events = record.all("event")
    start = record.all("start")[-1]
    assert len(events) == result.points == start["num_points"] >= 20
    assert start["modulator_position_um"]["z"] == pytest.approx(1350.0, abs=1)
    assert start["geometry"]["modulator_distance"] == pytest.approx(1350e-6, rel=1e-3)
    x, y = record.column("nanogoniometer_x"), record.column("nanogoniometer_y")
    assert np.ptp(x) == pytest.approx(2.0, abs=0.4) and np.ptp(y) == pytest.approx(1.5, abs=0.4)
    assert (np.diff(record.column("eiger_frame")) == 1).all()
    assert (record.column("monitor_flux") > 0).all()
    # what the events say of a frame is what the file holds
    datum = record.all("stream_datum")[3]
    resource = next(r for r in record.all("stream_resource") if r["uid"] == datum["stream_resource"])
    half, (row, column) = WINDOW // 2, (start["window"]["row"], start["window"]["column"])
    with h5py.File(Path(unquote(urlparse(resource["uri"]).path)), "r") as file:
        frame = file["/entry/data/data"][datum["indices"]["start"]]
    good = frame[row - half : row + half, column - half : column + half]
    assert good[good < 2**31].sum() == record.column("eiger_total")[3]


def test_a_rocking_scan_that_is_paused_in_between_misses_no_angle(devices, bragg, record):
    def pause_at_the_fifth(name, doc):
        if name == "event" and doc["seq_num"] == 5:
            threading.Thread(target=record.engine.request_pause, daemon=True).start()

    record.engine.subscribe(pause_at_the_fifth)
    record(retract_modulator(devices))
    plan = rocking_scan(devices, 0.05, 0.005, 0.5, modulator="out", peak_deg=bragg.peak_deg, window=WINDOW)
    with pytest.raises(RunEngineInterrupted):
        record(plan)
    assert not devices.shutter.is_open, "a pause closes the shutter"
    result = record.engine.resume().plan_result
    angles = record.column(devices.diffractometer.rock.name) - bragg.peak_deg
    assert angles == pytest.approx(np.linspace(-0.05, 0.05, 21), abs=5e-4)
    counts = record.column("eiger_total")
    assert abs(int(np.argmax(counts)) - 10) <= 2, "the shutter was open again"
    assert counts.min() > 0 and result.points == 21
    assert record.all("start")[-1]["geometry"]["modulator_distance"] == 0
    assert record.all("stop")[-1]["exit_status"] == "success"


def test_an_aborted_scan_leaves_everything_safe(devices, bragg, record):
    def abort_at_the_third(name, doc):
        if name == "event" and doc["seq_num"] == 3:
            threading.Thread(target=record.engine.request_pause, daemon=True).start()

    record.engine.subscribe(abort_at_the_third)
    plan = rocking_scan(devices, 0.05, 0.005, 0.2, modulator="out", peak_deg=bragg.peak_deg, window=WINDOW)
    with pytest.raises(RunEngineInterrupted):
        record(plan)
    record.engine.abort("enough")
    assert record.all("stop")[-1]["exit_status"] == "abort"
    assert not devices.shutter.is_open  # and disarmed: the fixture looks


def test_sharpness_over_channel_access_finds_the_hidden_tilts(devices, hidden, bragg, record):
    """Its accuracy over many seeds is in ``benchmarks/alignment.py``, the whole plan in ``tests/plans``."""
    record(bps.mv(devices.diffractometer.rock, bragg.peak_deg))  # a scan was aborted before
    record(insert_modulator(devices))
    result = record(align_modulator(devices, points=13, positions=6, pattern_um=None, window=WINDOW))
    for tilt in ("mchi", "mphi"):
        found, error = getattr(result, f"{tilt}_deg"), getattr(result, f"{tilt}_error_deg")
        assert error < 0.4 and abs(found - getattr(hidden, f"{tilt}_deg")) < 4 * error
        assert getattr(devices.nanogoniometer, tilt).position == pytest.approx(found, abs=0.002)


def test_a_scan_that_was_aborted_resumes_from_its_documents(devices, bragg, record, tmp_path):
    log = DocumentLog(tmp_path)
    record.engine.subscribe(log)

    def stop_at_the_seventh(name, doc):
        if name == "event" and doc["seq_num"] == 7:
            threading.Thread(target=record.engine.request_pause, daemon=True).start()

    token = record.engine.subscribe(stop_at_the_seventh)
    plan = rocking_scan(
        devices, 0.02, 0.005, 0.2, modulator="out", peak_deg=bragg.peak_deg, sentinel_every=4, window=WINDOW
    )
    with pytest.raises(RunEngineInterrupted):
        record(plan)
    record.engine.abort("beam lost")
    record.engine.unsubscribe(token)
    first = record.all("start")[-1]
    session = SimpleNamespace(log=log, devices=devices)
    result = record(Session.resume(session, first["uid"][:8]))
    start = record.all("start")[-1]
    assert start["continues"] == first["uid"] and start["uid"] == result.uid
    points = [doc["data"] for doc in record.all("event") if not doc["data"]["sentinel"]]
    angles = np.array([point[devices.diffractometer.rock.name] for point in points]) - bragg.peak_deg
    assert angles == pytest.approx(np.linspace(-0.02, 0.02, 9), abs=5e-4), "each angle once"
    with pytest.raises(ConfigError, match="all its 9 points"):
        Session.resume(session, result.uid)


def test_a_scan_waits_for_the_ring_and_misses_nothing(devices, bragg, record, simulated_beamline):
    dump = epics.PV(f"{simulated_beamline.beamline.prefix}Sim:Beam:Dump")
    lost = []

    def lose_the_beam(name, doc):
        if name == "event" and doc["seq_num"] == 4 and not lost:
            lost.append(True)
            dump.put(1)
            threading.Timer(1.5, dump.put, (0,)).start()

    config = devices.beamline.suspend.model_copy(update={"settle_s": 0.2})
    beamline = devices.beamline.model_copy(update={"suspend": config})
    for suspender in make_suspenders(dataclasses.replace(devices, beamline=beamline)):
        record.engine.install_suspender(suspender)
    record.engine.subscribe(lose_the_beam)
    peak = bragg.peak_deg
    try:
        result = record(rocking_scan(devices, 0.02, 0.005, 0.3, "out", peak_deg=peak, window=WINDOW))
    finally:
        dump.put(0, wait=True)
        record.engine.clear_suspenders()
    assert result.points == 9 and record.all("stop")[-1]["exit_status"] == "success"
    times = np.array([doc["time"] for doc in record.all("event")])
    assert np.diff(times).max() > 1.5, "it waited"
    angles = record.column(devices.diffractometer.rock.name) - peak
    assert angles == pytest.approx(np.linspace(-0.02, 0.02, 9), abs=5e-4)
    assert record.column("eiger_total").min() > 100, "no frame was taken behind a closed shutter"


@pytest.mark.parametrize("modulator", ["in", "out"])
def test_a_rehearsal_is_exact_in_time(devices, bragg, record, simulated_beamline, modulator):
    """In the beamline's own time, which the computer's speed and its other work do not change."""
    clock = epics.PV(f"{simulated_beamline.beamline.prefix}Sim:Time")
    start = {f"nanogoniometer_{axis}": value for axis, value in devices.nanogoniometer.where().items()}
    start[devices.diffractometer.rock.name] = devices.diffractometer.rock.position
    arguments = {
        "half_range_deg": 0.05,
        "step_deg": 0.01,
        "exposure_s": 0.8,
        "modulator": modulator,
        "peak_deg": bragg.peak_deg,
        "sentinel_every": 5,
        "window": WINDOW,
    }
    told = dry_run(rocking_scan, devices.beamline, start=start, **arguments)
    assert told.problems == ()
    began = clock.get(use_monitor=False)
    record(rocking_scan(devices, **arguments))
    took = clock.get(use_monitor=False) - began
    assert took > 8.0, "exposures and the way of the modulator"
    assert told.duration_s - told.overhead_s == pytest.approx(took, rel=0.1)


def test_a_modulator_whose_pattern_is_not_in_the_beam_is_not_turned(devices, bragg, record):
    record(insert_modulator(devices))
    nano = devices.nanogoniometer
    nano.x.set(nano.x.position + 120.0).wait(10)
    before = nano.where()
    with pytest.raises(PoorFit, match="sharpness"):
        record(align_modulator(devices, points=7, positions=1, pattern_um=None, window=WINDOW))
    for axis, value in nano.where().items():
        assert value == pytest.approx(before[axis], abs=0.5), axis
    record(retract_modulator(devices))
