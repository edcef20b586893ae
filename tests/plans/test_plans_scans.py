"""Scans that carry sentinels, resume, know calibration and dose; rehearsals that ask the guards."""

import numpy as np
import pytest
from bluesky import plan_stubs as bps
from test_plans_messages import BEAMLINE, IN, Bench

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.plans import (
    StaleCalibration,
    bcmi_campaign,
    bcmi_experiment,
    calibrate_modulator,
    calibrate_pivot,
    dose,
    dry_run,
    find_bragg_peak,
    retract_modulator,
    rocking_scan,
    spiral,
)
from bcmi_beamline.plans.alignment import _fit_pivot
from bcmi_beamline.plans.modulator import tilted

VERTICAL = load_beamline("sim-id01-vertical")
SMALL = load_preset("small").plan
SHORT = SMALL.model_copy(
    update={
        "align_points": 9,
        "spiral_extent_um": (1.2, 1.2),
        "spiral_step_um": 0.3,
        "rocking_half_range_deg": 0.02,
    }
)


# -- sentinels --------------------------------------------------------------------------------------------
def test_sentinels_stand_at_the_peak_and_are_marked():
    bench = Bench()
    result = bench.run(
        rocking_scan(bench.devices, 0.02, 0.005, modulator="out", peak_deg=17.7, sentinel_every=4, window=64)
    )
    phi = [v for n, v in bench.moves if n == "diffractometer_phi"]
    steps = 17.7 + np.linspace(-0.02, 0.02, 9)
    assert phi == pytest.approx([17.7, *steps[:4], 17.7, *steps[4:8], 17.7, steps[8], 17.7])
    marks = [v for n, v in bench.moves if n == "sentinel"]
    assert marks == [1, 0] * 3 and (result.points, result.sentinels) == (9, 3)
    reads = [m.obj.name for m in bench.messages if m.command == "read"]
    assert reads.count("sentinel") == 12, "every event tells whether it is one"
    start = bench.start_document()
    assert start["sentinels"] == {"every": 4, "at_deg": 17.7} and start["num_points"] == 12
    assert result.peak_change == pytest.approx(0.0, abs=1e-3)


def test_a_spiral_revisits_its_centre_where_drift_would_show():
    bench = Bench(**IN)
    fading = iter(np.linspace(1.0, 0.9, 1000))

    def fade(msg):
        reading = bench.walker(msg)
        reading["eiger_total"]["value"] = int(1e6 * next(fading))
        return reading

    bench.engine.add_handler("read", fade, "eiger")
    result = bench.run(calibrate_modulator(bench.devices, (2.0, 2.0), 0.4, revisit_every=10, window=64))
    visits = -(-result.points // 10)
    x = [v for n, v in bench.moves if n == "nanogoniometer_x"]
    assert x.count(0.0) == visits + 2, "each visit, the first point, and the way back"
    assert 0.001 < result.centre_change < 0.02 and "counts at the centre" in repr(result)


def test_a_frame_without_beam_is_taken_again():
    bench = Bench()
    dark = iter([1, 0, 0, 1, 1, 1, 1])

    def flux(msg):
        return {"monitor_flux": {"value": 1e10 * next(dark), "timestamp": 0.0}}

    bench.engine.add_handler("read", flux, "monitor")
    result = bench.run(rocking_scan(bench.devices, 0.02, 0.01, modulator="out", peak_deg=17.7, window=64))
    commands = [m.command for m in bench.messages]
    assert (commands.count("trigger"), commands.count("drop"), commands.count("save")) == (7, 2, 5)
    assert result.points == 5


# -- after an interruption ----------------------------------------------------------------------------------
def test_only_the_missing_angles_are_taken():
    bench = Bench()
    bench.run(
        rocking_scan(
            bench.devices,
            0.02,
            0.005,
            modulator="out",
            peak_deg=17.7,
            continues="abc",
            points_done=6,
            window=64,
        )
    )
    phi = [v for n, v in bench.moves if n == "diffractometer_phi"]
    assert phi[:-1] == pytest.approx([17.71, 17.715, 17.72])
    start = bench.start_document()
    assert (start["continues"], start["points_before"], start["points_total"]) == ("abc", 6, 9)
    # what it says of itself is what completes it again
    again = Bench()
    again.run(rocking_scan(again.devices, **start["plan_arguments"], continues="def", points_done=8))
    assert [v for n, v in again.moves if n == "diffractometer_phi"] == pytest.approx([17.72, 17.7])


def test_only_the_missing_positions_are_taken_where_they_were_planned():
    bench = Bench(**{**IN, "nanogoniometer_x": 7.0})
    bench.run(calibrate_modulator(bench.devices, (2.0, 2.0), 0.4, window=64))
    start = bench.start_document()
    later = Bench(**{**IN, "nanogoniometer_x": 7.4})  # the modulator stayed where it was stopped
    later.run(calibrate_modulator(later.devices, **start["plan_arguments"], continues="abc", points_done=10))
    planned = 7.0 + spiral((2.0, 2.0), 0.4)[10:, 0]
    assert [v for n, v in later.moves if n == "nanogoniometer_x"][:-1] == pytest.approx(list(planned))


@pytest.mark.parametrize("done", [-1, 9])
def test_a_complete_scan_is_not_continued(done):
    bench = Bench()
    with pytest.raises(ValueError, match="points_done"):
        bench.run(rocking_scan(bench.devices, 0.02, 0.005, modulator="out", points_done=done, window=64))
    assert bench.moves == []


# -- provenance -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("doubt", "change", "words"),
    [
        ("crystal", {"crystal": "Pt 8"}, "of crystal Pt 8, this is Pt 7"),
        ("crystal", {"hkl": [2, 0, 0]}, r"at \[2, 0, 0\], this is \[1, 1, 1\]"),
        ("energy", {"energy_ev": 9005.0}, "at 9005.0 eV, the energy is 9000.0 eV"),
        ("distance", {"distance_um": 1300.0 - 1.0}, "1299 um from the crystal, the modulator is 1350 um"),
        ("tilt", {"modulator_position_um": {"mphi": 0.2}}, "at mphi = 0.200 deg, the modulator is at 0.000"),
    ],
)
def test_a_stale_calibration_is_an_error_before_the_first_frame(doubt, change, words):
    bench = Bench(**IN)
    calibrated = bench.run(
        calibrate_modulator(bench.devices, (2, 2), 0.4, metadata={"sample": "Pt 7"}, window=64)
    )
    reference = {**calibrated.reference, "sha256": "f00"}
    scan = {"half_range_deg": 0.02, "step_deg": 0.01, "window": 64, "metadata": {"sample": "Pt 7"}}
    fresh = Bench(**IN)
    fresh.run(rocking_scan(fresh.devices, calibration=reference, **scan))
    assert fresh.start_document()["calibration"] == {"uid": calibrated.uid, "sha256": "f00"}
    stale = Bench(**IN)
    with pytest.raises(StaleCalibration, match=words + rf'.*allow_stale=\["{doubt}"\]'):
        stale.run(rocking_scan(stale.devices, calibration=reference | change, **scan))
    assert stale.moves == []
    others = [d for d in ("crystal", "energy", "distance", "tilt") if d != doubt]
    with pytest.raises(StaleCalibration):
        stale.run(rocking_scan(stale.devices, calibration=reference | change, allow_stale=others, **scan))
    stale.run(rocking_scan(stale.devices, calibration=reference | change, allow_stale=[doubt], **scan))
    assert stale.start_document()["calibration"]["stale"] == [doubt], "and it says so for ever"


def test_the_geometry_is_that_of_the_energy_as_read():
    bench = Bench(**IN, energy=9.1)
    bench.run(find_bragg_peak(bench.devices, window=64))
    geometry = bench.start_document()["geometry"]
    assert geometry["energy_ev"] == pytest.approx(9100.0)
    phi = [v for n, v in bench.moves if n == "diffractometer_phi"]
    theta = np.rad2deg(np.arcsin(1.2398419843e-6 / 9100.0 / (2 * 0.2265292e-9)))
    assert np.mean(phi[:31]) == pytest.approx(17.70 + theta - 17.7018, abs=2e-3)


# -- vertical scattering: the rocking circle carries the modulator ------------------------------------------
def test_with_the_modulator_in_a_carrier_is_rocked_compensated():
    bench = Bench(VERTICAL, **IN)
    bench.run(rocking_scan(bench.devices, 0.02, 0.01, window=64))
    rocked = [v for n, v in bench.moves if n == "rock_with_modulator"]
    assert rocked == pytest.approx([17.72, 17.71, 17.70, 17.69, 17.68, 17.70]), "eta counts left-handed"
    assert not any(name == "diffractometer_eta" for name, _ in bench.moves)
    assert bench.walker.problems == []
    assert bench.walker.at["nanogoniometer_mchi"] == pytest.approx(0.0, abs=1e-12)
    reading = bench.walker.do_read(
        next(m for m in bench.messages if m.command == "read" and "rock" in m.obj.name)
    )
    assert {"diffractometer_eta", "nanogoniometer_mchi", "nanogoniometer_y"} <= set(reading)
    out = Bench(VERTICAL)
    out.run(rocking_scan(out.devices, 0.02, 0.01, modulator="out", window=64))
    assert not any(name == "rock_with_modulator" for name, _ in out.moves)


def test_every_act_runs_in_the_vertical_geometry():
    outcome = dry_run(bcmi_experiment, VERTICAL, settings=SHORT)
    assert outcome.problems == () and outcome.result.rocking_in.points == 9


# -- pivot ------------------------------------------------------------------------------------------------
def test_the_pivot_is_found_from_the_walk_it_leaves():
    true = (30.0, -5040.0, 120.0)
    beamline = BEAMLINE.model_copy(
        update={"nanogoniometer": BEAMLINE.nanogoniometer.model_copy(update={"pivot_um": true})}
    )
    start = {"x": 3.0, "y": -2.0, "z": 1350.0, "mchi": 0.5, "mphi": -1.0}
    rng = np.random.default_rng(4)
    pulls = []
    for _ in range(30):
        seen = [
            tilted(beamline, start, start["mchi"] + a, start["mphi"] + b)
            for a, b in ((0, -4), (0, 4), (-4, 0), (4, 0))
        ]
        axes, errors = ["x", "x", "y", "y"], np.full(4, 0.3)
        for pose, axis in zip(seen, axes, strict=True):
            pose[axis] += rng.normal(0, 0.3)
        found, stated, walk, _ = _fit_pivot(start, seen, axes, errors, (0.0, -5000.0, 0.0), 200.0)
        assert walk == pytest.approx(120 * np.sin(np.deg2rad(4)), abs=1.5)
        assert abs(found[2] - 120.0) < 12.0 and stated[2] < 4.0
        assert stated[0] > 30.0, "x hardly moves anything, and it says so"
        pulls.append((found[2] - true[2]) / stated[2])
    assert 0.6 < np.std(pulls) < 1.5


def test_a_calibrated_pivot_is_set_and_everything_after_stands_by_it():
    bench = Bench(**IN)
    bench.walker.at["nanogoniometer_pivot"] = (0.0, -5000.0, 80.0)
    found = bench.run(calibrate_pivot(bench.devices))
    assert [n for n, _ in bench.moves][-1] == "nanogoniometer_pivot"
    assert found.pivot_um[2] == pytest.approx(80.0, abs=3 * found.pivot_error_um[2])
    assert "+-" in repr(found)
    bench.run(rocking_scan(bench.devices, 0.02, 0.01, window=64))
    assert bench.start_document()["pivot_um"][:3] == pytest.approx(list(found.pivot_um))


# -- one crystal after another ----------------------------------------------------------------------------
CRYSTALS = [{"name": "A", "x_um": -20.0}, {"name": "B", "x_um": 30.0, "centre_deg": 17.7}]


def test_a_campaign_measures_every_crystal_with_the_modulator_out_in_between():
    bench = Bench()
    result = bench.run(bcmi_campaign(bench.devices, CRYSTALS, SHORT, metadata={"sample": "wrong"}))
    assert list(result.results) == ["A", "B"] and result.failures == {}
    samples = [m.kwargs["sample"] for m in bench.messages if m.command == "open_run"]
    assert list(dict.fromkeys(samples)) == ["A", "B"]
    assert bench.walker.problems == [], "the guard of the sample stage among others"
    assert "perpendicular at mchi" in repr(result)


def test_a_crystal_that_does_not_diffract_does_not_stop_the_others():
    bench = Bench()

    def dark(msg):
        reading = bench.walker(msg)
        if bench.walker.at["sample_stage_x"] < 0:
            reading["eiger_total"]["value"] = 100
        return reading

    bench.engine.add_handler("read", dark, "eiger")
    result = bench.run(bcmi_campaign(bench.devices, CRYSTALS, SHORT))
    assert list(result.results) == ["B"] and "no peak" in result.failures["A"]


@pytest.mark.parametrize(
    ("crystals", "words"),
    [
        ([], "name of its own"),
        ([{"name": "A"}, {"name": "A"}], "name of its own"),
        ([{"x_um": 1.0}], "needs a name"),
        ([{"name": "A", "colour": "red"}], "may have centre_deg, x_um"),
        ([{"name": "A", "x_um": 99.0}], "A: sample_stage x: 99 lies outside"),
    ],
)
def test_a_list_that_is_not_understood_is_refused(crystals, words):
    bench = Bench()
    with pytest.raises(ValueError, match=words):
        bench.run(bcmi_campaign(bench.devices, crystals))
    assert bench.moves == []


def test_an_experiment_is_taken_up_at_a_later_act():
    bench = Bench(**IN)
    reference = {"uid": "abc", "modulator_position_um": {"z": 1350.0}}
    result = bench.run(bcmi_experiment(bench.devices, SHORT, first_act="rocking_in", calibration=reference))
    acts = [m.kwargs["experiment_act"] for m in bench.messages if m.command == "open_run"]
    assert acts == ["rocking_in", "rocking_out"] and result.bragg is None
    assert list(result.uids) == acts
    with pytest.raises(ValueError, match="rocking_in needs a calibration"):
        bench.run(bcmi_experiment(bench.devices, SHORT, first_act="rocking_in"))


# -- told beforehand --------------------------------------------------------------------------------------
def test_dose_by_hand():
    # 1e10 photons of 9 keV in a Gaussian of 1.5 um FWHM: 0.883 / 2.25 um2 in the middle; platinum absorbs
    # 150 cm2/g there (xraydb, Elam: 148 to 152), so 1e10 * 3.92e11 * 1.442e-15 * 15 = 85 MGy.
    found = dose(BEAMLINE, photons=1e10, beam_s=1.0)
    assert found.gray == pytest.approx(85e6, rel=0.1)
    assert dry_run(rocking_scan, BEAMLINE, exposure_s=1.0).dose.photons == pytest.approx(
        1e10 * dry_run(rocking_scan, BEAMLINE, exposure_s=1.0).beam_s
    )


def test_a_full_disk_is_told_before():
    outcome = dry_run(rocking_scan, BEAMLINE, disk_free_bytes=1e6)
    assert outcome.problems == (
        "disk: 0.05 GB of frames do not fit into the 0.00 GB that are free: "
        "make room or choose another folder",
    )
    assert dry_run(rocking_scan, BEAMLINE, disk_free_bytes=1e12).problems == ()


def test_collisions_are_found_between_the_points_too():
    def crossing(devices):
        """Start and end are safe, what lies between is not: both axes move at once."""
        nano = devices.nanogoniometer
        yield from bps.mv(nano.x, 0.0, nano.y, 0.0)
        yield from bps.mv(nano.z, 1000.0)
        yield from bps.mv(nano.z, 2500.0, nano.mchi, -8.0)

    (problem,) = dry_run(crossing, BEAMLINE).problems
    assert "nanogoniometer_mchi: -8 deg could bring the modulator to" in problem
    assert "and wait for it" in problem


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ([("diffractometer", "phi", 30.0)], "phi: 30 deg lies outside .* modulator in"),
        ([("sample_stage", "x", 25.0)], "sample_stage_x: 25 um is 25 um from where the sample was"),
    ],
)
def test_what_the_guards_refuse_a_rehearsal_tells(moves, words):
    def plan(devices):
        for device, axis, value in moves:
            yield from bps.mv(getattr(getattr(devices, device), axis), value)

    problems = dry_run(plan, BEAMLINE, start=IN).problems
    assert len(problems) == 1
    import re

    assert re.search(words, problems[0])
    assert dry_run(plan, BEAMLINE).problems == (), "with the modulator out all is free"


def test_the_modulator_does_not_come_in_away_from_the_bragg_setting():
    def plan(devices):
        yield from bps.mv(devices.diffractometer.phi, 40.0)
        yield from bps.mv(devices.nanogoniometer.x, 0.0)

    (problem,) = dry_run(plan, BEAMLINE).problems
    assert "stays out while phi is not within 2 deg" in problem


def test_parking_for_an_exchange_of_samples():
    bench = Bench(**IN)
    pose = bench.run(retract_modulator(bench.devices, "park"))
    assert pose == pytest.approx(dict(BEAMLINE.nanogoniometer.positions["park"]))
    assert bench.moves[0] == ("nanogoniometer_z", 12000.0)
