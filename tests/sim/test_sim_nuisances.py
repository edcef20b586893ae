import numpy as np
import pytest
from twins import BEAMLINE, quiet_preset, sphere

from bcmi_beamline.config import Nuisances
from bcmi_beamline.sim import Twin
from bcmi_beamline.sim.nuisances import (
    DAY,
    AngleError,
    Drift,
    ModulatorDrift,
    RingCurrent,
    Temperatures,
)


def twin(**nuisances):
    return Twin(BEAMLINE, quiet_preset(nuisances=nuisances), sphere(60e-9, 10e-9))


def test_jumps_have_their_length_and_come_at_random():
    drift = Drift(Nuisances(jump_nm=30.0, jump_every_s=200.0))
    times = drift.jump_times[drift.jump_times < DAY]
    assert len(times) == pytest.approx(DAY / 200, rel=0.15)
    waits = np.diff(times)
    assert waits.std() == pytest.approx(waits.mean(), rel=0.15)  # exponential
    for time in times[:5]:
        step = drift(time + 1e-3) - drift(time - 1e-3)
        assert np.linalg.norm(step) == pytest.approx(30e-9)
        np.testing.assert_array_equal(drift(time + 1e-3), drift(time + 1.1e-3))


def test_creep_dies_away():
    drift = Drift(Nuisances(creep_nm=(40.0, 0.0, -10.0), creep_time_s=100.0))
    np.testing.assert_array_equal(drift(0.0), 0)
    np.testing.assert_allclose(drift(100.0), np.array([40e-9, 0, -10e-9]) * (1 - np.exp(-1)))
    np.testing.assert_allclose(drift(1e5), [40e-9, 0, -10e-9])


def test_modulator_drifts_in_the_frame_of_its_stage():
    drift = ModulatorDrift(Nuisances(modulator_drift_nm_per_sqrt_s=3.0))
    path = np.array([drift(float(t)) for t in range(20000)])
    assert (path[100:] - path[:-100]).std() == pytest.approx(30e-9, rel=0.15)
    moving = twin(modulator_drift_nm_per_s=[2.0, -1.0])
    origins = [moving._placement(moving.aligned_pose(), time).origin for time in (0.0, 50.0)]
    # row sense: +y is -rows
    np.testing.assert_allclose(origins[1] - origins[0], [100e-9, 50e-9], rtol=1e-6)


def test_jitter_is_new_in_every_exposure_and_has_its_width():
    error = AngleError(Nuisances(angle_jitter_deg=0.001))
    many = np.array([error(17.7, float(t)) for t in range(2000)])
    assert many.std() == pytest.approx(0.001, rel=0.06)
    assert error(17.7, 3.0) == error(17.7, 3.0) != error(17.7, 4.0)


def test_encoder_errs_periodically_in_the_angle():
    error = AngleError(Nuisances(encoder_error_deg=0.002, encoder_period_deg=0.036))
    angles = np.linspace(17, 18, 2000)
    errors = np.array([error(a, 0.0) for a in angles])
    assert np.abs(errors).max() == pytest.approx(0.002, rel=1e-3)
    np.testing.assert_allclose([error(a + 0.036, 5.0) for a in angles[:50]], errors[:50], atol=1e-12)


def test_angle_errors_turn_the_crystal():
    made = twin(encoder_error_deg=0.002)
    pose = made.aligned_pose()
    error = made._angle_error(pose["phi"], 0.0)
    assert error != 0
    assert made.truth_state(pose, 1.0).angle_deg == pytest.approx(error, rel=1e-6)


def test_ring_decays_and_is_topped_up():
    current = RingCurrent(Nuisances(ring_lifetime_h=20.0, top_up_every_s=3600.0), 200.0)
    assert current(0.0) == current(3600.0) == 200.0
    assert current(3599.0) == pytest.approx(200 * np.exp(-1 / 20), rel=1e-4)
    assert RingCurrent(Nuisances(), 200.0)(1e5) == 200.0


def test_beam_is_dumped_and_comes_back_full():
    current = RingCurrent(Nuisances(ring_lifetime_h=20.0, beam_dumps=[(100.0, 50.0)]), 200.0)
    assert 0 < current(99.0) < 200
    assert current(100.0) == current(149.0) == 0
    assert current(150.0) == 200.0
    assert current(151.0) < 200
    dark = twin(beam_dumps=[(100.0, 50.0)])
    good = dark.detector.pixel_mask == 0
    frames = [dark.frame({}, 1.0, time)[good].sum() for time in (90.0, 120.0, 160.0)]
    assert frames[1] == 0 < min(frames[0], frames[2])
    assert dark.flux(120.0) == 0 and dark.ring_current(120.0) == 0


def test_temperatures_swing_about_their_means_each_in_its_own_time():
    read = Temperatures(
        Nuisances(temperature_swing_k=0.2, temperature_period_s=1000.0), ["hutch", "cryostat"]
    )
    values = np.array([list(read(t).values()) for t in np.linspace(0, 1000, 201)])
    np.testing.assert_allclose(values.mean(axis=0), [22.5, 23.0], atol=0.01)
    np.testing.assert_allclose(np.ptp(values, axis=0), 0.4, atol=0.01)
    assert np.argmax(values[:, 0]) != np.argmax(values[:, 1])
    assert set(twin().temperatures(0.0)) == set(BEAMLINE.temperatures)


def test_warmth_moves_modulator_crystal_and_energy_by_what_is_stated():
    warm = twin(temperature_swing_k=0.5, modulator_nm_per_k=[20.0, 10.0], crystal_nm_per_k=[0.0, 40.0, 0.0])
    time = 1234.0
    readings = [warm.temperatures(t) for t in (0.0, time)]
    rise = {name: readings[1][name] - readings[0][name] for name in readings[0]}
    origins = [warm._placement(warm.aligned_pose(), t).origin for t in (0.0, time)]
    expected = np.array([20e-9, -10e-9]) * rise["nanogoniometer"]
    np.testing.assert_allclose(origins[1] - origins[0], expected, rtol=1e-6)
    np.testing.assert_allclose(warm.drift(time), [0, 40e-9 * rise["hutch"], 0], rtol=1e-6)
    energy = warm.truth_state({}, 1e-9, time).energy_ev
    assert energy - 9000 == pytest.approx(-9000 * 2.6e-6 * rise["monochromator"], rel=1e-4)
    assert rise["nanogoniometer"] != 0
