"""The simulated beamline without Channel Access, so that nothing but its own time counts."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import h5py
import hdf5plugin  # noqa: F401
import numpy as np

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.sim.ioc.beamline import SimulatedBeamlineIOC
from bcmi_beamline.sim.ioc.camera import Camera
from bcmi_beamline.sim.ioc.status import describe

BEAMLINE = load_beamline()
CAM = "eiger:cam1:"


class Room:
    """A running beamline whose process variables are written as a client would."""

    def __init__(self, ioc: SimulatedBeamlineIOC) -> None:
        self.ioc = ioc

    def pv(self, name: str):
        record, _, field = name.partition(".")
        pv = self.ioc.pvdb[BEAMLINE.prefix + record]
        return pv.get_field(field) if field else pv

    async def put(self, **values) -> None:
        for name, value in values.items():
            await self.pv(CAM + name).write(value)

    async def arm(self) -> asyncio.Task[None]:
        """Arm; the task ends with the series."""
        series = asyncio.create_task(self.pv(f"{CAM}Acquire").write("Acquire"))
        while self.pv(f"{CAM}Armed").value != "Armed":
            await asyncio.sleep(0.001)
        return series


@asynccontextmanager
async def room(folder, scale: float, **nuisances):
    preset = load_preset("small")
    quiet = dict.fromkeys(("flux_noise", "position_error_nm", "angle_jitter_deg"), 0.0)
    wrong = preset.sim.nuisances.model_copy(update=quiet | nuisances)
    sim = preset.sim.model_copy(update={"nuisances": wrong})
    ioc = SimulatedBeamlineIOC(
        BEAMLINE, Camera(BEAMLINE, preset.model_copy(update={"sim": sim})), folder, scale
    )
    await ioc.initialise()
    try:
        running = Room(ioc)
        await running.pv("shutter:open").write("Open")
        yield running
    finally:
        await ioc.close()


def frames_of(folder, series: int = 1) -> np.ndarray:
    with h5py.File(folder / f"series_{series}_master.h5") as master:
        data = master["entry/data"]
        return np.concatenate([data[name][()] for name in sorted(data)])


async def rock(folder, scale: float, dawdle_s: float) -> tuple[np.ndarray, float]:
    """Frames of a short rocking scan on a beamline that drifts, and how long it took."""
    drifting = {"drift_nm_per_sqrt_s": 5.0, "drift_nm_per_s": (20.0, 0.0, 0.0), "flux_noise": 0.05}
    async with room(folder, scale, **drifting, angle_jitter_deg=0.002) as running:
        await running.put(ManualTrigger="Enable", NumTriggers=5, AcquireTime=1.0)
        series = await running.arm()
        for step in range(5):
            await running.pv("huber:phi").write(17.7 + 0.01 * step)
            await asyncio.sleep(dawdle_s)  # what a client and its network add
            await running.put(Trigger=1)
        await series
        return frames_of(folder), running.ioc.clock.now()


def test_the_same_seed_gives_the_same_frames_however_fast_time_is_simulated(tmp_path):
    outcomes = []
    for number, (scale, dawdle_s) in enumerate([(1e-4, 0.02), (0.05, 0.0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.append(asyncio.run(rock(folder, scale, dawdle_s)))
    (fast, fast_s), (slow, slow_s) = outcomes
    np.testing.assert_array_equal(fast, slow)
    assert fast_s == slow_s > 5.0
    assert not np.array_equal(fast[0], fast[1])


async def step(running: Room, positions: list[float]) -> None:
    await running.put(TriggerMode="Internal Series", ManualTrigger="Enable", NumTriggers=len(positions))
    series = await running.arm()
    for position in positions:
        await running.pv("huber:phi").write(position)
        await running.put(Trigger=1)
    await series


async def fly(running: Room, velocity: float) -> int:
    """Let phi trigger the detector on its way, every 0.01 deg from 17.69 on; returns the pulses missed."""
    await running.pv("huber:phi").write(17.6)
    source = {"Motor": "huber:phi", "Start": 17.69, "Step": 0.01, "Count": 8, "Arm": 1}
    for name, value in source.items():
        await running.pv(f"Sim:ExternalTrigger:{name}").write(value)
    await running.put(TriggerMode="External Series", NumTriggers=8)
    series = await running.arm()
    await running.pv("huber:phi.VELO").write(velocity)
    await running.pv("huber:phi").write(17.9)
    await running.pv("huber:phi.VELO").write(5.0)
    assert running.pv("Sim:ExternalTrigger:Pulses").value == 8
    assert running.pv("Sim:ExternalTrigger:Arm").value == 0
    await running.put(Acquire="Done")
    await series
    return running.pv("Sim:ExternalTrigger:Missed").value


def test_a_scan_on_the_fly_sees_what_steps_to_the_middle_of_each_exposure_see(tmp_path):
    async def run() -> list[int]:
        async with room(tmp_path, 0.001) as running:
            await running.put(AcquireTime=0.19)
            await step(running, [17.69 + 0.01 * i + 0.02 * 0.095 for i in range(8)])
            # the last: a pulse every 0.1 s is too much for exposures of 0.19 s
            return [await fly(running, 0.02), await fly(running, 0.1)]

    assert asyncio.run(run()) == [0, 4]
    gaps = BEAMLINE.eiger.gap_mask()
    stepped, flown, halved = (np.where(gaps, 0, frames_of(tmp_path, n)).sum(axis=(1, 2)) for n in (1, 2, 3))
    assert stepped.shape == flown.shape == (8,) and halved.shape == (4,)
    assert np.ptp(stepped) > 0.2 * stepped.max()  # a rocking curve
    np.testing.assert_allclose(flown, stepped, rtol=0.02)


def test_the_status_line_tells_time_frames_pose_and_faults(tmp_path):
    async def run() -> str:
        async with room(tmp_path, 0.001) as running:
            for wrong in (0.0, -1.0, float("nan")):
                await running.pv("Sim:TimeScale").write(wrong)  # not taken
            await running.pv("Sim:huber:eta:Stall").write("On")
            await running.pv("Sim:Disk:Full").write("On")
            return describe(running.ioc, 12.34).plain

    line = asyncio.run(run())
    assert "\n" not in line
    for words in ("0 frames, 12.3/s", "x0.001", "eiger idle", "shutter open", "phi 17.7", "z 12000"):
        assert words in line
    assert line.endswith("disk full, ID01:huber:eta stalled")
