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
"""Rows from which one between them is interpolated; two rows a period leave an error of 0.1 to 0.2 %."""

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


class SlowRows:
    """Rows of a near field between those that are computed, once its fast phase is taken off.

    A wave that leaves a window of n pixels and travels d is, but for ``exp(i pi y^2 / lambda d)``,
    band-limited to ``n p / lambda d``: every `step`-th row tells the others, by the best linear prediction
    from `TAPS` rows.

    Parameters
    ----------
    window : int
        Rows of the window that the wave leaves.
    fresnel : float
        ``lambda d / p^2``.
    count : int
        Rows wanted.
    """

    def __init__(self, window: int, fresnel: float, count: int):
        self.step = max(1, int(fresnel / (2 * window)))
        at = (np.arange(TAPS) - (TAPS // 2 - 1)) * self.step
        if self.step == 1:  # the near field is as fine as the wave: every row is computed
            self.taps = (at == 0).astype(np.float32)[None]
        else:
            system = np.sinc(np.subtract.outer(at, at) * window / fresnel) + 1e-6 * np.eye(TAPS)
            wanted = np.sinc(np.subtract.outer(at, np.arange(self.step)) * window / fresnel)
            self.taps = np.ascontiguousarray(np.linalg.solve(system, wanted).T, dtype=np.float32)
        self.count = -(-count // self.step) + TAPS - 1
        """Rows to be computed."""
        self.before = -int(at[0])
        """How far the first of them lies before the first row wanted."""


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
        self._rows = SlowRows(window.shape[0], wavelength * distance / pixel[0] ** 2, reach[0])
        if self._rows.step > 1:
            factors[0] *= self._fast_phase(np.arange(low[0], high[0]))
        film *= np.multiply.outer(*factors).astype(np.complex64)
        self.modulator, self._unit = in_whole_numbers(film)
        self._extent = film.shape
        self._kernels = []
        for axis in (0, 1):
            middle = self.centres[:, axis] - self._walk[:, axis] - window.centre[axis]
            largest = (reach[axis] + window.shape[axis]) // 2 + 2 + int(np.abs(middle).max())
            largest += self._rows.step * TAPS if axis == 0 else 0
            self._kernels.append(FresnelKernel(pixel[axis], wavelength, distance, largest))

    def for_frames(self, walk: np.ndarray) -> FrameOperator:
        """The same optics for other frames, whose light walks by `walk` (J, 2) pixels (rows, columns).

        Raises
        ------
        ValueError
            Where they leave the part of the modulator that is kept.
        """
        other = copy(self)
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

    def _fast_phase(self, rows: np.ndarray) -> np.ndarray:
        """``exp(i pi y^2 / lambda d)``, y from the middle of the window: what `SlowRows` wants taken off."""
        y = (rows - float(self._near[0].mean())) * self.pixel[0]
        return np.exp(1j * np.pi * y**2 / (self.wavelength * self.distance)).astype(np.complex64)

    def _matrices(self, frame: int, shift: Shift) -> tuple[np.ndarray, np.ndarray]:
        """(K_y, K_x) for frame `frame` of a crystal moved by `shift` (x', y') in metres; few rows of K_y."""
        x, y = (0.0, 0.0) if shift is None else shift
        rows = self._rows
        far = int(self._first[frame, 0]) - rows.before, rows.count, rows.step
        slow = None
        if rows.step > 1:
            slow = self._fast_phase(far[0] + rows.step * np.arange(rows.count)).conj()
        walk = self._walk[frame]
        lines = int(self._first[frame, 1]), self.reach[1], 1
        return (
            self._kernels[0].matrix(far, self._near[0], int(walk[0]), -float(y), slow),  # rows: -y'
            self._kernels[1].matrix(lines, self._near[1], int(walk[1]), float(x)),
        )

    def _place(self, frame: int) -> tuple[int, int, int, int]:
        """Corner of the patch of `frame`: in the modulator's array, and from the axis."""
        first, origin = self._first[frame], self._origin
        return int(first[0] - origin[0]), int(first[1] - origin[1]), int(first[0]), int(first[1])

    def patch_indices(self, frame: int, axis: int) -> np.ndarray:
        """Pixel coordinates of the patch of `frame` along `axis`, 0 on the beam axis."""
        return self._first[frame, axis] + np.arange(self.reach[axis])

    def to_modulator(self, wave: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Propagate an exit wave (ny, nx) to the patch of the modulator that it meets."""
        light = self._all_rows() @ self._few_rows(wave, frame, shift)
        return (
            light * self._fast_phase(self.patch_indices(frame, 0))[:, None] if self._rows.step > 1 else light
        )

    def rows_before(self, wave: np.ndarray, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Intensity before the modulator on those rows of the patch that are computed.

        Their pixel coordinates (m,), 0 on the beam axis, and the intensity (m, columns).
        """
        rows = self._first[frame, 0] - self._rows.before + self._rows.step * np.arange(self._rows.count)
        inside = (rows >= self._first[frame, 0]) & (rows < self._first[frame, 0] + self.reach[0])
        light = self._few_rows(wave, frame, None)[inside]
        return rows[inside], np.real(light) ** 2 + np.imag(light) ** 2

    def from_modulator(self, light: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `to_modulator`: back to the exit window."""
        if self._rows.step > 1:
            light = light * self._fast_phase(self.patch_indices(frame, 0)).conj()[:, None]
        return self._from_few_rows(self._all_rows().T @ light, frame, shift)

    def _all_rows(self) -> np.ndarray:
        """`SlowRows` as a matrix (rows wanted, rows computed)."""
        step, taps = self._rows.step, self._rows.taps
        matrix = np.zeros((self.reach[0], self._rows.count), np.float32)
        row = np.arange(self.reach[0])
        for t in range(taps.shape[1]):
            matrix[row, row // step + t] = taps[row % step, t]
        return matrix

    def _few_rows(self, wave: np.ndarray, frame: int, shift: Shift) -> np.ndarray:
        ky, kx = self._matrices(frame, shift)
        return (ky @ wave) @ kx.T

    def _from_few_rows(self, rows: np.ndarray, frame: int, shift: Shift) -> np.ndarray:
        ky, kx = self._matrices(frame, shift)
        return ky.conj().T @ (rows @ kx.conj())

    def forward(
        self, wave: np.ndarray, frame: int = 0, shift: Shift = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Wave at the middle of the pixels (Ny, Nx), zero frequency at the corner, of an exit wave (ny, nx).

        `shift` moves the crystal by (x', y') metres; the wave is written to `out` where there is one.
        """
        psi = np.empty(self.detector_shape, np.complex64) if out is None else out
        rows, taps = self._few_rows(wave, frame, shift), self._unit * self._rows.taps
        fold_light(rows, taps, self.modulator, self._place(frame), self.reach[0], psi)
        for lit in self._lit_rows(frame):
            transform_lines(psi[lit], 1)
        return transform_lines(psi, 0)

    def adjoint(self, psi: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `forward`; overwrites `psi`."""
        return self._from_few_rows(self._back(psi, frame, -1.0), frame, shift)

    def inverse(
        self,
        psi: np.ndarray,
        frame: int = 0,
        shift: Shift = None,
        regularisation: float = 0.05,
    ) -> np.ndarray:
        """Regularised inverse of `forward`, ``M^-1 = M* / (|M|^2 + eps)``; overwrites `psi`."""
        return self._from_few_rows(self._back(psi, frame, regularisation), frame, shift)

    def _back(self, psi: np.ndarray, frame: int, regularisation: float) -> np.ndarray:
        transform_lines(psi, 0, forward=False)
        for lit in self._lit_rows(frame):
            transform_lines(psi[lit], 1, forward=False)
        rows = np.zeros((self._rows.count, self.reach[1]), np.complex64)
        unit, least = self._unit, regularisation / self._unit**2
        taps = self._rows.taps * unit if least < 0 else self._rows.taps / unit  # M*, or M* / |M|^2
        unfold_light(psi, taps, self.modulator, self._place(frame), self.reach[0], least, rows)
        return rows

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
def fold_light(
    rows: np.ndarray,
    taps: np.ndarray,
    modulator: np.ndarray,
    place: tuple[int, int, int, int],
    count: int,
    out: np.ndarray,
) -> None:  # pragma: no cover
    """Light before the modulator, from the `rows` computed, through it and folded onto the detector's points.

    Parameters
    ----------
    rows : ndarray, (m, C), complex64
    taps : ndarray, (step, TAPS), float32
        Of `SlowRows`, times the unit of `modulator`.
    modulator : ndarray, (My, 2 Mx), int16
        With the fast phase of the light, real and imaginary parts side by side.
    place : (row, column, row, column)
        Corner of the patch in `modulator`, and from the beam axis.
    count : int
        Rows of the patch.
    out : ndarray, (Ny, Nx), complex64
        Overwritten.
    """
    ny, nx = out.shape
    columns = rows.shape[1]
    source = rows.view(np.float32)
    buffer = np.empty(columns, np.complex64)
    line = buffer.view(np.float32)
    out[:] = 0
    for row in range(count):
        near, w = row // len(taps), taps[row % len(taps)]
        a, b, c = source[near], source[near + 1], source[near + 2]
        d, e, f = source[near + 3], source[near + 4], source[near + 5]
        for i in range(2 * columns):  # written out, so that the line is stored once
            line[i] = w[0] * a[i] + w[1] * b[i] + w[2] * c[i] + w[3] * d[i] + w[4] * e[i] + w[5] * f[i]
        film = modulator[place[0] + row, 2 * place[1] :]
        target = out[(place[2] + row) % ny]
        done, at = 0, place[3] % nx
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
    taps: np.ndarray,
    modulator: np.ndarray,
    place: tuple[int, int, int, int],
    count: int,
    least: float,
    rows: np.ndarray,
) -> None:  # pragma: no cover
    """Adjoint of `fold_light`, added to `rows`; over ``|M|^2 + least`` where that is not < 0.

    M as the whole numbers of `modulator`.
    """
    ny, nx = field.shape
    columns, steps = rows.shape[1], len(taps)
    target = rows.view(np.float32)
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
