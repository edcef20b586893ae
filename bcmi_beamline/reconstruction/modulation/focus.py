"""Slow errors of the frames' phases and places, found by the homogeneity of the crystal.

A chain fixes the phase of each frame from its neighbours, so that small errors add up to a smooth function of
the rocking angle, a defocus along zeta. A drift of the crystal adds a tilt of that phase, ``2 pi f . s``, to
each frame: together they are an aberration of the crystal's transform. A support hardly sees it where strain
spreads the light of different frames over different parts of the crystal: a strained crystal, pulled together
along zeta, fits into its support even better. But its modulus is no longer even. A crystal is all of one
density; the right phases and the right places make it most nearly two-valued, nothing outside and one value
inside.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import Legendre
from scipy.optimize import minimize

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.threads import each

HIGHEST_ORDERS = (11, 17)
"""Of the Legendre polynomials that make up the phase: too few leave errors, too many follow noise, so that
both are tried. Order 1 is the place along zeta."""

LARGEST, STARTS = 40.0, 33
"""Amounts of order 2, rad, at which the descents start, evenly from minus to plus `LARGEST`."""

DESCENTS = 3
"""Best starts that are followed to the end."""

STEP_COST = 2e-4
"""Evenness given up for a step of one pixel between frames: a crystal walks, it does not scatter about."""

SENTINEL_COST = 25 * STEP_COST
"""The same for a pixel between a frame and the sentinel taken after it."""


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
    tilt : ndarray, (m, ny, nx), complex64
        From `RockingOperator.tilt`.
    """

    def __init__(self, waves: np.ndarray, matrix: np.ndarray, region: np.ndarray, tilt: np.ndarray):
        self._waves = (waves / np.linalg.norm(waves)).astype(np.complex64)
        self._matrix = matrix
        self._back = np.ascontiguousarray(matrix.conj().T)
        self._region = region.reshape(len(region), -1)
        self._tilt, self._upright = tilt, tilt.conj()  # a product, since it costs less than a quotient
        self._spectra = fft2(self._waves * self._upright)
        self._f = [2 * np.pi * np.fft.fftfreq(n) for n in waves.shape[1:]]

    def __call__(self, phases: np.ndarray) -> tuple[float, np.ndarray]:
        """Value at `phases` (m,), rad, and its gradient (m,)."""
        turned = np.exp(1j * phases).astype(np.complex64)[:, None, None] * self._waves
        level, slope = self._level(turned)
        return level, np.imag(np.einsum("jyx,jyx->j", turned.conj(), slope)).astype(float)

    def moved(self, phases: np.ndarray, shifts: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Value for waves moved back by `shifts` (m, 2), and its gradients (m,) and (m, 2).

        Shifts in pixels along (columns, rows).
        """
        rows = np.exp(1j * (phases[:, None] + np.multiply.outer(shifts[:, 1], self._f[0])))
        columns = np.exp(1j * np.multiply.outer(shifts[:, 0], self._f[1]))
        spectra = self._spectra * rows.astype(np.complex64)[:, :, None]
        spectra *= columns.astype(np.complex64)[:, None, :]
        level, slope = self._level(ifft2(spectra) * self._tilt)
        overlap = spectra.conj()
        overlap *= fft2(slope * self._upright)
        lines = np.imag(overlap.sum(axis=2, dtype=complex)), np.imag(overlap.sum(axis=1, dtype=complex))
        return level, lines[0].sum(axis=1), np.stack([lines[1] @ self._f[1], lines[0] @ self._f[0]], axis=1)

    def _level(self, waves: np.ndarray) -> tuple[float, np.ndarray]:
        """Value, and its slope with respect to the waves."""
        image = (self._back @ waves.reshape(len(waves), -1)) * self._region
        square = np.real(image) ** 2 + np.imag(image) ** 2
        modulus = np.sqrt(square)
        s2 = float(square.sum(dtype=float))
        s3 = float((square * modulus).sum(dtype=float))
        s4 = float((square * square).sum(dtype=float))
        image *= np.float32(2 / s2) + np.float32(4 / s4) * square - np.float32(6 / s3) * modulus
        return float(np.log(s2 * s4 / s3**2)), (self._matrix @ image).reshape(waves.shape)


def unevenness(image: np.ndarray) -> float:
    """``log(S2 S4 / S3^2)`` of a crystal, as in `Unevenness`."""
    modulus = np.abs(image).astype(float)
    s2, s3, s4 = (float((modulus**n).sum()) for n in (2, 3, 4))
    return float(np.log(s2 * s4 / s3**2)) if s3 > 0 else float("inf")


def slow_basis(kappa: np.ndarray, highest: int) -> np.ndarray:
    """Legendre polynomials of order 2 to `highest` over the frames, (m, highest - 1)."""
    middle, half = (kappa.max() + kappa.min()) / 2, max(float(np.ptp(kappa)) / 2, 1e-30)
    return np.stack([Legendre.basis(n)((kappa - middle) / half) for n in range(2, highest + 1)], axis=1)


def focus(uneven: Unevenness, kappa: np.ndarray) -> list[np.ndarray]:
    """Smooth phases that make the crystal most even, for waves in phase with their neighbours.

    Parameters
    ----------
    uneven : Unevenness
        Of these waves.
    kappa : ndarray, (m,)
        rad/m.

    Returns
    -------
    list of ndarray, (m,)
        Phases, rad, to be added to those of the waves, one for each of `HIGHEST_ORDERS`. Noise in the
        waves shifts the balance between minima: let the data choose.
    """

    def found(highest: int) -> np.ndarray:
        basis = slow_basis(kappa, highest)

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


def focus_moving(
    uneven: Unevenness,
    kappa: np.ndarray,
    phases: np.ndarray,
    frames: np.ndarray,
    light: np.ndarray,
    sentinels: tuple[np.ndarray, np.ndarray] | None = None,
    steps: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Smooth phases and a walk of the crystal that together make it most even.

    Parameters
    ----------
    uneven : Unevenness
        Of the waves of `frames`, with their tilt.
    kappa, phases : ndarray, (m,)
        rad/m, and the start of the phases.
    frames : ndarray, (m,)
        Their indices in the scan, that is, in time.
    light : ndarray, (J,)
        Of all frames of the scan: the mean place over the light of `frames` is 0.
    sentinels : (shifts, after), optional
        From `sentinel_shifts`: pixels (S, 2), and the frame after which each was taken.
    steps : int
        Of descent, at most.

    Returns
    -------
    phases : ndarray, (m,)
    shifts : ndarray, (J, 2)
        Pixels along (columns, rows), of all frames of the scan.
    """
    basis, count = slow_basis(kappa, HIGHEST_ORDERS[0]), len(light)
    orders = basis.shape[1]
    walk = np.tri(count)[:, 1:]  # shifts of all frames from the steps between them
    walk -= np.average(walk[frames], axis=0, weights=light[frames])
    if sentinels is not None:
        seen = sentinels[0] - sentinels[0].mean(axis=0)
        shown = walk[sentinels[1]] - walk[sentinels[1]].mean(axis=0)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        steps = x[orders:].reshape(-1, 2)
        level, by_phase, by_shift = uneven.moved(basis @ x[:orders], walk[frames] @ steps)
        level += STEP_COST * float(np.square(steps).sum())
        by_step = walk[frames].T @ by_shift + 2 * STEP_COST * steps
        if sentinels is not None:
            beside = shown @ steps - seen
            level += SENTINEL_COST * float(np.square(beside).sum())
            by_step += 2 * SENTINEL_COST * shown.T @ beside
        return level, np.concatenate([basis.T @ by_phase, by_step.ravel()])

    start = np.concatenate([np.linalg.lstsq(basis, phases, rcond=None)[0], np.zeros(2 * (count - 1))])
    end = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return basis @ end.x[:orders], walk @ end.x[orders:].reshape(-1, 2)
