"""From a crystal's exit wave through the modulator to the detector, and back.

One frame of Bragg coherent modulation imaging (J. Zhao et al., Phys. Rev. Lett. (2025), End Matter B) is

    psi_j = FFT2[ M . (K_y P_j K_x^T) ],        P_j = sum_zeta rho exp(-i kappa_j zeta).

The exit wave P_j fills a small window, so that the Fresnel step over d1 is two small matrix products
rather than two transforms, and the matrices carry the drift of the crystal: a frame costs one FFT
forward and one back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.scans import Modulator, RockingScan


@dataclass(frozen=True)
class Window:
    """Where the exit wave may be: `shape` pixels about a point `centre` off the axis (rows, columns)."""

    shape: tuple[int, int]
    centre: tuple[int, int] = (0, 0)

    def indices(self, axis: int) -> np.ndarray:
        """Pixel coordinates along `axis` (0: rows, to -y'; 1: columns, to +x'), 0 on the beam axis."""
        n = self.shape[axis]
        return np.arange(n) - n // 2 + self.centre[axis]


def fresnel_matrix(
    n_out: int, indices: np.ndarray, pixel: float, wavelength: float, distance: float, shift: float = 0.0
) -> np.ndarray:
    """Near-field propagation along one axis as a matrix, with the wave moved by `shift` metres first.

    ``k(u; s) = IFFT[exp(-i pi lambda d f^2) exp(-2 pi i f s)]`` on twice `n_out` points, so that light
    that leaves the array on one side does not come back on the other.

    Parameters
    ----------
    n_out : int
        Points at the far plane, origin at the corner.
    indices : ndarray, (n,)
        Pixel coordinates at the near plane.
    pixel, wavelength, distance, shift : float
        m.

    Returns
    -------
    ndarray, (n_out, n), complex64
    """
    f = np.fft.fftfreq(2 * n_out, pixel)
    kernel = np.fft.ifft(np.exp(-1j * np.pi * f * (wavelength * distance * f + 2 * shift)))
    far = np.fft.fftfreq(n_out, 1 / n_out).astype(int)
    return kernel[(far[:, None] - indices) % (2 * n_out)].astype(np.complex64)


class FrameOperator:
    """Exit wave on a window to the wave on the detector, for any number of frames at once.

    Parameters
    ----------
    modulator : ndarray, (V Ny, V Nx), complex64
        Transmission where the beam falls, beam axis at the corner; V is `oversampling`.
    window : Window
    pixel : (y, x)
        Of object and modulator planes, m.
    wavelength, distance, propagation_distance : float
        Wavelength, crystal to modulator, modulator to detector, m. The last enters as the small curvature
        of the wave over the modulator.
    oversampling : int
        Detector samples per pixel and axis. 2 makes the field at the modulator twice as wide, for beams
        that spread beyond ``lambda d2 / p``, and lets the model integrate over the pixel.
    """

    def __init__(
        self,
        modulator: np.ndarray,
        window: Window,
        pixel: tuple[float, float],
        wavelength: float,
        distance: float,
        propagation_distance: float,
        oversampling: int = 1,
    ):
        self.window = window
        self.pixel = pixel
        self.wavelength = wavelength
        self.distance = distance
        self.oversampling = oversampling
        self.step = np.float32(1 / max(1.0, float(np.abs(modulator).max()) ** 2))
        # Detector samples of one pixel lie about its centre: half a fine sample off the FFT's grid.
        offset = (oversampling - 1) / 2
        factors = []
        for n, p in zip(modulator.shape, pixel, strict=True):
            f = np.fft.fftfreq(n)
            sphere = np.pi * (n * p * f) ** 2 / (wavelength * propagation_distance)
            factors.append(np.exp(1j * (sphere + 2 * np.pi * offset * f)))
        self.modulator = (modulator * np.multiply.outer(*factors)).astype(np.complex64)

    @property
    def detector_shape(self) -> tuple[int, int]:
        """Pixels (rows, columns) of the measured window."""
        ny, nx = self.modulator.shape
        return ny // self.oversampling, nx // self.oversampling

    def kernels(self, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
        """Matrices (K_y, K_x) for a crystal moved by `shift` (x', y') in metres."""
        (ny, nx), (py, px) = self.modulator.shape, self.pixel
        rest = self.wavelength, self.distance
        return (
            fresnel_matrix(ny, self.window.indices(0), py, *rest, shift=-shift[1]),  # rows run to -y'
            fresnel_matrix(nx, self.window.indices(1), px, *rest, shift=shift[0]),
        )

    @cached_property
    def _still(self) -> tuple[np.ndarray, np.ndarray]:
        return self.kernels()

    def _matrices(self, shifts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if shifts is None:
            return self._still
        pairs = [self.kernels((x, y)) for x, y in shifts]
        return np.stack([k for k, _ in pairs]), np.stack([k for _, k in pairs])

    def to_modulator(self, waves: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
        """Propagate exit waves (..., ny, nx) to the modulator, beam axis at the corner."""
        ky, kx = self._matrices(shifts)
        return ky @ waves @ kx.swapaxes(-1, -2)

    def from_modulator(self, waves: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
        """Adjoint of `to_modulator`: back to the exit window."""
        ky, kx = self._matrices(shifts)
        return ky.conj().swapaxes(-1, -2) @ waves @ kx.conj()

    def forward(self, waves: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
        """Waves on the detector (..., V Ny, V Nx), zero frequency at the corner, of exit waves (..., ny, nx).

        `shifts` (frames, 2) moves the crystal by (x', y') metres frame by frame.
        """
        there = self.to_modulator(waves, shifts)
        there *= self.modulator
        return fft2(there, overwrite=True)

    def adjoint(self, psi: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
        """Adjoint of `forward`; overwrites `psi`."""
        there = ifft2(psi, overwrite=True)
        there *= self.modulator.conj()
        return self.from_modulator(there, shifts)

    def inverse(
        self, psi: np.ndarray, shifts: np.ndarray | None = None, regularisation: float = 0.05
    ) -> np.ndarray:
        """Regularised inverse of `forward`, ``M^-1 = M* / (|M|^2 + eps)``; overwrites `psi`."""
        there = ifft2(psi, overwrite=True)
        there *= self.modulator.conj() / (np.abs(self.modulator) ** 2 + np.float32(regularisation))
        return self.from_modulator(there, shifts)

    def intensity(self, psi: np.ndarray) -> np.ndarray:
        """Counts per pixel (..., Ny, Nx) of waves on the detector."""
        counts = np.real(psi) ** 2 + np.imag(psi) ** 2
        v = self.oversampling
        if v == 1:
            return counts
        ny, nx = self.detector_shape
        return counts.reshape(*counts.shape[:-2], ny, v, nx, v).sum(axis=(-3, -1))


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
        Of the grid wanted.

    Returns
    -------
    transmission : ndarray, complex64
        Beam axis at the corner; 1 outside the map.
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
        grids.append(np.fft.fftfreq(n, 1 / n) * p - shift)
        maps.append((np.arange(m) - m // 2) * modulator.pixel_size)
    rows, columns = (_resample(grid, source) for grid, source in zip(grids, maps, strict=True))
    patch = 1 + rows @ (modulator.transmission - 1) @ columns.T

    known = np.ones(modulator.transmission.shape, bool) if modulator.trusted is None else modulator.trusted
    nearest = [
        np.rint((g - s[0]) / modulator.pixel_size).astype(int) for g, s in zip(grids, maps, strict=True)
    ]
    inside = [(i >= 0) & (i < m) for i, m in zip(nearest, known.shape, strict=True)]
    trusted = np.logical_and.outer(*inside)
    clipped = [np.clip(i, 0, m - 1) for i, m in zip(nearest, known.shape, strict=True)]
    trusted &= known[np.ix_(*clipped)]
    if not trusted[0, 0]:
        raise ValueError(
            f"the beam axis misses the calibrated map: the modulator stands {moved[0] * 1e6:+.2f}, "
            f"{moved[1] * 1e6:+.2f} um (x, y) from its centre; move it back or calibrate here"
        )
    return patch.astype(np.complex64), trusted


def _resample(grid: np.ndarray, source: np.ndarray) -> np.ndarray:
    """`sinc_matrix` for a corner-origin `grid`; the spacing of the grid is between its first two points."""
    step = grid[1] - grid[0]
    ordered = np.argsort(grid)
    matrix = np.empty((len(grid), len(source)))
    matrix[ordered] = sinc_matrix(grid[0] + step * (np.arange(len(grid)) - len(grid) // 2), source)
    return matrix
