"""The BCMI engine on data it cannot have made itself.

The frames come from a brute-force model in the laboratory: a crystal of Gaussian grains is turned by real
rotations, the wave of every grain travels to the modulator in closed form, and the detector is a direct
Fourier sum over a finer plane, integrated over its pixels. No grid, transform or shear is shared with the
engine.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bcmi_beamline.geometry import Geometry, rotation_matrix
from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modulation.coherence import IncidentLight
from bcmi_beamline.reconstruction.modulation.driver import solve
from bcmi_beamline.reconstruction.modulation.operators import RockingOperator, Window, slow_transform
from bcmi_beamline.reconstruction.modulation.prepare import prepare
from bcmi_beamline.reconstruction.modulation.refine import copy_of, refine
from bcmi_beamline.reconstruction.modulation.scale import scaled, step_to_least
from bcmi_beamline.reconstruction.strain import orthogonalise
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, RockingScan

N = 128
D1 = 1.0e-3
ANGLES = np.arange(-20, 21) * 0.0125


def make_geometry(arm="horizontal", sign=1):
    return Geometry(pixel_size=150e-6, modulator_distance=D1, arm=arm, arm_sign=sign)


class Grains:
    """Crystal of Gaussian grains: no symmetry, phases of its own, known everywhere in closed form."""

    def __init__(self, geometry, count=25, seed=5, width=38e-9):
        rng = np.random.default_rng(seed)
        self.geometry, self.width = geometry, width
        inside = rng.uniform(-1, 1, (400, 3))
        inside = inside[(np.abs(inside).sum(axis=1) < 1.7) & (inside[:, 0] + 0.6 * inside[:, 1] < 0.7)][
            :count
        ]
        self.centres = inside * np.array([170e-9, 140e-9, 180e-9])  # x', y', z'
        x, y, z = inside.T
        tilt = 2.0 * x - 1.5 * y * z + 2.5 * z**2
        self.amplitudes = rng.uniform(0.6, 1.0, count) * np.exp(1j * tilt)

    def density(self, x, y, z):
        """rho at detector-frame points."""
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), complex)
        for (cx, cy, cz), a in zip(self.centres, self.amplitudes, strict=True):
            r2 = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2
            total += a * np.exp(-r2 / (2 * self.width**2))
        return total

    def wave(self, x, y, angle, distance, drift=(0.0, 0.0), tilt=(0.0, 0.0)):
        """Wave `distance` downstream at x (columns) and y (rows) when the crystal is turned by `angle`.

        The incident wave is tilted by `tilt` (x, y), rad/m, in the laboratory.
        """
        g, w = self.geometry, self.width
        frame = g.detector_frame
        turn = rotation_matrix(g.rocking_axis, angle)
        dq = frame @ (turn @ g.q_vector - g.q_vector + [*tilt, 0.0])
        k = g.wavenumber
        total = np.zeros((len(y), len(x)), complex)
        for centre, a in zip(self.centres, self.amplitudes, strict=True):
            c = frame @ turn @ frame.T @ centre
            d = distance - c[2]
            # the lattice's own phase turns with the grain: exp(i (R Q - Q) . r) about the turned centre
            a = a * np.exp(1j * (dq @ c)) * np.exp(-((dq[2] * w) ** 2) / 2)
            beams = []
            for points, at, q in ((x, c[0] + drift[0], dq[0]), (y, c[1] + drift[1], dq[1])):
                q2 = w**2 + 1j * d / k
                u = points - at - q * d / k
                beams.append(
                    np.sqrt(w**2 / q2)
                    * np.exp(-(u**2) / (2 * q2) + 1j * q * (points - at) - 1j * q**2 * d / (2 * k))
                )
            total += a * np.multiply.outer(beams[1], beams[0])
        return total


def film(x, y, seed=3):
    """Smooth two-valued phase pattern, a function of position on the chip."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(40, 2)) * 2 * np.pi / 0.45e-6
    phases = rng.uniform(0, 2 * np.pi, 40)
    noise = np.zeros((len(y), len(x)))
    for (kx, ky), p in zip(waves, phases, strict=True):
        noise += np.real(np.multiply.outer(np.exp(1j * ky * y), np.exp(1j * (kx * x + p))))
    cover = 1 / (1 + np.exp(-noise / 2.5))
    return np.exp(-(2.45j + 0.17) * cover)


COHERENT = ((1.0, (0.0, 0.0)),)


def gaussian_source(length):
    """Seven points, a standard deviation of the tilt apart, of light of coherence `length` along x, m."""
    at = np.arange(-3, 4)
    shares = np.exp(-(at**2) / 2)
    return [(share, (tilt, 0.0)) for share, tilt in zip(shares / shares.sum(), at / length, strict=True)]


def simulate(geometry, angles_deg, *, photons=3e6, moved=(0.0, 0.0), drift=None, source=COHERENT, seed=1):
    """Frames (J, N, N) of the brute-force model, in photons, with module gaps."""
    crystal = Grains(geometry)
    reach = geometry.wavelength * geometry.propagation_distance / geometry.pixel_size
    fine = 3 * N // 2
    step = reach / fine
    x = (np.arange(fine) - fine // 2 + 0.31) * step
    y = -(np.arange(fine) - fine // 2 - 0.17) * step
    screen = film(x - moved[0], y - moved[1])
    pixels = np.arange(N) - N // 2
    frames = np.zeros((len(angles_deg), N, N))
    offsets = (-0.25, 0.25)
    rate = 2 * np.pi * geometry.pixel_size / (geometry.wavelength * geometry.propagation_distance)
    to_rows = [np.exp(1j * rate * np.multiply.outer(pixels + o, y)) for o in offsets]  # row r stands at -y'
    to_columns = [np.exp(-1j * rate * np.multiply.outer(x, pixels + o)) for o in offsets]
    for j, angle in enumerate(np.deg2rad(angles_deg)):
        shift = (0.0, 0.0) if drift is None else drift[j]
        for share, tilt in source:
            wave = crystal.wave(x, y, angle, geometry.modulator_distance, shift, tilt) * screen
            wave *= np.exp(0.5j * rate / geometry.pixel_size * np.add.outer(y**2, x**2))  # to the detector
            for rows in to_rows:
                for columns in to_columns:
                    frames[j] += share * np.abs(rows @ wave @ columns) ** 2
    frames *= photons / frames.sum()
    frames = np.random.default_rng(seed).poisson(frames).astype(np.float32)
    mask = np.zeros((N, N), bool)
    mask[40:43] = True
    mask[:, 90:92] = True
    frames[:, mask] = 2**32 - 1
    return RockingScan(frames, np.asarray(angles_deg, float), mask, geometry, modulator_position=moved)


def make_modulator(geometry, size=N + 24, with_probe=False):
    pixel = geometry.object_pixel(N)
    at = (np.arange(size) - size // 2) * pixel
    probe = np.zeros((1, N, N), np.complex64)
    if with_probe:
        c = (np.arange(N) - N // 2) * pixel
        probe[0] = Grains(geometry).wave(c, -c, 0.0, geometry.modulator_distance)
    return Modulator(
        film(at, -at).astype(np.complex64), pixel, geometry.modulator_distance, 5e-6, (0.0, 0.0), probe
    )


def correlate(result, place=(0.0, 0.0)):
    """Complex correlation with the truth, standing at `place` (x', y'), after the best shift along zeta."""
    nz, ny, nx = result.image.shape
    vz, vy, vx = result.voxel_size
    sx, sy = result.shear
    zeta = ((np.arange(nz) - nz // 2) * vz)[:, None, None]
    y = (-(np.arange(ny) - ny // 2) * vy)[:, None]
    x = (np.arange(nx) - nx // 2) * vx
    best = 0.0
    for shift in np.arange(-3, 3.01, 0.25) * vz:
        truth = Grains(result.geometry).density(x - place[0], y - place[1], zeta + shift + sx * x + sy * y)
        overlap = abs(np.vdot(truth, result.image))
        best = max(best, overlap / np.linalg.norm(truth) / np.linalg.norm(result.image))
    return best


UNEVEN = ANGLES + 0.003 * np.sin(7 * np.arange(len(ANGLES)))


@pytest.mark.parametrize(
    ("arm", "sign", "angles"),
    [
        ("horizontal", 1, ANGLES),
        ("horizontal", -1, ANGLES[::-1]),
        ("vertical", 1, UNEVEN),
        ("vertical", -1, np.random.default_rng(0).permutation(ANGLES)),
    ],
)
def test_an_asymmetric_crystal_comes_out_right_from_a_random_start(arm, sign, angles):
    geometry = make_geometry(arm, sign)
    result = modulation.reconstruct(simulate(geometry, angles), make_modulator(geometry), iterations=8)
    assert correlate(result) > 0.97
    assert result.image.dtype == np.complex64
    assert result.shear == geometry.shear


@pytest.fixture(scope="module")
def scan():
    return simulate(make_geometry(), ANGLES)


def test_a_wrong_sign_of_the_angles_is_not_forgiven(scan):
    wrong = replace(scan, angles_deg=-scan.angles_deg)
    assert (
        correlate(modulation.reconstruct(wrong, make_modulator(scan.geometry), iterations=5, drift="none"))
        < 0.8
    )


def test_a_moved_modulator_is_placed_where_the_nanogoniometer_says(scan):
    moved = (0.4137e-6, -0.2571e-6)
    there = simulate(scan.geometry, ANGLES, moved=moved)
    modulator = make_modulator(scan.geometry, with_probe=True)
    assert correlate(modulation.reconstruct(there, modulator, iterations=10)) > 0.97
    misplaced = replace(there, modulator_position=(-moved[0], -moved[1]))
    assert correlate(modulation.reconstruct(misplaced, modulator, iterations=5, drift="none")) < 0.8


def test_trials_agree_and_say_so(scan):
    lines = []
    modulator = make_modulator(scan.geometry, with_probe=True)
    result = modulation.reconstruct(
        scan,
        modulator,
        trials=3,
        iterations=10,
        progress=lambda fraction, line: lines.append((fraction, line)),
    )
    assert correlate(result) > 0.97
    assert result.mode_weights is not None and result.mode_weights[0] > 0.99
    assert result.error is not None and result.error.shape == (3, 10)
    light = scan.frames[:, ~scan.mask].sum(axis=1)
    assert np.sqrt(np.average(np.square(result.drift).sum(axis=1), weights=light)) < 4e-9  # there is none
    assert result.free_llk is not None and (result.free_llk[:, -1] < 0.6).all()
    fractions = [f for f, _ in lines]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    again = modulation.reconstruct(scan, modulator, trials=1, iterations=3, start="probe")
    assert correlate(again) > 0.95


def test_free_and_masked_pixels_change_nothing(scan):
    modulator = make_modulator(scan.geometry)
    plain = modulation.reconstruct(scan, modulator, iterations=3)
    frames = scan.frames.copy()
    hidden = free_pixels(frames.shape, scan.mask) | scan.mask
    frames[hidden] = 4321
    other = modulation.reconstruct(replace(scan, frames=frames), modulator, iterations=3)
    np.testing.assert_array_equal(plain.image, other.image)
    assert other.free_llk[0, -1] > plain.free_llk[0, -1] + 100


def test_a_crystal_that_slips_is_followed_from_the_frames_alone():
    geometry = make_geometry()
    angles = np.arange(-40, 41) * 0.005
    drift = np.zeros((81, 2))
    drift[43:] = 30e-9, -20e-9
    drifting = simulate(geometry, angles, drift=drift)
    light = drifting.frames[:, ~drifting.mask].sum(axis=1)
    place = np.average(drift, axis=0, weights=light)  # a drift's mean over the light is the crystal's place

    def spread(shifts):
        return np.sqrt(np.average((shifts - np.average(shifts, 0, light)) ** 2, 0, light).sum())

    held = modulation.reconstruct(drifting, make_modulator(geometry), iterations=20, drift="none")
    followed = modulation.reconstruct(drifting, make_modulator(geometry), iterations=20)
    assert held.drift is None
    assert correlate(held, place) < 0.98
    assert correlate(followed, place) > 0.99
    assert followed.free_llk[0, -1] < held.free_llk[0, -1]
    assert spread(followed.drift - drift) < 0.4 * spread(drift)

    after = np.array([0, 30, 42, 60, 80])  # the crystal is seen at its peak again, right before the slip too
    peaks = simulate(geometry, np.zeros(5), photons=5 * light.max(), drift=drift[after], seed=2)
    seen = replace(drifting, sentinels=peaks.frames, sentinel_after=after)
    told = modulation.reconstruct(seen, make_modulator(geometry), iterations=12)
    assert correlate(told, place) > 0.99
    assert spread(told.drift - drift) < 0.15 * spread(drift)


def test_frames_that_leave_the_calibrated_map_do_not_spoil_the_rest(scan):
    modulator = make_modulator(scan.geometry)
    x = (
        np.arange(modulator.transmission.shape[1]) - modulator.transmission.shape[1] // 2
    ) * modulator.pixel_size
    trusted = np.broadcast_to(np.abs(x) < 1.0e-6, modulator.transmission.shape)
    rng = np.random.default_rng(2)
    rubbish = np.exp(2j * np.pi * rng.random(trusted.shape)).astype(np.complex64)
    known = replace(
        modulator, transmission=np.where(trusted, modulator.transmission, rubbish), trusted=trusted.copy()
    )
    assert correlate(modulation.reconstruct(scan, known, iterations=15)) > 0.9


def test_a_known_support_is_kept(scan):
    modulator = make_modulator(scan.geometry)
    first = modulation.reconstruct(scan, modulator, iterations=5)
    again = modulation.reconstruct(scan, modulator, iterations=5, support=first.support)
    assert again.image.shape == first.image.shape
    np.testing.assert_array_equal(again.support, first.support)
    assert correlate(again) > 0.97


def test_the_support_of_another_result_holds_the_crystal_wherever_it_stands(scan):
    """Somewhere in its array, upright, on voxels of its own: what another engine may have made of it."""
    modulator = make_modulator(scan.geometry, with_probe=True)
    options = {"iterations": 5, "drift": "none", "start": "probe"}
    first = modulation.reconstruct(scan, modulator, **options)
    upright = orthogonalise(first)
    aside = (9, 2), (1, 14), (12, 0)
    image, support = (np.pad(a, aside) for a in (upright.image, upright.support))
    other = replace(upright, image=image, support=support)
    problem = prepare(scan, modulator, support=other)
    assert problem.region.sum() < 0.6 * prepare(scan, modulator).region.sum()
    again = modulation.reconstruct(scan, modulator, support=other, **options)
    assert correlate(again) > correlate(first) - 0.003
    with pytest.raises(ValueError, match="empty"):
        prepare(scan, modulator, support=replace(other, support=np.zeros_like(support)))


def test_the_published_iteration_crawls_the_right_way(scan):
    modulator = make_modulator(scan.geometry)
    result = modulation.reconstruct(scan, modulator, iterations=30, method="paper")
    assert result.error[0, -1] < 0.6 * result.error[0, 0]
    assert result.configuration["method"] == "bcmi-paper"


def test_what_does_not_fit_together_is_refused_in_one_line(scan):
    modulator = make_modulator(scan.geometry)
    cases = [
        (replace(scan, geometry=scan.geometry.with_modulator(0.0)), modulator, {}, "modulator out"),
        (scan, replace(modulator, sample_distance=2e-3), {}, "2.000 mm"),
        (replace(scan, modulator_position=(9e-6, 0.0)), modulator, {}, "misses the calibrated map"),
        (scan, replace(modulator, pixel_size=1e-6), {}, "too far apart"),
        (scan, modulator, {"start": "probe"}, "calibrated beam"),
        (scan, modulator, {"trials": 0}, "at least"),
        (scan, modulator, {"coherence": (1e-6, 0.0)}, "coherence lengths must be positive"),
        (scan, modulator, {"coherence": True, "method": "paper"}, "coherent light"),
    ]
    for data, known, options, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            modulation.reconstruct(data, known, **options)
        assert "\n" not in str(error.value)


def test_frames_that_had_more_light_than_the_monitor_says_are_told(scan):
    """Counts thinned to 90 to 100 % of each frame: a flux that wanders by 3 % rms and no one has measured."""
    rng = np.random.default_rng(8)
    kept = rng.uniform(0.9, 1.0, len(ANGLES))
    frames = scan.frames.copy()
    inside = ~scan.mask
    frames[:, inside] = rng.binomial(frames[:, inside].astype(int), kept[:, None])
    dimmed = replace(scan, frames=frames)
    modulator = make_modulator(scan.geometry, with_probe=True)
    with one_thread_per_product():
        problem = prepare(dimmed, modulator)
        trial = solve(problem, 10, np.random.default_rng(0), "probe", "none")
        free = refine(problem, copy_of(trial), 12, fit_brightness=True)
        held = refine(problem, copy_of(replace(trial, brightness=None)), 12)
    assert free.brightness is not None
    bright = problem.counts > 0.05 * problem.counts.max()
    missed = np.diff(np.log(free.brightness**2 / kept)[bright])  # a slow change is one of the crystal's shape
    assert np.sqrt(np.mean(missed**2)) < 0.4 * np.sqrt(np.mean(np.diff(np.log(kept)[bright]) ** 2))
    assert free.score < held.score


def test_counts_that_no_wave_makes_are_found_and_held_apart(scan):
    """A tenth of all counts; where there are none, none are found."""
    frames = scan.frames.copy()
    inside = ~scan.mask
    frames[:, inside] += np.random.default_rng(4).poisson(0.3, frames[:, inside].shape)
    modulator = make_modulator(scan.geometry)
    options = {"iterations": 8, "drift": "none"}
    found = modulation.reconstruct(replace(scan, frames=frames), modulator, **options)
    plain = modulation.reconstruct(scan, modulator, **options)
    assert found.metadata["background_counts"] == pytest.approx(0.3, rel=0.1)
    assert plain.metadata["background_counts"] == 0
    assert correlate(found) > correlate(plain) - 0.003


def test_a_modulator_that_stands_elsewhere_moves_the_crystal_and_spoils_nothing(scan):
    """Frame by frame, a shift of the modulator is one of the crystal: there is nothing to be refined."""
    modulator = make_modulator(scan.geometry, with_probe=True)
    x, y = 0.5 * modulator.pixel_size, -0.5 * modulator.pixel_size
    misplaced = replace(modulator, centre=(-x, -y))
    found = modulation.reconstruct(scan, misplaced, iterations=8, drift="none")
    assert correlate(found, (x, y)) > 0.97
    assert correlate(found) < correlate(found, (x, y)) - 0.01


@pytest.mark.parametrize("wrong", [1.004, 0.997])
def test_a_map_of_wrong_scale_is_corrected_from_the_frames(scan, wrong):
    modulator = scaled(make_modulator(scan.geometry, with_probe=True), wrong)
    options = {"iterations": 8, "start": "probe", "drift": "none"}
    asis = modulation.reconstruct(scan, modulator, **options)
    found = modulation.reconstruct(scan, modulator, refine_scale=True, **options)
    factor, error = (found.configuration[f"modulator_scale{end}"] for end in ("", "_error"))
    assert factor * wrong == pytest.approx(1, abs=1e-3)
    assert error < 1e-3
    assert found.configuration["modulator_distance"] == pytest.approx(D1 * wrong * factor)
    assert correlate(found) > correlate(asis)


def test_a_map_of_right_scale_stays_as_it_is(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    options = {"iterations": 8, "start": "probe", "drift": "none"}
    asis, found = (modulation.reconstruct(scan, modulator, refine_scale=r, **options) for r in (False, True))
    assert found.configuration["modulator_scale"] == pytest.approx(1, abs=1e-3)
    assert correlate(found) > correlate(asis) - 0.002


def test_a_result_tells_what_counting_noise_alone_would_leave(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    options = {"iterations": 8, "start": "probe", "drift": "none"}
    right = modulation.reconstruct(scan, modulator, **options)
    turned = replace(modulator, transmission=modulator.transmission[::-1, ::-1].copy())
    wrong = modulation.reconstruct(scan, turned, **options)
    assert right.metadata["trial_scores"][0] == pytest.approx(right.metadata["noise_score"], rel=0.2)
    assert wrong.metadata["trial_scores"][0] / wrong.metadata["noise_score"] > 2


def test_poissons_likelihood_in_the_last_passes_foretells_unseen_pixels_better(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    options = {"iterations": 8, "start": "probe", "drift": "none"}
    plain, poisson = (
        modulation.reconstruct(scan, modulator, likelihood=which, **options)
        for which in ("anscombe", "poisson")
    )
    assert poisson.free_llk[0, -1] < plain.free_llk[0, -1]
    assert correlate(poisson) > correlate(plain) - 0.002
    assert poisson.configuration["likelihood"] == "poisson"


LENGTH = 0.25e-6


def test_light_of_little_coherence_is_told_from_the_frames_and_spoils_little():
    """The crystal is 0.6 um wide."""
    geometry = make_geometry()
    dim, modulator = simulate(geometry, ANGLES, source=gaussian_source(LENGTH)), make_modulator(geometry)
    options = {"iterations": 8, "drift": "none"}
    asis, found, told = (
        modulation.reconstruct(dim, modulator, coherence=c, **options)
        for c in (False, True, (LENGTH, float("inf")))
    )
    along_x, along_y = found.configuration["coherence_length"]
    assert along_x == pytest.approx(LENGTH, rel=0.15)
    assert along_y is None or along_y > 2 * LENGTH
    assert 1 - correlate(found) < 0.7 * (1 - correlate(asis))
    assert correlate(told) == pytest.approx(correlate(found), abs=0.003)
    assert found.free_llk[0, -1] < 0.9 * asis.free_llk[0, -1]


@pytest.mark.parametrize("arm", ["horizontal", "vertical"])
def test_exit_waves_of_a_tilted_source_are_those_of_the_laboratory(arm):
    """Ramps and turned kappas in the sheared frame against grains in tilted light, up to a phase a frame."""
    geometry = make_geometry(arm)
    pixel = geometry.object_pixel(N)
    x = (np.arange(40) - 20) * pixel
    window, tilt = Window((40, 40)), (4e6, -7e6)
    rocking = RockingOperator(geometry, ANGLES, (pixel, pixel), window)
    optics = SimpleNamespace(window=window, pixel=(pixel, pixel))
    problem = SimpleNamespace(rocking=rocking, operator=optics)
    light = IncidentLight(problem, geometry, np.ones((40, 40, 40), bool))
    sx, sy = geometry.shear
    y, zeta = -x[:, None], rocking.zeta(40)[:, None, None]
    crystal = Grains(geometry).density(x, y, zeta + sx * x + sy * y)
    source = light.source(tilt, 1.0)
    waves = source.ramp * slow_transform(source.matrix, crystal.astype(np.complex64))
    for wave, angle in zip(waves[15:26], np.deg2rad(ANGLES[15:26]), strict=True):
        there = Grains(geometry).wave(x, -x, angle, 0.0, tilt=tilt)
        overlap = abs(np.vdot(there, wave)) / np.linalg.norm(there) / np.linalg.norm(wave)
        assert overlap > 0.999


def test_waves_in_the_light_of_a_source_and_back_belong_together(scan):
    rng = np.random.default_rng(0)
    with one_thread_per_product():
        problem = prepare(scan, make_modulator(scan.geometry, with_probe=True))
    light = IncidentLight(problem, scan.geometry, problem.region)
    lit = problem.lit_by(light.sources((0.3e-6, 0.5e-6)))
    assert len(lit.sources) > 4
    image = rng.normal(size=(*problem.region.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    waves = lit.waves(image)
    other = rng.normal(size=(*waves.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    there = np.vdot(other, problem.weight[:, None, None, None] * waves)
    assert there == pytest.approx(np.vdot(lit.back(other), image), rel=1e-4)


def test_coherent_light_is_found_to_be_coherent(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    options = {"iterations": 8, "start": "probe", "drift": "none"}
    found = modulation.reconstruct(scan, modulator, coherence=True, **options)
    assert found.configuration["coherence_length"] == [None, None]
    assert correlate(found) == correlate(modulation.reconstruct(scan, modulator, **options))


def test_where_misfits_curve_down_the_scale_goes_to_the_lower_side():
    assert step_to_least([2.0, 1.0, 2.0]) == 0
    assert step_to_least([2.0, 1.0, 1.0]) == pytest.approx(0.5e-3)
    assert step_to_least([1.0, 2.0, 1.5]) == pytest.approx(-2e-3)
    assert step_to_least([3.0, 2.0, 1.0]) == pytest.approx(2e-3)
