import numpy as np
import pytest

from bcmi_beamline.config import CrystalSettings, list_presets, load_beamline, load_preset
from bcmi_beamline.sim.crystal import _orientation, make_crystal

GEOMETRY = load_beamline().geometry()


def grow(**changes):
    settings = {"size_nm": (300.0, 400.0, 350.0), "strain": 5e-4, "seed": 4} | changes
    return make_crystal(CrystalSettings(**settings), 10e-9, GEOMETRY)


@pytest.mark.parametrize("name", list_presets())
def test_presets_have_the_size_and_strain_they_ask_for(name):
    settings = load_preset(name).sim.crystal
    crystal = make_crystal(settings, 10e-9, GEOMETRY)
    inside = crystal.interior()
    for axis, (size, voxel) in enumerate(zip(settings.size_nm[::-1], crystal.voxel_size, strict=True)):
        occupied = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        length = (occupied[-1] - occupied[0] + 1) * voxel * 1e9
        # a corner fills less than half of its voxels, so it may look up to three of them shorter
        assert size - 3 * voxel * 1e9 <= length <= size + voxel * 1e9
    low, high = np.percentile(crystal.strain()[inside], [1, 99])
    assert (high - low) / 2 == pytest.approx(settings.strain, rel=0.01)
    assert abs(high + low) / 2 < 0.15 * settings.strain


def test_high_strain_wraps_the_phase_more_than_three_times():
    crystal = make_crystal(load_preset("paper-hs").sim.crystal, 10e-9, GEOMETRY)
    phase = (crystal.q_norm * crystal.displacement)[crystal.interior()]
    assert np.ptp(phase) > 3 * 2 * np.pi


def test_facets_are_planes_of_a_cubic_crystal_with_111_along_q():
    q_hat = GEOMETRY.detector_frame @ GEOMETRY.q_vector / GEOMETRY.q_norm
    turn = _orientation(q_hat, 0.7)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(turn @ np.ones(3) / np.sqrt(3), q_hat, atol=1e-12)


def test_strain_is_the_derivative_of_the_displacement_along_q():
    crystal = grow()
    step = 10e-9
    q_hat = crystal.q_vector / crystal.q_norm
    z, y, x = crystal.axes
    ramp = 3e-4 * (q_hat[0] * x + q_hat[1] * y[:, None] + q_hat[2] * z[:, None, None])
    stretched = type(crystal)(crystal.density, ramp.astype(np.float32), crystal.voxel_size, crystal.q_vector)
    np.testing.assert_allclose(stretched.strain(), 3e-4, rtol=1e-2)
    assert crystal.voxel_size == (step / 2, step, step)


def test_crystal_and_its_twin_differ():
    image = grow().image().ravel()
    twin = np.conj(grow().image()[::-1, ::-1, ::-1]).ravel()
    assert abs(np.vdot(image, twin)) / np.vdot(image, image).real < 0.9


def test_bragg_peak_of_the_whole_crystal_lies_at_q():
    crystal = grow(strain=2e-3)
    image = crystal.image()
    dz, dy, dx = np.gradient(image, *crystal.voxel_size)
    for slope in (dz, dy, dx):
        mean = np.sum((np.conj(image) * slope).imag) / np.sum(np.abs(image) ** 2)
        # 1 % of the width of the strained peak
        assert abs(mean) < 0.01 * 2 * 2e-3 * crystal.q_norm


def test_crystal_does_not_depend_on_its_grid():
    settings = CrystalSettings(size_nm=(300.0, 400.0, 350.0), strain=1e-3, seed=5)
    coarse = make_crystal(settings, 10e-9, GEOMETRY)
    fine = make_crystal(settings, 5e-9, GEOMETRY)
    centre = [np.array(c.density.shape) // 2 for c in (coarse, fine)]
    offset = (np.arange(-8, 9)[:, None, None], np.arange(-8, 9)[:, None], np.arange(-8, 9))
    a = coarse.displacement[tuple(c + o for c, o in zip(centre[0], offset, strict=True))]
    b = fine.displacement[tuple(c + 2 * o for c, o in zip(centre[1], offset, strict=True))]
    a, b = a - a.mean(), b - b.mean()
    assert np.abs(a - b).max() < 0.05 * np.ptp(a)
    assert fine.density.sum() / 8 == pytest.approx(coarse.density.sum(), rel=0.01)


def test_dislocation_winds_the_phase_once():
    plain, faulted = grow(), grow(dislocation=True)
    ratio = faulted.image() * np.conj(plain.image())
    z, y, x = faulted.axes
    angle = np.linspace(0, 2 * np.pi, 81)
    row = len(y) // 2
    column = np.rint((300e-9 / 8 + 60e-9 * np.cos(angle) - x[0]) / 10e-9).astype(int)
    layer = np.rint((60e-9 * np.sin(angle) - z[0]) / 5e-9).astype(int)
    around = ratio[layer, row, column]
    winding = np.angle(around[1:] * np.conj(around[:-1])).sum() / (2 * np.pi)
    assert abs(winding) == pytest.approx(1, abs=1e-3)
