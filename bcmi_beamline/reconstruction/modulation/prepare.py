"""What the steps need, made from a scan and a modulator: optics, window, targets, the largest support."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modulation.border import border_for, with_border
from bcmi_beamline.reconstruction.modulation.operators import (
    ANGLES_KEPT,
    FrameOperator,
    RockingOperator,
    Window,
    place_modulator,
)
from bcmi_beamline.reconstruction.modulation.refine import Problem
from bcmi_beamline.reconstruction.modulation.slices import frame_counts, make_targets, sentinel_targets
from bcmi_beamline.reconstruction.modulation.start import LOOSE_SIZES, find_crystal, on_window
from bcmi_beamline.reconstruction.modulation.support import region_from, sheared_box, thickness_from_counts
from bcmi_beamline.reconstruction.threads import each
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

TRUST_NONE, TRUST_FULL = 0.7, 0.95
"""A frame is left out where less of its light than the first meets the trusted map, and counts fully above
the second."""


class Optics(NamedTuple):
    """What the light of a scan meets, whatever its frames hold.

    Parameters
    ----------
    operator_on : callable
        Makes the operator for a window of the exit wave.
    pixel : (y, x)
        Of the object, m.
    trusted : ndarray, bool
        Where the map can be relied on; beam axis at ``n // 2``.
    """

    operator_on: Callable[[Window], FrameOperator]
    pixel: tuple[float, float]
    trusted: np.ndarray


def optics(
    scan: RockingScan, modulator: Modulator, angles_deg: np.ndarray, border: tuple[int, int] = (0, 0)
) -> Optics:
    """Optics for frames at `angles_deg` (J,) of a scan, whose frames tell only how many pixels they have.

    `border` rows and columns are added at either end, as by `with_border`.

    Raises
    ------
    ValueError
        In one line, when scan and modulator cannot be reconciled.
    """
    geometry = scan.geometry.with_modulator(modulator.sample_distance)
    ny, nx = (n + 2 * b for n, b in zip(scan.frames.shape[1:], border, strict=True))
    pixel = (geometry.object_pixel(ny), geometry.object_pixel(nx))
    centres = light_centres(geometry, angles_deg, pixel)
    spread = [ANGLES_KEPT * geometry.wavelength * geometry.modulator_distance / (2 * p**2) for p in pixel]
    half = [int(np.abs(centres[:, i]).max() + spread[i] + LOOSE_SIZES[-1] / pixel[i]) + 2 for i in (0, 1)]
    field, trusted = place_modulator(modulator, scan, (2 * half[0], 2 * half[1]), pixel)

    def operator_on(window: Window) -> FrameOperator:
        reach = [2 * int(np.ceil(n / 2 + s)) for n, s in zip(window.shape, spread, strict=True)]
        return FrameOperator(
            field,
            window,
            pixel,
            geometry.wavelength,
            modulator.sample_distance,
            geometry.propagation_distance,
            (ny, nx),
            centres + window.centre,
            (reach[0], reach[1]),
            walk=centres,
        )

    return Optics(operator_on, pixel, trusted)


def operator_through(scan: RockingScan, modulator: Modulator, problem: Problem) -> FrameOperator:
    """The operator of a problem of `scan`, on its window and with its border, for another modulator."""
    ny, nx = (
        (n - m) // 2 for n, m in zip(problem.operator.detector_shape, scan.frames.shape[1:], strict=True)
    )
    return optics(scan, modulator, scan.angles_deg, (ny, nx)).operator_on(problem.operator.window)


def prepare(
    scan: RockingScan,
    modulator: Modulator,
    *,
    support: Reconstruction | np.ndarray | None = None,
    free_fraction: float = 0.05,
    seed: int = 0,
    free: np.ndarray | None = None,
    window: Window | None = None,
    border: tuple[int, int] | None = None,
) -> Problem:
    """Check that scan and modulator belong together, and make everything the steps need.

    Parameters
    ----------
    scan : RockingScan
    modulator : Modulator
    support : Reconstruction, or ndarray, (n_zeta, ny, nx), bool, optional
        Another result of the crystal, whose support, grown by three voxels and put where the crystal stands,
        is the largest allowed; or the support itself, on the grid of a result: `RockingOperator.voxel` and
        the object pixel, origin at ``n // 2``.
    free_fraction : float
        Part of the pixels kept free.
    seed : int
        For the search of a crystal whose beam was not calibrated.
    free : ndarray, (J, Ny, Nx), bool, optional
        The free pixels themselves, instead of `free_fraction`; masked ones do not count.
    window : Window, optional
        Where the exit wave may be, where that is known.
    border : (rows, columns), optional
        Pixels added at either end of the frames, for light that leaves them; where not told, and no support
        or window on the grid of the frames is given, as many as the frames ask for.

    Raises
    ------
    ValueError
        In one line, when the two cannot be reconciled.
    """
    if free is None:
        free = free_pixels(scan.frames.shape, scan.mask, free_fraction)
    targets = make_targets(scan, free)
    known = None if isinstance(support, Reconstruction) else support
    if border is None:
        border = border_for(targets) if known is None and window is None else (0, 0)
    targets = with_border(targets, border)
    operator_on, pixel, trusted = optics(scan, modulator, scan.angles_deg, border)
    flux = np.ones(len(targets)) if scan.flux is None else scan.flux / scan.flux.mean()
    beam = None
    if window is None:
        rng = np.random.default_rng(seed)
        window, beam = find_crystal(operator_on, pixel, targets, scan.angles_deg, modulator, rng, known)
    geometry = scan.geometry.with_modulator(modulator.sample_distance)
    rocking = RockingOperator(geometry, scan.angles_deg, pixel, window)
    region = known
    if isinstance(support, Reconstruction):
        region = region_from(support, (rocking.voxel, *pixel), geometry.shear)
        there, window = window, Window((region.shape[1], region.shape[2]), window.centre)
        beam = beam and (on_window(beam[0], there, window), beam[1])
        rocking = RockingOperator(geometry, scan.angles_deg, pixel, window)
    operator = operator_on(window)
    trust = frame_trust(operator, trusted, rocking)
    if not (trust > TRUST_NONE).any():
        raise ValueError(
            "no frame's light falls on the trusted part of the modulator: calibrate a wider field"
        )
    thickness = 1.25 * thickness_from_counts(frame_counts(targets) / flux, rocking.kappa)
    if region is None:
        reach = thickness + 2 * np.abs(rocking.shear_offset).max()
        region = sheared_box(rocking, 2 * int(np.ceil(reach / rocking.voxel / 2)), thickness)
    return Problem(
        operator=operator,
        rocking=rocking,
        targets=targets,
        beam=beam,
        amplitude=np.sqrt(flux).astype(np.float32),
        weight=np.clip((trust - TRUST_NONE) / (TRUST_FULL - TRUST_NONE), 0, 1).astype(np.float32),
        region=np.asarray(region, bool),
        thickness=thickness,
        tighten=known is None,
        sentinels=None
        if scan.sentinels is None
        else (with_border(sentinel_targets(scan), border), np.asarray(scan.sentinel_after)),
    )


def light_centres(geometry: Geometry, angles_deg: np.ndarray, pixel: tuple[float, float]) -> np.ndarray:
    """Where the beam meets the modulator as the crystal rocks: (J, 2) pixels (row, column) from the axis."""
    walk_x, walk_y = (geometry.modulator_distance * w for w in geometry.walk_per_radian)
    turned = np.deg2rad(angles_deg)
    return np.rint(np.stack([-turned * walk_y / pixel[0], turned * walk_x / pixel[1]], axis=1)).astype(int)


def frame_trust(operator: FrameOperator, trusted: np.ndarray, rocking: RockingOperator) -> np.ndarray:
    """Part of each frame's light that meets the trusted map, (J,), were the crystal unstrained.

    The light of a uniform crystal that fills the middle of the window, walking over the modulator as the
    crystal rocks; to a few per cent, from the rows that the operator computes.
    """
    ny, nx = operator.window.shape
    disc = np.multiply.outer(np.hanning(ny + 2)[1:-1], np.hanning(nx + 2)[1:-1])

    def part(j: int) -> float:
        rows, columns = (operator.patch_indices(j, axis) + trusted.shape[axis] // 2 for axis in (0, 1))
        if trusted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all():
            return 1.0
        wave = disc * rocking.tilt(slice(j, j + 1))[0]
        rows, light = operator.rows_before(wave.astype(np.complex64), j)
        step = int(rows[1] - rows[0])
        about = (rows + trusted.shape[0] // 2 - step // 2)[:, None] + np.arange(step)
        known = trusted[:, columns[0] : columns[-1] + 1][about.clip(0, len(trusted) - 1)].mean(axis=1)
        return float((light * known).sum() / light.sum())

    return np.array(each(part, range(len(rocking.kappa))))
