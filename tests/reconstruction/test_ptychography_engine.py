"""Fused kernels against plain numpy, adjoints, and the steps of the engine on noise-free data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline.reconstruction.free_pixels import log_likelihood
from bcmi_beamline.reconstruction.propagation import near_field_kernel, near_field_limit, propagate
from bcmi_beamline.reconstruction.ptychography import _devices, difference_map, epie
from bcmi_beamline.reconstruction.ptychography import _kernels as kernels
from bcmi_beamline.reconstruction.ptychography._detector import PIXEL_SPREAD
from bcmi_beamline.reconstruction.ptychography._devices import Processors
from bcmi_beamline.reconstruction.ptychography._engine import Engine, crop_spectrum
from bcmi_beamline.reconstruction.ptychography._finish import (
    centre_of_mass,
    find_levels,
    flatten,
    focus,
    phase_ramp,
    shift_wave,
)
from bcmi_beamline.reconstruction.ptychography._positions import without_affine
from bcmi_beamline.reconstruction.ptychography._start import Grid, pixel_states

RNG = np.random.default_rng(7)
B, M, NY, NX, H, W = 3, 2, 12, 15, 31, 29


def waves(*shape):
    return (RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape)).astype(np.complex64)


CORNERS = np.array([[2, 3], [9, 1], [14, 12]])


def patches(image):
    return np.stack([image[r : r + NY, c : c + NX] for r, c in CORNERS])


def mixed(k=4, wild=0.1):
    """A probe, its derivatives and one more part, and how frames mix them."""
    weights = np.column_stack([RNG.uniform(0.8, 1.2, B), RNG.uniform(-wild, wild, (B, k - 1))])
    return waves(k, M, NY, NX), weights.astype(np.float32)


def test_exit_waves_and_gradients_match_numpy():
    (base, weights), image, residuals = mixed(), waves(H, W), waves(B, M, NY, NX)
    probes, out = np.empty_like(residuals), np.empty_like(residuals)
    kernels.exit_waves(base, weights, image, CORNERS, probes, out)
    np.testing.assert_allclose(probes, np.tensordot(weights, base, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out, probes * patches(image)[:, None], rtol=1e-4)

    gradient, light = np.zeros_like(image), np.zeros((H, W), np.float32)
    for rows in ((0, 11), (11, H)):
        kernels.object_gradient(residuals, probes, CORNERS, gradient, light, *rows)
    expected, power = np.zeros_like(image), np.zeros((H, W))
    for j, (r, c) in enumerate(CORNERS):
        expected[r : r + NY, c : c + NX] += (probes[j].conj() * residuals[j]).sum(axis=0)
        power[r : r + NY, c : c + NX] += (np.abs(probes[j]) ** 2).sum(axis=0)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    np.testing.assert_allclose(light, power, rtol=1e-5)

    moved = image.copy()
    kernels.object_step(moved, gradient.copy(), light.copy(), 0.6, 0.9, 0.5, 0, H)
    np.testing.assert_allclose(moved, image + 0.6 * expected / (0.9 * power + 0.5), rtol=1e-4, atol=1e-5)

    mine, power = np.zeros_like(base), np.zeros((NY, NX), np.float32)
    for rows in ((0, 5), (5, NY)):
        kernels.probe_gradient(residuals, image, CORNERS, weights, mine, power, *rows)
    each = residuals * patches(image).conj()[:, None]
    np.testing.assert_allclose(mine, np.tensordot(weights.T, each, 1), rtol=1e-4, atol=1e-5)
    light = weights[:, 0, None, None] ** 2 * np.abs(patches(image)) ** 2
    np.testing.assert_allclose(power, light.sum(axis=0), rtol=1e-4)


def test_exit_wave_and_probe_gradient_are_adjoint():
    (base, weights), residuals, image = mixed(), waves(B, M, NY, NX), waves(H, W)
    probes, exits, gradient = np.empty_like(residuals), np.empty_like(residuals), np.zeros_like(base)
    kernels.exit_waves(base, weights, image, CORNERS, probes, exits)
    light = np.zeros((NY, NX), np.float32)
    kernels.probe_gradient(residuals, image, CORNERS, weights, gradient, light, 0, NY)
    np.testing.assert_allclose(np.vdot(residuals, exits), np.vdot(gradient, base), rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_difference_moves_a_wave_and_is_minus_its_adjoint(axis):
    f = [np.fft.fftfreq(n) for n in (NY, NX)]
    spectrum = waves(NY, NX) * ((np.abs(f[0]) < 0.2)[:, None] & (np.abs(f[1]) < 0.2))
    smooth, moved = (
        np.fft.ifft2(spectrum * np.exp(-2j * np.pi * d * (f[0][:, None], f[1])[axis])) for d in (0, 0.03)
    )
    found = np.empty((NY, NX), np.complex64)
    kernels.difference(smooth.astype(np.complex64), axis, found)
    assert np.linalg.norm(smooth + 0.03 * found - moved) < 0.1 * np.linalg.norm(smooth - moved)
    a, b, da, db = waves(NY, NX), waves(NY, NX), np.empty((NY, NX), np.complex64), np.empty_like(found)
    kernels.difference(a, axis, da)
    kernels.difference(b, axis, db)
    np.testing.assert_allclose(np.vdot(a, db), -np.vdot(da, b), rtol=1e-4)


def test_blur_is_its_own_adjoint_and_integrates_pixels():
    a, b = (RNG.random((NY, NX)).astype(np.float32) for _ in range(2))
    blurred = [np.empty_like(a), np.empty_like(a)]
    for values, out in zip((a, b), blurred, strict=True):
        kernels.blur(values, PIXEL_SPREAD, out)
    assert np.vdot(a, blurred[1]) == pytest.approx(np.vdot(blurred[0], b), rel=1e-5)
    wave = np.cos(2 * np.pi * np.arange(64) * 4 / 64).astype(np.float32)
    line = np.tile(wave, (64, 1))
    out = np.empty_like(line)
    kernels.blur(line, PIXEL_SPREAD, out)
    assert out[0, 0] == pytest.approx(np.sinc(4 / 64), abs=2e-4)


def test_a_frame_is_read_with_its_zero_frequency_at_the_corner():
    frame = RNG.integers(0, 9, (20, 21)).astype(np.uint16)
    out = np.empty((12, 9), np.float32)
    kernels.read_frame(frame, 4, 6, out)
    np.testing.assert_array_equal(out, np.fft.ifftshift(frame[4:16, 6:15]))


NONE = np.zeros((0, 0), np.float32)


def residual_of(field, counts, state, background=NONE, spread=0.0, poisson=False, ratio=NONE):
    """`modulus_residual` of one frame whose pixels lie as on the detector: factor, sums."""
    field, sums = field.copy(), np.zeros(5)
    used, free = (state == 0).astype(np.float32), np.argwhere(state == kernels.FREE)
    kernels.modulus_residual(field, counts, used, free, background, spread, poisson, ratio, sums)
    return field, sums


def test_modulus_residual_matches_numpy():
    field = waves(M, NY, NX) * 3
    counts = RNG.poisson(5, (NY, NX)).astype(np.float32)
    state = RNG.choice([0, 0, 0, kernels.MASKED, kernels.FREE], (NY, NX)).astype(np.uint8)
    dark = RNG.random((NY, NX)).astype(np.float32)
    ratio = np.empty_like(dark)
    mine, sums = residual_of(field, counts, state, dark, ratio=ratio)
    model = (np.abs(field) ** 2).sum(axis=0) + dark
    used, free = state == 0, state == kernels.FREE
    factor = np.where(used, np.sqrt((counts + 0.375) / (model + 0.375)) - 1, 0)
    np.testing.assert_allclose(mine, field * factor, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(ratio, np.where(used, counts / model, 1), rtol=1e-4)
    expected = [
        ((np.sqrt(model) - np.sqrt(counts)) ** 2)[used].sum(),
        counts[used].sum(),
        model[used].sum(),
        log_likelihood(counts, model, free) * free.sum(),
        free.sum(),
    ]
    np.testing.assert_allclose(sums, expected, rtol=1e-4)


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("finer", [1, 2])
def test_modulus_residual_is_the_gradient_of_the_misfit(poisson, finer):
    """Against finite differences of the misfit, with blur, binning, background and a mask."""
    ny, nx = 6, 8
    field = waves(M, finer * ny, finer * nx) * 2 / finer + 0.7
    counts = RNG.poisson(7, (ny, nx)).astype(np.float32)
    state = RNG.choice([0, 0, kernels.MASKED], (ny, nx)).astype(np.uint8)
    dark = RNG.random((ny, nx)).astype(np.float32)

    def misfit(f):
        fine = (np.abs(f) ** 2).sum(axis=0)
        beside = sum(np.roll(fine, by, axis) for axis in (0, 1) for by in (-1, 1))
        fine = (1 - 4 * PIXEL_SPREAD) * fine + PIXEL_SPREAD * beside
        model = fine.reshape(ny, finer, nx, finer).sum(axis=(1, 3)) + dark
        if poisson:
            i, m = counts + kernels.FLOOR, model + kernels.FLOOR
            each = (m - i * np.log(m)) / 2
        else:
            each = (np.sqrt(model + 0.375) - np.sqrt(counts + 0.375)) ** 2
        return each[state == 0].sum()

    mine, _ = residual_of(field, counts, state, dark, PIXEL_SPREAD, poisson)
    way, here, h = waves(*field.shape), field.astype(complex), 1e-4
    slope = (misfit(here + h * way) - misfit(here - h * way)) / (2 * h)
    assert -2 * np.vdot(way, mine).real == pytest.approx(slope, rel=2e-3)


def test_masked_pixels_may_hold_anything():
    field, state = waves(1, NY, NX), np.zeros((NY, NX), np.uint8)
    state[3, 4] = kernels.MASKED
    counts = np.ones((NY, NX), np.float32)
    counts[3, 4] = np.nan
    field, sums = residual_of(field, counts, state, spread=PIXEL_SPREAD)
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


def test_overlaps_are_those_of_the_fit():
    residuals, parts, image = waves(B, M, NY, NX), waves(2, M, NY, NX), waves(H, W)
    sums = np.zeros((B, 2, 2))
    kernels.overlaps(residuals, parts, image, CORNERS, sums)
    for k, part in enumerate(parts):
        wave = part * patches(image)[:, None]
        np.testing.assert_allclose(
            sums[:, k, 0], (wave.conj() * residuals).real.sum(axis=(1, 2, 3)), rtol=1e-3, atol=1e-2
        )
        np.testing.assert_allclose(sums[:, k, 1], (np.abs(wave) ** 2).sum(axis=(1, 2, 3)), rtol=1e-4)


# -- engine ---------------------------------------------------------------------------------------
def scene(n=48, frames=40, seed=1, change=None, whole=False):
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
    offsets = np.rint(offsets) if whole else offsets
    f = np.fft.fftfreq(n)
    data = []
    for j, (row, column) in enumerate(offsets):
        r, c = round(row), round(column)
        here = probe if change is None else probe * (1 + change[j])
        moved = np.fft.ifft2(
            np.fft.fft2(here) * np.exp(-2j * np.pi * (f[:, None] * (row - r) + f * (column - c)))
        )
        data.append(
            np.abs(np.fft.fftshift(np.fft.fft2(moved * image[r : r + n, c : c + n], norm="ortho"))) ** 2
        )
    return np.array(data, np.float32), offsets, probe[None], image


def engine(start_image=None, start_offsets=None, start_data=None, **options):
    data, offsets, probe, image = scene()
    data = data if start_data is None else start_data
    states = pixel_states(np.zeros(data.shape[1:], bool), 0.05, 0)
    return Engine(
        data,
        states,
        offsets if start_offsets is None else start_offsets,
        probe,
        image if start_image is None else start_image,
        np.ones(len(data)),
        np.random.default_rng(0),
        **options,
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


def test_positions_come_home_with_drift_but_without_a_scale():
    truth = engine().offsets
    drift = np.linspace(-0.5, 0.5, len(truth))[:, None] * [1.0, -0.6]
    lost = truth - drift + np.random.default_rng(3).normal(0, 0.3, truth.shape)
    e = engine(start_offsets=lost)
    for _ in range(50):
        e.sweep(locate=True)
        e.move(lambda offsets: without_affine(offsets, lost))
    place = lost - lost.mean(axis=0)
    time = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(lost)), 3)
    fit = np.linalg.lstsq(np.column_stack([place, time]), e.offsets - lost, rcond=None)[0]
    np.testing.assert_allclose(fit[:2], 0, atol=2e-3)
    left = e.offsets - truth
    left -= place @ np.linalg.lstsq(place, left, rcond=None)[0]
    assert left.std() < 0.05


def test_intensities_are_found():
    bright = np.random.default_rng(4).uniform(0.7, 1.3, 40)
    e = engine()
    e.detector.frames = e.detector.frames * bright[:, None, None].astype(np.float32)
    for _ in range(25):
        e.descend()
        e.even()
    np.testing.assert_allclose(e.gain**2 / (e.gain**2).mean(), bright / bright.mean(), rtol=0.05)


def test_a_probe_that_changes_is_followed():
    """The beam walks over the crystal: its wave changes linearly from frame to frame."""
    n = 48
    x = np.arange(n) - n // 2
    time = np.linspace(-1, 1, 40)
    change = 0.25 * time[:, None, None] * (x[:, None] * x) / 30
    data, *_ = scene(change=change)
    fixed, followed = (engine(start_data=data, variations=v) for v in (0, 1))
    followed.begin_varying()
    for _ in range(25):
        still = fixed.sweep()
        moved = followed.sweep(locate=True)
        followed.vary()
    assert moved.r2 < 0.2 * still.r2
    assert abs(np.corrcoef(followed.coefficients[:, 0], time)[0, 1]) > 0.95


def test_nothing_varies_before_it_is_time():
    """In the first frames of a scan a change that is slow in time cannot be told from the mean probe."""
    fixed, waiting = engine(), engine(variations=1)
    for e in (fixed, waiting):
        e.active = np.arange(12)
        e.probe = 0.8 * e.probe
        e.sweep(locate=True)
        e.vary()
    assert not waiting._parts[1].any()
    np.testing.assert_array_equal(waiting.probe, fixed.probe)


def test_a_variation_is_no_shift():
    """A drift is not taken for a probe that changes: it stays with the positions."""
    e = engine(variations=1, start_offsets=engine().offsets + np.linspace(-0.3, 0.3, 40)[:, None])
    e.begin_varying()
    for _ in range(12):
        e.sweep(locate=True)
        e.vary()
    change, probe = e._parts[1], e._parts[0]
    for axis in (-2, -1):
        moved = np.roll(probe, -1, axis) - np.roll(probe, 1, axis)
        away = np.linalg.norm(change) * np.linalg.norm(moved)
        assert abs(np.vdot(moved, change).real) < 0.01 * away


def test_a_background_is_told_from_the_beam():
    data, *_ = scene()
    rows = np.arange(48)[:, None]
    dark = np.where(rows < 24, 3.0, 1.0) * np.ones((48, 48))
    e = engine(start_data=data + dark.astype(np.float32))
    e.seek_background(1.0)
    for _ in range(30):
        score = e.sweep()
    assert score.r2 < 2e-3
    found = e.background
    assert np.median(found[:22]) == pytest.approx(3, rel=0.1)
    assert np.median(found[26:]) == pytest.approx(1, rel=0.1)


def test_another_window_shows_the_same_object():
    e = engine()
    before = e.descend().r2
    grid = Grid((84, 88), (48, 48), (1.0, 1.0), (0.0, 0.0))
    places = grid.positions(e.offsets)
    coarse = grid.coarser((32, 32))
    other = e.resized((32, 32), coarse.shape, coarse.offsets(places))
    # the frames were cut where they held hardly any counts
    assert other.descend().r2 < before + 1e-3
    back = other.resized((48, 48), (84, 88), e.offsets)
    truth, lit = e.image, e.illumination() > 0.3 * e.illumination().max()
    assert np.abs(back.image - truth)[lit].mean() < 0.05


def test_a_wider_field_gives_the_same_frames():
    """A probe padded to twice the field, each pixel the mean of its points: flat intensities agree."""
    data, offsets, probe, image = scene()
    wide = np.pad(probe, [(0, 0), (24, 24), (24, 24)])
    padded = np.pad(image, 24, constant_values=1)
    states = pixel_states(np.zeros(data.shape[1:], bool), 0.05, 0)
    make = lambda p, o, finer: Engine(  # noqa: E731
        data, states, offsets, p, o, np.ones(len(data)), np.random.default_rng(0), finer=finer
    )
    one, two = make(probe, image, 1), make(wide, padded, 2)
    np.testing.assert_allclose(two.probe, wide, atol=1e-4 * np.abs(wide).max())
    # the mean over a pixel of a beam of a quarter of the field differs from its centre by a few per cent
    assert two.descend().r2 < 2e-2
    assert one.descend().r2 < 2e-5
    for _ in range(8):
        score = two.descend()
    assert score.r2 < 5e-3


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(_devices, "SMALL", 0)
    results = []
    for threads in (1, 3):
        e = engine(device=Processors(threads))
        e.sweep(locate=True)
        e.move(lambda offsets: offsets)
        e.descend(poisson=True)
        results.append((e.image, e.probe, e.offsets))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


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


@pytest.mark.parametrize("bent", [-3.0, 3.0])
def test_strain_hardly_moves_the_plane_of_a_crystal(bent):
    """Bent lattice planes act like a lens; the facets stay where they are, in a limited band."""
    n, pixel, wavelength, distance = 128, 38e-9, 0.13776e-9, 1.3e-3
    y, x = np.mgrid[: 2 * n, : 2 * n] - n  # twice as fine
    inside = (np.abs(x - 2) < 13) & (np.abs(y + 0.4 * x) < 10)
    thickness = np.minimum(1, np.minimum(13 - np.abs(x - 2), 10 - np.abs(y + 0.4 * x)) / 10 + 0.35)
    crystal = inside * thickness * np.exp(1j * bent * ((x - 3) ** 2 + (y + 2) ** 2) / 150)
    fine = propagate(crystal, (pixel / 2, pixel / 2), wavelength, distance)
    probe = crop_spectrum(fine, (n, n))
    near = distance - 50e-6
    assert focus(probe, (pixel, pixel), wavelength, near) == pytest.approx(distance, abs=3e-6)
    known = focus(probe, (pixel, pixel), wavelength, distance - 20e-6, wide=False)
    assert known == pytest.approx(distance, abs=3e-6)


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


# -- reference algorithms -----------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [epie, difference_map])
def test_reference_algorithms_find_the_object(algorithm):
    """Whole-pixel positions, the probe a tenth too wide, the object from nothing."""
    data, offsets, probe, image = scene(whole=True)
    n = probe.shape[-1]
    y, x = np.mgrid[:n, :n] - n // 2
    start = probe[0] * np.exp((x**2 + y**2) / 600)
    frames = np.fft.ifftshift(data, axes=(1, 2))
    used = np.ones((n, n), bool)
    used[3, 5:9] = False
    frames[:, ~used] = 1e6
    found, beam, r2 = algorithm(
        frames, np.rint(offsets).astype(int), start, np.ones_like(image), used=used, iterations=60
    )
    assert found.dtype == beam.dtype == np.complex64
    assert r2[-1] < 0.02 * r2[0]
    light = engine().illumination()
    inner = (light * found.conj() * image).sum()
    match = abs(inner) / np.sqrt((light * abs(found) ** 2).sum() * (light * abs(image) ** 2).sum())
    assert match > 0.85
