"""The probe comes from a crystal: what that keeps and what it takes away. How well d1 can be known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography import _devices
from bcmi_beamline.reconstruction.ptychography._devices import make_device
from bcmi_beamline.reconstruction.ptychography._engine import Engine
from bcmi_beamline.reconstruction.ptychography._positions import affine_numbers, scale_error
from bcmi_beamline.reconstruction.ptychography._source import Free, Source

N, PIXEL, WAVELENGTH, D1 = 128, (38e-9, 38e-9), 0.13776e-9, 1.35e-3
FLAT = np.ones((N, N), np.complex64)


def crystal(seed: int = 0) -> np.ndarray:
    """Faceted wave about 0.5 um across with a random smooth phase, away from the middle."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:N, :N] - N // 2) * PIXEL[0] * 1e6
    inside = (np.abs(x - 0.1) < 0.25) & (np.abs(y + 0.15) < 0.3) & (np.abs(x + y) < 0.4)
    phase = ndimage.gaussian_filter(rng.standard_normal((N, N)), 3)
    return inside * np.exp(2j * phase / phase.std())


def beam(seed: int = 0) -> np.ndarray:
    return propagate(crystal(seed), PIXEL, WAVELENGTH, D1)


def noisy(wave: np.ndarray, share: float) -> np.ndarray:
    """With noise all over the array that has `share` of the wave's power."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(wave.shape) + 1j * rng.standard_normal(wave.shape)
    noise *= np.sqrt(share) * np.linalg.norm(wave) / np.linalg.norm(noise)
    return (wave + noise).astype(np.complex64)


def source(tilt: np.ndarray = FLAT, finer: int = 1) -> Source:
    return Source(tilt, finer, PIXEL, WAVELENGTH, D1, make_device("numpy"))


def test_projection_is_orthogonal():
    region = source()
    region.shrink(beam()[None])
    a, b = noisy(beam(1), 3.0), noisy(beam(2), 3.0)
    pa, pb = region.project(a), region.project(b)
    np.testing.assert_allclose(region.project(pa), pa, atol=1e-4 * np.abs(pa).max())
    assert np.vdot(pa, b) == pytest.approx(np.vdot(a, pb), rel=1e-4)
    assert np.linalg.norm(pa) < 0.9 * np.linalg.norm(a)


@pytest.mark.parametrize("finer", [1, 2])
def test_noise_goes_and_the_beam_stays(finer):
    index = np.arange(N) - N // 2
    ramp = np.exp(1j * np.pi * (finer - 1) * index / N)
    tilt = (ramp[:, None] * ramp).astype(np.complex64)
    region = source(tilt, finer)
    clean = tilt * beam()
    dirty = noisy(clean, 0.2)
    region.shrink(dirty[None])
    kept = region.project(dirty)
    assert np.linalg.norm(region.project(clean.astype(np.complex64)) - clean) < 0.03 * np.linalg.norm(clean)
    # the region is a thirtieth of the array's area
    assert np.linalg.norm(kept - clean) ** 2 < 0.1 * np.linalg.norm(dirty - clean) ** 2


@pytest.mark.parametrize("wide", [False, True])
def test_a_beam_that_is_not_small_there_is_left_free(wide):
    rng = np.random.default_rng(0)
    probe = noisy(beam(), 20.0 if wide else 0.2)[None]
    frames, states = np.ones((9, N, N), np.uint16), np.zeros((1, N, N), np.uint8)
    offsets, image = rng.uniform(1, 9, (9, 2)), np.ones((N + 12, N + 12), np.complex64)
    engine = Engine(frames, states, offsets, probe, image, np.ones(9), rng)
    engine.come_from(PIXEL, WAVELENGTH, D1)
    kept = np.linalg.norm(engine.probe - probe) < 1e-3 * np.linalg.norm(probe)
    assert kept == wide
    start = engine.probe
    engine.sweep()
    changed = engine.probe - start
    assert np.linalg.norm(changed) > 0
    outside = np.abs(propagate(changed[0], PIXEL, WAVELENGTH, -D1)) ** 2
    far = np.hypot(*(np.indices((N, N)) - N // 2)) * PIXEL[0] > 0.9e-6
    assert (outside[far].sum() > 0.01 * outside.sum()) == wide


def test_threads_do_not_change_a_bit_of_a_beam_from_a_crystal(monkeypatch):
    monkeypatch.setattr(_devices, "SMALL", 0)
    offsets = np.random.default_rng(0).uniform(1, 9, (20, 2))
    frames = np.random.default_rng(1).poisson(3.0, (20, N, N)).astype(np.uint16)
    results = []
    for threads in (1, 2, 3):
        engine = Engine(
            frames, np.zeros((1, N, N), np.uint8), offsets, noisy(beam(), 0.2)[None],
            np.ones((N + 12, N + 12), np.complex64), np.ones(20), np.random.default_rng(0),
            device=_devices.Processors(threads),
        )  # fmt: skip
        engine.come_from(PIXEL, WAVELENGTH, D1)
        for _ in range(2):
            engine.sweep(locate=True, momentum=0.5)
            engine.move(lambda moved: moved)
        engine.descend(locate=True, poisson=True)
        results.append((engine.image, engine.probe, engine.offsets))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wave", [np.ones((N, N)), np.zeros((N, N)), np.random.default_rng(0).random((N, N))])
def test_a_wave_that_shows_no_crystal_shrinks_nothing(wave):
    region, everything = source(), source()
    waves = propagate(wave, PIXEL, WAVELENGTH, D1)
    region.shrink(waves[None])
    dirty = noisy(beam(), 1.0)
    np.testing.assert_array_equal(region.project(dirty), everything.project(dirty))


@pytest.mark.parametrize("finer", [1, 2])
def test_a_shift_is_that_of_the_whole_window_and_its_adjoint(finer):
    index = np.arange(N) - N // 2
    ramp = np.exp(1j * np.pi * (finer - 1) * index / N)
    tilt = (ramp[:, None] * ramp).astype(np.complex64)
    y, x = np.mgrid[:N, :N] - N // 2
    soft = np.exp(-(x**2 + y**2) / 60) * crystal()  # no facets, whose light goes far
    smooth = ndimage.gaussian_filter(soft.real, 2) + 1j * ndimage.gaussian_filter(soft.imag, 2)
    light = (tilt * propagate(smooth, PIXEL, WAVELENGTH, D1)).astype(np.complex64)[None]
    region, free = source(tilt, finer), Free((N, N), make_device("numpy"))
    region.shrink(light)
    waves = region.project(light)
    shift = 0.31, -0.24
    (shine, ask), (shine_freely, _) = region.at(shift), free.at(shift)
    inner, box = region.hold(waves), (..., *region.box)
    moved = shine_freely(free.hold(waves))
    assert np.prod(shine(inner).shape) < 0.9 * waves.size
    np.testing.assert_allclose(shine(inner), moved[box], atol=1e-4 * np.abs(moved).max())
    assert np.linalg.norm(moved[box]) ** 2 > 0.999 * np.linalg.norm(moved) ** 2
    rng = np.random.default_rng(0)
    a, b = (
        (rng.standard_normal(w.shape) + 1j * rng.standard_normal(w.shape)).astype(np.complex64)
        for w in (inner, shine(inner))
    )
    inside = region.hold(region.waves(a))  # what lies in the region
    assert np.vdot(shine(inside), b) == pytest.approx(np.vdot(inside, ask(b)), rel=1e-3)


def test_the_scale_is_known_as_well_as_encoders_that_err_know_it():
    rng = np.random.default_rng(0)
    place = rng.uniform(-3e-6, 3e-6, (150, 2))
    drift = np.outer(np.linspace(0, 1, 150), [300e-9, -200e-9])
    scales, told = [], []
    for _ in range(300):
        read = place + rng.normal(0, 20e-9, place.shape)
        scales.append(affine_numbers(place, read)[0])
        told.append(scale_error(place + drift, read))
    assert np.mean(told) == pytest.approx(np.std(scales), rel=0.15)
