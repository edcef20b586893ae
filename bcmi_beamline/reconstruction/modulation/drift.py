"""Drift of the crystal from frame to frame.

Frame by frame, a drift and a shift of the exit wave are one and the same; a drift shows only because all
waves have to make up one crystal inside its support.
"""

from __future__ import annotations

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.modulation.operators import slow_transform
from bcmi_beamline.reconstruction.modulation.refine import (
    BLOCK,
    LARGEST_STEP,
    Problem,
    Solution,
    centre_shifts,
    gradients,
    implied_shifts,
    newton_shift,
)
from bcmi_beamline.reconstruction.modulation.slices import solve_waves
from bcmi_beamline.reconstruction.modulation.support import shrink_wrap

SIGNIFICANT = 5.0
"""`drift_significance` above which a drift is followed: below 1 without any (below 2 before the descent has
settled), 15 at 2 nm a frame and 3e6 photons."""


def move(spectra: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Waves of 2D `spectra` moved by `shifts` (frames, 2) pixels along (columns, rows)."""
    fy, fx = (np.fft.fftfreq(n) for n in spectra.shape[1:])
    rows = np.exp(-2j * np.pi * np.multiply.outer(shifts[:, 1], fy)).astype(np.complex64)
    columns = np.exp(-2j * np.pi * np.multiply.outer(shifts[:, 0], fx)).astype(np.complex64)
    return ifft2(spectra * rows[:, :, None] * columns[:, None, :])


def align_waves(
    problem: Problem,
    waves: np.ndarray,
    solution: Solution,
    iterations: int,
    shifts: np.ndarray,
    free: bool,
    tighten_at: tuple[int, ...] = (),
) -> np.ndarray:
    """Find the crystal, the frames' phases and their drift that agree with the solved exit waves.

    Minimises ``sum_j ||exp(-i theta_j) T(-s_j) P_j - (E rho)_j||^2`` without touching the detector: Nesterov
    descent in the crystal, the phases in closed form, a clipped Newton step in the drift.

    Parameters
    ----------
    problem : Problem
    waves : ndarray, (J, ny, nx)
        Exit waves solved with the crystal taken to stand still, relative to the flux.
    solution : Solution
        Its image and support are the start, and are replaced.
    iterations : int
    shifts : ndarray, (J, 2)
        Start of the drift, pixels along (columns, rows).
    free : bool
        Whether the drift may change; hold it until the support is tight.
    tighten_at : tuple of int
        Iterations after which the support is tightened.

    Returns
    -------
    shifts : ndarray, (J, 2)
    """
    tilt = problem.rocking.tilt(slice(None))
    spectra = fft2(waves / tilt)
    back = problem.matrix.conj().T
    ahead, age, last = solution.image, 0, np.inf
    for iteration in range(iterations):
        moved = move(spectra, -shifts)
        foretold = slow_transform(problem.matrix, ahead) / tilt
        overlap = np.einsum("jyx,jyx->j", moved.conj(), foretold)
        moved *= (overlap / np.maximum(np.abs(overlap), 1e-30)).astype(np.complex64)[:, None, None]
        residual = moved - foretold
        cost = float(np.linalg.norm(residual))
        age = 0 if cost > last else age
        last = cost
        following = (ahead + slow_transform(back, residual * tilt)) * solution.support
        age += 1
        ahead = following + np.float32(min((age - 1) / (age + 2), 0.98)) * (following - solution.image)
        solution.image = following
        if free:
            step = newton_shift(foretold, residual)
            shifts = centre_shifts(problem, shifts + np.clip(step, -LARGEST_STEP, LARGEST_STEP))
        if problem.tighten and iteration in tighten_at:
            solution.support = shrink_wrap(slow_transform(back, moved * tilt), problem.region, 0.2)
            solution.image = solution.image * solution.support
            ahead = solution.image
            age, last = 0, np.inf
    return shifts


def drift_significance(problem: Problem, solution: Solution) -> float:
    """Square of the shifts that the data ask for over what photon noise alone makes of them.

    A count stabilised as in `modulus_step` has variance 1/4, half of it along a given change of the wave;
    so a shift has the variance ``1 / (8 ||dP/dx||^2)`` along each axis. Averaged over the light.
    """
    waves = problem.waves(solution.image)
    directions, _, _ = problem.descent(waves, solution.shifts)
    shifts = centre_shifts(problem, implied_shifts(problem, waves, directions)) / problem.metres_per_pixel
    slopes = gradients(waves / problem.rocking.tilt(slice(None)))
    power = np.einsum("ajyx,ajyx->j", slopes.conj(), slopes).real / 2
    return float(np.average(4 * power * (shifts**2).sum(axis=1), weights=problem.counts))


def find_drift(problem: Problem, solution: Solution) -> Solution:
    """Crystal, support and drift from the exit waves of the chain.

    The chain's few steps leave the waves of a drifting crystal half way; they are solved to the end first,
    then aligned, with the drift held until the support is tight.
    """
    waves = solution.waves
    assert waves is not None, "the solution keeps no exit waves"
    light = problem.amplitude[:, None, None]
    waves = waves * light
    for first in range(0, len(waves), BLOCK):
        part = slice(first, first + BLOCK)
        waves[part], _ = solve_waves(problem.operator, waves[part], problem.targets[part], 25)
    waves /= light
    found = Solution(solution.image, solution.support)
    shifts = np.zeros((len(waves), 2))
    shifts = align_waves(problem, waves, found, 120, shifts, free=False, tighten_at=(40, 70, 100))
    shifts = align_waves(problem, waves, found, 200, shifts, free=True, tighten_at=(40, 120))
    found.shifts = shifts * problem.metres_per_pixel
    return found
