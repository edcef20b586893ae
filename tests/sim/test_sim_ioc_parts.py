"""Parts of the simulated IOC that need no Channel Access: motion, time, clearance, files."""

from __future__ import annotations

import time

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcmi_beamline.config import load_beamline
from bcmi_beamline.geometry import rotation_matrix
from bcmi_beamline.sim.ioc.clock import Clock
from bcmi_beamline.sim.ioc.interlock import clearance
from bcmi_beamline.sim.ioc.motor import Motion
from bcmi_beamline.sim.ioc.series import Series, SeriesSettings

finite = st.floats(-1e4, 1e4)


@given(start=finite, target=finite, now=st.floats(0, 3))
def test_a_motion_stays_between_its_ends_and_ends_exactly_at_its_target(start, target, now):
    motion = Motion(start, target, began=1.0, duration=1.0)
    place = motion.position(max(now, motion.began))
    assert min(start, target) - 1e-9 <= place <= max(start, target) + 1e-9
    assert motion.position(motion.end) == target
    assert motion.position(motion.began) == pytest.approx(start)


def test_beamline_time_runs_on_when_its_pace_changes():
    clock = Clock(0.01)
    time.sleep(0.02)
    before = clock.now()
    assert before >= 2.0
    clock.scale = 10.0
    after = clock.now()
    assert before <= after < before + 2
    time.sleep(0.02)
    assert after < clock.now() < after + 2  # 20 ms on the wall are now 2 ms


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_time_does_not_stand_still_or_run_back(scale):
    with pytest.raises(ValueError, match="positive"):
        Clock(1.0).scale = scale


@given(
    z=st.floats(500, 5000),
    mchi=st.floats(-8, 8),
    mphi=st.floats(-8, 8),
    spot=st.tuples(st.floats(-5e3, 5e3), st.floats(-5e3, 5e3)),
    x=st.floats(-6e3, 6e3),
    y=st.floats(-6e3, 6e3),
)
def test_no_point_of_the_membrane_is_nearer_than_the_clearance(z, mchi, mphi, spot, x, y):
    config = load_beamline().nanogoniometer
    config = config.model_copy(update={"pivot_um": (300.0, -5000.0, 900.0), "distance_at_z0_um": 120.0})
    turn = rotation_matrix("y", np.deg2rad(mphi)) @ rotation_matrix("x", np.deg2rad(mchi))
    pivot = np.array(config.pivot_um)
    crystal = np.array([0, 0, -config.distance_at_z0_um])
    point = turn @ (np.array([spot[0] + x, spot[1] + y, z]) - pivot) + pivot
    least = clearance(config, z, np.array(mchi), np.array(mphi))
    assert np.linalg.norm(point - crystal) >= abs(least) * (1 - 1e-9)
    foot = crystal + turn[:, 2] * least  # where the plane of the membrane is nearest
    assert (turn.T @ (foot - pivot) + pivot)[2] == pytest.approx(z, abs=1e-6)


# -- files ----------------------------------------------------------------------------------------
ROWS, COLUMNS = 40, 30


def settings(**changes) -> SeriesSettings:
    values = {
        "images": 1,
        "triggers": 10,
        "images_per_file": 4,
        "exposure_s": 0.5,
        "period_s": 0.6,
        "wavelength": 1.378e-10,
        "photon_energy_ev": 9000.0,
        "threshold_energy_ev": 4500.0,
        "distance": 5.35,
        "beam_center": (640.0, 1340.0),
        "pixel_size": 75e-6,
        "bit_depth": 32,
        "count_cutoff": 1_250_000,
        "pixel_mask": np.eye(ROWS, COLUMNS, dtype=np.uint32),
        "compression": "BS LZ4",
    }
    return SeriesSettings(**(values | changes))


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, (ROWS, COLUMNS)).astype(np.uint32)


@pytest.mark.parametrize("compression", ["BS LZ4", "LZ4", "none"])
def test_frames_come_back_through_the_master_file_by_file(tmp_path, compression):
    series = Series(tmp_path / "s", settings(compression=compression))
    for number in range(10):
        series.write(frame(number))
        assert series.current_file == tmp_path / f"s_data_{number // 4 + 1:06d}.h5"
    series.close()
    assert series.frames == 10
    with h5py.File(tmp_path / "s_master.h5") as master:
        data = master["entry/data"]
        assert [data[name].shape[0] for name in sorted(data)] == [4, 4, 2]
        stack = np.concatenate([data[name][()] for name in sorted(data)])
        dataset = data["data_000001"]
        assert dataset.chunks == (1, ROWS, COLUMNS)
        assert dataset.dtype == np.uint32
    np.testing.assert_array_equal(stack, [frame(n) for n in range(10)])


def test_the_master_describes_the_measurement_from_the_moment_of_arming(tmp_path):
    Series(tmp_path / "s", settings())
    with h5py.File(tmp_path / "s_master.h5") as master:
        detector = master["entry/instrument/detector"]
        assert detector["x_pixel_size"][()] == 75e-6
        assert detector["x_pixel_size"].attrs["units"] == "m"
        assert detector["detector_distance"][()] == 5.35
        assert (detector["beam_center_x"][()], detector["beam_center_y"][()]) == (640.0, 1340.0)
        assert (detector["count_time"][()], detector["frame_time"][()]) == (0.5, 0.6)
        assert detector["bit_depth_image"][()] == 32
        specific = detector["detectorSpecific"]
        assert specific["countrate_correction_count_cutoff"][()] == 1_250_000
        assert (specific["nimages"][()], specific["ntrigger"][()]) == (1, 10)
        np.testing.assert_array_equal(specific["pixel_mask"][()], np.eye(ROWS, COLUMNS))
        assert master["entry/instrument/beam/incident_wavelength"][()] == pytest.approx(1.378)
        assert sorted(master["entry/data"]) == [f"data_{n:06d}" for n in (1, 2, 3)]


def test_a_series_that_ends_early_links_only_what_there_is(tmp_path):
    series = Series(tmp_path / "s", settings())
    series.write(frame(0))
    series.close()
    with h5py.File(tmp_path / "s_master.h5") as master:
        assert list(master["entry/data"]) == ["data_000001"]
        assert master["entry/data/data_000001"].shape == (1, ROWS, COLUMNS)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("bit_depth", [8, 16, 32])
def test_files_are_as_deep_as_the_detector_counts(tmp_path, bit_depth):
    series = Series(tmp_path / "s", settings(bit_depth=bit_depth))
    series.write(frame(0))
    series.close()
    with h5py.File(tmp_path / "s_data_000001.h5") as file:
        assert file["entry/data/data"].dtype == f"u{bit_depth // 8}"


def test_a_folder_that_is_not_there_is_named_with_the_mend(tmp_path):
    with pytest.raises(OSError, match="missing is no folder: make it"):
        Series(tmp_path / "missing" / "s", settings())


def test_a_series_never_overwrites_another(tmp_path):
    Series(tmp_path / "s", settings()).close()
    with pytest.raises(OSError, match=r"exists: change FWNamePattern, or let it contain \$id"):
        Series(tmp_path / "s", settings())
