"""Where the object is: a start from the autocorrelation, then shrink-wrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from bcmi_beamline.reconstruction.conventional._prepare import Pattern, bridge
from bcmi_beamline.reconstruction.fourier import ifftn, to_centre, to_corner

Window = tuple[np.ndarray, ...]
"""Indices along each axis (``np.ix_``) of a box that may go round the corner."""

_AXES = (0, 1, 2)
_CORNERS = np.array([(a, b, c) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (-0.5, 0.5)])
"""Of a voxel about its centre."""
ABOVE_NOISE = 3.0
"""An autocorrelation is seen where its power, smoothed, exceeds the median this many times."""
HULL_MARGIN = 1.1
"""The first support is larger than half the hull by this."""


def autocorrelation_support(pattern: Pattern, threshold: float = 0.002) -> np.ndarray:
    """The hull of the autocorrelation, half as large, bool, corner origin.

    Lags at which a convex crystal has an autocorrelation fill twice the crystal, where it has a centre of
    symmetry, and a little more where it has none. Strain makes the autocorrelation small, not narrow: it is
    looked for down to the noise.

    Parameters
    ----------
    pattern : Pattern
    threshold : float
        Of the autocorrelation, relative to its peak; at least a few times its noise is taken.
    """
    power = np.square(np.abs(to_centre(ifftn(to_corner(bridge(pattern), _AXES).astype(np.complex64)), _AXES)))
    peak = power.max()
    power = ndimage.gaussian_filter(power, 1.0)
    level = max(threshold**2 * peak, ABOVE_NOISE * float(np.median(power)))
    seen = ndimage.binary_opening(power > level, np.ones((3, 3, 3)))
    labels = np.zeros(seen.shape, np.int32)
    ndimage.label(seen, output=labels)
    middle = tuple(n // 2 for n in seen.shape)
    seen = labels == labels[middle] if seen[middle] else power > 0.01 * peak
    return to_corner(_hull(seen, HULL_MARGIN / 2), _AXES)


def _hull(where: np.ndarray, scale: float) -> np.ndarray:
    """Points within `scale` times the convex hull of `where`, origin at ``n // 2``."""
    middle = np.array([n // 2 for n in where.shape])
    corners = (np.argwhere(where)[:, None] - middle + _CORNERS).reshape(-1, 3)
    z, y, x = (np.arange(n) - m for n, m in zip(where.shape, middle, strict=True))
    inside = np.ones(where.shape, bool)
    for a, b, c, offset in np.unique(ConvexHull(corners).equations.round(6), axis=0):
        inside &= (a * z)[:, None, None] + (b * y)[:, None] + c * x <= -scale * offset
    return inside


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
