"""NeXus files: an NXmx detector, and what NXxbase asks for besides, from a measured scan.

NeXus' laboratory frame is ours: y up, z along the incident beam. The detector hangs on its arm by
`depends_on`: turned by two theta, then moved along the diffracted beam; the crystal on its rocking axis; the
scanned modulator on its translations.

References
----------
.. [1] NeXus application definitions NXmx and NXxbase, https://manual.nexusformat.org.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bcmi_beamline.data._hdf5 import atomic_file, to_json
from bcmi_beamline.data.cxi import put, put_frames
from bcmi_beamline.geometry import HC_EV_M
from bcmi_beamline.scans import PtychographyScan, RockingScan

SENSOR = "Si", 450e-6
"""Material and thickness (m) of the Eiger2's sensor."""

_DETECTOR = "/entry/instrument/detector"
_ARM = f"{_DETECTOR}/transformations"
_STAGE = "/entry/sample/transformations"


def write_nexus(path: str | Path, scan: RockingScan | PtychographyScan) -> None:
    """Write a scan as NeXus, frames in blocks; the file appears whole or not at all.

    Parameters
    ----------
    path : path
    scan : RockingScan or PtychographyScan

    Raises
    ------
    FileError
        When the file cannot be written.
    """
    with atomic_file(path) as beside, h5py.File(beside, "w-") as file:
        metadata = scan.metadata
        file.attrs["default"] = "entry"
        entry = _group(file, "/entry", "NXentry", default="data")
        entry["definition"] = "NXmx"
        began = metadata.get("time") or time.time()
        entry["title"] = f"{metadata.get('plan_name') or 'scan'} {metadata.get('sample') or ''}".strip()
        entry["start_time"] = _iso(began)
        entry["end_time_estimated"] = _iso(began + len(scan.frames) * (metadata.get("exposure_s") or 0.0))
        _source(file, scan)
        _detector(file, scan)
        if isinstance(scan, RockingScan):
            _crystal(file, scan)
        else:
            _scanned(file, scan)
        _provenance(file, scan)
        _plot(file, scan)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _group(file: h5py.File, name: str, kind: str, **attributes: Any) -> h5py.Group:
    group = file.create_group(name)
    group.attrs.update({"NX_class": kind, **attributes})
    return group


def _wavelength(scan: RockingScan | PtychographyScan) -> float:
    return scan.geometry.wavelength if isinstance(scan, RockingScan) else scan.wavelength


def _source(file: h5py.File, scan: RockingScan | PtychographyScan) -> None:
    source = _group(file, "/entry/source", "NXsource")
    source["name"] = str(scan.metadata.get("beamline") or "synchrotron")
    source["type"] = "Synchrotron X-ray Source"
    source["probe"] = "x-ray"
    instrument = _group(file, "/entry/instrument", "NXinstrument")
    instrument["name"] = str(scan.metadata.get("beamline") or "coherent diffraction")
    instrument["source"] = source
    wavelength = _wavelength(scan)
    _group(file, "/entry/instrument/beam", "NXbeam")
    put(file, "/entry/instrument/beam/incident_wavelength", wavelength * 1e10, "angstrom")
    put(file, "/entry/instrument/beam/incident_energy", HC_EV_M / wavelength, "eV")
    _group(file, "/entry/instrument/monochromator", "NXmonochromator")
    put(file, "/entry/instrument/monochromator/wavelength", wavelength * 1e10, "angstrom")


def _motion(
    file: h5py.File, name: str, value: Any, unit: str, kind: str, vector: Any, after: str, offset: Any = None
) -> None:
    """One link of a chain of motions: `value` along or about `vector`, after the link `after`."""
    put(file, name, value, unit)
    attributes = {"transformation_type": kind, "vector": np.asarray(vector, float), "depends_on": after}
    file[name].attrs.update(attributes)
    if offset is not None:
        file[name].attrs.update({"offset": np.asarray(offset, float), "offset_units": "m"})


def _detector(file: h5py.File, scan: RockingScan | PtychographyScan) -> None:
    rows, columns = scan.frames.shape[1:]
    pixel, distance, angle, axis = _arm(scan)
    detector = _group(file, _DETECTOR, "NXdetector")
    put_frames(file, f"{_DETECTOR}/data", scan.frames)
    detector["data"].attrs["units"] = "counts"
    put(file, f"{_DETECTOR}/pixel_mask", scan.mask.astype(np.uint32))
    for name, value in {"x_pixel_size": pixel, "y_pixel_size": pixel, "distance": distance}.items():
        put(file, f"{_DETECTOR}/{name}", value, "m")
    for name, value in {"beam_center_x": columns // 2, "beam_center_y": rows // 2}.items():
        put(file, f"{_DETECTOR}/{name}", float(value), "pixel")
    detector["description"] = "pixel-array photon counter, cut to the window that is analysed"
    detector["frame_start_number"] = 1
    if exposure := scan.metadata.get("exposure_s"):
        put(file, f"{_DETECTOR}/count_time", np.full(len(scan.frames), float(exposure)), "s")
    detector["sensor_material"] = SENSOR[0]
    put(file, f"{_DETECTOR}/sensor_thickness", SENSOR[1], "m")
    if isinstance(scan, RockingScan) and scan.count_cutoff is not None:
        detector["saturation_value"] = float(scan.count_cutoff)
    detector["depends_on"] = f"{_ARM}/distance"
    _group(file, _ARM, "NXtransformations")
    _motion(file, f"{_ARM}/two_theta", [angle], "deg", "rotation", axis, ".")
    along = [0.0, 0.0, 1.0]
    _motion(file, f"{_ARM}/distance", [distance], "m", "translation", along, f"{_ARM}/two_theta")
    module = _group(file, f"{_DETECTOR}/module", "NXdetector_module")
    module["data_origin"] = np.array([0, 0])
    module["data_size"] = np.array([rows, columns])
    corner = np.array([-(columns // 2) * pixel, (rows // 2) * pixel, 0.0])
    for name, vector in {"fast_pixel_direction": [1, 0, 0], "slow_pixel_direction": [0, -1, 0]}.items():
        where = f"{_DETECTOR}/module/{name}"
        _motion(file, where, [pixel], "m", "translation", vector, f"{_ARM}/distance", corner)


def _arm(scan: RockingScan | PtychographyScan) -> tuple[float, float, float, list[float]]:
    """Pixel and distance (m), and the right-handed angle (deg) of the arm about an axis."""
    if not isinstance(scan, RockingScan):
        return scan.pixel_size, scan.propagation_distance + scan.sample_distance, 0.0, [0.0, 1.0, 0.0]
    geometry = scan.geometry
    angle = geometry.arm_sign * float(np.rad2deg(geometry.two_theta))
    if geometry.arm == "horizontal":
        return geometry.pixel_size, geometry.detector_distance, angle, [0.0, 1.0, 0.0]
    return geometry.pixel_size, geometry.detector_distance, -angle, [1.0, 0.0, 0.0]


def _sample(file: h5py.File, scan: RockingScan | PtychographyScan, last: str) -> None:
    sample = _group(file, "/entry/sample", "NXsample")
    sample["name"] = str(scan.metadata.get("sample") or "sample")
    sample["depends_on"] = f"{_STAGE}/{last}"
    _group(file, _STAGE, "NXtransformations")


def _modulator(file: h5py.File, distance: float) -> None:
    """The membrane between crystal and detector; `distance` in m from the crystal."""
    _group(file, "/entry/instrument/modulator", "NXcollection")
    put(file, "/entry/instrument/modulator/sample_distance", distance, "m")


def _crystal(file: h5py.File, scan: RockingScan) -> None:
    geometry = scan.geometry
    _sample(file, scan, "rocking_angle")
    _motion(file, f"{_STAGE}/rocking_angle", scan.angles_deg, "deg", "rotation", geometry.rocking_axis, ".")
    _group(file, "/entry/reflection", "NXcollection")
    put(file, "/entry/reflection/plane_spacing", geometry.plane_spacing * 1e10, "angstrom")
    put(file, "/entry/reflection/scattering_vector", geometry.q_vector * 1e-10, "1/angstrom")
    if geometry.modulator_distance:
        _modulator(file, geometry.modulator_distance)
        put(file, "/entry/instrument/modulator/position", scan.modulator_position, "m")


def _scanned(file: h5py.File, scan: PtychographyScan) -> None:
    _sample(file, scan, "y_translation")
    x, y = np.asarray(scan.positions).T
    _motion(file, f"{_STAGE}/x_translation", x, "m", "translation", [1, 0, 0], ".")
    _motion(file, f"{_STAGE}/y_translation", y, "m", "translation", [0, 1, 0], f"{_STAGE}/x_translation")
    if scan.sample_distance:
        _modulator(file, scan.sample_distance)


def _provenance(file: h5py.File, scan: RockingScan | PtychographyScan) -> None:
    """What the scan was measured with: the monitor, the calibration, everything else as JSON."""
    if scan.flux is not None:
        control = _group(file, "/entry/control", "NXmonitor")
        control["mode"] = "monitor"
        control["preset"] = 1.0
        put(file, "/entry/control/data", scan.flux)
        control["integral"] = float(np.sum(scan.flux))
    if scan.metadata:
        note = _group(file, "/entry/metadata", "NXnote")
        note["type"] = "application/json"
        note["data"] = np.bytes_(to_json(scan.metadata).encode())
    if calibration := scan.metadata.get("calibration"):
        _group(file, "/entry/calibration", "NXcollection")
        for name, value in calibration.items():
            put(file, f"/entry/calibration/{name}", str(value))


def _plot(file: h5py.File, scan: RockingScan | PtychographyScan) -> None:
    if isinstance(scan, RockingScan):
        axis, along, unit = "rocking_angle", scan.angles_deg, "deg"
    else:
        axis, along, unit = "x_translation", scan.positions[:, 0], "m"
    data = _group(file, "/entry/data", "NXdata", signal="data", axes=[axis, ".", "."])
    data.attrs[f"{axis}_indices"] = 0
    target = f"{_DETECTOR}/data"
    file[target].attrs["target"] = target
    data["data"] = file[target]
    put(file, f"/entry/data/{axis}", along, unit)
