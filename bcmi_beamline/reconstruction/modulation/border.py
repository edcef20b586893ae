"""Room for the light that leaves the window of the detector.

A crystal that bends much sends light past the rows or columns that were read. The modulator scatters part of
it back into them, so that a model on this window alone cannot fit. On a window with a border of pixels that
were not measured, whose object pixel is finer, there is room for such light, and the pixels that were read
tell it.
"""

from __future__ import annotations

import numpy as np
from scipy.fft import next_fast_len

from bcmi_beamline.reconstruction.fourier import to_centre, to_corner
from bcmi_beamline.reconstruction.modulation.slices import ANSCOMBE, frame_counts

EDGE = 1 / 50
"""Part of the rows, or columns, at either end that is looked at."""

OVERFILLED = 0.1
"""Brightness there, over the mean of the window, from which on light is taken to go on beyond. Of simulated
crystals that stay within it has 0.01 to 0.04, from one that does not 0.21."""

BORDER = 1 / 8
"""Part of the window that is added at both ends."""


def edge_brightness(targets: np.ndarray) -> tuple[float, float]:
    """Brightness of the brighter end of the rows, and of the columns, over the mean of the window.

    Parameters
    ----------
    targets : ndarray, (J, Ny, Nx)
        From `make_targets`; only pixels in use say something.
    """
    used = max(int((targets[0] >= 0).sum()), 1) * len(targets)
    mean = float(frame_counts(targets).sum()) / used
    brightest = []
    for axis in (1, 2):
        n, size = targets.shape[axis], max(1, round(EDGE * targets.shape[axis]))
        middle = n - n // 2  # the ends of a frame whose middle is at the corner
        ends = [
            _brightness(np.take(targets, range(first, first + size), axis))
            for first in (middle - size, middle)
        ]
        brightest.append(max(ends) / mean if mean > 0 else 0.0)
    return brightest[0], brightest[1]


def _brightness(part: np.ndarray) -> float:
    """Counts per pixel in use of a part of some frames."""
    used = part >= 0
    return float((np.square(part) - np.float32(ANSCOMBE)).sum(where=used, dtype=float)) / max(used.sum(), 1)


def border_for(targets: np.ndarray) -> tuple[int, int]:
    """Rows and columns to be added at either end, 0 where the light stays within the window."""
    wanted = [
        (int(next_fast_len(int(n * (1 + 2 * BORDER))) or 0) - n + 1) // 2 if bright > OVERFILLED else 0
        for bright, n in zip(edge_brightness(targets), targets.shape[1:], strict=True)
    ]
    return wanted[0], wanted[1]


def with_border(targets: np.ndarray, border: tuple[int, int]) -> np.ndarray:
    """Targets with so many rows and columns more at either end, that are not in use."""
    if border == (0, 0):
        return targets
    around = [(n, n) for n in border]
    shape = [n + 2 * b for n, b in zip(targets.shape[1:], border, strict=True)]
    wider = np.empty((len(targets), *shape), np.float32)
    for j, target in enumerate(targets):
        wider[j] = to_corner(np.pad(to_centre(target), around, constant_values=-1))
    return wider
