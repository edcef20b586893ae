"""Outward along the rocking curve: each frame starts from what its solved neighbours foretell."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2
from bcmi_beamline.reconstruction.modulation.focus import focus, unevenness
from bcmi_beamline.reconstruction.modulation.operators import slow_transform
from bcmi_beamline.reconstruction.modulation.refine import (
    Problem,
    Solution,
    copy_of,
    move,
    refine,
)
from bcmi_beamline.reconstruction.modulation.slices import scale_to_counts, solve_wave
from bcmi_beamline.reconstruction.modulation.synchronise import synchronise
from bcmi_beamline.reconstruction.threads import each

ENOUGH = 0.998
"""Part of all counts at which the chain ends: what lies further out has too few photons to stand alone, and
comes in when all frames are fitted together."""

STEPS = 6
"""Of conjugate gradients for each frame, at most."""

NEIGHBOURS = 4
"""Solved frames that foretell the next one: with a longer memory the phases drift."""


SETTLE_THRESHOLDS = (0.12, 0.2, 0.25)
"""Of the support, between rounds of synchronisation."""

UNEVEN = 1.5
"""A candidate so many times as uneven as the most even one is not considered, however well it fits: before
all frames are fitted together, a crystal that has been pulled together may fit better than the right one."""


def neighbour_weights(
    kappa_known: np.ndarray, kappa: float, thickness: float, regularisation: float = 0.01
) -> np.ndarray:
    """Weights with which known slices foretell the one at `kappa`.

    Slices of a crystal that fills `thickness` evenly correlate as ``sinc(thickness dkappa / 2 pi)``; the
    weights are those of the best linear prediction.

    Parameters
    ----------
    kappa_known : ndarray, (m,)
        rad/m.
    kappa, thickness, regularisation : float
        rad/m, m, variance of the slices' errors relative to the slices.
    """

    def correlation(difference: np.ndarray) -> np.ndarray:
        return np.sinc(thickness * difference / (2 * np.pi))

    system = correlation(np.subtract.outer(kappa_known, kappa_known))
    system += regularisation * np.eye(len(kappa_known))
    return np.linalg.solve(system, correlation(kappa_known - kappa))


def walk_outward(order: np.ndarray, start: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs (next frames on both sides, frames already reached), frames sorted by angle in `order`.

    Examples
    --------
    >>> [new for new, _ in walk_outward(np.array([0, 1, 2, 3]), start=1)]
    [[0, 2], [3]]
    """
    at = int(np.flatnonzero(order == start)[0])
    low, high = at, at
    while low > 0 or high < len(order) - 1:
        reached = [int(j) for j in order[low : high + 1]]
        new = []
        if low > 0:
            low -= 1
            new.append(int(order[low]))
        if high < len(order) - 1:
            high += 1
            new.append(int(order[high]))
        yield new, reached


def extend(problem: Problem, waves: np.ndarray, frame: int, reached: list[int], steps: int) -> np.ndarray:
    """Foretell the wave of `frame` from the nearest of `reached`, and fit it to its counts.

    The prediction sets the phase of the wave, the counts its scale.

    Returns
    -------
    wave : ndarray, (ny, nx), complex64
    """
    rocking, target = problem.rocking, problem.targets[frame]
    known = np.array(reached)
    near = known[np.argsort(np.abs(rocking.kappa[known] - rocking.kappa[frame]))[:NEIGHBOURS]]
    weights = neighbour_weights(rocking.kappa[near], rocking.kappa[frame], problem.thickness)
    flat = waves[near] / rocking.tilt(near)
    guess = np.tensordot(weights.astype(np.float32), flat, 1) * rocking.tilt(slice(frame, frame + 1))[0]
    guess = scale_to_counts(problem.operator, guess, target, frame)
    return solve_wave(problem.operator, guess, target, frame, steps)[0]


def chain(
    problem: Problem, central: np.ndarray, frame: int, step: Callable[[float], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Solve frames from the `central` exit wave of one outward, each in phase with its neighbours.

    Parameters
    ----------
    problem : Problem
    central : ndarray, (ny, nx), complex64
        Exit wave of `frame`.
    frame : int
    step : callable, optional
        Given the part of the chain that is done.

    Returns
    -------
    waves : ndarray, (J, ny, nx), complex64
        In the light of each frame; 0 where the chain did not reach.
    reached : ndarray of int
        Frames solved, by rising kappa.
    """
    waves = np.zeros((len(problem.targets), *central.shape), np.complex64)
    waves[frame] = central
    order = np.argsort(problem.rocking.kappa)
    reached = [frame]
    total = float(problem.counts.sum())
    for new, before in walk_outward(order, frame):
        waves[new] = each(lambda j, before=before: extend(problem, waves, j, before, STEPS), new)
        reached = before + new
        done = float(problem.counts[reached].sum()) / total
        if step is not None:
            step(min(1.0, done / ENOUGH))
        if done > ENOUGH:
            break
    return waves, order[np.isin(order, reached)]


def combine(
    problem: Problem,
    waves: np.ndarray,
    reached: np.ndarray,
    shifts: np.ndarray | None = None,
    passes: int = 2,
) -> Solution:
    """Crystal and support from the solved waves of a chain, moved back by the drift `shifts` (J, 2) in m.

    What the chain leaves open is a smooth phase of the frames. It is looked for in the support
    (`synchronise`) and in the crystal's density (`focus`); which of the answers is right, the data say:
    each is fitted to the `reached` frames for a few passes, and of those that are not far more uneven than
    the others the one of lowest misfit stays.
    """
    relative = waves[reached] / problem.amplitude[reached, None, None]
    if shifts is not None:
        tilt = problem.rocking.tilt(reached)
        relative = move(fft2(relative / tilt), -(shifts / problem.metres_per_pixel)[reached]) * tilt
    matrix = problem.matrix[reached]
    back = matrix.conj().T

    tried = []
    for phases in focus(relative, problem.rocking.kappa[reached], matrix, problem.region):
        image = slow_transform(back, relative * np.exp(1j * phases).astype(np.complex64)[:, None, None])
        tried.append((image, problem.tightened(image, 0.2, problem.region)))
    turned, support = relative, problem.region
    for threshold in SETTLE_THRESHOLDS:
        turned, image = synchronise(turned, matrix, support)
        support = problem.tightened(image, threshold, support)
        tried[2:] = [(image, support)]
    part = problem.only(reached)
    fitted = [refine(part, Solution(image * support, support, shifts), passes) for image, support in tried]
    levels = [unevenness(s.image) for s in fitted]
    even = [s for s, level in zip(fitted, levels, strict=True) if level <= UNEVEN * min(levels)]
    return copy_of(min(even, key=lambda s: s.error[-1]))
