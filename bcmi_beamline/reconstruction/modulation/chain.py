"""Outward along the rocking curve: each frame starts from what its solved neighbours foretell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2
from bcmi_beamline.reconstruction.modulation.focus import Unevenness, focus, focus_moving, unevenness
from bcmi_beamline.reconstruction.modulation.operators import slow_transform
from bcmi_beamline.reconstruction.modulation.refine import (
    Problem,
    Solution,
    centre_shifts,
    copy_of,
    move,
    refine,
)
from bcmi_beamline.reconstruction.modulation.slices import scale_to_counts, solve_wave
from bcmi_beamline.reconstruction.modulation.synchronise import synchronise
from bcmi_beamline.reconstruction.threads import each

BRIGHT = 0.01
"""The chain solves frames from the first to the last that has this part of the brightest one's counts. Those
further out have too few photons to stand alone, and come in when all frames are fitted together."""

STEPS = 6
"""Of conjugate gradients for each frame, at most."""

NEIGHBOURS = 4
"""Solved frames that foretell the next one: with a longer memory the phases drift."""


SETTLE_THRESHOLDS = (0.12, 0.2, 0.25)
"""Of the support, between rounds of synchronisation."""

EVENNESS = 0.4
"""Power of the unevenness by which a misfit is multiplied to compare answers. After a few passes a crystal
that has been pulled together can fit as well as the right one, but it is three times as uneven; a crystal of
grains, which is uneven, fits twice as well as an answer that is not."""


FAINT = 0.003
"""Part of the brightest frame's counts below which a frame does not tell how even the crystal is."""

EVEN_STEPS = 60
"""Of descent, at most, each time a fitted crystal is made more even."""


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
    bright = np.flatnonzero(problem.counts[order] >= BRIGHT * problem.counts.max())
    order = order[bright[0] : bright[-1] + 1]
    for new, before in walk_outward(order, frame):
        waves[new] = each(lambda j, before=before: extend(problem, waves, j, before, STEPS), new)
        if step is not None:
            step((len(before) + len(new)) / len(order))
    return waves, order


def even_out(
    problem: Problem, solution: Solution, sentinels: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[Solution, float]:
    """Smooth phases and a walk of the frames that make a fitted crystal more even.

    What descent on the counts hardly moves: each frame fits as well with another phase, and nearly as well
    with its wave moved and the crystal's drift with it.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Not changed.
    sentinels : (shifts, after), optional
        From `sentinel_shifts`.

    Returns
    -------
    solution : Solution
        Without a history.
    gain : float
        Part of the unevenness that is gone.
    """
    frames = np.flatnonzero(problem.counts * (problem.weight > 0) > FAINT * problem.counts.max())
    matrix, tilt = problem.matrix[frames], problem.rocking.tilt(frames)
    waves = slow_transform(matrix, solution.image)
    uneven, still = Unevenness(waves, matrix, problem.region, tilt), np.zeros(len(frames))
    pixels = np.zeros((len(problem.counts), 2))
    if solution.shifts is not None:
        pixels = solution.shifts / problem.metres_per_pixel
    left = None if sentinels is None else (sentinels[0] - pixels[sentinels[1]], sentinels[1])
    kappa = problem.rocking.kappa[frames]
    phases, walk = focus_moving(uneven, kappa, still, frames, problem.counts, left, EVEN_STEPS)
    gain = 1 - uneven.moved(phases, walk[frames])[0] / uneven(still)[0]
    turned = move(fft2(waves / tilt), -walk[frames]) * tilt
    turned *= np.exp(1j * phases).astype(np.complex64)[:, None, None]
    image = solution.image + slow_transform(matrix.conj().T, turned - waves)
    support = problem.tightened(image, 0.2, problem.region)
    shifts = (pixels + walk) * problem.metres_per_pixel
    return replace(copy_of(solution), image=image * support, support=support, shifts=shifts), gain


def between_sentinels(shifts: np.ndarray, after: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Places (J, 2) of all frames, on straight lines between sentinels; their mean over the `light` is 0."""
    frames = np.arange(len(light))
    return centre_shifts(np.stack([np.interp(frames, after, s) for s in shifts.T], axis=1), light)


def weighed(solution: Solution) -> float:
    """Error and unevenness of a solution as one number: the lower, the better."""
    return solution.error[-1] * unevenness(solution.image) ** EVENNESS


def combine(
    problem: Problem,
    waves: np.ndarray,
    reached: np.ndarray,
    moving: bool = True,
    sentinels: tuple[np.ndarray, np.ndarray] | None = None,
    passes: int = 2,
) -> Solution:
    """Crystal, support and drift from the solved waves of a chain.

    What the chain leaves open is a smooth phase of the frames, and what it took for a change of the wave may
    be a drift. Both are looked for in the crystal's density (`focus`), the phase in the support too
    (`synchronise`); which of the answers is right, the data say: each is fitted to the `reached` frames for a
    few passes, and the one of lowest misfit, weighed with its evenness, stays. A crystal that is not all of
    one density comes from the support: there the misfits are far apart.

    Parameters
    ----------
    problem : Problem
    waves, reached
        From `chain`.
    moving : bool
        Whether to look for a drift.
    sentinels : (shifts, after), optional
        From `sentinel_shifts`. Phases and walk are then sought from the walk between them on: of a crystal
        that stands pixels away, phases sought as if it stood still say nothing.
    passes : int
        Over the reached frames, for each answer.
    """
    relative = waves[reached] / problem.amplitude[reached, None, None]
    matrix, tilt = problem.matrix[reached], problem.rocking.tilt(reached)
    kappa, back = problem.rocking.kappa[reached], matrix.conj().T
    spectra = fft2(relative / tilt)
    seen = np.zeros((len(waves), 2))
    if moving and sentinels is not None:
        seen = between_sentinels(*sentinels, problem.counts)
        sentinels = sentinels[0] - seen[sentinels[1]], sentinels[1]

    def moved_back(pixels: np.ndarray) -> np.ndarray:
        return move(spectra, -pixels[reached]) * tilt if pixels.any() else relative

    def answer(phases: np.ndarray, pixels: np.ndarray) -> Solution:
        turned = moved_back(pixels) * np.exp(1j * phases).astype(np.complex64)[:, None, None]
        image = slow_transform(back, turned)
        support = problem.tightened(image, 0.2, problem.region)
        shifts = pixels * problem.metres_per_pixel if pixels.any() else None
        return Solution(image * support, support, shifts)

    uneven = Unevenness(moved_back(seen), matrix, problem.region, tilt)
    found = focus(uneven, kappa)
    tried = [answer(phases, seen) for phases in found]
    if moving:
        for phases in found:
            phases, walk = focus_moving(uneven, kappa, phases, reached, problem.counts, sentinels)
            tried.append(answer(phases, seen + walk))
    turned, support = moved_back(seen), problem.region
    for threshold in SETTLE_THRESHOLDS:
        turned, image = synchronise(turned, matrix, support)
        support = problem.tightened(image, threshold, support)
    tried.append(Solution(image * support, support, tried[0].shifts))
    part = problem.only(reached)
    fitted = [refine(part, solution, passes) for solution in tried]
    return copy_of(min(fitted, key=weighed))
