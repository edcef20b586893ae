"""The process variables of one beamline, assembled around the physics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from caproto import ChannelData
from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyEnum

from bcmi_beamline.config import Beamline
from bcmi_beamline.sim.ioc.clock import Clock
from bcmi_beamline.sim.ioc.eiger import Eiger
from bcmi_beamline.sim.ioc.interlock import Interlock
from bcmi_beamline.sim.ioc.motor import Motor
from bcmi_beamline.sim.twin import Twin

CIRCLES = ("mu", "eta", "phi", "nu", "delta")
NANO_AXES = ("x", "y", "z", "mchi", "mphi")

RING_CURRENT_MA = 200.0


class Beam(PVGroup):
    """Shutter, flux monitor, ring current and the pace of time."""

    shutter = pvproperty(
        value="Closed", enum_strings=["Closed", "Open"], dtype=PvpropertyEnum, name="{shutter}"
    )
    monitor = pvproperty(value=0.0, name="{monitor}", read_only=True, units="ph/s", precision=0)
    ring_current = pvproperty(
        value=RING_CURRENT_MA, name="{ring_current}", read_only=True, units="mA", precision=2
    )
    time_scale = pvproperty(value=1.0, name="Sim:TimeScale", precision=4)

    def __init__(self, beamline: Beamline, clock: Clock, twin: Twin) -> None:
        names = {
            "shutter": beamline.shutter_pv,
            "monitor": beamline.monitor_pv,
            "ring_current": beamline.ring_current_pv,
        }
        super().__init__(beamline.prefix, macros=names)
        self._clock = clock
        self._twin = twin
        self.monitor.getter = self._flux
        self.time_scale.putter = self._set_time_scale

    async def initialise(self) -> None:
        """Publish what the configuration says."""
        await self.time_scale.write(self._clock.scale, verify_value=False)
        await self.monitor.write(await self._flux(None), verify_value=False)

    async def _flux(self, pv: Any) -> float:
        return self._twin.flux(self._clock.now())

    async def _set_time_scale(self, pv: Any, scale: float) -> float:
        self._clock.scale = scale
        return scale


class SimulatedBeamlineIOC:
    """Every process variable of the simulated beamline.

    Parameters
    ----------
    beamline : Beamline
        Names, limits, geometry; its prefix goes before every process variable.
    twin : Twin
        Turns a pose into a frame.
    data_dir : Path
        Where the Eiger writes until a client says otherwise.
    time_scale : float
        Wall-clock seconds per second of exposure and motion.
    """

    def __init__(self, beamline: Beamline, twin: Twin, data_dir: Path, time_scale: float) -> None:
        self.clock = Clock(time_scale)
        self._motors = self._make_motors(beamline, twin)
        nano = {axis: self._motors[axis] for axis in NANO_AXES}
        self._beam = Beam(beamline, self.clock, twin)
        self._eiger = Eiger(beamline, twin, self.clock, self.pose, data_dir)
        groups = (
            *self._motors.values(),
            Interlock(beamline.prefix, beamline.nanogoniometer, nano),
            self._beam,
            self._eiger,
        )
        self.pvdb: dict[str, ChannelData] = {name: pv for group in groups for name, pv in group.pvdb.items()}

    def _make_motors(self, beamline: Beamline, twin: Twin) -> dict[str, Motor]:
        """Motors by pose key: circles and crystal at the nominal setting, the modulator parked."""
        axes = {name: getattr(beamline.diffractometer, name) for name in CIRCLES}
        axes |= {name: getattr(beamline.nanogoniometer, name) for name in NANO_AXES}
        axes |= {f"sample_{name}": getattr(beamline.sample_stage, name) for name in "xyz"}
        pose = {**twin.nominal_pose(), **beamline.nanogoniometer.positions["park"]}
        return {
            name: Motor(beamline.prefix + axis.pv, axis, self.clock, pose[name])
            for name, axis in axes.items()
        }

    def pose(self) -> dict[str, float]:
        """Where every axis stands now, and whether the shutter is open (1)."""
        pose = {name: motor.dial for name, motor in self._motors.items()}
        return pose | {"shutter": float(self._beam.shutter.value == "Open")}

    async def initialise(self) -> None:
        """Bring every record to its first value."""
        await asyncio.gather(*(motor.initialise() for motor in self._motors.values()))
        await self._beam.initialise()
        await self._eiger.initialise()

    async def close(self) -> None:
        """Finish the frame in hand and close every file."""
        await self._eiger.close()
