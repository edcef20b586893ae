import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from bcmi_beamline.plans.trajectories import report_path, rocking_angles, spiral


def test_the_papers_scan():
    points = spiral((6.0, 6.0), 0.12)
    assert 2450 < len(points) < 2550  # the paper: about 2500
    assert np.all(points[0] == 0)


@settings(max_examples=40, deadline=None)
@example(width=1.0, height=8.0, step=0.5, shape="ellipse")  # its ends are narrower than a step
@given(
    width=st.floats(1.0, 12.0),
    height=st.floats(1.0, 12.0),
    step=st.floats(0.1, 0.5),
    shape=st.sampled_from(["rectangle", "ellipse"]),
)
def test_even_neighbours_full_field_short_path(width, height, step, shape):
    points = spiral((width, height), step, shape)
    assert np.abs(points[:, 0]).max() <= width / 2 + 1e-6
    assert np.abs(points[:, 1]).max() <= height / 2 + 1e-6
    assert (np.hypot(*points.T) < 1e-9).any(), "the centre is measured"
    if len(points) < 20:
        return
    neighbour = cKDTree(points).query(points, k=2)[0][:, 1]
    assert np.ptp(neighbour) / neighbour.mean() < 0.05
    # No hole: every place a step from the outline is within about a step of a point (square lattice: 0.71).
    edge = np.linspace(-0.5, 0.5, 61)
    grid = np.stack(np.meshgrid(edge * width, edge * height), axis=-1).reshape(-1, 2)
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)[:, None]
    rim = (grid + step * np.stack([np.cos(turn), np.sin(turn)], axis=-1)) / (width, height)
    reach = np.hypot(*rim.T) if shape == "ellipse" else np.abs(rim).max(axis=-1).T
    inner = grid[reach.max(axis=-1) <= 0.5]
    if len(inner) == 0:
        return
    assert cKDTree(points).query(inner)[0].max() < 1.05 * step
    jumps = np.hypot(*np.diff(points, axis=0).T)
    assert jumps.max() < 12 * step
    assert jumps.sum() < 1.6 * step * len(points)


def test_a_disc_is_walked_in_single_steps():
    points = spiral((5.0, 5.0), 0.2, "ellipse")
    assert np.hypot(*np.diff(points, axis=0).T) == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize(
    ("extent", "step", "word"),
    [((1.0, 1.0), 2.0, "extent"), ((1.0, 1.0), 0.0, "step"), ((100.0, 100.0), 0.01, "points")],
)
def test_a_senseless_spiral_is_refused(extent, step, word):
    with pytest.raises(ValueError, match=word):
        spiral(extent, step)
    with pytest.raises(ValueError, match="shape"):
        spiral((2.0, 2.0), 0.5, "star")  # pyright: ignore[reportArgumentType]


def test_path_report_of_a_known_path():
    report = report_path(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [4.0, 1.0]]), beam_width=2.0)
    assert report.points == 4
    assert report.path_length == pytest.approx(5.0)
    assert report.longest_jump == pytest.approx(3.0)
    assert report.nearest_neighbour == pytest.approx((1.0, 3.0))
    assert report.overlap == pytest.approx(1 - 1.5 / 2)


@given(half=st.floats(0.01, 2.0), count=st.integers(1, 400))
def test_rocking_angles(half, count):
    angles = rocking_angles(half, half / count)
    assert len(angles) == 2 * count + 1
    assert np.all(np.diff(angles) > 0)
    assert angles[count] == 0
    assert np.array_equal(angles, -angles[::-1])
    assert angles[-1] == pytest.approx(half)


def test_rocking_angles_of_the_paper():
    assert len(rocking_angles(0.5, 0.005)) == 201
    with pytest.raises(ValueError, match="step"):
        rocking_angles(0.1, 0.2)
