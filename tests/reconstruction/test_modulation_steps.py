"""The pieces of the BCMI engine, each alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.modulation.chain import neighbour_weights, walk_outward
from bcmi_beamline.reconstruction.modulation.coherence import nodes
from bcmi_beamline.reconstruction.modulation.focus import Unevenness, focus
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    FresnelKernel,
    RockingOperator,
    Window,
    place_modulator,
    slow_transform,
)
from bcmi_beamline.reconstruction.modulation.slices import descend, descend_together, modulus_step, solve_wave
from bcmi_beamline.reconstruction.modulation.slicewise import newton_shift
from bcmi_beamline.reconstruction.modulation.support import (
    sheared_box,
    shrink_wrap,
    thickness_from_counts,
    window_around,
)
from bcmi_beamline.reconstruction.modulation.synchronise import synchronise
from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, RockingScan

WAVELENGTH = 0.13776e-9
PIXEL = 38e-9


def noise(rng, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def make_operator(
    rng, reach=(60, 56), n=48, window=None, centres=((0, 0), (9, -31)), neighbour=0.05, modulator=None
):
    if modulator is None:
        modulator = np.exp(-2.4j * rng.integers(0, 2, (2 * n, 2 * n)))
    window = window or Window((12, 10), (2, -3))
    optics = (PIXEL, PIXEL), WAVELENGTH, 1e-3, 5.0, (n, n)
    return FrameOperator(modulator, window, *optics, np.array(centres), reach, neighbour)


@pytest.mark.parametrize("reach", [(30, 26), (60, 56)])  # within the detector's field, and folded
@pytest.mark.parametrize("frame", [0, 1])
def test_forward_and_adjoint_belong_together(reach, frame):
    rng = np.random.default_rng(0)
    operator = make_operator(rng, reach)
    shift = rng.normal(size=2) * 30e-9
    wave, psi = noise(rng, 12, 10), noise(rng, 48, 48)
    there = np.vdot(psi, operator.forward(wave, frame, shift))
    back = np.vdot(operator.adjoint(psi.copy(), frame, shift), wave)
    assert there == pytest.approx(back, rel=1e-4)


def test_a_crystal_that_moves_is_followed_and_frames_of_others_are_their_own():
    """The matrices of a frame are kept; those of another shift or walk must not be."""
    rng = np.random.default_rng(6)
    operator, wave, shifts = make_operator(rng), noise(rng, 12, 10), [(0.0, 0.0), (3e-8, -2e-8)]
    seen = [operator.forward(wave, 0, shift) for shift in (*shifts, *shifts)]
    assert np.abs(seen[1] - seen[0]).max() > 0.1 * np.abs(seen[0]).max()
    for once, again in zip(seen[:2], seen[2:], strict=True):
        np.testing.assert_array_equal(again, once)
    other = operator.for_frames(np.array([(4, -9)]) - operator.window.centre)
    assert np.abs(other.forward(wave) - seen[0]).max() > 0.1 * np.abs(seen[0]).max()
    np.testing.assert_array_equal(operator.forward(wave), seen[0])


def test_propagation_matches_the_transfer_function_on_a_wide_grid():
    rng = np.random.default_rng(1)
    window = Window((12, 10), (2, -3))
    smooth = np.hanning(14)[1:-1, None] * np.hanning(12)[1:-1]
    wave = (smooth * np.exp(1j * rng.normal() * smooth)).astype(np.complex64)
    operator = make_operator(rng, (128, 100), n=128, window=window, centres=[(0, 7)])
    wide = np.zeros((256, 256), np.complex64)
    wide[np.ix_(128 + window.indices(0), 128 + window.indices(1))] = wave
    expected = propagate(wide, (PIXEL, PIXEL), WAVELENGTH, 1e-3)
    rows, columns = (128 + operator.patch_indices(0, axis) for axis in (0, 1))
    light = operator.to_modulator(wave)
    np.testing.assert_allclose(light, expected[np.ix_(rows, columns)], atol=5e-4 * np.abs(light).max())


@pytest.mark.parametrize("beyond", [0.4, 1.3])
def test_light_that_walks_off_is_followed_even_beyond_the_band_of_the_pixels(beyond):
    """Against a transform on pixels three times finer, which hold the carrier of the wave."""
    n, fine = 256, 3
    carrier = beyond / (2 * PIXEL)
    walk = round(carrier * WAVELENGTH * 1e-3 / PIXEL)
    carrier = walk * PIXEL / (WAVELENGTH * 1e-3)
    at = (np.arange(fine * n) - fine * n // 2) * PIXEL / fine
    beam = np.exp(-((at / (4 * PIXEL)) ** 2))
    finest = np.multiply.outer(beam, beam * np.exp(2j * np.pi * carrier * at)).astype(np.complex64)
    expected = propagate(finest, (PIXEL / fine, PIXEL / fine), WAVELENGTH, 1e-3)
    window = Window((24, 24))
    optics = (PIXEL, PIXEL), WAVELENGTH, 1e-3, 5.0, (n, n)
    at = np.array([(0, walk)])
    operator = FrameOperator(np.ones((2, 2)), window, *optics, at, (84, 84), walk=at)
    rows, columns = (fine * (n // 2 + window.indices(axis)) for axis in (0, 1))
    light = operator.to_modulator(finest[np.ix_(rows, columns)])
    rows, columns = (fine * (n // 2 + operator.patch_indices(0, axis)) for axis in (0, 1))
    np.testing.assert_allclose(light, expected[np.ix_(rows, columns)], atol=1e-3 * np.abs(light).max())


def test_a_patch_wider_than_the_detectors_field_gives_the_waves_at_the_pixels():
    """Pixels sample the far field: every second point of a transform twice as long."""
    rng = np.random.default_rng(12)
    modulator = np.exp(-2.4j * rng.integers(0, 2, (96, 96)))
    operator = make_operator(rng, (90, 90), centres=[(3, -2)], modulator=modulator)
    at = [operator.patch_indices(0, axis) for axis in (0, 1)]
    sphere = [np.exp(1j * np.pi * (a * PIXEL) ** 2 / (WAVELENGTH * 5.0)) for a in at]
    film = modulator[np.ix_(at[0] + 48, at[1] + 48)] * np.multiply.outer(*sphere)
    wave = noise(rng, 12, 10)
    long = np.zeros((96, 96), np.complex64)
    rows, columns = (operator.patch_indices(0, axis) % 96 for axis in (0, 1))
    long[np.ix_(rows, columns)] = operator.to_modulator(wave) * film
    expected = 2 * np.fft.fft2(long, norm="ortho")[::2, ::2]
    np.testing.assert_allclose(operator.forward(wave), expected, atol=1e-4)


def test_the_patch_may_follow_the_light():
    """A patch off the axis shows the same wave: the detector cannot tell where the origin is."""
    modulator = np.exp(-2.4j * np.random.default_rng(13).integers(0, 2, (96, 96)))
    wave = np.zeros((12, 10), np.complex64)
    wave[3:9, 2:8] = 1
    seen = []
    for centre, reach in (((0, 0), (90, 90)), ((4, -3), (74, 74))):
        optics = (PIXEL, PIXEL), WAVELENGTH, 2e-4, 5.0, (48, 48)
        operator = FrameOperator(modulator, Window((12, 10)), *optics, np.array([centre]), reach)
        seen.append(operator.intensity(operator.forward(wave)))
    np.testing.assert_allclose(seen[1], seen[0], atol=0.02 * seen[0].max())


def test_a_pixel_integrates_the_fringes_that_cross_it():
    n = 64
    operator = make_operator(np.random.default_rng(0), n=n)
    at = np.fft.fftfreq(n, 1 / n)
    for cycles in (4, 9, 16):
        u = cycles / n
        fringe = np.sqrt((1 + np.cos(2 * np.pi * u * at))[:, None] * np.ones(n)).astype(np.complex64)
        found = operator.intensity(fringe)
        contrast = (found.max() - found.min()) / 2
        assert contrast == pytest.approx(np.sinc(u), abs=0.015)


def test_a_moved_crystal_moves_the_light_the_same_way():
    operator = make_operator(np.random.default_rng(2), window=Window((16, 16)))
    wave = np.zeros((16, 16), np.complex64)
    wave[8, 8] = 1
    moved = np.zeros_like(wave)
    moved[6, 11] = 1
    shifted = operator.to_modulator(wave, 0, (3 * PIXEL, 2 * PIXEL))
    np.testing.assert_allclose(shifted, operator.to_modulator(moved), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(distance=st.floats(1e-5, 2e-4), shift=st.floats(-3, 3))
def test_near_field_matrix_keeps_the_light(distance, shift):
    x = np.arange(-8, 8)
    matrix = FresnelKernel(PIXEL, WAVELENGTH, distance, 80).matrix((-64, 128, 1), x, 0, shift * PIXEL)
    smooth = np.exp(-(x**2) / 8)
    assert np.linalg.norm(matrix @ smooth) == pytest.approx(np.linalg.norm(smooth), rel=1e-3)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize(("neighbour", "background"), [(0.0, 0.0), (0.05, 0.0), (0.05, 20.0)])
def test_the_direction_is_the_gradient(neighbour, background, poisson):
    rng = np.random.default_rng(3)
    operator = make_operator(rng, neighbour=neighbour).over(background)
    truth = 8 * noise(rng, 12, 10)
    counts = rng.poisson(operator.intensity(operator.forward(truth))).astype(np.float32)
    target = np.sqrt(counts + np.float32(0.375))
    target[:4] = -1
    target[10] = -2 - counts[10]
    wave = truth + noise(rng, 12, 10)
    if poisson:  # a step is limited where many more counts were seen than are expected
        expected = operator.intensity(operator.forward(wave))
        target[counts + 0.375 > 3 * (expected + 0.375)] = -1
    direction, _, _ = descend(operator, wave, target, 0, poisson=poisson)
    way = noise(rng, 12, 10)

    def misfit(t):
        seen = operator.intensity(operator.forward(wave + np.float32(t) * way)).astype(float) + 0.375
        if poisson:
            return 0.5 * (seen - (counts + 0.375) * np.log(seen))[target >= 0].sum()
        return ((np.sqrt(seen) - target) ** 2)[target >= 0].sum()

    step = 0.02
    slope = (misfit(step) - misfit(-step)) / (2 * step)
    assert slope == pytest.approx(-2 * np.vdot(direction, way).real / operator.step, rel=2e-3)


def test_the_directions_of_waves_whose_intensities_add_up_are_the_gradient():
    rng = np.random.default_rng(5)
    operator = make_operator(rng, neighbour=0.05).over(3.0)
    truth = np.stack([8 * noise(rng, 12, 10), 4 * noise(rng, 12, 10), 2 * noise(rng, 12, 10)])

    def counts_of(waves):
        return sum(operator.over(0.0).intensity(operator.forward(w)) for w in waves) + 3.0

    counts = rng.poisson(counts_of(truth)).astype(np.float32)
    target = np.sqrt(counts + np.float32(0.375))
    target[:4] = -1
    waves, ways = truth + noise(rng, 3, 12, 10), noise(rng, 3, 12, 10)
    directions, misfit, _ = descend_together(operator, waves, target, 0)

    def misfit_at(t):
        modulus = np.sqrt(counts_of(waves + np.float32(t) * ways).astype(float) + 0.375)
        return ((modulus - target) ** 2)[target >= 0].sum()

    step = 0.02
    slope = (misfit_at(step) - misfit_at(-step)) / (2 * step)
    assert slope == pytest.approx(-2 * np.vdot(directions, ways).real / operator.step, rel=2e-3)
    assert misfit == pytest.approx(misfit_at(0), rel=1e-4)


def test_one_wave_among_several_is_one_wave():
    rng = np.random.default_rng(6)
    operator = make_operator(rng)
    wave = 5 * noise(rng, 12, 10)
    target = np.sqrt(rng.poisson(3.0, operator.detector_shape).astype(np.float32) + np.float32(0.375))
    alone, *sums = descend(operator, wave, target, 0)
    together, *same = descend_together(operator, np.stack([wave, 0 * wave]), target, 0)
    np.testing.assert_allclose(together[0], alone, atol=1e-5 * np.abs(alone).max())
    assert not together[1].any()
    assert same == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.5, 2.5])
def test_few_points_of_a_source_make_the_degree_of_coherence_asked_for(ratio):
    tilts, shares = nodes(ratio)
    assert shares.sum() == pytest.approx(1)
    places = ratio * np.random.default_rng(1).random((2, 20000))  # pairs of points of an even crystal
    lags = places[1] - places[0]
    degree = np.cos(np.multiply.outer(lags, tilts)) @ shares
    assert np.abs(degree - np.exp(-(lags**2) / 2)).mean() < 0.021


def test_a_wave_is_solved_in_few_steps_and_no_step_climbs():
    rng = np.random.default_rng(17)
    operator = make_operator(rng)
    truth = 30 * noise(rng, 12, 10)
    counts = rng.poisson(operator.intensity(operator.forward(truth))).astype(np.float32)
    target = np.sqrt(counts + np.float32(0.375))
    target[:4] = -1
    guess = truth + 10 * noise(rng, 12, 10)
    misfits = [solve_wave(operator, guess, target, 0, n, settled=0.0)[1] for n in range(1, 9)]
    assert (np.diff(misfits) < 0).all()
    _, misfit = solve_wave(operator, guess, target, 0, 30)
    assert misfit / (target >= 0).sum() < 0.27  # photon noise alone gives 1/4


@pytest.mark.parametrize("neighbour", [0.0, 0.05])
@pytest.mark.parametrize("background", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(12, 12), (13, 35), (3, 70)])
def test_fused_modulus_step_equals_the_plain_formula(neighbour, background, shape):
    rng = np.random.default_rng(4)
    psi = 5 * noise(rng, *shape)
    counts = rng.poisson(50, shape).astype(np.float32)
    counts[0] = 0
    target = np.sqrt(counts + np.float32(0.375))
    target[-1, :5] = -1
    free = np.zeros(target.shape, bool)
    free[:2, ::2] = True
    target[free] = -2 - counts[free]

    def stencil(a):
        for axis in (0, 1):
            a = (1 - 2 * neighbour) * a + neighbour * (np.roll(a, 1, axis) + np.roll(a, -1, axis))
        return a

    model = stencil(np.abs(psi) ** 2) + background
    used = target >= 0
    expected = psi * stencil(np.where(used, target / np.sqrt(model + 0.375) - 1, 0))
    misfit = (np.where(used, np.sqrt(model + 0.375) - target, 0) ** 2).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        llk = model - counts + np.where(counts > 0, counts * np.log(counts / model), 0)
    found = modulus_step(psi, target, neighbour, background)
    np.testing.assert_allclose(psi, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, (misfit, (llk * free).sum()), rtol=1e-3)


# -- placing the modulator -------------------------------------------------------------------------------
GEOMETRY = Geometry(modulator_distance=1e-3)


def make_pair(transmission, pixel, position=(0.0, 0.0), trusted=None):
    modulator = Modulator(
        transmission.astype(np.complex64),
        pixel,
        1e-3,
        1e-6,
        (0.0, 0.0),
        np.zeros((1, 2, 2), np.complex64),
        trusted,
    )
    frames = np.ones((2, 64, 64), np.float32)
    scan = RockingScan(
        frames, np.array([0.0, 0.1]), np.zeros((64, 64), bool), GEOMETRY, modulator_position=position
    )
    return modulator, scan


def smooth_map(n, pixel, x0=0.0, y0=0.0):
    at = (np.arange(n) - n // 2) * pixel
    r2 = (at - x0) ** 2 + (-at - y0)[:, None] ** 2
    return np.exp(-2j * np.exp(-r2 / (2 * (150e-9) ** 2)))


def test_same_grid_is_copied_and_moved_by_whole_pixels():
    rng = np.random.default_rng(5)
    transmission = np.exp(1j * rng.random((40, 44)))
    modulator, scan = make_pair(transmission, PIXEL, (3 * PIXEL, 2 * PIXEL))
    patch, trusted = place_modulator(modulator, scan, (64, 64), (PIXEL, PIXEL))
    expected, inside = np.ones((64, 64), complex), np.zeros((64, 64), bool)
    rows, columns = slice(32 - 20 - 2, 32 + 20 - 2), slice(32 - 22 + 3, 32 + 22 + 3)
    expected[rows, columns], inside[rows, columns] = transmission, True
    np.testing.assert_allclose(patch, expected, atol=1e-5)
    np.testing.assert_array_equal(trusted, inside)


def test_another_pixel_and_a_fraction_of_it_are_resampled():
    moved = (0.31 * PIXEL, -1.43 * PIXEL)
    modulator, scan = make_pair(smooth_map(120, 27e-9), 27e-9, moved)
    patch, _ = place_modulator(modulator, scan, (64, 64), (PIXEL, PIXEL))
    np.testing.assert_allclose(patch, smooth_map(64, PIXEL, *moved), atol=2e-3)


# -- the slow axis ---------------------------------------------------------------------------------------
def test_uneven_angles_follow_the_phase_convention():
    angles = np.array([-0.11, -0.03, 0.0, 0.052, 0.13])
    rocking = RockingOperator(GEOMETRY, angles, (PIXEL, PIXEL), Window((4, 6)))
    matrix = rocking.matrix(9)
    phase = np.deg2rad(angles[3]) * GEOMETRY.rocking_gradient[2] * (7 - 4) * rocking.voxel
    assert matrix[3, 7] == pytest.approx(np.exp(1j * phase) / np.sqrt(5), rel=1e-5)
    even = RockingOperator(GEOMETRY, np.arange(-10, 11) * 0.01, (PIXEL, PIXEL), Window((4, 6)))
    assert even.voxel == pytest.approx(GEOMETRY.rocking_voxel(21, 0.01))
    np.testing.assert_allclose(even.matrix(21).conj().T @ even.matrix(21), np.eye(21), atol=1e-5)


def test_one_angle_is_no_rocking_curve():
    with pytest.raises(ValueError, match="two angles"):
        RockingOperator(GEOMETRY, np.array([0.1, 0.1]), (PIXEL, PIXEL), Window((4, 4)))


def sheared_crystal(rng, rocking, n_zeta):
    box = sheared_box(rocking, n_zeta, 0.45 * n_zeta * rocking.voxel)
    box[:, :3], box[:, -3:], box[:, :, :3], box[:, :, -3:] = False, False, False, False
    box[n_zeta // 2 + 2 :, 8:, 8:] = False  # no symmetry
    return box, noise(rng, *box.shape) * box


def test_lost_phases_come_back_from_the_support():
    rng = np.random.default_rng(6)
    rocking = RockingOperator(GEOMETRY, np.arange(-20, 21) * 0.01, (PIXEL, PIXEL), Window((14, 14)))
    box, crystal = sheared_crystal(rng, rocking, 20)
    matrix = rocking.matrix(20)
    waves = slow_transform(matrix, crystal)
    wrong = waves * np.exp(0.8j * rng.normal(size=41))[:, None, None].astype(np.complex64)
    turned, image = synchronise(wrong, matrix, box, iterations=60)
    overlap = abs(np.vdot(waves, turned)) / np.linalg.norm(waves) / np.linalg.norm(turned)
    assert abs(np.vdot(waves, wrong)) / np.linalg.norm(waves) ** 2 < 0.9
    assert overlap > 0.999
    assert np.linalg.norm(image[box]) > 0.999 * np.linalg.norm(image)


def strained_slices(rng):
    """Slices of an even crystal whose strain spreads them along zeta, its matrix, region and truth."""
    rocking = RockingOperator(GEOMETRY, np.arange(-24, 25) * 0.01, (PIXEL, PIXEL), Window((10, 8)))
    zeta = np.arange(30)[:, None, None] - 15.0
    top = 6 + rng.integers(-2, 3, (10, 8))
    crystal = (np.abs(zeta) < top) * np.exp(1j * (0.03 * zeta**2 + 0.05 * zeta * np.linspace(-1, 1, 8)))
    crystal[:, :2], crystal[:, -2:], crystal[:, :, :2] = 0, 0, 0
    crystal = crystal.astype(np.complex64)
    matrix = rocking.matrix(30)
    return rocking, matrix, crystal, slow_transform(matrix, crystal)


def test_unevenness_is_nothing_for_an_even_crystal_and_its_slope_is_right():
    rng = np.random.default_rng(14)
    rocking, matrix, crystal, waves = strained_slices(rng)
    even = Unevenness(waves, matrix, np.ones(crystal.shape, bool), rocking.tilt(slice(None)))
    rest, _ = even(np.zeros(len(waves)))
    phases, way = 1.5 * rng.normal(size=(2, len(waves)))
    spoiled, slope = even(phases)
    assert abs(rest) < 1e-5 and spoiled > 0.1
    step = 1e-2
    numeric = (even(phases + step * way)[0] - even(phases - step * way)[0]) / (2 * step)
    assert slope @ way == pytest.approx(numeric, rel=2e-2)

    shifts, aside = rng.normal(size=(2, len(waves), 2))
    _, by_phase, by_shift = even.moved(phases, shifts)
    for slope, ahead, back in (
        (by_phase @ way, (phases + step * way, shifts), (phases - step * way, shifts)),
        (np.sum(by_shift * aside), (phases, shifts + step * aside), (phases, shifts - step * aside)),
    ):
        numeric = (even.moved(*ahead)[0] - even.moved(*back)[0]) / (2 * step)
        assert slope == pytest.approx(numeric, rel=2e-2)


def test_a_slow_phase_that_a_support_does_not_see_is_found_by_the_crystals_evenness():
    rng = np.random.default_rng(15)
    rocking, matrix, crystal, waves = strained_slices(rng)
    x = rocking.kappa / rocking.kappa.max()
    wrong = 45 * x**2 - 8 * x**3
    spoiled = waves * np.exp(1j * wrong).astype(np.complex64)[:, None, None]
    region = np.ones(crystal.shape, bool)

    def likeness(phases):
        image = slow_transform(
            matrix.conj().T, spoiled * np.exp(1j * phases).astype(np.complex64)[:, None, None]
        )
        shifts = [abs(np.vdot(np.roll(image, n, axis=0), crystal)) for n in range(-6, 7)]
        return max(shifts) / np.linalg.norm(image) / np.linalg.norm(crystal)

    assert likeness(np.zeros(len(x))) < 0.85
    with one_thread_per_product():
        found = focus(Unevenness(spoiled, matrix, region, rocking.tilt(slice(None))), rocking.kappa)
    assert max(likeness(p) for p in found) > 0.97


def test_neighbours_foretell_a_slice_better_than_its_nearest_one():
    kappa = np.arange(-12, 13) * 1.0e6
    thickness = 0.3 * 2 * np.pi / 1.0e6
    z = np.linspace(-0.5, 0.5, 200) * thickness
    density = 1 + 0.5 * np.cos(9 * z / thickness + 1)
    slices = np.exp(-1j * np.multiply.outer(kappa, z)) @ density / 200
    foretold, copied = [], []
    for j in range(4, 25):
        weights = neighbour_weights(kappa[j - 4 : j], kappa[j], thickness, regularisation=1e-4)
        foretold.append(weights @ slices[j - 4 : j] - slices[j])
        copied.append(slices[j - 1] - slices[j])
    assert np.linalg.norm(foretold) < 0.2 * np.linalg.norm(copied)


@given(n=st.integers(2, 30), data=st.data())
def test_the_chain_visits_every_frame_once(n, data):
    start = data.draw(st.integers(0, n - 1))
    order = np.random.default_rng(n).permutation(n)
    seen = [start]
    for new, reached in walk_outward(order, start):
        assert sorted(reached) == sorted(seen)
        seen += new
    assert sorted(seen) == list(range(n))


# -- drift and support -----------------------------------------------------------------------------------
def test_small_shifts_are_read_off_whatever_the_phase():
    n = 24
    at = np.arange(n) - n / 2
    shifts = np.array([[0.03, -0.02], [-0.01, 0.04]])

    def waves_at(s):
        r2 = (at - s[0]) ** 2 / 9 + (at - s[1])[:, None] ** 2 / 5
        return np.exp(-r2 + 0.3j * (at - s[0]) * (at - s[1])[:, None])

    before = np.stack([waves_at((0, 0))] * 2).astype(np.complex64)
    after = np.stack([np.exp(0.05j) * waves_at(s) for s in shifts]).astype(np.complex64)
    np.testing.assert_allclose(newton_shift(before, after - before), shifts, atol=2e-3)


def test_thickness_of_a_slab_from_its_rocking_curve():
    kappa = np.arange(-60, 61) * 0.6e6
    thickness = 700e-9
    counts = np.sinc(kappa * thickness / (2 * np.pi)) ** 2
    assert thickness_from_counts(counts, kappa) == pytest.approx(thickness, rel=0.15)


def test_window_and_shrink_wrap_hold_the_crystal():
    rng = np.random.default_rng(8)
    loose = Window((40, 40))
    wave = np.zeros((40, 40), np.complex64)
    wave[12:20, 22:34] = np.exp(1j * rng.random((8, 12)))
    window, whole = window_around(wave, loose)
    assert whole
    rows, columns = (20 + window.indices(axis) for axis in (0, 1))
    assert rows[0] <= 10 and rows[-1] >= 21 and columns[0] <= 20 and columns[-1] >= 35
    assert len(rows) < 26 and len(columns) < 32

    wave[:, 35:] = 1
    assert not window_around(wave, loose)[1]

    image = np.zeros((16, 16, 16), np.complex64)
    image[4:12, 5:11, 6:12] = 1
    region = np.ones(image.shape, bool)
    region[:, :, 11:] = False
    support = shrink_wrap(image + 0.02 * noise(rng, 16, 16, 16), region, 0.3)
    assert support[5:11, 6:10, 7:11].all() and not support[:, :, 11:].any() and support.sum() < 800
