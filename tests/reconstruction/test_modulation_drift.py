"""Where the crystal stood: from the counts of one frame, from sentinels, from all waves together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.fourier import fft2
from bcmi_beamline.reconstruction.modulation.chain import combine, even_out
from bcmi_beamline.reconstruction.modulation.drift import sentinel_shifts, shift_equations, smooth_walk
from bcmi_beamline.reconstruction.modulation.driver import EVENED
from bcmi_beamline.reconstruction.modulation.focus import Unevenness, focus_moving
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    Window,
    slow_transform,
)
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, move

GEOMETRY = Geometry(modulator_distance=1e-3)
PIXEL = 38e-9
N = 96
ANSCOMBE = 0.375


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)
    window = Window((16, 14))
    film = np.exp(-2.4j * rng.integers(0, 2, (N, N)))
    centres = np.zeros((3, 2), int)
    optics = (PIXEL, PIXEL), GEOMETRY.wavelength, 1e-3, 5.0, (N, N)
    operator = FrameOperator(film, window, *optics, centres, (80, 80), neighbour=0.05)
    rocking = RockingOperator(GEOMETRY, np.array([-0.02, 0.0, 0.02]), (PIXEL, PIXEL), window)
    targets = np.ones((3, N, N), np.float32)
    region = np.ones((4, *window.shape), bool)
    return Problem(operator, rocking, targets, np.ones(3, np.float32), np.ones(3, np.float32), region, 1e-7)


@pytest.fixture(scope="module")
def wave():
    y, x = np.mgrid[-8:8, -7:7]
    wave = np.exp(-(x**2 + 0.7 * y**2) / 9 + 0.08j * x * y + 0.4j * x)
    return (300 * wave / np.linalg.norm(wave)).astype(np.complex64)


def counts_of(problem, wave, frame, shift):
    psi = problem.operator.forward(wave, frame, np.asarray(shift) * problem.metres_per_pixel)
    return problem.operator.intensity(psi)


def settle(problem, wave, counts, frame=1):
    target, shift = np.sqrt(counts + np.float32(ANSCOMBE)), np.zeros(2)
    for _ in range(8):
        normal, right = shift_equations(problem, wave, target, frame, shift)
        shift = shift + np.linalg.solve(normal, right)
    return shift, normal


def test_a_frame_tells_how_far_the_crystal_stands_off_whatever_its_flux(problem, wave):
    for frame, away in ((1, (0.4, -0.3)), (0, (-0.2, 0.5))):
        shift, _ = settle(problem, wave, 0.93 * counts_of(problem, wave, frame, away), frame)
        np.testing.assert_allclose(shift, away, atol=3e-3)


def test_the_error_of_a_shift_is_what_counting_noise_makes_it(problem, wave):
    rng = np.random.default_rng(2)
    still = counts_of(problem, wave, 1, (0, 0))
    found = [settle(problem, wave, rng.poisson(still).astype(np.float32)) for _ in range(60)]
    scatter = np.cov(np.array([shift for shift, _ in found]).T)
    predicted = np.linalg.inv(4 * found[0][1])
    ratio = np.sqrt(np.diag(scatter) / np.diag(predicted))
    assert (ratio > 0.7).all() and (ratio < 1.4).all()


def test_pixels_not_in_use_say_nothing(problem, wave):
    counts = counts_of(problem, wave, 1, (0.2, 0.1))
    target = np.sqrt(counts + np.float32(ANSCOMBE))
    target[30:40] = -1
    target[:, 50:60] = -2 - 1e6  # free pixels hold their counts
    normal, right = shift_equations(problem, wave, target, 1, np.zeros(2))
    step = np.linalg.solve(normal, right)
    np.testing.assert_allclose(step, (0.2, 0.1), atol=0.05)


def test_sentinels_show_a_walk_and_a_jump_in_the_order_they_were_taken(problem, wave):
    places = np.array([(0.0, 0.0), (0.3, -0.2), (1.4, 0.7), (1.5, 0.6)])
    targets = np.sqrt(np.stack([counts_of(problem, wave, 1, p) for p in places]) + np.float32(ANSCOMBE))
    mixed = np.array([2, 0, 3, 1])
    shifts, after = sentinel_shifts(problem, wave, 1, targets[mixed], np.array([0, 20, 40, 60])[mixed])
    np.testing.assert_array_equal(after, [0, 20, 40, 60])
    np.testing.assert_allclose(shifts, places, atol=5e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), step=st.floats(0.02, 0.3))
def test_places_that_are_known_stay_and_gaps_are_bridged(seed, step):
    rng = np.random.default_rng(seed)
    places = np.cumsum(rng.normal(0, step, (12, 2)), axis=0)
    information = np.tile(1e8 * np.eye(2), (12, 1, 1))
    information[4:7] = 0
    found = smooth_walk(places, information, step)
    known = np.r_[0:4, 7:12]
    np.testing.assert_allclose(found[known], places[known], atol=1e-3)
    line = places[3] + np.arange(1, 4)[:, None] / 4 * (places[7] - places[3])
    np.testing.assert_allclose(found[4:7], line, atol=1e-3)


def test_a_jump_is_not_smoothed_but_noise_is():
    rng = np.random.default_rng(4)
    truth = np.zeros((60, 2))
    truth[33:] = 1.5, -1.0
    measured = truth + rng.normal(0, 0.1, truth.shape)
    found = smooth_walk(measured, np.tile(np.eye(2) / 0.1**2, (60, 1, 1)), 0.03)
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.6 * np.sqrt(np.mean((measured - truth) ** 2))
    assert np.abs(found[33] - found[32] - truth[33]).max() < 0.3


def even_crystal():
    """An even crystal that is strained, its rocking operator and slices; edges soft enough to be moved."""
    rocking = RockingOperator(GEOMETRY, np.arange(-24, 25) * 0.01, (PIXEL, PIXEL), Window((20, 16)))
    zeta, y, x = np.mgrid[-15:15, -10:10, -8:8].astype(float)
    edge = np.maximum(np.abs(x + 0.3 * y) / 4.2, np.maximum(np.abs(y - 0.2 * zeta) / 6, np.abs(zeta) / 7))
    body = 1 / (1 + np.exp(12 * (edge - 1)))
    crystal = (body * np.exp(1j * (0.03 * zeta**2 + 0.05 * zeta * x))).astype(np.complex64)
    return rocking, rocking.matrix(30), crystal


@pytest.mark.parametrize("with_sentinels", [False, True])
def test_a_crystal_that_walks_is_found_where_it_is_most_even(with_sentinels):
    rng = np.random.default_rng(5)
    rocking, matrix, crystal = even_crystal()
    waves, tilt = slow_transform(matrix, crystal), rocking.tilt(slice(None))
    light = np.square(np.abs(waves)).sum(axis=(1, 2))
    path = np.cumsum(rng.normal(0, 0.12, (49, 2)), axis=0)
    path[28:] += 0.9, -0.6
    moved = move(fft2(waves / tilt), path) * tilt
    uneven = Unevenness(moved, matrix, np.ones(crystal.shape, bool), tilt)
    after = np.arange(0, 49, 8)
    sentinels = (path[after] - path[24] + 0.1, after) if with_sentinels else None
    frames = np.flatnonzero(light > 0.01 * light.max())
    part = Unevenness(moved[frames], matrix[frames], np.ones(crystal.shape, bool), tilt[frames])
    start = np.zeros(len(frames))
    phases, shifts = focus_moving(part, rocking.kappa[frames], start, frames, light, sentinels)

    def spread(s):
        beside = s - np.average(s, axis=0, weights=light)
        return np.sqrt(np.average(np.square(beside).sum(axis=1), weights=light))

    assert shifts.shape == path.shape
    still, found, true = (uneven.moved(np.zeros(49), s)[0] for s in (0 * path, shifts, path))
    assert found - true < 0.3 * (still - true)
    assert spread(shifts - path) < (0.25 if with_sentinels else 0.4) * spread(path)
    assert np.abs(phases).max() < 3


def aberrated(phase, walk):
    """A problem whose fitted crystal has a smooth error of its frames' phases and places."""
    rocking, matrix, crystal = even_crystal()
    waves, tilt = slow_transform(matrix, crystal), rocking.tilt(slice(None))
    at = (np.arange(49) - 24) / 8  # most of the light is between -1 and 1
    turned = move(fft2(waves / tilt), np.outer(walk * at**2, (1, -0.7))) * tilt
    turned *= np.exp(1j * phase * at**3)[:, None, None].astype(np.complex64)
    image = slow_transform(matrix.conj().T, turned)
    window = Window(crystal.shape[1:])
    film = np.ones((N, N), np.complex64)
    optics = (PIXEL, PIXEL), GEOMETRY.wavelength, 1e-3, 5.0, (N, N)
    operator = FrameOperator(film, window, *optics, np.zeros((49, 2), int), (80, 80))
    ones, region = np.ones(49, np.float32), np.ones(crystal.shape, bool)
    light = np.square(np.abs(waves)).sum(axis=(1, 2))
    targets = np.sqrt(np.broadcast_to(light[:, None, None], (49, 1, 1)) + np.float32(ANSCOMBE))
    problem = Problem(operator, rocking, targets, ones, ones, region, 1e-7)
    return problem, Solution(image, region, np.zeros((49, 2))), crystal


def alike(a, b):
    """Correlation of two crystals where they fit best, whole pixels of shift."""
    overlap = np.fft.ifftn(np.fft.fftn(a) * np.fft.fftn(b).conj())
    return np.abs(overlap).max() / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_fitted_crystal_with_a_smooth_aberration_is_made_even():
    problem, bent, crystal = aberrated(phase=2.0, walk=1.0)
    evened, gain = even_out(problem, bent)
    assert gain > 0.3
    assert alike(evened.image, crystal) > alike(bent.image, crystal) + 0.02
    again, less = even_out(problem, evened)
    assert less < 0.5 * gain
    assert again.shifts is not None
    assert np.ptp(again.shifts, axis=0).max() > 0


def test_a_crystal_that_is_even_stays_as_it_is():
    problem, right, crystal = aberrated(phase=0.0, walk=0.0)
    evened, gain = even_out(problem, right)
    assert gain < EVENED
    assert alike(evened.image, crystal) > 0.995


def test_a_long_walk_is_begun_where_the_sentinels_stood():
    """Six pixels to and fro: phases that are sought as if the crystal stood still do not lead there."""
    rng = np.random.default_rng(7)
    rocking, matrix, crystal = even_crystal()
    tilt, place = rocking.tilt(slice(None)), np.arange(49)
    path = np.outer(3 * np.sin(place / 5), (1, -0.8)) + np.cumsum(rng.normal(0, 0.05, (49, 2)), axis=0)
    waves = move(fft2(300 * slow_transform(matrix, crystal) / tilt), path) * tilt
    film = np.exp(-2.4j * rng.integers(0, 2, (N, N)))
    optics = (PIXEL, PIXEL), GEOMETRY.wavelength, 1e-3, 5.0, (N, N)
    operator = FrameOperator(film, Window(crystal.shape[1:]), *optics, np.zeros((49, 2), int), (80, 80))
    counts = np.stack([operator.intensity(operator.forward(w, j)) for j, w in enumerate(waves)])
    ones, region = np.ones(49, np.float32), np.ones(crystal.shape, bool)
    problem = Problem(operator, rocking, np.sqrt(counts + np.float32(ANSCOMBE)), ones, ones, region, 1e-7)
    reached, after = np.flatnonzero(problem.counts > 0.01 * problem.counts.max()), np.arange(0, 49, 6)
    found = combine(problem, waves, reached, True, (path[after], after))
    assert alike(found.image, crystal) > 0.97
    assert found.shifts is not None
    beside = found.shifts / problem.metres_per_pixel - path
    beside -= np.average(beside, axis=0, weights=problem.counts)
    assert np.sqrt(np.average(np.square(beside).sum(axis=1), weights=problem.counts)) < 0.3
