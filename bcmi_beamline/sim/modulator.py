"""The simulated modulator: a tungsten pattern on a membrane, where it stands, and what it transmits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xraydb
from scipy import ndimage
from scipy.fft import next_fast_len

from bcmi_beamline.config import ModulatorSettings
from bcmi_beamline.geometry import rotation_matrix, wavelength_from_energy

MAP_PIXEL = 10e-9
"""Pixel of the thickness map, m."""

WALL_WIDTH = 12e-9
"""Standard deviation of the thickness across a side wall, m: 1.5 um of etched tungsten is never upright."""

FRAME_OUTER = 1.5e-3
"""Half width of the silicon chip that holds the membrane, m: opaque up to here, air beyond."""

TILE_MARGIN = 3.2e-6
"""What a tile of the map keeps around the beam, so that a scan does not need a new one at every point, m."""

_LEVELS = 4096
_SQUARE = 0.1
"""Pixels of the map by which rows and columns may lean over the lit field and still count as upright."""


@dataclass(frozen=True)
class Placement:
    """How membrane coordinates follow from positions across the beam.

    ``(u, v) = matrix @ ((X, Y) - origin)``, all in row sense (first x' and u, then -y' and -v).

    Parameters
    ----------
    matrix : ndarray, (2, 2)
    origin : ndarray, (2,)
        Where the membrane's own origin stands, m.
    slope : ndarray, (2,)
        Lateral travel of the beam in the membrane per thickness, ``tan`` of the tilts, in (u, -v).
    cosine : float
        Of the angle between the beam and the membrane's normal.
    distance : float
        Crystal to membrane along the beam axis, m.
    """

    matrix: np.ndarray
    origin: np.ndarray
    slope: np.ndarray
    cosine: float
    distance: float

    @classmethod
    def of(cls, base: np.ndarray, u: np.ndarray, v: np.ndarray) -> Placement:
        """From the membrane's origin (m) and axes (unit vectors), all in the detector frame (x', y', z')."""
        flip = np.array([1.0, -1.0])
        columns = np.column_stack([u[:2] * flip, -v[:2] * flip])
        origin = base[:2] * flip
        matrix = np.linalg.inv(columns)
        along = np.array([u[2], -v[2]])
        cosine = abs(float(np.cross(u, v)[2]))
        on_axis = matrix @ -origin
        return cls(matrix, origin, along / cosine, cosine, float(base[2] + along @ on_axis))

    def corners(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Membrane coordinates of the four corners of the area spanned by `x` and `y`, (2, 4)."""
        square = np.array([[x[0], x[0], x[-1], x[-1]], [y[0], y[-1], y[0], y[-1]]])
        return self.matrix @ (square - self.origin[:, None])


def grow_pattern(settings: ModulatorSettings) -> np.ndarray:
    """Thickness map of the patterned field as a fraction of the film, uint8 (255: full), square.

    A level band of band-limited noise: tungsten stands where ``|noise|`` is below a threshold. Level bands
    about zero hang together as one network at any coverage, where the usual one-sided threshold falls apart
    into islands below 50 %; the few islands left over are removed.

    Parameters
    ----------
    settings : ModulatorSettings

    Returns
    -------
    ndarray, (n, n), uint8
        Rows run to -y', the field's centre at ``n // 2``, `MAP_PIXEL` per pixel.
    """
    rng = np.random.default_rng(settings.seed)
    n = _fast_length(settings.extent_um * 1e-6 / MAP_PIXEL)
    noise = _band_limited_noise(n, MAP_PIXEL, 1 / (4 * settings.feature_nm * 1e-9), rng)
    distance = np.abs(noise)
    level = np.quantile(distance[::7, ::7], settings.coverage)
    for _ in range(3):
        film = largest_piece(distance < level)
        level *= 1 + (settings.coverage - film.mean()) / settings.coverage
    film = distance < level
    if settings.fiducial_um:
        _draw_fiducial(film, settings.fiducial_um * 1e-6)
    film = largest_piece(film)
    soft = ndimage.gaussian_filter(film.astype(np.float32), WALL_WIDTH / MAP_PIXEL, truncate=3)
    return np.rint(255 * soft).astype(np.uint8)


def _draw_fiducial(film: np.ndarray, edge: float) -> None:
    """Put a letter F in a bare window of this `edge`, m, at +x, +y of the field.

    An F tells left from right and up from down. Its stem reaches into the pattern above and below, so that it
    does not come off.
    """
    n = film.shape[0]
    size = min(round(edge / MAP_PIXEL), n // 10)
    row, column = round(0.15 * n) - size // 2, round(0.85 * n) - size // 2
    film[row : row + size, column : column + size] = False
    bar = max(size // 8, 1)
    stem = column + size // 4
    film[row - size // 4 : row + size + size // 4, stem : stem + bar] = True
    film[row + bar : row + 2 * bar, stem : stem + size // 2] = True
    film[row + 3 * bar : row + 4 * bar, stem : stem + size // 3] = True


def largest_piece(film: np.ndarray) -> np.ndarray:
    """The largest connected piece of a bool array (neighbours share an edge)."""
    labels, _ = ndimage.label(film)  # pyright: ignore[reportGeneralTypeIssues]
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax()


def _fast_length(n: float) -> int:
    """The next length that a real transform is fast at."""
    return int(next_fast_len(round(n), real=True))  # pyright: ignore[reportArgumentType]


def _band_limited_noise(n: int, pixel: float, frequency: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of spatial frequencies within a third of `frequency`, float32 (n, n), unit variance."""
    fy, fx = np.fft.fftfreq(n, pixel)[:, None], np.fft.rfftfreq(n, pixel)[None, :]
    radius = np.hypot(fy, fx)
    band = np.nonzero(np.abs(radius / frequency - 1) < 1 / 3)
    spectrum = np.zeros(radius.shape, np.complex64)
    spectrum[band] = rng.normal(size=(len(band[0]), 2)) @ [1, 1j]
    noise = np.fft.irfft2(spectrum, (n, n))
    return noise / noise.std()


class ModulatorChip:
    """The chip: patterned field, bare membrane around it, silicon frame, free air.

    Parameters
    ----------
    settings : ModulatorSettings
    energy_ev : float
    """

    def __init__(self, settings: ModulatorSettings, energy_ev: float) -> None:
        self.thickness = settings.thickness_um * 1e-6
        self.membrane_half = settings.membrane_um * 1e-6 / 2
        if self.membrane_half >= FRAME_OUTER:
            raise ValueError(
                f"modulator.membrane_um = {settings.membrane_um:g} does not fit on a chip "
                f"{2e6 * FRAME_OUTER:.0f} um wide"
            )
        self._settings = settings
        self._energy_ev = energy_ev
        self._exponents: dict[float, complex] = {}
        self._tile: _Tile | None = None

    def exponent(self, energy_ev: float | None = None) -> complex:
        """Logarithm of the transmission per metre of film, at the chip's own energy unless told."""
        energy_ev = self._energy_ev if energy_ev is None else energy_ev
        if energy_ev not in self._exponents:
            delta, beta, _ = xraydb.xray_delta_beta(
                self._settings.material, self._settings.density, energy_ev
            )
            self._exponents = {
                energy_ev: -2 * np.pi / wavelength_from_energy(energy_ev) * (1j * delta + beta)
            }
        return self._exponents[energy_ev]

    @cached_property
    def pattern(self) -> np.ndarray:
        """Thickness map, uint8 (n, n); see `grow_pattern`."""
        return grow_pattern(self._settings)

    @property
    def field_half(self) -> float:
        """Half width of the patterned field, m."""
        return self.pattern.shape[0] * MAP_PIXEL / 2

    def is_clear(self, placement: Placement, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether the chip stands beside the beam, so that nothing of it meets the area of `x` and `y`."""
        corners = placement.corners(x, y)
        return bool((corners.min(axis=1) > FRAME_OUTER).any() or (corners.max(axis=1) < -FRAME_OUTER).any())

    def transmission(
        self, placement: Placement, x: np.ndarray, y: np.ndarray, energy_ev: float | None = None
    ) -> np.ndarray | None:
        """Complex transmission at the beam's coordinates, bare membrane 1.

        Parameters
        ----------
        placement : Placement
        x, y : ndarray, (nx,), (ny,)
            Coordinates in row sense, m, equally spaced.
        energy_ev : float, optional
            The chip's own unless told.

        Returns
        -------
        ndarray, (ny, nx), complex64, or None
            None where the frame stops everything.
        """
        corners = placement.corners(x, y)
        low, high = corners.min(axis=1), corners.max(axis=1)
        transmission = self._film(placement, x, y, low, high, energy_ev)
        if max(-low.min(), high.max()) > self.membrane_half - abs(x[1] - x[0]):
            window = self._aperture(placement, x, y)
            if not window.any():
                return None
            transmission *= window
        return transmission

    def _film(
        self,
        placement: Placement,
        x: np.ndarray,
        y: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        energy_ev: float | None,
    ) -> np.ndarray:
        if (low > self.field_half).any() or (high < -self.field_half).any():
            return np.ones((len(y), len(x)), np.complex64)
        smear = placement.slope * self.thickness
        tile = self._tile
        if tile is None or not tile.serves(smear, low, high):
            tile = self._tile = _Tile.cut(self.pattern, smear, low - TILE_MARGIN, high + TILE_MARGIN)
        path = np.linspace(0, self.thickness / placement.cosine, _LEVELS + 1)
        table = np.exp(self.exponent(energy_ev) * path).astype(np.complex64)
        # linear interpolation stays between its points, so no level lies outside the table
        return table.take(tile.sample(placement, x, y).astype(np.intp))

    def _aperture(self, placement: Placement, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Silicon frame: amplitude 0 on it, 1 elsewhere, edges one sample wide; float32 (ny, nx)."""
        sx, sy = x[None, :] - placement.origin[0], y[:, None] - placement.origin[1]
        (a, b), (c, d) = placement.matrix
        radius = np.maximum(np.abs(a * sx + b * sy), np.abs(c * sx + d * sy))
        step = abs(x[1] - x[0])
        inside = np.clip((self.membrane_half - radius) / step + 0.5, 0, 1)
        outside = np.clip((radius - FRAME_OUTER) / step + 0.5, 0, 1)
        return (inside + outside).astype(np.float32)


@dataclass(frozen=True)
class _Tile:
    """A part of the thickness map with the smear of one tilt."""

    level: np.ndarray
    """Thickness as an index of the table of transmissions, plus 1/2 to round by truncation; float32."""
    origin: np.ndarray
    """Membrane coordinates (u, -v) of element (0, 0), m."""
    low: np.ndarray
    high: np.ndarray
    smear: np.ndarray

    @classmethod
    def cut(cls, pattern: np.ndarray, smear: np.ndarray, low: np.ndarray, high: np.ndarray) -> _Tile:
        """Cut [low, high] out of the map (bare outside it) and smear it along the vector `smear`, m.

        Side walls stand along the membrane's normal: seen at a tilt their edge is a line of the length
        ``thickness tan(tilt)``. The convolution with that line is exact in Fourier space.
        """
        n = pattern.shape[0]
        guard = np.ceil(np.abs(smear) / MAP_PIXEL).astype(int) + 2
        first = np.floor(low / MAP_PIXEL).astype(int) + n // 2 - guard
        stop = np.ceil(high / MAP_PIXEL).astype(int) + n // 2 + guard + 1
        shape = (_fast_length(stop[1] - first[1]), _fast_length(stop[0] - first[0]))
        fraction = np.zeros(shape, np.float32)
        begin = np.clip(first, 0, n)
        end = np.clip(first + np.array(shape[::-1]), 0, n)
        patch = pattern[begin[1] : end[1], begin[0] : end[0]]
        row, column = (begin - first)[::-1]
        fraction[row : row + patch.shape[0], column : column + patch.shape[1]] = patch
        fraction /= 255
        if np.linalg.norm(smear) > 1e-10:
            along = np.fft.fftfreq(shape[0], MAP_PIXEL)[:, None] * smear[1]
            along = along + np.fft.rfftfreq(shape[1], MAP_PIXEL)[None, :] * smear[0]
            spectrum = np.fft.rfft2(fraction) * np.sinc(along.astype(np.float32))
            fraction = np.fft.irfft2(spectrum, shape)
        level = np.clip(fraction * np.float32(_LEVELS) + np.float32(0.5), 0.5, _LEVELS + 0.5)
        return cls(level, (first - n // 2) * MAP_PIXEL, low, high, smear.copy())

    def serves(self, smear: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
        """Whether this tile has that tilt (to 0.1 nm of smear) and covers [low, high]."""
        same = np.abs(smear - self.smear).max() < 1e-10
        return bool(same and (low >= self.low).all() and (high <= self.high).all())

    def sample(self, placement: Placement, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Level at the beam's coordinates by linear interpolation, float32 (ny, nx)."""
        step = x[1] - x[0]
        start = np.array([x[0], y[0]]) - placement.origin
        offset = (placement.matrix @ start - self.origin)[::-1] / MAP_PIXEL
        matrix = placement.matrix[::-1, ::-1] * (step / MAP_PIXEL)
        if max(abs(matrix[0, 1]) * len(x), abs(matrix[1, 0]) * len(y)) < _SQUARE:
            rows, columns = (offset[i] + matrix[i, i] * np.arange(n) for i, n in ((0, len(y)), (1, len(x))))
            first = int(np.clip(min(columns[0], columns[-1]), 0, self.level.shape[1] - 2))
            last = int(np.clip(max(columns[0], columns[-1]), first, self.level.shape[1] - 2)) + 2
            return _interpolate(_interpolate(self.level[:, first:last], rows, 0), columns - first, 1)
        return ndimage.affine_transform(
            self.level,
            matrix,
            offset,  # pyright: ignore[reportArgumentType]
            output_shape=(len(y), len(x)),
            output=np.float32,
            order=1,
            mode="nearest",
        )


def _interpolate(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation of a 2D array along one axis at fractional indices, held at its ends."""
    at = np.clip(at, 0, values.shape[axis] - 1)
    lower = np.minimum(at.astype(np.intp), values.shape[axis] - 2)
    weight = (at - lower).astype(np.float32)
    weight = weight if axis else weight[:, None]
    # take along the rows of a view would copy all of it first
    below, above = (values.take(i, 1) if axis else values[i] for i in (lower, lower + 1))
    above -= below
    above *= weight
    above += below
    return above


def place_chip(
    translation: np.ndarray,
    tilts: tuple[float, float],
    pivot: np.ndarray,
    squareness: tuple[float, float],
    origin: np.ndarray,
    carrier: np.ndarray,
) -> Placement:
    """Where the nanogoniometer holds the membrane.

    Parameters
    ----------
    translation : ndarray, (3,)
        x, y, z of the stage, m.
    tilts : tuple of float
        (about x', about y') from the aligned setting, rad; ``R = R_y R_x``.
    pivot : ndarray, (3,)
        About which the tilts turn, m.
    squareness : tuple of float
        Tilt of the membrane about x and y against the stage, rad.
    origin : ndarray, (3,)
        Origin of the stage's frame in the detector frame, m.
    carrier : ndarray, (3, 3)
        Rotation of the circles that carry the stage, in the detector frame about the crystal.

    Returns
    -------
    Placement
    """
    turn = rotation_matrix("y", tilts[1]) @ rotation_matrix("x", tilts[0])
    mount = rotation_matrix("y", squareness[1]) @ rotation_matrix("x", squareness[0])
    base = carrier @ (turn @ (translation - pivot) + pivot + origin)
    axes = carrier @ turn @ mount
    return Placement.of(base, axes[:, 0], axes[:, 1])
