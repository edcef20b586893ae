"""The crystal of a rocking scan stands elsewhere than when its beam was calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, Grains, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.modulation.driver import central_wave, prepare
from bcmi_beamline.reconstruction.modulation.start import excess
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
