"""Fused kernels against plain numpy, adjoints, and the steps of the engine on noise-free data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline.reconstruction.free_pixels import log_likelihood
from bcmi_beamline.reconstruction.propagation import near_field_kernel, near_field_limit, propagate
from bcmi_beamline.reconstruction.ptychography import _kernels as kernels
from bcmi_beamline.reconstruction.ptychography._engine import Engine
from bcmi_beamline.reconstruction.ptychography._finish import (
    centre_of_mass,
    find_levels,
    flatten,
    focus,
    phase_ramp,
    shift_wave,
)
from bcmi_beamline.reconstruction.ptychography._start import Grid, pixel_states

RNG = np.random.default_rng(7)
B, M, NY, NX, H, W = 3, 2, 12, 15, 31, 29


def waves(*shape):
    return (RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape)).astype(np.complex64)


CORNERS = np.array([[2, 3], [9, 1], [14, 12]])


def patches(image):
    return np.stack([image[r : r + NY, c : c + NX] for r, c in CORNERS])


def test_exit_waves_and_gradients_match_numpy():
    probes, image, residuals = waves(B, M, NY, NX), waves(H, W), waves(B, M, NY, NX)
    out = np.empty_like(probes)
    kernels.exit_waves(probes, image, CORNERS, out)
    np.testing.assert_allclose(out, probes * patches(image)[:, None], rtol=1e-5)

    gradient, light = np.zeros_like(image), np.zeros((H, W), np.float32)
    kernels.object_gradient(residuals, probes, CORNERS, gradient, light)
    expected, power = np.zeros_like(image), np.zeros((H, W))
    for j, (r, c) in enumerate(CORNERS):
        expected[r : r + NY, c : c + NX] += (probes[j].conj() * residuals[j]).sum(axis=0)
        power[r : r + NY, c : c + NX] += (np.abs(probes[j]) ** 2).sum(axis=0)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    np.testing.assert_allclose(light, power, rtol=1e-5)

    moved = image.copy()
    kernels.object_step(moved, gradient.copy(), light.copy(), 0.6, 0.9, 0.5)
    np.testing.assert_allclose(moved, image + 0.6 * expected / (0.9 * power + 0.5), rtol=1e-4, atol=1e-5)

    rest = RNG.uniform(-0.1, 0.1, (B, 2)).astype(np.float32)
    mine, power = np.zeros((3, M, NY, NX), np.complex64), np.zeros((NY, NX), np.float32)
    kernels.probe_gradient(residuals, image, CORNERS, rest, mine, power)
    each = residuals * patches(image).conj()[:, None]
    for k, weights in enumerate((np.ones(B), *rest.T)):
        np.testing.assert_allclose(mine[k], np.tensordot(weights, each, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(power, (np.abs(patches(image)) ** 2).sum(axis=0), rtol=1e-5)


def test_exit_wave_and_probe_gradient_are_adjoint():
    base, residuals, image = waves(3, M, NY, NX), waves(B, M, NY, NX), waves(H, W)
    rest = RNG.uniform(-0.1, 0.1, (B, 2)).astype(np.float32)
    probes, exits, gradient = np.empty_like(residuals), np.empty_like(residuals), np.zeros_like(base)
    kernels.spread_shifts(base, rest, probes)
    kernels.exit_waves(probes, image, CORNERS, exits)
    kernels.probe_gradient(residuals, image, CORNERS, rest, gradient, np.zeros((NY, NX), np.float32))
    np.testing.assert_allclose(np.vdot(residuals, exits), np.vdot(gradient, base), rtol=1e-4)


def test_modulus_residual_matches_numpy():
    field = waves(B, M, NY, NX) * 3
    frames = RNG.poisson(5, (B, NY, NX)).astype(np.float32)
    states = RNG.choice([0, 0, 0, kernels.MASKED, kernels.FREE], (B, NY, NX)).astype(np.uint8)
    mine, sums = field.copy(), np.zeros((B, 4))
    kernels.modulus_residual(mine, frames, states, sums)
    for k, (counts, state) in enumerate(zip(frames, states, strict=True)):
        model = np.fft.fftshift((np.abs(field[k]) ** 2).sum(axis=0))
        factor = np.where(state == 0, np.sqrt((counts + 0.375) / (model + 0.375)) - 1, 0)
        np.testing.assert_allclose(mine[k], field[k] * np.fft.ifftshift(factor), rtol=2e-4, atol=1e-4)
        used, free = state == 0, state == kernels.FREE
        expected = [
            ((np.sqrt(model) - np.sqrt(counts)) ** 2)[used].sum(),
            counts[used].sum(),
            log_likelihood(counts, model, free) * free.sum(),
            free.sum(),
        ]
        np.testing.assert_allclose(sums[k], expected, rtol=1e-4)


def test_masked_pixels_may_hold_anything():
    field, states = waves(1, 1, NY, NX), np.zeros((1, NY, NX), np.uint8)
    states[0, 3, 4] = kernels.MASKED
    frames = np.ones((1, NY, NX), np.float32)
    frames[0, 3, 4] = np.nan
    sums = np.zeros((1, 4))
    kernels.modulus_residual(field, frames, states, sums)
    assert np.isfinite(field).all()
    assert np.isfinite(sums).all()


def test_position_gradient_is_that_of_the_fit():
    """Normal equations built from finite differences of the exit wave."""
    probes, image, residuals = waves(B, M, NY, NX), waves(H, W), waves(B, M, NY, NX)
    probes[:, :, [0, -1]] = probes[:, :, :, [0, -1]] = 0
    sums = np.zeros((B, 5))
    kernels.position_gradient(residuals, probes, image, CORNERS, sums)
    dy, dx = ((np.roll(image, -1, a) - np.roll(image, 1, a)) / 2 for a in (0, 1))
    vy, vx = (probes * patches(d)[:, None] for d in (dy, dx))
    pairs = [(vy, vy), (vy, vx), (vx, vx), (vy, residuals), (vx, residuals)]
    for k, (a, b) in enumerate(pairs):
        np.testing.assert_allclose(sums[:, k], (a.conj() * b).real.sum(axis=(1, 2, 3)), rtol=1e-3, atol=1e-2)


# -- engine ---------------------------------------------------------------------------------------
def scene(n=48, frames=40, seed=1):
    """Noise-free frames of a smooth complex object in a smooth beam, whole fields known."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:n, :n] - n // 2
    probe = 40 * np.exp(-(x**2 + y**2) / 60 + 0.01j * (x**2 - 0.5 * y**2) + 0.15j * x)
    height, width = 84, 88
    noise = np.fft.fft2(rng.standard_normal((2, height, width)))
    low = np.exp(-80 * (np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width) ** 2))
    smooth = np.fft.ifft2(noise * low).real
    smooth /= smooth.std()
    image = (1 - 0.1 * smooth[0] ** 2 / (1 + smooth[0] ** 2)) * np.exp(0.9j * smooth[1])
    offsets = np.column_stack([rng.uniform(2, height - n - 2, frames), rng.uniform(2, width - n - 2, frames)])
    f = np.fft.fftfreq(n)
    data = []
    for row, column in offsets:
        r, c = round(row), round(column)
        moved = np.fft.ifft2(
            np.fft.fft2(probe) * np.exp(-2j * np.pi * (f[:, None] * (row - r) + f * (column - c)))
        )
        data.append(
            np.abs(np.fft.fftshift(np.fft.fft2(moved * image[r : r + n, c : c + n], norm="ortho"))) ** 2
        )
    return np.array(data, np.float32), offsets, probe[None], image


def engine(start_image=None, start_offsets=None):
    data, offsets, probe, image = scene()
    states = pixel_states(np.zeros(data.shape[1:], bool), 0.05, 0)
    return Engine(
        data,
        states,
        offsets if start_offsets is None else start_offsets,
        probe,
        image if start_image is None else start_image,
        np.ones(len(data)),
        np.random.default_rng(0),
    )


def test_truth_fits_with_sub_pixel_positions():
    at_truth = engine()
    assert at_truth.descend().r2 < 2e-5
    rounded = engine(start_offsets=np.rint(at_truth.offsets))
    assert rounded.descend().r2 > 100 * at_truth.descend().r2


def test_sweeps_then_descent_converge():
    start = engine(start_image=np.ones((84, 88)))
    first = start.sweep().r2
    for _ in range(12):
        swept = start.sweep(momentum=0.5).r2
    begun = start.descend().free_llk
    for _ in range(12):
        ended = start.descend()
    assert swept < 0.1 * first
    assert ended.r2 < 0.5 * swept
    assert ended.free_llk < 0.5 * begun


def test_positions_come_home_except_what_they_cannot_know():
    truth = engine().offsets
    lost = truth + np.random.default_rng(3).normal(0, 0.3, truth.shape)
    e = engine(start_offsets=lost)
    for _ in range(40):
        e.sweep(locate=True)
        e.move(lambda offsets: offsets)
    design = np.column_stack([np.ones(len(lost)), lost - lost.mean(axis=0)])
    away = np.linalg.lstsq(design, e.offsets - lost, rcond=None)[0]
    np.testing.assert_allclose(away, 0, atol=1e-9)
    left = (e.offsets - truth) - design @ np.linalg.lstsq(design, e.offsets - truth, rcond=None)[0]
    assert left.std() < 0.05


def test_a_flat_object_tells_no_position():
    e = engine(start_image=np.ones((84, 88)))
    before = e.offsets.copy()
    e.descend(locate=True)
    e.move(lambda offsets: offsets)
    assert np.isfinite(e.offsets).all()
    np.testing.assert_allclose(e.offsets, before, atol=0.31)


def test_part_of_the_frames_asks_for_the_same_probe():
    e = engine()
    before = e.probe.copy()
    np.testing.assert_allclose(e.probe_from(np.arange(20)), before, atol=0.02 * np.abs(before).max())
    np.testing.assert_array_equal(e.probe, before)


# -- start and finish -----------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(x=st.floats(-3e-6, 3e-6), y=st.floats(-3e-6, 3e-6))
def test_grid_round_trip(x, y):
    grid = Grid((400, 380), (256, 256), (38e-9, 38e-9), (1e-6, -2e-6))
    position = np.array([[x, y]])
    np.testing.assert_allclose(grid.positions(grid.offsets(position)), position, atol=1e-15)


def test_object_moved_right_and_up_shows_its_left_and_lower_part():
    grid = Grid((400, 380), (256, 256), (38e-9, 38e-9), (0.0, 0.0))
    (here, there) = grid.offsets(np.array([[0.0, 0.0], [38e-9, 38e-9]]))
    np.testing.assert_allclose(here, [72, 62])
    np.testing.assert_allclose(there - here, [1, -1])  # rows run to -y


def test_flatten_removes_ramp_scale_and_phase():
    rng = np.random.default_rng(2)
    film = np.kron(rng.random((12, 12)) < 0.4, np.ones((10, 10), bool))
    truth = np.where(film, 0.84 * np.exp(-2.4j), 1)
    ramp, scale = np.array([0.013, -0.0071]), 3 * np.exp(1.1j)
    noise = 0.05 * (rng.standard_normal(film.shape) + 1j * rng.standard_normal(film.shape))
    image = (truth + noise) * scale * phase_ramp(film.shape, ramp)
    trusted = np.zeros(film.shape, bool)
    trusted[10:110, 15:105] = True
    found, gain, levels = flatten(image, trusted)
    np.testing.assert_allclose(found, ramp, atol=2e-5)
    assert gain == pytest.approx(scale, rel=0.02)
    assert levels.phase_step == pytest.approx(2.4, abs=0.02)
    assert levels.modulus == pytest.approx(0.84, abs=0.01)
    assert levels.two_valuedness > 0.98


def test_one_level_is_no_two():
    assert find_levels(np.full(50, 1 + 0j)).two_valuedness == 0


def test_focus_finds_the_plane_of_a_sharp_edged_wave():
    n, pixel, wavelength = 128, 38e-9, 0.13776e-9
    y, x = np.mgrid[:n, :n] - n // 2
    inside = (np.abs(x) < 6) & (np.abs(y + 0.4 * x) < 5)
    crystal = inside * np.exp(0.3j * x / 6)
    for distance in (1.2e-3, 1.33e-3):
        probe = propagate(crystal, (pixel, pixel), wavelength, distance)
        assert focus(probe, (pixel, pixel), wavelength, 1.25e-3) == pytest.approx(distance, abs=3e-6)


def test_propagation_is_unitary_reversible_and_of_the_right_sign():
    n, pixel, wavelength, distance = 128, 38e-9, 0.13776e-9, 0.5e-3
    y, x = (np.mgrid[:n, :n] - n // 2) * pixel
    waist = 300e-9
    gauss = np.exp(-(x**2 + y**2) / waist**2).astype(np.complex64)
    far = propagate(gauss, (pixel, pixel), wavelength, distance)
    # a Gaussian beam has a closed form: q = waist**2 + i lambda d / pi, for exp(+ikz)
    q = waist**2 + 1j * wavelength * distance / np.pi
    np.testing.assert_allclose(far, waist**2 / q * np.exp(-(x**2 + y**2) / q), atol=2e-3)
    np.testing.assert_allclose(propagate(far, (pixel, pixel), wavelength, -distance), gauss, atol=1e-5)
    np.testing.assert_allclose(
        np.abs(near_field_kernel((8, 6), (pixel, pixel), wavelength, 1.0)), 1, rtol=1e-5
    )
    assert near_field_limit((n, n), (pixel, pixel), wavelength) == pytest.approx(n * pixel**2 / wavelength)


@settings(max_examples=20, deadline=None)
@given(row=st.floats(-4, 4), column=st.floats(-4, 4))
def test_centre_of_mass_follows_a_shift(row, column):
    y, x = np.mgrid[:32, :32] - 16
    blob = np.exp(-(x**2 + y**2) / 9).astype(np.complex64)[None]
    np.testing.assert_allclose(centre_of_mass(shift_wave(blob, (row, column))), [row, column], atol=0.03)
