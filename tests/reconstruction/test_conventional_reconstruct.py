"""Conventional phase retrieval of small crystals, from frames written down from the definitions."""

import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.conventional import Recipe, prepare, reconstruct
from bcmi_beamline.reconstruction.conventional._guided import breed, score
from bcmi_beamline.reconstruction.conventional._prepare import bridge
from bcmi_beamline.reconstruction.conventional._reconstruct import Task
from bcmi_beamline.reconstruction.conventional._support import autocorrelation_support
from bcmi_beamline.reconstruction.conventional._trial import Trial, central_half, finer, resampled
from bcmi_beamline.reconstruction.fourier import ifftn, to_centre, to_corner
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.reconstruction.strain import strain
from bcmi_beamline.scans import Reconstruction, RockingScan

STEP_DEG = 0.02
J, N = 32, 32
SCHEDULE = (("hio", 0.8), ("er", 0.1), ("ml", 0.1))
PIXEL = 0.9e-3  # one coarse pixel for twelve: a small field of view for small arrays


def crystal(geometry, bend=0.0, n_pixels=N, frames=J, phase_slope=(0.0, 0.0, 0.0)):
    """A lopsided polyhedron on the sheared grid of a scan."""
    voxel = (
        geometry.rocking_voxel(frames, STEP_DEG),
        geometry.object_pixel(n_pixels),
        geometry.object_pixel(n_pixels),
    )
    z, row, x = np.meshgrid(*(np.arange(n) - n // 2 for n in (frames, n_pixels, n_pixels)), indexing="ij")
    faces = [z - 4, -z - 5, row - 5, -row - 4, x - 4, -x - 5, 0.7 * x + 0.7 * row - 5, 0.6 * z - 0.8 * x - 4]
    support = np.all([f <= 0 for f in faces], axis=0)
    phase = bend * (0.03 * x**2 - 0.02 * row * z + 0.002 * z**3)
    image = support * np.exp(1j * (phase + phase_slope[0] * z + phase_slope[1] * row + phase_slope[2] * x))
    return Reconstruction(image.astype(np.complex64), support, voxel, geometry, geometry.shear)


def rock(truth, angles_deg, counts=3e6, seed=0, mask=None):
    """Poisson frames, each from ``P_j = sum_zeta rho exp(-i kappa_j zeta)``."""
    nz, n, _ = truth.image.shape
    zeta = (np.arange(nz) - nz // 2) * truth.voxel_size[0]
    frames = []
    for angle in angles_deg:
        kappa = truth.geometry.slow_frequency_step(1.0) * angle
        slice_ = np.tensordot(np.exp(-1j * kappa * zeta), truth.image, 1)
        wave = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(slice_)))
        frames.append(np.abs(wave) ** 2)
    frames = np.array(frames)
    frames = np.random.default_rng(seed).poisson(frames * counts / frames.sum()).astype(np.float32)
    mask = np.zeros((n, n), bool) if mask is None else mask
    return RockingScan(frames, np.asarray(angles_deg, float), mask, truth.geometry)


def angles(frames=J, offset=0.0):
    return (np.arange(frames) - frames // 2) * STEP_DEG + offset


def best(comparison):
    return max(comparison.correlation, comparison.correlation_twin)


@pytest.mark.parametrize("algorithm", ["hio", "raar", "dm"])
def test_every_algorithm_recovers_an_unstrained_polyhedron(algorithm):
    truth = crystal(Geometry(pixel_size=PIXEL))
    schedule = ((algorithm, 0.8), ("er", 0.1), ("ml", 0.1))
    recipe = Recipe(schedule, support_period=10, smoothing=(2.0, 0.6), threshold=(0.35, 0.45))
    result = reconstruct(rock(truth, angles()), trials=3, iterations=120, recipe=recipe, seed=1)
    comparison = compare(result, truth)
    assert best(comparison) > 0.99, str(comparison)
    assert result.image.dtype == np.complex64
    assert result.error.shape == result.free_llk.shape == (3, 120)
    ranked = np.array(result.metadata["trial_free_llk"])[result.metadata["ranking"]]
    assert (np.diff(ranked) >= 0).all()


def test_error_reduction_alone_does_with_a_known_support():
    truth = crystal(Geometry(pixel_size=PIXEL))
    recipe = Recipe(schedule=(("er", 1.0),))
    result = reconstruct(
        rock(truth, angles()), trials=2, iterations=150, recipe=recipe, support=truth, combine=1
    )
    assert compare(result, truth).correlation > 0.95


@pytest.mark.parametrize("arm", ["horizontal", "vertical"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("descending", [False, True])
def test_the_object_comes_out_in_the_crystals_frame(arm, sign, descending):
    """With a known, lopsided support there is no twin to hide behind: every sign must be right."""
    truth = crystal(Geometry(arm=arm, arm_sign=sign, pixel_size=PIXEL), bend=1.0)
    theta = angles()[::-1] if descending else angles()
    mask = np.zeros((N, N), bool)
    mask[20] = True
    result = reconstruct(rock(truth, theta, mask=mask), trials=2, iterations=120, support=truth)
    comparison = compare(result, truth)
    assert comparison.verdict == "correct" and comparison.correlation > 0.95, str(comparison)
    assert result.shear == truth.geometry.shear
    assert result.voxel_size == pytest.approx(truth.voxel_size)


def test_offsets_of_the_grid_leave_no_ramp():
    """Angles that miss the peak and binned pixels that straddle the centre are corrected exactly."""
    geometry = Geometry(pixel_size=PIXEL)
    truth = crystal(geometry, bend=1.0, n_pixels=2 * N)
    scan = rock(truth, angles(offset=0.007), counts=1e7)
    result = reconstruct(scan, trials=1, iterations=150, support=truth, binning=2)
    assert result.configuration["binning"] == 2
    assert result.voxel_size == pytest.approx(truth.voxel_size)
    plain = compare(result, truth, ramp=False)
    assert plain.correlation > 0.97, str(plain)


def test_missing_and_shuffled_angles_are_bridged():
    truth = crystal(Geometry(pixel_size=PIXEL))
    scan = rock(truth, angles())
    keep = np.random.default_rng(5).permutation(np.delete(np.arange(J), [5, 22]))
    partial = RockingScan(scan.frames[keep], scan.angles_deg[keep], scan.mask, scan.geometry)
    pattern = prepare(partial, binning=1)
    whole = prepare(scan, binning=1)
    assert pattern.counts.shape == whole.counts.shape
    seen = ~pattern.mask
    assert np.array_equal(pattern.counts[seen], whole.counts[seen])
    assert pattern.mask.all(axis=(1, 2)).sum() == 2
    assert pattern.kappa == pytest.approx(
        whole.kappa, abs=1e-3 * abs(Geometry(pixel_size=PIXEL).slow_frequency_step(STEP_DEG))
    )


def test_binning_counts_every_photon_and_minds_the_mask():
    truth = crystal(Geometry(pixel_size=PIXEL), n_pixels=2 * N)
    mask = np.zeros((2 * N, 2 * N), bool)
    scan = rock(truth, angles(), mask=mask)
    assert prepare(scan, binning=2).counts.sum() == scan.frames.sum()
    mask[30] = True
    mask[40:44] = True
    pattern = prepare(scan, binning=2)
    lines = pattern.mask.any(axis=(0, 2))
    assert set(np.flatnonzero(lines)) == {20, 21}  # a half-masked pixel is scaled up, a lost one masked
    assert prepare(scan, binning=2).voxel_size == pytest.approx(truth.voxel_size)


def test_saturated_pixels_are_not_believed():
    scan = rock(crystal(Geometry(pixel_size=PIXEL)), angles())
    scan.count_cutoff = float(scan.frames.max())
    pattern = prepare(scan, binning=1)
    assert pattern.mask.sum() >= 1 and pattern.counts.max() < scan.count_cutoff


def test_a_window_of_awkward_length_is_trimmed_about_its_centre():
    truth = crystal(Geometry(pixel_size=PIXEL), n_pixels=N, frames=37)
    pattern = prepare(rock(truth, angles(37)), binning=1)
    assert pattern.counts.shape == (36, N, N)
    assert pattern.kappa == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "geometry", s.geometry.with_modulator(1.35e-3)), "modulator out"),
        (lambda s: s.frames.fill(0), "empty"),
        (lambda s: s.angles_deg.__setitem__(7, s.angles_deg[7] + 0.009), "not evenly spaced"),
        (lambda s: s.angles_deg.fill(0.1), "repeat"),
    ],
)
def test_unusable_scans_are_refused_with_one_line(change, message):
    scan = rock(crystal(Geometry(pixel_size=PIXEL)), angles())
    change(scan)
    with pytest.raises(ValueError, match=message) as failure:
        reconstruct(scan, trials=1, iterations=2)
    assert "\n" not in str(failure.value)


def test_a_support_that_does_not_fit_is_refused():
    scan = rock(crystal(Geometry(pixel_size=PIXEL)), angles())
    with pytest.raises(ValueError, match="fit the grid"):
        reconstruct(scan, support=np.ones((4, 4, 4), bool))


def test_progress_and_seed():
    scan = rock(crystal(Geometry(pixel_size=PIXEL)), angles())
    told = []
    options = {"trials": 2, "iterations": 20, "seed": 3}
    first = reconstruct(scan, **options, progress=lambda fraction, line: told.append((fraction, line)))
    again = reconstruct(scan, **options)
    assert np.abs(first.image - again.image).max() < 1e-3 * np.abs(first.image).max()
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert "free LLK" in told[-1][1]


def test_half_a_support_is_whole_again_at_the_end():
    truth = crystal(Geometry(pixel_size=PIXEL))
    recipe = Recipe(SCHEDULE, detwin=True)
    for iterations in (16, 40):
        result = reconstruct(
            rock(truth, angles()), trials=1, iterations=iterations, recipe=recipe, support=truth
        )
        assert result.support.sum() == pytest.approx(truth.support.sum(), rel=0.05)


# -- where the crystal is --------------------------------------------------------------------------------
def strained(n_pixels=N, mask=None):
    """So bent (20 rad) that few of its autocorrelation's values exceed a hundredth of the peak."""
    truth = crystal(Geometry(pixel_size=PIXEL), bend=6.0, n_pixels=n_pixels)
    return truth, rock(truth, angles(), counts=1e7, mask=mask)


def covered(support, truth):
    """The largest part of a crystal that a support holds, wherever it stands."""
    fit = np.fft.ifftn(np.fft.fftn(truth.support) * np.fft.fftn(support).conj()).real
    return fit.max() / truth.support.sum()


def test_a_bent_crystal_is_seen_in_its_whole_size():
    truth, scan = strained()
    for size, axis in zip(prepare(scan, binning=1).extent, range(3), strict=True):
        width = np.ptp(np.flatnonzero(truth.support.any(axis=tuple(a for a in range(3) if a != axis)))) + 1
        assert 0.9 < size / (width / truth.support.shape[axis]) < 1.4


def test_the_first_support_holds_a_bent_crystal_and_little_else():
    truth, scan = strained()
    start = autocorrelation_support(prepare(scan, binning=1))
    assert covered(start, truth) > 0.95
    assert start.sum() < 2 * truth.support.sum()


def test_gaps_and_missing_angles_change_the_first_support_little():
    mask = np.zeros((N, N), bool)
    mask[19:21] = True
    mask[:, 9] = True
    truth, scan = strained(mask=mask)
    keep = np.delete(np.arange(J), [7, 20])
    scan = RockingScan(scan.frames[keep], scan.angles_deg[keep], mask, scan.geometry)
    pattern = prepare(scan, binning=1)
    filled = bridge(pattern)
    assert np.array_equal(filled[~pattern.mask], pattern.counts[~pattern.mask])
    whole = prepare(strained()[1], binning=1).counts
    wrong = np.abs(np.sqrt(filled) - np.sqrt(whole))[pattern.mask]
    assert np.square(wrong).mean() < 0.5 * whole[pattern.mask].mean()
    start = autocorrelation_support(pattern)
    assert covered(start, truth) > 0.95
    assert start.sum() < 2.5 * truth.support.sum()


def test_the_first_support_is_held_and_then_shrinks():
    scan = rock(crystal(Geometry(pixel_size=PIXEL)), angles())
    task = Task.of(scan, None, Recipe(hold=1.0, coarse=0), seed=0, iterations=80)
    held = task.job()(0, lambda *_: None)
    assert np.array_equal(held.support, task.start)
    task.recipe = Recipe(hold=0.5, coarse=0)
    assert not np.array_equal(task.job()(0, lambda *_: None).support, task.start)


# -- half the resolution first ---------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 24, 28), (15, 21, 36)])
def test_a_coarse_object_is_the_same_wave_on_a_finer_grid(shape):
    rng = np.random.default_rng(8)
    half = central_half(shape)
    wave = np.zeros(shape, np.complex64)
    wave[half] = rng.normal(size=wave[half].shape) + 1j * rng.normal(size=wave[half].shape)
    frequencies = [np.abs(np.fft.fftfreq(n, 1 / n)) for n in shape]
    lit = [np.flatnonzero(wave.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    for n, f, where in zip(shape, frequencies, lit, strict=True):
        assert f[where].max() <= n / 4 and len(where) >= n // 2 - 1
    rho, _ = finer(ifftn(wave[half]), np.ones(wave[half].shape, bool), shape)
    assert np.abs(rho - ifftn(wave)).max() < 1e-5 * np.abs(rho).max()


def test_a_support_keeps_its_place_on_coarser_and_finer_grids():
    support = np.zeros((40, 36, 44), bool)
    support[-6:], support[:8] = True, True
    support[:, 9:-8] = False
    support[:, :, 12:-4] = False
    coarse = resampled(support, (20, 18, 22))
    again = resampled(coarse, support.shape)
    assert coarse.sum() == pytest.approx(support.sum() / 8, rel=0.25)
    assert np.count_nonzero(again & support) > 0.85 * support.sum()
    assert np.count_nonzero(again & ~support) < 0.25 * support.sum()


def test_half_the_resolution_first_finds_the_crystal():
    truth = crystal(Geometry(pixel_size=PIXEL), bend=1.0)
    scan = rock(truth, angles())
    scan.frames[:, :8], scan.frames[:, 24:], scan.frames[:, :, :8], scan.frames[:, :, 24:] = 0, 0, 0, 0
    scan.frames[:8], scan.frames[24:] = 0, 0
    coarse = reconstruct(scan, trials=3, iterations=200, seed=2)
    assert coarse.free_llk.shape == (3, 200)
    assert best(compare(coarse, truth)) > 0.9
    change = Recipe(coarse=0)
    assert not np.array_equal(
        coarse.free_llk, reconstruct(scan, trials=3, iterations=200, seed=2, recipe=change).free_llk
    )


def test_the_resolution_is_whole_from_the_start_where_light_is_far_out():
    scan = rock(crystal(Geometry(pixel_size=PIXEL), bend=6.0), angles())
    options = {"trials": 1, "iterations": 20}
    assert np.array_equal(
        reconstruct(scan, **options).image, reconstruct(scan, recipe=Recipe(coarse=0), **options).image
    )


# -- guided search ---------------------------------------------------------------------------------------
def test_guided_search_by_generations_is_kept_shown_and_resumed(tmp_path):
    truth = crystal(Geometry(pixel_size=PIXEL))
    scan = rock(truth, angles())
    recipe = Recipe(SCHEDULE, support_period=10, threshold=(0.35, 0.45), generations=3, start_width=0.5)
    shown = []
    options = {"trials": 4, "iterations": 120, "folder": tmp_path}
    result = reconstruct(scan, recipe=recipe, show=shown.append, **options)
    assert best(compare(result, truth)) > 0.9
    assert result.free_llk.shape == (4, 120)
    assert len(shown) == 12 and shown[-1].free_llk.shape[0] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"generation-{g}" for g in range(3)]
    resumed = reconstruct(scan, recipe=recipe, **options)
    assert np.array_equal(resumed.image, result.image)


def test_children_have_the_phase_between_their_parents_and_the_best_stays():
    rng = np.random.default_rng(4)
    support = np.zeros((16, 18, 20), bool)
    support[3:9, 4:11, 5:13] = True
    phase = ndimage.gaussian_filter(rng.normal(size=support.shape), 2) * 8
    bent = np.where(support, np.exp(1j * phase), 0).astype(np.complex64)
    flat = support.astype(np.complex64)

    def trial(image, llk):
        return Trial(
            to_corner(image, (0, 1, 2)), to_corner(support, (0, 1, 2)), np.array([llk]), np.array([1.0])
        )

    children = breed([trial(bent, 2.0), trial(4 * flat, 1.0)], Recipe(), known=True)
    child = to_centre(children[0].rho, (0, 1, 2))
    between = np.angle(np.vdot(flat, bent))  # global phases are matched before
    expected = np.where(support, 2 * np.exp(0.5j * (np.angle(bent * np.exp(-1j * between)))), 0)
    assert np.abs(child - expected).max() < 1e-4
    assert np.array_equal(to_centre(children[1].rho, (0, 1, 2)), 4 * flat)


@pytest.mark.parametrize("criterion", ["free_llk", "error", "sharpness"])
def test_criteria_prefer_the_better_trial(criterion):
    inside = np.ones((4, 4, 4), bool)
    even, spiky = np.ones((4, 4, 4), np.complex64), np.ones((4, 4, 4), np.complex64)
    spiky[0, 0, 0] = 5
    good = Trial(even, inside, np.array([3.0, 1.0]), np.array([0.5, 0.1]))
    bad = Trial(spiky, inside, np.array([0.5, 2.0]), np.array([0.1, 0.2]))
    assert score(good, criterion) < score(bad, criterion)


def test_low_resolution_widens_to_the_whole_pattern():
    recipe = Recipe(generations=6, start_width=0.2)
    widths = [recipe.width(g) for g in range(6)]
    assert widths[0] == pytest.approx(0.2) and widths[0] < widths[1] < widths[2] < 1
    assert widths[3:] == [None] * 3
    assert Recipe(generations=6).width(0) is None


# -- blur ------------------------------------------------------------------------------------------------
def test_blur_by_light_that_is_not_quite_coherent_is_found():
    truth = crystal(Geometry(pixel_size=PIXEL), bend=1.0)
    scan = rock(truth, angles(), counts=1e9)
    sigma = (0.5, 0.9, 0.6)
    blurred = ndimage.gaussian_filter(scan.frames.astype(float), sigma, mode="wrap") * 1e-2
    scan.frames = np.random.default_rng(6).poisson(blurred).astype(np.float32)
    options = {"trials": 1, "iterations": 300, "support": truth, "seed": 2}
    sharp = reconstruct(scan, **options)
    fitted = reconstruct(scan, recipe=Recipe(partial_coherence=True, pixels=False), **options)
    before, after = compare(sharp, truth).correlation, compare(fitted, truth).correlation
    assert fitted.free_llk[0, -1] < 0.5 * sharp.free_llk[0, -1]
    assert after > 0.95 and 1 - after < 0.5 * (1 - before), (before, after)
    assert fitted.metadata["blur_px"] == pytest.approx(sigma, abs=0.15)


def test_summed_pixels_are_allowed_for():
    """Four pixels summed along each side blur by a known amount, which an exact model takes out."""
    truth = crystal(Geometry(pixel_size=PIXEL), bend=1.0, n_pixels=4 * N)
    scan = rock(truth, angles(), counts=3e7)
    options = {"trials": 1, "iterations": 120, "support": truth, "binning": 4}
    plain = reconstruct(scan, recipe=Recipe(pixels=False), **options)
    exact = reconstruct(scan, **options)
    assert exact.free_llk[0, -1] < 0.7 * plain.free_llk[0, -1]
    assert compare(exact, truth).correlation > compare(plain, truth).correlation


# -- strain ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("arm", "sign"), [("horizontal", 1), ("horizontal", -1), ("vertical", 1)])
def test_strain_has_the_sign_of_the_lattice(arm, sign):
    """A lattice that widens along Q: ``u = g x_Q^2 / 2``, phase ``-|Q| u``, strain ``g x_Q``."""
    geometry = Geometry(arm=arm, arm_sign=sign, pixel_size=PIXEL)
    truth = crystal(geometry)
    zeta, row, x = (
        (np.arange(n) - n // 2).reshape([-1 if a == axis else 1 for a in range(3)]) * voxel
        for axis, (n, voxel) in enumerate(zip(truth.image.shape, truth.voxel_size, strict=True))
    )
    shear_x, shear_y = geometry.shear
    y = -row
    along = geometry.detector_frame @ geometry.q_vector / geometry.q_norm
    x_q = along[0] * x + along[1] * y + along[2] * (zeta + shear_x * x + shear_y * y)
    gradient = 6.0 / (geometry.q_norm * np.max(np.where(truth.support, np.abs(x_q), 0)) ** 2)
    phase = -geometry.q_norm * gradient * x_q**2 / 2
    truth.image = (truth.support * np.exp(1j * phase)).astype(np.complex64)

    options = {"trials": 4, "iterations": 150, "support": truth, "combine": 1}
    result = reconstruct(rock(truth, angles()), recipe=Recipe(SCHEDULE), **options)
    comparison = compare(result, truth)
    inside = ndimage.binary_erosion(comparison.support)
    found = strain(comparison.as_reconstruction())
    corner = [n // 2 - m // 2 for n, m in zip(x_q.shape, found.shape, strict=True)]
    expected = gradient * x_q[tuple(slice(c, c + m) for c, m in zip(corner, found.shape, strict=True))]
    slope = np.polyfit(expected[inside], found[inside], 1)[0]
    assert slope == pytest.approx(1, abs=0.1), str(comparison)
