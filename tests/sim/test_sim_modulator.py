import numpy as np
import pytest
from scipy import ndimage

from bcmi_beamline.config import ModulatorSettings
from bcmi_beamline.sim.modulator import (
    FRAME_OUTER,
    MAP_PIXEL,
    ModulatorChip,
    grow_pattern,
    largest_piece,
    place_chip,
)

UM, DEG = 1e-6, np.pi / 180
SETTINGS = ModulatorSettings(extent_um=12.0, coverage=0.42)


@pytest.fixture(scope="module")
def chip():
    return ModulatorChip(SETTINGS, 9000.0)


def at(x=0.0, y=0.0, z=0.0, mchi=0.0, mphi=0.0, pivot=(0.0, 0.0, 0.0), squareness=(0.0, 0.0), carrier=None):
    """Placement of a chip 1.35 mm behind the crystal; um and degrees."""
    return place_chip(
        np.array([x, y, z]) * UM,
        (mchi * DEG, mphi * DEG),
        np.array(pivot) * UM,
        (squareness[0] * DEG, squareness[1] * DEG),
        np.array([0, 0, 1350.0]) * UM,
        np.eye(3) if carrier is None else carrier,
    )


def grid(half=1.5, step=0.02):
    n = round(half / step)
    return np.arange(-n, n + 1) * step * UM


def test_tungsten_turns_the_phase_by_2_47_rad_and_passes_71_percent(chip):
    transmission = np.exp(chip.exponent() * 1.5 * UM)
    assert np.angle(transmission) == pytest.approx(-2.47, abs=0.005)
    assert abs(transmission) ** 2 == pytest.approx(0.710, abs=0.001)
    seen = chip.transmission(at(), grid(4.0), grid(4.0))
    thick = np.abs(seen).min()
    assert thick == pytest.approx(np.sqrt(0.710), abs=0.002)
    assert np.abs(seen).max() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("coverage", [0.35, 0.42, 0.5])
def test_pattern_hangs_together_and_covers_what_it_should(coverage):
    pattern = grow_pattern(ModulatorSettings(extent_um=10.0, coverage=coverage))
    film = pattern > 127
    assert film.mean() == pytest.approx(coverage, abs=0.01)
    assert ndimage.label(film)[1] == 1


def test_largest_piece_drops_islands():
    film = np.zeros((9, 9), bool)
    film[1:4, 1:5] = True
    film[6:8, 6:8] = True
    np.testing.assert_array_equal(largest_piece(film)[5:], False)
    assert largest_piece(film).sum() == 12


def test_pattern_follows_its_seed():
    a, b, c = (grow_pattern(ModulatorSettings(extent_um=6.0, seed=s)) for s in (7, 7, 8))
    np.testing.assert_array_equal(a, b)
    assert (a != c).mean() > 0.2


def test_plus_x_moves_the_pattern_to_plus_columns_and_plus_y_to_minus_rows(chip):
    x = grid()
    still = chip.transmission(at(), x, x)
    moved = chip.transmission(at(x=0.2, y=0.1), x, x)
    # 0.02 um per sample: ten columns right, five rows up
    np.testing.assert_allclose(moved[:-5, 10:], still[5:, :-10], atol=0.02)


def test_tilt_smears_walls_by_thickness_times_tangent(chip):
    """The variance that a line of length w adds to an edge is w^2 / 12; here through the power spectrum."""
    x = grid(2.0)
    width = 1.5 * UM * np.tan(4 * DEG)
    upright = np.log(chip.transmission(at(), x, x)).imag
    leaning = np.log(chip.transmission(at(mphi=4.0), x, x)).imag * np.cos(4 * DEG)
    f = np.fft.rfftfreq(len(x), 0.02 * UM)
    window = np.hanning(len(x))[:, None] * np.hanning(len(x))
    power = [
        (np.abs(np.fft.rfft((t - t.mean()) * window, axis=1)) ** 2).sum(axis=0) for t in (upright, leaning)
    ]
    band = (f > 1e6) & (f < 6e6)
    ratio = np.sqrt(power[1] / power[0])[band]
    np.testing.assert_allclose(ratio, np.abs(np.sinc(f[band] * width)), atol=0.06)
    along_y = [(np.abs(np.fft.rfft((t - t.mean()) * window, axis=0)) ** 2).sum() for t in (upright, leaning)]
    assert along_y[1] < along_y[0]


def test_tilt_keeps_the_metal(chip):
    x = grid(2.5)
    metal = [
        np.log(np.abs(chip.transmission(at(mchi=tilt), x, x))).mean() * np.cos(tilt * DEG)
        for tilt in (0.0, 1.0, 5.0)
    ]
    np.testing.assert_allclose(metal, metal[0], rtol=0.02)


def test_tilts_of_opposite_sign_smear_alike_and_either_axis_its_own_direction(chip):
    assert at(mphi=2.0).slope == pytest.approx(-at(mphi=-2.0).slope)
    assert at(mphi=2.0).slope[0] == pytest.approx(-np.tan(2 * DEG))
    assert at(mchi=2.0).slope[1] == pytest.approx(-np.tan(2 * DEG))
    assert abs(at(mphi=2.0).slope[1]) < 1e-12
    assert at(mchi=3.0, squareness=(-3.0, 0.0)).slope == pytest.approx([0, 0], abs=1e-12)


def test_tilt_about_a_far_pivot_moves_the_pattern():
    placement = at(mchi=1.0, pivot=(0, -5000, 0))
    # y' of the membrane's origin hardly changes, its z' by 87 um
    assert placement.distance == pytest.approx((1350 + 5000 * np.sin(DEG)) * UM, abs=1.5 * UM)
    placement = at(mphi=1.0, pivot=(0, 0, -5000))
    assert placement.origin[0] == pytest.approx(5000 * np.sin(DEG) * UM, rel=1e-9)
    np.testing.assert_allclose(at(pivot=(40, -5000, 30)).origin, 0, atol=1e-15)


def test_z_moves_along_the_tilted_stage():
    """A stage that leans by a small angle walks sideways as z moves: what alignment looks for."""
    near, far = at(z=0, mphi=0.5), at(z=1000, mphi=0.5)
    assert (far.origin - near.origin)[0] == pytest.approx(1000 * UM * np.sin(0.5 * DEG), rel=1e-6)
    assert far.distance - near.distance == pytest.approx(1000 * UM, rel=1e-3)


def test_membrane_is_bare_its_frame_opaque_and_the_air_free(chip):
    x = grid()
    half = SETTINGS.membrane_um / 2
    np.testing.assert_array_equal(chip.transmission(at(x=100), x, x), 1)
    assert chip.transmission(at(x=half + 50), x, x) is None
    assert chip.transmission(at(y=-half - 50), x, x) is None
    assert not chip.is_clear(at(x=half + 50), x, x)
    assert chip.is_clear(at(x=FRAME_OUTER / UM + 5), x, x)
    edge = chip.transmission(at(x=half), x, x)
    # the membrane's left edge stands on the axis: frame on the left, membrane on the right
    assert edge[:, 0].max() == 0 and edge[:, -1].min() == 1


def test_skewed_and_plain_paths_agree(chip):
    """Interpolation takes a shorter way when the axes stay square; both must see the same pattern."""
    x = grid()
    plain = chip.transmission(at(), x, x)
    turn = 1e-4
    rotated = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
    np.testing.assert_allclose(chip.transmission(at(carrier=rotated), x, x), plain, atol=0.05)
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    # x' turns to y', so columns turn to minus rows
    np.testing.assert_allclose(chip.transmission(at(carrier=quarter), x, x), np.rot90(plain), atol=0.05)


def test_membrane_wider_than_its_chip_is_refused():
    with pytest.raises(ValueError, match=r"membrane_um = 4000 does not fit"):
        ModulatorChip(ModulatorSettings(membrane_um=4000), 9000.0)


def test_map_resolves_the_walls():
    pattern = grow_pattern(SETTINGS).astype(float) / 255
    steps = np.abs(np.diff(pattern, axis=1)).max()
    # a Gaussian wall: the steepest rise of a pixel is pixel / (sqrt(2 pi) width)
    assert steps <= MAP_PIXEL / (np.sqrt(2 * np.pi) * 12e-9) + 0.02


def test_fiducial_is_an_f_in_a_bare_window_that_hangs_on():
    settings = ModulatorSettings(extent_um=24.0)
    marked, plain = grow_pattern(settings), grow_pattern(settings.model_copy(update={"fiducial_um": 0.0}))
    n, edge = len(marked), round(0.1 * len(marked))
    row, column = round(0.15 * n) - edge // 2, round(0.85 * n) - edge // 2
    mark = marked[row : row + edge, column : column + edge] > 127
    assert 0.1 < mark.mean() < 0.35
    # the stem on the left, arms to the right and high
    assert mark[:, : edge // 2].sum() > 1.5 * mark[:, edge // 2 :].sum()
    assert mark[: edge // 2].sum() > 1.3 * mark[edge // 2 :].sum()
    far = np.s_[n // 2 :, : n // 2]
    np.testing.assert_array_equal(marked[far], plain[far])
    assert ndimage.label(marked > 127)[1] == 1


def test_pattern_ends_where_the_field_ends(chip):
    x = grid(1.0)
    half = chip.field_half / UM
    edge = np.abs(chip.transmission(at(x=-half), x, x))
    # the field's right edge stands on the axis: pattern on the left, bare membrane on the right
    assert edge[:, 52:].min() == pytest.approx(1, abs=1e-3)
    assert edge[:, :48].min() < 0.9


def test_film_follows_the_energy(chip):
    x = grid()
    soft, hard = (chip.transmission(at(), x, x, energy) for energy in (9000.0, 18000.0))
    # delta falls as the energy squared, the phase as the energy; no edge of tungsten between
    ratio = np.angle(hard).min() / np.angle(soft).min()
    assert 0.4 < ratio < 0.6
    np.testing.assert_array_equal(chip.transmission(at(), x, x), soft)
