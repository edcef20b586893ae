"""Where the crystal stands: by the calibrated beam, or from nothing.

The beam of the calibration is the exit wave of the crystal itself, at the Bragg peak. It has moved with the
crystal since, and a start from the wrong place fails: a fit of the wave to its frame finds its way over some
50 nm, the size of the modulator's edges, not farther.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np
from scipy.stats import poisson

from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, Window
from bcmi_beamline.reconstruction.modulation.slices import (
    ANSCOMBE,
    descend,
    frame_counts,
    modulus_step,
    scale_to_counts,
    solve_from_noise,
    solve_wave,
)
from bcmi_beamline.reconstruction.modulation.support import beam_at_crystal, window_around
from bcmi_beamline.reconstruction.threads import each
from bcmi_beamline.scans import Modulator

LOOSE_SIZES = (0.8e-6, 1.2e-6, 1.6e-6)
"""Edges, m, of the windows in which a crystal is looked for."""

FARTHEST, STRIDE = 0.5e-6, 70e-9
"""The beam is looked for this far from where it was, m, along x' and y', in strides of so much."""

STEPS = 10
"""Of conjugate gradients for the beam at one place."""

CANDIDATES = 3
"""Places from which the beam is fitted, until one fits."""

SPARSE = 4
"""Every so many rows and columns of pixels tell where the beam meets the modulator; but no less than"""

FEWEST = 64
"""rows and columns."""

MORE_STEPS = 30
"""Of conjugate gradients for a wave that is put on another window."""

PEAK = 0.1
"""Part of the brightest frame's counts that the frame at the peak must have, or it is not there."""

FITS = 2.0
"""A wave fits its frame whose misfit is below so many times what photon noise alone gives."""

_MEANS = np.concatenate([[0.0], np.geomspace(1e-3, 30, 60)])
_COUNTS = np.arange(100)
_NOISE = np.array(
    [
        poisson.pmf(_COUNTS, mean) @ (np.sqrt(_COUNTS + ANSCOMBE) - np.sqrt(mean + ANSCOMBE)) ** 2
        for mean in _MEANS
    ]
)


def excess(operator: FrameOperator, wave: np.ndarray, target: np.ndarray, frame: int) -> float:
    """Misfit of a wave (ny, nx) to its frame, over what photon noise alone gives for this wave."""
    psi = operator.forward(wave, frame)
    expected = np.interp(operator.intensity(psi)[target >= 0], _MEANS, _NOISE).sum()
    return modulus_step(psi, target, operator.neighbour, operator.background)[0] / max(float(expected), 1e-30)


def warm_up(operator: FrameOperator, target: np.ndarray) -> None:
    """Compile, or load, what solves frames, while there is none to be solved."""
    wave = np.ones(operator.window.shape, np.complex64)
    wave, _ = solve_wave(operator, scale_to_counts(operator, wave, target, 0), target, 0, 2)
    excess(operator, wave, target, 0)
    descend(operator, wave, target, 0)


def register(
    operator: FrameOperator, beam: np.ndarray, inside: np.ndarray, target: np.ndarray, frame: int
) -> tuple[np.ndarray, tuple[int, int], float]:
    """The beam of the calibration where the crystal stands now, fitted to a frame.

    Parameters
    ----------
    operator : FrameOperator
        On a window that leaves room.
    beam : ndarray, (ny, nx)
        Where the crystal stood.
    inside : ndarray, (ny, nx), bool
        All of the crystal, where it stood: a wave that may be anywhere fits wherever it begins.
    target : ndarray, (Ny, Nx)
        From `make_targets`.
    frame : int

    Returns
    -------
    wave : ndarray, (ny, nx)
    moved : (rows, columns)
        By how many pixels, to half of `STRIDE`.
    excess : float
        Of its misfit, from `excess`.
    """
    beam = scale_to_counts(operator, beam, target, frame)

    def settled(wave: np.ndarray, moved: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int], float]:
        region = np.roll(inside, moved, (0, 1))
        wave, _ = solve_wave(operator, wave * region, target, frame, STEPS, inside=region)
        return wave, moved, excess(operator, wave, target, frame)

    found = settled(beam, (0, 0))
    if found[2] < FITS:
        return found
    strides = [max(1, round(STRIDE / p)) for p in operator.pixel]
    reach = [int(FARTHEST / p / s) for p, s in zip(operator.pixel, strides, strict=True)]
    rows, columns = (s * np.arange(-n, n + 1) for s, n in zip(strides, reach, strict=True))
    places = [(int(r), int(c)) for r in rows for c in columns]
    few, seen = thinned(operator, target)
    dim = scale_to_counts(few, beam, seen, frame)

    def misfit(moved: tuple[int, int]) -> float:
        psi = few.forward(np.roll(dim, moved, (0, 1)), frame)
        return modulus_step(psi, seen, few.neighbour, few.background)[0]

    for n in np.argsort(each(misfit, places))[:CANDIDATES]:
        found = min(found, settled(np.roll(beam, places[n], (0, 1)), places[n]), key=lambda f: f[2])
        if found[2] < FITS:
            break
    return settled(*found[:2])


def thinned(operator: FrameOperator, target: np.ndarray) -> tuple[FrameOperator, np.ndarray]:
    """Every `SPARSE`-th row and column of the detector, to try many places: sampled, not integrated."""
    ny, nx = operator.detector_shape
    by = max(n for n in range(1, SPARSE + 1) if n == 1 or not (ny % n or nx % n or min(ny, nx) < n * FEWEST))
    few = copy(operator)
    few.detector_shape = (ny // by, nx // by)
    few.neighbour = operator.neighbour if by == 1 else 0.0
    return few, np.ascontiguousarray(target[::by, ::by])


def find_crystal(
    operator_on: Callable[[Window], FrameOperator],
    pixel: tuple[float, float],
    targets: np.ndarray | list[np.ndarray],
    angles_deg: np.ndarray,
    modulator: Modulator,
    rng: np.random.Generator,
    support: np.ndarray | None = None,
) -> tuple[Window, tuple[np.ndarray, int] | None]:
    """Window of the exit wave, and the wave of the frame at the peak where the calibrated beam fits it.

    Parameters
    ----------
    operator_on : callable
        Makes the operator for a window.
    pixel : (y, x)
        Of the object, m.
    targets : ndarray, (J, Ny, Nx), or a list of its frames
        From `make_targets`.
    angles_deg : ndarray, (J,)
        The beam was calibrated at 0.
    modulator : Modulator
    rng : Generator
        For the brightest frame, which is solved from noise where the beam does not fit or there is none.
    support : ndarray, (n_zeta, ny, nx), optional
        Tells the window.

    Returns
    -------
    window : Window
    beam : (wave, frame) or None
        On that window.
    """
    known = None if support is None else Window((support.shape[1], support.shape[2]))
    peak, light = int(np.argmin(np.abs(angles_deg))), frame_counts(targets)
    if modulator.probe.any() and light[peak] > PEAK * light.max():
        loose = _window(pixel, LOOSE_SIZES[-1], targets[peak].shape)
        operator = operator_on(loose)
        beam = beam_at_crystal(modulator, operator, peak)
        about, whole = window_around(beam, loose)
        inside = on_window(np.ones(about.shape, bool), about, loose)
        wave, moved, misfit = register(operator, beam, inside, targets[peak], peak)
        if whole and misfit < FITS:
            centre = about.centre[0] + moved[0], about.centre[1] + moved[1]
            window = known or Window(about.shape, centre)
            return window, (on_window(wave, loose, window), peak)
    return known or _window_from_noise(operator_on, pixel, targets, int(np.argmax(light)), rng), None


def _window_from_noise(
    operator_on: Callable[[Window], FrameOperator],
    pixel: tuple[float, float],
    targets: np.ndarray | list[np.ndarray],
    frame: int,
    rng: np.random.Generator,
) -> Window:
    """By solving `frame` in ever larger windows, until what fits it does not reach the edge.

    The crystal is cut in a window that is too small. In one that is too large the phases can fail, and noise
    fills all of it. So a window in which the frame is solved, but for an edge, is moved rather than enlarged.
    """
    target, tried = targets[frame], []
    for size in LOOSE_SIZES:
        loose = _window(pixel, size, target.shape)
        operator = operator_on(loose)
        wave, _ = solve_from_noise(operator, target, frame, rng)
        window, whole = window_around(wave, loose)
        fits = excess(operator, wave, target, frame)
        if fits < FITS and not whole:
            moved = Window(loose.shape, window.centre)
            operator = operator_on(moved)
            wave, _ = solve_wave(operator, on_window(wave, loose, moved), target, frame, MORE_STEPS)
            window, whole = window_around(wave, moved)
            fits = excess(operator, wave, target, frame)
        if whole and fits < FITS:
            return window
        tried.append((fits, window))
    return min(tried, key=lambda t: t[0])[1]


def _window(pixel: tuple[float, float], size: float, detector_shape: tuple[int, ...]) -> Window:
    """About the axis, of edge `size` in m, but no more than half the field."""
    half = [min(int(np.ceil(size / p / 2)), n // 4) for p, n in zip(pixel, detector_shape, strict=True)]
    return Window((2 * half[0], 2 * half[1]))


def on_window(wave: np.ndarray, before: Window, window: Window) -> np.ndarray:
    """A wave (ny, nx) on another window; 0 where it was not known."""
    out = np.zeros(window.shape, wave.dtype)
    meet = [np.intersect1d(window.indices(a), before.indices(a), return_indices=True)[1:] for a in (0, 1)]
    out[np.ix_(meet[0][0], meet[1][0])] = wave[np.ix_(meet[0][1], meet[1][1])]
    return out
