"""Free pixels: what they must never touch, and what their likelihood says."""

import numpy as np
import pytest

from bcmi_beamline.reconstruction.free_pixels import (
    expected_log_likelihood,
    free_pixels,
    log_likelihood,
)


@pytest.mark.parametrize("shape", [(128, 160), (40, 64, 72)])
@pytest.mark.parametrize("separate", [False, True])
def test_fraction_mask_and_centre(shape, separate):
    mask = np.zeros(shape[-2:], bool)
    mask[10:20] = True
    free = free_pixels(shape, mask, seed=3, separate_frames=separate)
    assert free.shape == shape and free.dtype == bool
    assert not free[..., mask].any()
    assert not free[tuple(n // 2 for n in shape)]
    assert free[..., ~mask].mean() == pytest.approx(0.05, abs=0.012)
    assert np.array_equal(free, free_pixels(shape, mask, seed=3, separate_frames=separate))
    assert not np.array_equal(free, free_pixels(shape, mask, seed=4, separate_frames=separate))


def test_islands_have_the_stated_radius():
    free = free_pixels((400, 400), fraction=0.0005, radius=3, seed=0)
    lone = 29  # pixels of a disc of radius 3
    assert free.sum() % lone == 0 and free.sum() > 0


def test_frames_are_drawn_apart():
    """A ball shows in neighbouring frames at once; separate discs agree no more than chance allows."""
    shape = (60, 64, 64)

    def agreement(free):
        return (free[1:] & free[:-1]).sum() / free[1:].sum()

    assert agreement(free_pixels(shape, seed=1)) > 0.5
    assert agreement(free_pixels(shape, seed=1, separate_frames=True)) < 0.15


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="must lie between"):
        free_pixels((8, 8), fraction=0.9)
    with pytest.raises(ValueError, match="drawn on"):
        free_pixels((8,))


def test_log_likelihood_of_the_truth_is_a_half_and_the_least():
    rng = np.random.default_rng(0)
    mean = rng.uniform(50, 500, 100_000)
    counts = rng.poisson(mean)
    at_truth = log_likelihood(counts, mean)
    assert at_truth == pytest.approx(0.5, abs=0.01)
    assert log_likelihood(counts, 1.05 * mean) > at_truth < log_likelihood(counts, 0.95 * mean)


def test_log_likelihood_where_nothing_was_counted():
    assert log_likelihood(np.zeros(4), np.full(4, 0.3)) == pytest.approx(0.3)
    assert np.isnan(log_likelihood(np.zeros(4), np.ones(4), np.zeros(4, bool)))


@pytest.mark.parametrize("counts", [0.02, 0.7, 4.0, 60.0, 5000.0])
def test_the_log_likelihood_of_a_right_model_is_what_is_expected(counts):
    rng = np.random.default_rng(2)
    model = np.full(400_000, counts)
    seen = [log_likelihood(rng.poisson(model), model) for _ in range(4)]
    assert expected_log_likelihood(model) == pytest.approx(np.mean(seen), rel=0.02)


def test_expected_log_likelihoods_of_pixels_are_averaged():
    assert expected_log_likelihood(np.array([0.05, 60.0])) == pytest.approx(
        (expected_log_likelihood(np.array([0.05])) + expected_log_likelihood(np.array([60.0]))) / 2
    )
    assert np.isnan(expected_log_likelihood(np.array([])))
