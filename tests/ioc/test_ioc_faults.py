"""What goes wrong at a beamline, as a client sees it."""

from __future__ import annotations

import time
from pathlib import Path

import epics
import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
from ophyd import EpicsMotor

pytestmark = pytest.mark.ioc

TIMEOUT_S = 30.0

STALL_BITS, PLUS_SWITCH_BIT = 0x240, 0x4
MAJOR = 2


class Names:
    """Process variables by name, enumerations and paths as strings."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pvs: dict[str, epics.PV] = {}

    def pv(self, name: str) -> epics.PV:
        if name not in self._pvs:
            pv = self._pvs[name] = epics.PV(self._prefix + name, auto_monitor=False, form="native")
            assert pv.wait_for_connection(TIMEOUT_S), pv.pvname
        return self._pvs[name]

    def __getitem__(self, name: str):
        pv = self.pv(name)
        return pv.get(timeout=TIMEOUT_S, as_string=pv.type.endswith(("enum", "char")))

    def __setitem__(self, name: str, value) -> None:
        self.pv(name).put(value, wait=True, timeout=TIMEOUT_S)

    def start(self, name: str, value) -> None:
        self.pv(name).put(value, wait=False)

    def until(self, name: str, value) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self[name] != value:
            assert time.monotonic() < deadline, f"{name} is {self[name]}, never became {value}"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def pvs(simulated_beamline):
    return Names(simulated_beamline.beamline.prefix)


@pytest.fixture
def faults(pvs):
    """Puts every fault that a test has switched on back to off."""
    written = {}

    def put(name: str, value) -> None:
        written.setdefault(name, pvs[name])
        pvs[name] = value

    yield put
    for name, value in written.items():
        pvs[name] = value


# -- motors ---------------------------------------------------------------------------------------
@pytest.fixture
def stage(pvs, simulated_beamline):
    """The nanogoniometer's x at 0 and slow; its speed is given back."""
    pvs["nano:x.VAL"] = 0.0
    pvs["nano:x.VELO"] = 20.0
    yield "nano:x"
    pvs["nano:x.VELO"] = simulated_beamline.beamline.nanogoniometer.x.velocity
    pvs["nano:x.VAL"] = 0.0


def test_a_stalled_motor_stops_short_in_alarm_and_moves_again_when_it_is_free(pvs, faults, stage):
    pvs.start(f"{stage}.VAL", 5000.0)
    pvs.until(f"{stage}.MOVN", 1)
    faults(f"Sim:{stage}:Stall", "On")
    pvs.until(f"{stage}.DMOV", 1)
    assert 0 <= pvs[f"{stage}.RBV"] < 5000
    assert (pvs[f"{stage}.VAL"], pvs[f"{stage}.MISS"]) == (5000, 1)
    assert pvs[f"{stage}.MSTA"] & STALL_BITS == STALL_BITS
    readback = pvs.pv(f"{stage}.RBV")
    readback.get_timevars()
    assert readback.severity == MAJOR
    here = pvs[f"{stage}.RBV"]
    pvs[f"{stage}.VAL"] = 10.0
    assert pvs[f"{stage}.RBV"] == here
    faults(f"Sim:{stage}:Stall", "Off")
    pvs[f"{stage}.VAL"] = 10.0
    assert (pvs[f"{stage}.RBV"], pvs[f"{stage}.MISS"]) == (10, 0)
    assert pvs[f"{stage}.MSTA"] & STALL_BITS == 0


def test_to_ophyd_a_move_of_a_stalled_motor_has_failed(faults, simulated_beamline):
    motor = EpicsMotor(f"{simulated_beamline.beamline.prefix}slits:vcentre", name="motor")
    motor.wait_for_connection(all_signals=True, timeout=TIMEOUT_S)
    faults("Sim:slits:vcentre:Stall", "On")
    status = motor.set(motor.position + 200.0)
    with pytest.raises(Exception, match="motor"):
        status.wait(TIMEOUT_S)
    assert not status.success


def test_lost_steps_end_a_move_short_after_all_retries(pvs, faults, stage):
    faults(f"Sim:{stage}:LostSteps", 0.5)
    pvs[f"{stage}.VAL"] = 10.0
    assert pvs[f"{stage}.RBV"] == pytest.approx(9.5, abs=1e-9)
    assert (pvs[f"{stage}.MISS"], pvs[f"{stage}.RCNT"]) == (1, pvs[f"{stage}.RTRY"])
    assert (pvs[f"{stage}.VAL"], pvs[f"{stage}.DIFF"]) == (10.0, pytest.approx(0.5))
    assert pvs[f"{stage}.MSTA"] & STALL_BITS == 0  # nothing but the encoder tells
    faults(f"Sim:{stage}:LostSteps", 0.0)
    pvs[f"{stage}.VAL"] = 10.0
    assert (pvs[f"{stage}.RBV"], pvs[f"{stage}.MISS"]) == (10.0, 0)


def test_a_retry_mends_what_one_start_has_lost(pvs, faults, stage):
    pvs.start(f"{stage}.VAL", 5000.0)
    pvs.until(f"{stage}.MOVN", 1)
    faults(f"Sim:{stage}:LostSteps", 0.5)
    pvs.start(f"{stage}.VAL", pvs[f"{stage}.RBV"] + 20.0)
    faults(f"Sim:{stage}:LostSteps", 0.0)
    pvs.until(f"{stage}.DMOV", 1)
    assert (pvs[f"{stage}.RBV"], pvs[f"{stage}.MISS"]) == (pvs[f"{stage}.VAL"], 0)
    assert pvs[f"{stage}.RCNT"] >= 1  # one more where the first retry is faster than the mend of the fault


def test_a_limit_switch_stops_its_direction_and_lets_the_other(pvs, faults, stage):
    pvs.start(f"{stage}.VAL", 5000.0)
    pvs.until(f"{stage}.MOVN", 1)
    faults(f"Sim:{stage}:LimitSwitch", "High")
    pvs.until(f"{stage}.DMOV", 1)
    here = pvs[f"{stage}.RBV"]
    assert here < 5000
    assert (pvs[f"{stage}.HLS"], pvs[f"{stage}.LLS"], pvs[f"{stage}.LVIO"]) == (1, 0, 0)
    assert pvs[f"{stage}.MSTA"] & PLUS_SWITCH_BIT
    pvs[f"{stage}.VAL"] = here + 10
    assert pvs[f"{stage}.RBV"] == here
    pvs[f"{stage}.VAL"] = here - 10
    assert (pvs[f"{stage}.RBV"], pvs[f"{stage}.HLS"]) == (here - 10, 0)


# -- detector -------------------------------------------------------------------------------------
CAM = "eiger:cam1:"


class Cam:
    """The Eiger under the names of its driver."""

    def __init__(self, pvs: Names, folder: Path) -> None:
        self.pvs = pvs
        self.folder = folder

    def __getitem__(self, name: str):
        return self.pvs[CAM + name]

    def set(self, **values) -> None:
        for name, value in values.items():
            self.pvs[CAM + name] = value

    def arm(self) -> None:
        self.pvs.start(f"{CAM}Acquire", 1)
        self.pvs.until(f"{CAM}Armed", "Armed")

    def trigger(self) -> None:
        self.pvs[f"{CAM}Trigger"] = 1

    def frames(self) -> np.ndarray:
        """All of the latest series, through its master."""
        with h5py.File(self.folder / f"fault_{self['SequenceId']}_master.h5") as master:
            data = master["entry/data"]
            return np.concatenate([data[name][()] for name in sorted(data)])


@pytest.fixture
def cam(pvs, tmp_path):
    """Ready for four triggers of 0.1 s into a folder of its own; put back afterwards."""
    names = ("AcquireTime", "AcquirePeriod", "FWNamePattern", "FilePath", "ManualTrigger", "NumTriggers",
             "NumImages", "TriggerMode")  # fmt: skip
    cam = Cam(pvs, tmp_path)
    before = {name: cam[name] for name in names}
    cam.set(
        TriggerMode="Internal Series", ManualTrigger="Enable", NumImages=1, NumTriggers=4, AcquireTime=0.1,
        AcquirePeriod=0.1, FilePath=str(tmp_path), FWNamePattern="fault_$id",
    )  # fmt: skip
    yield cam
    cam.set(Acquire=0, **before)


def test_a_detector_in_error_ends_the_series_and_refuses_the_next(cam, faults):
    cam.arm()
    cam.trigger()
    faults("Sim:Detector:Error", "On")
    assert (cam["State_RBV"], cam["Armed"], cam["Acquire_RBV"]) == ("error", "Unarmed", "Done")
    assert cam["Error_RBV"] == "the detector control unit does not answer"
    assert len(cam.frames()) == 1
    cam.set(Acquire=1)
    assert (cam["State_RBV"], cam["Armed"]) == ("error", "Unarmed")
    faults("Sim:Detector:Error", "Off")
    cam.arm()
    assert (cam["State_RBV"], cam["Error_RBV"]) == ("ready", "")


def test_a_camera_that_is_killed_loses_no_frame_and_comes_back(cam, faults):
    cam.arm()
    cam.trigger()
    cam.trigger()
    cam.pvs["Sim:Detector:Crash"] = 1
    cam.pvs.until(f"{CAM}Armed", "Unarmed")
    assert cam["State_RBV"] == "error"
    assert cam["Error_RBV"] == "the process that makes the frames stopped (killed by signal 9)"
    assert cam.frames().shape == (2, 2164, 1030)
    cam.arm()
    cam.trigger()
    assert (cam["State_RBV"], cam["NumCaptured_RBV"]) == ("ready", 1)


def test_a_dropped_frame_is_in_no_file_and_no_counter(cam, faults):
    cam.arm()
    faults("Sim:Detector:DropFrames", 2)
    for expected in (0, 0, 1, 2):
        cam.trigger()
        assert cam["NumCaptured_RBV"] == cam["NumImagesCounter_RBV"] == expected
    assert cam.pvs["Sim:Detector:DropFrames"] == 0
    assert (cam["Armed"], cam["State_RBV"]) == ("Unarmed", "idle")
    assert len(cam.frames()) == 2


def test_a_late_frame_keeps_its_trigger_waiting(cam, faults):
    faults("Sim:Detector:Late", 7.0)
    cam.arm()
    began = cam.pvs["Sim:Time"]
    cam.trigger()
    assert cam.pvs["Sim:Time"] - began == pytest.approx(7.1, abs=1e-6)
    assert cam["NumCaptured_RBV"] == 1


def test_a_full_disk_ends_the_series_and_keeps_what_is_written(cam, faults):
    cam.arm()
    cam.trigger()
    faults("Sim:Disk:Full", "On")
    cam.trigger()
    assert (cam["State_RBV"], cam["Armed"], cam["WriteStatus"]) == ("error", "Unarmed", "Write error")
    assert "No space left on device" in cam["Error_RBV"]
    assert len(cam.frames()) == 1
    faults("Sim:Disk:Full", "Off")
    cam.arm()
    cam.trigger()
    assert (cam["State_RBV"], cam["WriteStatus"]) == ("ready", "Write OK")


# -- shutter and ring -----------------------------------------------------------------------------
def test_a_stuck_shutter_takes_the_command_and_stays(pvs, faults):
    faults("Sim:Shutter:Stuck", "On")
    pvs["shutter:open"] = "Open"
    assert pvs["shutter:open"] == "Closed"
    faults("Sim:Shutter:Stuck", "Off")
    pvs["shutter:open"] = "Open"
    assert pvs["shutter:open"] == "Open"
    pvs["shutter:open"] = "Closed"


def test_a_beam_dump_takes_current_flux_and_photons_and_gives_them_back(cam, faults, simulated_beamline):
    pvs = cam.pvs
    current, flux = pvs["ring:current"], pvs["monitor:flux"]
    assert current > 0 and flux > 0
    pvs["shutter:open"] = "Open"
    cam.arm()
    cam.trigger()
    faults("Sim:Beam:Dump", "On")
    assert (pvs["ring:current"], pvs["monitor:flux"]) == (0, 0)
    cam.trigger()
    faults("Sim:Beam:Dump", "Off")
    assert pvs["ring:current"] == pytest.approx(current, rel=0.05)
    assert pvs["monitor:flux"] == pytest.approx(flux, rel=0.05)
    cam.trigger()
    cam.trigger()
    pvs["shutter:open"] = "Closed"
    gaps = simulated_beamline.beamline.eiger.gap_mask()
    before, during, after, _ = np.where(gaps, 0, cam.frames()).sum(axis=(1, 2))
    assert during < 0.01 * min(before, after)


# -- the IOC itself -------------------------------------------------------------------------------
def test_a_slow_ioc_answers_late_and_recovers(pvs, faults):
    faults("Sim:IOC:Slow", 0.3)
    slowest = 0.0
    for _ in range(100):  # more than are answered between two pauses
        began = time.monotonic()
        assert pvs["huber:phi.RBV"] is not None
        slowest = max(slowest, time.monotonic() - began)
        if slowest > 0.15:
            break
    assert slowest > 0.15
    faults("Sim:IOC:Slow", 0.0)
    assert pvs["Sim:IOC:Slow"] == 0.0
