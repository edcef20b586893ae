"""One frame at a time: coherent modulation imaging of a single rocking angle.

Every frame alone is an overdetermined problem in two dimensions (F. Zhang and J. M. Rodenburg, Phys. Rev. B
82, 121104 (2010)); what it leaves open is one phase.
"""

from __future__ import annotations

import numba
import numpy as np

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


def reflect_from_noise(
    operator: FrameOperator,
    targets: np.ndarray,
    rng: np.random.Generator,
    region: np.ndarray,
    steps: int,
    relaxation: float = 0.99,
) -> tuple[np.ndarray, np.ndarray]:
    """Exit waves of frames from noise: reflections, then descent.

    Relaxed averaged alternating reflections (D. R. Luke, Inverse Problems 21, 37 (2005)) between the
    measured moduli and the waves that the window can send to the detector. Descent alone stagnates on
    every other start.

    Parameters
    ----------
    operator : FrameOperator
    targets : ndarray, (frames, Ny, Nx)
        From `make_targets`.
    rng : Generator
    region : ndarray, (ny, nx), bool
        In-plane support.
    steps : int
    relaxation : float
        Luke's beta.

    Returns
    -------
    waves : ndarray, (frames, ny, nx), complex64
    misfit : ndarray, (frames,)
    """
    noise = rng.normal(size=(len(targets), *region.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    psi = operator.forward(scale_to_counts(operator, noise * region, targets))
    beta = np.float32(relaxation)
    for _ in range(steps):
        change = psi.copy()
        modulus_step(change, targets, operator.oversampling)  # P_B psi = psi + change, P_B the moduli
        reflected = psi + 2 * change
        sent = operator.forward(operator.inverse(reflected, regularisation=0.01) * region)  # P_A, the window
        psi += (1 - 2 * beta) * change + beta * (sent - psi)
    return solve_waves(operator, operator.inverse(psi) * region, targets, 40, inside=region)


def solve_from_noise(
    operator: FrameOperator,
    target: np.ndarray,
    rng: np.random.Generator,
    inside: np.ndarray | None = None,
    steps: int = 150,
    rounds: int = 4,
) -> tuple[np.ndarray, float]:
    """Exit wave of one frame, with nothing known but the modulator and the window.

    Starts two at a time from noise until the two that fit best agree: failures all differ.

    Parameters
    ----------
    operator : FrameOperator
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    rng : Generator
    inside : ndarray, (ny, nx), bool, optional
        In-plane support.
    steps : int
        Reflections of each start.
    rounds : int
        Pairs of starts at most.

    Returns
    -------
    wave : ndarray, (ny, nx), complex64
    misfit : float
        Misfit per pixel in use of the best start; 1/4 is what photon noise alone gives.
    """
    region = np.ones(operator.window.shape, bool) if inside is None else inside
    tried: list[tuple[float, np.ndarray]] = []
    for _ in range(rounds):
        pair = np.stack([target, target])
        waves, misfit = reflect_from_noise(operator, pair, rng, region, steps)
        tried = sorted([*tried, *zip(misfit.tolist(), waves, strict=True)], key=lambda t: t[0])
        a, b = tried[0][1], tried[1][1]
        if abs(np.vdot(a, b)) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b):
            break
    misfit, wave = tried[0]
    return wave, misfit / int((target >= 0).sum())
