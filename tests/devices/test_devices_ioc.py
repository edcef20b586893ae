"""The devices over Channel Access, against the simulated beamline."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote, urlparse

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import h5py
import numpy as np
import pytest
from bluesky import RunEngine
from bluesky.utils import FailedStatus
from event_model import DocumentNames, schema_validators
from ophyd.utils import LimitError

from bcmi_beamline.devices import (
    EigerError,
    EigerPlan,
    MoveError,
    MoveTimeout,
    NotConnectedError,
    connect,
    make_devices,
)

pytestmark = pytest.mark.ioc


@pytest.fixture(scope="module")
def devices(simulated_beamline):
    return connect(make_devices(simulated_beamline.beamline), timeout=20.0)


@pytest.fixture
def run_engine():
    engine = RunEngine({})
    yield engine
    if engine.state != "idle":
        engine.abort()


@pytest.fixture
def slow_z(devices):
    """The nanogoniometer's z at a speed that leaves time to interfere, back at "park" afterwards."""
    z = devices.nanogoniometer.z
    z.velocity.set(20.0).wait(5)
    yield z
    z.velocity.set(z.axis.velocity).wait(5)
    z.set(devices.nanogoniometer.place("park")["z"]).wait(20)


# -- connecting ---------------------------------------------------------------------------------------
def test_one_error_names_every_process_variable_that_does_not_answer(simulated_beamline, devices):
    wrong = make_devices(simulated_beamline.beamline, prefix="NOWHERE:")
    with pytest.raises(NotConnectedError) as caught:
        connect(wrong, timeout=0.3)
    first, *groups = str(caught.value).splitlines()
    assert f"of {simulated_beamline.beamline.name} did not answer within 0.3 s" in first
    assert {line.split(":")[0].strip() for line in groups} == {device.name for device in wrong.all()}
    for pv in ("NOWHERE:huber:phi (", "NOWHERE:eiger:cam1:NumTriggers_RBV", "NOWHERE:ring:current"):
        assert pv in str(caught.value)


# -- motion -------------------------------------------------------------------------------------------
def test_four_hundred_moves_back_to_back_all_end(devices):
    x = devices.sample_stage.x
    for i in range(400):
        target = 0.5 * (-1) ** i
        x.set(target).wait(5)
        assert x.user_readback.get() == pytest.approx(target, abs=x.axis.tolerance)
    x.set(0.0).wait(5)


def test_a_move_to_where_it_stands_ends(devices):
    y = devices.sample_stage.y
    before = y.position
    y.set(before).wait(5)
    assert y.position == before


def test_a_stopped_move_fails_and_says_where_it_is(slow_z):
    status = slow_z.set(11000.0)
    time.sleep(0.3)
    slow_z.stop()
    with pytest.raises(MoveError, match=r"nanogoniometer_z: at 11\d+\.?\d* um, sent to 11000 um: stopped"):
        status.wait(5)


def test_a_move_after_a_stop_is_not_taken_for_the_one_that_was_stopped(slow_z):
    for success in (False, True):
        first = slow_z.set(11000.0)
        time.sleep(0.1)
        slow_z.stop(success=success)
        slow_z.velocity.put(slow_z.axis.velocity)
        second = slow_z.set(11500.0)
        second.wait(5)
        assert slow_z.position == pytest.approx(11500.0, abs=0.5)
        assert first.done and first.success is success
        slow_z.velocity.set(20.0).wait(5)


def test_a_move_that_takes_too_long_is_stopped(slow_z):
    status = slow_z.set(11000.0, timeout=0.2)
    with pytest.raises(
        MoveTimeout, match=r"nanogoniometer_z: at 11\d+\.?\d* um, sent to 11000 um: stopped after 0.2 s"
    ):
        status.wait(5)
    time.sleep(0.2)
    assert not slow_z.moving
    assert 11000.0 < slow_z.position < 12000.0


def test_an_overtaken_move_fails_and_the_later_one_arrives(slow_z):
    first = slow_z.set(10000.0)
    time.sleep(0.1)
    slow_z.velocity.put(slow_z.axis.velocity)
    second = slow_z.set(11900.0)
    with pytest.raises(MoveError, match="sent to 11900 before it reached 10000"):
        first.wait(5)
    second.wait(5)


def test_limits_hold_in_the_client_and_in_the_record(devices, monkeypatch):
    x = devices.sample_stage.x
    with pytest.raises(LimitError, match=r"sample_stage_x: 51 um lies outside \[-50, 50\]"):
        x.set(51.0)
    before = x.position
    monkeypatch.setattr(x, "check_value", lambda value: None)
    with pytest.raises(MoveError, match="sent to 51 um: the record refused to move"):
        x.set(51.0).wait(5)
    assert x.position == pytest.approx(before, abs=x.axis.tolerance)
    monkeypatch.undo()
    x.set(1.0).wait(5)
    x.set(0.0).wait(5)


def test_a_narrower_limit_of_the_record_is_the_limit(devices):
    x = devices.sample_stage.x
    x.high_limit_travel.set(10.0).wait(5)
    try:
        assert x.limits == (-50.0, 10.0)
        with pytest.raises(LimitError, match="outside"):
            x.set(11.0)
    finally:
        x.high_limit_travel.set(50.0).wait(5)


def test_in_and_out_again_the_safe_way(devices, run_engine):
    nano = devices.nanogoniometer

    def there_and_back():
        for place in ("in", "park"):
            for step in nano.move_order(place):
                yield from bps.mv(*step)
            assert nano.is_in() is (place == "in")
            assert nano.is_out() is (place == "park")

    run_engine(there_and_back())
    assert "out" in repr(nano) and ", 12000]" in repr(nano.z)


def test_a_guard_stops_a_plan_before_anything_moves(devices, run_engine):
    nano = devices.nanogoniometer
    with pytest.raises(LimitError, match="inside the stand-off"):
        run_engine(bps.mv(nano.mchi, -8.0, nano.z, 1000.0))
    nano.mchi.set(0.0).wait(10)
    nano.z.set(12000.0).wait(10)


# -- beam ---------------------------------------------------------------------------------------------
def test_shutter_and_monitors(devices):
    shutter = devices.shutter
    for value, is_open in (("open", True), (0, False), (True, True), ("closed", False)):
        shutter.set(value).wait(5)
        assert shutter.is_open is is_open
    assert list(shutter.read()) == ["shutter"]
    assert devices.monitor.read()["monitor_flux"]["value"] > 0
    assert devices.ring_current.read()["ring_current"]["value"] > 0
    with pytest.raises(ValueError, match="'open' or 'closed'"):
        shutter.set("ajar")


# -- the Eiger ----------------------------------------------------------------------------------------
class Record:
    """Documents of one run, each checked against its schema."""

    def __init__(self):
        self.documents = defaultdict(list)

    def __call__(self, name, document):
        schema_validators[DocumentNames[name]].validate(document)
        self.documents[name].append(document)

    def __getitem__(self, name):
        return self.documents[name]


def expose(devices, points, plan):
    eiger = devices.eiger
    yield from bps.prepare(eiger, plan, wait=True)

    @bpp.stage_decorator([eiger])
    @bpp.run_decorator()
    def inner():
        for _ in range(points):
            yield from bps.trigger_and_read([eiger, devices.monitor])

    return (yield from inner())


@pytest.fixture
def three_per_file(devices):
    images = devices.eiger.cam.fw_images_per_file
    before = images.get()
    images.set(3).wait(5)
    yield
    images.set(before).wait(5)


@pytest.fixture
def beam_on(devices):
    devices.shutter.set("open").wait(5)
    yield
    devices.shutter.set("closed").wait(5)


def path_of(resource) -> Path:
    return Path(unquote(urlparse(resource["uri"]).path))


def test_a_run_is_announced_file_by_file(devices, run_engine, three_per_file, beam_on):
    eiger, record = devices.eiger, Record()
    settings = (
        "acquire_time",
        "num_triggers",
        "manual_trigger",
        "trigger_mode",
        "fw_name_pattern",
        "file_path",
    )
    before = {name: getattr(eiger.cam, name).get() for name in settings}
    sequence = eiger.cam.sequence_id.get()
    run_engine(expose(devices, 7, EigerPlan(frames=7, exposure_s=0.25, window=128)), record)

    resources = record["stream_resource"]
    assert [path_of(r).stem.rsplit("_", 1)[1] for r in resources] == ["000001", "000002", "000003"]
    assert {r["data_key"] for r in resources} == {"eiger_image"}
    order = {r["uid"]: n for n, r in enumerate(resources)}
    told = [
        (order[d["stream_resource"]], d["indices"]["start"], d["indices"]["stop"])
        for d in record["stream_datum"]
    ]
    assert told == [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 2), (1, 2, 3), (2, 0, 1)]
    assert [d["seq_nums"]["start"] for d in record["stream_datum"]] == list(range(1, 8))
    assert eiger.cam.sequence_id.get() == sequence + 1
    assert {name: getattr(eiger.cam, name).get() for name in settings} == before
    assert not eiger.cam.armed.get()

    key = record["descriptor"][0]["data_keys"]["eiger_image"]
    assert key["shape"] == [2164, 1030] and key["dtype_numpy"] == "<u4" and key["external"] == "STREAM:"
    frames = []
    for resource in resources:
        assert resource["parameters"]["chunk_shape"] == (1, 2164, 1030)
        with h5py.File(path_of(resource)) as file:
            frames.extend(file[resource["parameters"]["dataset"]][()])
    rows, columns = eiger.window.slices
    good = ~eiger.config.gap_mask()[rows, columns]
    events = [event["data"] for event in record["event"]]
    assert [data["eiger_frame"] for data in events] == list(range(7))
    for data, frame in zip(events, frames, strict=True):
        assert data["eiger_total"] == np.where(good, frame[rows, columns], 0).sum()
        assert data["eiger_total"] > 1000 and data["eiger_saturated"] == 0
        assert 0 < data["eiger_high_q_x"] < 1
        assert data["monitor_flux"] > 0


def test_more_points_than_planned_arm_again(devices, run_engine):
    record = Record()
    sequence = devices.eiger.cam.sequence_id.get()
    run_engine(expose(devices, 3, EigerPlan(frames=2, exposure_s=0.01, window=64)), record)
    assert devices.eiger.cam.sequence_id.get() == sequence + 2
    assert [data["indices"]["start"] for data in record["stream_datum"]] == [0, 1, 0]
    assert len({path_of(r) for r in record["stream_resource"]}) == 2


def test_a_frame_that_a_pause_orphaned_is_announced_and_the_events_know_theirs(devices, run_engine):
    eiger, record = devices.eiger, Record()

    @bpp.stage_decorator([eiger])
    @bpp.run_decorator()
    def interrupted():
        yield from bps.trigger_and_read([eiger])
        yield from bps.trigger(eiger, group="lost")  # the exposure goes on while the point is taken again
        yield from bps.trigger_and_read([eiger])

    def plan():
        yield from bps.prepare(eiger, EigerPlan(frames=5, exposure_s=0.01, window=64), wait=True)
        yield from interrupted()

    run_engine(plan(), record)
    assert [event["data"]["eiger_frame"] for event in record["event"]] == [0, 2]
    assert [d["indices"]["start"] for d in record["stream_datum"]] == [0, 1, 2]


def test_a_folder_that_is_not_there_is_named_and_the_detector_stays_usable(devices, run_engine, tmp_path):
    plan = EigerPlan(frames=1, exposure_s=0.01, window=64, directory=str(tmp_path / "missing"))
    with pytest.raises(
        EigerError, match=r"did not arm, .*cam1:Armed is not 1 \(state error, FilePath .*missing"
    ):
        run_engine(expose(devices, 1, plan))
    run_engine(expose(devices, 1, EigerPlan(frames=1, exposure_s=0.01, window=64, directory=str(tmp_path))))
    assert list(tmp_path.glob("*_data_000001.h5"))


def test_a_detector_disarmed_by_another_hand_is_noticed(devices, run_engine):
    eiger = devices.eiger

    def plan():
        yield from bps.stage(eiger)
        yield from bps.abs_set(eiger.cam.acquire, 0)
        yield from bps.sleep(0.5)
        yield from bps.trigger(eiger, wait=True)

    with pytest.raises(FailedStatus) as caught:
        run_engine(bpp.finalize_wrapper(plan(), bps.unstage(eiger)))
    assert isinstance(caught.value.__cause__, EigerError)
    assert "cam1:Armed is 0: frame 0 was not taken (state idle)" in str(caught.value.__cause__)


def test_staged_only_once_and_read_only_after_a_frame(devices):
    eiger = devices.eiger
    with pytest.raises(EigerError, match="stage it before triggering"):
        eiger.trigger()
    eiger.prepare(EigerPlan(frames=1, exposure_s=0.01, window=64))
    eiger.stage()
    try:
        with pytest.raises(EigerError, match="no frame yet"):
            eiger.read()
        with pytest.raises(EigerError, match="unstage it before preparing"):
            eiger.prepare(EigerPlan())
    finally:
        eiger.unstage()
    with pytest.raises(ValueError, match="choose a smaller one"):
        eiger.prepare(EigerPlan(window=900))
