"""The Eiger as its areaDetector driver shows it: armed, triggered, its frames on disk."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caproto import SkipWrite
from caproto.server import PVGroup

from bcmi_beamline.config import Beamline
from bcmi_beamline.geometry import HC_EV_M
from bcmi_beamline.sim.ioc.clock import Clock
from bcmi_beamline.sim.ioc.records import cam_records
from bcmi_beamline.sim.ioc.series import Series, SeriesSettings
from bcmi_beamline.sim.twin import Twin

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

_LARGEST_INT = 2**31 - 1


@dataclass(frozen=True)
class _Arming:
    """What a series was armed for; settings written later wait for the next."""

    images: int
    triggers: float
    exposure_s: float
    period_s: float
    files: Series | None


class Eiger:
    """``cam1:`` of the simulated Eiger.

    Acquire arms and stays busy until the series ends. A series ends after its last trigger, or when Acquire
    is set to 0, which drops the frame being exposed. Trigger completes when its frames are on disk:
    FullFileName_RBV then names the file of the last one and NumCaptured_RBV counts those of the series.
    Frames are made and written by one worker thread; a write that fails ends the series and puts the
    detector into the state ``error`` until it is armed again.

    Parameters
    ----------
    beamline : Beamline
    twin : Twin
        Makes the frames.
    clock : Clock
    pose : callable
        Readings of all axes now.
    data_dir : Path
        FilePath at the start.
    """

    def __init__(
        self,
        beamline: Beamline,
        twin: Twin,
        clock: Clock,
        pose: Callable[[], Mapping[str, float]],
        data_dir: Path,
    ) -> None:
        records: PVGroup = cam_records(beamline)(f"{beamline.prefix}{beamline.eiger.prefix}cam1:")
        self.pvdb = records.pvdb
        self._pv: dict[str, Any] = {str(pv.pvspec.name): pv for pv in records.attr_pvdb.values()}
        self._beamline, self._twin, self._clock, self._pose = beamline, twin, clock, pose
        self._data_dir = data_dir
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="eiger")
        self._arming: _Arming | None = None
        self._triggers_left = 0.0
        self._frames = 0
        self._exposing = asyncio.Lock()
        self._disarmed = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._attach_putters()

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
        """Publish what the configuration cannot say, and let the twin prepare its first frame meanwhile."""
        self._worker.submit(self._twin.frame, self._twin.nominal_pose(), 1.0)
        await self._publish_pair("FilePath", await self._on_file_path(str(self._data_dir)))
        await self._publish_cutoff(self._value("AcquireTime"))

    async def _publish_cutoff(self, exposure_s: float) -> None:
        await self._publish(CountCutoff_RBV=min(self._twin.detector.count_cutoff(exposure_s), _LARGEST_INT))

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
            self._arming = arming = await self._make_arming()
        except OSError as error:
            await self._fail(error)
            return False
        self._disarmed.clear()
        self._triggers_left = arming.triggers
        await self._publish(
            NumImagesCounter_RBV=0, NumCaptured_RBV=0, Error_RBV="", State_RBV="ready",
            StatusMessage_RBV="Armed", DetectorState_RBV="Waiting", WriteStatus="Write OK", WriteMessage="",
            FullFileName_RBV=str(arming.files.current_file) if arming.files else "",
            Acquire_RBV="Acquire", Acquire="Acquire", Armed="Armed",
        )  # fmt: skip
        internal = not self._value("TriggerMode").startswith("External")
        if internal and self._value("ManualTrigger") == "Disable":
            self._runner = asyncio.create_task(self._run(arming))
        return True

    async def _make_arming(self) -> _Arming:
        mode = self._value("TriggerMode")
        exposure_s = self._value("AcquireTime")
        if mode == "Internal Enable" and self._value("TriggerExposure") > 0:
            exposure_s = self._value("TriggerExposure")
        images, triggers = self._value("NumImages"), self._value("NumTriggers")
        saves = self._value("FWEnable") == "Enable" and self._value("SaveFiles") == "Yes"
        stem = await self._next_stem()
        files = None
        if saves:
            files = await self._in_worker(Series, stem, self._settings(images, triggers, exposure_s))
        return _Arming(
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

    def _settings(self, images: int, triggers: int, exposure_s: float) -> SeriesSettings:
        algorithm = self._value("CompressionAlgo")
        eiger = self._beamline.eiger
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
            pixel_size=eiger.pixel_size_um * 1e-6,
            bit_depth=eiger.bit_depth,
            count_cutoff=self._twin.detector.count_cutoff(exposure_s),
            pixel_mask=self._twin.detector.pixel_mask,
            compression=algorithm if self._value("FWCompression") == "Enable" else "none",
        )

    async def _disarm(self, state: str = "idle") -> None:
        """End the series, closing its files; what is being exposed is dropped."""
        arming, self._arming = self._arming, None
        if arming is None:
            return
        if arming.files is not None:
            try:
                await self._in_worker(arming.files.close)
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

    # -- frames -------------------------------------------------------------------------------------
    async def _on_trigger(self, pv: Any, value: int) -> int:
        arming = self._arming
        if value and arming is not None:
            await self._take(arming)
        elif value:
            await self._publish(StatusMessage_RBV="Trigger ignored: not armed")
        return 0

    async def _run(self, arming: _Arming) -> None:
        """Trigger by itself until the series ends."""
        while self._arming is arming:
            await self._take(arming)

    async def _take(self, arming: _Arming) -> None:
        """The frames of one trigger; the last trigger of a series disarms."""
        async with self._exposing:
            if self._arming is not arming:
                return
            self._triggers_left -= 1
            await self._publish(State_RBV="acquire", DetectorState_RBV="Acquire")
            try:
                for _ in range(arming.images):
                    if not await self._expose(arming):
                        return
            except Exception as error:
                await self._fail(error)
                await self._disarm("error")
                return
            if self._triggers_left > 0:
                await self._publish(State_RBV="ready", DetectorState_RBV="Waiting")
            else:
                await self._disarm()

    async def _expose(self, arming: _Arming) -> bool:
        """One frame from the pose at the middle of its exposure; False when disarmed meanwhile."""
        began = self._clock.now()
        await self._clock.sleep(arming.exposure_s / 2)
        frame = await self._in_worker(self._twin.frame, self._pose(), arming.exposure_s, began)
        await self._clock.sleep(began + arming.exposure_s - self._clock.now())
        if self._arming is not arming:
            return False
        if arming.files is not None:
            await self._in_worker(arming.files.write, frame)
        if self._arming is not arming:
            return False
        self._frames += 1
        await self._count(arming)
        await self._clock.sleep(began + arming.period_s - self._clock.now() if arming.images > 1 else 0.0)
        return True

    async def _count(self, arming: _Arming) -> None:
        """Tell of the frame just taken, its file before its number."""
        if arming.files is not None:
            await self._publish(
                FullFileName_RBV=str(arming.files.current_file), NumCaptured_RBV=arming.files.frames
            )
        await self._publish(
            ArrayCounter=self._frames, ArrayCounter_RBV=self._frames,
            NumImagesCounter_RBV=self._value("NumImagesCounter_RBV") + 1,
        )  # fmt: skip

    async def _in_worker(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def close(self) -> None:
        """Disarm, closing files, and let the worker go."""
        await self._disarm()
        if self._runner is not None:
            self._runner.cancel()
        self._worker.shutdown(wait=True, cancel_futures=True)


def _clamp(name: str, value: Any) -> Any:
    if name not in LIMITS:
        return value
    low, high = LIMITS[name]
    return type(value)(min(max(value, low), high))
