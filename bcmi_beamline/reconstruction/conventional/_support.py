"""Where the object is: a start from the autocorrelation, then shrink-wrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.conventional._prepare import Pattern, fill_gaps
from bcmi_beamline.reconstruction.fourier import ifftn, to_corner

Window = tuple[np.ndarray, ...]
"""Indices along each axis (``np.ix_``) of a box that may go round the corner."""


def autocorrelation_support(pattern: Pattern, threshold: float = 0.1) -> np.ndarray:
    """Where the autocorrelation exceeds `threshold` of its peak, bool, corner origin.

    A first support that is sure to hold the object in some position (S. Marchesini et al., Phys. Rev. B 68,
    140101 (2003)).
    """
    filled = fill_gaps(pattern.counts, pattern.mask).astype(np.complex64)
    autocorrelation = np.abs(ifftn(to_corner(filled, (0, 1, 2)), overwrite=True))
    return autocorrelation > threshold * autocorrelation[0, 0, 0]


def shrink_wrap(
    look: Callable[[Window], np.ndarray], support: np.ndarray, sigma: float, threshold: float
) -> np.ndarray:
    """Support from the smoothed modulus (Marchesini et al. 2003), corner origin, wrapped at the edges.

    Parameters
    ----------
    look : callable
        The object, complex64, in the window it is asked for.
    support : ndarray, bool
        The present one; the next stays within reach of it.
    sigma : float
        Of the Gaussian, voxels.
    threshold : float
        Relative to the root mean square of the smoothed modulus within the present support, a measure that
        one hot voxel cannot move.

    Returns
    -------
    support : ndarray, bool
        The present one where the new one would be empty.
    """
    window = wrapped_box(support, margin=int(np.ceil(3 * sigma)) + 2)
    modulus = ndimage.gaussian_filter(np.abs(look(window)), sigma, mode="constant")
    level = threshold * np.sqrt(np.mean(np.square(modulus[support[window]])))
    inside = modulus > level
    if not inside.any():
        return support
    new = np.zeros_like(support)
    new[window] = inside
    return new


def wrapped_box(where: np.ndarray, margin: int = 0) -> Window:
    """Indices (``np.ix_``) of the smallest periodic box that holds every True, and `margin` around it."""
    return np.ix_(*(_wrapped_range(where, axis, margin) for axis in range(where.ndim)))


def _wrapped_range(where: np.ndarray, axis: int, margin: int) -> np.ndarray:
    n = where.shape[axis]
    hit = np.flatnonzero(where.any(axis=tuple(a for a in range(where.ndim) if a != axis)))
    if hit.size == 0:
        return np.arange(n)
    gaps = np.diff(np.append(hit, hit[0] + n))
    first = int(hit[(int(np.argmax(gaps)) + 1) % len(hit)])
    length = n - int(gaps.max()) + 1
    if length + 2 * margin >= n:
        return np.arange(n)
    return (np.arange(first - margin, first + length + margin)) % n


def half_of(support: np.ndarray, axis: int) -> np.ndarray:
    """The half of a support on the low side of its middle along `axis`: no twin fits both halves."""
    index = _wrapped_range(support, axis, 0)
    keep = np.zeros(support.shape[axis], bool)
    keep[index[: (len(index) + 1) // 2]] = True
    return support & keep.reshape([-1 if a == axis else 1 for a in range(support.ndim)])
