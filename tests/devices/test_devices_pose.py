"""The pose model: what tilting does to the modulator, and what puts it back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline.devices import pose_math

tilts = st.floats(-8.0, 8.0)
lengths = st.floats(-6000.0, 6000.0)
heights = st.floats(1000.0, 12000.0)
pivots = st.tuples(*[st.floats(-8000.0, 8000.0)] * 3)


def test_one_degree_about_a_pivot_5_mm_away_moves_the_pattern_87_um():
    before = pose_math.position((0, 0, 0), (0, 0, 1350), 0.0, 0.0, (0, -5000, 1350))
    after = pose_math.position((0, 0, 0), (0, 0, 1350), 1.0, 0.0, (0, -5000, 1350))
    assert np.linalg.norm(after - before) == pytest.approx(2 * 5000 * np.sin(np.deg2rad(0.5)))
    assert after[2] - before[2] == pytest.approx(5000 * np.sin(np.deg2rad(1.0)))  # R_x carries y to z


def test_translation_without_tilt_moves_the_spot_the_other_way():
    spot, height = pose_math.beam_on_membrane((30.0, -20.0, 1500.0), 0.0, 0.0, (100.0, -5000.0, 7.0))
    assert spot == pytest.approx([-30.0, 20.0, 0.0])
    assert height == pytest.approx(1500.0)


@given(lengths, lengths, heights, tilts, tilts, pivots)
def test_the_beam_meets_the_membrane_where_it_is_said_to(x, y, z, mchi, mphi, pivot):
    spot, height = pose_math.beam_on_membrane((x, y, z), mchi, mphi, pivot)
    stands = pose_math.position(spot, (x, y, z), mchi, mphi, pivot)
    assert stands == pytest.approx([0.0, 0.0, height], abs=1e-6)


@given(lengths, lengths, heights, tilts, tilts, tilts, tilts, pivots)
def test_compensation_keeps_spot_and_distance(x, y, z, chi0, phi0, chi1, phi1, pivot):
    spot0, height0 = pose_math.beam_on_membrane((x, y, z), chi0, phi0, pivot)
    moved = pose_math.pivot_compensation(chi1, phi1, x, y, z, pivot, from_tilt=(chi0, phi0))
    spot1, height1 = pose_math.beam_on_membrane(moved, chi1, phi1, pivot)
    assert spot1 == pytest.approx(spot0, abs=1e-6)
    assert height1 == pytest.approx(height0, abs=1e-6)


def test_compensation_there_and_back_is_where_it_began():
    pivot = (40.0, -5060.0, 30.0)
    there = pose_math.pivot_compensation(3.0, -2.0, 12.0, -7.0, 1350.0, pivot)
    back = pose_math.pivot_compensation(0.0, 0.0, *there, pivot, from_tilt=(3.0, -2.0))
    assert back == pytest.approx((12.0, -7.0, 1350.0), abs=1e-9)


@given(heights, tilts, tilts, pivots, st.floats(-100.0, 100.0))
def test_clearance_is_the_distance_to_the_plane(z, mchi, mphi, pivot, at_z0):
    crystal = np.array([0.0, 0.0, -at_z0])
    centre = pose_math.position((0, 0, 0), (0, 0, z), mchi, mphi, pivot)
    normal = pose_math.tilt_matrix(mchi, mphi)[:, 2]
    assert pose_math.clearance(z, mchi, mphi, pivot, at_z0) == pytest.approx(
        normal @ (centre - crystal), abs=1e-6
    )
    along = pose_math.distance_along_beam((0, 0, z), mchi, mphi, pivot, at_z0)
    assert pose_math.clearance(z, mchi, mphi, pivot, at_z0) == pytest.approx(along * normal[2], abs=1e-6)


@settings(max_examples=50)
@given(
    st.tuples(heights, heights),
    st.tuples(tilts, tilts),
    st.tuples(tilts, tilts),
    pivots,
    st.integers(0, 2**31),
)
def test_no_pose_on_the_way_is_closer_than_the_least_clearance(z, mchi, mphi, pivot, seed):
    least = pose_math.least_clearance(z, mchi, mphi, pivot)
    way = np.random.default_rng(seed).random((3, 200))
    poses = [low + (high - low) * w for (low, high), w in zip((z, mchi, mphi), way, strict=True)]
    slack = 1e-4 * (np.linalg.norm(pivot) + 1)
    assert pose_math.clearance(*poses, pivot).min() >= least - slack


def test_a_membrane_edge_on_is_refused():
    with pytest.raises(ValueError, match="edge-on"):
        pose_math.beam_on_membrane((0, 0, 1000), 90.0, 0.0, (0, 0, 0))
