"""From a rocking scan to one three-dimensional pattern on a regular grid, and back to the crystal's frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft as sp_fft
from scipy import ndimage

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.fourier import WORKERS, to_centre
from bcmi_beamline.scans import RockingScan

_AXES = (0, 1, 2)
ACROSS = 3
"""Crystals across the field of view: with fewer than two its autocorrelation would overlap itself."""
SEEN, ABOVE_STREAKS, EXTENT_MARGIN = 0.01, 1.7, 1.2
"""Levels of the autocorrelation's modulus, relative to its peak and to what gaps make; size over lag."""


@dataclass
class Pattern:
    """Diffraction of a crystal on a regular grid, and what ties the grid to the laboratory.

    Parameters
    ----------
    counts, mask : ndarray, (J, Ny, Nx), float32 and bool
        Origin at ``n // 2``; True where unmeasured.
    voxel_size : tuple of float
        (zeta, y', x') of the object, m.
    binning : int
        Detector pixels per side that were summed.
    kappa : float
        Rocking frequency at index ``J // 2``, rad/m.
    offset : tuple of float
        (row, column) of the true origin from index ``n // 2`` to the k_out pixel, in summed pixels:
        the pixel at ``n // 2`` lies this far beyond k_out.
    geometry : Geometry
    extent : tuple of float
        Size of the crystal along (zeta, y', x') as a part of the field of view.
    """

    counts: np.ndarray
    mask: np.ndarray
    voxel_size: tuple[float, float, float]
    binning: int
    kappa: float
    offset: tuple[float, float]
    geometry: Geometry
    extent: tuple[float, float, float]

    def to_object(self, rho: np.ndarray) -> np.ndarray:
        """Bring a solution (corner origin) to the centre, the phase ramps of the grid's offsets taken off."""
        image = to_centre(rho, _AXES)
        for axis, n in enumerate(image.shape):
            index = np.arange(n) - n // 2
            if axis == 0:
                phase = self.kappa * self.voxel_size[0] * index
            else:
                phase = 2 * np.pi * self.offset[axis - 1] * index / n
            ramp = np.exp(1j * phase).astype(np.complex64)
            image *= ramp.reshape([-1 if a == axis else 1 for a in _AXES])
        return image


def prepare(scan: RockingScan, binning: int | None = None) -> Pattern:
    """Sort, complete and bin a rocking scan.

    Detector pixels far finer than the fringes are summed, as is usual in the field: the object's pixel stays
    and only empty space around it goes. `binning` is chosen so that the field of view keeps three times the
    crystal. The frames are put in the order in which ``kappa`` rises, missing angles are masked, and frames
    or pixels at the ends are dropped for a length that transforms fast.

    Parameters
    ----------
    scan : RockingScan
        With the modulator out.
    binning : int, optional

    Returns
    -------
    pattern : Pattern

    Raises
    ------
    ValueError
        With the modulator in, for fewer than 8 frames, for angles that are not evenly spaced, for no counts.
    """
    _check(scan)
    frames, mask, centre_deg, step_deg = _regular_angles(scan)
    if scan.geometry.slow_frequency_step(step_deg) < 0:
        frames, mask = frames[::-1], mask[::-1]
        centre_deg += step_deg * (len(frames) - 1 - 2 * (len(frames) // 2))
    frames, mask = _fast_length(frames, mask, 0)
    voxel_zeta = scan.geometry.rocking_voxel(len(frames), step_deg)

    extent = crystal_extent(frames, mask)
    b = binning or _choose_binning(frames.shape[1:], max(extent[1:]))
    offsets = []
    for axis in (1, 2):
        n = frames.shape[axis]
        frames, mask = _bin_axis(frames, mask, axis, b)
        offsets.append(((n // b // 2) * b + (b - 1) / 2 - n // 2) / b)
        frames, mask = _fast_length(frames, mask, axis)
    ny, nx = frames.shape[1:]
    pixel = [scan.geometry.object_pixel(n * b) for n in (ny, nx)]
    return Pattern(
        np.where(mask, 0, frames).astype(np.float32),
        mask,
        (voxel_zeta, pixel[0], pixel[1]),
        b,
        scan.geometry.slow_frequency_step(1.0) * centre_deg,
        (offsets[0], offsets[1]),
        scan.geometry,
        (extent[0], min(1.0, b * extent[1]), min(1.0, b * extent[2])),
    )


def _check(scan: RockingScan) -> None:
    if scan.modulator_in:
        raise ValueError(
            "conventional imaging needs frames taken with the modulator out, but "
            f"geometry.modulator_distance is {scan.geometry.modulator_distance * 1e3:g} mm; "
            "reconstruct these with their modulator"
        )
    if len(scan.frames) < 8:
        raise ValueError(
            f"a rocking scan of {len(scan.frames)} frames is too short for three dimensions; 8 are the least"
        )
    if not scan.frames.any():
        raise ValueError("all frames are empty; check shutter, window and Bragg angle")


def _regular_angles(scan: RockingScan) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Frames at rising, even angles with their mask, the angle at ``J // 2`` and the step, degrees."""
    order = np.argsort(scan.angles_deg)
    angles = scan.angles_deg[order]
    step = float(np.median(np.diff(angles)))
    if step <= 0:
        raise ValueError("rocking angles repeat; keep one frame per angle")
    place = (angles - angles[0]) / step
    step *= float(np.polyfit(np.rint(place), place, 1)[0])  # the mean step, not one noisy difference
    place = (angles - angles[0]) / step
    index = np.rint(place - np.mean(place - np.rint(place))).astype(int)
    off = np.abs(place - index - np.mean(place - index)).max()
    if off > 0.25 or len(np.unique(index)) < len(index):
        raise ValueError(
            f"rocking angles are not evenly spaced: {off * step:.4f} deg off a step of {step:.4f} deg; "
            f"conventional imaging needs an even grid (missing angles are allowed)"
        )
    index -= index[0]
    count = int(index[-1]) + 1
    frames = np.zeros((count, *scan.frames.shape[1:]), np.float32)
    frames[index] = scan.frames[order]
    mask = np.ones(frames.shape, bool)
    mask[index] = scan.mask
    if scan.count_cutoff is not None:
        mask |= frames >= scan.count_cutoff
    if scan.flux is not None:
        frames[index] /= (scan.flux[order] / scan.flux.mean())[:, None, None].astype(np.float32)
    start = float(np.mean(angles - step * index))
    return frames, mask, start + step * (count // 2), step


def _fast_length(frames: np.ndarray, mask: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Crop an axis to a length of small prime factors, index ``n // 2`` staying what it was."""
    n = frames.shape[axis]
    fast = next(m for m in range(n, 0, -1) if _smooth(m))
    first = n // 2 - fast // 2
    cut = (slice(None),) * axis + (slice(first, first + fast),)
    return frames[cut], mask[cut]


def _smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


def _bin_axis(frames: np.ndarray, mask: np.ndarray, axis: int, b: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum `b` pixels along `axis`, scaled up for masked ones; masked where more than half of them are.

    The scale makes a count that stands for all `b`.
    """
    if b == 1:
        return frames, mask
    n = frames.shape[axis] // b
    keep = (slice(None),) * axis + (slice(0, n * b),)
    shape = (*frames.shape[:axis], n, b, *frames.shape[axis + 1 :])
    good = ~mask[keep].reshape(shape)
    number = good.sum(axis + 1, dtype=np.float32)
    total = np.sum(frames[keep].reshape(shape), axis + 1, where=good)
    return total * (b / np.maximum(number, 1)), number < b / 2


def _choose_binning(window: tuple[int, ...], extent: float) -> int:
    """Largest divisor of the window that leaves `ACROSS` crystals across the field of view."""
    ny, nx = window
    limit = min(int(1 / (ACROSS * extent)), 8, ny // 32, nx // 32)
    return max((b for b in range(1, limit + 1) if ny % b == 0 == nx % b), default=1)


def crystal_extent(frames: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Size of the crystal along (zeta, rows, columns) as a part of the field of view.

    The lag along one axis at which the autocorrelation, root mean square over the lags along the two others,
    falls below `SEEN` of its peak, or to what gaps make of it at the largest lags, and a fifth more. A
    strained crystal has nearly no autocorrelation at large lags where the others are 0. The mean square is
    that of the transforms along the one axis, of which counting statistics make as much as there are counts.
    """
    filled = fill_gaps(frames, mask)
    total = float(filled.sum(dtype=float))
    sizes = []
    for axis, n in enumerate(filled.shape):
        spectrum = np.asarray(sp_fft.rfft(filled, axis=axis))
        others = tuple(a for a in _AXES if a != axis)
        power = np.sum(np.abs(spectrum) ** 2, axis=others, dtype=float) - total
        floor = ABOVE_STREAKS**2 * float(np.median(power[len(power) // 2 :]))
        seen = np.flatnonzero(power > max(SEEN**2 * power[0], floor))
        sizes.append(min(1.0, EXTENT_MARGIN * (int(seen.max(initial=0)) + 1) / n))
    return sizes[0], sizes[1], sizes[2]


def fill_gaps(counts: np.ndarray, mask: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """Bridge masked pixels of the last two axes by a Gaussian average of their neighbours.

    A gap would streak the autocorrelation; this takes most of it away. Never used as data.
    """
    along = (0,) * (counts.ndim - 2) + (sigma, sigma)
    good = (~mask).astype(np.float32)
    weight = ndimage.gaussian_filter(good, along)
    blurred = ndimage.gaussian_filter(np.where(mask, 0, counts).astype(np.float32), along)
    return np.where(mask, blurred / np.maximum(weight, 1e-3), counts)


def bridge(pattern: Pattern, iterations: int = 15) -> np.ndarray:
    """Counts with masked pixels filled in, (J, Ny, Nx), origin at ``n // 2``; never used as data.

    An intensity has no autocorrelation at lags larger than the crystal. To keep this and the measured counts
    by turns fills gaps as wide as a fringe (A. Papoulis, IEEE Trans. Circuits Syst. 22, 735 (1975)).
    """
    counts = fill_gaps(pattern.counts, pattern.mask)
    if not pattern.mask.any():
        return counts
    beyond = np.zeros((*counts.shape[:2], counts.shape[2] // 2 + 1), bool)
    for axis, (n, size) in enumerate(zip(counts.shape, pattern.extent, strict=True)):
        lag = np.fft.rfftfreq(n) if axis == 2 else np.abs(np.fft.fftfreq(n))
        beyond |= (lag > size).reshape([-1 if a == axis else 1 for a in _AXES])
    for _ in range(iterations):
        spectrum = np.asarray(sp_fft.rfftn(counts, workers=WORKERS))
        spectrum[beyond] = 0
        smooth = np.asarray(sp_fft.irfftn(spectrum, counts.shape, workers=WORKERS, overwrite_x=True))
        counts[pattern.mask] = np.maximum(smooth[pattern.mask], 0)
    return counts
