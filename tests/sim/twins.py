"""Twins for tests: the small preset without errors and nuisances, and crystals of simple shape."""

import numpy as np

from bcmi_beamline.config import Preset, load_beamline, load_preset
from bcmi_beamline.sim import Twin
from bcmi_beamline.sim.crystal import Crystal

BEAMLINE = load_beamline()
OUT = BEAMLINE.nanogoniometer.positions["out"]
BEAM = np.array([BEAMLINE.eiger.beam_row, BEAMLINE.eiger.beam_column])
GAPLESS = BEAMLINE.model_copy(
    update={"eiger": BEAMLINE.eiger.model_copy(update={"masked_rows": [], "masked_columns": []})}
)


def merge(base, changes):
    return base | {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in changes.items()
    }


def quiet_preset(**sim):
    """The small preset without nuisances or hidden errors, and with what `sim` changes."""
    values = load_preset("small").model_dump()
    values["sim"] |= {"hidden": {}, "nuisances": {"seed": 1}, "peak_counts_per_s": 1e6}
    values["sim"]["modulator"]["extent_um"] = 12.0
    values["sim"] = merge(values["sim"], sim)
    return Preset.model_validate(values)


def body(density, voxel, beamline=BEAMLINE):
    """A crystal without strain."""
    geometry = beamline.geometry()
    density = np.asarray(density, np.float32)
    return Crystal(density, np.zeros_like(density), (voxel,) * 3, geometry.detector_frame @ geometry.q_vector)


def sphere(diameter, voxel, beamline=BEAMLINE):
    n = int(diameter / voxel / 2) + 2
    axis = np.arange(-n, n + 1) * voxel
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    return body(np.clip(0.5 + (diameter / 2 - radius) / voxel, 0, 1), voxel, beamline)


def rate_of(twin, time_s=0.0, **changes):
    """Photons per second and pixel at the aligned pose, or at what `changes` adds to it."""
    pose = twin.aligned_pose()
    pose |= {axis: pose[axis] + change for axis, change in changes.items()}
    return twin._rate(pose, (0.0, 0.0), time_s)


def rate_out(twin, **changes):
    """The same with the modulator out."""
    pose = twin.aligned_pose() | OUT
    pose |= {axis: pose[axis] + change for axis, change in changes.items()}
    return twin._rate(pose, (0.0, 0.0), 0.0)


def middle_of(rate, half=60):
    """Centre of mass (row, column), from the window's beam pixel, of what lies around its brightest pixel."""
    row, column = np.unravel_index(rate.argmax(), rate.shape)
    patch = rate[row - half : row + half + 1, column - half : column + half + 1]
    index = np.arange(-half, half + 1)
    place = np.array([row + patch.sum(1) @ index / patch.sum(), column + patch.sum(0) @ index / patch.sum()])
    return place - len(rate) // 2


__all__ = ["BEAM", "BEAMLINE", "GAPLESS", "OUT", "Twin", "body", "quiet_preset", "sphere"]
