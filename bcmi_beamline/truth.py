"""What the simulated beamline knows, in the containers that measurements and results travel in.

Only comparisons and file-making look here: nothing that is compared may, and no process variable shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np

from bcmi_beamline import data
from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.data._hdf5 import atomic_file
from bcmi_beamline.scans import Modulator, PtychographyScan, Reconstruction, RockingScan
from bcmi_beamline.sim import SimulatedScan, Twin, simulate_ptychography, simulate_rocking

Progress = Callable[[float, str], None]

TRUTH = "/entry_1/truth_1"
"""Where `write_truth` puts what no result has a place for."""


# -- scans from the physics alone ------------------------------------------------------------------------
def simulated_scan(
    kind: str,
    beamline: Beamline,
    preset: Preset,
    modulator_in: bool = True,
    progress: Progress | None = None,
    workers: int = 1,
    truth: str | Path | None = None,
) -> RockingScan | PtychographyScan:
    """Return frames from the physics alone as a scan of `kind` ``"rocking"`` or ``"ptychography"``.

    Parameters
    ----------
    kind : str
    beamline : Beamline
    preset : Preset
    modulator_in : bool
        Of a rocking scan.
    progress : callable, optional
        Given the fraction done and one line.
    workers : int
        Processes that share the work.
    truth : str or Path, optional
        File for `write_truth`.
    """
    if kind == "rocking":
        made = simulate_rocking(beamline, preset, modulator_in, progress, workers=workers)
    else:
        made = simulate_ptychography(beamline, preset, progress, workers=workers)
    if truth is not None:
        write_truth(truth, made)
    return as_scan(made)


def as_scan(made: SimulatedScan) -> RockingScan | PtychographyScan:
    """Return what a measurement would have recorded of `made`."""
    metadata = {"simulated": made.twin.preset.name}
    frames = np.where(made.mask, np.uint32(0), made.frames)  # gap pixels read full scale
    if made.angles_deg is not None:
        modulator_in = made.geometry.modulator_distance > 0
        return RockingScan(
            frames=frames,
            angles_deg=made.angles_deg,
            mask=made.mask,
            geometry=made.geometry,
            flux=made.flux,
            modulator_position=made.modulator_position if modulator_in else None,
            count_cutoff=made.count_cutoff,
            metadata=metadata,
        )
    return PtychographyScan(
        frames=frames,
        positions=np.asarray(made.positions),
        mask=made.mask,
        wavelength=made.geometry.wavelength,
        propagation_distance=made.geometry.propagation_distance,
        pixel_size=made.geometry.pixel_size,
        sample_distance=made.geometry.modulator_distance,
        flux=made.flux,
        metadata=metadata,
    )


# -- truth -----------------------------------------------------------------------------------------------
def true_object(beamline: Beamline, preset: Preset) -> Reconstruction:
    """Return the simulated crystal on its own fine grid, orthogonal in the detector frame."""
    return _object_of(Twin(beamline, preset))


def _object_of(twin: Twin, drift: np.ndarray | None = None) -> Reconstruction:
    image, voxel_size = twin.truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    return Reconstruction(
        image=image,
        support=support,
        voxel_size=voxel_size,
        geometry=twin.geometry,
        shear=(0.0, 0.0),
        drift=drift,
        configuration={"method": "truth", "preset": twin.preset.model_dump(mode="json")},
    )


def true_distance(beamline: Beamline, preset: Preset, pose: Mapping[str, float] | None = None) -> float:
    """Return the simulated crystal to modulator distance, m, at a nanogoniometer `pose` (um, deg)."""
    return Twin(beamline, preset).truth_distance(pose)


def true_modulator(twin: Twin, pixel_size: float, size: int, probe_size: int) -> Modulator:
    """Return the simulated modulator and the Bragg beam on it at `Twin.aligned_pose`.

    Parameters
    ----------
    twin : Twin
    pixel_size : float
        m.
    size, probe_size : int
        Edges of the transmission and of the probe, pixels.
    """
    pose = twin.aligned_pose()
    return Modulator(
        transmission=twin.truth_modulator(pixel_size, (size, size)),
        pixel_size=pixel_size,
        sample_distance=twin.truth_distance(),
        sample_distance_error=0.0,
        centre=(pose["x"] * 1e-6, pose["y"] * 1e-6),
        probe=twin.truth_probe(pixel_size, probe_size)[None],
        metadata={"configuration": {"method": "truth", "preset": twin.preset.model_dump(mode="json")}},
    )


def write_truth(path: str | Path, made: SimulatedScan) -> None:
    """Write everything that `made` was made from as one CXI file; it appears whole or not at all.

    The object lies where a result has it, with the crystal's drift (x', y') beside it, so that `bcmi compare`
    takes the file. Besides: modulator and beam as a calibration writes them, and under `TRUTH`, for every
    frame, the angle from the peak, the place of modulator and crystal, d1, energy and flux.

    Raises
    ------
    FileError
        When the file cannot be written.
    """
    twin = made.twin
    moved = np.array([state.crystal for state in made.states])
    across = moved @ twin.geometry.detector_frame[:2].T
    with atomic_file(path) as beside:
        data.write_cxi(beside, _object_of(twin, across))
        with h5py.File(beside, "r+") as file:
            _put_modulator(file, made)
            for name, values, unit in (
                ("rocking_angle", [s.angle_deg for s in made.states], "deg"),
                ("modulator_position", [s.position for s in made.states], "m"),
                ("modulator_distance", [s.distance for s in made.states], "m"),
                ("crystal_displacement", moved, "m"),
                ("energy", [s.energy_ev for s in made.states], "eV"),
                ("flux", [s.flux for s in made.states], ""),
            ):
                file[f"{TRUTH}/{name}"] = np.asarray(values)
                file[f"{TRUTH}/{name}"].attrs["units"] = unit


def _put_modulator(file: h5py.File, made: SimulatedScan) -> None:
    """The patterned part that the beam can meet, on the pixel of the measurement's window."""
    twin, n = made.twin, made.frames.shape[1]
    geometry = twin.geometry.with_modulator(twin.truth_distance())
    pixel = geometry.object_pixel(n)
    reach = np.abs(np.array([state.position for state in made.states])).max()
    truth = true_modulator(twin, pixel, n + 2 * int(np.ceil(reach / pixel)), n)
    group = file.create_group("/entry_1/modulator_1")
    options = {"compression": "gzip", "shuffle": True}
    group.create_dataset("transmission", data=truth.transmission, **options)
    file.create_dataset("/entry_1/probe_1/data", data=truth.probe, **options)
    for name in ("pixel_size", "sample_distance", "sample_distance_error", "centre"):
        group[name] = getattr(truth, name)
        group[name].attrs["units"] = "m"
