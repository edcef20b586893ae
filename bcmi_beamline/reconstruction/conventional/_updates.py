"""The classic iterative maps, each one pass over memory.

Notation: ``rho`` the iterate, ``P`` its modulus projection, ``S`` the support; ``beta`` the relaxation.
Every update writes its result into `rho`. Plain versions of the same formulae live in the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

MASKED = np.float32(-1e30)
"""Stands for an unmeasured pixel in the packed counts of `pack`."""

_jit = numba.njit(nogil=True, fastmath=True, cache=True, error_model="numpy")


def pack(counts: np.ndarray, mask: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Counts, mask and free pixels in one float32 array, so that a pass reads one.

    A used pixel holds its counts, a free one ``-1 - counts``, a masked one `MASKED`.
    """
    packed = np.where(free, -1 - counts, counts).astype(np.float32)
    packed[mask] = MASKED
    return packed


@_jit
def project_modulus(psi: np.ndarray, packed: np.ndarray, offset: float) -> tuple[float, float]:
    """Give `psi` (flat, complex64) the measured moduli, in place; masked and free pixels keep their own.

    ``psi *= sqrt((I + c) / (|psi|^2 + c))``: with ``c = 0`` the projection of R. W. Gerchberg and W. O.
    Saxton (Optik 35, 237 (1972)); with ``c = 3/8`` a unit gradient step on Anscombe's variance-stabilised
    amplitudes, which for counts is all but Poisson maximum likelihood.

    Returns
    -------
    residual, free_llk : float
        Sum of ``(|psi| - sqrt(I))^2`` over used pixels and of the Poisson log-likelihood over free ones,
        both before the projection.
    """
    residual, free_llk = 0.0, 0.0
    c = np.float32(offset)
    for i in range(psi.size):
        counts = packed[i]
        power = psi[i].real * psi[i].real + psi[i].imag * psi[i].imag
        if counts >= 0:
            difference = np.sqrt(power) - np.sqrt(counts)
            residual += difference * difference
            psi[i] *= np.sqrt((counts + c) / (power + c + np.float32(1e-20)))
        elif counts > MASKED:
            seen = -1 - counts
            expected = max(power, np.float32(1e-6))
            free_llk += expected - seen
            if seen > 0:
                free_llk += seen * np.log(seen / expected)
    return residual, free_llk


@_jit
def error_reduction(rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float) -> None:
    """``S P`` (J. R. Fienup, Appl. Opt. 21, 2758 (1982)); `beta` has no part in it."""
    for i in range(rho.size):
        rho[i] = projected[i] if support[i] else np.complex64(0)


@_jit
def hybrid_input_output(rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float) -> None:
    """``P`` in the support, ``rho - beta P`` outside (Fienup 1982, Eq. 44)."""
    b = np.float32(beta)
    for i in range(rho.size):
        rho[i] = projected[i] if support[i] else rho[i] - b * projected[i]


@_jit
def relaxed_averaged_reflections(
    rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float
) -> None:
    """``beta/2 (R_S R_M + 1) rho + (1 - beta) P`` (D. R. Luke, Inverse Problems 21, 37 (2005), Eq. 2.10).

    For a support that is ``P`` inside and ``beta rho + (1 - 2 beta) P`` outside.
    """
    b = np.float32(beta)
    c = np.float32(1 - 2 * beta)
    for i in range(rho.size):
        rho[i] = projected[i] if support[i] else b * rho[i] + c * projected[i]


@_jit
def difference_map_estimates(
    rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float
) -> None:
    """First half of the difference map (V. Elser, J. Opt. Soc. Am. A 20, 40 (2003), Eqs. 9 and 16).

    ``rho + beta (P_S f_M - P_M f_S)`` with ``f_M = (1 + 1/beta) P - rho / beta`` and
    ``f_S = (1 - 1/beta) P_S rho + rho / beta``. On return `projected` holds ``f_S``, whose modulus projection
    is still to come, and `rho` the part that is done: ``rho + beta P_S f_M``.
    """
    b = np.float32(beta)
    inverse = np.float32(1 / beta)
    for i in range(rho.size):
        value = rho[i]
        if support[i]:
            rho[i] = (b + 1) * projected[i]
            projected[i] = value
        else:
            projected[i] = inverse * value


@_jit
def difference_map_close(rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float) -> None:
    """Second half: subtract ``beta P_M f_S``, given as `projected`."""
    b = np.float32(beta)
    for i in range(rho.size):
        rho[i] -= b * projected[i]


@_jit
def accelerate(
    rho: np.ndarray, projected: np.ndarray, support: np.ndarray, previous: np.ndarray, momentum: float
) -> None:
    """Error reduction with Nesterov's extrapolation (Soviet Math. Dokl. 27, 372 (1983)).

    `previous` keeps the last point in the support, `rho` becomes the point ahead of it.
    """
    m = np.float32(momentum)
    for i in range(rho.size):
        if support[i]:
            rho[i] = projected[i] + m * (projected[i] - previous[i])
            previous[i] = projected[i]
        else:
            rho[i] = 0
            previous[i] = 0


Update = Callable[[np.ndarray, np.ndarray, np.ndarray, float], None]

UPDATES: dict[str, Update] = {
    "er": error_reduction,
    "hio": hybrid_input_output,
    "raar": relaxed_averaged_reflections,
}
"""Maps that need one modulus projection an iteration."""
