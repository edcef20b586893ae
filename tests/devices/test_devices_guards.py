"""What the devices refuse, without a control system: fake signals behind the real classes."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ophyd.sim import FakeEpicsSignal, fake_device_cache, make_fake_device
from ophyd.utils import LimitError

from bcmi_beamline.config import Beamline, load_beamline
from bcmi_beamline.devices import (
    CompensatedRock,
    Diffractometer,
    Nanogoniometer,
    SampleStage,
    nominal_setting,
    pose_math,
)
from bcmi_beamline.devices.guards import CIRCLES
from bcmi_beamline.devices.motor import Motor, Setpoint

SHIPPED = load_beamline("sim-id01")
NANOGONIOMETER = SHIPPED.nanogoniometer.model_copy(
    update={
        "stand_off_um": 800.0,
        "pivot_um": (0.0, -5000.0, 0.0),
        "z": SHIPPED.nanogoniometer.z.model_copy(update={"low": 1000.0}),
    }
)
BEAMLINE = SHIPPED.model_copy(update={"nanogoniometer": NANOGONIOMETER})
VERTICAL = load_beamline("sim-id01-vertical").model_copy(update={"nanogoniometer": NANOGONIOMETER})


class FakeSetpoint(FakeEpicsSignal):
    _read_pv = SimpleNamespace(get_ctrlvars=dict)

    def _metadata_changed(self, *args, **kwargs):
        """What ophyd calls when a record's limits change."""

    def check_value(self, value):
        Setpoint.check_value(self, value)


fake_device_cache[Setpoint] = FakeSetpoint


def put_at(motor: Motor, value: float, setpoint: float | None = None) -> None:
    motor.user_readback.sim_put(value)
    motor.user_setpoint.sim_put(value if setpoint is None else setpoint)


def wake(motor: Motor) -> None:
    """Fill in what a record would say."""
    motor.velocity.sim_put(motor.axis.velocity)
    motor.acceleration.sim_put(0.0)
    motor.low_limit_travel.sim_put(motor.axis.low)
    motor.high_limit_travel.sim_put(motor.axis.high)
    motor.motor_done_move.sim_put(1)
    put_at(motor, 0.0)


def pair(beamline: Beamline):
    nano = make_fake_device(Nanogoniometer)("", name="nanogoniometer", config=beamline.nanogoniometer)
    huber = make_fake_device(Diffractometer)(
        "", name="diffractometer", beamline=beamline, nanogoniometer=nano
    )
    nano.diffractometer = huber
    for device in (nano, huber):
        for axis in (*pose_math.AXES, *CIRCLES):
            if axis in device.component_names:
                wake(getattr(device, axis))
    for circle, value in huber.nominal_deg.items():
        put_at(getattr(huber, circle), value)
    place(nano, **nano.place("park"))
    return nano, huber


def place(nano, **axes):
    for axis, value in axes.items():
        put_at(getattr(nano, axis), value)


@pytest.fixture
def devices():
    return pair(BEAMLINE)


# -- limits -------------------------------------------------------------------------------------------
def test_limits_are_the_tighter_of_configuration_and_record(devices):
    x = devices[0].x
    x.low_limit_travel.sim_put(-100.0)
    x.high_limit_travel.sim_put(1e6)
    assert x.limits == (-100.0, 6000.0)
    with pytest.raises(LimitError, match=r"nanogoniometer_x: -101 um lies outside \[-100, 6000\]"):
        x.set(-101.0)
    with pytest.raises(LimitError, match="cannot move to nan"):
        x.set(math.nan)
    x.low_limit_travel.sim_put(0.0)
    x.high_limit_travel.sim_put(0.0)  # a record without limits
    assert x.limits == (-6000.0, 6000.0)


def test_writing_to_the_setpoint_gets_round_nothing(devices):
    with pytest.raises(LimitError, match="outside"):
        devices[0].x.user_setpoint.put(7000.0)


def test_timeout_follows_distance_and_speed(devices):
    z = devices[0].z
    z.velocity.sim_put(10.0)
    assert z.move_timeout(z.position - 1000.0) == pytest.approx(10.0 + 3 * 100.0)
    z.velocity.sim_put(0.0)  # a record that does not say: the configuration's
    assert z.move_timeout(z.position - 2000.0) == pytest.approx(10.0 + 3 * 1.0)


# -- the crystal --------------------------------------------------------------------------------------
def test_a_tilt_that_would_swing_the_modulator_into_the_crystal_says_what_to_do(devices):
    nano, _ = devices
    place(nano, x=0.0, y=0.0, z=1350.0, mchi=0.0)
    with pytest.raises(
        LimitError, match=r"mchi: -8 deg could bring .* move z to at least (\d+\.\d) um first"
    ) as no:
        nano.mchi.set(-8.0)
    needed = float(str(no.value).split("at least ")[1].split()[0])
    place(nano, z=needed + 0.2)
    nano.mchi.check_value(-8.0)


def test_setpoints_count_like_readbacks(devices):
    nano, _ = devices
    place(nano, x=0.0, y=0.0, z=1100.0)
    nano.mchi.check_value(-3.0)
    nano.mchi.user_setpoint.sim_put(-3.0)  # on its way
    with pytest.raises(LimitError, match="z must stay at or above"):
        nano.z.check_value(1000.0)
    place(nano, mchi=0.0)
    nano.z.check_value(1000.0)
    nano.z.user_setpoint.sim_put(1000.0)
    with pytest.raises(LimitError, match="move z"):
        nano.mchi.check_value(-3.0)


def test_inside_the_stand_off_only_the_way_out_is_open(devices):
    nano, _ = devices
    place(nano, x=0.0, y=0.0, z=1000.0, mchi=-4.0)
    assert nano.distance_um() < nano.config.stand_off_um
    nano.z.check_value(1500.0)
    nano.mchi.check_value(0.0)
    with pytest.raises(LimitError):
        nano.mchi.check_value(-4.1)


axis_values = {
    axis: st.floats(getattr(BEAMLINE.nanogoniometer, axis).low, getattr(BEAMLINE.nanogoniometer, axis).high)
    for axis in pose_math.AXES
}
NANO = pair(BEAMLINE)[0]


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries(axis_values), st.lists(st.sampled_from(pose_math.AXES).flatmap(
    lambda axis: st.tuples(st.just(axis), axis_values[axis], st.booleans())), max_size=8))  # fmt: skip
def test_no_sequence_of_moves_comes_inside_the_stand_off(start, moves):
    """Moves that arrive, and moves still under way while the next is asked for."""
    nano = NANO
    model = (nano.config.pivot_um, nano.config.distance_at_z0_um)
    place(nano, **start)
    z, chi, phi = start["z"], start["mchi"], start["mphi"]
    least = min(nano.config.stand_off_um, float(pose_math.clearance(z, chi, phi, *model)))
    for axis, target, arrives in moves:
        try:
            getattr(nano, axis).check_value(target)
        except LimitError:
            continue
        motor = getattr(nano, axis)
        put_at(motor, target if arrives else motor.position, target)
        now = nano.where()
        assert pose_math.clearance(now["z"], now["mchi"], now["mphi"], *model) >= least - 1e-3


# -- the circles --------------------------------------------------------------------------------------
def test_bragg_setting_of_either_arm():
    horizontal = nominal_setting(BEAMLINE)
    assert horizontal == pytest.approx({"mu": 0, "eta": 0, "phi": 17.7, "nu": 35.404, "delta": 0}, abs=1e-3)
    inboard = nominal_setting(BEAMLINE.model_copy(update={"arm_sign": -1}))
    assert inboard["nu"] == pytest.approx(-35.404, abs=1e-3)
    vertical = nominal_setting(BEAMLINE.model_copy(update={"arm": "vertical", "rocking_circle": "eta"}))
    assert vertical == pytest.approx({"mu": 0, "eta": 17.7, "phi": 0, "nu": 0, "delta": 35.404}, abs=1e-3)


def test_circles_are_free_with_the_modulator_out_and_in_a_cone_with_it_in(devices):
    nano, huber = devices
    huber.phi.check_value(90.0)
    place(nano, **nano.place("in"))
    huber.rock.check_value(17.7 + 1.9)
    with pytest.raises(LimitError, match=r"phi: 20 deg lies outside \[15.7, 19.7\].*take the modulator out"):
        huber.phi.check_value(20.0)
    with pytest.raises(LimitError, match="modulator in"):
        huber.nu.check_value(0.0)


def test_a_modulator_on_its_way_out_is_still_in(devices):
    nano, huber = devices
    place(nano, **nano.place("in"))
    for axis, value in nano.place("out").items():
        getattr(nano, axis).user_setpoint.sim_put(value)
    assert not nano.is_out()
    with pytest.raises(LimitError, match="modulator in"):
        huber.phi.check_value(90.0)


def vertical_pair():
    nano, huber = pair(VERTICAL)
    place(nano, **nano.place("in"))
    return nano, huber


def test_rocking_a_circle_that_carries_the_modulator_is_refused_with_the_reason():
    nano, huber = vertical_pair()
    huber.rock.check_value(17.7)
    with pytest.raises(LimitError, match=r"eta carries the modulator; rocking it by 0.5 deg .* 11.78 um"):
        huber.rock.check_value(18.2)
    place(nano, **nano.place("out"))
    huber.rock.check_value(17.8)


def test_compensated_it_rocks_within_the_cone_and_no_further():
    nano, huber = vertical_pair()
    rock = CompensatedRock("rock", huber)
    rock.set(18.2)
    assert huber.eta.user_setpoint.get() == 18.2
    assert nano.mchi.user_setpoint.get() == pytest.approx(0.5, abs=1e-9)
    assert nano.y.user_setpoint.get() != 0
    sent = {axis: getattr(nano, axis).user_setpoint.get() for axis in pose_math.AXES}
    with pytest.raises(LimitError, match=r"eta: 20 deg lies outside \[15.7, 19.7\]"):
        rock.set(20.0)
    assert {axis: getattr(nano, axis).user_setpoint.get() for axis in pose_math.AXES} == sent
    with pytest.raises(LimitError, match="eta carries the modulator"):
        huber.rock.check_value(17.9)  # whoever does not move the modulator is still refused
    place(nano, **sent)
    put_at(huber.eta, 18.2)
    rock.set(17.7)
    back = {axis: getattr(nano, axis).user_setpoint.get() for axis in pose_math.AXES}
    assert back == pytest.approx({**dict.fromkeys(pose_math.AXES, 0.0), **nano.place("in")}, abs=1e-6)


# -- the sample -----------------------------------------------------------------------------------------
def stage_of(nano):
    stage = make_fake_device(SampleStage)(
        "", name="sample_stage", config=BEAMLINE.sample_stage, nanogoniometer=nano
    )
    for axis in ("x", "y", "z"):
        wake(getattr(stage, axis))
    return stage


def test_another_crystal_needs_the_modulator_out(devices):
    nano, _ = devices
    stage = stage_of(nano)
    stage.x.check_value(40.0)
    put_at(stage.x, 30.0)
    place(nano, **nano.place("in"))
    stage.x.check_value(38.0)
    with pytest.raises(LimitError, match=r"x: 41 um is 11 um from where the sample was.*take the modulator"):
        stage.x.check_value(41.0)
    put_at(stage.x, 38.0)
    with pytest.raises(LimitError, match="11 um from"):  # small steps do not add up
        stage.x.check_value(41.0)
    place(nano, **nano.place("out"))
    stage.x.check_value(-40.0)


# -- any sequence of moves --------------------------------------------------------------------------------
MOVES = st.one_of(
    *(st.tuples(st.just("nano"), st.just(axis), axis_values[axis], st.booleans()) for axis in pose_math.AXES),
    *(
        st.tuples(st.just("huber"), st.just(circle), st.floats(-5.0, 40.0), st.booleans())
        for circle in CIRCLES
    ),
    *(st.tuples(st.just("stage"), st.just(axis), st.floats(-50, 50), st.booleans()) for axis in "xyz"),
    st.tuples(st.just("place"), st.sampled_from(["in", "out", "park"]), st.just(0.0), st.booleans()),
    st.tuples(st.just("rock"), st.just("eta"), st.floats(10.0, 25.0), st.just(True)),
)
HORIZONTAL_ALL, VERTICAL_ALL = pair(BEAMLINE), pair(VERTICAL)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.booleans(), st.lists(MOVES, max_size=12))
def test_no_sequence_of_moves_reaches_a_forbidden_pose(vertical, moves):
    """Whatever is asked, moves arrive or are still on their way when the next is asked for."""
    nano, huber = VERTICAL_ALL if vertical else HORIZONTAL_ALL
    place(nano, **dict.fromkeys(pose_math.AXES, 0.0) | nano.place("park"))
    for circle, value in huber.nominal_deg.items():
        put_at(getattr(huber, circle), value)
    stage, rock = stage_of(nano), CompensatedRock("rock", huber)
    model = (nano.config.pivot_um, nano.config.distance_at_z0_um)
    home = None
    for device, axis, target, arrives in moves:
        steps = [(device, axis, target)]
        if device == "place":
            steps = [("nano", name, value) for name, value in nano.place(axis).items()]
        for owner, name, value in steps:
            motor = (
                None
                if owner == "rock"
                else getattr({"nano": nano, "huber": huber, "stage": stage}[owner], name)
            )
            try:
                if motor is None:
                    if not vertical:
                        continue
                    rock.set(value)
                    sent = [huber.eta, *(getattr(nano, a) for a in pose_math.AXES)]
                    for moved in sent:
                        put_at(moved, moved.user_setpoint.get())
                else:
                    motor.check_value(value)
                    put_at(motor, value if arrives else motor.position, value)
            except LimitError:
                continue
            now = nano.where()
            gap = pose_math.clearance(now["z"], now["mchi"], now["mphi"], *model)
            assert gap >= nano.config.stand_off_um - 1e-3, "too near to the crystal"
            out = nano.is_out()
            if not out:
                assert huber.strays() == [], "the modulator is in and a circle is outside its cone"
                places = {a: getattr(stage, a).position for a in "xyz"}
                home = places if home is None else home
                reach = stage.config.modulator_reach_um
                assert max(abs(places[a] - home[a]) for a in "xyz") <= 2 * reach
            else:
                home = None


def test_the_modulator_stays_out_while_the_circles_are_away(devices):
    nano, huber = devices
    put_at(huber.phi, 90.0)
    with pytest.raises(LimitError, match=r"stays out while phi is not within 2 deg of 17\.700"):
        nano.x.check_value(0.0)
    nano.z.check_value(nano.z.position)
    put_at(huber.phi, 17.7)
    nano.x.check_value(0.0)


# -- in, out, and between -----------------------------------------------------------------------------
def test_in_out_and_between(devices):
    nano, _ = devices
    assert nano.is_out() and not nano.is_in()
    place(nano, **nano.place("out"))
    assert nano.is_out()
    place(nano, **nano.place("in"))
    assert nano.is_in() and not nano.is_out()
    place(nano, x=3000.0, y=0.0, z=5000.0)
    assert not nano.is_in() and not nano.is_out()


def test_retraction_moves_z_first_and_insertion_last(devices):
    nano, _ = devices
    steps = nano.move_order("in")
    assert [nano.z in step for step in steps] == [False, True]
    place(nano, **nano.place("in"))
    steps = nano.move_order("park")
    assert steps[0] == [nano.z, 12000.0]
    assert {motor.attr_name for motor in steps[1][::2]} == {"x", "y", "mchi", "mphi"}
    assert nano.move_order({"mphi": 1.0}) == [[nano.mphi, 1.0]]


def test_distance_is_along_the_beam(devices):
    nano, _ = devices
    place(nano, x=100.0, y=0.0, z=1350.0, mchi=0.0, mphi=0.0)
    assert nano.distance_um() == pytest.approx(1350.0)
    x, y, z = nano.pivot_compensation(4.0, -3.0, 100.0, 0.0, 1350.0)
    place(nano, x=x, y=y, z=z, mchi=4.0, mphi=-3.0)
    assert nano.distance_um() == pytest.approx(1350.0)
