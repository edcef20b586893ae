"""Sequential ePIE and the difference map: the field's reference algorithms, plain and fast.

Both stand on whole-pixel positions and one probe mode. `calibrate` does better on every count; these are
there to compare with what others publish, and as independent checks of it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from bcmi_beamline.reconstruction.fourier import fft2, ifft2

_FAST = {"nsz", "contract", "reassoc", "arcp"}


def epie(
    frames: np.ndarray,
    corners: np.ndarray,
    probe: np.ndarray,
    image: np.ndarray,
    *,
    used: np.ndarray | None = None,
    iterations: int = 25,
    image_step: float = 1.0,
    probe_step: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Update image and probe after every single frame.

    Maiden and Rodenburg, Ultramicroscopy 109, 1256 (2009), Eqs. 6 and 7.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx)
        Counts, zero frequency at the corner.
    corners : ndarray, (J, 2), int
        First row and column of every window on the image.
    probe : ndarray, (Ny, Nx), complex
    image : ndarray, (H, W), complex
    used : ndarray, (Ny, Nx), bool, optional
        Pixels that count, zero frequency at the corner.
    iterations : int
        Passes over all frames, each in a new random order.
    image_step, probe_step : float
        alpha and beta of the equations.
    seed : int

    Returns
    -------
    image, probe : ndarray, complex64
    r2 : ndarray, (iterations,)
        ``sum (|F| - sqrt(I))**2 / sum I`` over the used pixels.
    """
    rng = np.random.default_rng(seed)
    image, probe = image.astype(np.complex64), probe.astype(np.complex64)
    amplitudes, weight = _measured(frames, used)
    total, r2 = float((amplitudes**2 * weight).sum(dtype=float)), np.empty(iterations)
    for i in range(iterations):
        error = 0.0
        for j in rng.permutation(len(frames)):
            row, column = corners[j]
            patch = image[row : row + probe.shape[0], column : column + probe.shape[1]]
            waves = fft2(probe * patch, overwrite=True, workers=1)
            error += _modulus_change(waves, amplitudes[j], weight)
            residual = ifft2(waves, overwrite=True, workers=1)
            _update(patch, probe, residual, image_step, probe_step)
        r2[i] = error / total
    return image, probe, r2


def difference_map(
    frames: np.ndarray,
    corners: np.ndarray,
    probe: np.ndarray,
    image: np.ndarray,
    *,
    used: np.ndarray | None = None,
    iterations: int = 50,
    probe_from: int = 2,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference map with the overlap and the measured moduli as its two constraints.

    Thibault et al., Ultramicroscopy 109, 338 (2009), Eqs. 8-10. All exit waves are kept: 8 bytes for every
    pixel of every frame. Parameters and what is returned as for `epie`; the probe is held for the first
    `probe_from` iterations.
    """
    image, probe = image.astype(np.complex64), probe.astype(np.complex64)
    ny, nx = probe.shape
    amplitudes, weight = _measured(frames, used)
    total, r2 = float((amplitudes**2 * weight).sum(dtype=float)), np.empty(iterations)
    views = [np.s_[r : r + ny, c : c + nx] for r, c in corners]
    waves = np.stack([probe * image[v] for v in views])
    for i in range(iterations):
        for _ in range(2 if i >= probe_from else 1):
            image = _overlap_image(waves, probe, image, views)
            if i >= probe_from:
                probe = _overlap_probe(waves, probe, image, views)
        error = 0.0
        for wave, amplitude, view in zip(waves, amplitudes, views, strict=True):
            exit_wave = probe * image[view]
            error += _modulus_change(fft2(exit_wave, workers=1), amplitude, weight)
            reflected = fft2(2 * exit_wave - wave, workers=1)
            projected = reflected.copy()
            _modulus_change(projected, amplitude, weight)
            wave += ifft2(projected + reflected, overwrite=True, workers=1) - exit_wave
        r2[i] = error / total
    return image, probe, r2


def _measured(frames: np.ndarray, used: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Moduli of the frames and the weight of every pixel, float32."""
    weight = np.ones(frames.shape[1:], np.float32) if used is None else used.astype(np.float32)
    return np.sqrt(np.where(weight > 0, np.maximum(frames, 0), 0).astype(np.float32)), weight


def _overlap_image(waves, probe, image, views) -> np.ndarray:
    total, light = np.zeros_like(image), np.zeros(image.shape, np.float32)
    power = np.abs(probe) ** 2
    for wave, view in zip(waves, views, strict=True):
        total[view] += probe.conj() * wave
        light[view] += power
    return np.where(light > 1e-4 * light.max(), total / np.maximum(light, 1e-30), image)


def _overlap_probe(waves, probe, image, views) -> np.ndarray:
    total, power = np.zeros_like(probe), np.zeros(probe.shape, np.float32)
    for wave, view in zip(waves, views, strict=True):
        total += image[view].conj() * wave
        power += np.abs(image[view]) ** 2
    return total / np.maximum(power, 1e-30)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _modulus_change(waves, amplitudes, weight):
    """Replace waves by what must be added for their modulus to be the measured one; returns the misfit."""
    ny, nx = waves.shape
    error = 0.0
    for y in range(ny):
        wave, seen, use = waves[y], amplitudes[y], weight[y]
        row_error = np.float32(0.0)
        for x in range(nx):
            modulus = np.sqrt(wave[x].real * wave[x].real + wave[x].imag * wave[x].imag)
            difference = use[x] * (seen[x] - modulus)
            row_error += difference * difference
            share = difference / (modulus + np.float32(1e-9))
            wave[x] = complex(wave[x].real * share, wave[x].imag * share)
        error += row_error
    return error


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _update(image, probe, residual, image_step, probe_step):
    """Move image and probe, both as they were, along the residual."""
    ny, nx = probe.shape
    most_probe, most_image = np.float32(0.0), np.float32(0.0)
    for y in range(ny):
        p, o = probe[y], image[y]
        for x in range(nx):
            most_probe = max(most_probe, p[x].real * p[x].real + p[x].imag * p[x].imag)
            most_image = max(most_image, o[x].real * o[x].real + o[x].imag * o[x].imag)
    a, b = np.float32(image_step) / most_probe, np.float32(probe_step) / most_image
    for y in range(ny):
        p, o, r = probe[y], image[y], residual[y]
        for x in range(nx):
            light, here, asked = p[x], o[x], r[x]
            re = light.real * asked.real + light.imag * asked.imag
            im = light.real * asked.imag - light.imag * asked.real
            o[x] = complex(here.real + a * re, here.imag + a * im)
            re = here.real * asked.real + here.imag * asked.imag
            im = here.real * asked.imag - here.imag * asked.real
            p[x] = complex(light.real + b * re, light.imag + b * im)
