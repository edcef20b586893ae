"""How fine the calibrated map is: Fourier ring correlation of two half scans."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bcmi_beamline.reconstruction.ptychography._engine import Engine

HALF_SWEEPS = 6


class Resolution(NamedTuple):
    """Fourier ring correlation and where it falls below the half-bit threshold."""

    frequency: np.ndarray
    """(n,) of the rings, 1/m."""
    correlation: np.ndarray
    """(n,)."""
    threshold: np.ndarray
    """(n,)."""
    half_period: float
    """Of the first ring below the threshold, m; that of the last ring, the pixel, where none is."""


def half_scans(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """Objects (H, W) from the even and from the odd frames alone, each from nothing.

    Probe, positions and intensities are those that all frames found; the engine is left as it was.
    """
    kept, active = engine.image, engine.active
    probe, rng = engine.probe, engine.rng
    halves = []
    for half in (active[::2], active[1::2]):
        engine.image, engine.probe, engine.active = np.ones_like(kept), probe, half
        engine.rng = np.random.default_rng(0)
        for i in range(HALF_SWEEPS):
            engine.sweep(hold_probe=True, momentum=0.5 if 0 < i < HALF_SWEEPS - 1 else 0.0)
        halves.append(engine.image)
    engine.image, engine.probe, engine.active, engine.rng = kept, probe, active, rng
    return halves[0], halves[1]


def ring_correlation(a: np.ndarray, b: np.ndarray, trusted: np.ndarray, pixel: float) -> Resolution:
    """Compare two maps (H, W) where both are trusted.

    Inside the largest square about the middle of the trusted region that fits, softly windowed. Threshold of
    half a bit in two dimensions: M. van Heel and M. Schatz, J. Struct. Biol. 151, 250 (2005).
    """
    square = _inner_square(trusted)
    n = square[0].stop - square[0].start
    window = np.hanning(n + 2)[1:-1]
    f, g = (np.fft.fft2((m[square] - m[square].mean()) * window[:, None] * window) for m in (a, b))
    away = np.rint(n * np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n))).astype(int)

    def rings(values: np.ndarray) -> np.ndarray:
        return np.bincount(away.ravel(), values.ravel())[1 : n // 2]

    correlation = rings((f * g.conj()).real) / np.sqrt(rings(np.abs(f) ** 2) * rings(np.abs(g) ** 2))
    root = np.sqrt(rings(np.ones((n, n))) / 2)
    threshold = (0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root)
    frequency = np.arange(1, n // 2) / (n * pixel)
    below = np.nonzero(correlation < threshold)[0]
    last = frequency[below[0]] if len(below) else 1 / (2 * pixel)
    return Resolution(frequency, correlation, threshold, float(1 / (2 * last)))


def _inner_square(trusted: np.ndarray) -> tuple[slice, slice]:
    """Largest square about the middle of the trusted pixels that holds no others."""
    rows, columns = np.nonzero(trusted)
    row, column = round(rows.mean()), round(columns.mean())
    half = 0
    room = min(row, column, trusted.shape[0] - row - 1, trusted.shape[1] - column - 1)
    while (
        half < room and trusted[row - half - 1 : row + half + 1, column - half - 1 : column + half + 1].all()
    ):
        half += 1
    if half < 8:
        raise ValueError("the trusted part of the map is too small to tell its resolution")
    return slice(row - half, row + half), slice(column - half, column + half)
