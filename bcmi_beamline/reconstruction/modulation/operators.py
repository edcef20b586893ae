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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from scipy.fft import next_fast_len

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.scans import Modulator, RockingScan

Shift = Sequence[float] | np.ndarray | None
"""Of a crystal, (x', y') in metres; None: it stands where it stood."""

NEIGHBOUR = 0.05
"""Weight of either neighbour in the stencil (w, 1 - 2 w, w) that integrates an intensity over square pixels.
A fringe of u cycles per pixel keeps ``1 - 2 w (1 - cos 2 pi u)`` of its contrast, within 0.012 of ``sinc(u)``
up to u = 0.3, where the light is; no weight is negative, so that no intensity becomes so."""


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

    ``k(u; s) = IFFT[exp(-i pi lambda d f^2) exp(-2 pi i f s)]`` on an array so long that light that leaves
    it on one side does not come back on the other.

    Parameters
    ----------
    pixel, wavelength, distance : float
        m.
    largest : int
        Largest distance between a point here and one there that is asked for, pixels.
    """

    def __init__(self, pixel: float, wavelength: float, distance: float, largest: int):
        spread = wavelength * distance / (2 * pixel**2)
        self._half = largest + 1
        self._f = np.fft.fftfreq(int(next_fast_len(int(2 * (largest + spread)) + 64) or 0), pixel)
        self._still = np.exp(-1j * np.pi * wavelength * distance * self._f**2)
        self._cache: dict[tuple[int, int], np.ndarray] = {}

    def line(self, shift: float = 0.0) -> np.ndarray:
        """``k(u)`` for u from ``-largest - 1`` on, complex64."""
        spectrum = self._still * np.exp(-2j * np.pi * self._f * shift) if shift else self._still
        kernel = np.fft.ifft(spectrum)
        return np.concatenate([kernel[-self._half :], kernel[: self._half]]).astype(np.complex64)

    def matrix(self, far: tuple[int, int], near: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Carry a wave at pixels `near` (consecutive) to `far` = (first, count), (count, n) complex64."""
        if shift == 0.0 and far in self._cache:
            return self._cache[far]
        first = self._half + far[0] - int(near[0])
        index = first + np.arange(far[1])[:, None] - np.arange(len(near))
        matrix = self.line(shift)[index]
        if shift == 0.0:
            self._cache[far] = matrix
        return matrix


class FrameOperator:
    """Exit wave on a window to the wave on the detector, frame by frame.

    Parameters
    ----------
    transmission : ndarray, (My, Mx), complex64
        Of the modulator where the beam falls, beam axis at ``n // 2``; taken as 1 beyond.
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
    ):
        self.window = window
        self.pixel = pixel
        self.wavelength = wavelength
        self.distance = distance
        self.detector_shape = detector_shape
        self.centres = np.asarray(centres, int)
        self.reach = reach
        self.neighbour = float(neighbour)
        self._first = self.centres - np.array(reach) // 2
        low, high = self._first.min(axis=0), (self._first + reach).max(axis=0)
        self._origin = low
        self.modulator = _window_of(transmission, low, high)
        factors = [
            np.exp(1j * np.pi * (np.arange(a, b) * p) ** 2 / (wavelength * propagation_distance))
            for a, b, p in zip(low, high, pixel, strict=True)
        ]
        self.modulator *= np.multiply.outer(*factors).astype(np.complex64)
        self.step = np.float32(1 / max(1.0, float(np.abs(self.modulator).max()) ** 2))
        self._near = [window.indices(axis) for axis in (0, 1)]
        self._kernels = []
        for axis in (0, 1):
            ends = np.array([low[axis], high[axis]])[:, None] - self._near[axis][[0, -1]]
            largest = int(np.abs(ends).max()) + 1
            self._kernels.append(FresnelKernel(pixel[axis], wavelength, distance, largest))

    def _matrices(self, frame: int, shift: Shift) -> tuple[np.ndarray, np.ndarray]:
        """(K_y, K_x) for frame `frame` of a crystal moved by `shift` (x', y') in metres."""
        x, y = (0.0, 0.0) if shift is None else shift
        first = self._first[frame]
        return (
            self._kernels[0].matrix((int(first[0]), self.reach[0]), self._near[0], -float(y)),  # rows: -y'
            self._kernels[1].matrix((int(first[1]), self.reach[1]), self._near[1], float(x)),
        )

    def patch(self, frame: int) -> np.ndarray:
        """The modulator (rows, columns) that frame `frame` meets, a view."""
        row, column = self._first[frame] - self._origin
        return self.modulator[row : row + self.reach[0], column : column + self.reach[1]]

    def patch_indices(self, frame: int, axis: int) -> np.ndarray:
        """Pixel coordinates of that patch along `axis`, 0 on the beam axis."""
        return self._first[frame, axis] + np.arange(self.reach[axis])

    def to_modulator(self, wave: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Propagate an exit wave (ny, nx) to the patch of the modulator that it meets."""
        ky, kx = self._matrices(frame, shift)
        if wave.shape[0] < wave.shape[1]:
            return ky @ (wave @ kx.T)
        return (ky @ wave) @ kx.T

    def from_modulator(self, light: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `to_modulator`: back to the exit window."""
        ky, kx = self._matrices(frame, shift)
        if ky.shape[1] < kx.shape[1]:
            return (ky.conj().T @ light) @ kx.conj()
        return ky.conj().T @ (light @ kx.conj())

    def forward(self, wave: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Wave at the middle of the pixels (Ny, Nx), zero frequency at the corner, of an exit wave (ny, nx).

        `shift` moves the crystal by (x', y') metres.
        """
        light = self.to_modulator(wave, frame, shift)
        light *= self.patch(frame)
        folded = np.zeros(self.detector_shape, np.complex64)
        for here, there in self._folds(frame):
            folded[there] += light[here]
        return fft2(folded, overwrite=True, workers=1)

    def adjoint(self, psi: np.ndarray, frame: int = 0, shift: Shift = None) -> np.ndarray:
        """Adjoint of `forward`; overwrites `psi`."""
        return self.from_modulator(self._back(psi, frame), frame, shift)

    def inverse(
        self,
        psi: np.ndarray,
        frame: int = 0,
        shift: Shift = None,
        regularisation: float = 0.05,
    ) -> np.ndarray:
        """Regularised inverse of `forward`, ``M^-1 = M* / (|M|^2 + eps)``; overwrites `psi`."""
        light = self._back(psi, frame)
        light /= np.abs(self.patch(frame)) ** 2 + np.float32(regularisation)
        return self.from_modulator(light, frame, shift)

    def _back(self, psi: np.ndarray, frame: int) -> np.ndarray:
        field = ifft2(psi, overwrite=True, workers=1)
        light = self.patch(frame).conj()
        for here, there in self._folds(frame):
            light[here] *= field[there]
        return light

    def _folds(self, frame: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Blocks of the patch of `frame` and where each falls on the detector's points, the axis at 0."""
        rows, columns = (
            list(_runs(int(first), m, n))
            for first, m, n in zip(self._first[frame], self.reach, self.detector_shape, strict=True)
        )
        for row, to_row in rows:
            for column, to_column in columns:
                yield (row, column), (to_row, to_column)

    def intensity(self, psi: np.ndarray) -> np.ndarray:
        """Counts per pixel (Ny, Nx), float32, of a wave on the detector."""
        counts = np.empty(self.detector_shape, np.float32)
        integrate_pixels(np.real(psi) ** 2 + np.imag(psi) ** 2, self.neighbour, counts)
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


def _runs(first: int, count: int, period: int) -> Iterator[tuple[slice, slice]]:
    """Cut `count` points from `first` on where they wrap: (points, where they fall within a period)."""
    done = 0
    while done < count:
        start = (first + done) % period
        run = min(period - start, count - done)
        yield slice(done, done + run), slice(start, start + run)
        done += run


_jit = numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")


@_jit
def integrate_pixels(a: np.ndarray, neighbour: float, out: np.ndarray) -> None:  # pragma: no cover
    """Convolve `a` (periodic) with the separable stencil of `NEIGHBOUR`; self-adjoint."""
    ny, nx = a.shape
    w, middle = np.float32(neighbour), np.float32(1 - 2 * neighbour)
    line = np.empty(nx + 2, np.float32)
    for r in range(ny):
        above, below = a[(r - 1) % ny], a[(r + 1) % ny]
        for c in range(nx):
            line[c + 1] = middle * a[r, c] + w * (above[c] + below[c])
        line[0], line[nx + 1] = line[nx], line[1]
        for c in range(nx):
            out[r, c] = middle * line[c + 1] + w * (line[c] + line[c + 2])


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

    def matrix(self, n_zeta: int) -> np.ndarray:
        """``exp(-i kappa_j zeta) / sqrt(J)``, (J, n_zeta), complex64."""
        phase = np.multiply.outer(self.kappa, self.zeta(n_zeta))
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
