"""One frame and a known modulator: the wave at the object, from noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.reconstruction.coherent_modulation import ModulationOperator, image_wave

N, PIXEL, WAVELENGTH, D1 = 128, 40e-9, 0.13776e-9, 0.9e-3


def _modulator(rng):
    noise = ndimage.gaussian_filter(rng.standard_normal((N, N)), 2, mode="wrap")
    return np.where(noise > 0.3 * noise.std(), 0.84 * np.exp(-2.47j), 1)


def _frame(rng, modulator, counts=1e6):
    """Counts of a faceted, strained object, by a Fresnel integral written out as matrices."""
    x = (np.arange(N) - N // 2) * PIXEL
    inside = (np.abs(x) < 330e-9) & (np.abs(x[:, None] + 0.4 * x) < 260e-9)
    wave = inside * (1 + x / 1e-6) * np.exp(2.5j * np.sin(x / 150e-9) + 2j * (x[:, None] / 200e-9) ** 2)
    away = x[:, None] - x
    kernel = np.exp(1j * np.pi / (WAVELENGTH * D1) * away**2)
    kernel[np.abs(away) > WAVELENGTH * D1 / (2 * PIXEL)] = 0  # angles that the pixels do not hold
    far = np.fft.fftshift(np.fft.fft2(modulator * (kernel @ wave @ kernel.T)))
    intensity = np.abs(far) ** 2
    return rng.poisson(intensity * counts / intensity.sum()), wave


def correlation(a, b):
    return abs(np.vdot(a, b)) / (np.linalg.norm(a) * np.linalg.norm(b))


def test_operator_and_adjoint():
    rng = np.random.default_rng(0)
    operator = ModulationOperator(_modulator(rng), (PIXEL, PIXEL), WAVELENGTH, D1)
    a, b = (rng.standard_normal((2, N, N)) + 1j * rng.standard_normal((2, N, N))).astype(np.complex64)
    assert np.vdot(a, operator.forward(b)) == pytest.approx(np.vdot(operator.adjoint(a), b), rel=1e-3)
    assert operator.forward(a).dtype == operator.adjoint(a).dtype == np.complex64


def test_wave_from_one_frame_and_noise():
    rng = np.random.default_rng(1)
    modulator = _modulator(rng)
    frame, truth = _frame(rng, modulator)
    mask = np.zeros((N, N), bool)
    mask[70:73] = mask[:, 30:32] = True
    frame[mask] = 10**6
    operator = ModulationOperator(modulator, (PIXEL, PIXEL), WAVELENGTH, D1)
    found = image_wave(frame, operator, mask=mask)
    assert correlation(found.wave, truth) > 0.97
    # there is no twin: the other one of conventional imaging is no answer here
    assert correlation(found.wave, truth[::-1, ::-1].conj()) < 0.6
    assert found.support.sum() < 3 * (np.abs(truth) > 0).sum()
    again = image_wave(frame, operator, mask=mask, start=found.wave, iterations=20)
    assert again.r2[-1] < 1.02 * found.r2[-1]


def test_refuses_in_one_line():
    operator = ModulationOperator(np.ones((N, N)), (PIXEL, PIXEL), WAVELENGTH, D1)
    frame = np.ones((N, N))
    for change, said in (
        ({"frame": np.ones((8, 8))}, "frame"),
        ({"frame": 0 * frame}, "counts"),
        ({"support": np.ones((4, 4), bool)}, "support"),
        ({"iterations": 0}, "iterations"),
    ):
        with pytest.raises(ValueError, match=said):
            image_wave(**{"frame": frame, "operator": operator, **change})
