"""Eiger master files as DECTRIS writes them: data files by external links, or one virtual dataset."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from bcmi_beamline.data._foreign import Measured, Series, rocking_scan
from bcmi_beamline.data._hdf5 import Reader
from bcmi_beamline.geometry import HC_EV_M
from bcmi_beamline.scans import RockingScan

DATA = "/entry/data"
DETECTOR = "/entry/instrument/detector"
SPECIFIC = f"{DETECTOR}/detectorSpecific"


def is_eiger_master(reader: Reader) -> bool:
    """Whether a file is laid out as an Eiger's master file."""
    return reader.has(f"{DETECTOR}/detectorSpecific") and (
        reader.has(f"{DATA}/data_000001") or reader.has(f"{DATA}/data")
    )


def read_eiger(
    path: str | Path,
    *,
    angles_deg: np.ndarray | None = None,
    two_theta_deg: float | None = None,
    window: int | None = None,
) -> RockingScan:
    """Read a rocking curve from an Eiger's master file and the data files beside it.

    Parameters
    ----------
    path : path
    angles_deg : ndarray, (J,), optional
        Rocking angles, from any zero; the master's ``omega`` where absent.
    two_theta_deg : float, optional
        Where the arm stands, in the horizontal plane towards +x; the master's ``two_theta`` where absent.
    window : int, optional
        Edge in pixels of the square cut around the peak; 256, or as much as fits, where absent.

    Raises
    ------
    FileError
        In one line.
    """
    with Reader(path) as reader:
        return read_master(reader, angles_deg, two_theta_deg, window)


def read_master(
    reader: Reader, angles_deg: np.ndarray | None, two_theta_deg: float | None, window: int | None
) -> RockingScan:
    """Read an open master file as `read_eiger` does."""
    name, frames = _frames(reader)
    mask = np.zeros(frames.shape[1:], bool)
    if reader.has(f"{SPECIFIC}/pixel_mask"):
        mask = reader.array(f"{SPECIFIC}/pixel_mask", shape=mask.shape, kinds="iu") != 0
    wavelength = "/entry/instrument/beam/incident_wavelength"
    if reader.has(wavelength):
        metres = reader.number(wavelength, dimension="length", unit="angstrom", low=1e-12, high=1e-8)
        energy_ev = HC_EV_M / metres
    else:
        energy_ev = reader.number(f"{SPECIFIC}/photon_energy", low=100, high=1e6)
    arm = two_theta_deg
    if arm is None and reader.has(f"{DETECTOR}/goniometer/two_theta"):
        arm = float(reader.array(f"{DETECTOR}/goniometer/two_theta", dimension="angle", unit="deg").flat[0])
    omega = "/entry/sample/goniometer/omega"
    if angles_deg is None and reader.has(omega):
        angles_deg = reader.array(omega, shape=(None,), dimension="angle", unit="deg")
    cutoff = f"{SPECIFIC}/countrate_correction_count_cutoff"
    measured = Measured(
        reader=reader,
        frames_name=name,
        frames=frames,
        mask=mask,
        energy_ev=energy_ev,
        distance=reader.number(
            f"{DETECTOR}/detector_distance", f"{DETECTOR}/distance", dimension="length", low=1e-4, high=1e3
        ),
        pixel_size=reader.number(f"{DETECTOR}/x_pixel_size", dimension="length", low=1e-8, high=1e-2),
        centre=(reader.number(f"{DETECTOR}/beam_center_y"), reader.number(f"{DETECTOR}/beam_center_x")),
        arm_deg=(arm or 0.0, 0.0),
        angles_deg=None if angles_deg is None else np.asarray(angles_deg, float),
        count_cutoff=reader.number(cutoff, low=1) if reader.has(cutoff) else None,
        metadata={"file": str(reader.path)},
    )
    return rocking_scan(measured, window)


def _frames(reader: Reader) -> tuple[str, Series]:
    """All frames in order: ``data_000001``, ... where the master links them, else its virtual dataset."""
    names = []
    while reader.links(f"{DATA}/data_{len(names) + 1:06d}"):
        names.append(f"{DATA}/data_{len(names) + 1:06d}")
    names = names or [f"{DATA}/data"]
    datasets: list[h5py.Dataset] = [reader.dataset(name, whole=False) for name in names]
    for name, dataset in zip(names, datasets, strict=True):
        if dataset.ndim != 3 or dataset.dtype.kind not in "iu" or 0 in dataset.shape:
            wrong = f"holds {dataset.dtype} of shape {dataset.shape}, not frames of counts"
            raise reader.fail(name, wrong, "restore the detector's files")
        if dataset.shape[1:] != datasets[0].shape[1:]:
            raise reader.fail(name, "has frames of another size", "restore the detector's files")
    return names[0], Series(datasets)
