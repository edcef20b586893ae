"""The twin against the textbook's Fourier model written from the conventions of `geometry` alone."""

import numpy as np
import pytest

from bcmi_beamline.config import Preset, load_beamline, load_preset
from bcmi_beamline.sim import Twin

BEAMLINE = load_beamline()
N = 512


@pytest.fixture(scope="module")
def twin():
    values = load_preset("small").model_dump()
    values["sim"] |= {"hidden": {"distance_um": 7.0, "mphi_deg": -1.2}, "nuisances": {}}
    values["sim"]["modulator"]["extent_um"] = 16.0
    return Twin(BEAMLINE, Preset.model_validate(values))


def shifted(image, columns, rows):
    """Move `image` by fractions of a pixel."""
    fy, fx = (np.fft.fftfreq(n) for n in image.shape)
    ramp = np.exp(-2j * np.pi * (fx * columns + fy[:, None] * rows))
    return np.fft.ifft2(np.fft.fft2(image) * ramp)


def fourier_model(twin, angle_deg, x_um, y_um, change):
    """Amplitudes of a frame from truth: project, angular spectrum, times the modulator, transform."""
    distance = twin.truth_distance()
    geometry = BEAMLINE.geometry(distance)
    step, wavelength = geometry.object_pixel(N), geometry.wavelength
    image, voxel = twin.truth_object()
    z, rows, columns = ((np.arange(n) - n // 2) * h for n, h in zip(image.shape, voxel, strict=True))
    dq = np.deg2rad(angle_deg) * geometry.rocking_gradient
    exit_wave = np.tensordot(np.exp(1j * dq[2] * z), image, 1) * np.exp(1j * dq[0] * columns)
    f = np.fft.fftfreq(N, step)
    spectrum = (
        np.exp(-2j * np.pi * np.outer(f, rows)) @ exit_wave @ np.exp(-2j * np.pi * np.outer(columns, f))
    )
    spectrum *= np.exp(-1j * np.pi * wavelength * distance * (f[:, None] ** 2 + f**2))
    wave = np.fft.fftshift(np.fft.ifft2(spectrum))
    modulator = twin.truth_modulator(step, (N + 64, N + 64))
    modulator = shifted(modulator, x_um * 1e-6 / step, -y_um * 1e-6 / step)[32:-32, 32:-32]
    return np.abs(np.fft.fftshift(np.fft.fft2(wave * change(modulator))))


@pytest.mark.parametrize(
    ("angle_deg", "x_um", "y_um"), [(0, 0, 0), (0, 0.5, 0.3), (0.03, 0, 0), (-0.03, 0, 0)]
)
def test_twin_obeys_the_conventions(twin, angle_deg, x_um, y_um):
    pose = twin.aligned_pose()
    pose |= {"phi": pose["phi"] + angle_deg, "x": pose["x"] + x_um, "y": pose["y"] + y_um}
    rate = twin._rate(pose, (0.0, 0.0), 0.0)
    middle = len(rate) // 2
    seen = np.sqrt(rate[middle - 100 : middle + 100, middle - 100 : middle + 100]).astype(float)

    def agreement(angle, x, y, change=lambda modulator: modulator):
        model = fourier_model(twin, angle, x, y, change)[
            N // 2 - 100 : N // 2 + 100, N // 2 - 100 : N // 2 + 100
        ]
        return (model * seen).sum() / np.sqrt((model**2).sum() * (seen**2).sum())

    assert agreement(angle_deg, x_um, y_um) > 0.998
    # what a wrong sign would give
    assert agreement(angle_deg, x_um, y_um, np.conj) < 0.95
    if angle_deg:
        assert agreement(-angle_deg, x_um, y_um) < 0.95
    if x_um:
        assert agreement(angle_deg, -x_um, y_um) < 0.95
        assert agreement(angle_deg, x_um, -y_um) < 0.95
