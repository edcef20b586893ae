"""Pixels kept from the reconstruction to judge it (V. Favre-Nicolin et al., Sci. Rep. 10, 2664 (2020))."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import stats


def free_pixels(
    shape: tuple[int, ...],
    mask: np.ndarray | None = None,
    fraction: float = 0.05,
    radius: int = 3,
    seed: int | np.random.Generator = 0,
    *,
    protect: float = 0.05,
    separate_frames: bool = False,
) -> np.ndarray:
    """Choose random islands of pixels that no projection may use.

    Islands, not single pixels, because oversampled neighbours know each other. One choice serves all trials
    of a scan, or their free log-likelihoods cannot be compared.

    Parameters
    ----------
    shape : tuple of int
        (Ny, Nx) or (J, Ny, Nx), origin at ``n // 2``.
    mask : ndarray, bool, optional
        Bad pixels, broadcast to `shape`; never free.
    fraction : float
        Of the pixels, about; islands may overlap.
    radius : int
        Of an island in pixels: a disc, or a ball for three axes.
    seed : int or Generator
    protect : float
        The central box of this fraction of every axis stays in use: without it the strongest pixels, and
        with them the scale, would be lost.
    separate_frames : bool
        Draw discs frame by frame (ptychography) instead of balls through neighbouring frames (rocking).
        The protected box then reaches through all frames.

    Returns
    -------
    free : ndarray, `shape`, bool
        True where a pixel is free.

    Raises
    ------
    ValueError
        When `fraction` is not in [0, 0.5] or `shape` has not two or three axes.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction of free pixels must lie between 0 and 0.5, not {fraction}")
    if len(shape) not in (2, 3):
        raise ValueError(f"free pixels are drawn on (Ny, Nx) or (J, Ny, Nx), not {shape}")
    rng = np.random.default_rng(seed)
    discs = separate_frames and len(shape) == 3
    offsets = _ball((0 if discs else radius,) * (len(shape) - 2) + (radius, radius))
    count = round(-np.log1p(-fraction) * int(np.prod(shape)) / len(offsets))
    radii = offsets.max(axis=0)
    wide = np.zeros([n + 2 * int(r) for n, r in zip(shape, radii, strict=True)], bool)  # islands at the edge
    middles = rng.integers(0, shape, (count, len(shape))) + radii
    first, flat = np.ravel_multi_index(tuple(middles.T), wide.shape), wide.reshape(-1)
    strides = np.array(wide.strides)  # of one byte each: in elements
    for step in offsets @ strides:
        flat[first + step] = True
    free = np.ascontiguousarray(
        wide[tuple(slice(int(r), int(r) + n) for n, r in zip(shape, radii, strict=True))]
    )

    box = [slice(n // 2 - half, n // 2 + half + 1) for n in shape for half in [int(protect * n / 2)]]
    if discs:
        box[0] = slice(None)
    free[tuple(box)] = False
    if mask is not None:
        free &= ~mask
    return free


def _ball(radii: tuple[int, ...]) -> np.ndarray:
    """Index offsets within an ellipsoid of `radii`, (m, ndim)."""
    grid = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in radii), indexing="ij"), axis=-1)
    distance2 = ((grid / np.maximum(radii, 1)) ** 2).sum(axis=-1)
    return grid[distance2 <= 1]


def log_likelihood(observed: np.ndarray, model: np.ndarray, select: np.ndarray | None = None) -> float:
    """Mean negative Poisson log-likelihood per pixel, less that of a perfect model.

    ``l = I_c - I_o + I_o ln(I_o / I_c)``, ``l = I_c`` where nothing was counted (Favre-Nicolin et al., Sci.
    Rep. 10, 2664 (2020), Eq. 1). About 0.5 for a perfect model at high counts.

    Parameters
    ----------
    observed, model : ndarray, same shape
        Counts and calculated intensities.
    select : ndarray, bool, optional
        Pixels to average over: the free ones.
    """
    if select is not None:
        observed, model = observed[select], model[select]
    if observed.size == 0:
        return float("nan")
    seen = np.asarray(observed, float)
    expected = np.maximum(np.asarray(model, float), 1e-6)
    ratio = np.where(seen > 0, seen, 1.0) / np.where(seen > 0, expected, 1.0)
    return float((expected - seen + seen * np.log(ratio)).mean())


def expected_log_likelihood(model: np.ndarray) -> float:
    """What `log_likelihood` is on average where `model` is right and the counts are Poisson's.

    About 0.5 at high counts, far less where there are few: what a free log-likelihood is to be held against.

    Parameters
    ----------
    model : ndarray
        Calculated intensities.
    """
    at, mean = _deviance()
    return float(np.interp(np.log(np.maximum(model, 1e-6)), at, mean).mean()) if model.size else float("nan")


@cache
def _deviance() -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``I_c - I_o + I_o ln(I_o / I_c)`` over Poisson's counts I_o, at values of ln I_c."""
    at = np.linspace(np.log(1e-6), np.log(1e3), 400)  # at its end 0.5 to 1e-4
    counts = np.arange(1, 1500)
    expected = np.exp(at)[:, None]
    gain = counts * (np.log(counts) - at[:, None])
    return at, (stats.poisson.pmf(counts, expected) * gain).sum(axis=1)  # the mean of I_c - I_o is 0
