"""The fused passes of the conventional engine against the formulae, written out plainly."""

import numpy as np
import pytest

from bcmi_beamline.reconstruction.conventional._engine import ANSCOMBE, Engine
from bcmi_beamline.reconstruction.conventional._support import half_of, shrink_wrap, wrapped_box
from bcmi_beamline.reconstruction.conventional._updates import pack, project_modulus
from bcmi_beamline.reconstruction.free_pixels import log_likelihood

SHAPE = (12, 15, 16)
BETA = 0.8


@pytest.fixture
def case():
    rng = np.random.default_rng(7)
    rho = (rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE)).astype(np.complex64)
    counts = rng.poisson(2.0, SHAPE).astype(np.float32)
    mask = rng.random(SHAPE) < 0.1
    free = (rng.random(SHAPE) < 0.1) & ~mask
    support = np.zeros(SHAPE, bool)
    support[2:7, 3:9, 4:12] = True
    return rho, counts, mask, free, support


def moduli(rho, counts, fixed, offset=0.0):
    """Modulus projection, literally; `fixed` pixels keep their own."""
    psi = np.fft.fftn(rho, norm="ortho")
    scale = np.sqrt((counts + offset) / (np.abs(psi) ** 2 + offset))
    return np.fft.ifftn(np.where(fixed, psi, psi * scale), norm="ortho")


def literal(algorithm, rho, project, support):
    """One step from the definitions in the literature."""
    inside = lambda a: np.where(support, a, 0)  # noqa: E731
    if algorithm == "er":
        return inside(project(rho))
    if algorithm == "hio":
        return np.where(support, project(rho), rho - BETA * project(rho))
    if algorithm == "raar":
        reflect_m = 2 * project(rho) - rho
        reflect_both = 2 * inside(reflect_m) - reflect_m
        return BETA / 2 * (reflect_both + rho) + (1 - BETA) * project(rho)
    gamma_s, gamma_m = -1 / BETA, 1 / BETA
    f_m = (1 + gamma_m) * project(rho) - gamma_m * rho
    f_s = (1 + gamma_s) * inside(rho) - gamma_s * rho
    return rho + BETA * (inside(f_m) - project(f_s))


@pytest.mark.parametrize("algorithm", ["er", "hio", "raar", "dm"])
def test_a_step_is_what_the_literature_says(case, algorithm):
    rho, counts, mask, free, support = case
    engine = Engine(pack(counts, mask, free), rho.copy(), support, workers=2)
    expected = rho
    for _ in range(3):
        engine.step(algorithm, BETA)
        expected = literal(algorithm, expected, lambda a: moduli(a, counts, mask | free), support)
    engine.close()
    assert engine.rho.dtype == np.complex64
    assert np.abs(engine.rho - expected).max() < 2e-4


def test_polish_is_an_accelerated_projected_gradient(case):
    rho, counts, mask, free, support = case
    engine = Engine(pack(counts, mask, free), rho.copy(), support, workers=1)
    ahead = previous = np.where(support, rho, 0)
    t = 1.0
    for _ in range(4):
        engine.step("ml", BETA)
        t_next = (1 + np.sqrt(1 + 4 * t**2)) / 2
        point = np.where(support, moduli(ahead, counts, mask | free, ANSCOMBE), 0)
        ahead, previous = point + min((t - 1) / t_next, 0.9) * (point - previous), point
        t = t_next
    assert np.abs(engine.rho - ahead).max() < 2e-4
    engine.finish()
    engine.close()
    assert np.abs(engine.rho - previous).max() < 2e-4


def test_figures_of_merit_use_the_right_pixels(case):
    rho, counts, mask, free, support = case
    engine = Engine(pack(counts, mask, free), np.where(support, rho, 0), support, workers=2)
    engine.finish()
    engine.close()
    psi = np.fft.fftn(engine.rho, norm="ortho")
    used = ~mask & ~free
    residual = np.sum((np.abs(psi) - np.sqrt(counts))[used] ** 2)
    assert engine.error == pytest.approx(np.sqrt(residual / counts[used].sum()), rel=1e-4)
    assert engine.free_llk == pytest.approx(log_likelihood(counts, np.abs(psi) ** 2, free), rel=1e-4)


def test_projection_leaves_masked_and_free_pixels_alone(case):
    rho, counts, mask, free, _ = case
    psi = rho.copy()
    project_modulus(psi.ravel(), pack(counts, mask, free).ravel(), 0.0)
    kept = mask | free
    assert np.array_equal(psi[kept], rho[kept])
    assert np.abs(psi[~kept]) == pytest.approx(np.sqrt(counts[~kept]), abs=1e-5)


# -- support ---------------------------------------------------------------------------------------------
def test_wrapped_box_goes_round_the_corner():
    where = np.zeros((10, 12, 8), bool)
    where[[9, 0, 1], 5, :] = True
    z, y, x = (index.ravel().tolist() for index in wrapped_box(where))
    assert z == [9, 0, 1] and y == [5] and x == list(range(8))
    assert [i.size for i in wrapped_box(where, margin=1)] == [5, 3, 8]


def test_shrink_wrap_finds_a_solid_across_the_corner():
    solid = np.zeros((32, 32, 32), bool)
    solid[:9, :9, :9] = True
    solid = np.roll(solid, (-4, -4, -4), (0, 1, 2))
    loose = np.zeros_like(solid)
    loose[np.ix_(*[np.arange(-9, 10) % 32] * 3)] = True
    found = shrink_wrap(solid.astype(np.complex64), loose, 1.0, 0.5)
    for _ in range(3):
        found = shrink_wrap(solid.astype(np.complex64), found, 1.0, 0.5)
    assert (found ^ solid).sum() < 0.1 * solid.sum()
    assert found[0, 0, 0] and not found[16, 16, 16]


def test_an_empty_object_keeps_its_support():
    support = np.ones((8, 8, 8), bool)
    assert shrink_wrap(np.zeros((8, 8, 8), np.complex64), support, 1.0, 0.3) is support


def test_half_of_a_support_is_half():
    support = np.zeros((16, 16, 16), bool)
    support[[14, 15, 0, 1]] = True
    half = half_of(support, 0)
    assert set(np.flatnonzero(half.any(axis=(1, 2)))) == {14, 15}
