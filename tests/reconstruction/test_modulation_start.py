"""The crystal of a rocking scan stands elsewhere than when its beam was calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, Grains, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.modulation.driver import central_wave
from bcmi_beamline.reconstruction.modulation.operators import Window
from bcmi_beamline.reconstruction.modulation.prepare import frame_trust, optics, prepare
from bcmi_beamline.reconstruction.modulation.start import excess, thinned
from bcmi_beamline.reconstruction.modulation.support import window_around
from bcmi_beamline.reconstruction.threads import one_thread_per_product

MOVED = (240e-9, -310e-9)
"""(x', y') m: more than the room that a window leaves about a crystal."""

SECTION = ANGLES[12:29]


def calibrated(geometry, moved):
    """The modulator, with the beam of a crystal that stood at `moved`."""
    modulator = make_modulator(geometry)
    size = modulator.transmission.shape[0] - 24
    at = (np.arange(size) - size // 2) * modulator.pixel_size
    beam = Grains(geometry).wave(at, -at, 0.0, geometry.modulator_distance, moved)
    return replace(modulator, probe=beam[None].astype(np.complex64))


@pytest.fixture(scope="module")
def scan():
    return simulate(make_geometry(), SECTION, photons=2e6)


def test_the_beam_of_a_crystal_that_has_moved_since_is_found(scan):
    with one_thread_per_product():
        here = prepare(scan, calibrated(scan.geometry, (0.0, 0.0)))
        there = prepare(scan, calibrated(scan.geometry, MOVED))
    assert here.beam is not None and there.beam is not None
    wave, frame = there.beam
    assert frame == len(SECTION) // 2
    assert excess(there.operator, wave, there.targets[frame], frame) < 1.2
    assert here.operator.window.shape == there.operator.window.shape
    offset = np.subtract(here.operator.window.centre, there.operator.window.centre)
    assert np.abs(offset).max() <= 1  # the window follows the crystal, not the calibration


def test_a_start_from_a_beam_that_has_moved_is_as_good_as_any(scan):
    modulator = calibrated(scan.geometry, MOVED)
    options = {"iterations": 6, "drift": "none"}
    found = modulation.reconstruct(scan, modulator, start="probe", **options)
    other = modulation.reconstruct(scan, make_modulator(scan.geometry), **options)
    assert found.free_llk is not None and other.free_llk is not None
    assert found.free_llk[0, -1] < 1.02 * other.free_llk[0, -1]
    assert correlate(found) > correlate(other) - 0.01


def test_a_beam_that_fits_nowhere_is_left_aside(scan):
    here = calibrated(scan.geometry, (0.0, 0.0))
    with one_thread_per_product():
        plain = prepare(scan, make_modulator(scan.geometry))
        for probe in (here.probe[:, ::-1, ::-1], here.probe.conj()):  # another crystal; one out of focus
            problem = prepare(scan, replace(here, probe=np.ascontiguousarray(probe)))
            assert problem.beam is None
            assert problem.operator.window == plain.operator.window
            wave, frame = central_wave(problem, np.random.default_rng(0), "probe")
            assert excess(problem.operator, wave, problem.targets[frame], frame) < 1.2


def test_a_crystal_off_the_axis_is_found_from_noise():
    """The edge of the first window cuts it; in a larger one its phases would fail, and noise fill it all."""
    x, y = 180e-9, -230e-9
    there = simulate(make_geometry(), SECTION, photons=2e6, drift=[(x, y)] * len(SECTION))
    with one_thread_per_product():
        operator = prepare(there, make_modulator(there.geometry)).operator
    assert max(operator.window.shape) <= 24
    assert np.abs(operator.window.centre - np.array([-y, x]) / operator.pixel).max() < 2


def test_a_window_holds_the_wave_and_not_the_noise_beside_it():
    rng = np.random.default_rng(0)
    wave = 0.02 * (rng.normal(size=(60, 50)) + 1j * rng.normal(size=(60, 50)))
    wave[20:36, 12:20] += 1  # the crystal, in two parts
    wave[20:36, 22:30] -= 1
    wave[50:52, 3:5] += 0.6  # a speck
    window, whole = window_around(wave, Window(wave.shape))
    assert whole
    rows, columns = window.indices(0) + 30, window.indices(1) + 25
    assert rows[0] < 20 and rows[-1] >= 35 and len(rows) < 40
    assert columns[0] < 12 and columns[-1] >= 29 and len(columns) < 42
    assert not window_around(wave[:32], Window((32, 50)))[1]


def test_few_pixels_see_what_all_see(scan):
    rng = np.random.default_rng(0)
    operator = optics(scan, make_modulator(scan.geometry), SECTION).operator_on(Window((22, 22)))
    wave = rng.normal(size=(22, 22, 2)).astype(np.float32).view(np.complex64)[..., 0]
    target = rng.random(operator.detector_shape).astype(np.float32)
    few, seen = thinned(operator, target)
    assert few.detector_shape == (64, 64) and np.array_equal(seen, target[::2, ::2])
    ratio = few.forward(wave, 3) / operator.forward(wave, 3)[::2, ::2]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_trust_is_the_part_of_the_light_that_meets_the_known_map(scan):
    with one_thread_per_product():
        problem = prepare(scan, calibrated(scan.geometry, (0.0, 0.0)))
    operator, rocking = problem.operator, problem.rocking
    window = np.multiply.outer(*(np.hanning(n + 2)[1:-1] for n in operator.window.shape))
    wave = (window * rocking.tilt(slice(4, 5))[0]).astype(np.complex64)
    light = np.abs(operator.to_modulator(wave, 4)) ** 2
    rows, columns = (operator.patch_indices(4, axis) + 300 for axis in (0, 1))
    inner = [np.searchsorted(light.sum(axis).cumsum() / light.sum(), 0.1) for axis in (1, 0)]
    trusted = np.zeros((600, 600), bool)
    trusted[rows[inner[0]] :, columns[inner[1]] :] = True  # known from there on
    expected = light[inner[0] :, inner[1] :].sum() / light.sum()
    assert 0.5 < expected < 0.9
    assert frame_trust(operator, trusted, rocking)[4] == pytest.approx(expected, abs=0.02)
