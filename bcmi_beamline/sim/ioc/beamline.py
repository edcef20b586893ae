"""The process variables of one beamline, assembled around the process that makes the frames."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from caproto import ChannelData
from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyEnum

from bcmi_beamline.config import AxisConfig, Beamline
from bcmi_beamline.sim.ioc.camera import Camera, CameraLost
from bcmi_beamline.sim.ioc.clock import Clock
from bcmi_beamline.sim.ioc.eiger import Eiger
from bcmi_beamline.sim.ioc.faults import BeamlineFaults, Faults, MotorFaults
from bcmi_beamline.sim.ioc.interlock import Interlock
from bcmi_beamline.sim.ioc.motor import Motor
from bcmi_beamline.sim.ioc.trigger import TriggerSource

CIRCLES = ("mu", "eta", "phi", "nu", "delta")
NANO_AXES = ("x", "y", "z", "mchi", "mphi")
SLITS = ("horizontal", "vertical", "horizontal_centre", "vertical_centre")

PUBLISH_S = 1.0
"""Wall-clock seconds between two updates of readings, for those who monitor them."""


def axes(beamline: Beamline) -> dict[str, AxisConfig]:
    """Axes of the beamline by their key in a pose."""
    found = {name: getattr(beamline.diffractometer, name) for name in CIRCLES}
    found |= {name: getattr(beamline.nanogoniometer, name) for name in NANO_AXES}
    found |= {f"sample_{name}": getattr(beamline.sample_stage, name) for name in "xyz"}
    if beamline.slits:
        found |= {f"slits_{name}": getattr(beamline.slits, name) for name in SLITS}
    if beamline.monochromator:
        found["energy"] = beamline.monochromator.energy
    if beamline.focus:
        found["focus"] = beamline.focus.z
    return found


class Beam(PVGroup):
    """Shutter, flux monitor, ring current and the beamline's time."""

    shutter = pvproperty(
        value="Closed", enum_strings=["Closed", "Open"], dtype=PvpropertyEnum, name="{shutter}"
    )
    monitor = pvproperty(value=0.0, name="{monitor}", read_only=True, units="ph/s", precision=0)
    ring_current = pvproperty(value=0.0, name="{ring_current}", read_only=True, units="mA", precision=3)
    time_scale = pvproperty(value=1.0, name="Sim:TimeScale", precision=4)
    time = pvproperty(value=0.0, name="Sim:Time", read_only=True, units="s", precision=3)

    def __init__(self, beamline: Beamline, clock: Clock, camera: Camera, faults: Faults, pose: Any) -> None:
        names = {
            "shutter": beamline.shutter_pv,
            "monitor": beamline.monitor_pv,
            "ring_current": beamline.ring_current_pv,
        }
        super().__init__(beamline.prefix, macros=names)
        self._clock, self._camera, self._faults, self._pose = clock, camera, faults, pose
        self.monitor.getter = self._flux
        self.ring_current.getter = self._current
        self.time.getter = self._now
        shutter: Any = self.shutter
        shutter.putter = self._move_shutter
        self.time_scale.putter = self._set_time_scale

    async def initialise(self) -> None:
        """Publish what the configuration says."""
        await self.time_scale.write(self._clock.scale, verify_value=False)
        await self.publish()

    async def publish(self) -> None:
        """Bring the readings up to date for those who monitor them."""
        for pv, getter in (
            (self.monitor, self._flux),
            (self.ring_current, self._current),
            (self.time, self._now),
        ):
            await pv.write(await getter(pv), verify_value=False)

    async def _flux(self, pv: Any) -> float:
        return await self._read(pv, "flux", self._pose())

    async def _current(self, pv: Any) -> float:
        return 0.0 if self._faults.beam_dumped else await self._read(pv, "ring_current")

    async def _read(self, pv: Any, name: str, *arguments: Any) -> float:
        """What the twin says now; while it is being started again, what it said last."""
        try:
            return await self._camera.ask(name, self._clock.now(), *arguments)
        except CameraLost:
            return pv.value

    async def _now(self, pv: Any) -> float:
        return self._clock.now()

    async def _move_shutter(self, pv: Any, state: str) -> str:
        return pv.value if self._faults.shutter_stuck else state

    async def _set_time_scale(self, pv: Any, scale: float) -> float:
        """Positive; anything else changes nothing."""
        if 0 < scale < float("inf"):
            self._clock.scale = scale
        return self._clock.scale


class Filter(PVGroup):
    """One absorber."""

    state = pvproperty(value="Out", enum_strings=["Out", "In"], dtype=PvpropertyEnum, name="")


class Temperature(PVGroup):
    """One sensor."""

    reading = pvproperty(value=0.0, name="", read_only=True, units="degC", precision=3)


class SimulatedBeamlineIOC:
    """Every process variable of the simulated beamline.

    Parameters
    ----------
    beamline : Beamline
        Names, limits, geometry; its prefix goes before every process variable.
    camera : Camera
        Makes the frames.
    data_dir : Path
        Where the Eiger writes until a client says otherwise.
    time_scale : float
        Wall-clock seconds per second of exposure and motion.
    """

    def __init__(self, beamline: Beamline, camera: Camera, data_dir: Path, time_scale: float) -> None:
        self.beamline = beamline
        self.clock = Clock(time_scale)
        self.camera = camera
        prefix = beamline.prefix
        self.motors = {
            name: Motor(prefix + axis.pv, axis, self.clock) for name, axis in axes(beamline).items()
        }
        records = {axis.pv: self.motors[name] for name, axis in axes(beamline).items()}
        self._filters = {name: Filter(prefix + plate.pv) for name, plate in beamline.filters.items()}
        self._temperatures = {name: Temperature(prefix + pv) for name, pv in beamline.temperatures.items()}
        self._wrong = Faults()
        self._beam = Beam(beamline, self.clock, self.camera, self._wrong, self.pose)
        self.eiger = Eiger(beamline, self.camera, self.clock, self.pose, data_dir, self._wrong)
        self._faults = [
            BeamlineFaults(prefix, self._wrong, self.eiger.fail, lambda: self.camera.pid),
            *(MotorFaults(f"{prefix}Sim:{pv}", motor) for pv, motor in records.items()),
        ]
        nano = {axis: self.motors[axis] for axis in NANO_AXES}
        groups = (
            *self.motors.values(),
            *self._filters.values(),
            *self._temperatures.values(),
            Interlock(prefix, beamline.nanogoniometer, nano),
            self._beam,
            self.eiger,
            TriggerSource(prefix, self.clock, records, self.eiger.pulse),
            *self._faults,
        )
        self.pvdb: dict[str, ChannelData] = {name: pv for group in groups for name, pv in group.pvdb.items()}
        for name, sensor in self._temperatures.items():
            reading: Any = sensor.reading
            reading.getter = partial(self._temperature, name)
        self._publisher: asyncio.Task[None] | None = None

    @property
    def faults(self) -> list[str]:
        """Faults that are on, in words."""
        return [word for group in self._faults for word in group.active]

    def pose(self) -> dict[str, float]:
        """Where every axis stands now, what is in the beam, and whether there is one."""
        pose = {name: motor.dial for name, motor in self.motors.items()}
        pose |= {f"filter_{name}": float(plate.state.value == "In") for name, plate in self._filters.items()}
        pose["beam"] = float(not self._wrong.beam_dumped)
        return pose | {"shutter": float(self._beam.shutter.value == "Open")}

    async def _temperature(self, name: str, pv: Any) -> float:
        try:
            return (await self.camera.ask("temperatures", self.clock.now()))[name]
        except CameraLost:
            return pv.value

    async def initialise(self) -> None:
        """Wait for the process that makes the frames and bring every record to its first value.

        Circles, crystal and what shapes the beam stand at the nominal setting, the modulator is parked.

        Raises
        ------
        CameraLost
            When the process cannot be started.
        """
        await self.camera.start()
        self.clock.begin()
        pose: Mapping[str, float] = self.camera.nominal_pose | self.beamline.nanogoniometer.positions["park"]
        for name, motor in self.motors.items():
            motor.place(pose[name])
        await asyncio.gather(*(motor.initialise() for motor in self.motors.values()))
        await self._publish_readings()
        await self._beam.initialise()
        await self.eiger.initialise()
        self._publisher = asyncio.create_task(self._keep_publishing())

    async def _publish_readings(self) -> None:
        for name, sensor in self._temperatures.items():
            reading: Any = sensor.reading
            await reading.write(await self._temperature(name, reading), verify_value=False)
        await self._beam.publish()

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_S)
            await self._publish_readings()

    async def close(self) -> None:
        """Finish the frame in hand and close every file."""
        if self._publisher is not None:
            self._publisher.cancel()
        await self.eiger.close()
        await self.camera.close()
