"""How good a reconstruction is, with the truth (simulation) or without it.

Everything trivial is removed first: position, global phase, and by default a linear phase, since a Bragg
peak or a pixel centre that is off by a fraction of a pixel makes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import ndimage, signal

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.alignment import (
    align,
    bounding_box,
    correlation,
    resample,
    resample_support,
    twin,
)
from bcmi_beamline.reconstruction.fourier import fftn
from bcmi_beamline.reconstruction.free_pixels import free_pixels, log_likelihood
from bcmi_beamline.reconstruction.strain import orthogonal_shape, strain
from bcmi_beamline.scans import Reconstruction

__all__ = [
    "Comparison",
    "Histogram",
    "ShellCorrelation",
    "compare",
    "correlation",
    "fourier_shell_correlation",
    "free_pixels",
    "log_likelihood",
    "modulus_histogram",
    "phase_retrieval_transfer_function",
]

Verdict = Literal["correct", "conjugated", "incorrect"]


# -- Fourier shells --------------------------------------------------------------------------------------
def shell_radius(
    shape: tuple[int, ...], voxel_size: tuple[float, ...], shear: tuple[float, float]
) -> np.ndarray:
    """``|q|`` of every Fourier voxel of a sheared grid, corner origin, rad/m.

    ``exp(i (a zeta + b y' + c x'))`` is the plane wave (c - a shear_x, b - a shear_y, a) of the detector
    frame.
    """
    a, rows, c = (2 * np.pi * np.fft.fftfreq(n, d) for n, d in zip(shape, voxel_size, strict=True))
    a = a[:, None, None]
    qx = c - a * shear[0]
    qy = -rows[:, None] - a * shear[1]
    return np.sqrt(a**2 + qy**2 + qx**2)


def _complete_radius(voxel_size: tuple[float, float, float], shear: tuple[float, float]) -> float:
    """Radius of the largest sphere in q that the grid holds whole, rad/m."""
    dz, dy, dx = voxel_size
    return np.pi * min(
        1 / dz, 1 / (dy * float(np.hypot(1, shear[1]))), 1 / (dx * float(np.hypot(1, shear[0])))
    )


@dataclass
class ShellCorrelation:
    """Fourier shell correlation of two objects.

    Parameters
    ----------
    q : ndarray, (shells,)
        Middle of each shell, rad/m.
    correlation, threshold : ndarray, (shells,)
        FSC and the 1/2-bit threshold.
    resolution_full_period, resolution_half_period : float
        m, where the FSC first falls through the threshold; the finest complete shell when it never does.
    limited_by_grid : bool
        Whether it never does: the true resolution may be finer.
    """

    q: np.ndarray
    correlation: np.ndarray
    threshold: np.ndarray
    resolution_full_period: float
    resolution_half_period: float
    limited_by_grid: bool


def fourier_shell_correlation(
    a: np.ndarray,
    b: np.ndarray,
    voxel_size: tuple[float, float, float],
    shear: tuple[float, float] = (0.0, 0.0),
    *,
    filled: float = 1.0,
) -> ShellCorrelation:
    """FSC with the 1/2-bit threshold (M. van Heel and M. Schatz, J. Struct. Biol. 151, 250 (2005)).

    Parameters
    ----------
    a, b : ndarray, (Nz, Ny, Nx), complex
        Aligned objects.
    voxel_size, shear
        Of their common grid; shells are spheres in physical q.
    filled : float
        Part of the array that the object fills. Zeros around an object add voxels to a shell but no
        information, so only this part of them counts in the threshold.

    Returns
    -------
    fsc : ShellCorrelation
    """
    fa, fb = fftn(a.astype(np.complex64)).ravel(), fftn(b.astype(np.complex64)).ravel()
    q = shell_radius(a.shape, voxel_size, shear).ravel()
    width = max(2 * np.pi / (n * d) for n, d in zip(a.shape, voxel_size, strict=True))
    shell = (q / width + 0.5).astype(int)
    complete = int(_complete_radius(voxel_size, shear) / width)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell, values)[: complete + 1]

    cross = total(np.real(fa * fb.conj()))
    power = np.sqrt(total(np.abs(fa) ** 2) * total(np.abs(fb) ** 2))
    value = np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)
    root = np.sqrt(np.maximum(np.bincount(shell)[: complete + 1] * filled, 1.0))
    threshold = (0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root)
    q_shell = np.arange(complete + 1) * width

    below = np.flatnonzero((value < threshold)[1:]) + 1
    if below.size == 0:
        crossing = float(q_shell[-1])
    else:
        i = int(below[0])
        before, after = value[i - 1] - threshold[i - 1], threshold[i] - value[i]
        weight = before / (before + after) if before > 0 else 1.0
        crossing = float(q_shell[i - 1] + weight * width)
    full = 2 * np.pi / crossing if crossing > 0 else float("inf")
    return ShellCorrelation(q_shell, value, threshold, full, full / 2, below.size == 0)


def phase_retrieval_transfer_function(
    images: Sequence[np.ndarray], voxel_size: tuple[float, float, float], shear: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """PRTF of aligned trials: how far their phases agree, shell by shell.

    ``|mean_k F_k| / mean_k |F_k|`` (H. N. Chapman et al., J. Opt. Soc. Am. A 23, 1179 (2006), with the
    trials' own moduli for the measured ones, so that masked pixels count too).

    Returns
    -------
    q : ndarray, (shells,)
        rad/m.
    prtf : ndarray, (shells,)
        1 where all trials agree.
    """
    transforms = [fftn(image.astype(np.complex64)) for image in images]
    q = shell_radius(images[0].shape, voxel_size, shear).ravel()
    width = max(2 * np.pi / (n * d) for n, d in zip(images[0].shape, voxel_size, strict=True))
    shell = (q / width + 0.5).astype(int)
    together = np.bincount(shell, np.abs(np.sum(transforms, axis=0)).ravel())
    alone = np.bincount(shell, np.sum([np.abs(t) for t in transforms], axis=0).ravel())
    complete = int(_complete_radius(voxel_size, shear) / width)
    return np.arange(complete + 1) * width, (together / np.maximum(alone, 1e-30))[: complete + 1]


# -- modulus ---------------------------------------------------------------------------------------------
@dataclass
class Histogram:
    """Distribution of the modulus inside the support, relative to its 99.5th percentile.

    Parameters
    ----------
    centres, density : ndarray, (bins,)
    mode : float
        Where it peaks.
    width : float
        Full width at half maximum of that peak.
    peaks : int
        How many there are: a homogeneous crystal that came out right has one.
    """

    centres: np.ndarray
    density: np.ndarray
    mode: float
    width: float
    peaks: int


def modulus_histogram(image: np.ndarray, support: np.ndarray, bins: int = 120) -> Histogram:
    """Histogram of ``|image|`` in `support`, smoothed over 0.03, with mode, width and number of peaks.

    A peak counts when it stands out by a tenth of the highest. The outermost layer of the support, voxels
    that the surface cuts, is left out where anything remains without it.
    """
    inner = np.asarray(ndimage.binary_erosion(support), bool)
    values = np.abs(image[np.where(inner.any(), inner, support)])
    if values.size == 0:
        raise ValueError("modulus histogram of an empty support; loosen the support threshold")
    top = float(np.percentile(values, 99.5)) or 1.0
    density, edges = np.histogram(values / top, bins, (0, 1.25), density=True)
    centres = (edges[1:] + edges[:-1]) / 2
    density = ndimage.gaussian_filter1d(density, 0.03 / (centres[1] - centres[0]), mode="constant")
    best = int(np.argmax(density))
    peaks, _ = signal.find_peaks(np.pad(density, 1), prominence=0.1 * density[best])
    half = signal.peak_widths(np.pad(density, 1), [best + 1], rel_height=0.5)[0]
    width = float(half[0]) * float(centres[1] - centres[0])
    return Histogram(centres, density, float(centres[best]), width, len(peaks))


# -- comparison with the truth ---------------------------------------------------------------------------
@dataclass
class Comparison:
    """A reconstruction against the truth, trivial ambiguities removed.

    Parameters
    ----------
    correlation : float
        Normalised complex correlation with the truth, 0 to 1.
    correlation_twin : float
        With the twin of the truth.
    verdict : {"correct", "conjugated", "incorrect"}
        Correct: `correlation` above 0.9 and above `correlation_twin`; conjugated: the other way about.
    fsc : ShellCorrelation
        With the truth, or with its twin when conjugated.
    modulus, modulus_truth : Histogram
    strain_error : float
        Root mean square difference of strain inside both supports, one layer of voxels left out.
    image, truth : ndarray, (Nz, Ny, Nx), complex64
        Aligned and on one grid; `image` is the twin of the result when conjugated, and scaled to `truth`.
    support : ndarray, bool
        Of the truth, on that grid.
    voxel_size, shear, geometry
        Of that grid.
    """

    correlation: float
    correlation_twin: float
    verdict: Verdict
    fsc: ShellCorrelation
    modulus: Histogram
    modulus_truth: Histogram
    strain_error: float
    image: np.ndarray
    truth: np.ndarray
    support: np.ndarray
    voxel_size: tuple[float, float, float]
    shear: tuple[float, float]
    geometry: Geometry

    def as_reconstruction(self) -> Reconstruction:
        """The aligned result with the support of the truth, for pictures beside it."""
        return Reconstruction(self.image, self.support, self.voxel_size, self.geometry, self.shear)

    def to_json(self) -> dict[str, Any]:
        """The numbers, JSON-serialisable; lengths in nm."""
        finite = np.isfinite(self.fsc.resolution_full_period)
        return {
            "correlation": self.correlation,
            "correlation_twin": self.correlation_twin,
            "class": self.verdict,
            "fsc_half_bit_full_period_nm": self.fsc.resolution_full_period * 1e9 if finite else None,
            "fsc_half_bit_half_period_nm": self.fsc.resolution_half_period * 1e9 if finite else None,
            "fsc_limited_by_grid": self.fsc.limited_by_grid,
            "strain_error": self.strain_error if np.isfinite(self.strain_error) else None,
            **{
                name: {"mode": h.mode, "width": h.width, "peaks": h.peaks}
                for name, h in (("modulus", self.modulus), ("modulus_truth", self.modulus_truth))
            },
        }

    def __str__(self) -> str:
        limit = "<= " if self.fsc.limited_by_grid else ""
        return (
            f"{self.verdict}: correlation {self.correlation:.4f} (twin {self.correlation_twin:.4f}), "
            f"FSC 1/2 bit {limit}{self.fsc.resolution_half_period * 1e9:.1f} nm half period "
            f"({limit}{self.fsc.resolution_full_period * 1e9:.1f} nm full), modulus mode "
            f"{self.modulus.mode:.2f}, width {self.modulus.width:.2f}, {self.modulus.peaks} peak(s)"
        )


def classify(with_truth: float, with_twin: float) -> Verdict:
    """Class of a trial from its two correlations."""
    if max(with_truth, with_twin) <= 0.9:
        return "incorrect"
    return "correct" if with_truth > with_twin else "conjugated"


def compare(
    result: Reconstruction,
    truth: Reconstruction,
    *,
    ramp: bool = True,
    free_axes: tuple[int, ...] | None = None,
) -> Comparison:
    """Compare a reconstruction with the truth, whatever grid, shear and size either has.

    The truth is band-limited to the result's voxels and sampled on the result's sheared grid; the result is
    shifted onto it (sub-voxel, three axes), its phase and by default a linear phase are matched, and the
    same is done with the twin of the truth.

    Parameters
    ----------
    result, truth : Reconstruction
    ramp : bool
        Whether a linear phase is trivial: a peak or pixel centre half a pixel off makes one.
    free_axes : tuple of int, optional
        Axes along which a shift is trivial: all by default; only 0 (zeta) is with a known modulator.

    Returns
    -------
    comparison : Comparison

    Raises
    ------
    ValueError
        When either is empty, or they belong to different reflections.
    """
    _check_comparable(result, truth)
    voxel, shear = result.voxel_size, result.shear
    needed = orthogonal_shape(truth, voxel, shear)
    shape = tuple(max(n + n % 2, m) for n, m in zip(result.image.shape, needed, strict=True))
    nz, ny, nx = shape
    image = _pad(result.image, shape).astype(np.complex64)
    grid = (voxel, (nz, ny, nx), shear)
    target = resample(truth, *grid)
    support = resample_support(truth, *grid)

    mirrored = twin(image)
    direct = align(image, target, ramp=ramp, free_axes=free_axes)
    conjugate = align(mirrored, target, ramp=ramp, free_axes=free_axes)
    c_direct, c_twin = abs(correlation(target, direct)), abs(correlation(target, conjugate))
    verdict = classify(c_direct, c_twin)
    best = conjugate if verdict == "conjugated" else direct
    best = best * np.float32(np.real(np.vdot(best, target)) / np.real(np.vdot(best, best)))

    box = bounding_box(support)
    filled = float(np.prod([s.stop - s.start for s in box])) / support.size
    return Comparison(
        correlation=float(c_direct),
        correlation_twin=float(c_twin),
        verdict=verdict,
        fsc=fourier_shell_correlation(best, target, voxel, shear, filled=filled),
        modulus=modulus_histogram(result.image, result.support),
        modulus_truth=modulus_histogram(target, support),
        strain_error=_strain_error(best, target, support, voxel, shear, result.geometry),
        image=best,
        truth=target,
        support=support,
        voxel_size=voxel,
        shear=shear,
        geometry=result.geometry,
    )


def _check_comparable(result: Reconstruction, truth: Reconstruction) -> None:
    for name, one in (("result", result), ("truth", truth)):
        if not one.image.any() or not one.support.any():
            raise ValueError(f"the {name} is empty; nothing to compare")
    q, q_truth = result.geometry.q_norm, truth.geometry.q_norm
    if abs(q / q_truth - 1) > 0.01:
        raise ValueError(
            f"result and truth belong to different reflections: |Q| is {q * 1e-9:.3f} and "
            f"{q_truth * 1e-9:.3f} /nm"
        )


def _pad(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros around, origin kept at ``n // 2``."""
    before = [n // 2 - m // 2 for n, m in zip(shape, image.shape, strict=True)]
    after = [n - m - b for n, m, b in zip(shape, image.shape, before, strict=True)]
    return np.pad(image, list(zip(before, after, strict=True)))


def _strain_error(
    image: np.ndarray,
    truth: np.ndarray,
    support: np.ndarray,
    voxel_size: tuple[float, float, float],
    shear: tuple[float, float],
    geometry: Geometry,
) -> float:
    inner = np.asarray(ndimage.binary_erosion(support), bool)
    if not inner.any():
        return float("nan")
    fields = [strain(Reconstruction(i, support, voxel_size, geometry, shear)) for i in (image, truth)]
    return float(np.sqrt(np.nanmean(np.square(fields[0] - fields[1]), where=inner)))
