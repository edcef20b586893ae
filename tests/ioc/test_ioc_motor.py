"""Motor records of the simulated beamline over Channel Access."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import epics
import pytest
from ophyd import EpicsMotor

pytestmark = pytest.mark.ioc

TIMEOUT_S = 20.0


class Record:
    """A motor record as a client sees it, fields by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._fields: dict[str, epics.PV] = {}

    def field(self, name: str) -> epics.PV:
        if name not in self._fields:
            pv = epics.PV(f"{self.name}.{name}", auto_monitor=False, form="native")
            assert pv.wait_for_connection(TIMEOUT_S), pv.pvname
            self._fields[name] = pv
        return self._fields[name]

    def __getitem__(self, name: str):
        return self.field(name).get(timeout=TIMEOUT_S, as_string=name in ("DIR", "SPMG", "SET", "EGU"))

    def __setitem__(self, name: str, value) -> None:
        self.field(name).put(value, wait=True, timeout=TIMEOUT_S)

    def start(self, target: float) -> None:
        """Write VAL without waiting, and return once the record moves."""
        self.field("VAL").put(target, wait=False)
        self.until("MOVN", 1)

    def until(self, name: str, value) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self[name] != value:
            assert time.monotonic() < deadline, f"{self.name}.{name} never became {value}"
            time.sleep(0.002)


@pytest.fixture(scope="module")
def beamline(simulated_beamline):
    return simulated_beamline.beamline


@pytest.fixture
def stage(beamline):
    """The nanogoniometer's x at 0, put back as it was configured afterwards."""
    axis = beamline.nanogoniometer.x
    record = Record(beamline.prefix + axis.pv)
    record["VAL"] = 0.0
    yield record
    for name, value in (
        ("SPMG", "Go"), ("STOP", 1), ("SET", "Use"), ("DIR", "Pos"), ("OFF", 0.0), ("VELO", axis.velocity),
        ("DLLM", axis.low), ("DHLM", axis.high), ("VAL", 0.0),
    ):  # fmt: skip
        record[name] = value


@pytest.fixture
def slow_stage(stage):
    """The same, so slow that one can interfere: 5 mm take seconds."""
    stage["VELO"] = 20.0
    return stage


def axes(beamline):
    for part in (beamline.nanogoniometer, beamline.sample_stage, beamline.diffractometer):
        for name in ("x", "y", "z", "mchi", "mphi", "mu", "eta", "phi", "nu", "delta"):
            axis = getattr(part, name, None)
            if axis is not None:
                yield axis
    for name in ("horizontal", "vertical", "horizontal_centre", "vertical_centre"):
        yield getattr(beamline.slits, name)
    yield beamline.monochromator.energy
    yield beamline.focus.z


def test_every_axis_is_a_complete_motor_record(beamline):
    motors = [(axis, EpicsMotor(beamline.prefix + axis.pv, name="motor")) for axis in axes(beamline)]
    assert len(motors) == 19
    for axis, motor in motors:
        motor.wait_for_connection(all_signals=True, timeout=TIMEOUT_S)
        assert motor.limits == (axis.low, axis.high)
        assert motor.egu == axis.unit
        assert motor.velocity.get() == axis.velocity
        assert motor.precision == 5
        assert axis.low <= motor.position <= axis.high


def test_put_completion_comes_when_the_target_is_reached(stage):
    for target in (1234.5, -50.0, 0.0):
        stage["VAL"] = target
        assert (stage["RBV"], stage["DMOV"], stage["MOVN"]) == (target, 1, 0)


@pytest.mark.parametrize("target", [100.0, 0.001, 0.0])
def test_every_move_toggles_dmov_however_short(stage, target):
    seen: list[int] = []
    settled = threading.Event()

    def follow(value, **_):
        seen.append(value)
        if seen[-2:] == [0, 1]:
            settled.set()

    pv = epics.PV(f"{stage.name}.DMOV", auto_monitor=True, callback=follow)
    assert pv.wait_for_connection(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while not seen and time.monotonic() < deadline:
        time.sleep(0.002)
    stage["VAL"] = target
    assert settled.wait(TIMEOUT_S)
    assert seen == [1, 0, 1]
    pv.clear_callbacks()


def test_the_readback_travels_without_turning_back(slow_stage):
    seen: list[float] = []
    pv = epics.PV(f"{slow_stage.name}.RBV", auto_monitor=True, callback=lambda value, **_: seen.append(value))
    assert pv.wait_for_connection(TIMEOUT_S)
    slow_stage["VAL"] = 4000.0  # two seconds: a busy machine may miss some of them
    slow_stage.until("DMOV", 1)
    deadline = time.monotonic() + TIMEOUT_S
    while 4000.0 not in seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen[-1] == 4000.0
    assert len(seen) > 4
    assert all(a <= b for a, b in pairwise(seen))
    pv.clear_callbacks()


@pytest.mark.parametrize("target", [6000.1, -7000.0, float("nan")])
def test_a_target_beyond_the_limits_is_refused_by_the_record_itself(stage, target):
    stage["VAL"] = target
    assert stage["LVIO"] == 1
    assert (stage["VAL"], stage["RBV"]) == (0.0, 0.0)
    stage["VAL"] = 1.0
    assert (stage["LVIO"], stage["RBV"]) == (0, 1.0)


def test_a_client_may_narrow_the_limits_and_val_carries_them(stage):
    stage["HLM"] = 100.0
    stage["LLM"] = -20.0
    controls = stage.field("VAL").get_ctrlvars()
    assert (controls["lower_ctrl_limit"], controls["upper_ctrl_limit"]) == (-20.0, 100.0)
    assert (stage["DLLM"], stage["DHLM"]) == (-20.0, 100.0)
    stage["VAL"] = 101.0
    assert (stage["LVIO"], stage["RBV"]) == (1, 0.0)


def test_a_refused_target_leaves_the_move_under_way_alone(slow_stage):
    slow_stage.start(300.0)
    slow_stage.field("VAL").put(9000.0, wait=False)
    slow_stage.until("LVIO", 1)
    slow_stage.until("DMOV", 1)
    assert (slow_stage["VAL"], slow_stage["RBV"]) == (300.0, 300.0)


def test_stop_stops_where_it_is(slow_stage):
    slow_stage.start(5000.0)
    slow_stage["STOP"] = 1
    here = slow_stage["RBV"]
    assert 0 < here < 5000
    assert (slow_stage["DMOV"], slow_stage["VAL"]) == (1, here)
    assert slow_stage["RBV"] == here


def test_a_new_target_replaces_the_old_one_and_the_record_stays_busy_between(slow_stage):
    busy: list[int] = []
    slow_stage.start(5000.0)
    pv = epics.PV(
        f"{slow_stage.name}.DMOV", auto_monitor=True, callback=lambda value, **_: busy.append(value)
    )
    assert pv.wait_for_connection(TIMEOUT_S)
    slow_stage["VAL"] = -100.0
    assert slow_stage["RBV"] == -100.0
    deadline = time.monotonic() + TIMEOUT_S
    while busy[-1:] != [1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert busy == [0, 1]
    pv.clear_callbacks()


def test_pause_holds_the_target_and_go_resumes(slow_stage):
    slow_stage.start(600.0)
    slow_stage["SPMG"] = "Pause"
    here = slow_stage["RBV"]
    assert 0 < here < 600
    assert (slow_stage["VAL"], slow_stage["DMOV"]) == (600.0, 1)
    slow_stage["SPMG"] = "Go"
    assert slow_stage["RBV"] == 600.0


def test_set_renames_the_position_and_moves_nothing(stage, beamline):
    stage["SET"] = "Set"
    stage["VAL"] = 250.0
    stage["SET"] = "Use"
    axis = beamline.nanogoniometer.x
    assert (stage["RBV"], stage["DRBV"], stage["OFF"]) == (250.0, 0.0, 250.0)
    assert (stage["LLM"], stage["HLM"]) == (axis.low + 250, axis.high + 250)
    stage["VAL"] = 260.0
    assert (stage["RBV"], stage["DRBV"]) == (260.0, 10.0)


def test_direction_mirrors_the_user_coordinate_and_its_limits(stage):
    stage["VAL"] = 40.0
    stage["DLLM"] = -10.0
    stage["DIR"] = "Neg"
    assert (stage["RBV"], stage["DRBV"]) == (-40.0, 40.0)
    assert (stage["LLM"], stage["HLM"]) == (-6000.0, 10.0)
    stage["VAL"] = 11.0
    assert (stage["LVIO"], stage["DRBV"]) == (1, 40.0)
    stage["VAL"] = 5.0
    assert stage["DRBV"] == -5.0
    stage["HLM"] = 8.0
    assert stage["DLLM"] == -8.0


def test_tweaks_relative_and_dial_moves_and_home(stage):
    stage["TWV"] = 3.0
    stage["TWF"] = 1
    assert (stage["RBV"], stage["TWF"]) == (3.0, 0)
    stage["TWR"] = 1
    stage["RLV"] = 7.5
    assert stage["RBV"] == 7.5
    stage["DVAL"] = -2.0
    assert stage["RBV"] == -2.0
    stage["HOMF"] = 1
    assert (stage["RBV"], stage["ATHM"]) == (0.0, 1)


def test_a_jog_runs_while_it_is_pressed_and_ends_at_the_soft_limit(slow_stage):
    slow_stage["JVEL"] = 10.0
    slow_stage.field("JOGF").put(1, wait=False)
    slow_stage.until("MOVN", 1)
    assert slow_stage["JOGF"] == 1
    slow_stage["JOGF"] = 0
    here = slow_stage["RBV"]
    assert here > 0 and slow_stage["VAL"] == here and slow_stage["JOGF"] == 0
    slow_stage["VELO"] = slow_stage["JVEL"] = 2000.0
    slow_stage["DIR"] = "Neg"
    slow_stage["JOGR"] = 1  # to the low limit of the user, the high one of the dial
    assert (slow_stage["RBV"], slow_stage["DRBV"], slow_stage["LVIO"]) == (-6000.0, 6000.0, 0)


def test_without_soft_limits_the_switches_behind_them_stop_the_motor(stage):
    stage["DLLM"] = 0.0
    stage["DHLM"] = 0.0  # both zero: none, as in EPICS
    stage["VAL"] = 9000.0
    assert 6000 < stage["RBV"] < 6500
    assert (stage["HLS"], stage["LVIO"]) == (1, 0)
    stage["VAL"] = 0.0
    assert (stage["RBV"], stage["HLS"]) == (0.0, 0)


def test_speed_is_reached_in_accl_and_the_units_and_digits_are_the_clients(stage):
    stage["ACCL"] = -1.0
    assert stage["ACCL"] > 0
    stage["EGU"] = "nm"
    stage["PREC"] = 3
    controls = stage.field("VAL").get_ctrlvars()
    assert (controls["units"], controls["precision"]) == ("nm", 3)
    stage["EGU"] = "um"
    stage["PREC"] = 5
    assert stage["RDBD"] > 0
    assert stage.field("UEIP").get(as_string=True) == "Yes"


def test_move_moves_once_and_then_holds(stage):
    stage["SPMG"] = "Pause"
    stage["VAL"] = 12.0
    assert (stage["RBV"], stage["VAL"]) == (0.0, 12.0)
    stage["SPMG"] = "Move"
    stage.until("SPMG", "Pause")
    assert stage["RBV"] == 12.0


def test_a_frozen_offset_is_not_redefined(stage):
    stage["FOFF"] = "Frozen"
    stage["SET"] = "Set"
    stage["VAL"] = 77.0
    stage["DVAL"] = 77.0
    stage["SET"] = "Use"
    stage["FOFF"] = "Variable"
    assert (stage["VAL"], stage["RBV"], stage["OFF"], stage["DRBV"]) == (0.0, 0.0, 0.0, 0.0)


def test_a_velocity_that_cannot_be_is_not_taken(stage, beamline):
    stage["VELO"] = -5.0
    assert stage["VELO"] == beamline.nanogoniometer.x.velocity
    stage["VELO"] = 1e9
    assert stage["VELO"] == beamline.nanogoniometer.x.velocity


def test_two_hundred_moves_in_a_row_all_complete(stage):
    for number in range(200):
        stage["VAL"] = number * 0.25
        assert stage["RBV"] == number * 0.25


# -- the interlock --------------------------------------------------------------------------------
@pytest.fixture
def nano(beamline):
    """z, mchi and mphi with the interlock's message; parked again afterwards."""
    config = beamline.nanogoniometer
    records = {name: Record(beamline.prefix + getattr(config, name).pv) for name in ("z", "mchi", "mphi")}
    message = epics.PV(beamline.prefix + "nano:interlock")
    assert message.wait_for_connection(TIMEOUT_S)
    park = config.positions["park"]
    yield *records.values(), lambda: message.get(as_string=True, use_monitor=False)
    for name in ("mchi", "mphi", "z"):
        if name != "z":
            records["z"]["VAL"] = config.z.high
        records[name]["VAL"] = park[name]


def reach(beamline) -> float:
    """Sine of the largest tilt times the lever of the pivot: how near a tilt brings the modulator, um."""
    import math

    config = beamline.nanogoniometer
    return math.hypot(*config.pivot_um[:2]) * math.sin(math.radians(config.mchi.high))


def test_a_tilt_that_would_bring_the_modulator_near_is_refused_with_a_reason(nano, beamline):
    z, mchi, _, message = nano
    config = beamline.nanogoniometer
    z["VAL"] = max(config.z.low, config.stand_off_um + reach(beamline) / 2)
    mchi["VAL"] = config.mchi.low if config.pivot_um[1] < 0 else config.mchi.high
    assert (mchi["LVIO"], mchi["RBV"]) == (1, 0.0)
    assert message().startswith("mchi to")
    assert "stand-off" in message()
    mchi["VAL"] = config.mchi.high if config.pivot_um[1] < 0 else config.mchi.low  # away from the crystal
    assert mchi["LVIO"] == 0
    assert message() == ""


def test_a_tilted_modulator_may_not_come_near_but_may_always_leave(nano, beamline):
    z, mchi, _, message = nano
    config = beamline.nanogoniometer
    z["VAL"] = config.z.high
    mchi["VAL"] = config.mchi.low if config.pivot_um[1] < 0 else config.mchi.high
    assert mchi["LVIO"] == 0
    near = config.stand_off_um + 0.9 * reach(beamline)
    assert near >= config.z.low
    z["VAL"] = near
    assert (z["LVIO"], z["RBV"]) == (1, config.z.high)
    assert message().startswith("z to")
    z["VAL"] = config.stand_off_um + 1.2 * reach(beamline)
    assert z["LVIO"] == 0
    z["VAL"] = config.z.high
    assert z["LVIO"] == 0


def test_redefining_the_user_position_does_not_fool_the_interlock(nano, beamline):
    z, mchi, *_ = nano
    config = beamline.nanogoniometer
    near = max(config.z.low, config.stand_off_um + reach(beamline) / 2)
    z["VAL"] = near
    z["SET"] = "Set"
    z["VAL"] = config.z.high
    z["SET"] = "Use"
    try:
        mchi["VAL"] = config.mchi.low if config.pivot_um[1] < 0 else config.mchi.high
        assert (mchi["LVIO"], mchi["RBV"]) == (1, 0.0)
    finally:
        z["OFF"] = 0.0
