import h5py
import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.config import (
    ConfigError,
    CrystalSettings,
    list_presets,
    load_beamline,
    load_crystal,
    load_preset,
)
from bcmi_beamline.sim.crystal import _family, _orientation, make_crystal

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


def test_extreme_crystal_winds_the_phase_beyond_50_rad():
    crystal = make_crystal(load_preset("extreme").sim.crystal, 10e-9, GEOMETRY)
    assert np.ptp((crystal.q_norm * crystal.displacement)[crystal.interior()]) > 50


def test_families_have_the_facets_of_the_cube():
    for hkl, count in (((1, 0, 0), 6), ((1, 1, 1), 8), ((1, 1, 0), 12), ((3, 1, 1), 24)):
        members = _family(hkl)
        assert len(members) == count
        np.testing.assert_allclose(np.linalg.norm(members, axis=1), 1)
        assert len(np.unique(members.round(9), axis=0)) == count


def test_own_facets_give_an_own_shape():
    cube = grow(facets=[{"hkl": (1, 0, 0)}], unevenness=0.0, size_nm=(300.0, 300.0, 300.0), azimuth_deg=0.0)
    octahedron = grow(facets=[{"hkl": (1, 1, 1)}], unevenness=0.0, size_nm=(300.0, 300.0, 300.0))
    assert np.abs(cube.density - octahedron.density).sum() > 0.3 * cube.density.sum()
    # equal facets: each is its own mirror image through the centre
    assert np.abs(cube.density - cube.density[::-1, ::-1, ::-1]).max() < 1e-3
    with pytest.raises(ValueError, match="no facet has hkl = 0 0 0"):
        grow(facets=[{"hkl": (0, 0, 0)}])


def test_weights_choose_the_displacement():
    only = dict.fromkeys(("random", "bending", "relaxation"), 0.0)
    fields = [grow(**(only | {name: 1.0})).displacement for name in only]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(fields[a].ravel(), fields[b].ravel())[0, 1]) < 0.9


def test_strain_does_not_see_missing_lattice_planes():
    plain, faulted = grow(), grow(dislocation=True)
    z, _, x = np.meshgrid(*faulted.axes, indexing="ij")
    away = faulted.interior() & (np.hypot(x - 300e-9 / 8, z) > 60e-9)
    # an edge dislocation strains by about b / (2 pi r)
    assert np.abs(faulted.strain() - plain.strain())[away].max() < 2 * 0.2265e-9 / (2 * np.pi * 60e-9)


@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_crystal_comes_back_from_an_array(tmp_path, kind):
    made = grow()
    path = tmp_path / f"mine.{kind}"
    if kind == "npy":
        np.save(path, made.image())
    elif kind == "npz":
        np.savez(path, object=made.image(), voxel_size=made.voxel_size)
    else:
        with h5py.File(path, "w") as file:
            file["entry_1/image_1/data"] = made.image()
            file["entry_1/image_1/voxel_size"] = made.voxel_size
    settings = load_crystal(path)
    if kind == "npy":
        with pytest.raises(ValueError, match=r"mine.npy: does not say its voxels: give voxel_nm"):
            make_crystal(settings, 10e-9, GEOMETRY)
        settings = settings.model_copy(update={"voxel_nm": (5.0, 10.0, 10.0)})
    read = make_crystal(settings, 10e-9, GEOMETRY)
    np.testing.assert_allclose(read.image(), made.image(), atol=1e-5)
    assert read.voxel_size == pytest.approx(made.voxel_size)
    inside = ndimage.binary_erosion(made.density > 0.9)
    np.testing.assert_allclose(read.strain()[inside], made.strain()[inside], atol=1e-5)


def test_own_crystal_in_toml_finds_its_array_beside_it(tmp_path):
    np.save(tmp_path / "mine.npy", grow().image())
    (tmp_path / "mine.toml").write_text('array = "mine.npy"\nvoxel_nm = [5.0, 10.0, 10.0]\n')
    assert make_crystal(load_crystal(tmp_path / "mine.toml"), 10e-9, GEOMETRY).voxel_size[1] == 10e-9
    (tmp_path / "grown.toml").write_text("size_nm = [200.0, 200.0, 200.0]\n[[facets]]\nhkl = [1, 0, 0]\n")
    assert load_crystal(tmp_path / "grown.toml").facets[0].hkl == (1, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.ones(3)}, "object"),
        ({"object": np.ones((3, 3)), "voxel_size": [1e-8] * 3}, "three axes"),
        ({"object": np.zeros((3, 3, 3)), "voxel_size": [1e-8] * 3}, "not zero everywhere"),
        ({"object": np.ones((3, 3, 3)), "voxel_size": [1e-8, 0, 1e-8]}, "above 0"),
    ],
)
def test_array_that_is_no_crystal_is_refused_in_one_line(tmp_path, content, message):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=message) as refusal:
        make_crystal(load_crystal(tmp_path / "bad.npz"), 10e-9, GEOMETRY)
    assert "bad.npz" in str(refusal.value) and "\n" not in str(refusal.value)


def test_absent_or_wrong_crystals_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_crystal(tmp_path / "absent.npy")
    (tmp_path / "bad.toml").write_text("random = 0\nbending = 0\nrelaxation = 0\n")
    with pytest.raises(ConfigError, match="above 0 to make a strain"):
        load_crystal(tmp_path / "bad.toml")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"text.h5: no crystal can be read"):
        make_crystal(load_crystal(tmp_path / "text.h5"), 10e-9, GEOMETRY)
