"""Frames of a whole detector, by others: the peak found, one window cut around it, bad pixels masked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import h5py
import numpy as np
from scipy import ndimage

from bcmi_beamline.data._clean import clean_frames, frames_per_block
from bcmi_beamline.data._hdf5 import Reader
from bcmi_beamline.geometry import Arm, Geometry, wavelength_from_energy
from bcmi_beamline.scans import RockingScan

DEFAULT_WINDOW = 256
_ON_ONE_ARM_DEG = 2.0
_SMALLEST_TWO_THETA_DEG = 1.0


class Series:
    """Frames in one or several datasets, in their order; read when sliced along the first axis."""

    def __init__(self, datasets: list[h5py.Dataset], cut: tuple[slice, slice] | None = None) -> None:
        self._datasets = datasets
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        self._cut = cut or (slice(0, datasets[0].shape[1]), slice(0, datasets[0].shape[2]))
        self.dtype = datasets[0].dtype
        edges = (s.stop - s.start for s in self._cut)
        self.shape = cast(tuple[int, int, int], (int(self._starts[-1]), *edges))

    def __getitem__(self, key: slice, /) -> np.ndarray:
        first, last, _ = key.indices(self.shape[0])
        out = np.empty((max(0, last - first), *self.shape[1:]), self.dtype)
        for dataset, start in zip(self._datasets, self._starts, strict=False):
            low, high = max(first, start), min(last, start + len(dataset))
            if low < high:
                out[low - first : high - first] = dataset[(slice(low - start, high - start), *self._cut)]
        return out

    def within(self, cut: tuple[slice, slice]) -> Series:
        """Return the same frames, cut."""
        return Series(self._datasets, cut)


@dataclass
class Measured:
    """A rocking curve as another program's file tells it."""

    reader: Reader
    frames_name: str
    frames: Series
    mask: np.ndarray
    """True where the detector is known to be bad, (rows, columns)."""
    energy_ev: float
    distance: float
    pixel_size: float
    centre: tuple[float, float]
    """(row, column) to which the arm points."""
    arm_deg: tuple[float, float]
    """(horizontal, towards +x; vertical, towards +y)."""
    angles_deg: np.ndarray | None
    """Right-handed about the rocking axis, from any zero."""
    count_cutoff: float | None = None
    flux: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def _peak(measured: Measured) -> tuple[int, int]:
    """Brightest place of all frames (row, column), lone hot pixels aside."""
    frames, total = measured.frames, np.zeros(measured.frames.shape[1:])
    invalid = np.iinfo(frames.dtype).max if frames.dtype.kind in "iu" else np.inf
    for start in range(0, frames.shape[0], frames_per_block(frames)):
        counts = frames[start : start + frames_per_block(frames)]
        total += np.where((counts == invalid) | measured.mask | ~(counts >= 0), 0, counts).sum(axis=0)
    if not total.any():
        raise measured.reader.fail(measured.frames_name, "holds no counts", "name another scan")
    smooth = ndimage.uniform_filter(ndimage.median_filter(total, 3), 3)
    row, column = np.unravel_index(np.argmax(smooth), total.shape)
    return int(row), int(column)


def _window(measured: Measured, peak: tuple[int, int], size: int | None) -> tuple[slice, slice]:
    """One square around the peak, as large as asked or as fits."""
    shape = measured.frames.shape[1:]
    largest = 2 * min(min(at, n - at) for at, n in zip(peak, shape, strict=True))
    size = min(DEFAULT_WINDOW, largest) if size is None else size
    if not 2 <= size <= largest:
        where = f"at row {peak[0]}, column {peak[1]} of {shape[0]} x {shape[1]}"
        raise measured.reader.fail(
            measured.frames_name, f"the peak is {where}", f"choose a window of 2 to {largest}, not {size}"
        )
    rows, columns = (slice(at - size // 2, at - size // 2 + size) for at in peak)
    return rows, columns


def _geometry(measured: Measured, peak: tuple[int, int]) -> Geometry:
    """Geometry whose diffracted beam meets the detector at `peak`."""
    across, up = measured.arm_deg
    reader, pixel = measured.reader, measured.pixel_size
    if min(abs(across), abs(up)) > _ON_ONE_ARM_DEG:
        raise reader.fail(
            "detector arm",
            f"stands {across:.2f} deg across and {up:.2f} deg up",
            "only scattering in a horizontal or a vertical plane can be used",
        )
    right = np.rad2deg(np.arctan2((peak[1] - measured.centre[1]) * pixel, measured.distance))
    above = np.rad2deg(np.arctan2((measured.centre[0] - peak[0]) * pixel, measured.distance))
    horizontal = abs(across) >= abs(up)
    two_theta = across + right if horizontal else up + above
    if abs(two_theta) < _SMALLEST_TWO_THETA_DEG:
        raise reader.fail(
            "detector arm", f"two theta is {two_theta:.2f} deg", "give the scattering angle two_theta_deg"
        )
    wavelength = wavelength_from_energy(measured.energy_ev)
    with reader.guard("geometry"):
        return Geometry(
            energy_ev=measured.energy_ev,
            plane_spacing=float(wavelength / (2 * np.sin(np.deg2rad(abs(two_theta)) / 2))),
            detector_distance=measured.distance,
            pixel_size=pixel,
            arm=cast(Arm, "horizontal" if horizontal else "vertical"),
            arm_sign=1 if two_theta > 0 else -1,
        )


def rocking_scan(
    measured: Measured, window: int | None = None, keep: tuple[tuple[int, int], float] | None = None
) -> RockingScan:
    """Cut one window around the peak and count angles from the top of the rocking curve.

    Parameters
    ----------
    window : int, optional
        Edge in pixels; 256, or as much as fits around the peak, where absent.
    keep : tuple, optional
        Where the peak is known to be, (row, column) and angle: the frames are then left as they are.

    Raises
    ------
    FileError
        In one line.
    """
    reader, frames = measured.reader, measured.frames
    with reader.guard(measured.frames_name):
        peak, angle = (_peak(measured), None) if keep is None else keep
        whole = slice(0, frames.shape[1]), slice(0, frames.shape[2])
        cut = _window(measured, peak, window) if keep is None else whole
        counts = frames.within(cut)[:]
    clean, mask = clean_frames(counts, measured.mask[cut], measured.count_cutoff, per_frame=True)
    if mask.all():
        raise reader.fail(measured.frames_name, "every pixel of the window is masked", "choose another scan")
    data, angles = clean[:], measured.angles_deg
    if angles is None or angles.shape != data.shape[:1]:
        found = 0 if angles is None else angles.size
        raise reader.fail("rocking angle", f"{found} angles for {len(data)} frames", "give angles_deg")
    curve = data.sum(axis=(1, 2), dtype=float)
    top = np.clip(curve - curve.max() / 2, 0, None)
    if angle is None:
        angle = float((top * angles).sum() / top.sum()) if top.any() else float(angles.mean())
    return RockingScan(
        frames=data,
        angles_deg=angles - angle,
        mask=mask,
        geometry=_geometry(measured, peak),
        flux=measured.flux,
        count_cutoff=measured.count_cutoff,
        metadata=measured.metadata,
    )
