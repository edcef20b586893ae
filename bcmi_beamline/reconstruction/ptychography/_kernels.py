"""Fused loops of the ptychographic engine: everything but the Fourier transforms.

Shapes: b frames of a batch, m probe modes, N x N pixels, an object of (H, W). Real-space arrays are the
window as it lies on the object; frames keep their own origin at ``n // 2`` and are read rolled, so that
neither they nor the waves are ever shifted in memory. Each loop is parallel over an axis that nothing else
writes to.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

MASKED, FREE = 1, 2
"""States of a pixel that no projection may use: bad, or kept to judge the result."""

ANSCOMBE = 0.375
"""``sqrt(I + 3/8)`` of Poisson counts has a variance of 1/4 almost whatever I (F. J. Anscombe, Biometrika 35,
246 (1948)), so that a least-squares fit of it weighs weak and strong pixels alike."""


@njit(parallel=True, cache=True, fastmath=True)
def shift_spectrum(spectrum, ramp_y, ramp_x, out):
    """``out[j, m] = spectrum[m] ramp_y[j] ramp_x[j]``: the probe's spectrum, shifted for every frame."""
    b, modes, ny, nx = out.shape
    for k in prange(b * ny):
        j, y = k // ny, k % ny
        for m in range(modes):
            for x in range(nx):
                out[j, m, y, x] = spectrum[m, y, x] * (ramp_y[j, y] * ramp_x[j, x])


@njit(parallel=True, cache=True, fastmath=True)
def unshift_sum(gradients, ramp_y, ramp_x, out):
    """Adjoint of `shift_spectrum`: add the b spectra, each shifted back, to `out` (m, N, N)."""
    b, modes, ny, nx = gradients.shape
    for y in prange(ny):
        for j in range(b):
            back = np.conj(ramp_y[j, y])
            for m in range(modes):
                for x in range(nx):
                    out[m, y, x] += gradients[j, m, y, x] * (back * np.conj(ramp_x[j, x]))


@njit(parallel=True, cache=True, fastmath=True)
def exit_waves(probes, image, corners, out):
    """``out[j, m] = probes[j, m] image[window j]``."""
    b, modes, ny, nx = out.shape
    for k in prange(b * ny):
        j, y = k // ny, k % ny
        row, column = corners[j, 0] + y, corners[j, 1]
        for m in range(modes):
            for x in range(nx):
                out[j, m, y, x] = probes[j, m, y, x] * image[row, column + x]


@njit(parallel=True, cache=True)
def modulus_residual(waves, frames, index, flux, states, sums):
    """Replace detector waves by what brings their modulus to the measured one, and score them.

    ``waves *= sqrt(I + 3/8) / sqrt(|waves|**2 + 3/8) - 1`` where a pixel may be used, 0 elsewhere: the
    negative gradient of the Anscombe-weighted least squares. `states` (K, N, N) holds K sets of free pixels,
    frame j takes set ``j % K``. `sums` (b, 5) receives, per frame, the sums of (|F| - sqrt(I))**2, of I and of
    |F|**2 over the used pixels, of the free log-likelihood, and the number of free pixels.
    """
    b, modes, ny, nx = waves.shape
    sets = states.shape[0]
    half_y, half_x = ny // 2, nx // 2
    for k in prange(b):
        j = index[k]
        state = states[j % sets]
        scale = np.float32(1.0) / flux[j]
        error, counted, modelled, llk, free = 0.0, 0.0, 0.0, 0.0, 0
        for y in range(ny):
            row = (y + half_y) % ny
            for x in range(nx):
                column = x + half_x
                if column >= nx:
                    column -= nx
                kind = state[row, column]
                factor = np.float32(0.0)
                if kind != MASKED:
                    model = np.float32(0.0)
                    for m in range(modes):
                        w = waves[k, m, y, x]
                        model += w.real * w.real + w.imag * w.imag
                    counts = max(np.float32(frames[j, row, column]) * scale, np.float32(0.0))
                    if kind == FREE:
                        free += 1
                        expected = max(model, np.float32(1e-6))
                        llk += expected - counts
                        if counts > 0:
                            llk += counts * np.log(counts / expected)
                    else:
                        factor = np.sqrt((counts + np.float32(ANSCOMBE)) / (model + np.float32(ANSCOMBE)))
                        factor -= np.float32(1.0)
                        error += (np.sqrt(model) - np.sqrt(counts)) ** 2
                        counted += counts
                        modelled += model
                for m in range(modes):
                    waves[k, m, y, x] *= factor
        sums[k, 0], sums[k, 1], sums[k, 2], sums[k, 3], sums[k, 4] = error, counted, modelled, llk, free


@njit(parallel=True, cache=True, fastmath=True)
def object_gradient(residuals, probes, corners, gradient, illumination):
    """Add ``conj(probe) residual`` and ``|probe|**2`` of every frame to its window of the object."""
    b, modes, ny, nx = residuals.shape
    for row in prange(gradient.shape[0]):
        for j in range(b):
            y = row - corners[j, 0]
            if y < 0 or y >= ny:
                continue
            column = corners[j, 1]
            for m in range(modes):
                for x in range(nx):
                    p = probes[j, m, y, x]
                    gradient[row, column + x] += np.conj(p) * residuals[j, m, y, x]
                    illumination[row, column + x] += p.real * p.real + p.imag * p.imag


@njit(parallel=True, cache=True, fastmath=True)
def position_gradient(residuals, probes, image, corners, sums):
    """Normal equations of each frame's position, `sums` (b, 5).

    Moving the window by (dy, dx) changes the exit wave by ``probe (dy dO/dy + dx dO/dx)``; the sums are those
    of yy, yx, xx, y.residual, x.residual. Derivatives of the object are five-point differences.
    """
    b, modes, ny, nx = residuals.shape
    rows, columns = image.shape
    near, far = np.float32(2.0 / 3.0), np.float32(1.0 / 12.0)
    for j in prange(b):
        yy, yx, xx, ry, rx = 0.0, 0.0, 0.0, 0.0, 0.0
        for y in range(ny):
            r = corners[j, 0] + y
            if r < 2 or r >= rows - 2:
                continue
            for x in range(max(0, 2 - corners[j, 1]), min(nx, columns - 2 - corners[j, 1])):
                c = corners[j, 1] + x
                oy = near * (image[r + 1, c] - image[r - 1, c]) - far * (image[r + 2, c] - image[r - 2, c])
                ox = near * (image[r, c + 1] - image[r, c - 1]) - far * (image[r, c + 2] - image[r, c - 2])
                power, gradient = np.float32(0.0), np.complex64(0.0)
                for m in range(modes):
                    p = probes[j, m, y, x]
                    power += p.real * p.real + p.imag * p.imag
                    gradient += np.conj(p) * residuals[j, m, y, x]
                yy += power * (oy.real * oy.real + oy.imag * oy.imag)
                xx += power * (ox.real * ox.real + ox.imag * ox.imag)
                yx += power * (oy.real * ox.real + oy.imag * ox.imag)
                ry += oy.real * gradient.real + oy.imag * gradient.imag
                rx += ox.real * gradient.real + ox.imag * gradient.imag
        sums[j, 0], sums[j, 1], sums[j, 2], sums[j, 3], sums[j, 4] = yy, yx, xx, ry, rx


@njit(parallel=True, cache=True, fastmath=True)
def probe_gradient(residuals, image, corners, power):
    """``residuals *= conj(image[window])`` in place; add ``|image[window]|**2`` to `power` (N, N)."""
    b, modes, ny, nx = residuals.shape
    for y in prange(ny):
        for j in range(b):
            row, column = corners[j, 0] + y, corners[j, 1]
            for x in range(nx):
                o = image[row, column + x]
                power[y, x] += o.real * o.real + o.imag * o.imag
                for m in range(modes):
                    residuals[j, m, y, x] *= np.conj(o)
