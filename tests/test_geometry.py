"""The numbers of the experiment against the paper, and the frames against each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcmi_beamline.geometry import Geometry, rotation_matrix

ARMS = [("horizontal", 1), ("horizontal", -1), ("vertical", 1), ("vertical", -1)]


def test_numbers_of_the_paper():
    g = Geometry(modulator_distance=1.35e-3)
    assert g.wavelength == pytest.approx(0.13776e-9, rel=1e-4)
    assert np.rad2deg(g.two_theta) == pytest.approx(35.404, abs=1e-3)
    assert g.object_pixel(432) == pytest.approx(22.74e-9, rel=1e-3)
    assert g.rocking_voxel(201, 0.005) == pytest.approx(13.56e-9, rel=1e-3)
    assert g.walk_per_radian[0] * np.deg2rad(0.005) == pytest.approx(16.1e-6, rel=5e-3)


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_detector_frame_is_right_handed_and_follows_the_beam(arm, sign):
    g = Geometry(arm=arm, arm_sign=sign)
    assert g.detector_frame @ g.detector_frame.T == pytest.approx(np.eye(3))
    assert np.linalg.det(g.detector_frame) == pytest.approx(1)
    assert np.linalg.norm(g.k_out) == pytest.approx(np.linalg.norm(g.k_in))
    assert np.linalg.norm(g.q_vector) == pytest.approx(g.q_norm)
    assert np.sign(g.k_out["xy".index("x" if arm == "horizontal" else "y")]) == sign


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_rocking_gradient_is_the_derivative_of_a_real_rotation(arm, sign):
    g = Geometry(arm=arm, arm_sign=sign)
    step = 1e-6
    turned = rotation_matrix(g.rocking_axis, step) @ g.q_vector
    assert g.detector_frame @ (turned - g.q_vector) / step == pytest.approx(
        g.rocking_gradient, rel=1e-5, abs=1e5
    )


@pytest.mark.parametrize(("arm", "sign"), ARMS)
@given(x=st.floats(-1e-6, 1e-6), y=st.floats(-1e-6, 1e-6), zeta=st.floats(-1e-6, 1e-6))
def test_in_the_sheared_frame_the_phase_depends_on_zeta_alone(arm, sign, x, y, zeta):
    g = Geometry(arm=arm, arm_sign=sign)
    z = zeta + g.shear[0] * x + g.shear[1] * y
    phase = 0.01 * g.rocking_gradient @ [x, y, z]
    assert phase == pytest.approx(-g.slow_frequency_step(np.rad2deg(0.01)) * zeta, abs=1e-9)


@given(angle=st.floats(-np.pi, np.pi), axis=st.sampled_from("xyz"))
def test_rotations_keep_lengths_and_undo(angle, axis):
    turn = rotation_matrix(axis, angle)
    assert turn @ rotation_matrix(axis, -angle) == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong",
    [{"energy_ev": 2000.0}, {"energy_ev": -1.0}, {"modulator_distance": 6.0}, {"arm": "up"}, {"arm_sign": 2}],
)
def test_impossible_geometries_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as error:
        Geometry(**wrong)
    assert "\n" not in str(error.value)


def test_bragg_angle_and_q_agree_with_xrayutilities():
    xrayutilities = pytest.importorskip("xrayutilities")
    lattice = xrayutilities.materials.SGLattice(225, 3.9236, atoms=["Pt"], pos=["4a"])
    q = xrayutilities.materials.Crystal("Pt", lattice).Q(1, 1, 1)
    omega, _, _, two_theta = xrayutilities.HXRD([1, 1, -2], [1, 1, 1], en=9000).Q2Ang(q)
    g = Geometry(energy_ev=9000, plane_spacing=0.39236e-9 / np.sqrt(3))
    assert np.rad2deg(g.two_theta) == pytest.approx(two_theta, rel=1e-6)
    assert np.rad2deg(g.bragg_angle) == pytest.approx(omega, rel=1e-6)
    assert g.q_norm == pytest.approx(np.linalg.norm(q) * 1e10, rel=1e-6)
