"""A slow phase hides behind features that are moved; one step finds it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.reconstruction.fourier import fft2
from bcmi_beamline.reconstruction.ptychography._engine import Engine
from bcmi_beamline.reconstruction.ptychography._phases import put_on

WAVELENGTH, DISTANCE, PIXEL, N = 1.4e-10, 6e-4, 30e-9, 128
REACH = np.full(2, WAVELENGTH * DISTANCE / (2 * np.pi * PIXEL**2))
EXTENT = 120


@pytest.fixture(scope="module")
def scene():
    """A beam that diverges, a film with holes, the corners of the windows, and a slow phase."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:N, :N] - N // 2
    modulus = np.exp(-((np.hypot(x, y) / 36) ** 6)) * (1.5 + np.cos(x / 7 + y / 11))
    probe = 10 * modulus * np.exp(1j * np.pi * (x**2 + y**2) * PIXEL**2 / (WAVELENGTH * DISTANCE))
    shape = (N + EXTENT + 4, N + EXTENT + 4)
    film = ndimage.gaussian_filter(rng.standard_normal(shape), 3) > 0
    image = np.exp(2.4j * ndimage.gaussian_filter(film.astype(float), 0.7)).astype(np.complex64)
    k = np.arange(120)
    away = EXTENT / 2 * np.sqrt((k + 0.5) / len(k))
    corners = np.stack([away * np.sin(2.399963 * k), away * np.cos(2.399963 * k)], axis=1) + EXTENT / 2 + 2
    rows, columns = (np.indices(shape) - shape[0] / 2) / shape[0]
    phase = (np.cos(5 * rows + 1) * np.cos(6 * columns)).astype(np.float32)
    return probe.astype(np.complex64), image, np.rint(corners), phase


def amplitudes(probe, image, corners):
    windows = [image[r : r + N, c : c + N] for r, c in corners.astype(int)]
    return np.abs(fft2(probe * np.stack(windows)))


def test_features_that_move_hide_a_slow_phase(scene):
    probe, image, corners, phase = scene
    true, phase = amplitudes(probe, image, corners[:20]), 0.2 * phase
    bare = np.square(amplitudes(probe, image * np.exp(1j * phase), corners[:20]) - true).sum()
    hidden = np.square(amplitudes(probe, put_on(image, phase, REACH), corners[:20]) - true).sum()
    wrong = np.square(amplitudes(probe, put_on(image, phase, -REACH), corners[:20]) - true).sum()
    assert hidden < 0.6 * bare
    assert wrong > 2.5 * bare


def slow_error(engine, image):
    """Phase (rms, rad) by which the object is off where it is well lit, slowly, without a ramp."""
    light = engine.illumination()
    lit = light > 0.5 * light.max()
    ratio = np.where(lit, engine.image * image.conj(), 0)
    parts = [ndimage.gaussian_filter(p, 6)[lit] for p in (ratio.real, ratio.imag)]
    phase = np.angle((parts[0] + 1j * parts[1]) / (parts[0] + 1j * parts[1]).sum())
    design = np.stack([np.ones(lit.sum()), *np.nonzero(lit)], axis=1)
    return float((phase - design @ np.linalg.lstsq(design, phase, rcond=None)[0]).std())


def test_a_slow_phase_comes_home_in_one_step(scene):
    probe, image, corners, phase = scene
    frames = np.fft.fftshift(amplitudes(probe, image, corners) ** 2, axes=(1, 2)).astype(np.float32)
    left = []
    for step in (False, True):
        engine = Engine(
            frames, np.zeros((1, N, N), np.uint8), corners, probe[None], put_on(image, phase, REACH),
            np.ones(len(corners)), np.random.default_rng(0),
        )  # fmt: skip
        for _ in range(3):
            engine.sweep(locate=True)
        if step:
            engine.follow_phase((PIXEL, PIXEL), WAVELENGTH, DISTANCE)
        for _ in range(3):
            engine.sweep()
        left.append(slow_error(engine, image))
    assert left[1] < 0.6 * left[0]
