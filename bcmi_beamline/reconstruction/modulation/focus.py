"""Slow errors of the frames' phases, found by the homogeneity of the crystal.

A chain fixes the phase of each frame from its neighbours, so that small errors add up to a smooth function of
the rocking angle, a defocus along zeta. A support hardly sees it where strain spreads the light of different
frames over different parts of the crystal: a strained crystal, pulled together along zeta, fits into its
support even better. But its modulus is no longer even. A crystal is all of one density; of all smooth phases
the right ones make it most nearly two-valued, nothing outside and one value inside.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Legendre
from scipy.optimize import minimize

from bcmi_beamline.reconstruction.threads import each

HIGHEST_ORDERS = (11, 17)
"""Of the Legendre polynomials that make up the phase: too few leave errors, too many follow noise, so that
both are tried. Order 1 is the place along zeta."""

LARGEST, STARTS = 40.0, 33
"""Amounts of order 2, rad, at which the descents start, evenly from minus to plus `LARGEST`."""

DESCENTS = 3
"""Best starts that are followed to the end."""


class Unevenness:
    """``log(S2 S4 / S3^2)`` with ``S_n = sum |rho|^n``: 0 where the modulus takes one value besides 0.

    By Cauchy-Schwarz it is never negative, and it does not depend on the scale.

    Parameters
    ----------
    waves : ndarray, (m, ny, nx), complex64
    matrix : ndarray, (m, n_zeta), complex64
        Their rows of `RockingOperator.matrix`.
    region : ndarray, (n_zeta, ny, nx), bool
        What lies outside does not count.
    """

    def __init__(self, waves: np.ndarray, matrix: np.ndarray, region: np.ndarray):
        self._waves = (waves / np.linalg.norm(waves)).reshape(len(waves), -1)
        self._matrix = matrix
        self._back = np.ascontiguousarray(matrix.conj().T)
        self._region = region.reshape(len(region), -1)

    def __call__(self, phases: np.ndarray) -> tuple[float, np.ndarray]:
        """Value at `phases` (m,), rad, and its gradient (m,)."""
        turned = np.exp(1j * phases).astype(np.complex64)[:, None] * self._waves
        image = (self._back @ turned) * self._region
        square = image.real**2 + image.imag**2
        modulus = np.sqrt(square)
        s2 = float(square.sum(dtype=float))
        s3 = float((square * modulus).sum(dtype=float))
        s4 = float((square * square).sum(dtype=float))
        image *= np.float32(2 / s2) + np.float32(4 / s4) * square - np.float32(6 / s3) * modulus
        overlap = np.einsum("jx,jx->j", turned.conj(), self._matrix @ image)
        return float(np.log(s2 * s4 / s3**2)), np.imag(overlap).astype(float)


def unevenness(image: np.ndarray) -> float:
    """``log(S2 S4 / S3^2)`` of a crystal, as in `Unevenness`."""
    modulus = np.abs(image).astype(float)
    s2, s3, s4 = ((modulus**n).sum() for n in (2, 3, 4))
    return float(np.log(s2 * s4 / s3**2)) if s3 > 0 else float("inf")


def focus(waves: np.ndarray, kappa: np.ndarray, matrix: np.ndarray, region: np.ndarray) -> list[np.ndarray]:
    """Smooth phases that make the crystal most even, for waves in phase with their neighbours.

    Parameters
    ----------
    waves, matrix, region
        As for `Unevenness`.
    kappa : ndarray, (m,)
        rad/m.

    Returns
    -------
    list of ndarray, (m,)
        Phases, rad, to be added to those of the waves, one for each of `HIGHEST_ORDERS`. Noise in the
        waves shifts the balance between minima: let the data choose.
    """
    uneven = Unevenness(waves, matrix, region)
    middle, half = (kappa.max() + kappa.min()) / 2, max(float(np.ptp(kappa)) / 2, 1e-30)

    def found(highest: int) -> np.ndarray:
        basis = np.stack([Legendre.basis(n)((kappa - middle) / half) for n in range(2, highest + 1)], axis=1)

        def value(x: np.ndarray) -> tuple[float, np.ndarray]:
            level, slope = uneven(basis @ x)
            return level, basis.T @ slope

        starts = [a * np.eye(highest - 1)[0] for a in np.linspace(-LARGEST, LARGEST, STARTS)]
        starts.sort(key=lambda x: value(x)[0])
        ends = [
            minimize(value, x, jac=True, method="L-BFGS-B", options={"maxiter": 60})
            for x in starts[:DESCENTS]
        ]
        return basis @ min(ends, key=lambda end: float(end.fun)).x

    return each(found, HIGHEST_ORDERS)
