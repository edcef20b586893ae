"""Partly coherent light: how coherent it was, and crystals fitted in the light of several points of a source.

Each point of an incoherent source sends a wave of its own tilt, and the intensities of all of them add up. A
Gaussian source makes the Gaussian degree of coherence ``exp(-(x1 - x2)^2 / 2 L^2)`` of Schell's model (Mandel
and Wolf, Optical Coherence and Quantum Optics, section 5.6), L the coherence length at the crystal. Few
points are enough: the nodes of a Gauss-Hermite quadrature, the more the larger the crystal is beside L.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, Source, copy_of, refine

Lengths = tuple[float, float]
"""Coherence lengths (x, y) across the incident beam, m; inf: coherent."""

FRAMES = 24
"""So many of the brightest tell enough."""

PASSES = 3
"""Over these frames for each length that is tried, from the same crystal."""

ACCURATE = 0.02
"""Error of the degree of coherence that as many nodes as are taken may leave, mean over pairs of points of a
crystal of even width: far pairs are few."""

MOST_NODES = 5
"""Along either axis. Reached where the crystal is three coherence lengths wide."""

SEARCH = 7
"""Lengths tried in a search, besides none."""

LARGEST = 3.0
"""Crystal over coherence length up to which a length is looked for: beyond, hardly a fringe is left."""

NOTICED = 0.3
"""Crystal over coherence length below which light is as good as coherent: no contrast is below 0.956."""


def nodes(ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Tilts in units of ``1 / L``, and shares, of the points of a source, for a crystal `ratio` L wide."""
    lags = np.linspace(0, ratio, 65)
    pairs = 1 - np.linspace(0, 1, 65)
    for count in range(1, MOST_NODES + 1):
        points, weights = np.polynomial.hermite.hermgauss(count)
        tilts, shares = np.sqrt(2) * points, weights / weights.sum()
        degree = np.cos(np.multiply.outer(lags, tilts)) @ shares
        if np.average(np.abs(degree - np.exp(-(lags**2) / 2)), weights=pairs) < ACCURATE:
            break
    return tilts, shares


class IncidentLight:
    """What coherence lengths across the incident beam mean for a crystal in the sheared frame.

    A wave tilted by the angular frequencies ``t`` across the incident beam brings the phase ``t . r`` to the
    crystal. In the sheared frame that is a ramp over x' and y' and another kappa: to tilt the light is to
    rock the crystal, and to turn what it sends.

    Parameters
    ----------
    problem : Problem
    geometry : Geometry
        Of the scan.
    support : ndarray, (n_zeta, ny, nx), bool
        Of the crystal: the wider it is, the more points of a source it takes.
    """

    def __init__(self, problem: Problem, geometry: Geometry, support: np.ndarray) -> None:
        self._rocking, self._count = problem.rocking, len(support)
        window, (pixel_y, pixel_x) = problem.operator.window, problem.operator.pixel
        self._phases = []
        for tilt in np.eye(3)[:2]:
            along = geometry.detector_frame @ tilt
            ramp = along[0] * pixel_x * window.indices(1) - along[1] * pixel_y * window.indices(0)[:, None]
            self._phases.append((ramp + along[2] * problem.rocking.shear_offset, along[2]))
        zeta = problem.rocking.zeta(len(support))[:, None, None]
        places = [
            np.broadcast_to(ramp + slope * zeta, support.shape)[support] for ramp, slope in self._phases
        ]
        self.width = np.array([float(np.ptp(p)) for p in places])
        """Of the crystal along x and y, m."""

    def lengths(self, ratios: np.ndarray) -> Lengths:
        """Coherence lengths (x, y), m, for width over length `ratios`; inf for what is not noticed."""
        x, y = np.divide(self.width, ratios, out=np.full(2, np.inf), where=ratios > NOTICED)
        return float(x), float(y)

    def sources(self, lengths: Lengths) -> tuple[Source, ...]:
        """Points of a source that makes light of these coherence lengths (x, y), m; inf: coherent.

        None for light that is as good as coherent.
        """
        (tilts_x, shares_x), (tilts_y, shares_y) = (
            nodes(width / length) for width, length in zip(self.width, lengths, strict=True)
        )
        if len(tilts_x) == len(tilts_y) == 1:
            return ()
        return tuple(
            self.source((tilt_x, tilt_y), share_x * share_y)
            for tilt_x, share_x in zip(tilts_x / lengths[0], shares_x, strict=True)
            for tilt_y, share_y in zip(tilts_y / lengths[1], shares_y, strict=True)
        )

    def source(self, tilt: tuple[float, float], share: float) -> Source:
        """A point whose wave is tilted by `tilt` (x, y), rad/m, with its share of the light."""
        (ramp_x, slope_x), (ramp_y, slope_y) = self._phases
        wave = np.sqrt(share) * np.exp(1j * (tilt[0] * ramp_x + tilt[1] * ramp_y))
        turned = self._rocking.matrix(self._count, tilt[0] * slope_x + tilt[1] * slope_y)
        return Source(wave.astype(np.complex64), turned)


def find_coherence(problem: Problem, solution: Solution, light: IncidentLight) -> Lengths:
    """Coherence lengths with which a few passes from a fitted crystal come closest to the brightest frames.

    Along x, along y and along x again, by Brent's search over width / L. A crystal that was fitted as if the
    light were coherent holds on to some of what is wrong; each search goes on from the best crystal of the
    one before.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Of the problem, with its drift; not changed.
    light : IncidentLight

    Returns
    -------
    (x, y)
        Across the incident beam, m; inf where the light is as good as coherent.
    """
    part = problem.brightest(FRAMES)
    ratios, fitted = np.zeros(2), solution

    def fit(ratios: np.ndarray) -> Solution:
        return refine(part.lit_by(light.sources(light.lengths(ratios))), copy_of(fitted), PASSES)

    for axis in (0, 1, 0):
        tried: list[tuple[float, float, Solution]] = []

        def misfit(ratio: float, axis: int = axis, tried: list = tried) -> float:
            there = ratios.copy()
            there[axis] = ratio
            found = fit(there)
            tried.append((found.error[-1], ratio, found))
            return found.error[-1] ** 2

        misfit(0.0)
        minimize_scalar(misfit, bounds=(0, LARGEST), method="bounded", options={"maxiter": SEARCH})
        _, ratios[axis], fitted = min(tried, key=lambda t: t[0])
    return light.lengths(ratios)
