"""Flights of the detector, doubts about frames, and what makes the beam, over Channel Access."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.parse import unquote, urlparse

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import epics
import h5py
import pytest
from bluesky import RunEngine
from event_model import DocumentNames, schema_validators
from ophyd.utils import LimitError

from bcmi_beamline.devices import EigerError, EigerPlan, connect, make_devices, nominal_setting
from bcmi_beamline.plans._stubs import take_series

pytestmark = pytest.mark.ioc


@pytest.fixture(scope="module")
def devices(simulated_beamline):
    return connect(make_devices(simulated_beamline.beamline), timeout=20.0)


@pytest.fixture
def beam_on(devices):
    devices.shutter.set("open").wait(5)
    yield
    devices.shutter.set("closed").wait(5)


@pytest.fixture
def three_per_file(devices):
    images = devices.eiger.cam.fw_images_per_file
    before = images.get()
    images.set(3).wait(5)
    yield
    images.set(before).wait(5)


def run(plan):
    documents = []
    engine = RunEngine({}, call_returns_result=True)

    def record(name, doc):
        schema_validators[DocumentNames[name]].validate(doc)
        documents.append((name, doc))

    engine.subscribe(record)
    result = engine(plan).plan_result
    return result, documents


def flight(devices, plan, meanwhile=None):
    yield from bps.prepare(devices.eiger, plan, wait=True)

    counts = []

    @bpp.stage_decorator([devices.eiger])
    @bpp.run_decorator()
    def inner():
        counts.append((yield from take_series(devices, meanwhile)))

    yield from inner()
    return counts[0]


def frames_of(documents):
    """Every frame told, in the order told, with its sequence number."""
    resources = {doc["uid"]: doc for name, doc in documents if name == "stream_resource"}
    told = []
    for doc in (doc for name, doc in documents if name == "stream_datum"):
        resource = resources[doc["stream_resource"]]
        with h5py.File(Path(unquote(urlparse(resource["uri"]).path))) as file:
            data = file[resource["parameters"]["dataset"]]
            span = range(doc["indices"]["start"], doc["indices"]["stop"])
            numbers = range(doc["seq_nums"]["start"], doc["seq_nums"]["stop"])
            told += [
                (number, int(data[row].min()), resource["uri"][-9:])
                for row, number in zip(span, numbers, strict=True)
            ]
    return told


def settings_of(devices):
    cam = devices.eiger.cam
    changing = ("state", "armed", "sequence_id", "num_captured", "acquire", "trigger_button")
    names = (name for name in cam.component_names if name not in changing)
    return {name: getattr(cam, name).get() for name in names}


@pytest.mark.parametrize("exposure_s", [0.005, 20.0])
def test_staging_is_undone_whether_exposures_grow_or_shrink(devices, exposure_s):
    before = settings_of(devices)
    devices.eiger.prepare(EigerPlan(frames=1, exposure_s=exposure_s)).wait(10)
    devices.eiger.stage()
    bits = int(devices.eiger.cam.bit_depth.get())
    assert devices.eiger.describe()[devices.eiger.image_key]["dtype_numpy"] == f"<u{bits // 8}"
    assert bits == (16 if exposure_s < 0.02 else 32)
    devices.eiger.unstage()
    assert settings_of(devices) == before


def test_stopping_an_armed_detector_disarms_it(devices):
    devices.eiger.prepare(EigerPlan(frames=3, exposure_s=0.1)).wait(10)
    devices.eiger.stage()
    assert devices.eiger.cam.armed.get() == 1
    devices.eiger.stop()
    assert devices.eiger.cam.armed.get() == 0
    devices.eiger.unstage()


def test_a_burst_is_one_trigger_and_every_frame_is_told_once(devices, three_per_file, beam_on):
    before = settings_of(devices)
    plan = EigerPlan(frames=8, exposure_s=0.05, period_s=0.08, mode="burst", window=64)
    count, documents = run(flight(devices, plan))
    told = frames_of(documents)
    assert count == 8 and [number for number, *_ in told] == list(range(1, 9))
    assert [file for *_, file in told] == ["000001.h5"] * 3 + ["000002.h5"] * 3 + ["000003.h5"] * 2
    assert documents[-1][1]["num_events"] == {"primary": 8}
    assert settings_of(devices) == before, "it is left as it was found"


def test_external_triggers_are_waited_for(devices, beam_on, simulated_beamline):
    prefix = simulated_beamline.beamline.prefix
    pulse = epics.PV(f"{prefix}Sim:ExternalTrigger")

    def pulses():
        for taken in range(4):
            pulse.put(1)
            while devices.eiger.cam.num_captured.get() <= taken:
                yield from bps.sleep(0.02)

    before = settings_of(devices)
    plan = EigerPlan(frames=4, exposure_s=0.02, mode="external", window=64)
    count, documents = run(flight(devices, plan, pulses()))
    assert count == 4 and [number for number, *_ in frames_of(documents)] == [1, 2, 3, 4]
    assert settings_of(devices) == before


def test_a_flight_is_not_triggered_and_a_step_scan_not_kicked_off(devices):
    eiger = devices.eiger
    for mode, wrong in (("burst", eiger.trigger), ("step", eiger.kickoff)):
        eiger.prepare(EigerPlan(frames=2, exposure_s=0.01, mode=mode, window=64)).wait(5)
        eiger.stage()
        try:
            with pytest.raises(EigerError, match=r"kick it off|mode 'burst'"):
                wrong()
        finally:
            eiger.unstage()
    with pytest.raises(ValueError, match="mode"):
        EigerPlan(mode="sideways")  # pyright: ignore[reportArgumentType]


def test_a_saturated_frame_is_marked_and_warned_of_once(devices, beam_on, caplog, monkeypatch):
    rock = devices.diffractometer.rock
    rock.set(17.721).wait(10)

    def plan():
        yield from bps.prepare(devices.eiger, EigerPlan(frames=2, exposure_s=1.0, window=64), wait=True)

        @bpp.stage_decorator([devices.eiger])
        @bpp.run_decorator()
        def inner():
            for _ in range(2):
                yield from bps.trigger_and_read([devices.eiger])

        yield from inner()

    cutoff = devices.eiger.cam.count_cutoff
    monkeypatch.setattr(cutoff, "get", lambda **kwargs: 50)
    with caplog.at_level(logging.WARNING, "bcmi_beamline.devices.eiger"):
        _, documents = run(plan())
    events = [doc["data"] for name, doc in documents if name == "event"]
    assert [event["eiger_warning"] for event in events] == [2, 2]
    assert all(event["eiger_saturated"] > 0 for event in events)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "pixels saturated (cutoff 50 in 1 s): put in a filter" in warnings[0]


# -- what makes the beam --------------------------------------------------------------------------------
def test_filters_give_the_transmission_asked_for(devices, beam_on):
    filters = devices.filters
    try:
        filters.transmission.set(0.05).wait(10)
        # Al absorbs 97 to 102 /cm at 9 keV (tables differ): 300 um let 0.047 to 0.055 through, 280 um 0.06
        assert filters.inserted() == ("al_20", "al_40", "al_80", "al_160")
        assert 0.045 < filters.transmission.get() < 0.057
        assert filters.read()["filters_transmission"]["value"] == filters.transmission.get()
        with pytest.raises(LimitError, match=r"within \(0, 1\]"):
            filters.transmission.set(0.0)
    finally:
        filters.transmission.set(1.0).wait(10)
    assert filters.inserted() == () and filters.transmission.get() == 1.0


def test_the_bragg_setting_follows_the_energy(devices):
    huber = devices.diffractometer
    try:
        devices.energy.set(9.05).wait(30)
        there = nominal_setting(devices.beamline, 9050.0)
        assert huber.nominal_deg == pytest.approx(there, abs=1e-3)
        assert there["nu"] == pytest.approx(35.404 - 0.204, abs=0.005)
    finally:
        devices.energy.set(9.0).wait(30)


def test_slits_lenses_and_temperatures_are_there(devices):
    assert devices.slits.are_nominal()
    devices.slits.horizontal.set(100.0).wait(10)
    assert not devices.slits.are_nominal()
    devices.slits.horizontal.set(140.0).wait(10)
    devices.focus.set(0.5).wait(10)
    devices.focus.set(0.0).wait(10)
    readings = devices.temperatures.read()
    assert set(readings) == {f"temperatures_{name}" for name in devices.beamline.temperatures}
    names = {device.name for device in devices.conditions()}
    assert names == {"ring_current", "energy", "slits", "focus", "filters", "temperatures"}
