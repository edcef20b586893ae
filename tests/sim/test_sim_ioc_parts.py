"""Parts of the simulated IOC that need no Channel Access: motion, time, clearance, files."""

from __future__ import annotations

import asyncio
import time

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from bcmi_beamline.config import load_beamline
from bcmi_beamline.geometry import rotation_matrix
from bcmi_beamline.sim.ioc.beamline import NANO_AXES
from bcmi_beamline.sim.ioc.clock import Activity, Clock
from bcmi_beamline.sim.ioc.interlock import Interlock, clearance
from bcmi_beamline.sim.ioc.motion import Motion
from bcmi_beamline.sim.ioc.motor import Motor
from bcmi_beamline.sim.ioc.series import Series, SeriesSettings

finite = st.floats(-1e4, 1e4)


speeds = st.floats(1e-3, 1e3)
ramps = st.sampled_from([0.0, 0.1, 2.0])


@given(start=finite, target=finite, velocity=speeds, ramp=ramps, share=st.floats(-0.5, 1.5))
def test_a_motion_stays_between_its_ends_and_its_speed_below_its_limit(start, target, velocity, ramp, share):
    motion = Motion(start, target, 1.0, velocity, ramp)
    now = motion.began + share * motion.duration
    place = motion.position(now)
    assert min(start, target) <= place <= max(start, target)
    assert motion.position(motion.end) == target
    assert motion.position(motion.began) == pytest.approx(start)
    step = 1e-3 * motion.duration
    assert abs(motion.position(now + step) - place) <= velocity * step * (1 + 1e-6) + 1e-8


@given(start=finite, target=finite, velocity=speeds, ramp=ramps, share=st.floats(0, 1))
@example(start=0.0, target=5e-324, velocity=1.0, ramp=0.0, share=0.0)
def test_the_time_of_a_passage_is_when_the_motion_is_there(start, target, velocity, ramp, share):
    motion = Motion(start, target, 1.0, velocity, ramp)
    place = start + share * (target - start)
    assert motion.position(motion.when(place)) == pytest.approx(place, abs=1e-6 * (1 + abs(target - start)))


def test_a_long_move_takes_its_distance_over_its_velocity_and_a_ramp():
    assert Motion(0.0, -10.0, 0.0, 2.0, 0.5).duration == pytest.approx(5.5)


# -- time -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-4, 0.01])
def test_sleepers_wake_in_order_exactly_on_time_and_none_while_another_works(scale):
    async def run():
        clock, seen = Clock(scale), []

        async def sleeper(name: str, activity: Activity, naps: tuple[float, ...], work_s: float):
            with activity:
                for seconds in naps:
                    await activity.sleep(seconds)
                    woken = clock.now()
                    await asyncio.sleep(work_s)  # many beamline seconds, were time not to stand
                    assert clock.now() == woken
                    seen.append((woken, name))

        a, b = Activity(clock), Activity(clock)
        await asyncio.gather(sleeper("a", a, (1.0, 1.0), 0.01), sleeper("b", b, (0.5, 1.25), 0.0))
        return seen

    assert asyncio.run(run()) == [(0.5, "b"), (1.0, "a"), (1.75, "b"), (2.0, "a")]


def test_what_clients_add_between_activities_takes_no_beamline_time():
    async def run():
        clock = Clock(0.001)
        for _ in range(3):
            with Activity(clock) as activity:
                await activity.sleep(1.0)
            await asyncio.sleep(0.02)  # 20 beamline seconds
        return clock.now()

    assert asyncio.run(run()) == 3.0


def test_a_beamline_left_alone_goes_on_at_the_pace_of_the_wall(monkeypatch):
    monkeypatch.setattr("bcmi_beamline.sim.ioc.clock.IDLE_S", 0.0)
    clock, began = Clock(1e-6), time.monotonic()
    time.sleep(0.02)
    assert 0.02 <= clock.now() <= time.monotonic() - began + 1e-3


def test_a_sleeper_roused_or_cancelled_is_awake_early_and_time_goes_on_for_others():
    async def run():
        clock, woken = Clock(0.01), []

        async def sleep(activity: Activity, seconds: float):
            with activity:
                await activity.sleep(seconds)
                woken.append(clock.now())

        activities = [Activity(clock) for _ in range(3)]
        roused, cancelled, other = map(asyncio.create_task, map(sleep, activities, (1e6, 1e6, 2.0)))
        await asyncio.sleep(0)
        activities[0].rouse()
        cancelled.cancel()
        await asyncio.gather(roused, cancelled, other, return_exceptions=True)
        return cancelled.cancelled(), woken

    was_cancelled, (early, late) = asyncio.run(run())
    assert was_cancelled and early < 2.0 and late == 2.0


def test_the_pace_may_change_in_the_middle_of_a_sleep():
    async def run():
        clock = Clock(1e3)

        async def sleep():
            with Activity(clock) as activity:
                await activity.sleep(10.0)  # would take hours

        task = asyncio.create_task(sleep())
        await asyncio.sleep(0.01)
        assert clock.now() < 1.0
        clock.scale = 1e-4
        await asyncio.wait_for(task, 10.0)
        return clock.now()

    assert asyncio.run(run()) == 10.0


def test_commands_sent_one_by_one_begin_together_and_the_wait_for_them_costs_nothing(monkeypatch):
    monkeypatch.setattr("bcmi_beamline.sim.ioc.clock.TOGETHER_S", 0.05)

    async def sleep(activity: Activity) -> None:
        with activity:
            await activity.sleep(0.3)

    async def run() -> tuple[float, float, float, float]:
        clock, wall = Clock(1.0), time.monotonic()
        first = asyncio.create_task(sleep(Activity(clock, together=True)))
        await asyncio.sleep(0.01)
        began = clock.now()
        second = asyncio.create_task(sleep(Activity(clock, together=True)))
        await asyncio.sleep(0.01)
        held = clock.now()
        clock.release()  # somebody wants to know where things are
        released = clock.now()
        await asyncio.gather(first, second)
        assert clock.now() == 0.3  # for both
        return began, held, released, time.monotonic() - wall

    began, held, released, took = asyncio.run(run())
    assert began == held == 0.0
    assert 0.01 <= released < 0.3
    assert 0.31 <= took < 0.35


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_time_does_not_stand_still_or_run_back(scale):
    with pytest.raises(ValueError, match="positive"):
        Clock(1.0).scale = scale


@given(
    z=st.floats(500, 5000),
    mchi=st.floats(-8, 8),
    mphi=st.floats(-8, 8),
    spot=st.tuples(st.floats(-5e3, 5e3), st.floats(-5e3, 5e3)),
    x=st.floats(-6e3, 6e3),
    y=st.floats(-6e3, 6e3),
)
def test_no_point_of_the_membrane_is_nearer_than_the_clearance(z, mchi, mphi, spot, x, y):
    config = load_beamline().nanogoniometer
    config = config.model_copy(update={"pivot_um": (300.0, -5000.0, 900.0), "distance_at_z0_um": 120.0})
    turn = rotation_matrix("y", np.deg2rad(mphi)) @ rotation_matrix("x", np.deg2rad(mchi))
    pivot = np.array(config.pivot_um)
    crystal = np.array([0, 0, -config.distance_at_z0_um])
    point = turn @ (np.array([spot[0] + x, spot[1] + y, z]) - pivot) + pivot
    least = clearance(config, z, np.array(mchi), np.array(mphi))
    assert np.linalg.norm(point - crystal) >= abs(least) * (1 - 1e-9)
    foot = crystal + turn[:, 2] * least  # where the plane of the membrane is nearest
    assert (turn.T @ (foot - pivot) + pivot)[2] == pytest.approx(z, abs=1e-6)


MOVES = {
    "z": st.floats(700, 12000), "mchi": st.floats(-8, 8), "mphi": st.floats(-8, 8)
}  # fmt: skip


FIELDS = [
    *("", "", "", "DVAL", "RLV", "TWF", "JOGF", "JOGR", "STOP"),
    *("HOMF", "OFF", "DIR", "SET", "DLLM", "DHLM", "SPMG", "VELO"),
]


@st.composite
def puts(draw) -> tuple[str, str, object]:
    """What a client may write to one of the axes that come near the crystal."""
    axis = draw(st.sampled_from(sorted(MOVES)))
    field = draw(st.sampled_from(FIELDS))
    if field in ("", "DVAL", "OFF", "DLLM", "DHLM"):
        return axis, field, draw(MOVES[axis])
    words = {"DIR": ["Pos", "Neg"], "SET": ["Use", "Set"], "SPMG": ["Go", "Pause", "Stop"]}
    if field in words:
        return axis, field, draw(st.sampled_from(words[field]))
    if field in ("RLV", "VELO"):
        return axis, field, draw(st.floats(-3000, 3000))
    return axis, field, draw(st.sampled_from([0, 1]))


@settings_of_hypothesis(max_examples=25, deadline=None)
@given(sequence=st.lists(st.tuples(puts(), st.integers(0, 6)), min_size=5, max_size=25))
@example(sequence=[(("z", "VELO", 2e-311), 0), (("z", "", 6000.0), 5)])  # a way without an end
@example(sequence=[(("z", "VELO", 1e-3), 5), (("z", "", 6000.0), 0)])  # that begins after all was stopped
def test_whatever_is_put_the_modulator_stays_out_of_reach(sequence):
    """Moves overlap, are overtaken, tweaked, jogged and renamed; the stage itself is looked at."""
    config = load_beamline().nanogoniometer

    async def run() -> float:
        clock = Clock(1e-3)
        park = config.positions["park"]
        motors = {name: Motor(name, getattr(config, name), clock, park[name]) for name in NANO_AXES}
        for motor in motors.values():
            await motor.initialise()
        Interlock("", config, motors)
        nearest, tasks = np.inf, []

        def look() -> None:
            nonlocal nearest
            here = {name: motors[name].dial for name in MOVES}
            gap = clearance(config, here["z"], np.array(here["mchi"]), np.array(here["mphi"]))
            nearest = min(nearest, float(gap))

        for (axis, field, value), ticks in sequence:
            record = motors[axis].setpoint
            pv = record.get_field(field) if field else record
            tasks.append(asyncio.create_task(pv.write(value)))
            for _ in range(ticks):
                await asyncio.sleep(0.0005)
                look()
        left = set(tasks)
        while left:  # a put that has not begun yet is not stopped
            for motor in motors.values():
                await motor.stop()
            look()
            _, left = await asyncio.wait(left, timeout=0.01)
        await asyncio.gather(*tasks)
        return nearest

    assert asyncio.run(run()) >= config.stand_off_um - 1e-6


# -- files ----------------------------------------------------------------------------------------
ROWS, COLUMNS = 40, 30


def settings(**changes) -> SeriesSettings:
    values = {
        "images": 1,
        "triggers": 10,
        "images_per_file": 4,
        "exposure_s": 0.5,
        "period_s": 0.6,
        "wavelength": 1.378e-10,
        "photon_energy_ev": 9000.0,
        "threshold_energy_ev": 4500.0,
        "distance": 5.35,
        "beam_center": (640.0, 1340.0),
        "pixel_size": 75e-6,
        "bit_depth": 32,
        "count_cutoff": 1_250_000,
        "compression": "BS LZ4",
    }
    return SeriesSettings(**(values | changes))


MASK = np.eye(ROWS, COLUMNS, dtype=np.uint32)


def frame(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, (ROWS, COLUMNS)).astype(np.uint32)


@pytest.mark.parametrize("compression", ["BS LZ4", "LZ4", "none"])
def test_frames_come_back_through_the_master_file_by_file(tmp_path, compression):
    series = Series(tmp_path / "s", settings(compression=compression), MASK)
    for number in range(10):
        series.write(frame(number))
        assert series.current_file == tmp_path / f"s_data_{number // 4 + 1:06d}.h5"
    series.close()
    assert series.frames == 10
    with h5py.File(tmp_path / "s_master.h5") as master:
        data = master["entry/data"]
        assert [data[name].shape[0] for name in sorted(data)] == [4, 4, 2]
        stack = np.concatenate([data[name][()] for name in sorted(data)])
        dataset = data["data_000001"]
        assert dataset.chunks == (1, ROWS, COLUMNS)
        assert dataset.dtype == np.uint32
    np.testing.assert_array_equal(stack, [frame(n) for n in range(10)])


def test_the_master_describes_the_measurement_from_the_moment_of_arming(tmp_path):
    Series(tmp_path / "s", settings(), MASK)
    with h5py.File(tmp_path / "s_master.h5") as master:
        detector = master["entry/instrument/detector"]
        assert detector["x_pixel_size"][()] == 75e-6
        assert detector["x_pixel_size"].attrs["units"] == "m"
        assert detector["detector_distance"][()] == 5.35
        assert (detector["beam_center_x"][()], detector["beam_center_y"][()]) == (640.0, 1340.0)
        assert (detector["count_time"][()], detector["frame_time"][()]) == (0.5, 0.6)
        assert detector["bit_depth_image"][()] == 32
        specific = detector["detectorSpecific"]
        assert specific["countrate_correction_count_cutoff"][()] == 1_250_000
        assert (specific["nimages"][()], specific["ntrigger"][()]) == (1, 10)
        np.testing.assert_array_equal(specific["pixel_mask"][()], np.eye(ROWS, COLUMNS))
        assert master["entry/instrument/beam/incident_wavelength"][()] == pytest.approx(1.378)
        assert sorted(master["entry/data"]) == [f"data_{n:06d}" for n in (1, 2, 3)]


def test_a_series_that_ends_early_links_only_what_there_is(tmp_path):
    series = Series(tmp_path / "s", settings(), MASK)
    series.write(frame(0))
    series.close()
    with h5py.File(tmp_path / "s_master.h5") as master:
        assert list(master["entry/data"]) == ["data_000001"]
        assert master["entry/data/data_000001"].shape == (1, ROWS, COLUMNS)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("bit_depth", [8, 16, 32])
def test_files_are_as_deep_as_the_detector_counts(tmp_path, bit_depth):
    series = Series(tmp_path / "s", settings(bit_depth=bit_depth), MASK)
    series.write(frame(0))
    series.close()
    with h5py.File(tmp_path / "s_data_000001.h5") as file:
        assert file["entry/data/data"].dtype == f"u{bit_depth // 8}"


def test_a_folder_that_is_not_there_is_named_with_the_mend(tmp_path):
    with pytest.raises(OSError, match="missing is no folder: make it"):
        Series(tmp_path / "missing" / "s", settings(), MASK)


def test_a_series_never_overwrites_another(tmp_path):
    Series(tmp_path / "s", settings(), MASK).close()
    with pytest.raises(OSError, match=r"exists: change FWNamePattern, or let it contain \$id"):
        Series(tmp_path / "s", settings(), MASK)
