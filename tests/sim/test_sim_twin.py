import numpy as np
import pytest

from bcmi_beamline.config import Preset, load_beamline, load_preset
from bcmi_beamline.sim import Twin, simulate_ptychography, simulate_rocking
from bcmi_beamline.sim.simulate import sunflower

BEAMLINE = load_beamline()
HALF = 100


def merge(base, changes):
    return base | {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in changes.items()
    }


def preset(**sim):
    """The small preset without nuisances or hidden errors, and with what `sim` changes."""
    values = load_preset("small").model_dump()
    values["sim"] |= {"hidden": {}, "nuisances": {"seed": 1}, "peak_counts_per_s": 1e6}
    values["sim"]["modulator"]["extent_um"] = 16.0
    values["sim"] = merge(values["sim"], sim)
    return Preset.model_validate(values)


OUT = BEAMLINE.nanogoniometer.positions["out"]
QUIET = {"crystal": {"size_nm": [300.0, 300.0, 300.0], "strain": 1e-7}}


@pytest.fixture(scope="module")
def twin():
    return Twin(BEAMLINE, preset(**QUIET))


def counts(twin, frame):
    """The frame without what does not count."""
    return np.where(twin.detector.pixel_mask == 0, frame, 0).astype(float)


def centre_of_mass(frame):
    """(row, column) of the light within 100 pixels of its brightest pixel."""
    row, column = np.unravel_index(frame.argmax(), frame.shape)
    patch = frame[row - HALF : row + HALF + 1, column - HALF : column + HALF + 1]
    index = np.arange(-HALF, HALF + 1)
    return np.array([row + patch.sum(1) @ index / patch.sum(), column + patch.sum(0) @ index / patch.sum()])


@pytest.fixture(scope="module")
def gapless():
    eiger = BEAMLINE.eiger.model_copy(update={"masked_rows": [], "masked_columns": []})
    return BEAMLINE.model_copy(update={"eiger": eiger})


def blob(beamline, settings):
    """A twin whose crystal is a Gaussian blob, so that the middle of its pattern is known exactly."""
    twin = Twin(beamline, settings)
    z, y, x = twin.crystal.axes
    shape = np.exp(-((x / 6e-8) ** 2) - (y[:, None] / 6e-8) ** 2 - (z[:, None, None] / 6e-8) ** 2)
    twin._scatterer = (shape * 3e10).astype(np.complex64)
    return twin


def middle(twin, **changes):
    """Where the light of a long exposure with the modulator out stands, (row, column)."""
    pose = twin.aligned_pose() | OUT
    pose |= {axis: pose[axis] + change for axis, change in changes.items()}
    return centre_of_mass(counts(twin, twin.frame(pose, 100.0)))


@pytest.fixture(scope="module")
def blob_twin(gapless):
    return blob(gapless, preset(**QUIET))


BEAM = np.array([BEAMLINE.eiger.beam_row, BEAMLINE.eiger.beam_column])


def test_peak_has_the_counts_it_should(twin):
    total = counts(twin, twin.frame(twin.aligned_pose() | OUT, 1.0)).sum()
    # the gap in the pattern takes a few per cent
    assert 0.9e6 < total < 1.01e6


def test_beam_stands_on_its_pixel(blob_twin):
    np.testing.assert_allclose(middle(blob_twin), BEAM, atol=0.02)


def test_rocking_walks_by_1_15_pixels_a_step_towards_plus_x(blob_twin):
    for angle in (-0.05, 0.05):
        walk = middle(blob_twin, phi=angle) - BEAM
        np.testing.assert_allclose(walk, [0, 1.15 * angle / 0.005], atol=0.1)


def test_modulator_plane_and_straight_way_give_the_same_pattern(gapless):
    settings = preset(nuisances={"background_per_pixel_s": 0.0})
    twin = Twin(gapless, settings)
    bare = twin.aligned_pose() | {"x": 100.0}
    frames = [twin.frame(p, 1000.0).astype(float) for p in (bare, bare | OUT)]
    row, column = BEAMLINE.eiger.beam_row, BEAMLINE.eiger.beam_column
    a, b = (f[row - 120 : row + 120, column - 120 : column + 120] for f in frames)
    assert a.sum() == pytest.approx(b.sum(), rel=3e-3)
    np.testing.assert_allclose(a, b, atol=6 * np.sqrt(b.max()) + 2e-3 * b.max())


def test_modulator_takes_a_tenth_of_the_light_and_spreads_the_rest(twin):
    inside, outside = (
        counts(twin, twin.frame(pose, 10.0)) for pose in (twin.aligned_pose(), twin.aligned_pose() | OUT)
    )
    assert 0.82 < inside.sum() / outside.sum() < 0.95
    rows, columns = np.indices(inside.shape)
    far = np.hypot(rows - BEAM[0], columns - BEAM[1]) > 60
    assert inside[far].sum() > 2 * outside[far].sum()


def test_detector_arm_moves_the_pattern(blob_twin):
    pixels = 5.35 / 75e-6 * np.tan(np.deg2rad(0.05))
    np.testing.assert_allclose(middle(blob_twin, nu=0.05) - BEAM, [0, -pixels], atol=0.03)
    # delta turns the arm up, so the pattern moves down, to larger rows
    np.testing.assert_allclose(middle(blob_twin, delta=0.05) - BEAM, [pixels, 0], atol=0.03)
    dark = blob_twin.frame(blob_twin.aligned_pose() | {"nu": 0.0}, 1.0)
    assert counts(blob_twin, dark).sum() == 0


def test_hidden_offset_moves_the_pattern(gapless):
    twin = blob(gapless, preset(**QUIET, hidden={"beam_offset_px": [0.4, -1.3]}))
    np.testing.assert_allclose(middle(twin) - BEAM, [0.4, -1.3], atol=0.02)


def test_peak_is_where_it_hides():
    twin = Twin(BEAMLINE, preset(**QUIET, hidden={"bragg_offset_deg": 0.04}))
    nominal = twin.nominal_pose() | OUT
    offsets = np.array([-0.04, 0.0, 0.04, 0.08])
    totals = [counts(twin, twin.frame(nominal | {"phi": nominal["phi"] + o}, 1.0)).sum() for o in offsets]
    assert offsets[np.argmax(totals)] == 0.04


def test_eta_carries_the_modulator_and_phi_does_not(twin):
    pose = twin.aligned_pose()
    still, turned = twin._placement(pose), twin._placement(pose | {"phi": pose["phi"] + 0.5})
    np.testing.assert_array_equal(still.origin, turned.origin)
    carried = twin._placement(pose | {"eta": 0.5})
    # about lab x: d1 cos(2 theta) dTheta = 9.6 um, downstream tips down (+ rows)
    assert carried.origin[1] == pytest.approx(9.6e-6, rel=0.01)


def test_aligned_modulator_stands_on_the_axis_at_its_true_distance():
    hidden = {"mchi_deg": 0.9, "mphi_deg": -1.2, "pivot_um": [40.0, -60.0, 30.0], "distance_um": 7.0}
    twin = Twin(BEAMLINE, preset(hidden=hidden))
    placement = twin._placement(twin.aligned_pose())
    np.testing.assert_allclose(placement.origin, 0, atol=1e-12)
    np.testing.assert_allclose(placement.slope, 0, atol=1e-12)
    assert placement.distance == pytest.approx(twin.truth_distance()) == pytest.approx(1357e-6)
    tilted = twin._placement(twin.aligned_pose() | {"mchi": 1.9})
    # the true pivot is 5.06 mm below the axis and 30 um behind the surveyed plane, which is at the crystal
    mounted = twin._placement(twin.nominal_pose())
    np.testing.assert_allclose(mounted.origin, 0, atol=1e-12)
    assert mounted.distance == pytest.approx(1357e-6)
    expected = (1357 - 30) * np.sin(np.deg2rad(1)) + 5060 * (1 - np.cos(np.deg2rad(1)))
    assert tilted.origin[1] * 1e6 == pytest.approx(expected, abs=0.5)


def test_truth_modulator_is_what_the_beam_meets(twin):
    pixel = 20e-9
    truth = twin.truth_modulator(pixel, (160, 140))
    assert truth.shape == (160, 140) and truth.dtype == np.complex64
    placement = twin._placement(twin.aligned_pose() | {"x": 0.4, "y": 0.2})
    y, x = ((np.arange(n) - n // 2) * pixel for n in (64, 60))
    seen = twin.chip.transmission(placement, x, y)
    # moved by 20 columns to the right and 10 rows up
    expected = truth[80 - 32 + 10 : 80 + 32 + 10, 70 - 30 - 20 : 70 + 30 - 20]
    unmoved = truth[80 - 32 : 80 + 32, 70 - 30 : 70 + 30]
    assert np.abs(seen - expected).mean() < 0.1 < 0.5 < np.abs(seen - unmoved).mean()


def test_crystal_out_of_the_beam_is_dark(twin):
    pose = twin.aligned_pose() | OUT
    bright, dim, dark = (
        counts(twin, twin.frame(pose | {"sample_y": y}, 1.0)).sum() for y in (0.0, 0.75, 10.0)
    )
    # half the width off the axis: half the intensity
    assert dim / bright == pytest.approx(0.5, abs=0.03)
    assert dark < 20 * 12 * 40


def test_shutter_stops_the_beam(twin):
    assert counts(twin, twin.frame({"shutter": 0}, 10.0)).sum() == 0


def test_frames_repeat_with_the_seed():
    a, b = (
        Twin(BEAMLINE, preset(nuisances={"flux_noise": 0.01, "angle_jitter_deg": 0.001})) for _ in range(2)
    )
    for time in (0.0, 3.0):
        np.testing.assert_array_equal(a.frame({}, 0.5, time), b.frame({}, 0.5, time))
    assert (a.frame({}, 0.5) != a.frame({}, 0.5)).any()


def test_position_error_belongs_to_the_position():
    twin = Twin(BEAMLINE, preset(nuisances={"position_error_nm": 5.0}))
    origins = np.array([twin._placement({**twin.aligned_pose(), "x": x}).origin for x in (0.1, 0.2, 0.1)])
    np.testing.assert_array_equal(origins[0], origins[2])
    assert 0 < abs(origins[1, 1] - origins[0, 1]) < 40e-9
    many = np.array([twin._position_error(x * 1e-6, 0.0) for x in range(300)])
    assert many.std() == pytest.approx(5e-9, rel=0.1)


def test_drift_walks_as_the_root_of_time_and_creeps():
    twin = Twin(BEAMLINE, preset(nuisances={"drift_nm_per_sqrt_s": 2.0}))
    path = np.array([twin.drift(float(t)) for t in range(20000)])
    steps = path[100:] - path[:-100]
    assert steps.std() == pytest.approx(20e-9, rel=0.15)
    np.testing.assert_array_equal(path[0], 0)
    creeping = Twin(BEAMLINE, preset(nuisances={"drift_nm_per_s": [1.0, 0.0, -2.0]}))
    np.testing.assert_allclose(creeping.drift(50.0), [50e-9, 0, -100e-9])


def test_drift_moves_the_beam_on_the_modulator():
    """A crystal that moves by +x' lights the modulator at +x': the same as the modulator moved by -x'."""
    twin = Twin(BEAMLINE, preset())
    frame = twin.geometry.detector_frame
    lab = frame.T @ np.array([0.3, -0.2, 0.0])
    pose = twin.aligned_pose()
    stage = dict(zip(("sample_x", "sample_y", "sample_z"), lab, strict=True))
    rates = [twin._rate(p, (0.0, 0.0), 0.0) for p in (pose | stage, pose | {"x": -0.3, "y": 0.2}, pose)]
    a, b, c = (r / np.linalg.norm(r) for r in rates)
    assert (a * b).sum() > 0.99 > 0.9 > (a * c).sum()


def test_flux_fluctuates_as_asked():
    twin = Twin(BEAMLINE, preset(nuisances={"flux_noise": 0.01}))
    flux = np.array([twin.flux(float(t)) for t in range(20000)])
    assert flux.std() / flux.mean() == pytest.approx(0.01, rel=0.15)


def test_partial_coherence_widens_the_pattern_along_x_alone(gapless):
    full, partial = (blob(gapless, preset(**QUIET, nuisances={"coherence_modes": m})) for m in (1, 5))
    pose = full.aligned_pose() | OUT
    variance = []
    for twin in (full, partial):
        rate = twin._rate(pose, (0.0, 0.0), 0.0)
        index = np.arange(len(rate)) - len(rate) // 2
        variance.append([rate.sum(axis) @ index**2 / rate.sum() for axis in (0, 1)])
    columns, rows = np.subtract(*variance[::-1])
    # coherence length 1.5 um across the incident beam, of which x' sees cos(2 theta)
    tilt = np.cos(full.geometry.two_theta) / (1.5e-6 * full.geometry.wavenumber)
    assert columns == pytest.approx((tilt * 5.35 / 75e-6) ** 2, rel=0.05)
    assert rows == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("arm", "sign", "circle"), [("horizontal", -1, "phi"), ("vertical", 1, "eta")])
def test_other_arms_see_the_beam_on_the_same_pixel_and_walk_with_the_geometry(gapless, arm, sign, circle):
    beamline = gapless.model_copy(update={"arm": arm, "arm_sign": sign, "rocking_circle": circle})
    twin = blob(beamline, preset(**QUIET))
    np.testing.assert_allclose(middle(twin), BEAM, atol=0.02)
    walk_x, walk_y = np.array(twin.geometry.walk_per_radian) * np.deg2rad(0.04) * 5.35 / 75e-6
    np.testing.assert_allclose(middle(twin, **{circle: 0.04}) - BEAM, [-walk_y, walk_x], atol=0.05)


def test_wrong_axis_is_named():
    twin = Twin(BEAMLINE, preset())
    with pytest.raises(ValueError, match="no axis theta"):
        twin.frame({"theta": 1.0}, 1.0)
    with pytest.raises(ValueError, match="reading of x is not"):
        twin.frame({"x": float("nan")}, 1.0)
    with pytest.raises(ValueError, match="energy must be above 0 keV, not -1"):
        twin.frame({"energy": -1.0}, 1.0)


def test_rocking_scan_is_cropped_about_the_beam():
    settings = preset()
    plan = settings.plan.model_copy(update={"rocking_half_range_deg": 0.02, "rocking_step_deg": 0.01})
    seen = []
    scan = simulate_rocking(
        BEAMLINE, settings.model_copy(update={"plan": plan}), progress=lambda done, line: seen.append(done)
    )
    np.testing.assert_allclose(scan.angles_deg, [-0.02, -0.01, 0, 0.01, 0.02])
    assert scan.frames.shape == (5, 256, 256) and scan.mask.shape == (256, 256)
    totals = scan.frames[:, ~scan.mask].sum(axis=1)
    assert totals.argmax() == 2
    assert scan.geometry.modulator_distance == pytest.approx(1.35e-3)
    assert scan.mask[1355 - 1340 + 128].all()
    assert seen == [0.2, 0.4, 0.6, 0.8, 1.0]
    out = simulate_rocking(BEAMLINE, settings.model_copy(update={"plan": plan}), modulator_in=False)
    assert out.geometry.modulator_distance == 0 and out.modulator_position == (5e-3, 0.0)


def test_ptychography_scan_covers_its_field():
    settings = preset()
    plan = settings.plan.model_copy(update={"spiral_extent_um": (1.0, 0.6), "spiral_step_um": 0.2})
    scan = simulate_ptychography(BEAMLINE, settings.model_copy(update={"plan": plan}))
    assert len(scan.frames) == len(scan.positions) == pytest.approx(1.0 * 0.6 / 0.2**2, abs=3)
    assert (np.abs(scan.positions) <= [0.5e-6, 0.3e-6]).all()
    totals = scan.frames[:, ~scan.mask].sum(axis=1)
    assert totals.min() > 2e5


def test_sunflower_has_one_point_per_step_squared():
    points = sunflower((6.0, 6.0), 0.12)
    assert len(points) == pytest.approx(2500, rel=0.02)
    gaps = np.sort(np.linalg.norm(points[:, None] - points[None, :500], axis=2), axis=0)[1]
    assert gaps.min() > 0.7 * 0.12


def test_window_that_leaves_the_detector_is_refused():
    settings = preset()
    plan = settings.plan.model_copy(update={"window": 900})
    with pytest.raises(ValueError, match=r"plan.window = 900 .* leaves the detector"):
        simulate_rocking(BEAMLINE, settings.model_copy(update={"plan": plan}))


def test_phase_ramps_stand_for_a_moved_crystal(monkeypatch):
    """The way to the modulator is worked out on a grid of places; in between ramps must do the same."""
    twin = Twin(BEAMLINE, preset())
    pose = twin.aligned_pose() | {"sample_x": 0.21, "sample_y": -0.17}
    unmoved, on_grid = (twin._rate(p, (0.0, 0.0), 0.0) for p in (twin.aligned_pose(), pose))
    monkeypatch.setattr("bcmi_beamline.sim.twin._PLACE_STEP", 1e-12)
    exact = Twin(BEAMLINE, preset())._rate(pose, (0.0, 0.0), 0.0)
    np.testing.assert_allclose(on_grid, exact, atol=5e-4 * exact.max())
    assert np.abs(unmoved - exact).max() > 0.1 * exact.max()
