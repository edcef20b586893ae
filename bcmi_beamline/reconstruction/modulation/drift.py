"""Drift of the crystal from frame to frame.

Frame by frame, a drift and a shift of the exit wave are one and the same; a drift shows only because all
waves have to make up one crystal inside its support.
"""

from __future__ import annotations

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2
from bcmi_beamline.reconstruction.modulation.operators import slow_transform
from bcmi_beamline.reconstruction.modulation.refine import (
    LARGEST_STEP,
    Problem,
    Solution,
    centre_shifts,
    move,
    newton_shift,
)
from bcmi_beamline.reconstruction.modulation.slices import scale_to_counts, solve_wave
from bcmi_beamline.reconstruction.threads import each

HELD, FREED = (120, (40, 70, 100)), (250, (40, 120))
"""Iterations with the drift held and then free, and those after which the support is tightened. Freeing the
drift in a loose support loses it."""

SENTINEL_STEPS = 10
"""Of descent from the central wave to that of a sentinel frame."""


def align_waves(
    problem: Problem,
    waves: np.ndarray,
    frames: np.ndarray,
    solution: Solution,
    shifts: np.ndarray,
    schedule: tuple[int, tuple[int, ...]],
    free: bool,
    measured: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Find the crystal, the frames' phases and their drift that agree with the solved exit waves.

    Minimises ``sum_j ||exp(-i theta_j) T(-s_j) P_j - (E rho)_j||^2`` without touching the detector: Nesterov
    descent in the crystal, the phases in closed form, a clipped Newton step in the drift.

    Parameters
    ----------
    problem : Problem
    waves : ndarray, (m, ny, nx)
        Exit waves solved with the crystal taken to stand still, relative to the flux.
    frames : ndarray, (m,)
        Their indices in the scan.
    solution : Solution
        Its image and support are the start, and are replaced.
    shifts : ndarray, (m, 2)
        Start of the drift, pixels along (columns, rows).
    schedule : (int, tuple of int)
        Iterations, and those after which the support is tightened.
    free : bool
        Whether the drift may change.
    measured : (values, weight), optional
        Shifts known from sentinels, (m, 2) pixels, and how firmly each is held, (m,) from 0 to 1.

    Returns
    -------
    shifts : ndarray, (m, 2)
    """
    matrix, tilt = problem.matrix[frames], problem.rocking.tilt(frames)
    light = problem.counts[frames]
    spectra = fft2(waves / tilt)
    back = matrix.conj().T
    ahead, age, last = solution.image, 0, np.inf
    iterations, tighten_at = schedule
    for iteration in range(iterations):
        moved = move(spectra, -shifts)
        foretold = slow_transform(matrix, ahead) / tilt
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
            shifts = shifts + np.clip(newton_shift(foretold, residual), -LARGEST_STEP, LARGEST_STEP)
            if measured is not None:
                shifts = shifts + 0.1 * measured[1][:, None] * (measured[0] - shifts)
            else:
                shifts = centre_shifts(shifts, light)
        if iteration in tighten_at:
            whole = slow_transform(back, moved * tilt)
            solution.support = problem.tightened(whole, 0.2, solution.support)
            ahead = solution.image = solution.image * solution.support
            age, last = 0, np.inf
    return shifts


def find_drift(
    problem: Problem,
    waves: np.ndarray,
    reached: np.ndarray,
    solution: Solution,
    measured: tuple[np.ndarray, np.ndarray] | None = None,
) -> Solution:
    """Crystal, support and drift from the exit waves of a chain.

    Parameters
    ----------
    problem : Problem
    waves : ndarray, (J, ny, nx)
        From `chain`.
    reached : ndarray of int
        Frames that the chain solved.
    solution : Solution
        Crystal and support found with the drift neglected.
    measured : (values, weight), optional
        From `sentinel_shifts`.

    Returns
    -------
    Solution
        With `shifts`, m; frames that were not reached get those of the nearest that was.
    """
    relative = waves[reached] / problem.amplitude[reached, None, None]
    found = Solution(solution.image, solution.support)
    known = None if measured is None else (measured[0][reached], measured[1][reached])
    shifts = np.zeros((len(reached), 2)) if known is None else known[0].copy()
    problem_and_waves = problem, relative, reached, found
    shifts = align_waves(*problem_and_waves, shifts, HELD, free=False)
    shifts = align_waves(*problem_and_waves, shifts, FREED, free=True, measured=known)
    all_frames = np.arange(len(waves))
    ordered = np.argsort(reached)
    spread = [np.interp(all_frames, reached[ordered], shifts[ordered, axis]) for axis in (0, 1)]
    found.shifts = np.stack(spread, axis=1) * problem.metres_per_pixel
    return found


def sentinel_shifts(
    problem: Problem, central: np.ndarray, frame: int, targets: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drift of every frame as the sentinel frames tell it.

    A sentinel shows the crystal at its Bragg peak again, so that its exit wave is the `central` one, moved.

    Parameters
    ----------
    problem : Problem
    central : ndarray, (ny, nx), complex64
        Exit wave of `frame`.
    frame : int
        The frame at the Bragg peak.
    targets : ndarray, (S, Ny, Nx)
        Sentinel frames, from `make_targets`.
    after : ndarray, (S,)
        Index of the frame after which each was taken.

    Returns
    -------
    values : ndarray, (J, 2)
        Pixels along (columns, rows), relative to `frame`, interpolated between sentinels.
    weight : ndarray, (J,)
        1 at a sentinel, less with the square root of the frames from it: as a random walk spreads.
    """
    operator, flat = problem.operator, problem.rocking.tilt(slice(frame, frame + 1))[0]
    spectrum = fft2((central / flat)[None])

    def shift_of(target: np.ndarray) -> np.ndarray:
        start = scale_to_counts(operator, central, target, frame)
        wave = solve_wave(operator, start, target, frame, SENTINEL_STEPS)[0] / flat
        shift = np.zeros((1, 2))
        for _ in range(30):
            moved = move(spectrum, shift)[0]
            turn = np.vdot(moved, wave) / max(float(np.vdot(moved, moved).real), 1e-30)
            shift = shift + newton_shift(moved[None], (wave / turn - moved)[None])
        return shift[0]

    shifts = np.array(each(shift_of, targets))
    all_frames = np.arange(len(problem.counts))
    order = np.argsort(after)
    values = np.stack([np.interp(all_frames, after[order], shifts[order, axis]) for axis in (0, 1)], axis=1)
    distance = np.abs(all_frames[:, None] - after).min(axis=1)
    return values, 1 / (1 + np.sqrt(distance))
