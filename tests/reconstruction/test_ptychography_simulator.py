"""Calibration against the physics simulator, which shares no propagator and no grid with it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import minimize

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.reconstruction.ptychography import calibrate
from bcmi_beamline.scans import PtychographyScan
from bcmi_beamline.sim import Twin, simulate_ptychography


@pytest.mark.end_to_end
def test_small_preset_over_a_smaller_field():
    preset = load_preset("small")
    plan = preset.plan.model_copy(update={"spiral_extent_um": (2.4, 2.0)})
    preset = preset.model_copy(update={"plan": plan})
    twin = Twin(load_beamline(), preset)
    made = simulate_ptychography(twin.beamline, preset, twin=twin)
    geometry = made.geometry
    scan = PtychographyScan(
        made.frames, made.positions, made.mask, geometry.wavelength, geometry.propagation_distance,
        geometry.pixel_size, geometry.modulator_distance, flux=made.flux,
    )  # fmt: skip
    found = calibrate(scan, iterations=12)

    assert found.sample_distance == pytest.approx(twin.truth_distance(), abs=5e-6)
    film_step = 2.469  # rad, 1.5 um of W at 9 keV
    assert found.metadata["phase_step_rad"] == pytest.approx(film_step, abs=0.05)
    truth = twin.truth_modulator(found.pixel_size, (600, 600))
    assert _best_correlation(found, truth, made.modulator_position) >= 0.97


def _best_correlation(found, truth, place) -> float:
    """In the trusted region, over a common shift of a few nanometres: where the crystal's middle is taken."""
    h, w = found.transmission.shape
    lit = found.trusted
    values = found.transmission[lit]

    def mismatch(shift_nm):
        x, y = (np.subtract(found.centre, place) - shift_nm * 1e-9) / found.pixel_size
        middle = len(truth) // 2
        rows, columns = middle + np.arange(h) - h // 2 + y, middle + np.arange(w) - w // 2 - x
        grid = np.meshgrid(rows, columns, indexing="ij")
        real, imaginary = (ndimage.map_coordinates(part, grid)[lit] for part in (truth.real, truth.imag))
        there = real + 1j * imaginary
        return -abs(np.vdot(there, values)) / (np.linalg.norm(there) * np.linalg.norm(values))

    start = np.array([[0.0, 0.0], [15.0, 0.0], [0.0, 15.0]])
    best = minimize(mismatch, [0, 0], method="Nelder-Mead", options={"initial_simplex": start, "maxiter": 30})
    assert np.abs(best.x).max() < 30
    return -best.fun
