"""The crystal frame: axes, a known rotation, and strain along Q with the right sign."""

import numpy as np
import pytest

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.crystal_frame import crystal_axes, crystal_frame
from bcmi_beamline.scans import Reconstruction

ARMS = [("horizontal", 1), ("horizontal", -1), ("vertical", 1), ("vertical", -1)]
VOXEL = 10e-9


def _box_along_q(geometry: Geometry, strain: float) -> Reconstruction:
    """A box 300 x 160 x 200 nm along (q, y, x), uniformly strained, sampled in the detector frame."""
    n = (64, 48, 64)
    z, row, x = np.meshgrid(*((np.arange(k) - k // 2) * VOXEL for k in n), indexing="ij")
    r = np.stack([x, -row, z])
    along_x, along_y, along_q = np.tensordot(crystal_axes(geometry), r, 1)
    inside = (np.abs(along_q) < 150e-9) & (np.abs(along_y) < 80e-9) & (np.abs(along_x) < 100e-9)
    image = (inside * np.exp(-1j * geometry.q_norm * strain * along_q)).astype(np.complex64)
    return Reconstruction(image, inside, (VOXEL, VOXEL, VOXEL), geometry, (0.0, 0.0))


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_axes_are_right_handed_with_q_last(arm, sign):
    geometry = Geometry(arm=arm, arm_sign=sign)
    axes = crystal_axes(geometry)
    assert axes @ axes.T == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    assert axes[2] @ (geometry.detector_frame @ geometry.q_vector) == pytest.approx(geometry.q_norm)


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_a_strained_box_stands_straight_and_tells_its_strain(arm, sign):
    found = crystal_frame(_box_along_q(Geometry(arm=arm, arm_sign=sign), 8e-4))
    inside = np.isfinite(found["strain"])
    extent = [np.ptp(np.nonzero(inside)[axis]) + 1 for axis in range(3)]
    assert np.array(extent) == pytest.approx([30, 16, 20], abs=2)
    assert np.median(found["strain"][inside]) == pytest.approx(8e-4, rel=0.05)
    q = (np.arange(inside.shape[0]) - inside.shape[0] // 2) * VOXEL
    middle = found["displacement"][:, inside.shape[1] // 2, inside.shape[2] // 2]
    slope = np.polyfit(q[np.isfinite(middle)], middle[np.isfinite(middle)], 1)[0]
    assert slope == pytest.approx(8e-4, rel=0.05)
