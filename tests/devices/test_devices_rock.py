"""A circle that carries the modulator rocks, and the modulator stays in the beam: on the twin's geometry."""

import numpy as np
import pytest

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.devices import carrier_turn, pose_math
from bcmi_beamline.sim import Twin

VERTICAL = load_beamline("sim-id01-vertical")
PRESET = load_preset("small")
QUIET = PRESET.model_copy(
    update={
        "sim": PRESET.sim.model_copy(
            update={"nuisances": PRESET.sim.nuisances.model_copy(update={"position_error_nm": 0.0})}
        )
    }
)


@pytest.fixture(scope="module")
def twin():
    return Twin(VERTICAL, QUIET)


def pivot_of(twin):
    """The true pivot and level, which calibrations find."""
    hidden = PRESET.sim.hidden
    true = np.array(VERTICAL.nanogoniometer.pivot_um) + hidden.pivot_um
    return (*true, hidden.mchi_deg, hidden.mphi_deg)


@pytest.mark.parametrize("change_deg", [-0.5, -0.1, 0.25, 0.5])
def test_a_compensated_modulator_stands_still_in_the_beam(twin, change_deg):
    pose = twin.aligned_pose()
    eta = pose["eta"] + change_deg
    plain = np.array(twin.truth_spot(pose | {"eta": eta})) * 1e9
    assert np.hypot(*plain) == pytest.approx(abs(np.deg2rad(change_deg)) * 1357e3, rel=0.02), "1.36 mm swung"
    held = {axis: pose[axis] for axis in pose_math.AXES}
    turn = carrier_turn(VERTICAL, pose["eta"], eta)
    moved = pose_math.carried(held, turn, pivot_of(twin), VERTICAL.nanogoniometer.distance_at_z0_um)
    after = pose | moved | {"eta": eta}
    # d1 is 7 um off the survey, and 7 um times the turn are left
    left = np.hypot(*np.array(twin.truth_spot(after)) * 1e9)
    assert left < 7.0e3 * abs(np.deg2rad(change_deg)) + 5.0
    assert twin.truth_distance(after) == pytest.approx(twin.truth_distance(pose), abs=20e-9)


def test_the_way_back_is_the_way_there(twin):
    pose = {axis: twin.aligned_pose()[axis] for axis in pose_math.AXES}
    pivot = pivot_of(twin)
    there = pose_math.carried(pose, carrier_turn(VERTICAL, 17.7, 18.2), pivot)
    assert there["mchi"] == pytest.approx(pose["mchi"] + 0.5, abs=1e-9), "eta counts left-handed here"
    assert pose_math.carried(pose, carrier_turn(VERTICAL, 17.7, 17.7), pivot) == pytest.approx(pose, abs=1e-9)
