"""Outward along the rocking curve: each frame starts from what its solved neighbours foretell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, RockingOperator
from bcmi_beamline.reconstruction.modulation.slices import scale_to_counts, solve_waves


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


def extend(
    operator: FrameOperator,
    rocking: RockingOperator,
    waves: np.ndarray,
    targets: np.ndarray,
    new: list[int],
    reached: list[int],
    thickness: float,
    steps: int = 4,
    neighbours: int = 4,
) -> None:
    """Foretell the waves of the frames `new` from the nearest of `reached`, and fit them to their frames.

    Works on `waves` (J, ny, nx) in place. The prediction sets the phase of a frame, its counts the scale.
    """
    known = np.array(reached)
    start = []
    for j in new:
        distance = np.abs(rocking.kappa[known] - rocking.kappa[j])
        near = known[np.argsort(distance)[:neighbours]]
        weights = neighbour_weights(rocking.kappa[near], rocking.kappa[j], thickness)
        flat = waves[near] / rocking.tilt(near)
        start.append(np.tensordot(weights.astype(np.float32), flat, 1) * rocking.tilt(slice(j, j + 1))[0])
    guess = scale_to_counts(operator, np.stack(start), targets[new])
    waves[new], _ = solve_waves(operator, guess, targets[new], steps)
