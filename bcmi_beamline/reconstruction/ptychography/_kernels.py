"""Fused loops of the ptychographic engine: everything but the Fourier transforms.

Shapes: b frames of a batch, m probe modes, k probes that a frame mixes, N x N pixels, an object of (H, W).
Real-space arrays are the window as it lies on the object; waves and what belongs to them have their zero
frequency at the corner, frames are read from where the detector put it, so that nothing is ever shifted in
memory. A thread works either on frames of its own or on rows of its own, and sums run over frames in one
order: the result is the same to the last bit whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MASKED, FREE = 1, 2
"""States of a pixel that no projection may use: bad, or kept to judge the result."""

ANSCOMBE = 0.375
"""``sqrt(I + 3/8)`` of Poisson counts has a variance of 1/4 almost whatever I (F. J. Anscombe, Biometrika 35,
246 (1948)), so that a least-squares fit of it weighs weak and strong pixels alike."""

FLOOR = 0.1
"""Counts added to data and model alike in the Poisson likelihood, so that dark pixels keep finite steps."""

_FAST = {"nsz", "contract", "reassoc", "arcp"}  # not "nnan": masked pixels may hold anything


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def exit_waves(base, weights, image, corners, probes, out):
    """``probes[j] = sum over k of weights[j, k] base[k]`` and ``out[j] = probes[j] image[window j]``.

    Parameters
    ----------
    base : (k, m, N, N), complex64
        A probe, its two derivatives, and more.
    weights : (b, k), float32
    """
    b, modes, ny, nx = out.shape
    mixed, source = probes.view(np.float32), base.view(np.float32)
    for j in range(b):
        c = corners[j, 1]
        here, dy, dx = weights[j, 0], weights[j, 1], weights[j, 2]
        for m in range(modes):
            for y in range(ny):
                probe = mixed[j, m, y]
                mean, along_y, along_x = source[0, m, y], source[1, m, y], source[2, m, y]
                for x in range(2 * nx):
                    probe[x] = here * mean[x] + dy * along_y[x] + dx * along_x[x]
                for k in range(3, base.shape[0]):
                    w, other = weights[j, k], source[k, m, y]
                    for x in range(2 * nx):
                        probe[x] += w * other[x]
                wave, row, light = out[j, m, y], image[corners[j, 0] + y, c : c + nx], probes[j, m, y]
                for x in range(nx):
                    wave[x] = light[x] * row[x]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def read_frame(frame, top, left, out):
    """Copy the window of a frame that starts at (top, left), float32, zero frequency to the corner."""
    ny, nx = out.shape
    half_y, half_x = ny // 2, nx // 2
    for y in range(ny):
        row, line = frame[top + (y + half_y) % ny], out[y]
        for x in range(nx - half_x):
            line[x] = row[left + half_x + x]
        for x in range(half_x):
            line[nx - half_x + x] = row[left + x]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def blur(values, spread, out):
    """``out = values + spread (sum of 4 neighbours - 4 values)``, periodic: its own adjoint."""
    ny, nx = values.shape
    s = np.float32(spread)
    keep = np.float32(1.0) - np.float32(4.0) * s
    for y in range(ny):
        up, here, down, line = values[y - 1], values[y], values[(y + 1) % ny], out[y]
        line[0] = keep * here[0] + s * (up[0] + down[0] + here[1] + here[nx - 1])
        left, right, inner, above, below = here[:-2], here[2:], line[1:-1], up[1:-1], down[1:-1]
        middle = here[1:-1]
        for x in range(nx - 2):
            inner[x] = keep * middle[x] + s * (above[x] + below[x] + left[x] + right[x])
        line[nx - 1] = keep * here[nx - 1] + s * (up[nx - 1] + down[nx - 1] + here[nx - 2] + here[0])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def modulus_residual(waves, counts, used, free, background, spread, poisson, ratio, sums):
    """Replace the detector waves of one frame by what brings them to the measured counts, and score them.

    With the model ``M = bin(blur(sum over modes |waves|**2)) + background`` the waves are multiplied by
    ``blur(spread(used f))``, the negative gradient of the misfit: ``f = sqrt((I + 3/8) / (M + 3/8)) - 1`` for
    Anscombe's least squares, ``f = ((I + e) / (M + e) - 1) / 2`` for Poisson's likelihood, at most 1. Waves
    may be sampled an integer number of times finer than pixels, which then add up their points.

    Parameters
    ----------
    waves : (m, s N, s N), complex64
    counts : (N, N), float32
    used : (N, N), float32
        1 where a pixel may be used, else 0.
    free : (n, 2), int
        Rows and columns of the pixels that judge.
    background : (N, N) or (0, 0), float32
        Counts that no wave makes.
    spread : float
        Of `blur`; 0 leaves it out.
    poisson : bool
    ratio : (N, N) or (0, 0), float32
        Where not empty receives what the background must be multiplied with, 1 where not used.
    sums : (5,)
        Receives the sums over used pixels of (|F| - sqrt(I))**2, of I and of M, the free negative
        log-likelihood, and the number of free pixels.
    """
    modes, fine_y, fine_x = waves.shape
    ny, nx = counts.shape
    finer = fine_y // ny
    model, factor = np.empty((fine_y, fine_x), np.float32), np.empty((fine_y, fine_x), np.float32)
    small, one, half = np.float32(ANSCOMBE), np.float32(1.0), np.float32(0.5)
    floor = np.float32(FLOOR)
    for m in range(modes):
        for y in range(fine_y):
            wave, line = waves[m, y], model[y]
            if m == 0:
                for x in range(fine_x):
                    line[x] = wave[x].real * wave[x].real + wave[x].imag * wave[x].imag
            else:
                for x in range(fine_x):
                    line[x] += wave[x].real * wave[x].real + wave[x].imag * wave[x].imag
    if spread != 0:
        blur(model, spread, factor)
        model, factor = factor, model
    fine_factor = factor
    if finer > 1:
        binned = np.zeros((ny, nx), np.float32)
        for y in range(fine_y):
            line, out = model[y], binned[y // finer]
            for x in range(nx):
                for i in range(finer):
                    out[x] += line[x * finer + i]
        model, factor = binned, np.empty((ny, nx), np.float32)
    if background.size:
        for y in range(ny):
            line, dark = model[y], background[y]
            for x in range(nx):
                line[x] += dark[x]
    error, counted, expected = 0.0, 0.0, 0.0
    for y in range(ny):
        line, seen, use, out = model[y], counts[y], used[y], factor[y]
        row_error, row_counted, row_model = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for x in range(nx):
            # masked pixels may hold anything, also nan: `use` chooses, it does not multiply
            good = use[x] > 0
            value = seen[x] if good else np.float32(0.0)
            here = max(line[x], np.float32(0.0)) if good else np.float32(0.0)
            difference = np.sqrt(here) - np.sqrt(value)
            row_error += difference * difference
            row_counted += value
            row_model += here
            if poisson:
                f = min(half * ((value + floor) / (here + floor) - one), one)
            else:
                f = np.sqrt((value + small) / (here + small)) - one
            out[x] = f if good else np.float32(0.0)
        error += row_error
        counted += row_counted
        expected += row_model
    llk = 0.0
    for i in range(len(free)):
        value = np.float64(counts[free[i, 0], free[i, 1]])
        here = max(np.float64(model[free[i, 0], free[i, 1]]), 1e-6)
        llk += here - value
        if value > 0:
            llk += value * np.log(value / here)
    if ratio.size:
        for y in range(ny):
            line, seen, use, out = model[y], counts[y], used[y], ratio[y]
            for x in range(nx):
                out[x] = seen[x] / max(line[x], np.float32(1e-6)) if use[x] > 0 else one
    if finer > 1:
        for y in range(fine_y):
            line, out = factor[y // finer], fine_factor[y]
            for x in range(nx):
                for i in range(finer):
                    out[x * finer + i] = line[x]
        factor = fine_factor
    if spread != 0:
        smooth = np.empty((fine_y, fine_x), np.float32)
        blur(factor, spread, smooth)
        factor = smooth
    for m in range(modes):
        for y in range(fine_y):
            wave, line = waves[m, y], factor[y]
            for x in range(fine_x):
                wave[x] = complex(wave[x].real * line[x], wave[x].imag * line[x])
    sums[0], sums[1], sums[2], sums[3], sums[4] = error, counted, expected, llk, len(free)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def object_gradient(residuals, probes, corners, gradient, illumination, low, high):
    """Add ``conj(probe) residual`` and ``|probe|**2`` of every window to rows low to high of the object."""
    b, modes, ny, nx = residuals.shape
    for row in range(low, high):
        for j in range(b):
            y = row - corners[j, 0]
            if y < 0 or y >= ny:
                continue
            g = gradient[row, corners[j, 1] : corners[j, 1] + nx]
            light = illumination[row, corners[j, 1] : corners[j, 1] + nx]
            for m in range(modes):
                probe, residual = probes[j, m, y], residuals[j, m, y]
                for x in range(nx):
                    g[x] += np.conj(probe[x]) * residual[x]
                for x in range(nx):
                    light[x] += probe[x].real * probe[x].real + probe[x].imag * probe[x].imag


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def probe_gradient(residuals, image, corners, weights, gradient, power, low, high):
    """What the residuals ask of the mixed probes, rows low to high of the window: adjoint of `exit_waves`.

    Adds ``weights[j, k] conj(image[window]) residual`` to `gradient` (k, m, N, N) and
    ``weights[j, 0]**2 |image[window]|**2`` to `power` (N, N).
    """
    b, modes, _, nx = residuals.shape
    asked = np.empty(nx, np.complex64)
    asked_parts, totals = asked.view(np.float32), gradient.view(np.float32)
    for y in range(low, high):
        light = power[y]
        for j in range(b):
            row = image[corners[j, 0] + y, corners[j, 1] : corners[j, 1] + nx]
            w = weights[j, 0] * weights[j, 0]
            for x in range(nx):
                light[x] += w * (row[x].real * row[x].real + row[x].imag * row[x].imag)
            for m in range(modes):
                residual = residuals[j, m, y]
                for x in range(nx):
                    asked[x] = residual[x] * np.conj(row[x])
                for k in range(gradient.shape[0]):
                    w = weights[j, k]
                    line = totals[k, m, y]
                    for x in range(2 * nx):
                        line[x] += w * asked_parts[x]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def object_step(image, gradient, illumination, step, keep, floor, low, high):
    """``image += step gradient / (keep illumination + floor)`` in rows low to high; empties both sums."""
    step, keep, floor = np.float32(step), np.float32(keep), np.float32(floor)
    for row in range(low, high):
        line, g, light = image[row], gradient[row], illumination[row]
        for x in range(len(line)):
            share = step / (keep * light[x] + floor)
            line[x] = complex(line[x].real + share * g[x].real, line[x].imag + share * g[x].imag)
        for x in range(len(line)):
            g[x] = 0
            light[x] = 0


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def position_gradient(residuals, probes, image, corners, sums):
    """Normal equations of each frame's position, `sums` (b, 5).

    Moving the window by (dy, dx) changes the exit wave by ``probe (dy dO/dy + dx dO/dx)``; the sums are those
    of yy, yx, xx, y.residual, x.residual. Derivatives of the object are central differences; the outermost
    pixels of a window do not count.
    """
    b, modes, ny, nx = residuals.shape
    half = np.float32(0.5)
    for j in range(b):
        total_yy, total_yx, total_xx, total_y, total_x = 0.0, 0.0, 0.0, 0.0, 0.0
        for y in range(1, ny - 1):
            r, c = corners[j, 0] + y, corners[j, 1] + 1
            up, down = image[r - 1, c : c + nx - 2], image[r + 1, c : c + nx - 2]
            left, right = image[r, c - 1 : c + nx - 3], image[r, c + 1 : c + nx - 1]
            yy, yx, xx = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            ry, rx = np.float32(0.0), np.float32(0.0)
            for m in range(modes):
                probe, residual = probes[j, m, y, 1:-1], residuals[j, m, y, 1:-1]
                for x in range(nx - 2):
                    p, q = probe[x], residual[x]
                    ay, by = half * (down[x].real - up[x].real), half * (down[x].imag - up[x].imag)
                    ax, bx = half * (right[x].real - left[x].real), half * (right[x].imag - left[x].imag)
                    power = p.real * p.real + p.imag * p.imag
                    a, b_ = p.real * q.real + p.imag * q.imag, p.real * q.imag - p.imag * q.real
                    yy += power * (ay * ay + by * by)
                    xx += power * (ax * ax + bx * bx)
                    yx += power * (ay * ax + by * bx)
                    ry += ay * a + by * b_
                    rx += ax * a + bx * b_
            total_yy += yy
            total_yx += yx
            total_xx += xx
            total_y += ry
            total_x += rx
        sums[j, 0], sums[j, 1], sums[j, 2] = total_yy, total_yx, total_xx
        sums[j, 3], sums[j, 4] = total_y, total_x


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def overlaps(residuals, parts, image, corners, sums):
    """How much more of every part (k, m, N, N) of the probe a frame asks for, `sums` (b, k, 2).

    Sums of ``Re conj(part image) residual`` and of ``|part image|**2``: their ratio is the step.
    """
    b, modes, ny, nx = residuals.shape
    for j in range(b):
        for k in range(parts.shape[0]):
            asked, power = 0.0, 0.0
            for m in range(modes):
                for y in range(ny):
                    row = image[corners[j, 0] + y, corners[j, 1] : corners[j, 1] + nx]
                    part, residual = parts[k, m, y], residuals[j, m, y]
                    row_asked, row_power = np.float32(0.0), np.float32(0.0)
                    for x in range(nx):
                        wave = part[x] * row[x]
                        row_asked += wave.real * residual[x].real + wave.imag * residual[x].imag
                        row_power += wave.real * wave.real + wave.imag * wave.imag
                    asked += row_asked
                    power += row_power
            sums[j, k, 0], sums[j, k, 1] = asked, power


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def difference(values, axis, out):
    """Minus the derivative of (N, N) values along an axis by fourth-order central differences, periodic.

    To first order ``values + d difference(values)`` are the values moved by d.
    """
    ny, nx = values.shape
    source, result = values.view(np.float32), out.view(np.float32)
    near, far = np.float32(-8 / 12), np.float32(1 / 12)
    for y in range(ny):
        if axis == 0:
            up, down = source[y - 1], source[(y + 1) % ny]
            above, below, line = source[y - 2], source[(y + 2) % ny], result[y]
            for x in range(2 * nx):
                line[x] = near * (down[x] - up[x]) + far * (below[x] - above[x])
        else:
            # slices, since an index that might be negative keeps a loop from being vectorised
            here, line, inner = source[y], result[y], result[y, 4:-4]
            far_left, left, right, far_right = here[:-8], here[2:-6], here[6:-2], here[8:]
            for x in range(2 * nx - 8):
                inner[x] = near * (right[x] - left[x]) + far * (far_right[x] - far_left[x])
            for x in range(-4, 4):
                one = here[(x + 2) % (2 * nx)] - here[(x - 2) % (2 * nx)]
                two = here[(x + 4) % (2 * nx)] - here[(x - 4) % (2 * nx)]
                line[x] = near * one + far * two
