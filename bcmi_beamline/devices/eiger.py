"""The Eiger-2M: armed once for a run, triggered point by point or flying, its files told as they grow."""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

from ophyd import Component as Cpt
from ophyd import Device, EpicsSignal, EpicsSignalRO
from ophyd.areadetector.base import EpicsSignalWithRBV
from ophyd.status import DeviceStatus, Status
from ophyd.utils import DisconnectedError

from bcmi_beamline.config import EigerConfig
from bcmi_beamline.devices._frames import DATASET, FrameReader, FrameStatistics, Window

log = logging.getLogger(__name__)

SETTING_TIMEOUT_S = 5.0
ARMING_TIMEOUT_S = 60.0
READOUT_TIMEOUT_S = 30.0
"""On top of the exposure."""

_SCALARS = {  # name: (dtype, dtype_numpy)
    "total": ("integer", "<i8"),
    "max": ("integer", "<i8"),
    "high_q_x": ("number", "<f8"),
    "high_q_y": ("number", "<f8"),
    "saturated": ("integer", "<i8"),
    "warning": ("integer", "<i8"),
    "frame": ("integer", "<i8"),
}


COUNT_RATE_WARNING = 0.5
"""Share of the count cutoff from which the correction for the count rate is doubted."""

CLEAN, COUNT_RATE, SATURATED = 0, 1, 2
"""``eiger_warning``: nothing to say; a pixel counts near its limit; a pixel is at its limit."""

Mode = Literal["step", "burst", "external"]
_TRIGGER_MODES: dict[Mode, str] = {
    "step": "Internal Series",
    "burst": "Internal Series",
    "external": "External Series",
}


class EigerError(RuntimeError):
    """The detector did not do as told; the message names the process variable and the state."""


@dataclass(frozen=True)
class EigerPlan:
    """What the next stage arms the detector for.

    Parameters
    ----------
    frames : int
        Of one arming. More triggers than these arm it again; fewer leave a short last file.
    exposure_s : float
        Seconds per frame.
    mode : {"step", "burst", "external"}
        One frame per trigger of the plan; all frames after one trigger, timed by the detector; one frame per
        hardware trigger. The last two fly: kickoff, collect, complete.
    period_s : float, optional
        From frame to frame of a burst, s; the exposure where absent.
    window : int, optional
        Edge in pixels of the square around the beam that the statistics of each frame see; by default as
        large as fits the detector.
    row, column : int, optional
        Pixel of the beam, by default as configured.
    high_q_px : float, optional
        Pixels from the beam beyond which counts are far; 60, or 0.23 of a small window's edge, by default.
    directory : str, optional
        Where the detector writes, by default as its FilePath says.
    """

    frames: int = 1000
    exposure_s: float = 1.0
    mode: Mode = "step"
    period_s: float | None = None
    window: int | None = None
    row: int | None = None
    column: int | None = None
    high_q_px: float | None = None
    directory: str | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.exposure_s > 0:
            raise ValueError(
                f"frames ({self.frames}) and exposure_s ({self.exposure_s}) of an EigerPlan must be positive"
            )
        if self.mode not in _TRIGGER_MODES or (self.period_s or self.exposure_s) < self.exposure_s:
            raise ValueError(
                f"mode ({self.mode!r}) of an EigerPlan is one of {', '.join(_TRIGGER_MODES)}, period_s "
                f"({self.period_s}) at least exposure_s ({self.exposure_s})"
            )


class EigerCam(Device):
    """What is used of the ADEiger driver's process variables.

    Not ophyd's ``EigerDetectorCam``: that has drifted from the driver and connects 217 process variables,
    of which a scan needs the two dozen here.
    """

    acquire = Cpt(EpicsSignal, "Acquire", kind="omitted")
    armed = Cpt(EpicsSignalRO, "Armed", kind="omitted", auto_monitor=True)
    trigger_button = Cpt(EpicsSignal, "Trigger", kind="omitted")
    state = Cpt(EpicsSignalRO, "State_RBV", string=True, kind="omitted")
    error = Cpt(EpicsSignalRO, "Error_RBV", string=True, kind="omitted")

    acquire_time = Cpt(EpicsSignalWithRBV, "AcquireTime", kind="config")
    acquire_period = Cpt(EpicsSignalWithRBV, "AcquirePeriod", kind="config")
    trigger_mode = Cpt(EpicsSignalWithRBV, "TriggerMode", string=True, kind="config")
    manual_trigger = Cpt(EpicsSignalWithRBV, "ManualTrigger", kind="config")
    num_images = Cpt(EpicsSignalWithRBV, "NumImages", kind="config")
    num_triggers = Cpt(EpicsSignalWithRBV, "NumTriggers", kind="config")

    fw_enable = Cpt(EpicsSignalWithRBV, "FWEnable", kind="omitted")
    fw_name_pattern = Cpt(EpicsSignalWithRBV, "FWNamePattern", string=True, kind="omitted")
    fw_images_per_file = Cpt(EpicsSignalWithRBV, "FWNImagesPerFile", kind="omitted")
    save_files = Cpt(EpicsSignalWithRBV, "SaveFiles", kind="omitted")
    file_path = Cpt(EpicsSignalWithRBV, "FilePath", string=True, kind="omitted")
    sequence_id = Cpt(EpicsSignalRO, "SequenceId", kind="omitted")
    num_captured = Cpt(EpicsSignalRO, "NumCaptured_RBV", kind="omitted", auto_monitor=True)

    count_cutoff = Cpt(EpicsSignalRO, "CountCutoff_RBV", kind="config")
    bit_depth = Cpt(EpicsSignalRO, "BitDepthImage_RBV", kind="config")
    photon_energy = Cpt(EpicsSignalWithRBV, "PhotonEnergy", kind="config")
    threshold_energy = Cpt(EpicsSignalWithRBV, "ThresholdEnergy", kind="config")
    beam_x = Cpt(EpicsSignalWithRBV, "BeamX", kind="config")
    beam_y = Cpt(EpicsSignalWithRBV, "BeamY", kind="config")
    detector_distance = Cpt(EpicsSignalWithRBV, "DetDist", kind="config")


class Eiger(Device):
    """Eiger-2M with its file writer.

    A plan prepares it with an `EigerPlan`, stages it once for a run and triggers it once per point. Each
    trigger ends when its frame is on disk: the detector's Trigger completes only then, and the frame has been
    read back for its statistics. Frames are announced by ``stream_resource`` (one per data file) and
    ``stream_datum`` documents under ``eiger_image``; each event carries, for the analysis window,

    - ``eiger_total``, ``eiger_max``: counts, gaps and saturated pixels left out
    - ``eiger_high_q_x``, ``eiger_high_q_y``: share of the counts far from the beam, along columns and rows
    - ``eiger_saturated``: pixels at the count cutoff
    - ``eiger_warning``: 2 where there are any, 1 where a pixel counts more than half of it (rate correction
      is large there), else 0; the first of each kind in a run is logged as a warning
    - ``eiger_frame``: row of ``eiger_image`` this event belongs to. A point that a pause interrupted is taken
      again, so there may be more frames than events.

    In the modes "burst" and "external" it flies: `kickoff` starts the frames, ``collect`` tells of those on
    disk, `complete` ends when the last one is. There are no events then; `flagged` holds the warnings.

    Parameters
    ----------
    prefix : str
        Put before ``cam1:``.
    config : EigerConfig
        Size, beam and gaps.
    """

    cam = Cpt(EigerCam, "cam1:")

    def __init__(self, prefix: str, *, name: str, config: EigerConfig, **kwargs) -> None:
        self.config = config
        self._plan = EigerPlan()
        self._window = self._window_of(self._plan)
        self._restore: list[tuple[EpicsSignal, object]] = []
        self._documents: deque[tuple[str, dict]] = deque()
        self._resources: dict[Path, str] = {}
        self._reader = FrameReader()
        self._worker: ThreadPoolExecutor | None = None
        self._cancelled = Event()
        self._reading: dict[str, dict] = {}
        self._frames = self._frames_in_series = 0
        self._flight: DeviceStatus | None = None
        self.flagged: dict[int, int] = {}
        """Frames with a warning since it was staged: number and ``eiger_warning``."""
        super().__init__(prefix, name=name, **kwargs)

    @property
    def image_key(self) -> str:
        """Data key of the frames."""
        return f"{self.name}_image"

    @property
    def window(self) -> Window:
        """Part of the detector that the statistics see."""
        return self._window

    # -- set-up -----------------------------------------------------------------------------------
    def prepare(self, value: EigerPlan) -> Status:
        """Say what the next stage is for; writes nothing to the detector yet.

        Raises
        ------
        ValueError
            When the window does not lie on the detector.
        EigerError
            When the detector is staged already.
        """
        if self._worker is not None:
            raise EigerError(f"{self.name}: armed already; unstage it before preparing another run")
        self._window = self._window_of(value)
        self._plan = value
        status = Status(obj=self, timeout=SETTING_TIMEOUT_S)
        status.set_finished()
        return status

    def _window_of(self, plan: EigerPlan) -> Window:
        config = self.config
        row = config.beam_row if plan.row is None else plan.row
        column = config.beam_column if plan.column is None else plan.column
        fits = 2 * min(row, column, config.rows - row, config.columns - column)
        size = fits if plan.window is None else plan.window
        return Window(size, row, column).check(config.rows, config.columns)

    def stage(self) -> list[object]:
        """Apply the plan's settings and arm.

        Raises
        ------
        EigerError
            Names the process variable that did not follow and the detector's state.
        """
        staged = super().stage()
        try:
            self._cancelled.clear()
            self._frames, self._reading, self._flight = 0, {}, None
            self.flagged = {}
            self._documents.clear()
            self._resources.clear()
            self._apply_settings()
            self._statistics = FrameStatistics(
                ~self.config.gap_mask()[self._window.slices],
                int(self.cam.count_cutoff.get()),
                2 ** int(self.cam.bit_depth.get()) - 1,
                self._plan.high_q_px,
            )
            self._arm()
            self._worker = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        except BaseException:
            self.unstage()
            raise
        return staged

    def _apply_settings(self) -> None:
        cam, plan = self.cam, self._plan
        if int(cam.armed.get()):
            self._disarm()
        burst = plan.mode == "burst"
        settings = [
            (cam.trigger_mode, _TRIGGER_MODES[plan.mode]),
            (cam.manual_trigger, 1),
            (cam.acquire_time, plan.exposure_s),
            (cam.acquire_period, max(plan.exposure_s, plan.period_s or 0.0)),
            (cam.num_images, plan.frames if burst else 1),
            (cam.num_triggers, 1 if burst else plan.frames),
            (cam.fw_enable, 1),
            (cam.save_files, 1),
            (cam.fw_name_pattern, f"bcmi_{uuid.uuid4().hex[:12]}_$id"),
        ]
        if plan.directory is not None:
            settings.append((cam.file_path, plan.directory.rstrip("/") + "/"))  # as the driver ends it
        before = [(signal, signal.get()) for signal, _ in settings]  # of all: one setting may drag another
        self._restore = before
        for signal, value in settings:
            if signal.get() != value:
                self._set(signal, value)

    def _set(self, signal: EpicsSignal, value) -> None:
        try:
            signal.set(value, timeout=SETTING_TIMEOUT_S).wait(SETTING_TIMEOUT_S + 1)
        except Exception as error:
            raise self._error(
                f"{signal.setpoint_pvname} = {value!r} was not taken, it reads {signal.get()!r}"
            ) from error

    def _error(self, what: str) -> EigerError:
        said = [text for text in (_text(self.cam.state), _text(self.cam.error)) if text]
        return EigerError(f"{self.name}: {what} (state {', '.join(said)})")

    def _arm(self) -> None:
        """Arm for as many triggers as planned and note where the files will be."""
        cam = self.cam
        ended = Event()
        cam.acquire.put(1, wait=False, use_complete=True, callback=lambda **_: ended.set())
        self._await_armed(1, ended)
        self._frames_in_series = 0
        self._images_per_file = int(cam.fw_images_per_file.get())
        stem = str(cam.fw_name_pattern.get()).replace("$id", str(int(cam.sequence_id.get())))
        self._stem = Path(str(cam.file_path.get())) / stem

    def stop(self, *, success: bool = False) -> None:
        """Disarm, whatever it is doing; files are closed with the frames they hold."""
        self._disarm()
        super().stop(success=success)

    def _disarm(self) -> None:
        self.cam.acquire.put(0, wait=False)
        self._await_armed(0, Event())

    def _await_armed(self, wanted: int, given_up: Event) -> None:
        """Wait for Armed, unless the detector has given up or takes too long."""
        deadline = time.monotonic() + ARMING_TIMEOUT_S
        while int(self.cam.armed.get()) != wanted:
            if given_up.is_set() or time.monotonic() > deadline:
                verb = "arm" if wanted else "disarm"
                raise self._error(f"did not {verb}, {self.cam.armed.pvname} is not {wanted}")
            time.sleep(0.005)

    def unstage(self) -> list[object]:
        """Disarm, close files and put back the settings that `stage` changed; safe at any time."""
        self._cancelled.set()
        try:
            if self.cam.connected:
                if int(self.cam.armed.get()):
                    self._disarm()
                while self._restore:
                    signal, value = self._restore.pop(0)  # as applied: a period is never below the time
                    if signal.get() != value:
                        self._set(signal, value)
        finally:
            if self._worker is not None:
                self._worker.shutdown(wait=True, cancel_futures=True)
                self._worker = None
            self._reader.close()
            staged = super().unstage()
        return staged

    def pause(self) -> None:
        """Nothing: an armed detector waits for its next trigger as long as it takes."""

    def resume(self) -> None:
        """Arm again if somebody has disarmed it during the pause.

        Raises
        ------
        EigerError
            When it does not arm.
        """
        if self._worker is not None and self._plan.mode == "step" and not int(self.cam.armed.get()):
            self._arm()

    # -- frames -----------------------------------------------------------------------------------
    def trigger(self) -> DeviceStatus:
        """Expose one frame; done when it is on disk and its statistics are known.

        A trigger that comes while an interrupted one still exposes waits for that.

        Raises
        ------
        EigerError
            When the detector is not staged; the status holds any other.
        """
        if self._worker is None:
            raise EigerError(f"{self.name}: stage it before triggering")
        if self._plan.mode != "step":
            raise EigerError(f"{self.name}: armed to fly ({self._plan.mode}); kick it off, do not trigger it")
        status = DeviceStatus(self)  # no timeout of its own: whatever the worker waits for has one
        self._worker.submit(self._expose, status, self._plan.exposure_s + READOUT_TIMEOUT_S)
        return status

    def _expose(self, status: DeviceStatus, limit: float) -> None:
        """Take one frame (in the worker thread)."""
        try:
            if self._frames_in_series == self._plan.frames:
                self._disarm()
                self._arm()
            self._press_trigger(limit)
            self._take_note()
        except Exception as error:
            _end(status, error)
        else:
            _end(status)

    def _press_trigger(self, limit: float) -> None:
        pressed, deadline = Event(), time.monotonic() + limit
        if not int(self.cam.armed.get()):
            raise self._error(f"{self.cam.armed.pvname} is 0: frame {self._frames} was not taken")
        self.cam.trigger_button.put(1, wait=False, use_complete=True, callback=lambda **_: pressed.set())
        while not pressed.wait(0.1):
            if self._cancelled.is_set():
                raise EigerError(f"{self.name}: unstaged while frame {self._frames} was exposed")
            if time.monotonic() > deadline:
                raise self._error(
                    f"{self.cam.trigger_button.setpoint_pvname} did not complete within {limit:.0f} s, "
                    f"frame {self._frames}"
                )

    def _check_health(self) -> None:
        """Raise when a frame is missed because the detector has failed."""
        if _text(self.cam.state) == "error":
            raise self._error(f"frame {self._frames} was not taken")

    # -- flying -----------------------------------------------------------------------------------
    def kickoff(self) -> DeviceStatus:
        """Start a burst, or begin to watch for frames of external triggers.

        Raises
        ------
        EigerError
            When it is not staged for one of these modes.
        """
        if self._worker is None or self._plan.mode == "step" or self._flight is not None:
            raise EigerError(f"{self.name}: stage it with mode 'burst' or 'external' before each flight")
        if self._plan.mode == "burst":
            self.cam.trigger_button.put(1, wait=False)
        self._flight = DeviceStatus(self)
        self._worker.submit(self._fly, self._flight)
        started = DeviceStatus(self)
        started.set_finished()
        return started

    def _fly(self, status: DeviceStatus) -> None:
        """Take note of frames as they are written (in the worker thread)."""
        patience = max(self._plan.exposure_s, self._plan.period_s or 0.0) + READOUT_TIMEOUT_S
        deadline = time.monotonic() + patience
        try:
            while self._frames < self._plan.frames:
                if self._frames < int(self.cam.num_captured.get()):
                    self._take_note()
                    deadline = time.monotonic() + patience
                    continue
                self._check_flight(deadline, patience)
                time.sleep(0.002)
        except Exception as error:
            _end(status, error)
        else:
            _end(status)

    def _check_flight(self, deadline: float, patience: float) -> None:
        """Raise when no frame is to be expected any more."""
        done = f"{self._frames} of {self._plan.frames} frames are on disk"
        if self._cancelled.is_set():
            raise EigerError(f"{self.name}: unstaged when {done}")
        if time.monotonic() > deadline:
            raise self._error(f"{self.cam.num_captured.pvname} stood still for {patience:.0f} s, {done}")
        written = int(self.cam.num_captured.get(use_monitor=False))
        if self._frames >= written and not int(self.cam.armed.get()):
            raise self._error(f"{self.cam.armed.pvname} is 0, {done}")

    def complete(self) -> DeviceStatus:
        """Done when the last frame is on disk.

        Raises
        ------
        EigerError
            When it was not kicked off.
        """
        if self._flight is None:
            raise EigerError(f"{self.name}: kick it off before completing")
        return self._flight

    def describe_collect(self) -> dict[str, dict]:
        """Data key of the frames of a flight."""
        return {self.image_key: self.describe()[self.image_key]}

    def _take_note(self) -> None:
        """Read the frame just written, put it in numbers, queue its documents."""
        number, row = divmod(self._frames_in_series, self._images_per_file)
        path = self._stem.with_name(f"{self._stem.name}_data_{number + 1:06d}.h5")
        try:
            counts = self._reader.read(path, row, self._window, self._check_health)
        except OSError as error:
            raise self._error(str(error)) from None
        now = time.time()
        numbers = {**self._statistics(counts), "frame": self._frames}
        numbers["warning"] = self._judge(numbers)
        self._reading = {f"{self.name}_{k}": {"value": v, "timestamp": now} for k, v in numbers.items()}
        self._announce(path, row)
        self._frames += 1
        self._frames_in_series += 1

    def _judge(self, numbers: dict[str, float]) -> int:
        """Whether a frame's counts can be trusted; warns of the first that cannot."""
        warning = CLEAN
        if numbers["saturated"]:
            warning = SATURATED
        elif numbers["max"] > COUNT_RATE_WARNING * self._statistics.cutoff:
            warning = COUNT_RATE
        if warning and warning not in self.flagged.values():
            what = (
                f"{numbers['saturated']} pixels saturated"
                if warning == SATURATED
                else f"{numbers['max']} counts in a pixel, more than {COUNT_RATE_WARNING:.0%} of the cutoff"
            )
            log.warning(
                "%s: frame %d: %s (cutoff %d in %g s): put in a filter or expose shorter",
                self.name, self._frames, what, self._statistics.cutoff, self._plan.exposure_s,
            )  # fmt: skip
        if warning:
            self.flagged[self._frames] = warning
        return warning

    def _announce(self, path: Path, row: int) -> None:
        resource = self._resources.get(path)
        if resource is None:
            resource = self._resources[path] = str(uuid.uuid4())
            document = {
                "uid": resource,
                "data_key": self.image_key,
                "mimetype": "application/x-hdf5",
                "uri": "file://localhost" + path.as_uri().removeprefix("file://"),
                "parameters": {
                    "dataset": DATASET,
                    "swmr": True,
                    "chunk_shape": (1, self.config.rows, self.config.columns),
                },
            }
            self._documents.append(("stream_resource", document))
        datum = {
            "uid": f"{resource}/{row}",
            "stream_resource": resource,
            "descriptor": "",
            "indices": {"start": row, "stop": row + 1},
            "seq_nums": {"start": 0, "stop": 0},
        }
        self._documents.append(("stream_datum", datum))

    # -- documents --------------------------------------------------------------------------------
    def get_index(self) -> int:
        """Frames on disk since it was staged."""
        return self._frames

    @property
    def untold(self) -> int:
        """Documents of frames on disk that nobody has collected yet."""
        return len(self._documents)

    def collect_asset_docs(self, index: int | None = None) -> Iterator[tuple[str, dict]]:
        """Documents of frames on disk that have not been told yet; indices count within a file.

        Of a flight one datum at a time, as many frames of one file as there are: bluesky counts so.
        """
        while self._documents:
            name, document = self._documents.popleft()
            if name == "stream_datum" and self._flight is not None:
                yield name, self._with_following(document)
                return
            yield name, document

    def _with_following(self, datum: dict) -> dict:
        """A datum and those queued behind it of the same file, as one."""
        while self._documents and self._documents[0][1].get("stream_resource") == datum["stream_resource"]:
            following = self._documents.popleft()[1]
            datum["indices"]["stop"] = following["indices"]["stop"]
        return datum

    def describe(self) -> dict[str, dict]:
        """Data keys: the frames, kept outside the events, and their statistics."""
        image = {
            "source": f"PV:{self.cam.prefix}",
            "shape": [self.config.rows, self.config.columns],
            "dtype": "array",
            "dtype_numpy": f"<u{int(self.cam.bit_depth.get()) // 8}",  # follows the exposure
            "external": "STREAM:",
        }
        scalars = {
            f"{self.name}_{key}": {
                "source": f"{self.image_key}, window {self._window.size}",
                "shape": [],
                "dtype": dtype,
                "dtype_numpy": kind,
            }
            for key, (dtype, kind) in _SCALARS.items()
        }
        return {self.image_key: image, **scalars}

    def read(self) -> dict[str, dict]:
        """Statistics of the last frame.

        Raises
        ------
        EigerError
            When there is none since it was staged.
        """
        if not self._reading:
            raise EigerError(f"{self.name}: no frame yet; stage and trigger it first")
        return self._reading

    @property
    def hints(self) -> dict:
        """Field to plot first."""
        return {"fields": [f"{self.name}_total"]}

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        state = f"staged, {self._frames} frames taken" if self._worker else "not staged"
        return f"{self.name}: {self.cam.state.get()}, {state}, exposure {self.cam.acquire_time.get():g} s"


def _text(signal: EpicsSignalRO) -> str:
    """What a text says; it never raises, since it is asked for what to say of another error."""
    try:
        return str(signal.get())
    except (TimeoutError, DisconnectedError):
        return "unknown"


def _end(status: DeviceStatus, error: Exception | None = None) -> None:
    """Finish a status unless it timed out or was given up meanwhile."""
    if not status.done:
        status.set_exception(error) if error else status.set_finished()
