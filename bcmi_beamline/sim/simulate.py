"""Whole scans from the physics alone: no motors, no server, the alignment already done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.sim.twin import TrueState, Twin

Progress = Callable[[float, str], None]

OVERHEAD_S = 0.1
"""Dead time between two frames, s."""

CARRIERS = ("mu", "eta")
"""Circles that carry the modulator."""

_CHUNK = 32
"""Frames that one process takes at a time."""

_WORTH_STARTING = 256
"""Frames from which other processes earn the seconds that they take to start."""


@dataclass
class SimulatedScan:
    """Frames of a simulated scan, cropped to the window of the plan.

    Parameters
    ----------
    frames : ndarray, (J, N, N), uint32
        Counts; the pixel (beam_row, beam_column) at index ``(N // 2, N // 2)``.
    mask : ndarray, (N, N), bool
        True in gaps and at bad pixels.
    geometry : Geometry
        With the nominal distance of the modulator, 0 when it is out.
    modulator_position : tuple of float
        (x, y) reading of the nanogoniometer, m; of a ptychography the middle of the scan.
    flux : ndarray, (J,)
        Incident flux relative to its mean.
    exposure_s : float
    count_cutoff : float
        Counts at which a pixel saturates.
    states : list of TrueState, (J,)
        Where everything truly stood. Truth, for comparison only.
    angles_deg : ndarray, (J,), optional
        Of a rocking scan: angle from the true Bragg peak, right-handed about the rocking axis.
    positions : ndarray, (J, 2), optional
        Of a ptychography: readings (x, y) of the nanogoniometer, m.
    twin : Twin
        What made the frames, with the truth.
    """

    frames: np.ndarray
    mask: np.ndarray
    geometry: Geometry
    modulator_position: tuple[float, float]
    flux: np.ndarray
    exposure_s: float
    count_cutoff: float
    states: list[TrueState]
    twin: Twin
    angles_deg: np.ndarray | None = None
    positions: np.ndarray | None = None


def simulate_rocking(
    beamline: Beamline,
    preset: Preset,
    modulator_in: bool = True,
    progress: Progress | None = None,
    twin: Twin | None = None,
    workers: int = 1,
    start_s: float = 0.0,
) -> SimulatedScan:
    """Rock the crystal through its Bragg peak as the plan of `preset` asks.

    Where the rocking circle carries the modulator, the stage follows so that the modulator stands still.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset
    modulator_in : bool
    progress : callable, optional
        Given the fraction done and one line.
    twin : Twin, optional
        One that is already built for these settings.
    workers : int
        Processes that share the work of a long scan; the frames do not depend on their number. More than one
        needs a main module that can be imported.
    start_s : float
        Beamline time at the start: what drifts has drifted until then.

    Returns
    -------
    SimulatedScan
        With `angles_deg`.
    """
    twin = twin or Twin(beamline, preset)
    plan = preset.plan
    half = plan.rocking_points // 2
    angles = np.arange(-half, half + 1) * plan.rocking_step_deg
    circle = getattr(beamline.diffractometer, beamline.rocking_circle)
    pose = _start_pose(twin)
    if not modulator_in:
        pose |= beamline.nanogoniometer.positions["out"]
    poses = [
        {**pose, beamline.rocking_circle: pose[beamline.rocking_circle] + circle.sense * angle}
        for angle in angles
    ]
    if modulator_in and beamline.rocking_circle in CARRIERS:
        poses = [twin.hold_modulator(turned) for turned in poses]
    times = start_s + np.arange(len(poses)) * (plan.rocking_exposure_s + OVERHEAD_S)
    run = _Run(twin, poses, times, plan.rocking_exposure_s)
    scan = _expose(run, pose, modulator_in, progress, workers)
    scan.angles_deg = angles
    return scan


def simulate_ptychography(
    beamline: Beamline,
    preset: Preset,
    progress: Progress | None = None,
    twin: Twin | None = None,
    workers: int = 1,
    start_s: float = 0.0,
) -> SimulatedScan:
    """Scan the modulator through the Bragg beam on the spiral of `preset`.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset
    progress : callable, optional
        Given the fraction done and one line.
    twin : Twin, optional
        One that is already built for these settings.
    workers : int
        Processes that share the work of a long scan; the frames do not depend on their number. More than one
        needs a main module that can be imported.
    start_s : float
        Beamline time at the start: what drifts has drifted until then.

    Returns
    -------
    SimulatedScan
        With `positions`.
    """
    twin = twin or Twin(beamline, preset)
    plan = preset.plan
    positions = sunflower(plan.spiral_extent_um, plan.spiral_step_um)
    pose = _start_pose(twin)
    centre = np.array([pose["x"], pose["y"]])
    poses = [{**pose, "x": float(x), "y": float(y)} for x, y in positions + centre]
    times = start_s + np.arange(len(poses)) * (plan.spiral_exposure_s + OVERHEAD_S)
    scan = _expose(_Run(twin, poses, times, plan.spiral_exposure_s), pose, True, progress, workers)
    scan.positions = (positions + centre) * 1e-6
    return scan


def sunflower(extent: tuple[float, float], step: float) -> np.ndarray:
    """Points of a Fermat spiral, one per ``step**2``, within a rectangle of `extent` (x, y); (J, 2)."""
    golden = np.pi * (3 - np.sqrt(5))
    index = np.arange(int(np.ceil(np.pi * (np.hypot(*extent) / 2) ** 2 / step**2)))
    radius, angle = step * np.sqrt((index + 0.5) / np.pi), golden * index
    points = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    return points[(np.abs(points) <= np.array(extent) / 2).all(axis=1)]


def _start_pose(twin: Twin) -> dict[str, float]:
    """Everything aligned; the ring current is left to time."""
    pose = twin.aligned_pose()
    del pose["ring_current"]
    return pose


@dataclass(frozen=True)
class _Run:
    """The exposures of a scan."""

    twin: Twin
    poses: list[dict[str, float]]
    times: np.ndarray
    exposure_s: float

    def frames(self, numbers: range) -> np.ndarray:
        """Some of the frames, cut to the window; every frame has its own random numbers."""
        seed = self.twin.preset.sim.nuisances.seed
        window = _window(self.twin)
        return np.stack(
            [
                self.twin.frame(
                    self.poses[j], self.exposure_s, float(self.times[j]), np.random.default_rng([seed, 11, j])
                )[window]
                for j in numbers
            ]
        )

    def states(self) -> list[TrueState]:
        return [
            self.twin.truth_state(pose, self.exposure_s, float(time))
            for pose, time in zip(self.poses, self.times, strict=True)
        ]


def _window(twin: Twin) -> tuple[slice, slice]:
    """The part of the detector that the plan looks at."""
    n, eiger = twin.preset.plan.window, twin.beamline.eiger
    row, column = eiger.beam_row - n // 2, eiger.beam_column - n // 2
    if row < 0 or column < 0 or row + n > eiger.rows or column + n > eiger.columns:
        raise ValueError(
            f"plan.window = {n} about the beam at ({row + n // 2}, {column + n // 2}) leaves the detector"
        )
    return np.s_[row : row + n, column : column + n]


def _expose(
    run: _Run, place: dict[str, float], modulator_in: bool, progress: Progress | None, workers: int
) -> SimulatedScan:
    twin = run.twin
    beamline, preset = twin.beamline, twin.preset
    window, count = _window(twin), len(run.poses)
    frames = np.empty((count, preset.plan.window, preset.plan.window), np.uint32)
    workers = workers if count >= _WORTH_STARTING else 1
    size = _CHUNK if workers > 1 else 1
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    for chunk, part in zip(chunks, _computed(run, chunks, workers), strict=True):
        frames[chunk.start : chunk.stop] = part
        if progress is not None:
            progress(chunk.stop / count, f"frame {chunk.stop} of {count}")
    surveyed = beamline.nanogoniometer.distance_at_z0_um
    distance = (surveyed + preset.plan.modulator_z_um) * 1e-6 if modulator_in else 0.0
    flux = np.array([twin.flux(float(t) + run.exposure_s / 2) for t in run.times])
    return SimulatedScan(
        frames=frames,
        mask=twin.detector.pixel_mask[window] != 0,
        geometry=beamline.geometry(distance),
        modulator_position=(place["x"] * 1e-6, place["y"] * 1e-6),
        flux=flux / flux.mean(),
        exposure_s=run.exposure_s,
        count_cutoff=float(twin.detector.count_cutoff(run.exposure_s)),
        states=run.states(),
        twin=twin,
    )


def _computed(run: _Run, chunks: list[range], workers: int) -> Iterator[np.ndarray]:
    """Frames of every chunk, in order."""
    if workers == 1:
        yield from map(run.frames, chunks)
        return
    context = get_context("spawn")
    with _single_threaded(), ProcessPoolExecutor(workers, context, _receive, (run,)) as pool:
        yield from pool.map(_frames_received, chunks)


_received: list[_Run] = []
"""In a process that shares the work: what to expose, sent once."""


def _receive(run: _Run) -> None:
    _received[:] = [run]


def _frames_received(numbers: range) -> np.ndarray:
    return _received[0].frames(numbers)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started within use one thread each: together they already fill the machine."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
