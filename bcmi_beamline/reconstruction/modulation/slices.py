"""One frame at a time: coherent modulation imaging of a single rocking angle.

Every frame alone is an overdetermined problem in two dimensions (F. Zhang and J. M. Rodenburg, Phys. Rev. B
82, 121104 (2010)); what it leaves open is one phase.
"""

from __future__ import annotations

import numba
import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.fourier import to_corner
from bcmi_beamline.reconstruction.modulation.operators import FrameOperator
from bcmi_beamline.scans import RockingScan

ANSCOMBE = 0.375
"""sqrt(I + 3/8) of a Poisson count has the variance 1/4 whatever its mean."""


def make_targets(scan: RockingScan, free: np.ndarray) -> np.ndarray:
    """Pack counts and what may be done with them into one array, zero frequency at the corner.

    Parameters
    ----------
    scan : RockingScan
    free : ndarray, (J, Ny, Nx), bool
        Free pixels.

    Returns
    -------
    ndarray, (J, Ny, Nx), float32
        ``sqrt(I + 3/8)`` where a pixel is used; -1 where it is bad, saturated or not finite; ``-2 - I`` where
        it is free.
    """
    counts = scan.frames.astype(np.float32)
    bad = scan.mask | ~np.isfinite(counts) | (counts < 0)
    if scan.count_cutoff is not None:
        bad |= counts >= scan.count_cutoff
    counts[bad] = 0
    targets = np.where(free, -2 - counts, np.sqrt(counts + np.float32(ANSCOMBE)))
    targets[bad] = -1
    return np.ascontiguousarray(to_corner(targets), dtype=np.float32)


def frame_counts(targets: np.ndarray) -> np.ndarray:
    """Counts in the pixels in use of each frame, (J,)."""
    return np.array([(t[t >= 0].astype(float) ** 2 - ANSCOMBE).sum() for t in targets])


@numba.njit(cache=True, nogil=True, fastmath=True)
def modulus_step(psi: np.ndarray, targets: np.ndarray, oversampling: int) -> np.ndarray:  # pragma: no cover
    """Turn detector waves into the descent direction of the variance-stabilised misfit, in place.

    The misfit is ``L = sum (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2`` over the pixels in use, its descent
    direction ``-dL/d psi* = (sqrt(I_o + 3/8) / sqrt(I_c + 3/8) - 1) psi``, 0 elsewhere.

    Parameters
    ----------
    psi : ndarray, (frames, V Ny, V Nx), complex64
    targets : ndarray, (frames, Ny, Nx), float32
        From `make_targets`.
    oversampling : int
        V.

    Returns
    -------
    ndarray, (frames, 2), float64
        Misfit L and the free log-likelihood summed over the free pixels.
    """
    v = oversampling
    sums = np.zeros((len(psi), 2))
    for j in range(len(psi)):
        for row in range(targets.shape[1]):
            misfit = np.float32(0)
            free = np.float32(0)
            for column in range(targets.shape[2]):
                target = targets[j, row, column]
                counts = np.float32(0)
                for a in range(v):
                    for b in range(v):
                        x = psi[j, v * row + a, v * column + b]
                        counts += x.real * x.real + x.imag * x.imag
                factor = np.float32(0)
                if target >= 0:
                    modulus = np.sqrt(counts + np.float32(0.375))
                    misfit += (modulus - target) ** 2
                    factor = target / modulus - np.float32(1)
                elif target <= -2:
                    seen = -2 - target
                    free += counts - seen
                    if seen > 0:
                        free += seen * np.log(seen / max(counts, np.float32(1e-6)))
                for a in range(v):
                    for b in range(v):
                        psi[j, v * row + a, v * column + b] *= factor
            sums[j, 0] += misfit
            sums[j, 1] += free
    return sums


def descend(
    operator: FrameOperator, waves: np.ndarray, targets: np.ndarray, shifts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Descent step at exit waves (frames, ny, nx), and the sums of `modulus_step`.

    The length of the step is stable: one over the most light that the modulator passes anywhere, which is
    1 but for a map that rings.
    """
    psi = operator.forward(waves, shifts)
    sums = modulus_step(psi, targets, operator.oversampling)
    return operator.step * operator.adjoint(psi, shifts), sums


def solve_waves(
    operator: FrameOperator,
    waves: np.ndarray,
    targets: np.ndarray,
    steps: int,
    momentum: float = 0.9,
    shifts: np.ndarray | None = None,
    inside: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Improve exit waves (frames, ny, nx) by accelerated descent, each frame on its own.

    Returns
    -------
    waves : ndarray
    misfit : ndarray, (frames,)
        At the last step.
    """
    velocity = np.zeros_like(waves)
    sums = np.zeros((len(waves), 2))
    for _ in range(steps):
        direction, sums = descend(operator, waves, targets, shifts)
        velocity *= np.float32(momentum)
        velocity += direction
        if inside is not None:
            velocity *= inside
        waves = waves + velocity
    return waves, sums[:, 0]


def scale_to_counts(operator: FrameOperator, waves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Give each exit wave the counts of its frame."""
    used = targets >= 0
    model = (operator.intensity(operator.forward(waves)) * used).sum(axis=(-2, -1))
    seen = np.where(used, targets**2 - ANSCOMBE, 0).sum(axis=(-2, -1))
    scale = np.sqrt(np.maximum(seen, 0) / np.maximum(model, 1e-12))
    return waves * scale[:, None, None].astype(np.float32)


def tighten_plane(wave: np.ndarray, threshold: float, smooth: float) -> np.ndarray:
    """Where a wave (ny, nx) is: smoothed modulus above `threshold` of its maximum, grown by a pixel, bool."""
    modulus = ndimage.gaussian_filter(np.abs(wave), smooth)
    return ndimage.binary_dilation(modulus > threshold * modulus.max())


def solve_from_noise(
    operator: FrameOperator,
    target: np.ndarray,
    rng: np.random.Generator,
    inside: np.ndarray | None = None,
    stages: int = 8,
    steps: int = 20,
    tries: int = 3,
) -> tuple[np.ndarray, float]:
    """Exit wave of one frame from noise, with nothing known but the modulator.

    Nesterov-accelerated descent that restarts when the misfit rises, with a two-dimensional shrink-wrap
    between its stages.

    Parameters
    ----------
    operator : FrameOperator
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    rng : Generator
    inside : ndarray, (ny, nx), bool, optional
        Largest in-plane support.
    stages, steps : int
        Supports tried, and steps for each.
    tries : int
        Each starts from other noise; one that failed shows by its misfit.

    Returns
    -------
    wave : ndarray, (ny, nx), complex64
    misfit : float
        Misfit per pixel in use of the best try; 1/4 is what photon noise alone gives.
    """
    targets = np.repeat(target[None], tries, axis=0)
    region = np.ones(operator.window.shape, bool) if inside is None else inside
    noise = rng.normal(size=(tries, *region.shape, 2)).astype(np.float32)
    waves = scale_to_counts(operator, noise.view(np.complex64)[..., 0] * region, targets)
    allowed = np.repeat(region[None], tries, axis=0)
    misfit = np.full(tries, np.inf)
    for stage in range(stages):
        ahead, age = waves, np.zeros(tries)
        for _ in range(steps):
            direction, sums = descend(operator, ahead, targets)
            following = (ahead + direction) * allowed
            age = np.where(sums[:, 0] > misfit, 1, age + 1)
            misfit = sums[:, 0]
            push = ((age - 1) / (age + 2)).astype(np.float32)[:, None, None]
            ahead = following + push * (following - waves)
            waves = following
        if stage < stages - 1:  # cautious while the wave is not yet to be believed
            threshold, smooth = min(0.10 + 0.02 * stage, 0.2), 2.0 if stage < stages // 2 else 1.0
            allowed = np.stack([region & tighten_plane(wave, threshold, smooth) for wave in waves])
    best = int(np.argmin(misfit))
    return waves[best], float(misfit[best] / (target >= 0).sum())
