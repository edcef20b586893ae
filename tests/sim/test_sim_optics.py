import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import fresnel, sici

from bcmi_beamline.sim.optics import DetectorWindow, centred, fresnel_matrix

WAVELENGTH, PIXEL = 0.13776e-9, 75e-6


def window(oversampling=2, shift=(0.0, 0.0), distance=5.35, pixels=128):
    return DetectorWindow(pixels, oversampling, shift, WAVELENGTH, distance, PIXEL)


@pytest.mark.parametrize("distance", [1e-3, 3.15e-3, 10e-3])
def test_gaussian_beam_spreads_as_it_must(distance):
    waist = 0.4e-6
    source, target = centred(301, 10e-9), centred(201, 20e-9)
    wave = fresnel_matrix(target, source, WAVELENGTH, distance) @ np.exp(-((source / waist) ** 2))
    rayleigh = np.pi * waist**2 / WAVELENGTH
    # the q parameter, with the constant phase of the kernel dropped as there
    q = 1 + 1j * distance / rayleigh
    expected = np.exp(-(target**2) / (waist**2 * q)) / np.sqrt(q) * np.exp(1j * np.pi / 4)
    np.testing.assert_allclose(wave, expected, atol=2e-4)


@pytest.mark.parametrize("distance", [1.35e-3, 10e-3])
def test_slit_gives_cornu_spiral(distance):
    width, step = 0.6e-6, 2e-9
    source = (np.arange(300) - 149.5) * step
    target = centred(161, 25e-9)
    wave = fresnel_matrix(target, source, WAVELENGTH, distance).sum(axis=1)
    scale = np.sqrt(2 / (WAVELENGTH * distance))
    (s1, c1), (s0, c0) = (fresnel((edge - target) * scale) for edge in (width / 2, -width / 2))
    expected = ((c1 - c0) + 1j * (s1 - s0)) / np.sqrt(2)
    np.testing.assert_allclose(wave, expected, atol=3e-3)


def test_straight_edge_gives_fresnel_fringes():
    """A quarter of the intensity at the edge, 1.37 of it in the first fringe (Born and Wolf, 8.7.3)."""
    distance = 1.35e-3
    source = (np.arange(4000) + 0.5) * 2e-9
    # the far end fades out over 4 um, or it would make fringes of its own
    fade = np.cos(np.pi / 2 * np.clip((source - 4e-6) / 4e-6, 0, 1)) ** 2
    scale = np.sqrt(2 / (WAVELENGTH * distance))
    target = np.linspace(-0.5e-6, 1.2e-6, 171)
    intensity = np.abs(fresnel_matrix(target, source, WAVELENGTH, distance) @ fade) ** 2
    s, c = fresnel(target * scale)
    np.testing.assert_allclose(intensity, ((c + 0.5) ** 2 + (s + 0.5) ** 2) / 2, atol=5e-3)
    assert intensity[50] == pytest.approx(0.25, abs=5e-3)
    assert intensity.max() == pytest.approx(1.370, abs=5e-3)
    assert target[intensity.argmax()] * scale == pytest.approx(1.217, abs=0.05)


def test_coarse_source_shows_no_replica():
    source = centred(40, 10e-9)
    period = WAVELENGTH * 1e-3 / 10e-9
    target = np.array([0.0, 0.3, 0.7, 1.0]) * period
    wave = np.abs(fresnel_matrix(target, source, WAVELENGTH, 1e-3).sum(axis=1))
    assert wave[0] > 0.1
    assert (wave[2:] == 0).all()


def by_way_of_a_plane(near, wave, y, x, distance):
    """Propagate to a plane and on to the detector."""
    _, to_rows, to_columns = near.arrival(y, x, distance)
    return near.intensity(to_rows @ wave @ to_columns)


def rectangle(rows=40, columns=60, step=10e-9):
    y, x = (np.arange(n) - (n - 1) / 2 for n in (rows, columns))
    return np.ones((rows, columns), np.complex64), y * step, x * step


def test_box_gives_sinc_squared_integrated_over_pixels():
    wave, y, x = rectangle()
    intensity = window().intensity_of_source(wave, y, x)
    column = intensity.sum(axis=0) / intensity.sum()

    def integral(t):
        """Antiderivative of sinc^2, t in units of its first zero."""
        t = np.where(t == 0, 1e-12, t)
        return (sici(2 * np.pi * t)[0] - np.sin(np.pi * t) ** 2 / (np.pi * t)) / np.pi

    edges = (np.arange(129) - 64 - 0.5) * PIXEL
    zero = WAVELENGTH * 5.35 / 600e-9
    expected = np.diff(integral(edges / zero))
    np.testing.assert_allclose(column, expected / expected.sum(), atol=2e-3 * column.max())


@pytest.mark.parametrize(("distance", "oversampling"), [(1.0, 6), (5.35, 2), (20.0, 2)])
def test_detector_may_stand_anywhere(distance, oversampling):
    """A Gaussian beam ten pixels wide there, by way of a plane 1.35 mm downstream and straight."""
    width = 10 * PIXEL
    waist = WAVELENGTH * distance / (2 * np.pi * width)
    y = x = centred(251, waist / 40)
    wave = np.exp(-((y[:, None] / waist) ** 2) - (x / waist) ** 2).astype(np.complex64)
    straight = window(distance=distance).intensity_of_source(wave, y, x)
    near = window(oversampling, distance=distance - 1.35e-3)
    stepped = by_way_of_a_plane(near, wave, y, x, 1.35e-3)
    index = (np.arange(128) - 64) * PIXEL
    for intensity in (straight, stepped):
        profile = intensity.sum(axis=0) / intensity.sum()
        # the pixel adds its own width
        assert np.sqrt(profile @ index**2 - PIXEL**2 / 12) == pytest.approx(width, rel=5e-3)


def test_far_field_keeps_the_photons():
    y = x = centred(61, 20e-9)
    wave = np.exp(-(y[:, None] ** 2 + x**2) / 0.3e-6**2).astype(np.complex64)
    total = (np.abs(wave) ** 2).sum() * 20e-9**2
    assert window().intensity_of_source(wave, y, x).sum() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(("distance", "oversampling"), [(1e-3, 2), (3.15e-3, 3), (10e-3, 4)])
def test_two_steps_to_the_detector_equal_one(distance, oversampling):
    """Free space only: by way of a modulator plane, and straight."""
    rng = np.random.default_rng(0)
    wave, y, x = rectangle()
    envelope = np.exp(-((y[:, None] / 1.2e-7) ** 2) - (x / 1.6e-7) ** 2)
    bumps = np.exp(1j * 2 * np.sin(9e6 * x + rng.normal()) + 1j * 1.5 * np.cos(1.3e7 * y[:, None] + 0.3))
    wave = (wave * envelope * bumps).astype(np.complex64)
    shift = (0.3, -0.2)
    near = window(oversampling, shift, 5.35 - distance, pixels=256)
    direct = window(4, shift, 5.35, pixels=256).intensity_of_source(wave, y, x)
    stepped = by_way_of_a_plane(near, wave, y, x, distance)
    # what differs is how finely a pixel is integrated
    np.testing.assert_allclose(stepped, direct, atol=5e-3 * direct.max())


@given(
    oversampling=st.integers(2, 4),
    row=st.floats(-0.5, 0.5),
    column=st.floats(-0.5, 0.5),
)
@settings(max_examples=15, deadline=None)
def test_pattern_stands_where_the_shift_says(oversampling, row, column):
    y, x = centred(41, 15e-9), centred(51, 15e-9)
    wave = np.exp(-((y[:, None] / 1.5e-7) ** 2) - (x / 2e-7) ** 2).astype(np.complex64)
    intensity = window(oversampling, (row, column)).intensity_of_source(wave, y, x)
    index = np.arange(128) - 64
    assert intensity.sum(axis=1) @ index / intensity.sum() == pytest.approx(row, abs=5e-3)
    assert intensity.sum(axis=0) @ index / intensity.sum() == pytest.approx(column, abs=5e-3)


@pytest.mark.parametrize("oversampling", [2, 3])
def test_unshifted_pattern_is_even_about_the_central_pixel(oversampling):
    wave, y, x = rectangle()
    intensity = by_way_of_a_plane(window(oversampling, pixels=320), wave, y, x, 1.35e-3)[1:, 1:]
    np.testing.assert_allclose(intensity, intensity[::-1, ::-1], atol=1e-3 * intensity.max())
    assert np.unravel_index(intensity.argmax(), intensity.shape) == (159, 159)
