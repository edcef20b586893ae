"""Drift of the crystal from frame to frame.

Frame by frame, a drift and a shift of the exit wave are one and the same; a drift shows only because all
waves have to make up one crystal. `focus.focus_moving` finds it from the waves alone; here it is followed
while the crystal is fitted to the counts, and read off sentinel frames.
"""

from __future__ import annotations

import numba
import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import integrate_pixels
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, centre_shifts, gradients
from bcmi_beamline.reconstruction.modulation.slices import scale_to_counts
from bcmi_beamline.reconstruction.threads import each

LARGEST_STEP = 0.5
"""Of a shift at once, pixels: further away the counts are no longer linear in it."""

DIM = 1e-3
"""Frames with less light than this part of the brightest one's are placed by their neighbours alone."""

SLOW, MOMENTUM = 4, 0.85
"""Order up to which a drift, as a polynomial of the rocking angle, is slow; how much of the pace it keeps."""

SENTINEL_STEPS = 10
"""Of Gauss and Newton at most; the first ones from where the sentinel before stood."""


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _normal_equations(
    target: np.ndarray, counts: np.ndarray, by_column: np.ndarray, by_row: np.ndarray, sums: np.ndarray
) -> None:  # pragma: no cover
    """Add up the products of residual, derivatives by shift and scale; 3 x 4 `sums`."""
    offset = np.float32(0.375)
    for row in range(target.shape[0]):
        for column in range(target.shape[1]):
            seen = target[row, column]
            if seen < 0:
                continue
            root = np.sqrt(counts[row, column] + offset)
            a, b, c = by_column[row, column] / root, by_row[row, column] / root, counts[row, column] / root
            r = seen - root
            sums[0, 0] += a * a
            sums[0, 1] += a * b
            sums[0, 2] += a * c
            sums[0, 3] += a * r
            sums[1, 1] += b * b
            sums[1, 2] += b * c
            sums[1, 3] += b * r
            sums[2, 2] += c * c
            sums[2, 3] += c * r


def shift_equations(
    problem: Problem, wave: np.ndarray, target: np.ndarray, frame: int, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the counts of one frame say about where the crystal stood.

    Gauss's normal equations of ``sum (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2`` for a small further shift,
    the scale of the frame left free. Most of what a shift does to the wave on the detector is a phase ramp,
    which leaves the counts as they are: only the full derivative tells how much can be seen.

    Parameters
    ----------
    problem : Problem
    wave : ndarray, (ny, nx), complex64
        Exit wave of the crystal at rest.
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    frame : int
    shift : ndarray, (2,)
        Where the crystal is taken to be, pixels along (columns, rows).

    Returns
    -------
    normal : ndarray, (2, 2)
        Per pixel squared; 4 times it is the inverse covariance of the shift under counting noise.
    right : ndarray, (2,)
    """
    operator, tilt = problem.operator, problem.rocking.tilt(slice(frame, frame + 1))
    place = shift * problem.metres_per_pixel
    psi = operator.forward(wave, frame, place)
    counts = operator.intensity(psi)
    by_column, by_row = np.empty_like(counts), np.empty_like(counts)
    for out, slope in zip((by_column, by_row), gradients(wave[None] / tilt)[:, 0], strict=True):
        change = operator.forward(-slope * tilt[0], frame, place)
        overlap = np.real(psi) * np.real(change) + np.imag(psi) * np.imag(change)
        integrate_pixels(overlap, operator.neighbour, out)
    sums = np.zeros((3, 4))
    _normal_equations(target, counts, by_column, by_row, sums)
    sums[[1, 2, 2], [0, 0, 1]] = sums[[0, 0, 1], [1, 2, 2]]
    beside = sums[:2, 2:3] / max(sums[2, 2], 1e-30)
    reduced = sums[:2] - beside * sums[2]
    return reduced[:, :2], reduced[:, 3]


def sentinel_shifts(
    problem: Problem, wave: np.ndarray, frame: int, targets: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the crystal stood in the sentinel frames.

    A sentinel shows the crystal at its Bragg peak again, so that its exit wave is that of the frame at the
    peak, moved.

    Parameters
    ----------
    problem : Problem
    wave : ndarray, (ny, nx), complex64
        Exit wave of `frame`.
    frame : int
        The frame at the Bragg peak.
    targets : ndarray, (S, Ny, Nx)
        Sentinel frames, from `sentinel_targets`.
    after : ndarray, (S,)
        Index of the frame after which each was taken.

    Returns
    -------
    shifts : ndarray, (S, 2)
        Pixels along (columns, rows) from where the crystal stood in `frame`, but for a small constant.
    after : ndarray, (S,)
        Rising.
    """
    order = np.argsort(after)
    shift, shifts = np.zeros(2), []
    for target in targets[order]:
        start = scale_to_counts(problem.operator, wave, target, frame)
        for _ in range(SENTINEL_STEPS):
            normal, right = shift_equations(problem, start, target, frame, shift)
            step = np.clip(np.linalg.solve(normal, right), -LARGEST_STEP, LARGEST_STEP)
            shift = shift + step
            if np.abs(step).max() < 2e-3:
                break
        shifts.append(shift)
    return np.array(shifts), np.asarray(after)[order]


def smooth_walk(shifts: np.ndarray, information: np.ndarray, step: float) -> np.ndarray:
    """Most likely places (J, 2) of a crystal that walks, given measured ones.

    Steps between frames are taken to follow Student's distribution with five degrees of freedom: most are
    about `step`, and a jump now and then is not smoothed away.

    Parameters
    ----------
    shifts : ndarray, (J, 2)
    information : ndarray, (J, 2, 2)
        Inverse covariance of each; 0 where nothing was measured.
    step : float
        Usual length of a step along either axis.

    Returns
    -------
    ndarray, (J, 2)
    """
    count = len(shifts)
    measured = np.zeros((count, 2, count, 2))
    frames = np.arange(count)
    measured[frames, :, frames, :] = information + 1e-9 * np.eye(2)
    right = np.einsum("jab,jb->ja", information, shifts)
    difference = np.diff(np.eye(count), axis=0)
    found, weights = shifts, np.full(count - 1, 1 / step**2)
    for _ in range(4):
        tied = np.einsum("kj,k,kl->jl", difference, weights, difference, optimize=True)
        system = measured + tied[:, None, :, None] * np.eye(2)[None, :, None, :]
        found = np.linalg.solve(system.reshape(2 * count, -1), right.ravel()).reshape(count, 2)
        weights = 1 / (step**2 + np.square(np.diff(found, axis=0)).sum(axis=1) / 5)
    return found


def usual_step(shifts: np.ndarray) -> float:
    """Usual length, pixels, of the steps of `shifts` (J, 2); some are always allowed."""
    return float(np.median(np.abs(np.diff(shifts, axis=0)))) + 0.03


class DriftFollower:
    """Moves the drift of a solution, look by look, to where the counts want it.

    One step of Gauss and Newton for each frame, smoothed as a walk. Each frame compares itself with a
    crystal that was made from all of them where they stand now, so that it hardly feels a slow drift of
    all. That part the sentinels tell, where there are any; else it goes on with momentum.

    Parameters
    ----------
    problem : Problem
    step : float
        Usual step between frames, pixels.
    sentinels : (shifts, after), optional
        From `sentinel_shifts`.
    """

    def __init__(self, problem: Problem, step: float, sentinels: tuple[np.ndarray, np.ndarray] | None = None):
        self._problem, self._step, self._sentinels = problem, step, sentinels
        kappa, light = problem.rocking.kappa, problem.counts
        slow = np.sqrt(light)[:, None] * np.vander(kappa / np.abs(kappa).max(), SLOW + 1)
        self._slow = np.linalg.qr(slow)[0]
        self._pace = np.zeros((SLOW + 1, 2))

    def __call__(self, solution: Solution) -> None:
        """Replace the shifts, m, of `solution`; None is no drift."""
        problem, count = self._problem, len(self._problem.counts)
        waves = problem.waves(solution.image)
        start = np.zeros((count, 2))
        if solution.shifts is not None:
            start = solution.shifts / problem.metres_per_pixel
        bright = np.intersect1d(problem.frames, np.flatnonzero(problem.counts > DIM * problem.counts.max()))
        told = each(lambda j: shift_equations(problem, waves[j], problem.targets[j], j, start[j]), bright)
        information, wanted = np.zeros((count, 2, 2)), start.copy()
        for j, (normal, right) in zip(bright, told, strict=True):
            normal = normal + (1e-3 * np.trace(normal) + 1e-12) * np.eye(2)
            information[j] = 4 * normal
            wanted[j] += np.clip(np.linalg.solve(normal, right), -LARGEST_STEP, LARGEST_STEP)
        found = smooth_walk(wanted, information, self._step)
        if self._sentinels is None:
            found += self._carried_on(found - start)
        else:
            shown, after = self._sentinels
            beside = shown - found[after]
            beside -= np.average(beside, axis=0, weights=problem.counts[after])
            lines = [np.interp(np.arange(count), after, beside[:, axis]) for axis in (0, 1)]
            found += np.stack(lines, axis=1)
        solution.shifts = centre_shifts(found, problem.counts) * problem.metres_per_pixel

    def _carried_on(self, change: np.ndarray) -> np.ndarray:
        """What momentum adds, (J, 2), to the slow part of a `change`."""
        root = np.sqrt(np.maximum(self._problem.counts, 1))[:, None]
        added = MOMENTUM * self._pace
        self._pace = self._slow.T @ (root * change) + added
        return np.where(root > np.sqrt(DIM) * root.max(), self._slow @ added / root, 0)
