"""The fused passes of the conventional engine against the formulae, written out plainly."""

import numpy as np
import pytest

from bcmi_beamline.reconstruction.conventional._coherence import Coherence, gaussian_kernel
from bcmi_beamline.reconstruction.conventional._engine import Engine
from bcmi_beamline.reconstruction.conventional._support import half_of, shrink_wrap, wrapped_box
from bcmi_beamline.reconstruction.conventional._updates import (
    ANSCOMBE,
    Rule,
    intensity,
    mix,
    modulus_scale,
    pack,
)
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
    found = engine.rho
    engine.close()
    assert found.dtype == np.complex64
    assert np.abs(found - expected).max() < 2e-4


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
    assert np.abs(engine.rho - previous).max() < 2e-4


def test_figures_of_merit_use_the_right_pixels(case):
    rho, counts, mask, free, support = case
    engine = Engine(pack(counts, mask, free), np.where(support, rho, 0), support, workers=2)
    engine.finish()
    psi = np.fft.fftn(engine.rho, norm="ortho")
    engine.close()
    used = ~mask & ~free
    residual = np.sum((np.abs(psi) - np.sqrt(counts))[used] ** 2)
    assert engine.error == pytest.approx(np.sqrt(residual / counts[used].sum()), rel=1e-4)
    assert engine.free_llk == pytest.approx(log_likelihood(counts, np.abs(psi) ** 2, free), rel=1e-4)


def test_projection_leaves_masked_and_free_pixels_alone(case):
    rho, counts, mask, free, _ = case
    psi = rho.copy()
    scale = np.empty(psi.size, np.float32)
    intensity(psi.ravel(), scale)
    modulus_scale(scale, pack(counts, mask, free).ravel(), Rule.moduli.value)
    mix(psi.reshape(-1), scale, 0.0, 1.0)
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
    found = shrink_wrap(solid.astype(np.complex64).__getitem__, loose, 1.0, 0.5)
    for _ in range(3):
        found = shrink_wrap(solid.astype(np.complex64).__getitem__, found, 1.0, 0.5)
    assert (found ^ solid).sum() < 0.1 * solid.sum()
    assert found[0, 0, 0] and not found[16, 16, 16]


def test_an_empty_object_keeps_its_support():
    support = np.ones((8, 8, 8), bool)
    assert shrink_wrap(np.zeros((8, 8, 8), np.complex64).__getitem__, support, 1.0, 0.3) is support


def test_half_of_a_support_is_half():
    support = np.zeros((16, 16, 16), bool)
    support[[14, 15, 0, 1]] = True
    half = half_of(support, 0)
    assert set(np.flatnonzero(half.any(axis=(1, 2)))) == {14, 15}


# -- the gradient and partial coherence --------------------------------------------------------------------
def lopsided(shape, sigma=0.7):
    kernel = gaussian_kernel(shape, sigma, radius=2)
    kernel[2, 2, 3] *= 3  # no symmetry to hide a conjugate behind
    return Coherence(shape, kernel / kernel.sum(), workers=1)


def literal_blur(power, kernel):
    out = np.zeros(power.shape)
    for (j, y, x), weight in np.ndenumerate(kernel):
        out += weight * np.roll(power, np.subtract((j, y, x), kernel.shape[0] // 2), (0, 1, 2))
    return out


@pytest.mark.parametrize("blurred", [False, True])
@pytest.mark.parametrize("algorithm", ["ml", "poisson"])
def test_a_descent_steps_down_the_gradient_of_its_likelihood(case, algorithm, blurred):
    """Along a random direction, the finite difference of the loss is what the step claims."""
    rho, counts, mask, free, support = case
    coherence = lopsided(SHAPE) if blurred else None

    def intensities(image):
        power = np.abs(np.fft.fftn(image, norm="ortho")) ** 2
        return literal_blur(power, coherence.kernel) if coherence else power

    capped = counts + ANSCOMBE > 3 * (intensities(np.where(support, rho, 0)) + ANSCOMBE)
    mask = mask | capped if algorithm == "poisson" else mask
    free &= ~mask
    used = ~(mask | free)

    def loss(image):
        power = intensities(image)
        if algorithm == "poisson":  # halved, as the step
            return 0.5 * np.sum((power - (counts + ANSCOMBE) * np.log(power + ANSCOMBE))[used])
        return np.sum((np.sqrt(power + ANSCOMBE) - np.sqrt(counts + ANSCOMBE))[used] ** 2)

    rho = np.where(support, rho, 0)
    engine = Engine(pack(counts, mask, free), rho, support, workers=1, coherence=coherence)
    engine.step(algorithm, 1.0)  # the first step has no momentum: rho - gradient
    down = engine.rho - rho
    engine.close()
    rng = np.random.default_rng(2)
    direction = np.where(support, rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE), 0)
    slope = (loss(rho + 1e-5 * direction) - loss(rho - 1e-5 * direction)) / 2e-5
    assert -2 * np.vdot(down, direction).real == pytest.approx(slope, rel=1e-3)


def test_blur_and_its_adjoint():
    coherence = lopsided((7, 9, 10))
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 7, 9, 10)).astype(np.float32)
    assert coherence.blur(a) == pytest.approx(literal_blur(a, coherence.kernel), rel=1e-4)
    there, back = coherence.blur(a), coherence.blur(b, back=True)
    assert np.vdot(there, b) == pytest.approx(np.vdot(a, back), rel=1e-5)


def test_a_partially_coherent_projection_divides_by_the_blurred_intensity(case):
    rho, counts, mask, free, support = case
    coherence = lopsided(SHAPE)
    engine = Engine(pack(counts, mask, free), rho.copy(), support, workers=2, coherence=coherence)
    engine.step("hio", BETA)
    found, error = engine.rho, engine.error
    engine.close()
    psi = np.fft.fftn(rho, norm="ortho")
    power = literal_blur(np.abs(psi) ** 2, coherence.kernel)
    projected = np.fft.ifftn(np.where(mask | free, psi, psi * np.sqrt(counts / power)), norm="ortho")
    assert np.abs(found - np.where(support, projected, rho - BETA * projected)).max() < 2e-4
    used = ~(mask | free)
    expected = np.sum((np.sqrt(power) - np.sqrt(counts))[used] ** 2) / counts[used].sum()
    assert error == pytest.approx(np.sqrt(expected), rel=1e-4)


def test_pixels_count_over_their_area():
    """Sixteen times finer samples of a pattern, summed, are what the engine's pixels count."""
    shape, fine, rng = (4, 12, 10), 16, np.random.default_rng(8)
    rho = np.zeros(shape, np.complex64)
    rho[:2, :4, :3] = rng.normal(size=(2, 4, 3)) + 1j * rng.normal(size=(2, 4, 3))
    sizes = (shape[0], fine * shape[1], fine * shape[2])
    half = [
        np.exp(2j * np.pi * np.arange(n) * (fine - 1) / 2 / (fine * n)) for n in shape[1:]
    ]  # pixel centres
    centred = rho * half[0][:, None] * half[1]
    power = np.abs(np.fft.fftn(centred, sizes, axes=(0, 1, 2))) ** 2 / rho.size
    counts = power.reshape(shape[0], shape[1], fine, shape[2], fine).mean(axis=(2, 4)).astype(np.float32)
    nothing = np.zeros(shape, bool)
    errors = []
    for pixels in (True, False):
        engine = Engine(pack(counts, nothing, nothing), rho, rho != 0, workers=1, pixels=pixels)
        engine.finish()
        engine.close()
        errors.append(engine.error)
    assert errors[0] < 2e-3 < 2e-2 < errors[1]


def test_richardson_lucy_finds_the_kernel():
    shape = (24, 32, 28)
    rng = np.random.default_rng(3)
    small = np.zeros(shape, complex)
    small[:10, :14, :12] = rng.normal(size=(10, 14, 12)) + 1j * rng.normal(size=(10, 14, 12))
    decay = np.ix_(*(np.exp(-((np.fft.fftfreq(n) * 12) ** 2)) for n in shape))
    power = np.abs(np.fft.fftn(small)) ** 2 * decay[0] * decay[1] * decay[2] * 1e3
    truth = lopsided(shape, 0.9).kernel
    counts = rng.poisson(literal_blur(power, truth)).astype(np.float32)
    mask = rng.random(shape) < 0.05
    packed = pack(counts, mask, np.zeros(shape, bool))
    found = Coherence(shape, gaussian_kernel(shape, radius=2), workers=1)
    before = np.abs(found.kernel - truth).sum()
    found.refine(power.astype(np.float32), packed, 200)
    after = np.abs(found.kernel - truth).sum()
    assert after < 0.1 * before
    assert found.kernel.sum() == pytest.approx(1, rel=1e-5) and (found.kernel >= 0).all()
    assert found.widths == pytest.approx(Coherence(shape, truth).widths, abs=0.05)
