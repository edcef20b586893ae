"""Batched Fourier transforms behind one small interface.

Arrays inside loops keep the origin at their corner, so that no shift enters a loop; `to_corner` and
`to_centre` convert at the edges. Every transform is unitary (``norm="ortho"``) and stays in complex64.
"""

from __future__ import annotations

import os

import numpy as np
from scipy import fft as _fft

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
"""Threads per transform: the processors this process may run on."""


def fft2(a: np.ndarray, *, overwrite: bool = False, workers: int = WORKERS) -> np.ndarray:
    """Unitary forward transform over the last two axes: real space to detector."""
    return np.asarray(_fft.fft2(a, norm="ortho", workers=workers, overwrite_x=overwrite))


def ifft2(a: np.ndarray, *, overwrite: bool = False, workers: int = WORKERS) -> np.ndarray:
    """Unitary inverse of `fft2`: detector to real space."""
    return np.asarray(_fft.ifft2(a, norm="ortho", workers=workers, overwrite_x=overwrite))


def transform_lines(a: np.ndarray, axis: int, *, forward: bool = True) -> np.ndarray:
    """Unitary transform of complex `a` along one axis, in place, by the calling thread."""
    transform = _fft.fft if forward else _fft.ifft
    return np.asarray(transform(a, axis=axis, norm="ortho", overwrite_x=True))


def fftn(a: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
    """Unitary forward transform over all axes."""
    return np.asarray(_fft.fftn(a, norm="ortho", workers=WORKERS, overwrite_x=overwrite))


def ifftn(a: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
    """Unitary inverse of `fftn`."""
    return np.asarray(_fft.ifftn(a, norm="ortho", workers=WORKERS, overwrite_x=overwrite))


def to_corner(a: np.ndarray, axes: tuple[int, ...] = (-2, -1)) -> np.ndarray:
    """Move the origin from ``n // 2`` to index 0 along `axes`."""
    return np.fft.ifftshift(a, axes=axes)


def to_centre(a: np.ndarray, axes: tuple[int, ...] = (-2, -1)) -> np.ndarray:
    """Move the origin from index 0 to ``n // 2`` along `axes`."""
    return np.fft.fftshift(a, axes=axes)
