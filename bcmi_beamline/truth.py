"""What the simulated beamline knows, in the containers that measurements and results travel in.

Only comparisons and file-making look here: nothing that is compared may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.scans import PtychographyScan, Reconstruction, RockingScan
from bcmi_beamline.sim import SimulatedScan, Twin, simulate_ptychography, simulate_rocking

Progress = Callable[[float, str], None]


def true_object(beamline: Beamline, preset: Preset) -> Reconstruction:
    """Return the simulated crystal on its own fine grid, orthogonal in the detector frame."""
    image, voxel_size = Twin(beamline, preset).truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    return Reconstruction(
        image=image,
        support=support,
        voxel_size=voxel_size,
        geometry=beamline.geometry(),
        shear=(0.0, 0.0),
        configuration={"method": "truth", "preset": preset.model_dump(mode="json")},
    )


def true_distance(beamline: Beamline, preset: Preset, pose: Mapping[str, float] | None = None) -> float:
    """Return the simulated crystal to modulator distance, m, at a nanogoniometer `pose` (um, deg)."""
    return Twin(beamline, preset).truth_distance(pose)


def simulated_scan(
    kind: str, beamline: Beamline, preset: Preset, modulator_in: bool = True, progress: Progress | None = None
) -> RockingScan | PtychographyScan:
    """Return frames from the physics alone as a scan of `kind` ``"rocking"`` or ``"ptychography"``."""
    metadata = {"simulated": preset.name}
    if kind == "rocking":
        scan = simulate_rocking(beamline, preset, modulator_in=modulator_in, progress=progress)
        return RockingScan(
            frames=_counted(scan),
            angles_deg=np.asarray(scan.angles_deg),
            mask=scan.mask,
            geometry=scan.geometry,
            flux=scan.flux,
            modulator_position=scan.modulator_position if modulator_in else None,
            count_cutoff=scan.count_cutoff,
            metadata=metadata,
        )
    scan = simulate_ptychography(beamline, preset, progress=progress)
    return PtychographyScan(
        frames=_counted(scan),
        positions=np.asarray(scan.positions),
        mask=scan.mask,
        wavelength=scan.geometry.wavelength,
        propagation_distance=scan.geometry.propagation_distance,
        pixel_size=scan.geometry.pixel_size,
        sample_distance=scan.geometry.modulator_distance,
        flux=scan.flux,
        metadata=metadata,
    )


def _counted(scan: SimulatedScan) -> np.ndarray:
    """Frames with 0 where the detector does not count: gap pixels read full scale."""
    return np.where(scan.mask, np.uint32(0), scan.frames)
