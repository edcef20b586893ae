"""Light that leaves the window of the detector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.modulation.border import border_for, edge_brightness, with_border
from bcmi_beamline.reconstruction.modulation.slices import frame_counts, make_targets

ROWS = slice(32, 96)


@pytest.fixture(scope="module")
def scan():
    return simulate(make_geometry(), ANGLES)


@pytest.fixture(scope="module")
def narrow(scan):
    return replace(scan, frames=scan.frames[:, ROWS], mask=scan.mask[ROWS])


def targets_of(scan):
    return make_targets(scan, np.zeros(scan.frames.shape, bool))


def test_only_the_axis_that_is_overfilled_gets_a_border(scan, narrow):
    assert border_for(targets_of(scan)) == (0, 0)
    assert border_for(targets_of(narrow)) == (8, 0)
    assert border_for(np.swapaxes(targets_of(narrow), 1, 2)) == (0, 8)


def test_pixels_not_in_use_do_not_make_an_edge_bright():
    targets = np.ones((2, 50, 50), np.float32)
    targets[:, 25] = -1
    targets[:, 24, ::2] = -2 - 1e9
    np.testing.assert_allclose(edge_brightness(targets), (1, 1))
    assert edge_brightness(-np.ones((2, 50, 50), np.float32)) == (0, 0)


def test_a_border_keeps_what_was_measured_about_the_axis_and_measures_nothing_more(narrow):
    plain = targets_of(narrow)
    wide = with_border(plain, (8, 3))
    np.testing.assert_array_equal(np.fft.fftshift(wide[5])[8:-8, 3:-3], np.fft.fftshift(plain[5]))
    np.testing.assert_array_equal(wide[:, 0, 0], plain[:, 0, 0])
    np.testing.assert_allclose(frame_counts(wide), frame_counts(plain), rtol=1e-5)
    assert (wide >= 0).sum() == (plain >= 0).sum()


def test_a_crystal_whose_light_leaves_the_window_comes_out_right(narrow):
    """Of the light of the 128 rows 4 % are not on these 64; without a border nothing is found (0.05)."""
    result = modulation.reconstruct(narrow, make_modulator(narrow.geometry), iterations=8)
    assert result.metadata["border"] == [8, 0]
    assert result.voxel_size[1] == pytest.approx(narrow.geometry.object_pixel(80))
    assert correlate(result) > 0.97
