"""The simulated Eiger over Channel Access: arming, triggers, files, errors."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import epics
import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
from ophyd import EigerDetectorCam

pytestmark = pytest.mark.ioc

TIMEOUT_S = 30.0


class Cam:
    """``cam1:`` as a client sees it; enumerations and paths as strings."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._pvs: dict[str, epics.PV] = {}

    def pv(self, name: str) -> epics.PV:
        if name not in self._pvs:
            pv = epics.PV(self.prefix + name, auto_monitor=False, form="native")
            assert pv.wait_for_connection(TIMEOUT_S), pv.pvname
            self._pvs[name] = pv
        return self._pvs[name]

    def __getitem__(self, name: str):
        pv = self.pv(name)
        return pv.get(timeout=TIMEOUT_S, as_string=pv.type.endswith(("enum", "char")))

    def __setitem__(self, name: str, value) -> None:
        self.pv(name).put(value, wait=True, timeout=TIMEOUT_S)

    def set(self, **values) -> None:
        for name, value in values.items():
            self[name] = value

    def arm(self) -> None:
        """Acquire is busy until the series ends, so it is not waited for."""
        self.pv("Acquire").put(1, wait=False)
        self.until("Armed", "Armed")

    def disarm(self) -> None:
        self["Acquire"] = 0
        assert self["Armed"] == "Unarmed"

    def trigger(self) -> None:
        self["Trigger"] = 1

    def until(self, name: str, value) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self[name] != value:
            assert time.monotonic() < deadline, f"{name} is {self[name]}, never became {value}"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def beamline(simulated_beamline):
    return simulated_beamline.beamline


@pytest.fixture(scope="module")
def shared_cam(beamline):
    return Cam(f"{beamline.prefix}{beamline.eiger.prefix}cam1:")


@pytest.fixture
def cam(shared_cam, tmp_path):
    """Disarmed, ready for three triggers of 0.1 s into a folder of its own; put back afterwards."""
    cam = shared_cam
    before = {
        name: cam[name]
        for name in (
            "AcquirePeriod", "AcquireTime", "FWNImagesPerFile", "FWNamePattern", "FilePath", "ManualTrigger",
            "NumTriggers", "PhotonEnergy", "SaveFiles", "TriggerMode", "NumImages", "TriggerExposure",
        )
    }  # fmt: skip
    cam.set(
        TriggerMode="Internal Series", ManualTrigger="Enable", NumImages=1, NumTriggers=3, AcquireTime=0.1,
        AcquirePeriod=0.1, FilePath=str(tmp_path), FWNamePattern="test_$id",
    )  # fmt: skip
    yield cam
    cam.disarm()
    cam.set(**before)


@pytest.fixture
def open_shutter(beamline):
    pv = epics.PV(beamline.prefix + beamline.shutter_pv)
    assert pv.wait_for_connection(TIMEOUT_S)
    pv.put("Open", wait=True)
    yield
    pv.put("Closed", wait=True)


def frames_of(cam: Cam, folder: Path) -> np.ndarray:
    """All frames of the latest series, through its master."""
    with h5py.File(folder / f"test_{cam['SequenceId']}_master.h5") as master:
        data = master["entry/data"]
        return np.concatenate([data[name][()] for name in sorted(data)])


def test_ophyd_finds_all_it_looks_for(beamline, shared_cam):
    cam = EigerDetectorCam(shared_cam.prefix, name="cam")
    cam.wait_for_connection(all_signals=True, timeout=TIMEOUT_S)
    assert cam.size.get() == (beamline.eiger.columns, beamline.eiger.rows)
    assert cam.trigger_mode.enum_strs[1] == "Internal Enable"
    assert cam.photon_energy.get() == beamline.energy_ev


def test_a_trigger_completes_when_its_frame_can_be_read_by_another_process(cam, tmp_path):
    before = cam["SequenceId"]
    cam.arm()
    number = cam["SequenceId"]
    assert number == before + 1
    assert (tmp_path / f"test_{number}_master.h5").exists()
    for count in (1, 2, 3):
        cam.trigger()
        assert cam["NumCaptured_RBV"] == cam["NumImagesCounter_RBV"] == count
        path = Path(cam["FullFileName_RBV"])
        assert path == tmp_path / f"test_{number}_data_000001.h5"
        with h5py.File(path, "r", libver="latest", swmr=True) as file:
            assert file["entry/data/data"].shape[0] == count
            assert file["entry/data/data"][count - 1].shape == (2164, 1030)
    assert cam["Armed"] == "Unarmed"  # the last trigger of the series
    assert (cam["Acquire_RBV"], cam["State_RBV"], cam["SequenceId"]) == ("Done", "idle", number)


def test_frames_count_photons_only_while_the_shutter_is_open(cam, tmp_path, beamline, request):
    cam.arm()
    cam.trigger()
    request.getfixturevalue("open_shutter")
    cam.trigger()
    cam.trigger()
    frames = frames_of(cam, tmp_path)
    assert frames.dtype == np.uint32
    gaps = beamline.eiger.gap_mask()
    assert (frames[:, gaps] == 2**32 - 1).all()
    closed, *opened = np.where(gaps, 0, frames).sum(axis=(1, 2))
    assert all(counts > 100 * max(closed, 1) for counts in opened)
    assert not np.array_equal(frames[1], frames[2])  # counting noise is drawn anew


def test_files_roll_over_and_the_last_stays_short(cam, tmp_path):
    cam.set(FWNImagesPerFile=2, NumTriggers=10)
    cam.arm()
    for number in (1, 1, 2, 2, 3):
        cam.trigger()
        assert cam["FullFileName_RBV"].endswith(f"_data_{number:06d}.h5")
    cam.disarm()
    with h5py.File(tmp_path / f"test_{cam['SequenceId']}_master.h5") as master:
        data = master["entry/data"]
        assert [data[name].shape[0] for name in sorted(data)] == [2, 2, 1]
        assert data["data_000001"].chunks == (1, 2164, 1030)
        assert "32008" in data["data_000001"]._filters  # bitshuffle
        specific = master["entry/instrument/detector/detectorSpecific"]
        assert specific["countrate_correction_count_cutoff"][()] == cam["CountCutoff_RBV"]
        assert specific["pixel_mask"].shape == (2164, 1030)


def test_internal_series_runs_by_itself_and_acquire_completes_with_it(cam, tmp_path):
    cam.set(ManualTrigger="Disable", NumImages=2, NumTriggers=2)
    cam["Acquire"] = 1
    assert (cam["Armed"], cam["NumCaptured_RBV"]) == ("Unarmed", 4)
    assert len(frames_of(cam, tmp_path)) == 4


@pytest.fixture
def source(beamline):
    """The source of external pulses, as a client sees it."""
    source = Cam(f"{beamline.prefix}Sim:ExternalTrigger")
    yield source
    source[":Arm"] = 0
    source[":Width"] = 0.1


@pytest.mark.parametrize(("mode", "images"), [("External Series", 2), ("External Enable", 1)])
def test_external_modes_wait_for_pulses_whatever_manual_trigger_says(cam, tmp_path, source, mode, images):
    cam.set(TriggerMode=mode, ManualTrigger="Disable", NumImages=2, NumTriggers=2)
    assert cam["NumImages_RBV"] == images
    cam.arm()
    cam.trigger()
    assert cam["StatusMessage_RBV"] == f"Trigger ignored: {mode} takes pulses"
    assert cam["NumCaptured_RBV"] == 0
    source[""] = 1
    cam.until("NumCaptured_RBV", images)
    cam.until("State_RBV", "ready")
    source[""] = 1
    cam.until("Armed", "Unarmed")
    assert len(frames_of(cam, tmp_path)) == 2 * images


def test_a_pulse_that_finds_the_detector_busy_or_unarmed_is_missed(cam, source):
    cam.set(TriggerMode="External Series", NumTriggers=3, AcquireTime=300.0)
    source[":Arm"] = 0
    missed = source[":Missed"]
    source[""] = 1
    assert source[":Missed"] == missed + 1
    cam.arm()
    source[""] = 1
    cam.until("State_RBV", "acquire")
    source[""] = 1
    assert source[":Missed"] == missed + 2


def test_in_external_enable_the_pulse_is_the_exposure(cam, tmp_path, source, open_shutter, beamline):
    cam.set(TriggerMode="External Enable", NumTriggers=2, AcquireTime=5.0)
    cam.arm()
    for width in (0.1, 0.4):
        source[":Width"] = width
        source[""] = 1
        cam.until("NumImagesCounter_RBV", 1 if width == 0.1 else 2)
    cam.until("Armed", "Unarmed")
    short, long = np.where(beamline.eiger.gap_mask(), 0, frames_of(cam, tmp_path)).sum(axis=(1, 2))
    assert long / short == pytest.approx(4.0, rel=0.02)


def test_internal_enable_allows_one_image_per_trigger(cam):
    cam["NumImages"] = 5
    cam["TriggerMode"] = "Internal Enable"
    assert cam["NumImages_RBV"] == 1
    cam["NumImages"] = 7
    assert (cam["NumImages"], cam["NumImages_RBV"]) == (1, 1)


def test_continuous_goes_on_until_it_is_stopped(cam, tmp_path):
    cam.set(TriggerMode="Continuous", ManualTrigger="Disable", NumTriggers=1, FWNImagesPerFile=100)
    cam.arm()
    deadline = time.monotonic() + TIMEOUT_S
    while cam["NumCaptured_RBV"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cam.disarm()
    with h5py.File(next(tmp_path.glob("*_data_000001.h5"))) as file:
        assert file["entry/data/data"].shape[0] >= 3


def test_parameters_are_clamped_and_pull_others_along(cam):
    cam["NumTriggers"] = 0
    assert (cam["NumTriggers"], cam["NumTriggers_RBV"]) == (1, 1)
    cam["AcquireTime"] = -3.0
    assert 0 < cam["AcquireTime_RBV"] < 1e-4
    cam["AcquireTime"] = 2.0
    assert cam["AcquirePeriod_RBV"] == 2.0
    assert cam["CountCutoff_RBV"] == 5_000_000
    cam["AcquirePeriod"] = 0.5
    assert cam["AcquirePeriod_RBV"] == 2.0
    cam["AcquireTime"] = float("nan")
    assert cam["AcquireTime_RBV"] == 2.0
    cam["PhotonEnergy"] = 12000.0
    assert cam["ThresholdEnergy_RBV"] == 6000.0
    assert cam["Wavelength_RBV"] == pytest.approx(1.03320, abs=1e-5)


def test_a_trigger_while_disarmed_takes_nothing(cam):
    count = cam["ArrayCounter_RBV"]
    cam.trigger()
    assert cam["StatusMessage_RBV"] == "Trigger ignored: not armed"
    assert cam["ArrayCounter_RBV"] == count


def test_disarming_in_the_middle_drops_the_frame_and_keeps_the_file(cam, tmp_path):
    cam.set(AcquireTime=100.0, NumTriggers=5)
    done = threading.Event()
    cam.arm()
    cam.pv("Trigger").put(1, wait=False, use_complete=True, callback=lambda **_: done.set())
    cam.until("State_RBV", "acquire")
    cam.disarm()
    assert done.wait(TIMEOUT_S)
    assert cam["NumCaptured_RBV"] == 0
    cam.set(AcquireTime=0.1, NumTriggers=1)
    cam.arm()
    cam.trigger()
    assert len(frames_of(cam, tmp_path)) == 1


def test_arming_writes_nothing_over_what_an_earlier_series_left(cam, tmp_path):
    taken = tmp_path / f"test_{cam['SequenceId'] + 1}_master.h5"
    taken.write_bytes(b"precious")
    before = cam["SequenceId"]
    cam.arm()
    assert cam["SequenceId"] == before + 2
    assert taken.read_bytes() == b"precious"


def test_nothing_is_written_with_files_switched_off(cam, tmp_path):
    cam.set(SaveFiles="No", NumTriggers=1)
    cam.arm()
    cam.trigger()
    assert cam["NumImagesCounter_RBV"] == 1
    assert list(tmp_path.iterdir()) == []


# -- errors ---------------------------------------------------------------------------------------
def test_a_folder_that_is_not_there_is_an_error_that_says_so_and_passes(cam, tmp_path):
    cam["FilePath"] = str(tmp_path / "missing")
    assert cam["FilePathExists_RBV"] == "No"
    cam["Acquire"] = 1
    assert (cam["State_RBV"], cam["Armed"], cam["Acquire_RBV"]) == ("error", "Unarmed", "Done")
    assert cam["Error_RBV"] == f"FilePath {tmp_path / 'missing'} is no folder: make it, or set another"
    cam["FilePath"] = str(tmp_path)
    assert cam["FilePathExists_RBV"] == "Yes"
    cam.arm()
    assert (cam["State_RBV"], cam["Error_RBV"]) == ("ready", "")


def test_a_disk_that_fails_in_the_middle_ends_the_series_and_not_the_server(cam, tmp_path):
    cam.set(FWNImagesPerFile=1)
    cam.arm()
    cam.trigger()
    (tmp_path / f"test_{cam['SequenceId']}_data_000002.h5").mkdir()  # where the next file should go
    cam.trigger()
    assert (cam["State_RBV"], cam["Armed"], cam["WriteStatus"]) == ("error", "Unarmed", "Write error")
    assert "data_000002" in cam["Error_RBV"]
    with h5py.File(tmp_path / f"test_{cam['SequenceId']}_data_000001.h5") as file:
        assert file["entry/data/data"].shape[0] == 1


def test_a_long_path_is_not_cut(cam, tmp_path):
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    cam["FilePath"] = str(deep)
    assert cam["FilePath_RBV"] == f"{deep}/"  # areaDetector ends a path with a slash
    cam["NumTriggers"] = 1
    cam.arm()
    cam.trigger()
    assert Path(cam["FullFileName_RBV"]).parent == deep


# -- under load -----------------------------------------------------------------------------------
def _set(event: threading.Event, **_) -> None:
    event.set()


def test_channel_access_answers_while_frames_are_made(cam, beamline, open_shutter):
    pv = epics.PV(f"{beamline.prefix}{beamline.nanogoniometer.y.pv}.RBV", auto_monitor=False, form="native")
    assert pv.wait_for_connection(TIMEOUT_S)
    answers: list[float | None] = []
    cam.set(NumTriggers=20)
    cam.arm()
    for _ in range(20):
        written = threading.Event()
        cam.pv("Trigger").put(1, wait=False, use_complete=True, callback=partial(_set, written))
        while not written.is_set():
            answers.append(pv.get(timeout=5.0, use_monitor=False))  # None: no answer in time
    assert None not in answers
    assert len(answers) > 20
    assert cam["NumCaptured_RBV"] == 20
