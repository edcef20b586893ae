"""The simulated Eiger: module gaps, bad pixels, background and counting noise."""

from __future__ import annotations

import numpy as np

from bcmi_beamline.config import EigerConfig

GAP, DEAD, NOISY = 1, 2, 16
"""Bits of the pixel mask, as the detector writes them in its files."""

HOT_PIXELS, DEAD_PIXELS = 12, 30
HOT_COUNTS_PER_S = 40.0
MAX_RATE = 2.5e6
"""Counts per second and pixel above which an Eiger gives up."""


class EigerDetector:
    """Turn expected photons into the frame that the detector would give.

    Parameters
    ----------
    config : EigerConfig
    background_per_pixel_s : float
        Counts per pixel and second that do not come from the crystal.
    seed : int
        Of the bad pixels.
    """

    def __init__(self, config: EigerConfig, background_per_pixel_s: float, seed: int) -> None:
        self.config = config
        self.background_per_pixel_s = background_per_pixel_s
        gaps = config.gap_mask()
        self._good = np.flatnonzero(~gaps)
        rng = np.random.default_rng([seed, 1])
        bad = rng.choice(self._good, HOT_PIXELS + DEAD_PIXELS, replace=False)
        self._hot, self._dead = bad[:HOT_PIXELS], bad[HOT_PIXELS:]
        self._hot_rates = HOT_COUNTS_PER_S * rng.lognormal(size=HOT_PIXELS)
        self.pixel_mask = gaps.astype(np.uint32) * GAP
        """Why a pixel cannot be used, (rows, columns) uint32: bits `GAP`, `DEAD`, `NOISY`; 0 is good."""
        self.pixel_mask.flat[self._dead] |= DEAD
        self.pixel_mask.flat[self._hot] |= NOISY
        self._unusable = gaps
        self._template = np.zeros(gaps.shape, np.uint32)
        self._template[gaps] = self.unusable_value

    @property
    def unusable_value(self) -> int:
        """What pixels that never count read."""
        return 2**self.config.bit_depth - 1

    def count_cutoff(self, exposure_s: float) -> int:
        """Counts at which a pixel saturates in one exposure."""
        return int(min(max(MAX_RATE * exposure_s, 1), self.unusable_value - 1))

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
        frame = self._template.copy()
        flat = frame.reshape(-1)
        total = rng.poisson(self.background_per_pixel_s * exposure_s * len(self._good))
        np.add.at(flat, self._good[rng.integers(len(self._good), size=total)], 1)
        flat[self._hot] += rng.poisson(self._hot_rates * exposure_s).astype(np.uint32)
        if photons is not None:
            self._add_window(frame, photons, corner, exposure_s, rng)
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
        gaps = self._unusable[tuple(on_detector)]
        counts = rng.poisson(np.where(gaps, 0, photons[tuple(on_window)]))
        counts += patch
        np.minimum(counts, self.count_cutoff(exposure_s), out=counts)
        counts[gaps] = self.unusable_value
        patch[...] = counts
