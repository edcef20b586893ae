import sys

import h5py
import numpy as np
import pytest
from twins import BEAMLINE, quiet_preset

from bcmi_beamline import cli, data
from bcmi_beamline.sim import Twin, simulate, simulate_ptychography, simulate_rocking
from bcmi_beamline.truth import TRUTH, as_scan, true_object, write_truth

NUISANCES = {
    "drift_nm_per_s": [30.0, 10.0, 0.0],
    "angle_jitter_deg": 0.001,
    "position_error_nm": 20.0,
    "flux_noise": 0.01,
    "ring_lifetime_h": 0.01,
}


def plan(**changes):
    settings = quiet_preset(nuisances=NUISANCES)
    return settings.model_copy(update={"plan": settings.plan.model_copy(update=changes)})


@pytest.fixture(scope="module")
def rocked():
    return simulate_rocking(BEAMLINE, plan(rocking_half_range_deg=0.03, rocking_step_deg=0.01), start_s=10.0)


def test_states_tell_what_readings_do_not(rocked):
    angles = np.array([state.angle_deg for state in rocked.states])
    assert 0 < np.abs(angles - rocked.angles_deg).max() < 0.005
    # the middle of an exposure of 1 s, one every 1.1 s from 10 s on
    times = 10 + 0.5 + 1.1 * np.arange(7)
    crystal = np.array([state.crystal for state in rocked.states])
    np.testing.assert_allclose(crystal, np.outer(times, [30e-9, 10e-9, 0]), rtol=1e-6)
    flux = np.array([state.flux for state in rocked.states])
    np.testing.assert_allclose(rocked.flux, flux / flux.mean(), rtol=1e-6)
    assert np.ptp(rocked.flux) > 0.01


def test_position_of_the_pattern_is_that_of_the_stage_and_its_error():
    settings = plan(spiral_extent_um=(1.0, 0.6), spiral_step_um=0.3)
    made = simulate_ptychography(BEAMLINE, settings)
    true = np.array([state.position for state in made.states])
    error = true - made.positions
    assert 5e-9 < error.std() < 40e-9
    expected = [made.twin._position_error(x, y) for x, y in made.positions]
    np.testing.assert_allclose(error, expected, atol=1e-9)


def test_truth_file_holds_object_modulator_and_states(rocked, tmp_path):
    path = tmp_path / "truth.cxi"
    write_truth(path, rocked)
    assert [p.name for p in tmp_path.iterdir()] == ["truth.cxi"]
    result = data.read_reconstruction(path)
    truth = true_object(BEAMLINE, rocked.twin.preset)
    np.testing.assert_array_equal(result.image, truth.image)
    assert result.shear == (0.0, 0.0)
    frame = rocked.twin.geometry.detector_frame
    moved = np.array([state.crystal for state in rocked.states])
    np.testing.assert_allclose(result.drift, moved @ frame[:2].T, atol=1e-15)
    with h5py.File(path) as file:
        np.testing.assert_allclose(file[f"{TRUTH}/rocking_angle"], [s.angle_deg for s in rocked.states])
        assert file[f"{TRUTH}/modulator_distance"][0] == pytest.approx(1.35e-3)
        modulator = file["entry_1/modulator_1"]
        assert modulator["sample_distance"][()] == pytest.approx(rocked.twin.truth_distance())
        pixel = float(modulator["pixel_size"][()])
        n = modulator["transmission"].shape[0]
        expected = rocked.twin.truth_modulator(pixel, (n, n))
        np.testing.assert_array_equal(modulator["transmission"], expected)
        power = (np.abs(file["entry_1/probe_1/data"][()]) ** 2).sum()
    assert power == pytest.approx(1e6, rel=0.02)
    with pytest.raises(ValueError, match="folder does not exist"):
        write_truth(tmp_path / "absent" / "truth.cxi", rocked)


def test_scan_is_what_a_measurement_records(rocked):
    scan = as_scan(rocked)
    assert scan.frames[:, scan.mask].max() == 0
    assert scan.modulator_position == (0.0, 0.0)
    np.testing.assert_array_equal(scan.angles_deg, rocked.angles_deg)


def test_frames_do_not_depend_on_the_number_of_processes(rocked, monkeypatch):
    monkeypatch.setattr(simulate, "_WORTH_STARTING", 1)
    monkeypatch.setattr(simulate, "_CHUNK", 4)
    again = simulate_rocking(
        BEAMLINE, rocked.twin.preset, twin=Twin(BEAMLINE, rocked.twin.preset), workers=2, start_s=10.0
    )
    np.testing.assert_array_equal(again.frames, rocked.frames)


def simulate_from_shell(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bcmi", "simulate", "rocking", *map(str, arguments)])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


PRESET = """
name = "own"
description = "three angles"
[plan]
modulator_z_um = 1350.0
window = 64
rocking_half_range_deg = 0.02
rocking_step_deg = 0.02
[sim.crystal]
[sim.modulator]
extent_um = 8.0
"""


def test_own_crystal_is_simulated_and_its_truth_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.toml").write_text(PRESET)
    ball = np.ones((21, 15, 17), complex)
    np.savez(tmp_path / "ball.npz", object=ball, voxel_size=[1e-8] * 3)
    out, truth = tmp_path / "scan.cxi", tmp_path / "truth.cxi"
    own = ("--preset", tmp_path / "own.toml", "--crystal", tmp_path / "ball.npz")
    assert simulate_from_shell(monkeypatch, *own, "-o", out, "--truth", truth) == 0
    assert len(data.read_rocking(out).frames) == 3
    assert data.read_reconstruction(truth).image.shape == ball.shape
    assert simulate_from_shell(monkeypatch, *own, "-o", tmp_path / "absent" / "scan.cxi") == 2
    assert "its folder does not exist" in capsys.readouterr().err
