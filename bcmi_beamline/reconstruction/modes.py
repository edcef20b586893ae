"""What several solutions have in common: eigen-decomposition of aligned trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bcmi_beamline.reconstruction.alignment import align, correlation, twin


def align_trials(
    images: Sequence[np.ndarray],
    *,
    with_twin: bool = True,
    ramp: bool = False,
    free_axes: tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """Bring trials onto the first: sub-voxel shift, phase, and the twin where that fits better.

    Parameters
    ----------
    images : sequence of ndarray, same shape, complex
        Best first.
    with_twin : bool
        Conventional imaging cannot tell an object from its twin; with a modulator there is none.
    ramp, free_axes
        As in `align`.
    """
    reference = images[0]
    aligned = [reference]
    for image in images[1:]:
        candidates = [image, twin(image)] if with_twin else [image]
        tried = [align(c, reference, ramp=ramp, free_axes=free_axes) for c in candidates]
        aligned.append(max(tried, key=lambda t: abs(correlation(reference, t))))
    return aligned


def eigen_modes(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal modes of aligned images, from the eigenvectors of their Gram matrix.

    Parameters
    ----------
    images : sequence of ndarray, same shape, complex
        Aligned (`align_trials`), or the modes mean nothing.

    Returns
    -------
    modes : ndarray, (n, ...), complex64
        Strongest first; the first is scaled to the images' mean norm and in phase with the first image.
    weights : ndarray, (n,)
        Share of the whole power in each mode; sum 1. All in the first means all images are one.
    """
    stack = np.asarray(images, np.complex64)
    flat = stack.reshape(len(stack), -1)
    gram = (flat.conj() @ flat.T).astype(np.complex128)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    modes = (vectors.T.astype(np.complex64) @ flat).reshape(stack.shape) / np.float32(np.sqrt(len(stack)))
    modes[0] *= np.complex64(np.exp(-1j * np.angle(np.vdot(stack[0], modes[0]))))
    return modes, values / values.sum()


def spread(images: Sequence[np.ndarray], support: np.ndarray) -> dict[str, float]:
    """Uncertainty of one aligned trial, from how the trials differ: root mean square over the support.

    Returns
    -------
    dict
        ``phase_uncertainty_rad`` and ``modulus_uncertainty`` (relative); empty for a single trial, which
        says nothing about its own error.
    """
    if len(images) < 2 or not support.any():
        return {}
    stack = np.asarray(images, np.complex64)[:, support]
    mean = stack.mean(axis=0)
    turned = stack * np.exp(-1j * np.angle(mean)).astype(np.complex64)
    degrees = len(stack) / (len(stack) - 1)
    modulus = np.abs(stack)
    return {
        "phase_uncertainty_rad": float(np.sqrt(degrees * np.mean(np.angle(turned) ** 2))),
        "modulus_uncertainty": float(
            np.sqrt(degrees * np.mean((modulus - modulus.mean(axis=0)) ** 2)) / modulus.mean()
        ),
    }
