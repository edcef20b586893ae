"""What the simulated beamline knows, in the containers that measurements and results travel in.

Only comparisons and file-making look here: nothing that is compared may.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.scans import PtychographyScan, Reconstruction, RockingScan
from bcmi_beamline.sim import Twin, simulate_ptychography, simulate_rocking

Progress = Callable[[float, str], None]


def true_object(beamline: Beamline, preset: Preset) -> Reconstruction:
    """Return the simulated crystal on its own fine grid, orthogonal in the detector frame."""
    image, voxel_size = Twin(beamline, preset).truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    return Reconstruction(
        image=image,
        support=support,
        voxel_size=tuple(float(v) for v in voxel_size),
        geometry=beamline.geometry(),
        shear=(0.0, 0.0),
        configuration={"method": "truth", "preset": preset.model_dump(mode="json")},
    )


def true_distance(beamline: Beamline, preset: Preset) -> float:
    """Return the simulated crystal to modulator distance at the preset's z, m."""
    return Twin(beamline, preset).truth_distance(preset.plan.modulator_z_um)


def simulated_scan(
    kind: str, beamline: Beamline, preset: Preset, modulator_in: bool = True, progress: Progress | None = None
) -> RockingScan | PtychographyScan:
    """Return frames from the physics alone as a scan of `kind` ``"rocking"`` or ``"ptychography"``."""
    d1 = preset.plan.modulator_z_um * 1e-6 + beamline.nanogoniometer.distance_at_z0_um * 1e-6
    metadata = {"simulated": preset.name}
    if kind == "rocking":
        scan = simulate_rocking(beamline, preset, modulator_in=modulator_in, progress=progress)
        return RockingScan(
            frames=scan.frames,
            angles_deg=scan.angles_deg,
            mask=scan.mask,
            geometry=beamline.geometry(d1 if modulator_in else 0.0),
            modulator_position=(0.0, 0.0) if modulator_in else None,
            metadata=metadata,
        )
    scan = simulate_ptychography(beamline, preset, progress=progress)
    geometry = beamline.geometry(d1)
    return PtychographyScan(
        frames=scan.frames,
        positions=scan.positions,
        mask=scan.mask,
        wavelength=geometry.wavelength,
        propagation_distance=geometry.propagation_distance,
        pixel_size=geometry.pixel_size,
        sample_distance=d1,
        metadata=metadata,
    )
