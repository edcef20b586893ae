"""The Eiger as its areaDetector driver shows it: armed, triggered, its frames on disk."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caproto import SkipWrite
from caproto.server import PVGroup

from bcmi_beamline.config import Beamline
from bcmi_beamline.geometry import HC_EV_M
from bcmi_beamline.sim.ioc.camera import Camera, CameraLost
from bcmi_beamline.sim.ioc.clock import Activity, Clock
from bcmi_beamline.sim.ioc.faults import Faults
from bcmi_beamline.sim.ioc.records import cam_records
from bcmi_beamline.sim.ioc.series import SeriesSettings, Stored

log = logging.getLogger(__name__)

LIMITS: dict[str, tuple[float, float]] = {
    "AcquireTime": (1e-5, 3600.0),
    "AcquirePeriod": (1e-5, 3600.0),
    "NumImages": (1, 1_000_000),
    "NumTriggers": (1, 1_000_000),
    "FWNImagesPerFile": (1, 100_000),
    "PhotonEnergy": (4000.0, 40000.0),
    "ThresholdEnergy": (2700.0, 30000.0),
    "TriggerExposure": (0.0, 3600.0),
}
"""What is written beyond these is clamped."""

NO_ANSWER = "the detector control unit does not answer"

_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class _Arming:
    """What a series was armed for; settings written later wait for the next."""

    mode: str
    images: int
    triggers: float
    exposure_s: float
    period_s: float
    files: tuple[Path, SeriesSettings] | None


class Eiger:
    """``cam1:`` of the simulated Eiger.

    Acquire arms and stays busy until the series ends. A series ends after its last trigger, or when Acquire
    is set to 0, which drops the frame being exposed. Trigger completes when its frames are on disk:
    FullFileName_RBV then names the file of the last one and NumCaptured_RBV counts those of the series.
    A write that fails ends the series and puts the detector into the state ``error`` until it is armed again;
    so does the end of the process that makes the frames, which is started anew.

    Parameters
    ----------
    beamline : Beamline
    camera : Camera
        Makes the frames and writes them.
    clock : Clock
    pose : callable
        Readings of all axes now.
    data_dir : Path
        FilePath at the start.
    faults : Faults
        What goes wrong.
    """

    def __init__(
        self,
        beamline: Beamline,
        camera: Camera,
        clock: Clock,
        pose: Callable[[], Mapping[str, float]],
        data_dir: Path,
        faults: Faults,
    ) -> None:
        records: PVGroup = cam_records(beamline)(f"{beamline.prefix}{beamline.eiger.prefix}cam1:")
        self.pvdb = records.pvdb
        self._pv: dict[str, Any] = {str(pv.pvspec.name): pv for pv in records.attr_pvdb.values()}
        self._beamline, self._camera, self._clock, self._pose = beamline, camera, clock, pose
        self._data_dir = data_dir
        self._faults = faults
        self._arming: _Arming | None = None
        self._triggers_left = 0.0
        self._frames = 0
        self._exposing = asyncio.Lock()
        self._activity: Activity | None = None
        self._disarmed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        camera.on_lost = lambda lost: self._spawn(self._abort(lost, lost=True))
        self._attach_putters()

    @property
    def frames(self) -> int:
        """Frames taken since the start (or since ArrayCounter was written)."""
        return self._frames

    @property
    def state(self) -> str:
        """State_RBV."""
        return self._value("State_RBV")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- process variables ------------------------------------------------------------------------
    def _attach_putters(self) -> None:
        special = {
            "Acquire": self._on_acquire,
            "Trigger": self._on_trigger,
            "FilePath": self._on_file_path,
            "AcquireTime": self._on_acquire_time,
            "AcquirePeriod": self._on_acquire_period,
            "PhotonEnergy": self._on_photon_energy,
            "Wavelength": self._on_wavelength,
            "NumImages": self._on_num_images,
            "TriggerMode": self._on_trigger_mode,
            "ArrayCounter": self._on_array_counter,
        }
        for name, pv in self._pv.items():
            if f"{name}_RBV" in self._pv:
                pv.putter = self._echoing(name, special.get(name))
        self._pv["Trigger"].putter = self._on_trigger
        self._pv["Acquire"].putter = self._on_acquire

    def _echoing(self, name: str, change: Callable[[Any], Coroutine[Any, Any, Any]] | None):
        """A putter that clamps, lets `change` have its say and shows the outcome in the readback."""

        async def put(pv: Any, value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                value = pv.value
            value = _clamp(name, value)
            if change is not None:
                value = await change(value)
            await self._publish(**{f"{name}_RBV": value})
            return value

        return put

    def _value(self, name: str) -> Any:
        return self._pv[name].value

    async def _publish(self, **values: Any) -> None:
        """Write process variables without running their putters."""
        for name, value in values.items():
            await self._pv[name].write(value, verify_value=False)

    async def _publish_pair(self, name: str, value: Any) -> None:
        await self._publish(**{name: value, f"{name}_RBV": value})

    async def initialise(self) -> None:
        """Publish what the configuration cannot say."""
        await self._publish_pair("FilePath", await self._on_file_path(str(self._data_dir)))
        await self._publish_cutoff(self._value("AcquireTime"))

    async def _publish_cutoff(self, exposure_s: float) -> None:
        """What follows from the exposure: bits of a pixel and the counts at which it saturates."""
        bits, cutoff = await self._camera.ask("depth", exposure_s)
        eiger = self._beamline.eiger
        await self._publish(
            BitDepthImage_RBV=bits, CountCutoff_RBV=min(cutoff, _LARGEST_INT),
            DataType_RBV=f"UInt{bits}", ArraySize_RBV=eiger.rows * eiger.columns * bits // 8,
        )  # fmt: skip

    # -- parameters that pull others along ----------------------------------------------------------
    async def _on_file_path(self, path: str) -> str:
        """Areadetector ends a path with a slash and says whether the folder exists."""
        path = path.rstrip("/") + "/"
        await self._publish(FilePathExists_RBV="Yes" if Path(path).is_dir() else "No")
        return path

    async def _on_acquire_time(self, seconds: float) -> float:
        if seconds > self._value("AcquirePeriod"):
            await self._publish_pair("AcquirePeriod", seconds)
        await self._publish_cutoff(seconds)
        return seconds

    async def _on_acquire_period(self, seconds: float) -> float:
        return max(seconds, self._value("AcquireTime"))

    async def _on_photon_energy(self, energy_ev: float) -> float:
        await self._publish_pair("ThresholdEnergy", _clamp("ThresholdEnergy", energy_ev / 2))
        await self._publish_pair("Wavelength", HC_EV_M / energy_ev * 1e10)
        return energy_ev

    async def _on_wavelength(self, angstrom: float) -> float:
        energy_ev = HC_EV_M * 1e10 / angstrom if angstrom > 0 else self._value("PhotonEnergy")
        energy_ev = _clamp("PhotonEnergy", energy_ev)
        await self._publish_pair("PhotonEnergy", energy_ev)
        await self._publish_pair("ThresholdEnergy", _clamp("ThresholdEnergy", energy_ev / 2))
        return HC_EV_M / energy_ev * 1e10

    async def _on_num_images(self, images: int) -> int:
        return 1 if self._value("TriggerMode").endswith("Enable") else images

    async def _on_trigger_mode(self, mode: str) -> str:
        if mode.endswith("Enable"):
            await self._publish_pair("NumImages", 1)
        return mode

    async def _on_array_counter(self, count: int) -> int:
        self._frames = count
        return count

    # -- arming -------------------------------------------------------------------------------------
    async def _on_acquire(self, pv: Any, value: str) -> None:
        """1 arms and completes when the series has ended; 0 ends it."""
        if value != "Acquire":
            await self._disarm()
        elif self._arming is None and await self._arm():
            await self._disarmed.wait()
        raise SkipWrite

    async def _arm(self) -> bool:
        """Open the files and wait for triggers; False, and the state ``error``, when they cannot be."""
        try:
            if self._faults.detector_error:
                raise OSError(NO_ANSWER)
            self._arming = arming = await self._make_arming()
        except (OSError, CameraLost) as error:
            await self._fail(error)
            return False
        self._disarmed.clear()
        self._triggers_left = arming.triggers
        await self._publish(
            NumImagesCounter_RBV=0, Error_RBV="", State_RBV="ready",
            StatusMessage_RBV="Armed", DetectorState_RBV="Waiting", WriteStatus="Write OK", WriteMessage="",
            Acquire_RBV="Acquire", Acquire="Acquire", Armed="Armed",
        )  # fmt: skip
        if not arming.mode.startswith("External") and self._value("ManualTrigger") == "Disable":
            self._spawn(self._run(arming))
        return True

    async def _make_arming(self) -> _Arming:
        mode = self._value("TriggerMode")
        exposure_s = self._value("AcquireTime")
        if mode == "Internal Enable" and self._value("TriggerExposure") > 0:
            exposure_s = self._value("TriggerExposure")
        images, triggers = self._value("NumImages"), self._value("NumTriggers")
        stem, files = await self._next_stem(), None
        if self._value("FWEnable") == "Enable" and self._value("SaveFiles") == "Yes":
            files = stem, await self._settings(images, triggers, exposure_s)
            await self._tell(await self._camera.ask("arm", *files))
        else:
            await self._publish(FullFileName_RBV="", NumCaptured_RBV=0)
        return _Arming(
            mode=mode,
            images=images,
            triggers=float("inf") if mode == "Continuous" else triggers,
            exposure_s=exposure_s,
            period_s=max(exposure_s, self._value("AcquirePeriod")),
            files=files,
        )

    async def _next_stem(self) -> Path:
        """Count SequenceId up, past the series that an earlier run has left in the folder."""
        pattern, folder = self._value("FWNamePattern"), Path(self._value("FilePath"))
        number = self._value("SequenceId")
        while True:
            number += 1
            stem = folder / pattern.replace("$id", str(number))
            if "$id" not in pattern or not stem.with_name(f"{stem.name}_master.h5").exists():
                break
        await self._publish(SequenceId=number)
        return stem

    async def _settings(self, images: int, triggers: int, exposure_s: float) -> SeriesSettings:
        algorithm = self._value("CompressionAlgo")
        bits, cutoff = await self._camera.ask("depth", exposure_s)
        return SeriesSettings(
            images=images,
            triggers=triggers,
            images_per_file=self._value("FWNImagesPerFile"),
            exposure_s=exposure_s,
            period_s=max(exposure_s, self._value("AcquirePeriod")),
            wavelength=self._value("Wavelength") * 1e-10,
            photon_energy_ev=self._value("PhotonEnergy"),
            threshold_energy_ev=self._value("ThresholdEnergy"),
            distance=self._value("DetDist"),
            beam_center=(self._value("BeamX"), self._value("BeamY")),
            pixel_size=self._beamline.eiger.pixel_size_um * 1e-6,
            bit_depth=bits,
            count_cutoff=cutoff,
            compression=algorithm if self._value("FWCompression") == "Enable" else "none",
        )

    async def _disarm(self, state: str = "idle", *, lost: bool = False) -> None:
        """End the series, closing its files (or mending them); what is being exposed is dropped."""
        arming, self._arming = self._arming, None
        if arming is None:
            return
        if self._activity is not None:
            self._activity.rouse()
        if arming.files is not None:
            try:
                await (self._camera.ask("recover", *arming.files) if lost else self._camera.ask("disarm"))
            except (OSError, RuntimeError) as error:
                await self._fail(error)
                state = "error"
        if state == "idle":
            await self._publish(State_RBV="idle", DetectorState_RBV="Idle", StatusMessage_RBV="Idle")
        await self._publish(Acquire_RBV="Done", Acquire="Done", Armed="Unarmed")
        self._disarmed.set()

    async def _fail(self, error: BaseException) -> None:
        """Show an error; the detector stays usable."""
        message = " ".join(str(error).split())
        log.error("Eiger: %s", message)
        await self._publish(
            State_RBV="error", Error_RBV=message, DetectorState_RBV="Error", StatusMessage_RBV=message,
            WriteStatus="Write error", WriteMessage=message, Acquire_RBV="Done", Acquire="Done",
        )  # fmt: skip

    async def _abort(self, error: BaseException, *, lost: bool = False) -> None:
        await self._fail(error)
        await self._disarm("error", lost=lost)

    async def fail(self) -> None:
        """Lose the detector, as when its control unit is switched off."""
        await self._abort(OSError(NO_ANSWER))

    # -- frames -------------------------------------------------------------------------------------
    @contextmanager
    def _awake(self, activity: Activity | None = None) -> Iterator[Activity]:
        """Hold the beamline's time while the detector is busy."""
        with activity or Activity(self._clock) as self._activity:
            try:
                yield self._activity
            finally:
                self._activity = None

    async def _on_trigger(self, pv: Any, value: int) -> int:
        """A trigger by software, which the external modes do not take."""
        arming = self._arming
        if value and arming is None:
            await self._publish(StatusMessage_RBV="Trigger ignored: not armed")
        elif value and arming is not None and arming.mode.startswith("External"):
            await self._publish(StatusMessage_RBV=f"Trigger ignored: {arming.mode} takes pulses")
        elif value and arming is not None:
            async with self._exposing:
                with self._awake() as activity:
                    await self._take(arming, activity, arming.exposure_s)
        return 0

    def pulse(self, width_s: float) -> bool:
        """An edge at the external input; in External Enable its width is the exposure. False: not taken."""
        arming = self._arming
        if arming is None or not arming.mode.startswith("External") or self._exposing.locked():
            return False
        exposure_s = width_s if arming.mode == "External Enable" else arming.exposure_s
        self._spawn(self._pulsed(arming, Activity(self._clock), exposure_s))
        return True

    async def _pulsed(self, arming: _Arming, activity: Activity, exposure_s: float) -> None:
        async with self._exposing:
            with self._awake(activity):
                await self._take(arming, activity, exposure_s)

    async def _run(self, arming: _Arming) -> None:
        """Trigger by itself until the series ends."""
        async with self._exposing:
            with self._awake() as activity:
                while self._arming is arming:
                    await self._take(arming, activity, arming.exposure_s)

    async def _take(self, arming: _Arming, activity: Activity, exposure_s: float) -> None:
        """The frames of one trigger; the last trigger of a series disarms."""
        if self._arming is not arming:
            return
        self._triggers_left -= 1
        await self._publish(State_RBV="acquire", DetectorState_RBV="Acquire")
        try:
            for _ in range(arming.images):
                if not await self._expose(arming, activity, exposure_s):
                    return
        except CameraLost:
            return  # who lost it says so
        except Exception as error:
            await self._abort(error)
            return
        if self._triggers_left > 0:
            await self._publish(State_RBV="ready", DetectorState_RBV="Waiting")
        else:
            await self._disarm()

    async def _expose(self, arming: _Arming, activity: Activity, exposure_s: float) -> bool:
        """One frame from the pose at the middle of its exposure; False when disarmed meanwhile."""
        began = self._clock.now()
        await activity.sleep_until(began + exposure_s / 2)
        if self._arming is not arming:
            return False
        making = asyncio.create_task(self._camera.ask("expose", self._pose(), exposure_s, began))
        await activity.sleep_until(began + exposure_s)
        await making
        await activity.sleep(self._faults.late_s)
        if self._arming is not arming or not await self._deliver(arming):
            return False
        if arming.images > 1:
            await activity.sleep_until(began + max(arming.period_s, exposure_s))
        return True

    async def _deliver(self, arming: _Arming) -> bool:
        """Write the frame and tell of it, its file before its number; False when disarmed meanwhile."""
        if await self._faults.drops_frame():
            return True
        if arming.files is not None:
            stored = await self._camera.ask("store", self._faults.disk_full)
            if self._arming is not arming:
                return False
            await self._tell(stored)
        self._frames += 1
        await self._publish(
            ArrayCounter=self._frames, ArrayCounter_RBV=self._frames,
            NumImagesCounter_RBV=self._value("NumImagesCounter_RBV") + 1,
        )  # fmt: skip
        return True

    async def _tell(self, stored: Stored) -> None:
        await self._publish(FullFileName_RBV=stored.file, NumCaptured_RBV=stored.frames)

    async def close(self) -> None:
        """Disarm, closing files."""
        await self._disarm()


def _clamp(name: str, value: Any) -> Any:
    if name not in LIMITS:
        return value
    low, high = LIMITS[name]
    return type(value)(min(max(value, low), high))
