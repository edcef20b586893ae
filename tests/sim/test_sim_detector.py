import numpy as np
import pytest
from scipy import stats

from bcmi_beamline.config import load_beamline
from bcmi_beamline.sim.detector import DEAD, DIM, GAP, NOISY, EigerDetector, draw_poisson

CONFIG = load_beamline().eiger


def detector(background=0.0):
    return EigerDetector(CONFIG, background, seed=1)


def test_counts_are_poisson():
    eiger, rng = detector(), np.random.default_rng(0)
    photons = np.full((400, 400), 7.0)
    good = eiger.pixel_mask[:250, :250] == 0
    counts = np.stack([eiger.expose(photons, (0, 0), 1.0, rng)[:250, :250][good] for _ in range(4)]).astype(
        float
    )
    # 250 000 samples: mean to 0.005, variance to 0.02
    assert counts.mean() == pytest.approx(7, abs=0.03)
    assert counts.var() == pytest.approx(7, abs=0.12)
    assert np.mean(counts == 0) == pytest.approx(np.exp(-7), abs=3e-4)


def test_gaps_never_count_and_bad_pixels_are_told():
    eiger, rng = detector(), np.random.default_rng(0)
    frame = eiger.expose(np.full((2164, 1030), 5.0), (0, 0), 1.0, rng)
    assert frame.dtype == np.uint32 and frame.shape == (2164, 1030)
    gaps = CONFIG.gap_mask()
    assert (frame[gaps] == 2**32 - 1).all()
    np.testing.assert_array_equal(eiger.pixel_mask == GAP, gaps)
    assert (frame[eiger.pixel_mask == DEAD] == 0).all()
    assert frame[eiger.pixel_mask == NOISY].mean() > 20
    assert frame[eiger.pixel_mask == 0].max() < 30
    assert 0 < (eiger.pixel_mask > GAP).sum() < 100


@pytest.mark.parametrize(("corner", "seen"), [((-30, -20), (20, 30)), ((2144, 1000), (20, 30))])
def test_window_over_the_edge_is_cut(corner, seen):
    frame = detector().expose(np.full((50, 50), 1e4), corner, 1.0, np.random.default_rng(0))
    rows, columns = np.nonzero((frame > 5000) & ~CONFIG.gap_mask())
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == seen


def test_window_beside_the_detector_leaves_it_dark():
    eiger = detector()
    frame = eiger.expose(np.full((50, 50), 1e4), (3000, 0), 1.0, np.random.default_rng(0))
    assert frame[eiger.pixel_mask == 0].sum() == 0


def test_background_has_its_rate():
    eiger = detector(background=1e-3)
    frame = eiger.expose(None, (0, 0), 20.0, np.random.default_rng(0))
    good = eiger.pixel_mask == 0
    expected = 1e-3 * 20 * good.sum()
    assert abs(int(frame[good].sum()) - expected) < 5 * np.sqrt(expected)


def test_saturated_pixels_stop_at_the_cutoff():
    eiger = detector()
    frame = eiger.expose(np.full((20, 20), 1e7), (100, 100), 0.1, np.random.default_rng(0))
    assert frame[105, 105] == eiger.count_cutoff(0.1) == 250000
    assert eiger.count_cutoff(1e6) == 2**32 - 2


@pytest.mark.parametrize("mean", [1e-4, 0.03, 0.4, 1.99, DIM, 3.0, 25.0])
def test_every_number_of_counts_is_as_likely_as_poisson_says(mean):
    """Dim pixels are drawn by another method than bright ones; chi-square over both."""
    counts = draw_poisson(np.full((400, 500), mean, np.float32), np.random.default_rng(2)).ravel()
    assert counts.dtype == np.uint32
    numbers = np.arange(int(stats.poisson.ppf(1 - 1e-5, mean)) + 2)
    expected = stats.poisson.pmf(numbers, mean) * counts.size
    seen = np.bincount(counts, minlength=len(numbers))[: len(numbers)]
    enough = expected > 5
    chi_square = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert stats.chi2.sf(chi_square, enough.sum()) > 1e-4
    assert counts.sum() == pytest.approx(mean * counts.size, abs=5 * np.sqrt(mean * counts.size))


def test_dim_and_bright_pixels_of_one_frame_keep_their_places():
    mean = np.zeros((50, 60), np.float32)
    mean[10:20, 30:40], mean[40, 5] = 1.0, 1e5
    counts = draw_poisson(mean, np.random.default_rng(0))
    assert counts[mean == 0].sum() == 0
    assert int(counts[10:20, 30:40].sum()) == pytest.approx(100, abs=50)
    assert counts[40, 5] == pytest.approx(1e5, abs=2000)


@pytest.mark.parametrize(
    ("exposure_s", "bits", "cutoff"), [(1e-4, 8, 250), (0.01, 16, 25000), (0.1, 32, 250000)]
)
def test_short_exposures_need_fewer_bits_and_saturate_sooner(exposure_s, bits, cutoff):
    eiger = detector()
    frame = eiger.expose(np.full((20, 20), 1e7, np.float32), (100, 100), exposure_s, np.random.default_rng(0))
    assert eiger.bit_depth(exposure_s) == bits
    assert eiger.count_cutoff(exposure_s) == cutoff == frame[105, 105]
    assert (frame[CONFIG.gap_mask()] == 2**bits - 1).all()
    assert cutoff < 2**bits - 1


def test_detector_of_16_bits_never_has_more():
    eiger = EigerDetector(CONFIG.model_copy(update={"bit_depth": 16}), 0.0, seed=1)
    assert eiger.bit_depth(10.0) == 16 and eiger.count_cutoff(10.0) == 2**16 - 2
