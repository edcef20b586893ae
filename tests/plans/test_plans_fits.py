import numpy as np
import pytest
from scipy.special import erf

from bcmi_beamline.plans.fits import PoorFit, find_peak, fit_edge, fit_line, fit_sharpness, fit_slab

ANGLES = np.linspace(-5, 5, 15)
ROCKING = 17.7 + np.linspace(-0.15, 0.15, 31)


def lorentzian(centre, width=2.5):
    return 0.02 + 0.01 / (1 + ((ANGLES - centre) / width) ** 2)


def gaussian(centre, height=3000.0, sigma=0.02):
    return height * np.exp(-((ROCKING - centre) ** 2) / (2 * sigma**2))


def pull_is_sound(pulls):
    pulls = np.array(pulls)
    assert abs(pulls.mean()) < 4 * pulls.std() / np.sqrt(len(pulls)), "biased"
    assert 0.75 < pulls.std() < 1.35, "the uncertainty is not the scatter"


def test_sharpness_is_exact_without_noise():
    fit = fit_sharpness(ANGLES, lorentzian(1.234))
    assert fit.angle_deg == pytest.approx(1.234, abs=1e-4)
    assert fit.half_width_deg == pytest.approx(2.5, rel=1e-3)
    assert fit.background == pytest.approx(0.02, rel=1e-3)


def test_sharpness_states_its_uncertainty():
    rng = np.random.default_rng(1)
    pulls = []
    for centre in rng.uniform(-2, 2, 100):
        fit = fit_sharpness(ANGLES, lorentzian(centre) * np.exp(rng.normal(0, 0.05, (3, 15))))
        assert fit.angle_error_deg < 0.3
        pulls.append((fit.angle_deg - centre) / fit.angle_error_deg)
    pull_is_sound(pulls)


@pytest.mark.parametrize("slope", [0.0, 1e-3, -5e-3])
def test_sharpness_refuses_a_featureless_curve(slope):
    rng = np.random.default_rng(2)
    for _ in range(30):
        with pytest.raises(PoorFit, match="sharpness"):
            fit_sharpness(ANGLES, 0.02 + slope * ANGLES + rng.normal(0, 1e-3, 15))
    with pytest.raises(PoorFit):
        fit_sharpness(ANGLES, np.full(15, 0.02))


def test_sharpness_refuses_a_maximum_outside_and_too_few_points():
    with pytest.raises(PoorFit, match=r"end of the scan|no maximum"):
        fit_sharpness(ANGLES, lorentzian(5.5))
    with pytest.raises(PoorFit, match="at least 7"):
        fit_sharpness(ANGLES[:5], lorentzian(0.0)[:5])
    with pytest.raises(PoorFit, match="6 good points"):
        fit_sharpness(ANGLES, np.where(np.arange(15) < 6, 1.0, np.nan))


def test_peak_of_a_single_maximum():
    rng = np.random.default_rng(3)
    pulls = []
    for centre in rng.uniform(17.66, 17.74, 100):
        fit = find_peak(ROCKING, rng.poisson(20 + gaussian(centre)))
        assert fit.centroid == pytest.approx(centre, abs=5 * fit.centroid_error + 1e-3)
        pulls.append((fit.position - centre) / fit.position_error)
    pull_is_sound(pulls)
    assert fit.fwhm == pytest.approx(2.355 * 0.02, rel=0.15)


def test_peak_of_a_split_curve_is_the_higher_maximum():
    rng = np.random.default_rng(4)
    for _ in range(20):
        curve = rng.poisson(20 + gaussian(17.68, 3000, 0.015) + gaussian(17.73, 2200, 0.015))
        fit = find_peak(ROCKING, curve)
        assert fit.position == pytest.approx(17.68, abs=0.004)
        assert 17.69 < fit.centroid < 17.72, "the centroid tells of the second one"


def test_peak_survives_one_hot_point():
    curve = gaussian(17.7, 3000, 0.025) + 20
    curve[3] += 2500
    assert find_peak(ROCKING, curve).position == pytest.approx(17.7, abs=0.005)


@pytest.mark.parametrize("level", [0.0, 0.3, 20.0, 1e5])
def test_peak_refuses_background(level):
    rng = np.random.default_rng(5)
    for _ in range(50):
        with pytest.raises(PoorFit, match="rocking curve"):
            find_peak(ROCKING, rng.poisson(level, ROCKING.size))


def test_peak_refuses_the_flank():
    with pytest.raises(PoorFit, match="end of the scan"):
        find_peak(ROCKING, 20 + gaussian(17.9, 1e5, 0.05))


@pytest.mark.parametrize("sign", [1, -1])
def test_edge(sign):
    rng = np.random.default_rng(6)
    x = np.arange(-15, 15.1, 1.5)
    pulls = []
    for place in rng.uniform(-7, 7, 60):
        fit = fit_edge(x, 300 + sign * 100 * erf((x - place) / 3) + rng.normal(0, 15, x.size))
        assert fit.step == pytest.approx(sign * 200, rel=0.2)
        pulls.append((fit.position - place) / fit.position_error)
    assert abs(np.mean(pulls)) < 0.4
    assert 0.4 < np.std(pulls) < 1.3


def test_edge_between_a_quiet_and_a_noisy_side():
    rng = np.random.default_rng(8)
    x = np.arange(-15, 15.1, 1.5)
    misses = []
    for place in rng.uniform(-7, 7, 60):
        pattern = 0.09 * np.exp(rng.normal(0, 0.2, x.size))
        fit = fit_edge(x, np.log(np.where(x < place, 0.033, pattern) + rng.normal(0, 2e-4, x.size)))
        misses.append(fit.position - place)
    assert np.std(misses) < 1.0
    assert np.abs(misses).max() < 4.5


def test_edge_refuses_noise():
    rng = np.random.default_rng(9)
    believed = 0
    for _ in range(100):
        try:
            fit_edge(np.arange(21.0), 300 + rng.normal(0, 8, 21))
            believed += 1
        except PoorFit as error:
            assert "edge" in str(error)
    assert believed <= 1


def test_edge_sharper_than_the_steps_is_placed_between_them():
    x = np.arange(0, 20, 1.0)
    fit = fit_edge(x, np.where(x > 7.5, 10.0, 0.0))
    assert fit.position == pytest.approx(7.5, abs=0.5)
    assert fit.position_error >= 0.25


def test_slab():
    rng = np.random.default_rng(10)
    x = np.linspace(-40, 40, 41)
    pulls = []
    for centre in rng.uniform(-8, 8, 40):
        inside = np.abs(x - centre) < 20
        fit = fit_slab(x, np.log(np.where(inside, 0.09, 0.033)) + rng.normal(0, 0.02 + 0.18 * inside))
        assert fit.width == pytest.approx(40, abs=3)
        pulls.append((fit.centre - centre) / max(fit.centre_error, 2 / np.sqrt(12)))
    assert np.std(pulls) < 1.5
    with pytest.raises(PoorFit, match="pattern"):
        fit_slab(x, 0.033 + rng.normal(0, 1e-3, x.size))
    with pytest.raises(PoorFit, match="both edges"):
        fit_slab(x, np.where(x < 0, 0.09, 0.033))


def test_line_gives_the_tilt():
    rng = np.random.default_rng(7)
    z = np.array([300.0, 0.0, 75.0, 150.0, 600.0])
    errors = np.array([0.5, 0.2, 0.2, 0.3, 1.0])
    pulls = []
    for tilt in rng.uniform(-2, 2, 200):
        edges = 20 + np.tan(np.deg2rad(tilt)) * z + errors * rng.normal(size=5)
        line = fit_line(z, edges, errors)
        pulls.append((line.angle_deg - tilt) / line.angle_error_deg)
    pulls = np.array(pulls)
    assert abs(pulls.mean()) < 0.3
    assert 0.5 < pulls.std() < 1.1  # never smaller than the errors imply
    with pytest.raises(PoorFit):
        fit_line(np.ones(4), np.arange(4.0))
