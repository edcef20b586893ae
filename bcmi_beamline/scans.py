"""Plain containers that travel between rooms: measured scans, the modulator, a reconstruction.

They hold arrays and their units and check that these fit together; they compute nothing. Axes, origins and
signs are those of `bcmi_beamline.geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bcmi_beamline.geometry import Geometry


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_frames(frames: np.ndarray, mask: np.ndarray) -> None:
    _check(frames.ndim == 3, f"frames must be (J, Ny, Nx), not {frames.shape}")
    _check(mask.dtype == bool, f"mask must be bool (True: bad), not {mask.dtype}")
    _check(mask.shape == frames.shape[1:], f"mask {mask.shape} does not fit frames {frames.shape}")
    _check(not mask.all(), "every pixel is masked")


@dataclass
class RockingScan:
    """Frames of one rocking curve, cropped to one fixed window.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx), float32 or unsigned integer
        Photon counts; the k_out direction at index (Ny // 2, Nx // 2).
    angles_deg : ndarray, (J,)
        Rocking angle relative to the Bragg peak, right-handed about `geometry.rocking_axis`, degrees.
    mask : ndarray, (Ny, Nx), bool
        True where a pixel must not be used.
    geometry : Geometry
        `modulator_distance` is 0 with the modulator out and the nominal d1 with it in.
    flux : ndarray, (J,), optional
        Incident flux relative to its mean; ones where absent.
    modulator_position : tuple of float, optional
        (x, y) reading of the nanogoniometer, m; needed to place a calibrated modulator.
    count_cutoff : float, optional
        Counts at and above this are saturated.
    sentinels : ndarray, (S, Ny, Nx), optional
        Frames taken at the Bragg peak in between, that show how the crystal has drifted.
    sentinel_after : ndarray, (S,), int, optional
        Index in `frames` of the frame after which each sentinel was taken.
    metadata : dict
        Provenance: run uid, sample, calibration uid and hash.
    """

    frames: np.ndarray
    angles_deg: np.ndarray
    mask: np.ndarray
    geometry: Geometry
    flux: np.ndarray | None = None
    modulator_position: tuple[float, float] | None = None
    count_cutoff: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    sentinels: np.ndarray | None = None
    sentinel_after: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_frames(self.frames, self.mask)
        if self.sentinels is not None:
            _check(self.sentinels.shape[1:] == self.mask.shape, "sentinels must have the shape of the frames")
            after = np.asarray([] if self.sentinel_after is None else self.sentinel_after)
            _check(after.shape == (len(self.sentinels),), "each sentinel needs its sentinel_after")
            _check(bool(np.isin(after, np.arange(len(self.frames))).all()), "sentinel_after names no frame")
        _check(self.angles_deg.shape == (len(self.frames),), "one angle per frame is needed")
        _check(bool(np.isfinite(self.angles_deg).all()), "rocking angles must be finite")
        _check(self.flux is None or self.flux.shape == self.angles_deg.shape, "one flux per frame is needed")

    @property
    def modulator_in(self) -> bool:
        """Whether the frames were taken through the modulator."""
        return self.geometry.modulator_distance > 0

    def __repr__(self) -> str:
        j, ny, nx = self.frames.shape
        return (
            f"RockingScan({j} frames of {ny} x {nx}, {self.angles_deg.min():+.3f} to "
            f"{self.angles_deg.max():+.3f} deg, {float(self.frames.sum(dtype=float)):.3g} counts, "
            f"modulator {'in' if self.modulator_in else 'out'})"
        )


@dataclass
class PtychographyScan:
    """Far-field frames of one object (here the modulator) scanned through a beam.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx)
        Photon counts, zero frequency at (Ny // 2, Nx // 2).
    positions : ndarray, (J, 2)
        (x, y) of the scanned object, m, CXI's sign: an object moved by +x shows the beam its part at -x.
    mask : ndarray, (Ny, Nx), bool
        True where a pixel must not be used.
    wavelength, propagation_distance, pixel_size : float
        Wavelength, scanned plane to detector, detector pixel, all m.
    sample_distance : float
        Nominal crystal to modulator distance d1, m; 0 for ordinary ptychography.
    initial_probe : ndarray, (N, N) or (modes, N, N), complex, optional
    flux : ndarray, (J,), optional
    metadata : dict
    """

    frames: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    wavelength: float
    propagation_distance: float
    pixel_size: float
    sample_distance: float = 0.0
    initial_probe: np.ndarray | None = None
    flux: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_frames(self.frames, self.mask)
        _check(self.positions.shape == (len(self.frames), 2), "positions must be (J, 2) in metres")
        _check(bool(np.isfinite(self.positions).all()), "positions must be finite")
        for name in ("wavelength", "propagation_distance", "pixel_size"):
            _check(getattr(self, name) > 0, f"{name} must be positive")

    @property
    def object_pixel(self) -> tuple[float, float]:
        """Pixel (y, x) of the scanned plane that the frames are the far field of, m."""
        ny, nx = self.frames.shape[1:]
        area = self.wavelength * self.propagation_distance / self.pixel_size
        return area / ny, area / nx

    def __repr__(self) -> str:
        j, ny, nx = self.frames.shape
        extent = np.ptp(self.positions, axis=0) * 1e6
        return (
            f"PtychographyScan({j} frames of {ny} x {nx} over {extent[0]:.2f} x {extent[1]:.2f} um, "
            f"{float(self.frames.sum(dtype=float)):.3g} counts)"
        )


@dataclass
class Modulator:
    """A calibrated modulator and the Bragg beam on it.

    Parameters
    ----------
    transmission : ndarray, (My, Mx), complex64
        Bare membrane 1; array sense as everywhere (columns +x', rows -y').
    pixel_size : float
        m.
    sample_distance, sample_distance_error : float
        d1 and its standard uncertainty, m.
    centre : tuple of float
        (x, y) of the nanogoniometer, m, at which the array's centre (index ``n // 2``) is on the beam axis.
    probe : ndarray, (modes, N, N), complex64
        The Bragg beam at the modulator plane, beam axis at ``N // 2``.
    trusted : ndarray, (My, Mx), bool, optional
        Where enough light fell to trust the map.
    positions, positions_start : ndarray, (J, 2), optional
        Scan positions as refined and as read, m.
    r2, free_llk : ndarray, optional
        Per iteration.
    metadata : dict
        `run_uid`, `created`, `configuration`, quality numbers.
    """

    transmission: np.ndarray
    pixel_size: float
    sample_distance: float
    sample_distance_error: float
    centre: tuple[float, float]
    probe: np.ndarray
    trusted: np.ndarray | None = None
    positions: np.ndarray | None = None
    positions_start: np.ndarray | None = None
    r2: np.ndarray | None = None
    free_llk: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.transmission.ndim == 2, "transmission must be a 2D array")
        _check(self.probe.ndim == 3, "probe must be (modes, N, N)")
        _check(self.pixel_size > 0, "pixel_size must be positive")
        _check(
            self.trusted is None or self.trusted.shape == self.transmission.shape, "trusted must fit the map"
        )

    def __repr__(self) -> str:
        my, mx = self.transmission.shape
        return (
            f"Modulator({my} x {mx} at {self.pixel_size * 1e9:.2f} nm, d1 = "
            f"{self.sample_distance * 1e3:.4f} +- {self.sample_distance_error * 1e3:.4f} mm)"
        )


@dataclass
class Reconstruction:
    """A complex crystal on a regular grid, in the sheared detector frame unless `shear` is (0, 0).

    Parameters
    ----------
    image : ndarray, (Nz, Ny, Nx), complex64
        ``|rho| exp(-i Q.u)`` on (zeta, y', x'); origin at ``n // 2``; rows run to -y'.
    support : ndarray, (Nz, Ny, Nx), bool
    voxel_size : tuple of float
        (zeta, y', x'), m.
    geometry : Geometry
        Gives Q, the frames and `shear`.
    shear : tuple of float
        (shear_x, shear_y) with ``z' = zeta + shear_x x' + shear_y y'``.
    free_llk, error : ndarray, (trials, iterations) or (iterations,), optional
    drift : ndarray, (J, 2), optional
        Crystal drift (x', y') per frame, m.
    mode_weights : ndarray, (modes,), optional
    configuration : dict
        Every parameter that led here; JSON-serialisable.
    metadata : dict
    """

    image: np.ndarray
    support: np.ndarray
    voxel_size: tuple[float, float, float]
    geometry: Geometry
    shear: tuple[float, float]
    free_llk: np.ndarray | None = None
    error: np.ndarray | None = None
    drift: np.ndarray | None = None
    mode_weights: np.ndarray | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.image.ndim == 3, f"image must be (Nz, Ny, Nx), not {self.image.shape}")
        _check(self.support.shape == self.image.shape, "support must have the shape of the image")

    def __repr__(self) -> str:
        nz, ny, nx = self.image.shape
        vz, vy, vx = (v * 1e9 for v in self.voxel_size)
        method = self.configuration.get("method", "object")
        return f"Reconstruction({method}, {nz} x {ny} x {nx} voxels of {vz:.1f} x {vy:.1f} x {vx:.1f} nm)"
