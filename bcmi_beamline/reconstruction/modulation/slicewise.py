"""The published algorithm, as a baseline to compare with.

J. Zhao et al., Phys. Rev. Lett. (2025), End Matter B: every iteration carries all slices of the crystal to
the detector, replaces the moduli, carries the waves back through the inverse of the modulator and keeps
what falls inside the support; the drift follows from each slice and its update.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, slow_transform
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, centre_shifts, gradients
from bcmi_beamline.reconstruction.modulation.slices import modulus_step

LARGEST_STEP = 0.05
"""Of the drift in one iteration, pixels: a Newton step from afar would overshoot."""


def replace_moduli(
    operator: FrameOperator, wave: np.ndarray, target: np.ndarray, frame: int, shift: np.ndarray | None
) -> tuple[np.ndarray, float, float]:
    """Change of an exit wave (ny, nx) under the modulus constraint, and the sums of `modulus_step`."""
    psi = operator.forward(wave, frame, shift)
    misfit, free = modulus_step(psi, target, operator.neighbour, operator.background)
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


def newton_shift(waves: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Shifts (frames, 2), pixels along (columns, rows), that explain best the `change` of `waves`.

    Least squares of ``change = -shift . grad waves + i phase waves`` frame by frame: the phase is free.
    """
    slopes = -gradients(waves)
    power = np.maximum(np.einsum("jyx,jyx->j", waves.conj(), waves).real, 1e-30)
    beside = (np.einsum("jyx,ajyx->aj", waves.conj(), slopes).imag / power).astype(np.float32)
    slopes -= np.complex64(1j) * beside[..., None, None] * waves
    normal = np.einsum("ajyx,bjyx->jab", slopes.conj(), slopes).real
    damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) + 1e-30
    normal = normal + damping[:, None, None] * np.eye(2)
    right = np.einsum("ajyx,jyx->ja", slopes.conj(), change).real
    return np.linalg.solve(normal, right[..., None])[..., 0]


def implied_shifts(problem: Problem, waves: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Drift (J, 2) in metres (x', y') that the descent directions of the exit waves ask for."""
    tilt = problem.rocking.tilt(slice(None))
    return newton_shift(waves / tilt, directions / tilt) * problem.metres_per_pixel


def follow_drift(problem: Problem, solution: Solution, waves: np.ndarray, change: np.ndarray) -> None:
    """Move the drift of `solution` the way the `change` of its exit waves asks for."""
    # the data see one quadrature of an error of the wave, so that what they ask for is half of Newton's step
    step = 2 * implied_shifts(problem, waves, change)
    shifts = np.zeros_like(step) if solution.shifts is None else solution.shifts
    limit = LARGEST_STEP * min(problem.operator.pixel)
    solution.shifts = centre_shifts(shifts + np.clip(step, -limit, limit), problem.counts)
