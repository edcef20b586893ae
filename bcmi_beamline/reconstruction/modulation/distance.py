"""Distance from crystal to modulator, by the homogeneity of the crystal.

Counts hardly tell d1: waves that left the crystal pass for waves that left a plane beside it, and the misfit
may even fall. But what is found in that plane is the crystal out of focus, and walking with the rocking
angle. Brought back into focus, its modulus is most even: a crystal is all of one density.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.modulation.focus import unevenness
from bcmi_beamline.reconstruction.modulation.operators import slow_transform
from bcmi_beamline.reconstruction.modulation.prepare import operator_through
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, RockingScan

FARTHEST, COARSE = 60e-6, 4e-6
"""A focus is looked for so far on either side, first in steps of so much, m."""

DISTANCE_PILOTS = 4
"""Crystals that are solved for it, at most, each at the distance that those before tell."""

SETTLED = 0.3e-6
"""m. A crystal that is out of focus by less is the last."""

UNSURE = 0.2
"""Part of ``p^2 / lambda``, the depth over which a pixel is in focus, by which d1 may always be wrong: ten
simulated crystals were wrong by 0.17 of it (rms), more than rows and columns differ."""

LEAST_SHARE = 0.3
"""Part of an error of d1, at least, that a crystal solved with it shows: no step goes farther."""


class Refocus:
    """A crystal's exit waves, to be carried along the diffracted beam and made up to a crystal again.

    Parameters
    ----------
    image : ndarray, (n_zeta, ny, nx), complex64
    matrix : ndarray, (J, n_zeta), complex64
        Of the slow axis.
    region : ndarray, (n_zeta, ny, nx), bool
        What lies outside does not count.
    pixel : (y, x)
        m.
    wavelength : float
        m.
    """

    def __init__(
        self,
        image: np.ndarray,
        matrix: np.ndarray,
        region: np.ndarray,
        pixel: tuple[float, float],
        wavelength: float,
    ):
        self._back, self._region = matrix.conj().T, region
        self._shape = ny, nx = image.shape[1:]
        waves = np.zeros((len(matrix), 2 * ny, 2 * nx), np.complex64)  # room for what is out of focus
        waves[:, :ny, :nx] = slow_transform(matrix, image)
        self._spectra = fft2(waves, overwrite=True)
        self._fresnel = [
            np.pi * wavelength * np.fft.fftfreq(2 * n, p) ** 2 for n, p in zip((ny, nx), pixel, strict=True)
        ]

    def __call__(self, along_y: float, along_x: float) -> np.ndarray:
        """The crystal (n_zeta, ny, nx) in focus so much farther downstream, m, for rows and for columns."""
        rows, columns = (
            np.exp(-1j * distance * f).astype(np.complex64)
            for distance, f in zip((along_y, along_x), self._fresnel, strict=True)
        )
        ny, nx = self._shape
        waves = ifft2(self._spectra * rows[:, None] * columns, overwrite=True)[:, :ny, :nx]
        return slow_transform(self._back, np.ascontiguousarray(waves)) * self._region


class Focus(NamedTuple):
    """How far downstream, m, a crystal is most even, and how uncertain that is."""

    distance: float
    error: float


def find_focus(problem: Problem, solution: Solution) -> Focus:
    """How far downstream of where it was solved a crystal is most even.

    Rows and columns asked apart give two answers; half of their difference is the uncertainty.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Of the problem; not changed.
    """
    operator = problem.operator
    refocus = Refocus(solution.image, problem.matrix, problem.region, operator.pixel, operator.wavelength)
    both = _least(lambda d: unevenness(refocus(d, d)), FARTHEST)
    rows = _least(lambda d: unevenness(refocus(both + d, both)), COARSE)
    columns = _least(lambda d: unevenness(refocus(both, both + d)), COARSE)
    return Focus(both, abs(rows - columns) / 2)


def _least(value: Callable[[float], float], farthest: float) -> float:
    """Where `value` is least between minus and plus `farthest`, m: on a grid, then by R. Brent's search."""
    step = min(COARSE, farthest / 2)
    tried = np.arange(-farthest, farthest + step / 2, step)
    best = tried[int(np.argmin([value(d) for d in tried]))]
    found = minimize_scalar(
        value, bounds=(best - step, best + step), method="bounded", options={"xatol": 2e-8}
    )
    return float(found.x)  # pyright: ignore[reportAttributeAccessIssue]


def refocused(
    scan: RockingScan, modulator: Modulator, problem: Problem, solve: Callable[[Problem, int], Solution]
) -> tuple[Problem, Modulator, Focus]:
    """Problem and modulator at the distance d1 where the crystal is most even; how far that is off, still.

    A crystal shows a half to two thirds of an error of d1; the next one is solved with d1 corrected by what
    it shows, the third where a straight line through what the last two show says that nothing is left.

    Parameters
    ----------
    scan, modulator
        Those of the problem.
    problem : Problem
    solve : callable
        Makes the n-th crystal, of a problem and n, that the distance is found from.
    """
    told: list[tuple[float, float]] = []
    focus = Focus(0.0, np.inf)
    with one_thread_per_product():
        for n in range(DISTANCE_PILOTS):
            focus = find_focus(problem, solve(problem, n))
            told.append((modulator.sample_distance, focus.distance))
            if abs(focus.distance) < SETTLED or n == DISTANCE_PILOTS - 1:
                break
            modulator = replace(modulator, sample_distance=next_distance(told))
            problem = problem.through(operator_through(scan, modulator, problem))
    depth = max(problem.operator.pixel) ** 2 / problem.operator.wavelength
    error = np.sqrt(focus.error**2 + focus.distance**2 + (UNSURE * depth) ** 2)
    return problem, modulator, Focus(focus.distance, float(error))


def next_distance(told: list[tuple[float, float]]) -> float:
    """Distance to try after distances and what crystals solved there showed."""
    distance, shown = told[-1]
    share = 1.0
    if len(told) > 1:
        before, seen = told[-2]
        share = float(np.clip((shown - seen) / (distance - before), LEAST_SHARE, 1.0))
    return distance - shown / share
