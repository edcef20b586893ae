"""Comparison with the truth: an object known analytically, sampled on two grids, is one object."""

import json

import numpy as np
import pytest

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.alignment import (
    add_ramp,
    align,
    correlation,
    register,
    register_ramp,
    resample,
    shift,
    twin,
)
from bcmi_beamline.reconstruction.metrics import (
    classify,
    compare,
    fourier_shell_correlation,
    modulus_histogram,
    phase_retrieval_transfer_function,
)
from bcmi_beamline.reconstruction.modes import align_trials, eigen_modes
from bcmi_beamline.scans import Reconstruction

SHEARED = (20e-9, 26e-9, 24e-9)


def crystal(x, y, z):
    """A soft-edged, lopsided, bent crystal at any points of the detector frame (m)."""
    x, y, z = x / 1e-9, y / 1e-9, z / 1e-9
    faces = [
        (np.abs(x - 10) - 150),
        (np.abs(y) - 180),
        (np.abs(z + 15) - 140),
        (0.6 * x + 0.64 * y + 0.48 * z - 150),
        (-0.8 * x + 0.6 * y - 130),
    ]
    modulus = np.prod([1 / (1 + np.exp(np.minimum(f / 9, 60))) for f in faces], axis=0)
    phase = 1.2e-5 * x**2 - 8e-6 * y * z + 1e-5 * x * y + 2.5e-8 * z**3
    return modulus * np.exp(1j * phase)


def sampled(geometry, voxel, shape, shear, moved=(0.0, 0.0, 0.0)):
    """The crystal on a grid, `moved` (zeta, y', x') in m."""
    zeta, row, x = np.meshgrid(
        *((np.arange(n) - n // 2) * v for n, v in zip(shape, voxel, strict=True)), indexing="ij"
    )
    x, y = x - moved[2], -row - moved[1]
    z = zeta - moved[0] + shear[0] * x + shear[1] * y
    image = crystal(x, y, z).astype(np.complex64)
    return Reconstruction(image, np.abs(image) > 0.4, voxel, geometry, shear)


@pytest.fixture(params=["horizontal", "vertical"])
def geometry(request):
    return Geometry(arm=request.param)


def test_same_object_on_two_grids_is_one_object(geometry):
    truth = sampled(geometry, (10e-9,) * 3, (50, 52, 48), (0.0, 0.0))
    result = sampled(geometry, SHEARED, (36, 32, 30), geometry.shear, moved=(33e-9, -17e-9, 41e-9))
    result.image *= 3.3 * np.exp(2j)
    assert max(abs(s) for s in geometry.shear) > 0.3
    comparison = compare(result, truth)
    assert comparison.verdict == "correct"
    assert comparison.correlation > 0.995
    assert comparison.correlation_twin < 0.95
    assert comparison.fsc.resolution_half_period < 30e-9
    assert comparison.strain_error < 2e-4
    json.dumps(comparison.to_json(), allow_nan=False)


def test_wrong_shear_is_noticed(geometry):
    """What the test above would see if a sign of the shear or of the rows were wrong."""
    truth = sampled(geometry, (10e-9,) * 3, (50, 52, 48), (0.0, 0.0))
    flipped = (-geometry.shear[0], -geometry.shear[1])
    wrong = sampled(geometry, SHEARED, (36, 32, 30), flipped)
    wrong.shear = geometry.shear
    assert compare(wrong, truth).correlation < 0.95


def test_twin_is_called_conjugated(geometry):
    truth = sampled(geometry, (10e-9,) * 3, (50, 52, 48), (0.0, 0.0))
    result = sampled(geometry, SHEARED, (36, 32, 30), geometry.shear)
    result.image = twin(result.image)
    comparison = compare(result, truth)
    assert comparison.verdict == "conjugated"
    assert comparison.correlation_twin > 0.995 > comparison.correlation


def test_resampling_back_and_forth_returns(geometry):
    fine = sampled(geometry, (10e-9,) * 3, (50, 52, 48), (0.0, 0.0))
    there = resample(fine, (9e-9,) * 3, (72, 60, 56), geometry.shear)
    back = resample(
        Reconstruction(there, np.abs(there) > 0, (9e-9,) * 3, geometry, geometry.shear),
        (10e-9,) * 3,
        fine.image.shape,
        (0.0, 0.0),
    )
    assert np.abs(back - fine.image).max() < 0.02


def test_verdicts():
    assert classify(0.95, 0.2) == "correct"
    assert classify(0.91, 0.97) == "conjugated"
    assert classify(0.9, 0.3) == "incorrect"


def test_an_empty_result_is_refused(geometry):
    truth = sampled(geometry, SHEARED, (36, 32, 30), geometry.shear)
    empty = sampled(geometry, SHEARED, (36, 32, 30), geometry.shear)
    empty.image[:] = 0
    with pytest.raises(ValueError, match="empty"):
        compare(empty, truth)


# -- alignment -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def soft():
    return sampled(Geometry(), (20e-9,) * 3, (31, 32, 30), (0.0, 0.0)).image


def test_sub_voxel_shift_is_found(soft):
    moved = shift(soft, np.array([2.37, -4.81, 0.56]))
    assert register(soft, moved) == pytest.approx([2.37, -4.81, 0.56], abs=0.02)


def test_ramp_is_found(soft):
    cycles = np.array([0.8, -1.35, 0.4])
    assert register_ramp(add_ramp(soft, cycles), soft) == pytest.approx(cycles, abs=0.02)


def test_align_undoes_shift_phase_and_ramp_together(soft):
    other = add_ramp(shift(soft, np.array([1.6, -2.2, 3.3])), np.array([0.7, 1.6, -0.9])) * np.exp(0.9j)
    assert abs(correlation(soft, align(other, soft, ramp=False))) < 0.9
    aligned = align(other, soft)
    assert correlation(soft, aligned).real > 0.9999
    assert aligned.dtype == np.complex64


def test_twin_keeps_the_diffraction_and_undoes_itself(soft):
    assert np.array_equal(twin(twin(soft)), soft)
    assert np.abs(np.fft.fftn(twin(soft))) == pytest.approx(np.abs(np.fft.fftn(soft)), abs=1e-2)
    assert abs(correlation(soft, twin(soft))) < 0.95


# -- modes, FSC, PRTF, histogram ---------------------------------------------------------------------------
def test_trials_that_agree_have_one_mode(soft):
    trials = [soft, np.exp(2j) * shift(twin(soft), np.array([1.2, 0.4, -2.0]))]
    modes, weights = eigen_modes(align_trials(trials))
    assert weights[0] > 0.9999
    assert abs(correlation(soft, modes[0])) > 0.9999
    assert np.linalg.norm(modes[0]) == pytest.approx(np.linalg.norm(soft), rel=1e-3)


def test_weights_of_unrelated_images_are_even():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 20, 20, 20)) + 1j * rng.normal(size=(4, 20, 20, 20))
    _, weights = eigen_modes(list(noise))
    assert weights == pytest.approx([0.25] * 4, abs=0.02)


def test_fsc_of_an_object_with_itself_is_one(soft):
    fsc = fourier_shell_correlation(soft, soft, SHEARED, (0.3, 0.0))
    assert fsc.correlation == pytest.approx(1, abs=1e-5)
    assert fsc.limited_by_grid and (fsc.threshold[3:] < 0.5).all()


def test_fsc_of_noise_stays_below_the_threshold():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 40, 40, 40)) + 1j * rng.normal(size=(2, 40, 40, 40))
    fsc = fourier_shell_correlation(a, b, SHEARED)
    assert (np.abs(fsc.correlation[4:]) < fsc.threshold[4:]).all()
    assert not fsc.limited_by_grid


def test_fsc_finds_where_a_low_pass_cut(soft):
    """An object that is noise beyond a known q loses its correlation there."""
    rng = np.random.default_rng(2)
    n, voxel = 48, 10e-9
    a = rng.normal(size=(n, n, n)) + 1j * rng.normal(size=(n, n, n))
    other = rng.normal(size=(n, n, n)) + 1j * rng.normal(size=(n, n, n))
    f = np.fft.fftfreq(n, voxel)
    q = 2 * np.pi * np.sqrt(f[:, None, None] ** 2 + f[:, None] ** 2 + f**2)
    cut = 2 * np.pi / 40e-9
    b = np.fft.ifftn(np.where(q < cut, np.fft.fftn(a), np.fft.fftn(other)))
    fsc = fourier_shell_correlation(a, b, (voxel,) * 3)
    assert fsc.resolution_full_period == pytest.approx(40e-9, rel=0.1)
    assert fsc.resolution_half_period == pytest.approx(20e-9, rel=0.1)


def test_prtf_is_one_for_equals_and_falls_for_random_phases(soft):
    _, same = phase_retrieval_transfer_function([soft, soft], SHEARED, (0.3, 0.0))
    assert same == pytest.approx(1, abs=1e-4)
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(16, 24, 24, 24)) + 1j * rng.normal(size=(16, 24, 24, 24))
    _, prtf = phase_retrieval_transfer_function(list(noise), SHEARED, (0.0, 0.0))
    assert prtf[3:] == pytest.approx(1 / 4, abs=0.06)


def test_histogram_counts_the_peaks():
    rng = np.random.default_rng(4)
    image = np.full((24, 24, 24), 0.7)
    image[12:] = 1.0
    noisy = image + rng.normal(0, 0.03, image.shape)
    support = np.ones(image.shape, bool)
    assert modulus_histogram(noisy, support).peaks == 2
    one = modulus_histogram(0.64 + rng.normal(0, 0.05, image.shape), support)
    assert one.peaks == 1
    assert one.mode == pytest.approx(0.64 / (0.64 + 0.05 * 2.58), abs=0.02)
    with pytest.raises(ValueError, match="empty support"):
        modulus_histogram(noisy, ~support)
