"""One phase per frame: the only thing frames have to agree on.

A slice is fixed by its own frame up to a constant phase. The phases follow from the crystal being thin
along zeta: the waves, transformed to zeta, must stay inside the support. No detector transform is needed.
"""

from __future__ import annotations

import numpy as np

from bcmi_beamline.reconstruction.modulation.operators import slow_transform


def synchronise(
    waves: np.ndarray,
    matrix: np.ndarray,
    support: np.ndarray,
    iterations: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn the phase of each wave until together they fill the support best.

    Power iteration on ``r = S E^H (c P)``, ``c_j = phase <P_j, (E r)_j>``.

    Parameters
    ----------
    waves : ndarray, (m, ny, nx), complex64
        Exit waves P_j of the frames reached so far.
    matrix : ndarray, (m, n_zeta), complex64
        Their rows of `RockingOperator.matrix`.
    support : ndarray, (n_zeta, ny, nx), bool
    iterations : int

    Returns
    -------
    waves : ndarray
        With their new phases.
    image : ndarray, (n_zeta, ny, nx)
        ``E^H P`` before the support is applied.
    """
    back = matrix.conj().T
    phases = np.ones(len(waves), np.complex64)
    for _ in range(iterations):
        image = slow_transform(back, phases[:, None, None] * waves) * support
        foretold = slow_transform(matrix, image)
        overlap = np.einsum("jyx,jyx->j", waves.conj(), foretold)
        phases = np.where(overlap != 0, overlap / np.maximum(np.abs(overlap), 1e-30), 1).astype(np.complex64)
    turned = phases[:, None, None] * waves
    return turned, slow_transform(back, turned)
