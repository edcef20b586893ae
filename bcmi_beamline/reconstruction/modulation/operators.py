"""From a crystal's exit wave through the modulator to the detector, and back.

One frame of Bragg coherent modulation imaging (J. Zhao et al., Phys. Rev. Lett. (2025), End Matter B) is

    psi_j = FFT2[ M . (K_y P_j K_x^T) ],        P_j = sum_zeta rho exp(-i kappa_j zeta).

The exit wave P_j fills a small window, so that the Fresnel step over d1 is two small matrix products rather
than two transforms, and the matrices carry the drift of the crystal. They lead to the patch of the
modulator that the light of frame j meets, which follows the walking beam. Folded onto as many points as the
detector has pixels, whatever its size, the patch gives the wave at the centres of the pixels exactly: a
frame costs one FFT forward and one back. A short stencil then integrates the intensity over the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numba
import numpy as np
from scipy.fft import next_fast_len

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.fourier import transform_lines
from bcmi_beamline.scans import Modulator, RockingScan

Shift = Sequence[float] | np.ndarray | None
"""Of a crystal, (x', y') in metres; None: it stands where it stood."""

NEIGHBOUR = 0.05
"""Weight of either neighbour in the stencil (w, 1 - 2 w, w) that integrates an intensity over square pixels.
A fringe of u cycles per pixel keeps ``1 - 2 w (1 - cos 2 pi u)`` of its contrast, within 0.012 of ``sinc(u)``
up to u = 0.3, where the light is; no weight is negative, so that no intensity becomes so."""

ANGLES_KEPT = 0.7
"""Part of the angles that the detector takes in, within which the light of a crystal is followed to the
modulator: what is diffracted further out is weak, and would land far from the rest."""

SMOOTH_FROM = 0.85
"""Part of the band from which on the near-field kernel falls off, where no light is followed any more."""

TAPS = 6
"""Lines from which one between them is interpolated; two lines a period leave an error of 0.1 to 0.2 %."""

MOST_BETWEEN = 8
"""Largest step from one column that is computed to the next: beyond, what blocks share outweighs the gain."""

BLOCK = 208
"""Columns of the patch that are folded at a time: the light before them stays in the processor's cache."""

TOGETHER = 3
"""Rows of the patch that are taken back to those computed at once, which are so stored less often."""


@dataclass(frozen=True)
class Window:
    """Where the exit wave may be: `shape` pixels about a point `centre` off the axis (rows, columns)."""

    shape: tuple[int, int]
    centre: tuple[int, int] = (0, 0)

    def indices(self, axis: int) -> np.ndarray:
        """Pixel coordinates along `axis` (0: rows, to -y'; 1: columns, to +x'), 0 on the beam axis."""
        n = self.shape[axis]
        return np.arange(n) - n // 2 + self.centre[axis]


class FresnelKernel:
    """Near-field propagation along one axis as Toeplitz matrices, with the wave moved sideways first.

    ``k(u) = IFFT[A(f) exp(-i pi lambda d f^2)]`` on an array so long that light that leaves it on one side
    does not come back on the other. A falls smoothly from 1 to 0 between `SMOOTH_FROM` of the highest
    frequency and the highest, or the end of the band would ripple through the kernel. Light that walks off
    by w pixels fills a band about another frequency, which the pixels of the exit wave do not tell from the
    lowest one: its kernel is ``c(u) (k / c)(u - w)`` with ``c(u) = exp(i pi u^2 p^2 / lambda d)``.

    Parameters
    ----------
    pixel, wavelength, distance : float
        m.
    largest : int
        Largest distance that is asked for, less the walk, between a point here and one there, pixels.
    """

    def __init__(self, pixel: float, wavelength: float, distance: float, largest: int):
        fresnel = wavelength * distance / pixel**2
        self._half = largest + 1
        self._f = np.fft.fftfreq(int(next_fast_len(int(2 * largest + fresnel) + 64) or 0))
        outside = np.clip((2 * np.abs(self._f) - SMOOTH_FROM) / (1 - SMOOTH_FROM), 0, 1)
        self._still = np.cos(np.pi / 2 * outside) ** 2 * np.exp(-1j * np.pi * fresnel * self._f**2)
        self._pixel, self._chirp = pixel, np.pi / fresnel
        self._cache: dict[tuple[int, int, int, int], np.ndarray] = {}

    def line(self, walk: int = 0, shift: float = 0.0) -> np.ndarray:
        """The kernel for u from ``walk - largest - 1`` on, complex64; `shift` in metres."""
        moved = shift / self._pixel
        spectrum = self._still * np.exp(-2j * np.pi * self._f * moved) if moved else self._still
        kernel = np.fft.ifft(spectrum)
        kernel = np.concatenate([kernel[-self._half :], kernel[: self._half]])
        if walk:
            u = np.arange(-self._half, self._half) - moved
            kernel *= np.exp(1j * self._chirp * walk * (2 * u + walk))
        return kernel.astype(np.complex64)

    def matrix(
        self,
        far: tuple[int, int, int],
        near: np.ndarray,
        walk: int = 0,
        shift: float = 0.0,
        factor: np.ndarray | None = None,
    ) -> np.ndarray:
        """Carry a wave at pixels `near` (consecutive) to `far` = (first, count, step), (count, n) complex64.

        `factor` (count,) multiplies the wave there; it must belong to `far`.
        """
        key = *far, walk
        if shift == 0.0 and key in self._cache:
            return self._cache[key]
        first = self._half + far[0] - int(near[0]) - walk
        index = first + far[2] * np.arange(far[1])[:, None] - np.arange(len(near))
        matrix = self.line(walk, shift)[index]
        if factor is not None:
            matrix *= factor[:, None]
        if shift == 0.0:
            self._cache[key] = matrix
        return matrix


class SlowLines:
    """Rows or columns of a near field between those that are computed, once its fast phase is taken off.

    A wave that leaves a window of n pixels and travels d is, but for ``exp(i pi y^2 / lambda d)``,
    band-limited to ``n p / lambda d``: every `step`-th line tells the others, by the best linear prediction
    from `TAPS` lines.

    Parameters
    ----------
    window : int
        Pixels of the window that the wave leaves, along the axis.
    fresnel : float
        ``lambda d / p^2``.
    count : int
        Lines wanted.
    most : int, optional
        Largest step, where it is not to be the largest possible.
    """

    def __init__(self, window: int, fresnel: float, count: int, most: int | None = None):
        self.step = max(1, int(fresnel / (2 * window)))
        self.step = self.step if most is None else min(self.step, most)
        at = (np.arange(TAPS) - (TAPS // 2 - 1)) * self.step
        if self.step == 1:  # the near field is as fine as the wave: every line is computed
            self.taps = (at == 0).astype(np.float32)[None]
        else:
            system = np.sinc(np.subtract.outer(at, at) * window / fresnel) + 1e-6 * np.eye(TAPS)
            wanted = np.sinc(np.subtract.outer(at, np.arange(self.step)) * window / fresnel)
            self.taps = np.ascontiguousarray(np.linalg.solve(system, wanted).T, dtype=np.float32)
        self.wanted = count
        self.count = -(-count // self.step) + TAPS - 1
        """Lines to be computed."""
        self.before = -int(at[0])
        """How far the first of them lies before the first line wanted."""

    def matrix(self) -> np.ndarray:
        """From the lines computed to those wanted, (wanted, count), float32."""
        matrix = np.zeros((self.wanted, self.count), np.float32)
        line = np.arange(self.wanted)
        for t in range(TAPS):
            matrix[line, line // self.step + t] = self.taps[line % self.step, t]
        return matrix


class FrameOperator:
    """Exit wave on a window to the wave on the detector, frame by frame.

    Parameters
    ----------
    transmission : ndarray, (My, Mx), complex64
        Of the modulator where the beam falls, beam axis at ``n // 2``; taken as 1 beyond. Kept in whole
        numbers, wrong by less than 2e-5 of a transmission of 1.
    window : Window
    pixel : (y, x)
        Of object and modulator planes, m.
    wavelength, distance, propagation_distance : float
        Wavelength, crystal to modulator, modulator to detector, m. The last enters as the small curvature
        of the wave over the modulator.
    detector_shape : (Ny, Nx)
    centres : ndarray, (J, 2), int
        Pixel (row, column) from the beam axis about which frame j's light meets the modulator.
    reach : (rows, columns)
        Of the patch of the modulator that is kept about each centre, pixels; even.
    neighbour : float
        As `NEIGHBOUR`; 0 samples the intensity at the middle of the pixels.
    walk : ndarray, (J, 2), int, optional
        How far (rows, columns) the light of each frame walks between crystal and modulator, pixels.
    """

    def __init__(
        self,
        transmission: np.ndarray,
        window: Window,
        pixel: tuple[float, float],
        wavelength: float,
        distance: float,
        propagation_distance: float,
        detector_shape: tuple[int, int],
        centres: np.ndarray,
        reach: tuple[int, int],
        neighbour: float = NEIGHBOUR,
        walk: np.ndarray | None = None,
    ):
        self.window = window
        self.pixel = pixel
        self.wavelength = wavelength
        self.distance = distance
        self.detector_shape = detector_shape
        self.centres = np.asarray(centres, int)
        self.reach = reach
        self.neighbour = float(neighbour)
        self.background = 0.0
        """Counts per pixel of a frame that no wave makes."""
        self._walk = np.zeros_like(self.centres) if walk is None else np.asarray(walk, int)
        self._first = self.centres - np.array(reach) // 2
        low, high = self._first.min(axis=0), (self._first + reach).max(axis=0)
        self._origin = low
        film = _window_of(transmission, low, high)
        self.step = np.float32(1 / max(1.0, float(np.abs(film).max()) ** 2))
        factors = [
            np.exp(1j * np.pi * (np.arange(a, b) * p) ** 2 / (wavelength * propagation_distance))
            for a, b, p in zip(low, high, pixel, strict=True)
        ]
        self._near = [window.indices(axis) for axis in (0, 1)]
        self._lines = [
            SlowLines(n, wavelength * distance / p**2, count, most)
            for n, p, count, most in zip(window.shape, pixel, reach, (None, MOST_BETWEEN), strict=True)
        ]
        for axis in (0, 1):
            factors[axis] *= self._fast_phase(np.arange(low[axis], high[axis]), axis)
        film *= np.multiply.outer(*factors).astype(np.complex64)
        self.modulator, self._unit = in_whole_numbers(film)
        self._extent = film.shape
        self._kept: dict[int, tuple[tuple[float, float], tuple[np.ndarray, np.ndarray]]] = {}
        self._kernels = []
        for axis in (0, 1):
            middle = self.centres[:, axis] - self._walk[:, axis] - window.centre[axis]
            largest = (reach[axis] + window.shape[axis]) // 2 + 2 + int(np.abs(middle).max())
            largest += self._lines[axis].step * TAPS
            self._kernels.append(FresnelKernel(pixel[axis], wavelength, distance, largest))

    def for_frames(self, walk: np.ndarray) -> FrameOperator:
        """The same optics for other frames, whose light walks by `walk` (J, 2) pixels (rows, columns).

        Raises
        ------
        ValueError
            Where they leave the part of the modulator that is kept.
        """
        other = copy(self)
        other._kept = {}
        other._walk = np.asarray(walk, int)
        other.centres = other._walk + self.window.centre
        other._first = other.centres - np.array(self.reach) // 2
        ends = other._first - self._origin
        if (ends < 0).any() or (ends + self.reach > self._extent).any():
            raise ValueError("frames beyond the angles that were prepared for")
        return other

    def over(self, background: float) -> FrameOperator:
        """The same optics with other counts per pixel that no wave makes."""
        other = copy(self)
        other.background = background
        return other

    def _fast_phase(self, at: np.ndarray, axis: int) -> np.ndarray:
        """``exp(i pi y^2 / lambda d)``, y from the middle of the window: what `SlowLines` wants taken off."""
        y = (at - float(self._near[axis].mean())) * self.pixel[axis]
        return np.exp(1j * np.pi * y**2 / (self.wavelength * self.distance)).astype(np.complex64)

    def _matrices(self, frame: int, shift: Shift) -> tuple[np.ndarray, np.ndarray]:
        """(K_y, K_x) for frame `frame` of a crystal moved by `shift` (x', y') in metres: the lines computed.

        Those of each frame are kept until it is asked for elsewhere: the way back asks for the same.
        """
        moved = (0.0, 0.0) if shift is None else (float(shift[0]), float(shift[1]))
        kept = self._kept.get(frame)
        if kept is None or kept[0] != moved:
            ky, kx = self._matrix(frame, 0, -moved[1]), self._matrix(frame, 1, moved[0])  # rows run to -y'
            kept = self._kept[frame] = moved, (ky, kx)
        return kept[1]

    def _matrix(self, frame: int, axis: int, shift: float) -> np.ndarray:
        lines = self._lines[axis]
        far = int(self._first[frame, axis]) - lines.before, lines.count, lines.step
        slow = self._fast_phase(far[0] + lines.step * np.arange(lines.count), axis).conj()
        return self._kernels[axis].matrix(far, self._near[axis], int(self._walk[frame, axis]), shift, slow)

    def _place(self, frame: int) -> tuple[int, int, int, int]:
        """Corner of the patch of `frame`: in the modulator's array, and from the axis."""
        first, origin = self._first[frame], self._origin
        return int(first[0] - origin[0]), int(first[1] - origin[1]), int(first[0]), int(first[1])

    def patch_indices(self, frame: int, axis: int) -> np.ndarray:
        """Pixel coordinates of the patch of `frame` along `axis`, 0 on the beam axis."""
        return self._first[frame, axis] + np.arange(self.reach[axis])

    def to_modulator(self, wave: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Propagate an exit wave (ny, nx) to the patch of the modulator that it meets."""
        rows, columns = (lines.matrix() for lines in self._lines)
        light = rows @ self._few_points(wave, frame, shift) @ columns.T
        return light * self._fast_phases(frame)

    def rows_before(self, wave: np.ndarray, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Intensity before the modulator on those rows of the patch that are computed.

        Their pixel coordinates (m,), 0 on the beam axis, and the intensity (m, columns).
        """
        lines, first = self._lines[0], self._first[frame, 0]
        rows = first - lines.before + lines.step * np.arange(lines.count)
        inside = (rows >= first) & (rows < first + self.reach[0])
        light = self._few_points(wave, frame, None)[inside] @ self._lines[1].matrix().T
        return rows[inside], np.real(light) ** 2 + np.imag(light) ** 2

    def from_modulator(self, light: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `to_modulator`: back to the exit window."""
        rows, columns = (lines.matrix() for lines in self._lines)
        points = rows.T @ (light * self._fast_phases(frame).conj()) @ columns
        return self._from_few_points(points, frame, shift)

    def _fast_phases(self, frame: int) -> np.ndarray:
        """What is taken off the light before the modulator, over the patch of `frame`."""
        sides = [self._fast_phase(self.patch_indices(frame, axis), axis) for axis in (0, 1)]
        return np.multiply.outer(*sides)

    def _few_points(self, wave: np.ndarray, frame: int, shift: Shift) -> np.ndarray:
        """Light before the modulator where it is computed, (rows, columns)."""
        ky, kx = self._matrices(frame, shift)
        return (ky @ wave) @ kx.T

    def _from_few_points(self, points: np.ndarray, frame: int, shift: Shift) -> np.ndarray:
        ky, kx = self._matrices(frame, shift)
        return ky.conj().T @ (points @ kx.conj())

    def forward(
        self, wave: np.ndarray, frame: int = 0, shift: Shift = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Wave at the middle of the pixels (Ny, Nx), zero frequency at the corner, of an exit wave (ny, nx).

        `shift` moves the crystal by (x', y') metres; the wave is written to `out` where there is one.
        """
        psi = np.empty(self.detector_shape, np.complex64) if out is None else out
        points, (down, across) = self._few_points(wave, frame, shift), (a.taps for a in self._lines)
        fold_light(points, self._unit * down, across, self.modulator, self._place(frame), self.reach, psi)
        for lit in self._lit_rows(frame):
            transform_lines(psi[lit], 1)
        return transform_lines(psi, 0)

    def adjoint(self, psi: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `forward`; overwrites `psi`."""
        return self._from_few_points(self._back(psi, frame, -1.0), frame, shift)

    def inverse(
        self,
        psi: np.ndarray,
        frame: int = 0,
        shift: Shift = None,
        regularisation: float = 0.05,
    ) -> np.ndarray:
        """Regularised inverse of `forward`, ``M^-1 = M* / (|M|^2 + eps)``; overwrites `psi`."""
        return self._from_few_points(self._back(psi, frame, regularisation), frame, shift)

    def _back(self, psi: np.ndarray, frame: int, regularisation: float) -> np.ndarray:
        transform_lines(psi, 0, forward=False)
        for lit in self._lit_rows(frame):
            transform_lines(psi[lit], 1, forward=False)
        down, across = (lines.taps for lines in self._lines)
        points = np.zeros([lines.count for lines in self._lines], np.complex64)
        unit, least = self._unit, regularisation / self._unit**2
        down = down * unit if least < 0 else down / unit  # M*, or M* / |M|^2
        place = self._place(frame)
        unfold_light(psi, down, across, self.modulator, place, self.reach, least, points)
        return points

    def _lit_rows(self, frame: int) -> list[slice]:
        """Rows of the folded light that are not empty: all others need no transform."""
        count, n = self.reach[0], self.detector_shape[0]
        first = int(self._first[frame, 0]) % n
        if count >= n:
            return [slice(0, n)]
        if first + count <= n:
            return [slice(first, first + count)]
        return [slice(first, n), slice(0, first + count - n)]

    def intensity(self, psi: np.ndarray) -> np.ndarray:
        """Counts per pixel (Ny, Nx), float32, of a wave on the detector."""
        counts = np.empty(self.detector_shape, np.float32)
        integrate_pixels(np.real(psi) ** 2 + np.imag(psi) ** 2, self.neighbour, counts)
        counts += np.float32(self.background)
        return counts


def _window_of(transmission: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Part of a centred map from pixel `low` to `high`, 1 beyond the map; complex64."""
    out = np.ones(tuple(high - low), np.complex64)
    source, target = [], []
    for axis, m in enumerate(transmission.shape):
        a, b = max(int(low[axis]), -(m // 2)), min(int(high[axis]), m - m // 2)
        source.append(slice(a + m // 2, max(a, b) + m // 2))
        target.append(slice(a - int(low[axis]), max(a, b) - int(low[axis])))
    out[tuple(target)] = transmission[tuple(source)]
    return out


def in_whole_numbers(film: np.ndarray) -> tuple[np.ndarray, float]:
    """A complex map (My, Mx) as int16 (My, 2 Mx), parts side by side, and the unit it is counted in.

    Either part is wrong by half a unit at most, 1.5e-5 of the largest. Half the bytes of complex64: the patch
    of a frame, larger than the detector, is read forward and back, and memory is what both wait for.
    """
    parts = np.ascontiguousarray(film).view(np.float32)
    unit = float(np.abs(parts).max()) / np.iinfo(np.int16).max
    return np.rint(parts / unit).astype(np.int16), unit


_jit = numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")


@_jit
def weigh_rows(
    above: np.ndarray, here: np.ndarray, below: np.ndarray, neighbour: float, line: np.ndarray
) -> None:  # pragma: no cover
    """Stencil of `NEIGHBOUR` across rows (n,), into `line` (n + 2) whose ends are those of a period."""
    w, middle = np.float32(neighbour), np.float32(1 - 2 * neighbour)
    n = len(here)
    inner = line[1:]
    for c in range(n):
        inner[c] = middle * here[c] + w * (above[c] + below[c])
    line[0], line[n + 1] = line[n], line[1]


@_jit
def integrate_pixels(a: np.ndarray, neighbour: float, out: np.ndarray) -> None:  # pragma: no cover
    """Convolve `a` (periodic) with the separable stencil of `NEIGHBOUR`; self-adjoint."""
    ny, nx = a.shape
    w, middle = np.float32(neighbour), np.float32(1 - 2 * neighbour)
    line = np.empty(nx + 2, np.float32)
    for r in range(ny):
        weigh_rows(a[(r - 1) % ny], a[r], a[(r + 1) % ny], neighbour, line)
        for c in range(nx):
            out[r, c] = middle * line[c + 1] + w * (line[c] + line[c + 2])


@_jit
def _weights(taps: np.ndarray) -> np.ndarray:  # pragma: no cover
    """`taps` (step, TAPS) for either part of a block's columns and all beside them, (TAPS, columns)."""
    step = len(taps)
    out = np.empty((TAPS, 2 * (BLOCK + (TAPS + 2) * step)), np.float32)
    for t in range(TAPS):
        line = out[t]
        for k in range(step):
            line[2 * k] = line[2 * k + 1] = taps[k, t]
        for i in range(2 * step, len(line)):
            line[i] = line[i - 2 * step]
    return out


@_jit
def _spread(
    few: np.ndarray, weights: np.ndarray, step: int, first: int, rows: np.ndarray
) -> None:  # pragma: no cover
    """Columns from `first` on of `rows` (m, C), from every `step`-th column, `few` (m, n)."""
    width = 2 * rows.shape[1]
    near, last = first // step, (first + rows.shape[1] - 1) // step + TAPS
    held = np.empty((last - near) * step, np.complex64)
    flat, period, skip = held.view(np.float32), 2 * step, 2 * (first % step)
    a, b, c = flat[skip:], flat[skip + period :], flat[skip + 2 * period :]
    d, e, f = flat[skip + 3 * period :], flat[skip + 4 * period :], flat[skip + 5 * period :]
    s, t, u = weights[0, skip:], weights[1, skip:], weights[2, skip:]
    v, w, x = weights[3, skip:], weights[4, skip:], weights[5, skip:]
    for row in range(len(few)):
        k = 0
        for q in range(near, last):  # every column computed `step` times, so that what follows has no gaps
            value = few[row, q]
            for _ in range(step):
                held[k] = value
                k += 1
        line = rows[row].view(np.float32)
        for i in range(width):
            line[i] = s[i] * a[i] + t[i] * b[i] + u[i] * c[i] + v[i] * d[i] + w[i] * e[i] + x[i] * f[i]


@_jit
def _gather(
    rows: np.ndarray, weights: np.ndarray, step: int, first: int, few: np.ndarray
) -> None:  # pragma: no cover
    """Adjoint of `_spread`, added to `few`."""
    width = 2 * rows.shape[1]
    near, last = first // step, (first + rows.shape[1] - 1) // step + TAPS
    held = np.empty((last - near) * step, np.complex64)
    flat, period, skip = held.view(np.float32), 2 * step, 2 * (first % step)
    wide = np.zeros(len(flat) + 5 * period, np.float32)
    line = wide[5 * period + skip :]
    a, b, c = wide[5 * period :], wide[4 * period :], wide[3 * period :]
    d, e, f = wide[2 * period :], wide[period:], wide
    s, t, u, v, w, x = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    for row in range(len(few)):
        source = rows[row].view(np.float32)
        for i in range(width):
            line[i] = source[i]
        for i in range(len(flat)):
            flat[i] = s[i] * a[i] + t[i] * b[i] + u[i] * c[i] + v[i] * d[i] + w[i] * e[i] + x[i] * f[i]
        k = 0
        for q in range(near, last):
            real, imaginary = np.float32(0), np.float32(0)
            for _ in range(step):
                real += held[k].real
                imaginary += held[k].imag
                k += 1
            few[row, q] += complex(real, imaginary)


@_jit
def fold_light(
    few: np.ndarray,
    down: np.ndarray,
    across: np.ndarray,
    modulator: np.ndarray,
    place: tuple[int, int, int, int],
    shape: tuple[int, int],
    out: np.ndarray,
) -> None:  # pragma: no cover
    """Light before the modulator, known at `few` points, through it and folded onto the detector's points.

    Parameters
    ----------
    few : ndarray, (m, n), complex64
        Light on every so many rows and columns.
    down, across : ndarray, (step, TAPS), float32
        Of `SlowLines`, for rows and for columns; the former times the unit of `modulator`.
    modulator : ndarray, (My, 2 Mx), int16
        With the fast phase of the light, real and imaginary parts side by side.
    place : (row, column, row, column)
        Corner of the patch in `modulator`, and from the beam axis.
    shape : (rows, columns)
        Of the patch.
    out : ndarray, (Ny, Nx), complex64
        Overwritten.
    """
    ny, nx = out.shape
    weights, held = _weights(across), np.empty((len(few), BLOCK), np.complex64)
    buffer = np.empty(BLOCK, np.complex64)
    line = buffer.view(np.float32)
    out[:] = 0
    for first in range(0, shape[1], BLOCK):
        columns = min(BLOCK, shape[1] - first)
        _spread(few, weights, len(across), first, held[:, :columns])
        source = held.view(np.float32)
        for row in range(shape[0]):
            near, w = row // len(down), down[row % len(down)]
            a, b, c = source[near], source[near + 1], source[near + 2]
            d, e, f = source[near + 3], source[near + 4], source[near + 5]
            for i in range(2 * columns):  # written out, so that the line is stored once
                line[i] = w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i] + w[4] * e[i] + w[5] * f[i]
            film = modulator[place[0] + row, 2 * (place[1] + first) :]
            target = out[(place[2] + row) % ny]
            done, at = 0, (place[3] + first) % nx
            while done < columns:
                run = min(nx - at, columns - done)
                light, here, there = buffer[done : done + run], film[2 * done :], target[at : at + run]
                for i in range(run):
                    u, v = np.float32(here[2 * i]), np.float32(here[2 * i + 1])
                    x, y = light[i].real, light[i].imag
                    there[i] += complex(u * x - v * y, u * y + v * x)
                done, at = done + run, 0


@_jit
def unfold_light(
    field: np.ndarray,
    down: np.ndarray,
    across: np.ndarray,
    modulator: np.ndarray,
    place: tuple[int, int, int, int],
    shape: tuple[int, int],
    least: float,
    few: np.ndarray,
) -> None:  # pragma: no cover
    """Adjoint of `fold_light`, added to `few`; over ``|M|^2 + least`` where that is not < 0.

    M as the whole numbers of `modulator`.
    """
    weights, held = _weights(across), np.empty((len(few), BLOCK), np.complex64)
    for first in range(0, shape[1], BLOCK):
        columns = min(BLOCK, shape[1] - first)
        held[:] = 0
        corner = place[0], place[1] + first, place[2], place[3] + first
        _unfold_rows(field, down, modulator, corner, (shape[0], columns), least, held)
        _gather(held[:, :columns], weights, len(across), first, few)


@_jit
def _unfold_rows(
    field: np.ndarray,
    taps: np.ndarray,
    modulator: np.ndarray,
    place: tuple[int, int, int, int],
    shape: tuple[int, int],
    least: float,
    rows: np.ndarray,
) -> None:  # pragma: no cover
    """Of `unfold_light`: a block of columns, added to `rows` (m, BLOCK), which are computed."""
    ny, nx = field.shape
    count, columns = shape
    steps, target = len(taps), rows.view(np.float32)
    lines = np.zeros((TOGETHER, columns), np.complex64)
    flat, weights = lines.view(np.float32), np.zeros(TOGETHER, np.float32)
    for first in range(0, count, TOGETHER):
        last = min(first + TOGETHER, count) - 1
        for row in range(first, last + 1):
            film = modulator[place[0] + row, 2 * place[1] :]
            source, line = field[(place[2] + row) % ny], lines[row - first]
            done, at = 0, place[3] % nx
            while done < columns:
                run = min(nx - at, columns - done)
                light, here, there = line[done : done + run], film[2 * done :], source[at : at + run]
                for i in range(run):
                    u, v = np.float32(here[2 * i]), np.float32(here[2 * i + 1])
                    x, y = there[i].real, there[i].imag
                    light[i] = complex(u * x + v * y, u * y - v * x)
                done, at = done + run, 0
            if least >= 0:
                for i in range(columns):
                    u, v = np.float32(film[2 * i]), np.float32(film[2 * i + 1])
                    line[i] /= u * u + v * v + np.float32(least)
        for near in range(first // steps, last // steps + TAPS):
            for k in range(TOGETHER):
                tap = near - (first + k) // steps
                used = 0 <= tap < TAPS and first + k <= last
                weights[k] = taps[(first + k) % steps, tap] if used else np.float32(0)
            a, b, c, other = weights[0], weights[1], weights[2], target[near]
            x, y, z = flat[0], flat[1], flat[2]
            for i in range(2 * columns):
                other[i] += a * x[i] + b * y[i] + c * z[i]


class RockingOperator:
    """Crystal in the sheared frame to its exit waves: the slow axis.

    ``P_j = sum_zeta rho exp(-i kappa_j zeta) / sqrt(J)`` with ``kappa_j = -Theta_j rocking_gradient[2]``, as
    a matrix, so that angles need be neither even nor in order.

    Parameters
    ----------
    geometry : Geometry
    angles_deg : ndarray, (J,)
    pixel : (y, x)
        m.
    window : Window
    """

    def __init__(
        self, geometry: Geometry, angles_deg: np.ndarray, pixel: tuple[float, float], window: Window
    ):
        self.kappa = -np.deg2rad(np.asarray(angles_deg, float)) * geometry.rocking_gradient[2]
        order = np.sort(self.kappa)
        if len(order) < 2 or order[0] == order[-1]:
            raise ValueError("a rocking curve needs frames at two angles at least: check angles_deg")
        self.voxel = float(2 * np.pi * (len(order) - 1) / (len(order) * (order[-1] - order[0])))
        shear_x, shear_y = geometry.shear
        y = -window.indices(0) * pixel[0]
        x = window.indices(1) * pixel[1]
        self.shear_offset = shear_y * y[:, None] + shear_x * x
        """``z' - zeta`` over the window, m."""

    def zeta(self, n_zeta: int) -> np.ndarray:
        """Coordinates of `n_zeta` voxels, m, origin at ``n // 2``."""
        return (np.arange(n_zeta) - n_zeta // 2) * self.voxel

    def matrix(self, n_zeta: int, tilted: float = 0.0) -> np.ndarray:
        """``exp(-i kappa_j zeta) / sqrt(J)``, (J, n_zeta), complex64.

        In light that is tilted by an angular frequency `tilted` along z', rad/m, kappa is less by it.
        """
        phase = np.multiply.outer(self.kappa - tilted, self.zeta(n_zeta))
        return (np.exp(-1j * phase) / np.sqrt(len(self.kappa))).astype(np.complex64)

    def tilt(self, frames: np.ndarray | slice) -> np.ndarray:
        """``exp(i kappa_j (shear . x))``: what the shear puts on the exit waves, (frames, ny, nx).

        Divided out, what is left changes from frame to frame only as fast as the crystal is thick.
        """
        return np.exp(1j * self.kappa[frames, None, None] * self.shear_offset).astype(np.complex64)


def slow_transform(matrix: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Apply `matrix` to the first axis of `image`."""
    return (matrix @ image.reshape(len(image), -1)).reshape(len(matrix), *image.shape[1:])


def sinc_matrix(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Band-limited interpolation from evenly spaced `source` coordinates to evenly spaced `target`, a matrix.

    Where the target is coarser, what it cannot hold is left out.
    """
    step, coarse = source[1] - source[0], max(source[1] - source[0], target[1] - target[0])
    return np.sinc(np.subtract.outer(target, source) / coarse) * (step / coarse)


def place_modulator(
    modulator: Modulator, scan: RockingScan, shape: tuple[int, int], pixel: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Modulator as the beam of `scan` meets it: moved, resampled, cropped or padded to one grid.

    Parameters
    ----------
    modulator : Modulator
    scan : RockingScan
        `modulator_position` says how far the nanogoniometer stands from where it was calibrated.
    shape, pixel : (rows, columns), (y, x) in m
        Of the grid wanted; the beam axis stands at its ``n // 2``.

    Returns
    -------
    transmission : ndarray, complex64
        1 outside the map.
    trusted : ndarray, bool

    Raises
    ------
    ValueError
        When the modulator cannot belong to this scan.
    """
    d1, nominal = modulator.sample_distance, scan.geometry.modulator_distance
    if not scan.modulator_in:
        raise ValueError("the frames were taken with the modulator out: use the conventional reconstruction")
    if abs(d1 - nominal) > max(100e-6, 5 * modulator.sample_distance_error):
        raise ValueError(
            f"the modulator was calibrated at d1 = {d1 * 1e3:.3f} mm, the rocking curve was taken at "
            f"{nominal * 1e3:.3f} mm: calibrate it where it is used"
        )
    if not 0.1 < modulator.pixel_size / min(pixel) < 10:
        raise ValueError(
            f"the modulator's pixel ({modulator.pixel_size * 1e9:.2f} nm) and the scan's "
            f"({pixel[1] * 1e9:.2f} nm) are too far apart: check pixel_size, detector distance and energy"
        )
    here = scan.modulator_position
    moved = (0.0, 0.0) if here is None else (here[0] - modulator.centre[0], here[1] - modulator.centre[1])
    grids, maps = [], []
    for n, p, m, shift in zip(shape, pixel, modulator.transmission.shape, (-moved[1], moved[0]), strict=True):
        grids.append((np.arange(n) - n // 2) * p - shift)
        maps.append((np.arange(m) - m // 2) * modulator.pixel_size)
    rows, columns = (sinc_matrix(g, s).astype(np.float32) for g, s in zip(grids, maps, strict=True))
    patch = 1 + rows @ (modulator.transmission.astype(np.complex64) - np.float32(1)) @ columns.T

    known = np.ones(modulator.transmission.shape, bool) if modulator.trusted is None else modulator.trusted
    nearest = [
        np.rint((g - s[0]) / modulator.pixel_size).astype(int) for g, s in zip(grids, maps, strict=True)
    ]
    inside = [(i >= 0) & (i < m) for i, m in zip(nearest, known.shape, strict=True)]
    trusted = np.logical_and.outer(*inside)
    clipped = [np.clip(i, 0, m - 1) for i, m in zip(nearest, known.shape, strict=True)]
    trusted &= known[np.ix_(*clipped)]
    if not trusted[shape[0] // 2, shape[1] // 2]:
        raise ValueError(
            f"the beam axis misses the calibrated map: the modulator stands {moved[0] * 1e6:+.2f}, "
            f"{moved[1] * 1e6:+.2f} um (x, y) from its centre; move it back or calibrate here"
        )
    return patch.astype(np.complex64), trusted
