"""What goes wrong at a beamline, as process variables under ``Sim:`` that a test or a teacher may write."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyEnum

from bcmi_beamline.sim.ioc.motor import Motor

_OFF_ON = ["Off", "On"]

LARGEST_DELAY_S = 10.0
"""Of an answer of a slow IOC."""

BREATH_S = 0.005
"""Between two naps of a slow IOC it answers what has arrived."""


@dataclass
class Faults:
    """What is wrong with the detector, the shutter and the ring."""

    detector_error: bool = False
    disk_full: bool = False
    late_s: float = 0.0
    """Beamline seconds between the end of an exposure and its frame."""
    frames_to_drop: int = 0
    shutter_stuck: bool = False
    beam_dumped: bool = False
    on_drop: Callable[[int], Awaitable[None]] | None = None
    """Told how many frames are still to be dropped."""

    async def drops_frame(self) -> bool:
        """Whether the frame in hand gets lost."""
        if not self.frames_to_drop:
            return False
        self.frames_to_drop -= 1
        if self.on_drop is not None:
            await self.on_drop(self.frames_to_drop)
        return True


def _switch(name: str) -> pvproperty:
    return pvproperty(value="Off", enum_strings=_OFF_ON, dtype=PvpropertyEnum, name=name)


def _attach(pv: Any, put: Callable[[Any, Any], Awaitable[Any]]) -> None:
    pv.putter = put


class MotorFaults(PVGroup):
    """What goes wrong with one motor.

    Parameters
    ----------
    prefix : str
        Put before the names: the beamline's, ``Sim:``, and the name of the motor's record.
    motor : Motor
    """

    stall = _switch(":Stall")
    lost_steps = pvproperty(value=0.0, name=":LostSteps", precision=5)
    limit_switch = pvproperty(
        value="None", enum_strings=["None", "Low", "High"], dtype=PvpropertyEnum, name=":LimitSwitch"
    )

    def __init__(self, prefix: str, motor: Motor) -> None:
        super().__init__(prefix)
        self._motor = motor
        _attach(self.stall, self._on_stall)
        _attach(self.lost_steps, self._on_lost_steps)
        _attach(self.limit_switch, self._on_limit_switch)

    async def _on_stall(self, pv: Any, value: str) -> None:
        await self._motor.stall(value == "On")

    async def _on_lost_steps(self, pv: Any, value: float) -> float:
        self._motor.lost = value if value >= 0 else 0.0
        return self._motor.lost

    async def _on_limit_switch(self, pv: Any, value: Any) -> None:
        await self._motor.press_switch(value)

    @property
    def active(self) -> list[str]:
        """Faults that are on, in words."""
        values = {"stalled": self.stall.value == "On", "loses steps": self.lost_steps.value > 0}
        values["on a limit switch"] = self.limit_switch.value != "None"
        return [f"{self._motor.pv} {name}" for name, on in values.items() if on]


class BeamlineFaults(PVGroup):
    """What goes wrong with the detector, the shutter, the ring and the IOC itself.

    Parameters
    ----------
    prefix : str
        The beamline's.
    faults : Faults
        Kept up to date.
    on_detector_error : callable
        Ends the series under way.
    camera_pid : callable
        Process that makes the frames.
    """

    detector_error = _switch("Sim:Detector:Error")
    detector_crash = pvproperty(value=0, name="Sim:Detector:Crash")
    drop_frames = pvproperty(value=0, name="Sim:Detector:DropFrames")
    late = pvproperty(value=0.0, name="Sim:Detector:Late", units="s", precision=3)
    disk_full = _switch("Sim:Disk:Full")
    shutter_stuck = _switch("Sim:Shutter:Stuck")
    beam_dump = _switch("Sim:Beam:Dump")
    slow = pvproperty(value=0.0, name="Sim:IOC:Slow", units="s", precision=3)
    die = pvproperty(value=0, name="Sim:IOC:Die")

    def __init__(
        self,
        prefix: str,
        faults: Faults,
        on_detector_error: Callable[[], Awaitable[None]],
        camera_pid: Callable[[], int | None],
    ) -> None:
        super().__init__(prefix)
        self._faults = faults
        self._on_error = on_detector_error
        self._camera_pid = camera_pid
        self._slowing: asyncio.Task[None] | None = None
        faults.on_drop = lambda left: self.drop_frames.write(left, verify_value=False)
        _attach(self.disk_full, self._setting("disk_full"))
        _attach(self.shutter_stuck, self._setting("shutter_stuck"))
        _attach(self.beam_dump, self._setting("beam_dumped"))
        _attach(self.detector_error, self._on_detector_error)
        _attach(self.detector_crash, self._on_detector_crash)
        _attach(self.drop_frames, self._on_drop_frames)
        _attach(self.late, self._on_late)
        _attach(self.slow, self._on_slow)
        _attach(self.die, self._on_die)

    def _setting(self, name: str):
        async def put(pv: Any, value: str) -> None:
            setattr(self._faults, name, value == "On")

        return put

    async def _on_detector_error(self, pv: Any, value: str) -> None:
        self._faults.detector_error = value == "On"
        if self._faults.detector_error:
            await self._on_error()

    async def _on_detector_crash(self, pv: Any, value: int) -> int:
        pid = self._camera_pid()
        if value and pid is not None:
            os.kill(pid, signal.SIGKILL)
        return 0

    async def _on_drop_frames(self, pv: Any, value: int) -> int:
        self._faults.frames_to_drop = max(value, 0)
        return self._faults.frames_to_drop

    async def _on_late(self, pv: Any, value: float) -> float:
        self._faults.late_s = value if 0 <= value < float("inf") else 0.0
        return self._faults.late_s

    async def _on_slow(self, pv: Any, value: float) -> float:
        delay = min(value, LARGEST_DELAY_S) if value > 0 else 0.0
        if self._slowing is not None:
            self._slowing.cancel()
            self._slowing = None
        if delay:
            self._slowing = asyncio.create_task(self._drowse(delay))
        return delay

    @staticmethod
    async def _drowse(delay: float) -> None:
        """Answer only every `delay` wall-clock seconds, as an IOC with too much to do."""
        while True:
            await asyncio.sleep(BREATH_S)
            time.sleep(delay)

    async def _on_die(self, pv: Any, value: int) -> int:
        if value:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    @property
    def active(self) -> list[str]:
        """Faults that are on, in words."""
        faults = self._faults
        values = {
            "detector error": faults.detector_error, "disk full": faults.disk_full,
            "late frames": faults.late_s > 0, "dropping frames": faults.frames_to_drop > 0,
            "shutter stuck": faults.shutter_stuck, "beam dumped": faults.beam_dumped,
            "slow": self._slowing is not None,
        }  # fmt: skip
        return [name for name, on in values.items() if on]
