"""Calibration against a small scan whose truth is known, and against a measured one.

The scan is made here by a Fresnel integral, on a grid twice as fine as the reconstruction's.
"""

from __future__ import annotations

import bz2
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import minimize

from bcmi_beamline.data import read_cxi
from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography import calibrate
from bcmi_beamline.reconstruction.ptychography._positions import turned
from bcmi_beamline.scans import Modulator, PtychographyScan

WAVELENGTH, PIXEL, D2 = 0.13776e-9, 150e-6, 5.35
N, FINE = 128, 2
D1, NOMINAL_D1 = 0.907e-3, 0.9e-3
STEP_RAD, FILM_MODULUS = 2.47, 0.843
NEAR_FIELD = Path(__file__).parents[2].parent / "shared" / "data" / "PETRAIII_P25_Near_Field_Ptycho.cxi"
STAR = Path(__file__).parents[2].parent / "shared" / "data" / "siemens-star-small.npz.bz2"


@dataclass
class Made:
    scan: PtychographyScan
    positions: np.ndarray
    film: np.ndarray
    film_pixel: float
    centre: tuple[float, float]


def _crystal(x, y):
    """Thickness of a faceted crystal, about 330 x 400 nm, with a smooth phase."""
    thickness = np.full(np.broadcast(x, y).shape, 250e-9)
    for angle, reach in ((0, 160), (58, 185), (118, 180), (180, 165), (236, 190), (301, 175)):
        a = np.deg2rad(angle)
        thickness = np.minimum(thickness, 2 * (reach * 1e-9 - x * np.cos(a) - y * np.sin(a)))
    phase = 0.6 * np.sin(x / 110e-9 + 0.4) * np.cos(y / 140e-9)
    return np.clip(thickness, 0, None) * np.exp(1j * phase)


def _beam(x, y):
    """Fresnel integral of the crystal over D1, by two matrix products on the coordinates asked for."""
    source = np.arange(-280, 281, 5) * 1e-9

    def kernel(target):
        return np.exp(1j * np.pi / (WAVELENGTH * D1) * (target[:, None] - source) ** 2)

    return kernel(y) @ _crystal(source, source[:, None]) @ kernel(x).T


def make(counts=1e6, seed=0, error=5e-9, extent=2.4e-6, step=0.18e-6, centre=(2.0e-6, -1.0e-6)) -> Made:
    rng = np.random.default_rng(seed)
    pixel = WAVELENGTH * D2 / (N * PIXEL) / FINE
    n = N * FINE
    axis = (np.arange(n) - n // 2) * pixel
    noise = ndimage.gaussian_filter(rng.standard_normal((700, 700)), 80e-9 / pixel)
    film = ndimage.gaussian_filter((noise > np.quantile(noise, 0.58)).astype(float), 0.6)
    modulator = (FILM_MODULUS * np.exp(-1j * STEP_RAD)) ** film
    index = np.arange(400)
    radius, angle = step * np.sqrt((index + 0.5) / np.pi), 2.399963 * index
    positions = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    positions = positions[(np.abs(positions) < extent / 2).all(axis=1)]
    true = positions + rng.normal(0, error, positions.shape)
    true -= (true - positions).mean(axis=0)
    frames = np.empty((len(true), N, N), np.uint16)
    scale = np.sqrt(counts / (np.abs(_beam(axis, -axis)) ** 2).sum())
    window = slice(n // 2 - N // 2, n // 2 + N // 2)
    for j, (x, y) in enumerate(true):
        column, row = 350 - n // 2 - x / pixel, 350 - n // 2 + y / pixel
        whole_row, whole_column = round(row), round(column)
        # the window lies on whole fine pixels and the beam is computed where it then stands
        beam = scale * _beam(axis + (whole_column - column) * pixel, -axis - (whole_row - row) * pixel)
        patch = modulator[whole_row : whole_row + n, whole_column : whole_column + n]
        wave = np.fft.fftshift(np.fft.fft2(beam * patch, norm="ortho"))
        frames[j] = rng.poisson(np.abs(wave[window, window]) ** 2)
    mask = np.zeros((N, N), bool)
    mask[75:78] = mask[:, 20:23] = True
    frames[:, mask] = 65535
    scan = PtychographyScan(frames, positions + centre, mask, WAVELENGTH, D2, PIXEL, NOMINAL_D1)
    return Made(scan, true + centre, modulator, pixel, centre)


@pytest.fixture(scope="module")
def made() -> Made:
    return make()


@pytest.fixture(scope="module")
def calibrated(made: Made) -> Modulator:
    return calibrate(made.scan, iterations=40)


def few(scan: PtychographyScan, n: int) -> PtychographyScan:
    return replace(scan, frames=scan.frames[:n], positions=scan.positions[:n])


def true_film(made: Made, modulator: Modulator, shift) -> np.ndarray:
    """Truth on the array of the result, cut to its band, moved by `shift` (x, y) metres."""
    keep = np.abs(np.fft.fftfreq(len(made.film))) < 0.5 / FINE
    film = np.fft.ifft2(np.fft.fft2(made.film) * keep[:, None] * keep)
    rows, columns = (
        len(film) // 2 + ((np.arange(n) - n // 2) * modulator.pixel_size + at) / made.film_pixel
        for n, at in zip(
            modulator.transmission.shape,
            (
                modulator.centre[1] - made.centre[1] - shift[1],
                -modulator.centre[0] + made.centre[0] - shift[0],
            ),
            strict=True,
        )
    )
    grid = np.meshgrid(rows, columns, indexing="ij")
    return ndimage.map_coordinates(film.real, grid, order=3) + 1j * ndimage.map_coordinates(
        film.imag, grid, order=3
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(np.vdot(a, b)) / (np.linalg.norm(a) * np.linalg.norm(b))


def test_transmission_is_the_modulator(made, calibrated):
    lit = calibrated.trusted

    def mismatch(shift_nm):
        return -correlation(true_film(made, calibrated, shift_nm * 1e-9)[lit], calibrated.transmission[lit])

    start = np.array([[0.0, 0.0], [15.0, 0.0], [0.0, 15.0]])
    best = minimize(mismatch, [0, 0], method="Nelder-Mead", options={"initial_simplex": start, "maxiter": 30})
    assert -best.fun > 0.98
    # the crystal's centre of mass is the origin: here it lies a few nanometres from where it was drawn
    assert np.abs(best.x).max() < 20
    bare = np.abs(true_film(made, calibrated, best.x * 1e-9) - 1) < 0.05
    assert np.median(np.abs(calibrated.transmission[lit & bare])) == pytest.approx(1, abs=0.03)
    assert np.angle(calibrated.transmission[lit & bare].sum()) == pytest.approx(0, abs=0.05)


def test_levels_of_the_film(calibrated):
    assert calibrated.metadata["phase_step_rad"] == pytest.approx(STEP_RAD, abs=0.05)
    assert calibrated.metadata["transmission_modulus"] == pytest.approx(FILM_MODULUS, abs=0.02)
    assert calibrated.metadata["two_valuedness"] > 0.8


def test_distance_is_found_within_ten_micrometres(calibrated):
    assert calibrated.sample_distance == pytest.approx(D1, abs=10e-6)
    assert 0.1e-6 < calibrated.sample_distance_error < 10e-6
    assert abs(calibrated.sample_distance - D1) < 4 * calibrated.sample_distance_error


def test_positions_are_refined(made, calibrated):
    before = made.scan.positions - made.positions
    after = calibrated.positions - made.positions
    assert after.std() < 0.3 * before.std()
    np.testing.assert_array_equal(calibrated.positions_start, made.scan.positions)
    np.testing.assert_allclose(
        (calibrated.positions - calibrated.positions_start).mean(axis=0), 0, atol=1e-12
    )


def test_container_reproduces_the_frames(made, calibrated):
    """From the contract alone: |FFT2(probe * patch)|**2, unitary, counts, patch where position says."""
    p, (h, w) = calibrated.pixel_size, calibrated.transmission.shape
    f = np.fft.fftfreq(N)
    error = counted = 0.0
    for frame, (x, y) in zip(made.scan.frames[::6], calibrated.positions[::6], strict=True):
        column = w // 2 - N // 2 - (x - calibrated.centre[0]) / p
        row = h // 2 - N // 2 + (y - calibrated.centre[1]) / p
        r, c = round(row), round(column)
        ramp = np.exp(-2j * np.pi * (f[:, None] * (row - r) + f * (column - c)))
        probe = np.fft.ifft2(np.fft.fft2(calibrated.probe[0]) * ramp)
        wave = np.fft.fft2(probe * calibrated.transmission[r : r + N, c : c + N], norm="ortho")
        model = np.fft.fftshift(np.abs(wave))
        good = ~made.scan.mask
        error += ((model - np.sqrt(frame)) ** 2)[good].sum()
        counted += frame[good].sum(dtype=float)
    assert error / counted == pytest.approx(calibrated.r2[-1], rel=0.15)


def test_crystal_is_on_the_axis(calibrated):
    wave = propagate(calibrated.probe, (calibrated.pixel_size,) * 2, WAVELENGTH, -calibrated.sample_distance)[
        0
    ]
    power = np.abs(wave) ** 2
    power[power < 0.01 * power.max()] = 0
    centre = np.array(ndimage.center_of_mass(power)) - N // 2
    assert np.abs(centre).max() < 0.2
    assert np.sqrt((power > 0.1 * power.max()).sum()) * calibrated.pixel_size < 450e-9


def test_fit_improves_on_pixels_it_never_saw(calibrated):
    assert calibrated.free_llk[-1] < 1
    assert calibrated.free_llk[-1] < 0.3 * calibrated.free_llk[4]
    assert calibrated.r2[-1] < calibrated.r2[20] < calibrated.r2[5]


def test_half_scans_tell_the_resolution(made):
    """More light, finer detail: the rings of two half scans part at a higher frequency."""
    dark = replace(made.scan, frames=np.random.default_rng(0).binomial(made.scan.frames, 0.002))
    bright, faint = (
        calibrate(s, iterations=6, refine_positions=False, resolution=True).metadata
        for s in (made.scan, dark)
    )
    pixel = WAVELENGTH * D2 / (N * PIXEL)
    assert pixel * 0.99 < bright["resolution_half_period_m"] < 0.7 * faint["resolution_half_period_m"]
    frequency, correlation = np.array(bright["ring_correlation"]).T
    assert correlation[frequency < 2e6].mean() > 0.9


def test_metadata_can_be_stored(calibrated):
    assert json.loads(json.dumps(calibrated.metadata))["configuration"]["iterations"] == 40


def test_same_seed_same_result(made):
    scan = few(made.scan, 24)
    messages = []
    a = calibrate(scan, iterations=2, seed=5, progress=lambda done, text: messages.append((done, text)))
    b = calibrate(scan, iterations=2, seed=5)
    c = calibrate(scan, iterations=2, seed=6)
    np.testing.assert_array_equal(a.transmission, b.transmission)
    assert not np.array_equal(a.transmission, c.transmission)
    assert a.transmission.dtype == a.probe.dtype == np.complex64
    assert [done for done, _ in messages] == [0.5, 1.0]
    assert "R2" in messages[-1][1]


def test_a_stage_that_is_turned_is_found(made):
    angle = 0.02
    scan = few(made.scan, 90)
    askew = replace(scan, positions=turned(scan.positions, np.exp(1j * angle)))
    found = calibrate(askew, iterations=1, refine_rotation=True)
    assert np.deg2rad(found.metadata["stage_rotation_deg"]) == pytest.approx(-angle, abs=0.25 * angle)
    assert found.metadata["stage_scale"] == pytest.approx(1, abs=2e-3)


def test_a_running_scan_is_taken_in_as_it_comes(made, calibrated):
    seen = []
    arriving = (few(made.scan, n) for n in (30, 90, 91, 140, 1000))
    result = calibrate(
        arriving, iterations=40, patience=4, show=lambda image, probe, pixel: seen.append(image.shape)
    )
    assert len(result.positions) == len(made.scan.frames)
    assert np.prod(seen[0]) <= np.prod(seen[-1])
    assert len(result.r2) < 40  # it stops by itself
    assert result.free_llk[-1] < 1.1 * calibrated.free_llk[-1]  # and not too early
    assert result.sample_distance == pytest.approx(D1, abs=10e-6)


def test_a_scan_that_never_came_is_refused():
    with pytest.raises(ValueError, match="no scan"):
        calibrate(iter([]))


def test_positions_stay_where_asked_and_modes_are_orthogonal(made):
    result = calibrate(few(made.scan, 40), iterations=4, modes=3, refine_positions=False)
    np.testing.assert_allclose(result.positions, result.positions_start, atol=1e-15)
    flat = result.probe.reshape(3, -1)
    gram = flat.conj() @ flat.T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-3 * gram[0, 0].real
    powers = result.metadata["mode_powers"]
    assert powers == sorted(powers, reverse=True)
    assert sum(powers) == pytest.approx(1)


def test_two_modes_explain_a_partly_coherent_beam(made):
    """Every frame the sum of itself and of a copy moved by 5 pixels: two beams that do not interfere."""
    frames = made.scan.frames.astype(np.float32)
    mixed = (0.7 * frames + 0.3 * np.roll(frames, 5, axis=2)).astype(np.float32)
    scan = replace(made.scan, frames=mixed, mask=made.scan.mask.copy())
    scan.mask[:, 20:28] = True
    one, two = (calibrate(few(scan, 90), iterations=12, modes=m) for m in (1, 2))
    assert two.r2[-1] < 0.8 * one.r2[-1]
    assert two.free_llk[-1] < 0.8 * one.free_llk[-1]
    assert two.metadata["mode_powers"][1] > 0.03


def test_flux_is_taken_out(made):
    scan = few(made.scan, 40)
    flux = np.random.default_rng(1).uniform(0.2, 1.8, 40)
    scaled = replace(scan, frames=(scan.frames * flux[:, None, None]).astype(np.float32), flux=7 * flux)
    told, untold = (calibrate(replace(scaled, flux=f), iterations=8) for f in (7 * flux, None))
    assert told.r2[-1] < 0.5 * untold.r2[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: replace(s, frames=s.frames[:5], positions=s.positions[:5]), "too few"),
        (lambda s: replace(s, positions=s.positions * 1e6), "units"),
        (lambda s: replace(s, positions=np.zeros_like(s.positions)), "equal"),
        (lambda s: replace(s, positions=s.positions * 20), "near-field"),
        (lambda s: replace(s, mask=np.zeros_like(s.mask)), r"\(0, 20\).*mask"),
        (lambda s: replace(s, frames=np.zeros_like(s.frames)), "no counts"),
        (lambda s: replace(s, frames=np.where(s.mask, 1, np.nan) + 0 * s.frames), "not finite"),
        (lambda s: replace(s, initial_probe=np.ones((8, 8))), "does not fit"),
        (lambda s: replace(s, flux=np.zeros(len(s.frames))), "flux"),
    ],
)
def test_refuses_in_one_line(made, change, said):
    with pytest.raises(ValueError, match=said) as refusal:
        calibrate(change(few(made.scan, 20)), iterations=1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [{"iterations": 0}, {"modes": 0}, {"modes": 99}])
def test_refuses_parameters_out_of_range(made, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        calibrate(made.scan, **bad)


@pytest.mark.skipif(not NEAR_FIELD.exists(), reason=f"measured data not at {STAR.parent}")
def test_measured_near_field_is_refused_for_what_it_is():
    scan = read_cxi(NEAR_FIELD)
    with pytest.raises(ValueError, match="near-field"):
        calibrate(scan)


@pytest.mark.skipif(not STAR.exists(), reason=f"measured data not at {STAR.parent}")
def test_measured_siemens_star():
    """Ordinary far-field ptychography; a plain ePIE comes to R2 = 0.0139 in 25 passes."""
    data = np.load(io.BytesIO(bz2.decompress(STAR.read_bytes())))
    frames = np.fft.fftshift(data["data"][0], axes=(1, 2))
    n, pixel = frames.shape[-1], 10e-9
    positions = data["scan"][0][:, ::-1] * (-pixel, pixel)
    # the file gives no wavelength: any that makes the object pixel what positions are scaled with
    scan = PtychographyScan(
        frames, positions, np.zeros((n, n), bool), 1e-10, pixel * n * 75e-6 / 1e-10, 75e-6,
        initial_probe=data["probe"].reshape(n, n),
    )  # fmt: skip
    result = calibrate(scan, iterations=25)
    assert result.r2[-1] < 0.0139
    assert result.free_llk[-1] < 1
    assert result.sample_distance == 0
    assert np.isnan(result.sample_distance_error)
