"""Fused loops of the ptychographic engine: everything but the Fourier transforms.

Shapes: b frames of a batch, m probe modes, N x N pixels, an object of (H, W). Real-space arrays are the
window as it lies on the object; frames keep their own origin at ``n // 2`` and are read rolled, so that
neither they nor the waves are ever shifted in memory. Each loop is parallel over an axis that nothing else
writes to.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MASKED, FREE = 1, 2
"""States of a pixel that no projection may use: bad, or kept to judge the result."""

ANSCOMBE = 0.375
"""``sqrt(I + 3/8)`` of Poisson counts has a variance of 1/4 almost whatever I (F. J. Anscombe, Biometrika 35,
246 (1948)), so that a least-squares fit of it weighs weak and strong pixels alike."""


@njit(nogil=True, cache=True, fastmath=True)
def spread_shifts(base, rest, out):
    """``out[j] = base[0] + rest[j, 0] base[1] + rest[j, 1] base[2]``: a probe and its derivatives, moved."""
    b, modes, ny, nx = out.shape
    for k in range(b * ny):
        j, y = k // ny, k % ny
        dy, dx = rest[j, 0], rest[j, 1]
        for m in range(modes):
            for x in range(nx):
                out[j, m, y, x] = base[0, m, y, x] + dy * base[1, m, y, x] + dx * base[2, m, y, x]


@njit(nogil=True, cache=True, fastmath=True)
def exit_waves(probes, image, corners, out):
    """``out[j, m] = probes[j, m] image[window j]``."""
    b, modes, ny, nx = out.shape
    for k in range(b * ny):
        j, y = k // ny, k % ny
        row = image[corners[j, 0] + y, corners[j, 1] : corners[j, 1] + nx]
        for m in range(modes):
            for x in range(nx):
                out[j, m, y, x] = probes[j, m, y, x] * row[x]


@njit(nogil=True, cache=True, fastmath={"nsz", "contract", "reassoc"})
def modulus_residual(waves, frames, states, sums):
    """Replace detector waves by what brings their modulus to the measured one, and score them.

    ``waves *= sqrt(I + 3/8) / sqrt(|waves|**2 + 3/8) - 1`` where a pixel may be used, 0 elsewhere: the
    negative gradient of the Anscombe-weighted least squares. `frames` and `states` are (b, N, N).
    `sums` (b, 4) receives, per frame, the sums of (|F| - sqrt(I))**2 and of I over the used pixels, of the
    free log-likelihood, and the number of free pixels.
    """
    b, modes, ny, nx = waves.shape
    half_y, half_x = ny // 2, nx // 2
    small = np.float32(ANSCOMBE)
    for k in range(b):
        frame, state = frames[k], states[k]
        model, counts = np.empty(nx, np.float32), np.empty(nx, np.float32)
        factor, kind = np.empty(nx, np.float32), np.empty(nx, np.uint8)
        error, counted, llk, free = 0.0, 0.0, 0.0, 0
        for y in range(ny):
            row = (y + half_y) % ny
            for x in range(nx - half_x):
                counts[x], kind[x] = frame[row, x + half_x], state[row, x + half_x]
            for x in range(half_x):
                counts[x + nx - half_x], kind[x + nx - half_x] = frame[row, x], state[row, x]
            model[:] = 0
            for m in range(modes):
                for x in range(nx):
                    w = waves[k, m, y, x]
                    model[x] += w.real * w.real + w.imag * w.imag
            row_error, row_counted = np.float32(0.0), np.float32(0.0)
            for x in range(nx):
                used = np.float32(1.0) if kind[x] == 0 else np.float32(0.0)
                seen = np.float32(0.0) if kind[x] == MASKED else max(counts[x], np.float32(0.0))
                counts[x] = seen
                factor[x] = used * (np.sqrt((seen + small) / (model[x] + small)) - np.float32(1.0))
                row_error += used * (np.sqrt(model[x]) - np.sqrt(seen)) ** 2
                row_counted += used * seen
            error += row_error
            counted += row_counted
            for x in range(nx):
                if kind[x] == FREE:
                    free += 1
                    expected = max(model[x], np.float32(1e-6))
                    llk += expected - counts[x]
                    if counts[x] > 0:
                        llk += counts[x] * np.log(counts[x] / expected)
            for m in range(modes):
                for x in range(nx):
                    waves[k, m, y, x] *= factor[x]
        sums[k, 0], sums[k, 1], sums[k, 2], sums[k, 3] = error, counted, llk, free


@njit(nogil=True, cache=True, fastmath=True)
def object_gradient(residuals, probes, corners, gradient, illumination):
    """Add ``conj(probe) residual`` and ``|probe|**2`` of every frame to its window of the object."""
    b, modes, ny, nx = residuals.shape
    for row in range(gradient.shape[0]):
        for j in range(b):
            y = row - corners[j, 0]
            if y < 0 or y >= ny:
                continue
            g = gradient[row, corners[j, 1] : corners[j, 1] + nx]
            light = illumination[row, corners[j, 1] : corners[j, 1] + nx]
            for m in range(modes):
                probe, residual = probes[j, m, y], residuals[j, m, y]
                for x in range(nx):
                    p = probe[x]
                    g[x] += np.conj(p) * residual[x]
                    light[x] += p.real * p.real + p.imag * p.imag


@njit(nogil=True, cache=True, fastmath=True)
def object_step(image, gradient, illumination, step, keep, floor):
    """``image += step gradient / (keep illumination + floor)``; empties both sums."""
    step, keep, floor = np.float32(step), np.float32(keep), np.float32(floor)
    for row in range(image.shape[0]):
        for x in range(image.shape[1]):
            image[row, x] += gradient[row, x] * (step / (keep * illumination[row, x] + floor))
            gradient[row, x] = 0
            illumination[row, x] = 0


@njit(nogil=True, cache=True, fastmath=True)
def position_gradient(residuals, probes, image, corners, sums):
    """Normal equations of each frame's position, `sums` (b, 5).

    Moving the window by (dy, dx) changes the exit wave by ``probe (dy dO/dy + dx dO/dx)``; the sums are those
    of yy, yx, xx, y.residual, x.residual. Derivatives of the object are central differences; the outermost
    pixels of a window do not count.
    """
    b, modes, ny, nx = residuals.shape
    half = np.float32(0.5)
    for j in range(b):
        total = np.zeros(5)
        for y in range(1, ny - 1):
            r, c = corners[j, 0] + y, corners[j, 1]
            up, here, down = image[r - 1, c : c + nx], image[r, c : c + nx], image[r + 1, c : c + nx]
            yy, yx, xx = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            ry, rx = np.float32(0.0), np.float32(0.0)
            for m in range(modes):
                probe, residual = probes[j, m, y], residuals[j, m, y]
                for x in range(1, nx - 1):
                    p, q = probe[x], residual[x]
                    ay, by = half * (down[x].real - up[x].real), half * (down[x].imag - up[x].imag)
                    ax = half * (here[x + 1].real - here[x - 1].real)
                    bx = half * (here[x + 1].imag - here[x - 1].imag)
                    power = p.real * p.real + p.imag * p.imag
                    a, b_ = p.real * q.real + p.imag * q.imag, p.real * q.imag - p.imag * q.real
                    yy += power * (ay * ay + by * by)
                    xx += power * (ax * ax + bx * bx)
                    yx += power * (ay * ax + by * bx)
                    ry += ay * a + by * b_
                    rx += ax * a + bx * b_
            total += np.array([yy, yx, xx, ry, rx])
        sums[j] = total


@njit(nogil=True, cache=True, fastmath=True)
def probe_gradient(residuals, image, corners, rest, gradient, power):
    """What the residuals ask of the probe, and of its derivatives by the shift.

    Adds ``g = conj(image[window]) residual``, ``rest[j, 0] g`` and ``rest[j, 1] g`` to `gradient`
    (3, m, N, N), the adjoint of `spread_shifts`, and ``|image[window]|**2`` to `power` (N, N).
    """
    b, modes, ny, nx = residuals.shape
    for y in range(ny):
        for j in range(b):
            row = image[corners[j, 0] + y, corners[j, 1] : corners[j, 1] + nx]
            dy, dx = rest[j, 0], rest[j, 1]
            for x in range(nx):
                power[y, x] += row[x].real * row[x].real + row[x].imag * row[x].imag
            for m in range(modes):
                for x in range(nx):
                    g = residuals[j, m, y, x] * np.conj(row[x])
                    gradient[0, m, y, x] += g
                    gradient[1, m, y, x] += dy * g
                    gradient[2, m, y, x] += dx * g
