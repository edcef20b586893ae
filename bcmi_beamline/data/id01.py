"""The layout of ESRF's beamline ID01 (BLISS), written for cdiutils and read.

A scan is the group ``<sample>_<number>.1``: frames in ``measurement/eiger2M``, motors in
``instrument/positioners`` (deg, energy in keV), the detector in ``instrument/eiger2M``. ID01's circles eta
and phi turn the crystal about -x and -y, delta and nu the detector about -x and -y [1]_. What the layout has
no place for is in the group ``bcmi``.

References
----------
.. [1] cdiutils, ``cdiutils.geometry.Geometry.from_setup("id01")``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bcmi_beamline.data._foreign import Measured, Series, rocking_scan
from bcmi_beamline.data._hdf5 import Reader, atomic_file, to_json
from bcmi_beamline.data.cxi import put, put_frames
from bcmi_beamline.geometry import wavelength_from_energy
from bcmi_beamline.scans import PtychographyScan, RockingScan

DETECTORS = "eiger2M", "mpx1x4", "mpxgaas"
EXTRA = "bcmi"


def write_id01(path: str | Path, scan: RockingScan | PtychographyScan) -> None:
    """Write a scan as ID01 does; the file appears whole or not at all.

    Parameters
    ----------
    path : path
    scan : RockingScan or PtychographyScan
        The window as measured; a modulator's positions (um) are the positioners ``pix`` and ``piy``.

    Raises
    ------
    FileError
        When the file cannot be written.
    """
    with atomic_file(path) as beside, h5py.File(beside, "w-") as file:
        metadata = scan.metadata
        sample = str(metadata.get("sample") or "sample").replace("/", "-").replace(" ", "_")
        entry = file.create_group(f"{sample}_{int(metadata.get('scan_id') or 1)}.1")
        entry.attrs["NX_class"] = "NXentry"
        began = time.gmtime(metadata.get("time") or time.time())
        entry["start_time"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", began)
        entry["title"] = str(metadata.get("plan_name") or "scan")
        if metadata:
            entry[f"{EXTRA}/metadata"] = to_json(metadata)
        if isinstance(scan, RockingScan):
            _rocking(entry, scan)
        else:
            _ptychography(entry, scan)
        _detector(entry, scan)


def _detector(entry: h5py.Group, scan: RockingScan | PtychographyScan) -> None:
    frames = f"{entry.name}/measurement/eiger2M"
    put_frames(entry.file, frames, scan.frames)
    rows, columns = scan.frames.shape[1:]
    group = entry.create_group("instrument/eiger2M")
    group.attrs["NX_class"] = "NXdetector"
    group["data"] = h5py.SoftLink(frames)
    if isinstance(scan, RockingScan):
        distance, pixel = scan.geometry.detector_distance, scan.geometry.pixel_size
    else:
        distance, pixel = scan.propagation_distance + scan.sample_distance, scan.pixel_size
    for name, value in {"distance": distance, "x_pixel_size": pixel, "y_pixel_size": pixel}.items():
        put(entry.file, f"{group.name}/{name}", value, "m")
    for name, value in {"beam_center_x": columns // 2, "beam_center_y": rows // 2}.items():
        put(entry.file, f"{group.name}/{name}", float(value), "pixel")
    group["dim_i"], group["dim_j"] = columns, rows
    put(entry.file, f"{group.name}/pixel_mask", scan.mask.astype(np.uint32))
    if scan.flux is not None:
        put(entry.file, f"{entry.name}/measurement/mon", scan.flux)


def _positioners(entry: h5py.Group, values: dict[str, tuple[Any, str]]) -> None:
    group = entry.require_group("instrument/positioners")
    group.attrs["NX_class"] = "NXcollection"
    for name, (value, unit) in values.items():
        put(entry.file, f"{group.name}/{name}", value, unit)


def _rocking(entry: h5py.Group, scan: RockingScan) -> None:
    geometry = scan.geometry
    horizontal = geometry.arm == "horizontal"
    rocking = scan.metadata.get("rocking") or {}
    peak = rocking.get("sense", 1) * rocking.get("peak_deg", 0.0)
    crystal = -(np.asarray(scan.angles_deg) + peak)
    arm = geometry.arm_sign * np.rad2deg(geometry.two_theta)
    _positioners(
        entry,
        {
            "eta": (0.0 if horizontal else crystal, "deg"),
            "phi": (crystal if horizontal else 0.0, "deg"),
            "delta": (0.0 if horizontal else arm, "deg"),
            "nu": (-arm if horizontal else 0.0, "deg"),
            "mononrj": (geometry.energy_ev * 1e-3, "keV"),
        },
    )
    extra = {"peak": (-peak, "deg"), "modulator_distance": (geometry.modulator_distance, "m")}
    extra |= {"modulator_position": (scan.modulator_position, "m"), "count_cutoff": (scan.count_cutoff, None)}
    for name, (value, unit) in extra.items():
        put(entry.file, f"{entry.name}/{EXTRA}/{name}", value, unit)


def _ptychography(entry: h5py.Group, scan: PtychographyScan) -> None:
    energy_kev = (
        wavelength_from_energy(scan.wavelength) * 1e-3
    )  # hc / wavelength: the relation is its own inverse
    x, y = np.asarray(scan.positions).T * 1e6
    fixed = dict.fromkeys(("eta", "phi", "delta", "nu"), (0.0, "deg"))
    _positioners(entry, {"pix": (x, "um"), "piy": (y, "um"), "mononrj": (energy_kev, "keV"), **fixed})
    put(entry.file, f"{entry.name}/{EXTRA}/modulator_distance", scan.sample_distance, "m")


# -- reading ----------------------------------------------------------------------------------------
def find_scan(reader: Reader, number: int | None = None) -> tuple[str, str] | None:
    """Scan and detector of a file laid out like ID01's; the first scan unless a number is given."""
    root = reader.find("/")
    assert isinstance(root, h5py.Group)
    end = ".1" if number is None else f"_{number}.1"
    for entry in map(str, root):
        if entry.endswith(end):
            for detector in DETECTORS:
                if reader.links(f"/{entry}/measurement/{detector}"):
                    return entry, detector
    return None


def read_id01(path: str | Path, scan: int | None = None, *, window: int | None = None) -> RockingScan:
    """Read a rocking curve laid out as ID01 does.

    Parameters
    ----------
    path : path
    scan : int, optional
        Number of the scan; the first with a detector where absent.
    window : int, optional
        Edge in pixels of the square cut around the peak; 256, or as much as fits, where absent. A file that
        was written here keeps its window.

    Raises
    ------
    FileError
        In one line.
    """
    with Reader(path) as reader:
        found = find_scan(reader, scan)
        if found is None:
            which = "a scan" if scan is None else f"scan {scan}"
            raise reader.fail("/", f"holds no {which} with a detector", f"one of {', '.join(DETECTORS)}")
        return read_scan(reader, *found, window)


def read_scan(reader: Reader, entry: str, detector: str, window: int | None) -> RockingScan:
    """Read one scan of an open file as `read_id01` does."""
    name = f"/{entry}/measurement/{detector}"
    dataset = reader.dataset(name, whole=False)
    if dataset.ndim != 3 or 0 in dataset.shape or dataset.dtype.kind not in "iuf":
        raise reader.fail(
            name, f"has shape {dataset.shape}, not (frames, rows, columns)", "name another scan"
        )
    where = f"/{entry}/instrument/{detector}"
    angles = {axis: _angle(reader, entry, axis) for axis in ("eta", "phi", "delta", "nu")}
    eta, phi = angles["eta"], angles["phi"]
    turning = eta if np.ptp(eta) >= np.ptp(phi) else phi
    mask = np.zeros(dataset.shape[1:], bool)
    if reader.has(f"{where}/pixel_mask"):
        mask = reader.array(f"{where}/pixel_mask", shape=mask.shape, kinds="iub") != 0
    length: dict[str, Any] = {"dimension": "length", "low": 1e-8, "high": 1e3}
    extra = f"/{entry}/{EXTRA}"
    measured = Measured(
        reader=reader,
        frames_name=name,
        frames=Series([dataset]),
        mask=mask,
        energy_ev=1e3 * reader.number(f"/{entry}/instrument/positioners/mononrj", low=0.1, high=1e3),
        distance=reader.number(f"{where}/distance", **length),
        pixel_size=reader.number(f"{where}/x_pixel_size", **length),
        centre=(reader.number(f"{where}/beam_center_y"), reader.number(f"{where}/beam_center_x")),
        arm_deg=(-float(angles["nu"].mean()), float(angles["delta"].mean())),
        angles_deg=-turning,
        metadata=reader.json(f"{extra}/metadata") or {"file": str(reader.path), "scan": entry},
    )
    if not reader.has(extra):
        return rocking_scan(measured, window)
    return _our_own(measured, reader, extra)


def _our_own(measured: Measured, reader: Reader, extra: str) -> RockingScan:
    """Give back what was written here as it was: its window, its zero of the angle, its modulator."""
    cutoff, position = f"{extra}/count_cutoff", f"{extra}/modulator_position"
    rows, columns = measured.frames.shape[1:]
    measured.count_cutoff = reader.number(cutoff, low=1) if reader.has(cutoff) else None
    peak = reader.number(f"{extra}/peak", dimension="angle", unit="deg")
    scan = rocking_scan(measured, window=None, keep=((rows // 2, columns // 2), -peak))
    distance = reader.number(f"{extra}/modulator_distance", dimension="length", low=0, high=1e3)
    scan.geometry = scan.geometry.with_modulator(distance)
    if reader.has(position):
        x, y = reader.array(position, shape=(2,), dimension="length")
        scan.modulator_position = float(x), float(y)
    return scan


def _angle(reader: Reader, entry: str, axis: str) -> np.ndarray:
    name = f"/{entry}/instrument/positioners/{axis}"
    return (
        np.atleast_1d(reader.array(name, dimension="angle", unit="deg")) if reader.has(name) else np.zeros(1)
    )
