"""What a reconstruction starts from, made from the data alone, and the checks that it can work at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import KDTree

from bcmi_beamline.reconstruction.fourier import ifft2, to_centre, to_corner
from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography._kernels import FREE, MASKED
from bcmi_beamline.scans import PtychographyScan

FEWEST_FRAMES = 8
LARGEST_SCAN_PIXELS = 20_000
MARGIN, DRIFT_MARGIN = 8, 1e-6
"""Pixels, and metres where there is time to drift, kept around the outermost windows for refined positions
to move into."""
LONG_SCAN = 200
"""Frames of a scan in which a drift of the order of `DRIFT_MARGIN` may have grown."""
FULL_FIELD = 0.6
"""Share of the far field of one pixel that a beam may fill before it is computed on a wider one."""
FREE_SETS = 8
"""Sets of free pixels; frames take turns, so that no detector pixel is lost to all of them."""


def check_scan(scan: PtychographyScan) -> np.ndarray:
    """Refuse a scan that cannot be reconstructed; return its mean frame with masked pixels at 0.

    Raises
    ------
    ValueError
        One line: too few frames, positions that do not fit the object pixel, neighbours that do not overlap
        (near-field data, or wrong units), unmasked pixels that are no counts, no counts at all.
    """
    j, ny, nx = scan.frames.shape
    if j < FEWEST_FRAMES:
        raise ValueError(f"{j} frames are too few for ptychography: {FEWEST_FRAMES} or more are needed")
    pixel = np.array(scan.object_pixel[::-1])
    extent = np.ptp(scan.positions, axis=0)
    told = (
        f"the scan spans {extent[0] * 1e6:.4g} x {extent[1] * 1e6:.4g} um with object pixels of "
        f"{pixel[0] * 1e9:.3g} nm"
    )
    if (extent < pixel).all():
        raise ValueError(f"{told}: all positions are equal, check their units (m) and columns (x, y)")
    if (extent > LARGEST_SCAN_PIXELS * pixel).any():
        raise ValueError(
            f"{told}, more than {LARGEST_SCAN_PIXELS} pixels: check the units of positions (m), "
            "wavelength, distance and detector pixel"
        )
    nearest = float(np.median(KDTree(scan.positions).query(scan.positions, k=2)[0][:, 1]))
    field = float((pixel * (nx, ny)).min())
    if nearest > field / 2:
        raise ValueError(
            f"neighbouring positions are {nearest * 1e6:.3g} um apart in a far field of view of "
            f"{field * 1e6:.3g} um and do not overlap: near-field data, or wrong distance, wavelength, pixel"
        )
    mean = np.where(scan.mask, 0, scan.frames.mean(axis=0, dtype=np.float64))
    if not np.isfinite(mean).all():
        row, column = np.argwhere(~np.isfinite(mean))[0]
        raise ValueError(f"frames are not finite at pixel ({row}, {column}): add such pixels to the mask")
    if np.issubdtype(scan.frames.dtype, np.integer) and (mean >= np.iinfo(scan.frames.dtype).max).any():
        row, column = np.argwhere(mean >= np.iinfo(scan.frames.dtype).max)[0]
        raise ValueError(
            f"pixel ({row}, {column}) reads its largest value in every frame: add it to the mask"
        )
    if mean.sum() <= 0:
        raise ValueError("the frames hold no counts outside the mask")
    if scan.flux is not None and not (np.isfinite(scan.flux).all() and (scan.flux > 0).all()):
        raise ValueError("flux must be positive and finite for every frame")
    return mean


@dataclass
class Grid:
    """How positions in metres lie on the object array.

    Parameters
    ----------
    shape : (H, W)
        Of the object array.
    window : (Ny, Nx)
    pixel : (y, x), m
    centre : (x, y), m
        Position at which the array's centre, index ``n // 2``, is on the beam axis.
    """

    shape: tuple[int, int]
    window: tuple[int, int]
    pixel: tuple[float, float]
    centre: tuple[float, float]

    @classmethod
    def around(cls, scan: PtychographyScan, finer: int = 1) -> Grid:
        """Smallest grid that holds every window, `finer` times as wide as the frames, and a margin."""
        low, high = scan.positions.min(axis=0), scan.positions.max(axis=0)
        ny, nx = (finer * n for n in scan.frames.shape[1:])
        py, px = scan.object_pixel
        margin = MARGIN
        if len(scan.frames) >= LONG_SCAN and scan.sample_distance > 0:
            margin = max(MARGIN, int(np.ceil(DRIFT_MARGIN / min(px, py))))
        reach_x, reach_y = np.ceil((high - low) / 2 / (px, py)).astype(int) + margin
        x, y = (low + high) / 2
        return cls((ny + 2 * int(reach_y), nx + 2 * int(reach_x)), (ny, nx), (py, px), (float(x), float(y)))

    def holding(self, scan: PtychographyScan) -> Grid:
        """Return this grid, or a larger one about the same centre that holds the windows of a longer scan."""
        away = np.abs(self.offsets(scan.positions) - self._corner).max(axis=0)
        spare = max(self.pixel[0] * MARGIN, DRIFT_MARGIN if scan.sample_distance > 0 else 0) / self.pixel[0]
        need = [n + 2 * int(np.ceil(a + spare)) for n, a in zip(self.window, away, strict=True)]
        shape = tuple(n if n >= m else m + (n - m) % 2 for n, m in zip(self.shape, need, strict=True))
        return replace(self, shape=shape)

    def coarser(self, window: tuple[int, int]) -> Grid:
        """Return the grid of the same field with fewer pixels, `window` of them under the beam."""
        ratio = [w / n for w, n in zip(window, self.window, strict=True)]
        shape = [2 * int(np.ceil(n * r / 2)) for n, r in zip(self.shape, ratio, strict=True)]
        return Grid(
            (shape[0], shape[1]), window, (self.pixel[0] / ratio[0], self.pixel[1] / ratio[1]), self.centre
        )

    @property
    def _corner(self) -> tuple[int, int]:
        (h, w), (ny, nx) = self.shape, self.window
        return h // 2 - ny // 2, w // 2 - nx // 2

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """Corner (row, column) of each window, (J, 2): the object moved by +x shows its part at -x."""
        x, y = ((positions - self.centre) / self.pixel[::-1]).T
        return np.stack([self._corner[0] + y, self._corner[1] - x], axis=1)

    def positions(self, offsets: np.ndarray) -> np.ndarray:
        """Inverse of `offsets`, m."""
        row, column = (offsets - self._corner).T
        return np.stack([-column * self.pixel[1], row * self.pixel[0]], axis=1) + self.centre

    def limit(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets clipped so that every window stays on the array, with a pixel to spare for rounding."""
        top = np.array(self.shape) - self.window
        return np.clip(offsets, 1, top - 1)


def pixel_states(mask: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sets of bad and free pixels, (K, Ny, Nx), uint8."""
    rng = np.random.default_rng(seed)
    sets = [free_pixels(mask.shape, mask, fraction, seed=rng) for _ in range(FREE_SETS)]
    states = np.stack(sets).astype(np.uint8) * np.uint8(FREE)
    states[:, mask] = MASKED
    return states


def pattern_width(mean: np.ndarray) -> int:
    """Pixels along the wider axis of a mean frame (Ny, Nx) between which 90 % of its counts lie."""
    widths = []
    for axis in (0, 1):
        profile = np.cumsum(mean.sum(axis=axis))
        low, high = np.searchsorted(profile, np.array([0.05, 0.95]) * profile[-1])
        widths.append(int(high - low))
    return max(widths)


def beam_width(scan: PtychographyScan, width: int) -> float:
    """Width of the beam at the scanned plane, m.

    The beam comes from a small crystal and has spread over the nominal distance by the angles of the `width`
    pixels in which it arrives.
    """
    return width * scan.pixel_size / scan.propagation_distance * scan.sample_distance


def beam_fills(scan: PtychographyScan, width: int) -> float:
    """`beam_width` as a share of the far field of one pixel."""
    field = scan.wavelength * scan.propagation_distance / scan.pixel_size
    return float(beam_width(scan, width) / field)


def first_probe(
    scan: PtychographyScan, mean: np.ndarray, modes: int, rng: np.random.Generator, finer: int = 1
) -> np.ndarray:
    """Probe to start from, (modes, s Ny, s Nx), complex64, with the counts of a mean frame.

    The given `initial_probe`, or the inverse transform of the root of the mean frame: a compact wave at the
    crystal, windowed and carried over the nominal distance. Modes that are not given start as weak, randomly
    tilted copies of the first.
    """
    shape = scan.frames.shape[1:]
    wide = [((finer - 1) * n // 2, finer * n - n - (finer - 1) * n // 2) for n in shape]
    if scan.initial_probe is None:
        wave = to_centre(ifft2(to_corner(np.sqrt(mean)).astype(np.complex64)))
        reach = [np.arange(n) - n // 2 for n in shape]
        window = [np.exp(-((8 * r / n) ** 4)) for r, n in zip(reach, shape, strict=True)]
        wave = np.pad(wave * window[0][:, None] * window[1], wide)
        probe = propagate(wave, scan.object_pixel, scan.wavelength, scan.sample_distance)[None]
    else:
        probe = (
            np.atleast_3d(scan.initial_probe) if scan.initial_probe.ndim == 3 else scan.initial_probe[None]
        )
        if probe.ndim != 3 or probe.shape[1:] != shape:
            raise ValueError(f"initial_probe {scan.initial_probe.shape} does not fit frames of {shape}")
        if not np.isfinite(probe).all() or not probe.any():
            raise ValueError("initial_probe must be finite and not zero everywhere")
        probe = np.pad(probe, [(0, 0), *wide])
    extra = [probe[:1] * (0.15 * _tilt(probe.shape[1:], rng)) for _ in range(modes - len(probe))]
    probe = np.concatenate([probe, *extra])[:modes].astype(np.complex64)
    probe *= np.sqrt(mean.sum() / np.vdot(probe, probe).real)
    return probe


def _tilt(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random phase ramp of one to two periods across the array."""
    turns = rng.uniform(1, 2, 2) * rng.choice([-1, 1], 2)
    y, x = (np.exp(2j * np.pi * t * np.arange(n) / n) for t, n in zip(turns, shape, strict=True))
    return y[:, None] * x
