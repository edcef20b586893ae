"""Free space between crystal, modulator and detector, by quadrature in direct space.

Fresnel integrals are written out as matrices, one per transverse direction, from the crystal's own grid to
the points where the wave is wanted. Nothing is periodic, so nothing wraps, whatever the distance. A matrix
product costs little because the crystal is small.

Coordinates along rows and columns are both "row sense": they grow with the index (columns to +x', rows
to -y').
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import fft


def fresnel_matrix(target: np.ndarray, source: np.ndarray, wavelength: float, distance: float) -> np.ndarray:
    """One-dimensional Fresnel integral over `source` points as a matrix.

    ``K(X, x) = exp(i pi (X - x)^2 / (lambda d)) h / sqrt(lambda d)``, the paraxial kernel of
    ``exp(+ikz)`` waves without its constant phase; `h` is the spacing of the source.

    Parameters
    ----------
    target, source : ndarray, (N,), (n,)
        Coordinates, m; `source` equally spaced.
    wavelength, distance : float
        m.

    Returns
    -------
    ndarray, (N, n), complex64
        Zero where the source is too coarse for the angle, that is ``|X - x| > lambda d / (2 h)``: from there
        on the replicas of a sampled source would appear instead of the source.
    """
    h = source[1] - source[0]
    offset = target[:, None] - source[None, :]
    kernel = np.exp(1j * np.pi / (wavelength * distance) * offset**2) * (h / np.sqrt(wavelength * distance))
    kernel[np.abs(offset) > wavelength * distance / (2 * abs(h))] = 0
    return kernel.astype(np.complex64)


def centred(n: int, step: float) -> np.ndarray:
    """Coordinates of `n` points `step` apart with the origin at index ``n // 2``."""
    return (np.arange(n) - n // 2) * step


@dataclass(frozen=True)
class DetectorWindow:
    """The patch of the detector that a frame is computed on, finer than its pixels.

    Parameters
    ----------
    pixels : int
        Detector pixels along an edge, even.
    oversampling : int
        Points per pixel along an edge; their intensities are added up to the pixel.
    shift : tuple of float
        (row, column) by which the beam misses the centre of pixel ``pixels // 2``, pixels.
    wavelength, distance, pixel_size : float
        Wavelength, last plane to detector, detector pixel; m.
    """

    pixels: int
    oversampling: int
    shift: tuple[float, float]
    wavelength: float
    distance: float
    pixel_size: float

    @property
    def field(self) -> float:
        """Width of the plane that this window is the far field of, m."""
        return self.oversampling * self.wavelength * self.distance / self.pixel_size

    @property
    def samples(self) -> int:
        """Points along an edge."""
        return self.pixels * self.oversampling

    @property
    def step(self) -> float:
        """Spacing of points in the plane before the detector, m."""
        return self.field / self.samples

    @cached_property
    def _offsets(self) -> tuple[float, float]:
        """(row, column), m, from the beam to the point at index ``samples // 2``.

        The points of a pixel lie evenly about its centre, so half a pixel less half a point before it.
        """
        inner = (self.oversampling - 1) / (2 * self.oversampling)
        row, column = self.shift
        return (-inner - row) * self.pixel_size, (-inner - column) * self.pixel_size

    def arrival(
        self, rows: np.ndarray, columns: np.ndarray, distance: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Matrices that carry a source to the plane before the detector, ready for `intensity`.

        Besides the Fresnel integral they hold the curvature of the way on to the detector, the sub-pixel
        position of the beam, and the alternating sign that puts the beam at the centre of the transform.
        Light that leaves the source at angles beyond the window is cut off, softly over one Fresnel zone,
        so that it neither folds back nor rings.

        Parameters
        ----------
        rows, columns : ndarray, (ny,), (nx,)
            Coordinates of the source in row sense, m.
        distance : float
            Source to plane, m.

        Returns
        -------
        coordinates : ndarray, (n,)
            Of the plane, along rows and columns alike, m; n is odd.
        to_rows : ndarray, (n, ny), complex64
        to_columns : ndarray, (nx, n), complex64
            The wave is ``to_rows @ source @ to_columns``.
        """
        spread = distance * self.wavelength / (2 * self.step)
        reach = spread + max(np.abs(rows).max(), np.abs(columns).max())
        points = min(2 * int(reach / self.step) + 1, self.samples - 1)
        x = centred(points, self.step)
        softness = np.sqrt(self.wavelength * distance)
        inward = np.clip((x[-1] + self.step - np.abs(x)) / softness, 0, 1)
        per_metre = 2j * np.pi / (self.wavelength * self.distance)
        common = np.exp(per_metre / 2 * x**2) * np.sin(np.pi / 2 * inward) ** 2
        common = common * (1 - 2 * (np.arange(points) % 2))
        carried = [
            fresnel_matrix(x, source, self.wavelength, distance)
            * (common * np.exp(-per_metre * offset * x))[:, None]
            for offset, source in zip(self._offsets, (rows, columns), strict=True)
        ]
        return x, carried[0].astype(np.complex64), carried[1].T.astype(np.complex64)

    def intensity(self, wave: np.ndarray) -> np.ndarray:
        """Photons per pixel of a wave made by `arrival`, whatever it met in that plane.

        Parameters
        ----------
        wave : ndarray, (ny, nx), complex64
            ``sum |wave|^2 step^2`` is the number of photons; any shape up to (samples, samples).

        Returns
        -------
        ndarray, (pixels, pixels), float32
        """
        half = fft.fft(wave, self.samples, axis=0)
        full = np.asarray(fft.fft(half, self.samples, axis=1, overwrite_x=True))
        return self._bin(full) * np.float32((self.step / self.samples) ** 2)

    def intensity_of_source(self, source: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Photons per pixel of a small `source` at arbitrary equally spaced coordinates, m.

        Parameters
        ----------
        source : ndarray, (ny, nx), complex64
            Wave; ``sum |source|^2 h^2`` is the number of photons.
        rows, columns : ndarray, (ny,), (nx,)
            Coordinates in row sense, m.

        Returns
        -------
        ndarray, (pixels, pixels), float32
        """
        pitch = self.pixel_size / self.oversampling
        points = centred(self.samples, pitch)
        matrices = []
        for offset, x in zip(self._offsets, (rows, columns), strict=True):
            phase = x[None, :] ** 2 / 2 - (points + offset)[:, None] * x[None, :]
            matrices.append(np.exp(2j * np.pi / (self.wavelength * self.distance) * phase))
        wave = matrices[0].astype(np.complex64) @ source @ matrices[1].astype(np.complex64).T
        cell = (rows[1] - rows[0]) * (columns[1] - columns[0])
        return self._bin(wave) * np.float32((cell * pitch / (self.wavelength * self.distance)) ** 2)

    def _bin(self, wave: np.ndarray) -> np.ndarray:
        """Add the intensity of every pixel's points."""
        m = self.oversampling
        intensity = np.real(wave) ** 2
        intensity += np.imag(wave) ** 2
        rows = np.add.reduce([intensity[i::m] for i in range(m)])
        return np.add.reduce([rows[:, i::m] for i in range(m)])
