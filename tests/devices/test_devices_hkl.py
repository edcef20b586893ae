"""Miller indices and circles; what is expected comes from Bragg's law and rotations, not from the library."""

import numpy as np
import pytest

from bcmi_beamline.config import load_beamline
from bcmi_beamline.devices import nominal_setting
from bcmi_beamline.devices.hkl import HklError, Orientation
from bcmi_beamline.geometry import rotation_matrix

BEAMLINE = load_beamline()
VERTICAL = load_beamline("sim-id01-vertical")


@pytest.mark.parametrize("beamline", [BEAMLINE, VERTICAL], ids=["horizontal", "vertical"])
def test_the_configured_reflection_stands_at_the_bragg_setting(beamline):
    crystal = Orientation(beamline)
    assert crystal.hkl({}) == pytest.approx((1, 1, 1), abs=1e-9)
    assert crystal.angles((1, 1, 1)) == pytest.approx(nominal_setting(beamline), abs=1e-3)


def test_a_harmonic_follows_braggs_law():
    angles = Orientation(BEAMLINE).angles((2, 2, 2))
    theta = np.rad2deg(np.arcsin(0.137760 * 2 / (2 * 0.226529)))
    assert angles["nu"] == pytest.approx(2 * theta, abs=0.01)
    assert angles["phi"] == pytest.approx(
        17.70 + theta - np.rad2deg(BEAMLINE.geometry().bragg_angle), abs=0.01
    )


def test_another_energy_is_another_angle():
    angles = Orientation(BEAMLINE, energy_ev=12000.0).angles((1, 1, 1))
    assert angles["nu"] == pytest.approx(2 * np.rad2deg(np.arcsin(0.103320 / (2 * 0.226529))), abs=0.01)


def test_a_second_reflection_opens_the_others():
    unoriented = Orientation(BEAMLINE)
    with pytest.raises(HklError, match="give a second reflection"):
        unoriented.angles((2, 0, 0))
    # (2 0 0) of a crystal whose [1 -1 0] is vertical: 54.74 deg about the vertical from (1 1 1)
    theta = np.arcsin(BEAMLINE.geometry().wavelength * 1e9 / 0.39236)
    phi = 17.70 + np.rad2deg(theta - BEAMLINE.geometry().bragg_angle) + np.rad2deg(np.arccos(1 / np.sqrt(3)))
    second = ((0, 0, 2), {"phi": phi, "nu": 2 * np.rad2deg(theta)})
    crystal = Orientation(BEAMLINE, second=second)
    assert crystal.hkl(second[1]) == pytest.approx((0, 0, 2), abs=1e-4)
    for hkl in ((0, 0, 2), (1, 1, 1), (2, 2, 0)):
        assert crystal.hkl(crystal.angles(hkl)) == pytest.approx(hkl, abs=1e-5)
    # angle between reflections is turned by phi alone: they lie in the horizontal plane
    found = {hkl: crystal.angles(hkl) for hkl in ((1, 1, 1), (0, 0, 2))}
    change = found[0, 0, 2]["phi"] - found[1, 1, 1]["phi"]
    turned = rotation_matrix("y", np.deg2rad(change))
    assert np.trace(turned) == pytest.approx(1 + 2 * np.cos(np.deg2rad(phi - 17.70)), abs=1e-3)


def test_what_cannot_be_reached_is_said():
    with pytest.raises(HklError, match=r"\[7, 7, 7\] is out of reach of phi, nu, delta"):
        Orientation(BEAMLINE).angles((7, 7, 7))
    with pytest.raises(HklError, match="parallel"):
        Orientation(BEAMLINE, second=((2, 2, 2), {}))
