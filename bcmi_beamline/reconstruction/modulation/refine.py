"""All frames together: descent on the crystal itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    slow_transform,
)
from bcmi_beamline.reconstruction.modulation.slices import descend

BLOCK = 8
"""Frames per transform: enough to fill the processors, few enough to stay in their cache."""


@dataclass
class Problem:
    """A rocking curve made ready: operators, packed counts and where the crystal can be.

    Parameters
    ----------
    operator : FrameOperator
    rocking : RockingOperator
    targets : ndarray, (J, Ny, Nx)
        From `make_targets`.
    amplitude : ndarray, (J,)
        Square root of the relative incident flux.
    weight : ndarray, (J,)
        Trust in a frame: the part of its light that meets the calibrated map.
    region : ndarray, (n_zeta, ny, nx), bool
        Largest support allowed.
    thickness : float
        Longest chord along z', m.
    tighten : bool
        Whether the support may shrink within `region`.
    """

    operator: FrameOperator
    rocking: RockingOperator
    targets: np.ndarray
    amplitude: np.ndarray
    weight: np.ndarray
    region: np.ndarray
    thickness: float
    tighten: bool = True
    matrix: np.ndarray = field(init=False)
    norm: float = field(init=False)
    free_count: int = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = self.rocking.matrix(len(self.region))
        self.norm = float(
            (np.square(self.targets, where=self.targets >= 0, out=np.zeros_like(self.targets))).sum()
        )
        self.free_count = int((self.targets <= -2).sum())

    def waves(self, image: np.ndarray) -> np.ndarray:
        """Exit waves (J, ny, nx) of a crystal, in the light of each frame."""
        return self.amplitude[:, None, None] * slow_transform(self.matrix, image)

    def descent(
        self, waves: np.ndarray, frames: np.ndarray, shifts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`descend` for some frames of `waves` (J, ny, nx), a few at a time."""
        directions = np.empty((len(frames), *waves.shape[1:]), np.complex64)
        sums = np.zeros(2)
        for first in range(0, len(frames), BLOCK):
            part = frames[first : first + BLOCK]
            moved = None if shifts is None else shifts[part]
            directions[first : first + len(part)], s = descend(
                self.operator, waves[part], self.targets[part], moved
            )
            sums += s.sum(axis=0)
        return directions, sums

    def back(self, directions: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Descent direction of the crystal from those of the exit waves of `frames`."""
        scale = (self.weight * self.amplitude)[frames, None, None].astype(np.float32)
        return slow_transform(self.matrix[frames].conj().T, scale * directions)


@dataclass
class Solution:
    """Where a trial stands: crystal, support, drift and its history."""

    image: np.ndarray
    support: np.ndarray
    shifts: np.ndarray | None = None
    error: list[float] = field(default_factory=list)
    free_llk: list[float] = field(default_factory=list)


def record(problem: Problem, solution: Solution, sums: np.ndarray) -> None:
    """Append the relative misfit and the mean free log-likelihood of one pass over the data."""
    solution.error.append(float(np.sqrt(sums[0] / problem.norm)))
    solution.free_llk.append(float(sums[1] / problem.free_count) if problem.free_count else float("nan"))


def refine(
    problem: Problem,
    solution: Solution,
    iterations: int,
    after: Callable[[int, Solution], None] | None = None,
) -> Solution:
    """Nesterov-accelerated descent of the crystal within its support, restarted when the misfit rises.

    The gradient of ``sum_j w_j sum (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2``, step 1 (the operators add no
    light); restart after B. O'Donoghue and E. Candes, Found. Comput. Math. 15, 715 (2015).

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Changed in place, and returned.
    iterations : int
        Passes over all frames.
    after : callable, optional
        Called with (iteration, solution) after each; may tighten the support or move the drift.
    """
    frames = np.arange(len(problem.targets))
    ahead, age = solution.image, 0
    for iteration in range(iterations):
        directions, sums = problem.descent(problem.waves(ahead), frames, solution.shifts)
        record(problem, solution, sums)
        if len(solution.error) > 1 and solution.error[-1] > solution.error[-2]:
            age = 0
        step = problem.back(directions, frames)
        following = (ahead + step) * solution.support
        age += 1
        ahead = following + np.float32((age - 1) / (age + 2)) * (following - solution.image)
        solution.image = following
        if after is not None:
            after(iteration, solution)
            ahead = ahead * solution.support
    return solution
