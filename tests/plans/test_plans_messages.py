"""Plans as the messages they yield, answered by an ideal beamline; no control system."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from bluesky.simulators import RunEngineSimulator

import bcmi_beamline.plans as plans
from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.plans import (
    ModulatorError,
    PoorFit,
    align_modulator,
    bcmi_experiment,
    calibrate_modulator,
    centre_crystal,
    centre_pattern,
    dry_run,
    find_bragg_peak,
    insert_modulator,
    retract_modulator,
    rocking_scan,
    z_walk,
)
from bcmi_beamline.plans.dry_run import Rehearsal, stand_in_devices
from bcmi_beamline.plans.modulator import tilted, where_is
from bcmi_beamline.plans.preprocessors import measure

BEAMLINE = load_beamline()
IN = {f"nanogoniometer_{axis}": value for axis, value in {"x": 0.0, "y": 0.0, "z": 1350.0}.items()}
ANSWERED = ("set", "wait", "trigger", "prepare", "stage", "open_run", "read")


class Bench:
    """Devices that can do nothing, and a RunEngine that takes note of what it is asked."""

    def __init__(self, beamline=BEAMLINE, **start):
        self.devices = stand_in_devices(beamline)
        self.walker = Rehearsal(beamline, start)
        self.engine = RunEngineSimulator()
        self.messages = []
        self.engine.add_handler(ANSWERED, self.walker)

    def run(self, plan):
        self.engine.add_handler("set", self._note(self.walker))
        try:
            self.messages = self.engine.simulate_plan(plan)
        finally:
            assert self.walker.at["shutter"] == 0, "the shutter is left open"
        return self.engine.return_value

    def _note(self, answer):
        self.moves = []

        def note(msg):
            self.moves.append((msg.obj.name, msg.args[0]))
            return answer(msg)

        return note

    def start_document(self):
        return next(m.kwargs for m in self.messages if m.command == "open_run")


# -- the modulator goes the safe way round ---------------------------------------------------------------


def test_retraction_is_z_first_and_alone():
    bench = Bench(**IN)
    pose = bench.run(retract_modulator(bench.devices))
    assert bench.moves[0] == ("nanogoniometer_z", 10000.0)
    first_wait = [m.command for m in bench.messages].index("wait")
    assert [m.command for m in bench.messages[:first_wait]].count("set") == 1
    assert where_is(BEAMLINE, pose) == "out"


def test_insertion_is_z_last_in_small_steps():
    bench = Bench()
    pose = bench.run(insert_modulator(bench.devices, 3150.0))
    names = [name for name, _ in bench.moves]
    assert set(names[:2]) == {"nanogoniometer_x", "nanogoniometer_y"}
    z = [10000.0] + [value for name, value in bench.moves if name == "nanogoniometer_z"]
    assert names[2:] == ["nanogoniometer_z"] * (len(z) - 1)
    assert np.all(np.diff(z) < 0) and np.abs(np.diff(z)).max() <= 1000.0
    assert z[-1] == 3150.0
    assert where_is(BEAMLINE, pose) == "in"


def test_a_modulator_low_and_aside_is_first_taken_far_away():
    bench = Bench(nanogoniometer_x=3000.0, nanogoniometer_z=2000.0)
    bench.run(insert_modulator(bench.devices))
    assert bench.moves[0] == ("nanogoniometer_z", 10000.0)


def test_insertion_stops_where_z_is_not_where_it_was_sent():
    bench = Bench()

    def stuck(msg):
        reading = bench.walker(msg)
        if msg.obj.name == "nanogoniometer_z" and reading["nanogoniometer_z"]["value"] < 5000:
            reading["nanogoniometer_z"]["value"] += 3.0
        return reading

    bench.engine.add_handler("read", stuck)
    with pytest.raises(ModulatorError, match="insertion stopped: z reads"):
        bench.run(insert_modulator(bench.devices))
    assert bench.walker.at["nanogoniometer_z"] > 4000


def test_insertion_inside_the_stand_off_is_refused_before_anything_moves():
    bench = Bench(nanogoniometer_mchi=-8.0)
    with pytest.raises(ValueError, match="inside the stand-off"):
        bench.run(insert_modulator(bench.devices, BEAMLINE.nanogoniometer.stand_off_um - 50))
    assert bench.moves == []


def test_tilting_keeps_the_spot_and_the_distance():
    from bcmi_beamline.devices.pose_math import beam_on_membrane

    pose = {"x": 12.0, "y": -7.0, "z": 1350.0, "mchi": 0.4, "mphi": -0.8}
    turned = tilted(BEAMLINE, pose, mchi=-3.0, mphi=4.0)
    pivot = BEAMLINE.nanogoniometer.pivot_um
    before = beam_on_membrane((12.0, -7.0, 1350.0), 0.4, -0.8, pivot)
    after = beam_on_membrane((turned["x"], turned["y"], turned["z"]), -3.0, 4.0, pivot)
    assert after[0] == pytest.approx(before[0], abs=1e-6)
    assert after[1] == pytest.approx(before[1], abs=1e-6)


# -- a scan ----------------------------------------------------------------------------------------------


def test_a_rocking_scan_message_by_message():
    bench = Bench(**IN)
    result = bench.run(
        rocking_scan(bench.devices, 0.02, 0.005, 0.3, peak_deg=17.71, window=256, metadata={"sample": "Pt 7"})
    )
    names = [m.command for m in bench.messages]
    order = [names.index(c) for c in ("prepare", "stage", "open_run", "trigger", "close_run", "unstage")]
    assert order == sorted(order)
    shutter = [i for i, m in enumerate(bench.messages) if m.command == "set" and m.obj.name == "shutter"]
    assert order[2] < shutter[0] < order[3] and shutter[1] < order[4]
    assert [bench.messages[i].args[0] for i in shutter] == [1, 0]
    first, second, *_ = (i for i, c in enumerate(names) if c == "checkpoint" and order[2] < i)
    point = ["checkpoint", "set", "wait", "trigger", "wait", "create", "read", "read", "read", "save"]
    assert names[first:second] == point
    angles = [v for n, v in bench.moves if n == "diffractometer_phi"]
    assert angles[:-1] == pytest.approx(17.71 + np.linspace(-0.02, 0.02, 9))
    assert angles[-1] == 17.71, "it ends at the peak"
    assert result.points == 9 and result.modulator == "in"
    plan = next(m.args[0] for m in bench.messages if m.command == "prepare")
    assert (plan.frames, plan.exposure_s, plan.window) == (9, 0.3, 256)


def test_the_start_document_tells_all_that_data_reduction_needs():
    bench = Bench(**{**IN, "nanogoniometer_mphi": -1.2})
    reference = {"uid": "abc", "sha256": "def", "modulator_position_um": {"z": 1350.0, "mphi": -1.2}}
    bench.run(
        rocking_scan(
            bench.devices,
            0.02,
            0.01,
            peak_deg=17.71,
            window=256,
            calibration=reference,
            metadata={"sample": "Pt 7", "scan_kind": "mischief"},
        )
    )
    start = bench.start_document()
    assert start["plan_name"] == "rocking_scan" and start["scan_kind"] == "rocking"
    assert start["sample"] == "Pt 7"
    assert start["rocking"] == {"circle": "phi", "peak_deg": 17.71, "sense": 1}
    assert start["calibration"] == {"uid": "abc", "sha256": "def"}
    assert start["window"] == {"size": 256, "row": 1340, "column": 640}
    assert start["modulator"] == "in"
    assert start["modulator_position_um"] == {"x": 0, "y": 0, "z": 1350, "mchi": 0, "mphi": -1.2}
    assert start["geometry"] == dataclasses.asdict(BEAMLINE.geometry(start["geometry"]["modulator_distance"]))
    # The membrane, turned about a pivot on its own axis, is cut by the beam at z / cos(mphi).
    assert start["geometry"]["modulator_distance"] == pytest.approx(1350e-6, rel=5e-4)
    assert start["detector"]["count_cutoff"] > 0
    assert start["detector"]["masked_rows"][0] == [255, 258]
    assert start["num_points"] == 5
    json.dumps(start)


def test_with_the_modulator_out_there_is_no_distance():
    bench = Bench(**IN)
    bench.run(rocking_scan(bench.devices, 0.02, 0.01, modulator="out", window=256))
    start = bench.start_document()
    assert start["modulator"] == "out" and start["geometry"]["modulator_distance"] == 0
    assert bench.moves[0] == ("nanogoniometer_z", 10000.0)
    assert "calibration" not in start


def test_a_circle_that_turns_the_other_way_still_gives_rising_angles():
    circles = BEAMLINE.diffractometer.model_copy(
        update={"phi": BEAMLINE.diffractometer.phi.model_copy(update={"sense": -1})}
    )
    bench = Bench(BEAMLINE.model_copy(update={"diffractometer": circles}))
    bench.run(rocking_scan(bench.devices, 0.02, 0.01, modulator="out", peak_deg=10.0))
    readings = [v for n, v in bench.moves if n == "diffractometer_phi"][:-1]
    assert np.all(np.diff(readings) < 0)
    rocking = bench.start_document()["rocking"]
    assert rocking["sense"] * (np.array(readings) - rocking["peak_deg"]) == pytest.approx(
        np.linspace(-0.02, 0.02, 5)
    )


def test_a_spiral_is_measured_where_it_was_planned():
    bench = Bench(**{**IN, "nanogoniometer_x": 5.0})
    result = bench.run(calibrate_modulator(bench.devices, (2.0, 2.0), 0.4, window=256))
    x = [v for n, v in bench.moves if n == "nanogoniometer_x"]
    assert len(x) == result.points + 1 and x[0] == 5.0 and x[-1] == 5.0
    assert np.abs(np.array(x) - 5.0).max() <= 1.0
    start = bench.start_document()
    assert start["scan_kind"] == "ptychography" and start["modulator"] == "in"
    assert result.reference["modulator_position_um"]["x"] == 5.0
    read = [m.obj.name for m in bench.messages if m.command == "read"][-4:]
    assert read == ["eiger", "nanogoniometer_x", "nanogoniometer_y", "monitor"]


# -- what is refused, and what is left behind --------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "arguments", "words"),
    [
        (rocking_scan, {"half_range_deg": 300.0, "step_deg": 1.0}, "phi: .* outside its limits"),
        (rocking_scan, {"half_range_deg": 90.0, "step_deg": 1.0}, "phi: .* as allowed with the modulator in"),
        (rocking_scan, {"step_deg": -1.0}, "rocking: step"),
        (rocking_scan, {"exposure_s": 0.0}, "exposure_s"),
        (rocking_scan, {"window": 2000}, "window: 2000 pixels .* choose 16 to 780"),
        (rocking_scan, {"modulator": "sideways"}, "'in' or 'out'"),
        (rocking_scan, {"calibration": {"sha256": "x"}}, "give the uid"),
        (
            rocking_scan,
            {"calibration": {"uid": "0123456789", "modulator_position_um": {"z": 3150.0}}},
            r"01234567 was taken 3150 um from the crystal, the modulator is 1350 um from it: calibrate again",
        ),
        (calibrate_modulator, {"extent_um": (1.0, 1.0), "step_um": 0.9}, "points; reduce step_um"),
        (calibrate_modulator, {"extent_um": (12500.0, 100.0), "step_um": 50.0}, "modulator x: .* outside"),
        (find_bragg_peak, {"points": 2}, "points 2"),
        (find_bragg_peak, {"centre_deg": 400.0}, "phi: 399.85 lies outside"),
        (centre_crystal, {"half_range_um": 100.0}, "sample_stage x: -100 lies outside"),
        (align_modulator, {"half_range_deg": 9.0}, "modulator mphi: -9 deg lies outside"),
        (align_modulator, {"points": 3}, "points 7 or more"),
        (centre_pattern, {"search_um": 10.0}, "search_um at least pattern_um"),
        (z_walk, {"z_range_um": 20000.0}, "modulator z: .* outside"),
    ],
)
def test_bad_arguments_are_refused_before_anything_moves(plan, arguments, words):
    bench = Bench(**IN)
    with pytest.raises(ValueError, match=words) as caught:
        bench.run(plan(bench.devices, **arguments))
    assert bench.moves == []
    assert "\n" not in str(caught.value)


def test_no_peak_no_move():
    bench = Bench(diffractometer_phi=17.5)
    dark = {"eiger_total": {"value": 100, "timestamp": 0}}
    bench.engine.add_handler("read", lambda msg: dark, "eiger")
    with pytest.raises(PoorFit, match="no peak"):
        bench.run(find_bragg_peak(bench.devices))
    assert bench.walker.at["diffractometer_phi"] == 17.5


@pytest.mark.parametrize("pattern_um", [None, 40.0])
def test_a_modulator_that_shows_nothing_is_not_turned(pattern_um):
    start = {**IN, "nanogoniometer_mphi": 0.5, "nanogoniometer_y": 3.0}
    bench = Bench(**start)
    rng = np.random.default_rng(0)

    def flat(msg):
        reading = bench.walker(msg)
        for key in ("eiger_high_q_x", "eiger_high_q_y"):
            reading[key]["value"] = 0.02 + rng.normal(0, 1e-3)
        return reading

    bench.engine.add_handler("read", flat, "eiger")
    with pytest.raises(PoorFit, match=r"sharpness|pattern"):
        bench.run(align_modulator(bench.devices, pattern_um=pattern_um))
    for name, value in start.items():
        assert bench.walker.at[name] == pytest.approx(value, abs=1e-9), name


def test_a_failure_closes_the_shutter_stops_the_motors_and_disarms():
    bench = Bench(**IN)

    def broken():
        yield from ()
        raise RuntimeError("beam lost")

    plan = measure(
        bench.devices,
        broken,
        plan_name="p",
        scan_kind="rocking",
        modulator="in",
        frames=1,
        exposure_s=1.0,
        window=64,
    )
    commands = []
    for command in ("stop", "unstage", "close_run"):
        bench.engine.add_handler(command, lambda msg: commands.append((msg.command, msg.kwargs)))
    with pytest.raises(RuntimeError, match="beam lost"):
        bench.run(plan)
    names = [command for command, _ in commands]
    assert names.count("stop") >= 6
    assert names[-2:] == ["close_run", "unstage"]
    assert commands[-2][1]["exit_status"] == "fail"


# -- what is found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walk", [True, False])
def test_alignment_finds_the_ideal_modulator_from_afar(walk):
    bench = Bench(**{**IN, "nanogoniometer_mphi": -2.5, "nanogoniometer_mchi": 1.0, "nanogoniometer_x": 20.0})
    result = bench.run(align_modulator(bench.devices, points=15, walk=walk))
    assert result.mphi_deg == pytest.approx(0.0, abs=0.02)
    assert result.mchi_deg == pytest.approx(0.0, abs=0.02)
    assert bench.walker.at["nanogoniometer_mphi"] == result.mphi_deg
    assert np.hypot(*bench.walker.spot()) < 3.0, "the middle of the pattern is in the beam"
    assert bench.walker.problems == []
    assert len(result.uids) == len(set(result.uids))
    assert result.curves["mphi"].sharpness.shape == (3, 15)
    if walk:
        assert result.z_walks["mphi"].angle_deg == pytest.approx(0.0, abs=0.1)
        assert result.z_walks["mchi"].angle_deg == pytest.approx(0.0, abs=0.1)


def test_alignment_refuses_when_its_two_methods_contradict():
    bench = Bench(**IN)

    def crooked(msg):  # the walls are parallel to the beam at mphi = 2, where the edges walk
        reading = bench.walker(msg)
        mphi = bench.walker.at["nanogoniometer_mphi"]
        reading["eiger_high_q_x"]["value"] *= (1 + (mphi / 2.5) ** 2) / (1 + ((mphi - 2) / 2.5) ** 2)
        return reading

    bench.engine.add_handler("read", crooked, "eiger")
    with pytest.raises(PoorFit, match=r"mphi: sharpness says .* the z-walk"):
        bench.run(align_modulator(bench.devices, squareness_error_deg=0.05))
    assert bench.walker.at["nanogoniometer_mphi"] == 0.0


def test_bragg_peak_and_crystal_are_found():
    bench = Bench(sample_stage_x=0.7)
    assert bench.run(find_bragg_peak(bench.devices)).peak_deg == pytest.approx(17.70, abs=1e-3)
    assert bench.walker.at["diffractometer_phi"] == pytest.approx(17.70, abs=1e-3)
    found = bench.run(centre_crystal(bench.devices))
    assert (found.x_um, found.y_um) == pytest.approx((0.0, 0.0), abs=0.02)


def test_the_experiment_does_every_act_in_order():
    bench = Bench()
    result = bench.run(bcmi_experiment(bench.devices, load_preset("small").plan))
    starts = [m.kwargs for m in bench.messages if m.command == "open_run"]
    acts = list(dict.fromkeys(s["experiment_act"] for s in starts))
    assert acts == ["bragg", "alignment", "calibration", "rocking_in", "rocking_out"] == list(result.uids)
    assert [s["modulator"] for s in starts if s["scan_kind"] == "rocking"] == ["in", "out"]
    rocking = [s for s in starts if s["scan_kind"] == "rocking"]
    assert rocking[0]["calibration"]["uid"] == result.calibration.uid
    assert rocking[0]["rocking"]["peak_deg"] == result.bragg.peak_deg
    assert sum(len(uids) for uids in result.uids.values()) == len(starts)
    assert bench.walker.problems == []


# -- what the queue server asks of plans ------------------------------------------------------------------


def _operator_plans():
    return [
        f
        for f in vars(plans).values()
        if inspect.isgeneratorfunction(f) and next(iter(inspect.signature(f).parameters)) == "devices"
    ]


@pytest.mark.parametrize("plan", _operator_plans(), ids=lambda plan: plan.__name__)
def test_the_queue_server_understands_every_plan(plan):
    from bluesky_queueserver.manager.profile_ops import _process_plan

    described = _process_plan(plan, existing_devices={}, existing_plans={})
    assert described["description"]
    for parameter in described["parameters"]:
        assert parameter["description"], f"{plan.__name__}: {parameter['name']} is not documented"
        if parameter["name"] != "devices":
            assert "default" in parameter


def test_plan_modules_keep_their_annotations_and_never_block():
    folder = Path(inspect.getfile(plans)).parent
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "__future__", path.name
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"put", "get_pv", "caput"}, f"{path.name}: {node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "input"}, path.name


# -- rehearsals -------------------------------------------------------------------------------------------


def test_a_rehearsal_counts_frames_seconds_and_bytes():
    outcome = dry_run(rocking_scan, BEAMLINE, exposure_s=2.0)
    assert outcome.frames == 201 and outcome.exposure_s == pytest.approx(402.0)
    assert 402 < outcome.duration_s < 450
    assert outcome.exposure_s < outcome.beam_s < outcome.duration_s
    assert outcome.disk_bytes == pytest.approx(201 * 2164 * 1030 * 4 * 0.03)
    assert outcome.problems == () and outcome.runs == 1
    assert len(outcome.path["diffractometer_phi"]) == 201
    assert np.ptp(outcome.path["diffractometer_phi"]) == pytest.approx(1.0)
    json.dumps(outcome.to_dict())


def test_a_rehearsal_tells_what_would_be_refused():
    assert "outside" in dry_run(rocking_scan, BEAMLINE, half_range_deg=300.0, step_deg=1.0).problems[0]
    with pytest.raises(ValueError, match="start: no axis named typo"):
        dry_run(rocking_scan, BEAMLINE, start={"typo": 0.0})

    def careless(devices):
        from bluesky import plan_stubs as bps

        yield from bps.mv(devices.nanogoniometer.z, 20000.0)
        yield from bps.mv(devices.nanogoniometer.z, 1000.0, devices.nanogoniometer.mchi, -8.0)

    problems = dry_run(careless, BEAMLINE).problems
    assert "nanogoniometer_z: 20000 um lies outside" in problems[0]
    assert any("inside the stand-off" in problem for problem in problems)


@pytest.mark.parametrize("preset", ["small", "paper-ls", "paper-hs"])
def test_every_preset_can_be_rehearsed(preset):
    outcome = dry_run(bcmi_experiment, BEAMLINE, settings=preset)
    assert outcome.problems == ()
    assert outcome.result.rocking_in.points == load_preset(preset).plan.rocking_points


def test_a_rehearsal_makes_no_device(monkeypatch):
    import ophyd

    def forbidden(*args, **kwargs):
        raise AssertionError("a rehearsal made a device")

    monkeypatch.setattr(ophyd.Device, "__init__", forbidden)
    monkeypatch.setattr(ophyd.EpicsSignalRO, "__init__", forbidden)
    assert dry_run(find_bragg_peak, BEAMLINE).frames == 31
