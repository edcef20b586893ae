"""CXI files: measured scans, the calibrated modulator and results, written and read.

SI units unless a dataset's ``units`` attribute says otherwise, zero frequency at the array centre, mask 0
good, frames on (frame, y', x'), objects on (zeta, y', x'). ``distance`` is measured from the crystal; a
modulator stands ``sample_distance`` behind it.
Where a detector's ``basis_vectors`` give another sense of rows and columns, arrays are turned on reading.

References
----------
.. [1] F. R. N. C. Maia, "The Coherent X-ray Imaging Data Bank", Nat. Methods 9, 854 (2012).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import h5py
import numpy as np
from scipy import constants

from bcmi_beamline.data._clean import frames_per_block
from bcmi_beamline.data._hdf5 import Reader, atomic_file, bitshuffle_lz4, file_error, to_json
from bcmi_beamline.geometry import HC_EV_M, Arm, Geometry, wavelength_from_energy
from bcmi_beamline.scans import Modulator, PtychographyScan, Reconstruction, RockingScan

Container = RockingScan | PtychographyScan | Modulator | Reconstruction
Kind = TypeVar("Kind", bound=Container)

ENTRY = "/entry_1"
SOURCE = f"{ENTRY}/instrument_1/source_1"
DETECTOR = f"{ENTRY}/instrument_1/detector_1"
FRAMES = f"{ENTRY}/data_1/data"
SAMPLE = f"{ENTRY}/sample_1"
STAGES = f"{SAMPLE}/geometry_1"
MODULATOR = f"{ENTRY}/modulator_1"
PROBE = f"{ENTRY}/probe_1/data"
INITIAL_PROBE = f"{ENTRY}/instrument_1/initial_probe"
FLUX = f"{ENTRY}/monitor_1/flux"
IMAGE = f"{ENTRY}/image_1"
PROCESS = f"{IMAGE}/process_1"
CRYSTAL = f"{ENTRY}/image_2"
METADATA = f"{ENTRY}/metadata"

_ENERGY_RANGE = 1.6e-17, 1.6e-13  # 100 eV to 1 MeV, J
_DISTANCE_RANGE = 1e-4, 1e3
_PIXEL_RANGE = 1e-8, 1e-2
_SPACING_RANGE = 1e-11, 1e-7
_TWO_THETA_SLACK_DEG = 1.0  # strain and a detector off centre move a peak by less


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal: the provenance that a run records of its calibration."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise file_error(path, "file", f"cannot be read ({error.strerror})", "check the path") from None


# -- writing ----------------------------------------------------------------------------------------
def write_cxi(
    path: str | Path, content: Container, *, crystal: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a scan, a modulator or a result; the file appears whole or not at all.

    Parameters
    ----------
    path : str or Path
    content : RockingScan, PtychographyScan, Modulator or Reconstruction
        Frames may be anything with ``shape``, ``dtype`` and slicing along its first axis; they are taken in
        blocks.
    crystal : mapping of str to ndarray, optional
        Datasets of ``/entry_1/image_2``, the orthogonalised crystal: ``data``, ``displacement`` (m),
        ``strain``, ``voxel_size`` (m).

    Raises
    ------
    FileError
        When the file cannot be written.
    """
    with atomic_file(path) as beside, h5py.File(beside, "w-") as file:
        file["cxi_version"] = 160
        file["number_of_entries"] = 1
        if content.metadata:
            file[METADATA] = to_json(content.metadata)
        _WRITERS[type(content)](file, content)
        for name, values in (crystal or {}).items():
            unit = {"displacement": "m", "voxel_size": "m"}.get(name)
            put(file, f"{CRYSTAL}/{name}", values, unit)


def write_rocking(path: str | Path, scan: RockingScan) -> None:
    """Write a rocking scan as `write_cxi` does."""
    write_cxi(path, scan)


def write_ptychography(path: str | Path, scan: PtychographyScan) -> None:
    """Write a ptychography scan as `write_cxi` does."""
    write_cxi(path, scan)


def write_modulator(path: str | Path, modulator: Modulator) -> None:
    """Write a calibrated modulator as `write_cxi` does."""
    write_cxi(path, modulator)


def write_reconstruction(
    path: str | Path, result: Reconstruction, crystal: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a result, with its orthogonalised `crystal` if given, as `write_cxi` does."""
    write_cxi(path, result, crystal=crystal)


def put(file: h5py.File, name: str, values: Any, unit: str | None = None) -> None:
    """Store `values` unless None; large arrays with gzip, which every HDF5 reads."""
    if values is None:
        return
    values = values if isinstance(values, str) else np.asarray(values)
    large = isinstance(values, np.ndarray) and values.nbytes > 2**16
    file.create_dataset(name, data=values, **({"compression": "gzip", "shuffle": True} if large else {}))
    if unit:
        file[name].attrs["units"] = unit


def put_frames(file: h5py.File, name: str, frames: Any, *, plain: bool = False) -> None:
    """Counts, one compressed chunk a frame, copied in blocks; unsigned integers stay, else float32.

    Compressed as the Eiger does, or `plain`, as an HDF5 without plugins reads it.
    """
    dtype = frames.dtype if frames.dtype.kind == "u" else np.dtype(np.float32)
    packed: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    packed = packed if plain else bitshuffle_lz4()
    out = file.create_dataset(name, frames.shape, dtype, chunks=(1, *frames.shape[1:]), **packed)
    step = frames_per_block(frames)
    for start in range(0, len(frames), step):
        out[start : start + step] = frames[start : start + step]


def _put_frames(file: h5py.File, scan: RockingScan | PtychographyScan) -> None:
    # programs for ptychography come without the Eiger's filter
    put_frames(file, FRAMES, scan.frames, plain=isinstance(scan, PtychographyScan))
    file[f"{DETECTOR}/data"] = h5py.SoftLink(FRAMES)
    put(file, f"{DETECTOR}/mask", scan.mask.astype(np.uint32))
    put(file, FLUX, scan.flux)


def _put_detector(file: h5py.File, energy: float, distance: float, pixel: float, frame: np.ndarray) -> None:
    """Source and detector; `energy` J; rows of `frame` are x', y' of the detector in the laboratory."""
    put(file, f"{SOURCE}/energy", energy, "J")
    put(file, f"{DETECTOR}/distance", distance, "m")
    put(file, f"{DETECTOR}/x_pixel_size", pixel, "m")
    put(file, f"{DETECTOR}/y_pixel_size", pixel, "m")
    put(file, f"{DETECTOR}/basis_vectors", np.stack([-frame[1], frame[0]], axis=1) * pixel, "m")


def _put_geometry(file: h5py.File, geometry: Geometry) -> None:
    energy = geometry.energy_ev * constants.e
    _put_detector(file, energy, geometry.detector_distance, geometry.pixel_size, geometry.detector_frame)
    put(file, f"{DETECTOR}/arm", geometry.arm)
    put(file, f"{DETECTOR}/arm_sign", geometry.arm_sign)
    put(file, f"{SAMPLE}/unit_cell_plane_spacing", geometry.plane_spacing, "m")
    put(file, f"{STAGES}/two_theta", np.rad2deg(geometry.two_theta), "deg")
    put(file, f"{STAGES}/rocking_axis", geometry.rocking_axis)
    put(file, f"{STAGES}/rocking_gradient", geometry.rocking_gradient, "1/m/rad")
    if geometry.modulator_distance:
        put(file, f"{MODULATOR}/sample_distance", geometry.modulator_distance, "m")


def _put_rocking(file: h5py.File, scan: RockingScan) -> None:
    _put_frames(file, scan)
    _put_geometry(file, scan.geometry)
    put(file, f"{STAGES}/rocking_angle", scan.angles_deg, "deg")
    put(file, f"{DETECTOR}/count_cutoff", scan.count_cutoff)
    put(file, f"{MODULATOR}/position", scan.modulator_position, "m")
    calibration = scan.metadata.get("calibration") or {}
    put(file, f"{MODULATOR}/calibration_uid", calibration.get("uid"))
    put(file, f"{MODULATOR}/calibration_sha256", calibration.get("sha256"))


def _put_ptychography(file: h5py.File, scan: PtychographyScan) -> None:
    _put_frames(file, scan)
    energy = HC_EV_M / scan.wavelength * constants.e
    distance = scan.propagation_distance + scan.sample_distance
    _put_detector(file, energy, distance, scan.pixel_size, np.eye(3))
    put(file, f"{SOURCE}/wavelength", scan.wavelength, "m")
    translation = np.column_stack([scan.positions, np.zeros(len(scan.positions))])
    put(file, f"{STAGES}/translation", translation, "m")
    put(file, INITIAL_PROBE, scan.initial_probe)
    if scan.sample_distance:
        put(file, f"{MODULATOR}/sample_distance", scan.sample_distance, "m")


def _put_modulator(file: h5py.File, modulator: Modulator) -> None:
    for name in ("pixel_size", "sample_distance", "sample_distance_error", "centre"):
        put(file, f"{MODULATOR}/{name}", getattr(modulator, name), "m")
    put(file, f"{MODULATOR}/transmission", modulator.transmission.astype(np.complex64))
    if modulator.trusted is not None:
        put(file, f"{MODULATOR}/trusted", modulator.trusted.astype(np.uint8))
    put(file, f"{MODULATOR}/positions", modulator.positions, "m")
    put(file, f"{MODULATOR}/positions_start", modulator.positions_start, "m")
    put(file, f"{MODULATOR}/r2", modulator.r2)
    put(file, f"{MODULATOR}/free_llk", modulator.free_llk)
    for name in ("run_uid", "created"):
        if modulator.metadata.get(name) is not None:
            put(file, f"{MODULATOR}/{name}", str(modulator.metadata[name]))
    if configuration := modulator.metadata.get("configuration"):
        put(file, f"{MODULATOR}/configuration", to_json(configuration))
    put(file, PROBE, modulator.probe.astype(np.complex64))


def _put_reconstruction(file: h5py.File, result: Reconstruction) -> None:
    _put_geometry(file, result.geometry)
    put(file, f"{IMAGE}/data", result.image.astype(np.complex64))
    put(file, f"{IMAGE}/mask", result.support.astype(np.uint8))
    put(file, f"{IMAGE}/voxel_size", result.voxel_size, "m")
    put(file, f"{IMAGE}/shear", result.shear)
    put(file, f"{PROCESS}/configuration", to_json(result.configuration))
    put(file, f"{PROCESS}/free_llk", result.free_llk)
    put(file, f"{PROCESS}/error", result.error)
    put(file, f"{PROCESS}/drift", result.drift, "m")
    put(file, f"{PROCESS}/modes_weights", result.mode_weights)


_WRITERS: dict[type, Any] = {
    RockingScan: _put_rocking,
    PtychographyScan: _put_ptychography,
    Modulator: _put_modulator,
    Reconstruction: _put_reconstruction,
}


# -- reading ----------------------------------------------------------------------------------------
def read_cxi(path: str | Path) -> Container:
    """Read whatever kind of content a CXI file holds.

    Raises
    ------
    FileError
        In one line: the file, the dataset, what is wrong with it and the mend.
    """
    with Reader(path) as reader:
        for marker, read in _READERS.items():
            if reader.has(marker):
                with reader.guard("content"):
                    return read(reader)
        raise reader.fail(
            STAGES,
            "holds neither rocking_angle nor translation, and the file no modulator and no image",
            "name a rocking, ptychography, modulator or result file",
        )


def _read_kind(path: str | Path, kind: type[Kind], noun: str) -> Kind:
    content = read_cxi(path)
    if not isinstance(content, kind):
        raise file_error(path, "content", f"is a {type(content).__name__}, not {noun}", "name another file")
    return content


def read_rocking(path: str | Path) -> RockingScan:
    """Read a rocking scan; raises `FileError` for any other content."""
    return _read_kind(path, RockingScan, "a rocking scan")


def read_ptychography(path: str | Path) -> PtychographyScan:
    """Read a far-field ptychography scan, by this package or others; raises `FileError` otherwise."""
    return _read_kind(path, PtychographyScan, "a ptychography scan")


def read_modulator(path: str | Path) -> Modulator:
    """Read a calibrated modulator; raises `FileError` for any other content."""
    return _read_kind(path, Modulator, "a calibrated modulator")


def read_reconstruction(path: str | Path) -> Reconstruction:
    """Read a reconstructed crystal; raises `FileError` for any other content."""
    return _read_kind(path, Reconstruction, "a result")


def read_crystal(path: str | Path) -> dict[str, np.ndarray]:
    """Read ``/entry_1/image_2``, the orthogonalised crystal of a result; {} where there is none."""
    with Reader(path) as reader:
        group = reader.find(CRYSTAL)
        names = list(group) if isinstance(group, h5py.Group) else []
        return {name: reader.array(f"{CRYSTAL}/{name}", kinds="iufc") for name in names}


def _tidy(value: float) -> float:
    """Take away the rounding that a change of unit or reference point left in the last two digits."""
    return float(f"{value:.14g}")


def _optional(reader: Reader, name: str, **checks: Any) -> np.ndarray | None:
    return reader.array(name, **checks) if reader.has(name) else None


def _distance(reader: Reader) -> float:
    """Distance of the modulator behind the crystal, m; 0 where the file knows of none."""
    name = f"{MODULATOR}/sample_distance"
    return reader.number(name, dimension="length", low=0, high=1e3) if reader.has(name) else 0.0


def _energy(reader: Reader) -> float:
    """Photon energy, J."""
    low, high = _ENERGY_RANGE
    return reader.number(f"{SOURCE}/energy", dimension="energy", unit="J", low=low, high=high)


def _detector(reader: Reader) -> tuple[float, float]:
    """Distance and pixel, m."""
    low, high = _DISTANCE_RANGE
    distance = reader.number(f"{DETECTOR}/distance", dimension="length", low=low, high=high)
    low, high = _PIXEL_RANGE
    x, y = (
        reader.number(f"{DETECTOR}/{axis}_pixel_size", dimension="length", low=low, high=high)
        for axis in "xy"
    )
    if not np.isclose(x, y, rtol=1e-4, atol=0):
        raise reader.fail(
            f"{DETECTOR}/x_pixel_size", f"pixels of {x:.4g} x {y:.4g} m are not square", "resample the frames"
        )
    return distance, x


def _geometry(reader: Reader) -> Geometry:
    energy = _energy(reader)
    energy_ev = _tidy(energy / constants.e)
    distance, pixel = _detector(reader)
    two_theta_name = f"{STAGES}/two_theta"
    two_theta = None
    if reader.has(two_theta_name):
        two_theta = reader.number(two_theta_name, dimension="angle", unit="deg", low=0.1, high=179.9)
    spacing_name = f"{SAMPLE}/unit_cell_plane_spacing"
    if two_theta is not None and not reader.has(spacing_name):
        spacing = wavelength_from_energy(energy_ev) / (2 * np.sin(np.deg2rad(two_theta / 2)))
    else:
        low, high = _SPACING_RANGE
        spacing = reader.number(spacing_name, dimension="length", low=low, high=high)
    arm = reader.text(f"{DETECTOR}/arm") if reader.has(f"{DETECTOR}/arm") else "horizontal"
    sign = int(reader.number(f"{DETECTOR}/arm_sign")) if reader.has(f"{DETECTOR}/arm_sign") else 1
    with reader.guard("geometry"):
        geometry = Geometry(energy_ev, spacing, distance, pixel, _distance(reader), cast(Arm, arm), sign)
    follows = np.rad2deg(geometry.two_theta)
    if two_theta is not None and abs(two_theta - follows) > _TWO_THETA_SLACK_DEG:
        raise reader.fail(
            two_theta_name,
            f"{two_theta:.3f} deg, but energy and plane spacing give {follows:.3f} deg",
            "correct one of the three",
        )
    return geometry


def _turn_axis(values: np.ndarray, axis: int) -> np.ndarray:
    """Reverse one axis about its centre ``n // 2``; right for both sides of a Fourier transform."""
    turned = np.flip(values, axis)
    return np.roll(turned, 1, axis) if values.shape[axis] % 2 == 0 else turned


class _Sense:
    """How a file's rows and columns lie to this package's (columns +x', rows -y')."""

    def __init__(self, reader: Reader, frame: np.ndarray) -> None:
        name = f"{DETECTOR}/basis_vectors"
        vectors = _optional(reader, name)
        self.swap, self.turn = False, (False, False)
        if vectors is None:
            return
        vectors = vectors.T if vectors.shape == (2, 3) else vectors
        if vectors.shape != (3, 2):
            raise reader.fail(
                name, f"has shape {vectors.shape}, not (3, 2)", "write one column per array axis"
            )
        across = frame[:2] @ vectors  # x', y' components of a step along rows and along columns
        self.swap = bool(abs(across[0, 0]) > abs(across[1, 0]))
        rows, columns = across.T[::-1] if self.swap else across.T
        if not abs(rows[1]) > 10 * abs(rows[0]) or not abs(columns[0]) > 10 * abs(columns[1]):
            raise reader.fail(name, "rows and columns do not lie along x' and y'", "turn the frames first")
        self.turn = bool(rows[1] > 0), bool(columns[0] < 0)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Turn the last two axes of `values` into the package's sense."""
        if self.swap:
            values = values.swapaxes(-1, -2)
        for axis, turn in zip((-2, -1), self.turn, strict=True):
            values = _turn_axis(values, axis) if turn else values
        return np.ascontiguousarray(values)


def _frames(reader: Reader, sense: _Sense) -> tuple[np.ndarray, np.ndarray]:
    """Counts and mask; unsigned integers as they are, all else float32; bad counts only where masked."""
    dataset = reader.dataset(FRAMES, f"{DETECTOR}/data")
    if dataset.ndim != 3 or 0 in dataset.shape:
        raise reader.fail(FRAMES, f"has shape {dataset.shape}, not (frames, rows, columns)", "write it so")
    if dataset.dtype.kind not in "iuf":
        raise reader.fail(FRAMES, f"holds {dataset.dtype}, not counts", "write photon counts")
    mask_name = f"{DETECTOR}/mask"
    mask = np.zeros(dataset.shape[1:], bool)
    if reader.has(mask_name):
        mask = reader.array(mask_name, shape=dataset.shape[1:], kinds="iub") != 0
    if mask.all():
        raise reader.fail(mask_name, "masks every pixel", "0 marks a good pixel")
    dtype = dataset.dtype if dataset.dtype.kind == "u" else np.dtype(np.float32)
    frames = np.empty(dataset.shape, dtype)
    for j in range(len(frames)):
        with reader.guard(FRAMES):
            frame = dataset[j]
        if dtype.kind == "f":
            bad = ~(np.isfinite(frame) & (frame >= 0))
            if (bad & ~mask).any():
                row, column = np.argwhere(bad & ~mask)[0]
                raise reader.fail(
                    FRAMES,
                    f"frame {j} counts {frame[row, column]} at row {row}, column {column}",
                    "mask that pixel or repair the counts",
                )
            frame = np.where(bad, 0, frame)
        frames[j] = frame
    return sense.apply(frames), sense.apply(mask)


def _get_rocking(reader: Reader) -> RockingScan:
    geometry = _geometry(reader)
    frames, mask = _frames(reader, _Sense(reader, geometry.detector_frame))
    count = len(frames)
    position = _optional(reader, f"{MODULATOR}/position", shape=(2,), dimension="length")
    cutoff = f"{DETECTOR}/count_cutoff"
    metadata = reader.json(METADATA)
    for key in ("uid", "sha256"):
        if reader.has(f"{MODULATOR}/calibration_{key}"):
            metadata.setdefault("calibration", {})[key] = reader.text(f"{MODULATOR}/calibration_{key}")
    return RockingScan(
        frames=frames,
        angles_deg=reader.array(f"{STAGES}/rocking_angle", shape=(count,), dimension="angle", unit="deg"),
        mask=mask,
        geometry=geometry,
        flux=_optional(reader, FLUX, shape=(count,)),
        modulator_position=None if position is None else (float(position[0]), float(position[1])),
        count_cutoff=reader.number(cutoff, low=1) if reader.has(cutoff) else None,
        metadata=metadata,
    )


def _get_ptychography(reader: Reader) -> PtychographyScan:
    name = f"{STAGES}/translation"
    distance, pixel = _detector(reader)
    sense = _Sense(reader, np.eye(3))
    frames, mask = _frames(reader, sense)
    sample_distance = _distance(reader)
    if not sample_distance < distance:
        raise reader.fail(
            f"{MODULATOR}/sample_distance", "lies behind the detector", "check it and its units"
        )
    wavelength = f"{SOURCE}/wavelength"
    if reader.has(wavelength):
        metres = reader.number(wavelength, dimension="length", low=1e-12, high=1e-8)
    else:
        metres = wavelength_from_energy(_energy(reader) / constants.e)
    probe = _optional(reader, INITIAL_PROBE, kinds="iufc")
    if probe is not None and (probe.ndim not in (2, 3) or probe.shape[-1] != probe.shape[-2]):
        raise reader.fail(INITIAL_PROBE, f"has shape {probe.shape}", "write it (N, N) or (modes, N, N)")
    return PtychographyScan(
        frames=frames,
        positions=reader.array(name, shape=(len(frames), 3), dimension="length")[:, :2].copy(),
        mask=mask,
        wavelength=metres,
        propagation_distance=_tidy(distance - sample_distance),
        pixel_size=pixel,
        sample_distance=sample_distance,
        initial_probe=None if probe is None else sense.apply(probe).astype(np.complex64),
        flux=_optional(reader, FLUX, shape=(len(frames),)),
        metadata=reader.json(METADATA),
    )


def _get_modulator(reader: Reader) -> Modulator:
    transmission = reader.array(f"{MODULATOR}/transmission", shape=(None, None), kinds="fc")
    centre = reader.array(f"{MODULATOR}/centre", shape=(2,), dimension="length")
    trusted = _optional(reader, f"{MODULATOR}/trusted", shape=transmission.shape, kinds="iub")
    low, high = 1e-10, 1e-4
    metadata = reader.json(METADATA)
    for key in ("run_uid", "created"):
        if key not in metadata and reader.has(f"{MODULATOR}/{key}"):
            metadata[key] = reader.text(f"{MODULATOR}/{key}")
    if configuration := reader.json(f"{MODULATOR}/configuration"):
        metadata.setdefault("configuration", configuration)
    error = f"{MODULATOR}/sample_distance_error"
    return Modulator(
        transmission=transmission.astype(np.complex64),
        pixel_size=reader.number(f"{MODULATOR}/pixel_size", dimension="length", low=low, high=high),
        sample_distance=reader.number(f"{MODULATOR}/sample_distance", dimension="length", low=0, high=1e3),
        sample_distance_error=reader.number(error, dimension="length", low=0, high=1e3),
        centre=(float(centre[0]), float(centre[1])),
        probe=reader.array(PROBE, shape=(None, None, None), kinds="fc").astype(np.complex64),
        trusted=None if trusted is None else trusted != 0,
        positions=_optional(reader, f"{MODULATOR}/positions", shape=(None, 2), dimension="length"),
        positions_start=_optional(
            reader, f"{MODULATOR}/positions_start", shape=(None, 2), dimension="length"
        ),
        r2=_optional(reader, f"{MODULATOR}/r2"),
        free_llk=_optional(reader, f"{MODULATOR}/free_llk"),
        metadata=metadata,
    )


def _get_reconstruction(reader: Reader) -> Reconstruction:
    image = reader.array(f"{IMAGE}/data", shape=(None, None, None), kinds="fc")
    voxel = reader.array(f"{IMAGE}/voxel_size", shape=(3,), dimension="length")
    if not (voxel > 0).all():
        raise reader.fail(f"{IMAGE}/voxel_size", "is not positive", "write (zeta, y', x') in m")
    shear = reader.array(f"{IMAGE}/shear", shape=(2,))
    support = reader.array(f"{IMAGE}/mask", shape=image.shape, kinds="iub") != 0
    return Reconstruction(
        image=image.astype(np.complex64),
        support=support,
        voxel_size=(float(voxel[0]), float(voxel[1]), float(voxel[2])),
        geometry=_geometry(reader),
        shear=(float(shear[0]), float(shear[1])),
        free_llk=_optional(reader, f"{PROCESS}/free_llk"),
        error=_optional(reader, f"{PROCESS}/error"),
        drift=_optional(reader, f"{PROCESS}/drift", shape=(None, 2), dimension="length"),
        mode_weights=_optional(reader, f"{PROCESS}/modes_weights", shape=(None,)),
        configuration=reader.json(f"{PROCESS}/configuration"),
        metadata=reader.json(METADATA),
    )


_READERS = {
    f"{IMAGE}/data": _get_reconstruction,
    f"{MODULATOR}/transmission": _get_modulator,
    f"{STAGES}/rocking_angle": _get_rocking,
    f"{STAGES}/translation": _get_ptychography,
}
