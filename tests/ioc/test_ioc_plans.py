"""Plans over Channel Access, on frames that the simulated beamline computes from the pose."""

import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky import plan_stubs as bps
from bluesky.utils import RunEngineInterrupted

from bcmi_beamline.devices import connect, make_devices
from bcmi_beamline.plans import (
    PoorFit,
    align_modulator,
    calibrate_modulator,
    find_bragg_peak,
    insert_modulator,
    retract_modulator,
    rocking_scan,
)

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


def test_alignment_finds_the_hidden_tilts(devices, hidden, bragg, record):
    record(bps.mv(devices.diffractometer.rock, bragg.peak_deg))  # a scan was aborted before
    record(insert_modulator(devices))
    result = record(
        align_modulator(devices, points=19, positions=6, exposure_s=1.0, half_range_deg=5.0, window=WINDOW)
    )
    for tilt in ("mchi", "mphi"):
        found, error = getattr(result, f"{tilt}_deg"), getattr(result, f"{tilt}_error_deg")
        truth = getattr(hidden, f"{tilt}_deg")
        assert error < 0.15
        assert abs(found - truth) < 4 * error and abs(found - truth) < 0.3, tilt
        assert getattr(devices.nanogoniometer, tilt).position == pytest.approx(found, abs=0.002)
        assert abs(result.curves[tilt].fit.angle_deg - truth) < 0.8
    assert result.pattern is not None
    assert result.pattern.width_um == pytest.approx((40.0, 40.0), abs=3.0)


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
