"""The published algorithm, as a baseline to compare with.

J. Zhao et al., Phys. Rev. Lett. (2025), End Matter B: every iteration carries all slices of the crystal to
the detector, replaces the moduli, carries the waves back through the inverse of the modulator and keeps
what falls inside the support; the drift follows from each slice and its update.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, slow_transform
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, follow_drift
from bcmi_beamline.reconstruction.modulation.slices import modulus_step


def replace_moduli(
    operator: FrameOperator, wave: np.ndarray, target: np.ndarray, frame: int, shift: np.ndarray | None
) -> tuple[np.ndarray, float, float]:
    """Change of an exit wave (ny, nx) under the modulus constraint, and the sums of `modulus_step`."""
    psi = operator.forward(wave, frame, shift)
    misfit, free = modulus_step(psi, target, operator.neighbour)
    return operator.inverse(psi, frame, shift), misfit, free


def iterate_slices(
    problem: Problem,
    solution: Solution,
    iterations: int,
    after: Callable[[int, Solution], None] | None = None,
    free_drift: bool = False,
) -> Solution:
    """Modulus and support constraints in turn, slice by slice; arguments as in `refine`."""
    for iteration in range(iterations):
        waves = problem.waves(solution.image)
        change, misfit, free = problem.descent(waves, solution.shifts, replace_moduli)
        solution.record(problem, misfit, free)
        solution.image = (solution.image + problem.back(change)) * solution.support
        if free_drift:
            follow_drift(problem, solution, waves, change)
        if after is not None:
            after(iteration, solution)
    return solution


def random_crystal(problem: Problem, rng: np.random.Generator) -> Solution:
    """Complex noise inside the region, with the counts of the scan."""
    noise = rng.normal(size=(*problem.region.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    image = noise * problem.region
    light = np.linalg.norm(slow_transform(problem.matrix, image))
    image *= np.float32(np.sqrt(problem.counts.sum()) / light)
    return Solution(image, problem.region)
