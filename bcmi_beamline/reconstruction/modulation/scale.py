"""By how much the map of the modulator is too large, and d1 with it: what the rocking scan tells of both.

A stage that goes too far by a part s of each step makes the map of a ptychographic calibration larger by that
part, and d1, too: its frames tell how much features are magnified, which is the ratio of the two. The light
of a rocking scan meets features displaced by s times its extent, and no crystal makes up for that. (d1 alone
is another matter: to the counts it is a defocus, which another crystal has as well.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator
from bcmi_beamline.reconstruction.modulation.prepare import operator_through
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, copy_of, refine
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, RockingScan

FRAMES = 40
"""So many of the brightest tell enough."""

PASSES = 4
"""Over these frames at each scale, from the same crystal."""

STEP = 1e-3
"""Between the three scales of a round."""

SCALE_PILOTS = 3
"""Crystals that are solved for it, at most, each through the map that the one before has corrected."""

ROUNDS = 5
"""At most: the misfit is a parabola near its least only."""

SETTLED = 1e-4
"""A round that changes the scale by less is the last."""


class Scale(NamedTuple):
    """Factor of map and d1, and how uncertain it is; infinite where the frames do not tell it."""

    factor: float
    error: float

    @property
    def told(self) -> bool:
        """Whether the factor differs from 1 by more than it is uncertain."""
        return abs(self.factor - 1) > self.error


def scaled(modulator: Modulator, factor: float) -> Modulator:
    """The modulator with map, beam on it, and d1 larger by `factor`."""
    return replace(
        modulator,
        pixel_size=modulator.pixel_size * factor,
        sample_distance=modulator.sample_distance * factor,
    )


def find_scale(problem: Problem, solution: Solution, operator_at: Callable[[float], FrameOperator]) -> Scale:
    """Scale of the map with which a few passes from a fitted crystal come closest to the brightest frames.

    The least of a parabola through the misfits at three scales, again about the scale that was found, until
    it stays. The free pixels, which no pass has seen, are asked the same: what they answer otherwise is how
    uncertain the scale is. A crystal that was fitted through a map of wrong scale holds on to 5 to 20 % of
    what is wrong: one solved anew through the corrected map tells the rest.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Of the problem, with its drift; not changed.
    operator_at : callable
        Makes the operator of the problem for a map and d1 larger by a factor.
    """
    part = problem.brightest(FRAMES)
    factor, told, free = 1.0, np.inf, np.inf
    fitted = solution

    def fit(factor: float) -> Solution:
        here = part.through(operator_at(factor).over(solution.background))
        return refine(here, copy_of(fitted), PASSES)

    for _ in range(ROUNDS):
        tried = [fit(factor + side * STEP) for side in (-1, 0, 1)]
        told = step_to_least([t.error[-1] ** 2 for t in tried])
        free = step_to_least([t.free_llk[-1] for t in tried]) if problem.free_count else told
        fitted = tried[1 + int(np.clip(np.rint(told / STEP), -1, 1))]  # the nearest
        factor += told
        if abs(told) < SETTLED:
            break
    settled = abs(told) < STEP and abs(free) < STEP
    return Scale(factor, float(np.hypot(told, told - free)) if settled else np.inf)


def step_to_least(misfits: list[float]) -> float:
    """From the middle of three scales to the least of a parabola through their misfits, two steps at most.

    Where the misfits curve down, two steps towards the lower side.
    """
    below, here, above = misfits
    curvature, slope = below - 2 * here + above, (above - below) / 2
    steps = -slope / curvature if curvature > 0 else -np.sign(slope) * np.inf
    return STEP * float(np.clip(np.nan_to_num(steps, nan=2.0, posinf=2.0, neginf=-2.0), -2, 2))


def rescale(
    scan: RockingScan, modulator: Modulator, problem: Problem, solve: Callable[[Problem, int], Solution]
) -> tuple[Problem, Modulator, Scale]:
    """Problem and modulator at the scale that the frames tell, and that scale.

    Parameters
    ----------
    scan, modulator
        Those of the problem.
    problem : Problem
    solve : callable
        Makes the n-th crystal, of a problem and n, that the scale is found from.
    """
    factor, last = 1.0, Scale(1.0, np.inf)

    def operator_at(further: float) -> FrameOperator:
        return operator_through(scan, scaled(modulator, factor * further), problem)

    with one_thread_per_product():
        for n in range(SCALE_PILOTS):
            last = find_scale(problem, solve(problem, n), operator_at)
            if not last.told:
                break
            problem = problem.through(operator_at(last.factor))
            factor *= last.factor
    return problem, scaled(modulator, factor), Scale(factor, float(np.hypot(last.error, last.factor - 1)))
