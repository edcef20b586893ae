"""The simulated Eiger: module gaps, bad pixels, background and counting noise."""

from __future__ import annotations

import numpy as np

from bcmi_beamline.config import EigerConfig

GAP, DEAD, NOISY = 1, 2, 16
"""Bits of the pixel mask, as the detector writes them in its files."""

HOT_COUNTS_PER_S = 40.0
"""Median rate of a hot pixel."""

MAX_RATE = 2.5e6
"""Counts per second and pixel above which an Eiger gives up."""

DIM = 2.0
"""Expected counts up to which drawing by inversion is faster than the generator's own method."""


def draw_poisson(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts, quickly where little is expected.

    Dim pixels are drawn by inversion (Devroye, Non-Uniform Random Variate Generation, chapter X.3), all of
    them at once and count by count: what is left after each count is a small part of what was there before.

    Parameters
    ----------
    expected : ndarray, float32
        Not below 0.
    rng : Generator

    Returns
    -------
    ndarray, same shape, uint32
    """
    mean = expected.ravel()
    counts = np.zeros(mean.shape, np.uint32)
    bright = np.flatnonzero(mean >= DIM)
    counts[bright] = rng.poisson(mean[bright])

    where = np.flatnonzero(mean < DIM)
    mean = mean[where]
    chance = np.exp(-mean)
    left = rng.random(len(where), dtype=np.float32)
    number = 0
    while len(where):
        counts[where] = number
        number += 1
        more = np.flatnonzero(left >= chance)
        where, mean, left = where[more], mean[more], left[more] - chance[more]
        chance = chance[more] * mean / np.float32(number)
        more = chance > np.finfo(np.float32).tiny  # rounding may leave a remainder that no count explains
        where, mean, left, chance = where[more], mean[more], left[more], chance[more]
    return counts.reshape(expected.shape)


class EigerDetector:
    """Turn expected photons into the frame that the detector would give.

    Parameters
    ----------
    config : EigerConfig
    background_per_pixel_s : float
        Counts per pixel and second that do not come from the crystal.
    seed : int
        Of the bad pixels.
    hot_pixels, dead_pixels : int
    """

    def __init__(
        self,
        config: EigerConfig,
        background_per_pixel_s: float,
        seed: int,
        hot_pixels: int = 12,
        dead_pixels: int = 30,
    ) -> None:
        self.config = config
        self.background_per_pixel_s = background_per_pixel_s
        gaps = config.gap_mask()
        self._good = np.flatnonzero(~gaps)
        rng = np.random.default_rng([seed, 1])
        bad = rng.choice(self._good, hot_pixels + dead_pixels, replace=False)
        self._hot, self._dead = bad[:hot_pixels], bad[hot_pixels:]
        self._hot_rates = HOT_COUNTS_PER_S * rng.lognormal(size=hot_pixels)
        self.pixel_mask = gaps.astype(np.uint32) * GAP
        """Why a pixel cannot be used, (rows, columns) uint32: bits `GAP`, `DEAD`, `NOISY`; 0 is good."""
        self.pixel_mask.flat[self._dead] |= DEAD
        self.pixel_mask.flat[self._hot] |= NOISY
        self._gaps = gaps
        self._templates: dict[int, np.ndarray] = {}

    def bit_depth(self, exposure_s: float) -> int:
        """Bits of an image: the fewest that hold what a pixel can count in one exposure."""
        fitting = [bits for bits in (8, 16, 32) if MAX_RATE * exposure_s < 2**bits - 1]
        return min(fitting[0] if fitting else 32, self.config.bit_depth)

    def unusable_value(self, exposure_s: float) -> int:
        """What pixels that never count read."""
        return 2 ** self.bit_depth(exposure_s) - 1

    def count_cutoff(self, exposure_s: float) -> int:
        """Counts at which a pixel saturates in one exposure."""
        return int(min(max(MAX_RATE * exposure_s, 1), self.unusable_value(exposure_s) - 1))

    def _dark(self, exposure_s: float) -> np.ndarray:
        """A frame without a count."""
        value = self.unusable_value(exposure_s)
        if value not in self._templates:
            self._templates = {value: np.where(self._gaps, np.uint32(value), np.uint32(0))}
        return self._templates[value].copy()

    def expose(
        self, photons: np.ndarray | None, corner: tuple[int, int], exposure_s: float, rng: np.random.Generator
    ) -> np.ndarray:
        """One frame.

        Parameters
        ----------
        photons : ndarray, (n, m), or None
            Photons expected in this exposure on a window of the detector; None: no beam.
        corner : tuple of int
            (row, column) of the window's first pixel; the window may hang over the edge.
        exposure_s : float
        rng : Generator
            Of the counting noise.

        Returns
        -------
        ndarray, (rows, columns), uint32
        """
        frame = self._dark(exposure_s)
        flat = frame.reshape(-1)
        total = rng.poisson(self.background_per_pixel_s * exposure_s * len(self._good))
        np.add.at(flat, self._good[rng.integers(len(self._good), size=total)], 1)
        flat[self._hot] += rng.poisson(self._hot_rates * exposure_s).astype(np.uint32)
        if photons is not None:
            self._add_window(frame, photons, corner, exposure_s, rng)
        flat[self._hot] = np.minimum(flat[self._hot], self.count_cutoff(exposure_s))
        flat[self._dead] = 0
        return frame

    def _add_window(
        self,
        frame: np.ndarray,
        photons: np.ndarray,
        corner: tuple[int, int],
        exposure_s: float,
        rng: np.random.Generator,
    ) -> None:
        on_detector, on_window = [], []
        for first, size, limit in zip(corner, photons.shape, frame.shape, strict=True):
            begin, stop = max(first, 0), min(first + size, limit)
            if begin >= stop:
                return
            on_detector.append(slice(begin, stop))
            on_window.append(slice(begin - first, stop - first))
        patch = frame[tuple(on_detector)]
        gaps = self._gaps[tuple(on_detector)]
        counts = draw_poisson(photons[tuple(on_window)], rng)
        counts += patch
        np.minimum(counts, self.count_cutoff(exposure_s), out=counts)
        np.copyto(patch, counts, where=~gaps)
