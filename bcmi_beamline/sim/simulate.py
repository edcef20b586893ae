"""Whole scans from the physics alone: no motors, no server, the alignment already done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.sim.twin import INCIDENT_FLUX, Twin

Progress = Callable[[float, str], None]

OVERHEAD_S = 0.1
"""Dead time between two frames, s."""


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
    drift : ndarray, (J, 3)
        True displacement of the crystal in the laboratory, m. Truth, for comparison only.
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
    drift: np.ndarray
    twin: Twin
    angles_deg: np.ndarray | None = None
    positions: np.ndarray | None = None


def simulate_rocking(
    beamline: Beamline,
    preset: Preset,
    modulator_in: bool = True,
    progress: Progress | None = None,
    twin: Twin | None = None,
) -> SimulatedScan:
    """Rock the crystal through its Bragg peak as the plan of `preset` asks.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset
    modulator_in : bool
    progress : callable, optional
        Given the fraction done and one line.
    twin : Twin, optional
        One that is already built for these settings.

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
    pose = twin.aligned_pose()
    if not modulator_in:
        pose |= beamline.nanogoniometer.positions["out"]
    poses = [
        {**pose, beamline.rocking_circle: pose[beamline.rocking_circle] + circle.sense * angle}
        for angle in angles
    ]
    scan = _expose(twin, pose, poses, plan.rocking_exposure_s, modulator_in, progress)
    scan.angles_deg = angles
    return scan


def simulate_ptychography(
    beamline: Beamline, preset: Preset, progress: Progress | None = None, twin: Twin | None = None
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

    Returns
    -------
    SimulatedScan
        With `positions`.
    """
    twin = twin or Twin(beamline, preset)
    plan = preset.plan
    positions = sunflower(plan.spiral_extent_um, plan.spiral_step_um)
    pose = twin.aligned_pose()
    centre = np.array([pose["x"], pose["y"]])
    poses = [{**pose, "x": float(x), "y": float(y)} for x, y in positions + centre]
    scan = _expose(twin, pose, poses, plan.spiral_exposure_s, True, progress)
    scan.positions = (positions + centre) * 1e-6
    return scan


def sunflower(extent: tuple[float, float], step: float) -> np.ndarray:
    """Points of a Fermat spiral, one per ``step**2``, within a rectangle of `extent` (x, y); (J, 2)."""
    golden = np.pi * (3 - np.sqrt(5))
    index = np.arange(int(np.ceil(np.pi * (np.hypot(*extent) / 2) ** 2 / step**2)))
    radius, angle = step * np.sqrt((index + 0.5) / np.pi), golden * index
    points = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    return points[(np.abs(points) <= np.array(extent) / 2).all(axis=1)]


def _expose(
    twin: Twin,
    place: dict[str, float],
    poses: list[dict[str, float]],
    exposure_s: float,
    modulator_in: bool,
    progress: Progress | None,
) -> SimulatedScan:
    beamline, preset = twin.beamline, twin.preset
    n = preset.plan.window
    row, column = beamline.eiger.beam_row - n // 2, beamline.eiger.beam_column - n // 2
    if row < 0 or column < 0 or row + n > beamline.eiger.rows or column + n > beamline.eiger.columns:
        raise ValueError(
            f"plan.window = {n} about the beam at ({row + n // 2}, {column + n // 2}) leaves the detector"
        )
    window = np.s_[row : row + n, column : column + n]
    frames = np.empty((len(poses), n, n), np.uint32)
    times = np.arange(len(poses)) * (exposure_s + OVERHEAD_S)
    for j, (pose, time) in enumerate(zip(poses, times, strict=True)):
        frames[j] = twin.frame(pose, exposure_s, float(time))[window]
        if progress is not None:
            progress((j + 1) / len(poses), f"frame {j + 1} of {len(poses)}")
    surveyed = beamline.nanogoniometer.distance_at_z0_um
    distance = (surveyed + preset.plan.modulator_z_um) * 1e-6 if modulator_in else 0.0
    return SimulatedScan(
        frames=frames,
        mask=twin.detector.pixel_mask[window] != 0,
        geometry=beamline.geometry(distance),
        modulator_position=(place["x"] * 1e-6, place["y"] * 1e-6),
        flux=np.array([twin.flux(float(t) + exposure_s / 2) for t in times]) / INCIDENT_FLUX,
        exposure_s=exposure_s,
        count_cutoff=float(twin.detector.count_cutoff(exposure_s)),
        drift=np.array([twin.drift(float(t)) for t in times]),
        twin=twin,
    )
