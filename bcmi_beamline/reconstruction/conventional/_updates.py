"""The classic iterative maps, each one pass over memory.

Notation: ``rho`` the iterate, ``P`` its modulus projection, ``S`` the support; ``beta`` the relaxation.
Every update writes its result into `rho`. The loops are written without branches, which the compiler turns
into vector instructions (ten times faster). Plain versions of the same formulae live in the tests.
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
def free_log_likelihood(psi: np.ndarray, packed: np.ndarray) -> float:
    """Sum of the Poisson log-likelihood of `psi` (flat) over the free pixels of `packed`."""
    total = 0.0
    for i in range(psi.size):
        if packed[i] < 0 and packed[i] > MASKED:
            seen = -1 - packed[i]
            power = psi[i].real * psi[i].real + psi[i].imag * psi[i].imag
            expected = max(power, np.float32(1e-6))
            total += expected - seen
            if seen > 0:
                total += seen * np.log(seen / expected)
    return total


@_jit
def project_modulus(psi: np.ndarray, packed: np.ndarray, offset: float) -> float:
    """Give `psi` (flat, complex64) the measured moduli, in place; masked and free pixels keep their own.

    ``psi *= sqrt((I + c) / (|psi|^2 + c))``: with ``c = 0`` the projection of R. W. Gerchberg and W. O.
    Saxton (Optik 35, 237 (1972)); with ``c = 3/8`` a unit gradient step on Anscombe's variance-stabilised
    amplitudes, which for counts is all but Poisson maximum likelihood.

    Returns
    -------
    residual : float
        Sum of ``(|psi| - sqrt(I))^2`` over used pixels, before the projection.
    """
    c, tiny = np.float32(offset), np.float32(1e-20)
    zero, one = np.float32(0), np.float32(1)
    residual = zero
    for i in range(psi.size):
        value = psi[i]
        power = value.real * value.real + value.imag * value.imag
        used = packed[i] >= zero
        counts = max(packed[i], zero)
        difference = np.sqrt(power) - np.sqrt(counts)
        residual += difference * difference if used else zero
        scale = np.sqrt((counts + c) / (power + c + tiny)) if used else one
        psi[i] = scale * value
    return float(residual)


@_jit
def error_reduction(rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float) -> None:
    """``S P`` (J. R. Fienup, Appl. Opt. 21, 2758 (1982)); `beta` has no part in it."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(rho.size):
        rho[i] = (one if support[i] else zero) * projected[i]


@_jit
def hybrid_input_output(rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float) -> None:
    """``P`` in the support, ``rho - beta P`` outside (Fienup 1982, Eq. 44)."""
    b, zero, one = np.float32(beta), np.float32(0), np.float32(1)
    for i in range(rho.size):
        keep = zero if support[i] else one
        take = one if support[i] else -b
        rho[i] = keep * rho[i] + take * projected[i]


@_jit
def relaxed_averaged_reflections(
    rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float
) -> None:
    """``beta/2 (R_S R_M + 1) rho + (1 - beta) P`` (D. R. Luke, Inverse Problems 21, 37 (2005), Eq. 2.10).

    For a support that is ``P`` inside and ``beta rho + (1 - 2 beta) P`` outside.
    """
    b, c = np.float32(beta), np.float32(1 - 2 * beta)
    zero, one = np.float32(0), np.float32(1)
    for i in range(rho.size):
        keep = zero if support[i] else b
        take = one if support[i] else c
        rho[i] = keep * rho[i] + take * projected[i]


@_jit
def difference_map_estimates(
    rho: np.ndarray, projected: np.ndarray, support: np.ndarray, beta: float
) -> None:
    """First half of the difference map (V. Elser, J. Opt. Soc. Am. A 20, 40 (2003)).

    ``rho + beta (P_S f_M - P_M f_S)`` with ``f_M = (1 + 1/beta) P - rho / beta`` and
    ``f_S = (1 - 1/beta) P_S rho + rho / beta``. On return `projected` holds ``f_S``, whose modulus projection
    is still to come, and `rho` the part that is done: ``rho + beta P_S f_M``.
    """
    b, inverse = np.float32(beta), np.float32(1 / beta)
    zero, one = np.float32(0), np.float32(1)
    for i in range(rho.size):
        value = rho[i]
        take = b + one if support[i] else zero
        rho[i] = (zero if support[i] else one) * value + take * projected[i]
        projected[i] = (one if support[i] else inverse) * value


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

    `previous` keeps the last point, which lies in the support; `rho` becomes the point ahead of it.
    """
    m, zero, one = np.float32(momentum), np.float32(0), np.float32(1)
    for i in range(rho.size):
        point = (one if support[i] else zero) * projected[i]
        rho[i] = point + m * (point - previous[i])
        previous[i] = point


Update = Callable[[np.ndarray, np.ndarray, np.ndarray, float], None]

UPDATES: dict[str, Update] = {
    "er": error_reduction,
    "hio": hybrid_input_output,
    "raar": relaxed_averaged_reflections,
}
"""Maps that need one modulus projection an iteration."""
