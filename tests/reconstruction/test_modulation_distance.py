"""d1 from the crystal's evenness."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.reconstruction.modulation.distance import find_focus, next_distance
from bcmi_beamline.reconstruction.modulation.operators import RockingOperator, Window, slow_transform
from bcmi_beamline.reconstruction.modulation.refine import Solution
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan
from bcmi_beamline.sim import Twin, simulate_rocking

GEOMETRY = Geometry(modulator_distance=3e-3)
PIXEL = 23e-9


def strained_crystal():
    """Even but for its edges, with phases up to 8 rad; the slow axis as a matrix."""
    window = Window((44, 40))
    rocking = RockingOperator(GEOMETRY, np.arange(-40, 41) * 0.008, (PIXEL, PIXEL), window)
    zeta, y, x = np.mgrid[-24:24, -22:22, -20:20].astype(float)
    edge = np.maximum(np.abs(x + 0.3 * y) / 8, np.maximum(np.abs(y - 0.2 * zeta) / 11, np.abs(zeta) / 13))
    body = 1 / (1 + np.exp(14 * (edge - 1)))
    crystal = body * np.exp(1j * (0.02 * zeta**2 + 0.03 * zeta * x + 0.03 * y * x))
    return crystal.astype(np.complex64), rocking.matrix(48), window


@pytest.mark.parametrize("off", [0.0, 7e-6, -12e-6])
def test_a_crystal_out_of_focus_is_brought_back(off):
    """Carried there on a field eight times as wide."""
    crystal, matrix, window = strained_crystal()
    waves = slow_transform(matrix, crystal)
    ny, nx = window.shape
    wide = np.zeros((len(waves), 8 * ny, 8 * nx), complex)
    wide[:, :ny, :nx] = waves
    fy, fx = (np.fft.fftfreq(n, PIXEL) for n in wide.shape[1:])
    upstream = np.exp(1j * np.pi * GEOMETRY.wavelength * off * np.add.outer(fy**2, fx**2))
    waves = np.fft.ifft2(np.fft.fft2(wide) * upstream)[:, :ny, :nx].astype(np.complex64)
    image = slow_transform(matrix.conj().T, waves)
    optics = SimpleNamespace(pixel=(PIXEL, PIXEL), wavelength=GEOMETRY.wavelength)
    problem = SimpleNamespace(operator=optics, matrix=matrix, region=np.ones(crystal.shape, bool))
    focus = find_focus(problem, Solution(image, problem.region))
    assert focus.distance == pytest.approx(off, abs=1e-6)
    assert focus.error < 1e-6


def test_what_two_crystals_show_foretells_where_a_third_is_in_focus():
    assert next_distance([(3.010e-3, 7e-6)]) == pytest.approx(3.003e-3)
    assert next_distance([(3.010e-3, 7e-6), (3.003e-3, 2.1e-6)]) == pytest.approx(3.000e-3)
    far = next_distance([(3.010e-3, 2.0e-6), (3.008e-3, 1.99e-6)])  # they say nothing: no wild step
    assert far == pytest.approx(3.008e-3 - 1.99e-6 / 0.3)


def test_a_wrong_distance_is_corrected_and_the_crystal_with_it():
    """Frames of the simulated beamline, d1 20 um too long; the truth is looked at afterwards."""
    preset = load_preset("small")
    twin = Twin(load_beamline(), preset)
    taken = simulate_rocking(twin.beamline, preset, twin=twin)
    frames = np.where(taken.mask, 0, taken.frames).astype(np.float32)
    position = taken.modulator_position
    scan = RockingScan(frames, taken.angles_deg, taken.mask, taken.geometry, taken.flux, position)
    d1 = twin.truth_distance()
    pixel = scan.geometry.with_modulator(d1).object_pixel(preset.plan.window)
    film = twin.truth_modulator(pixel, (420, 420))
    right = Modulator(film, pixel, d1, 1e-6, position, np.zeros((1, 8, 8), np.complex64))
    wrong = replace(right, sample_distance=d1 + 20e-6)
    asis = modulation.reconstruct(scan, wrong)
    found = modulation.reconstruct(scan, wrong, refine_distance=True)
    image, voxel = twin.truth_object()
    truth = Reconstruction(image, np.abs(image) > 0.5 * np.abs(image).max(), voxel, twin.geometry, (0.0, 0.0))
    assert found.configuration["modulator_distance"] == pytest.approx(d1, abs=4e-6)
    assert found.configuration["modulator_distance_error"] < 4e-6
    assert compare(found, truth).correlation > compare(asis, truth).correlation
    assert found.geometry.modulator_distance == found.configuration["modulator_distance"]
