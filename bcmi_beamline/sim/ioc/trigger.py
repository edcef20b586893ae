"""A source of pulses for the detector's external input: one by one, or as a motor passes positions."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyChar

from bcmi_beamline.sim.ioc.clock import Activity, Clock
from bcmi_beamline.sim.ioc.motor import Motor

SHORTEST_PULSE_S = 1e-5


class TriggerSource(PVGroup):
    """``Sim:ExternalTrigger``: written, it gives a pulse; with ``:Arm`` it compares a motor's position.

    An armed source gives a pulse whenever the dial of the motor whose record is named in ``:Motor`` passes
    one of ``:Count`` positions, ``:Step`` apart from ``:Start`` on, in that order. A pulse that finds the
    detector busy, or not armed for external triggers, is missed, as by a real one.

    Parameters
    ----------
    prefix : str
        The beamline's.
    clock : Clock
    motors : mapping
        By the name of the record, without the prefix.
    pulse : callable
        Takes the width of a pulse (s); returns whether it was taken.
    """

    button = pvproperty(value=0, name="Sim:ExternalTrigger")
    width = pvproperty(value=0.1, name="Sim:ExternalTrigger:Width", units="s", precision=5)
    motor = pvproperty(
        value="",
        name="Sim:ExternalTrigger:Motor",
        dtype=PvpropertyChar,
        max_length=80,
        string_encoding="utf-8",
    )
    start = pvproperty(value=0.0, name="Sim:ExternalTrigger:Start", precision=5)
    step = pvproperty(value=0.0, name="Sim:ExternalTrigger:Step", precision=5)
    count = pvproperty(value=1, name="Sim:ExternalTrigger:Count")
    arm = pvproperty(value=0, name="Sim:ExternalTrigger:Arm")
    pulses = pvproperty(value=0, name="Sim:ExternalTrigger:Pulses", read_only=True)
    missed = pvproperty(value=0, name="Sim:ExternalTrigger:Missed", read_only=True)

    def __init__(
        self, prefix: str, clock: Clock, motors: Mapping[str, Motor], pulse: Callable[[float], bool]
    ) -> None:
        super().__init__(prefix)
        self._prefix = prefix
        self._clock = clock
        self._motors = motors
        self._pulse = pulse
        self._watched: Motor | None = None
        self._positions: deque[float] = deque()
        self._activity: Activity | None = None
        self.button.putter = self._on_button
        self.width.putter = self._on_width
        name: Any = self.motor
        name.putter = self._on_motor
        self.count.putter = self._on_count
        self.arm.putter = self._on_arm

    async def _on_button(self, pv: Any, value: int) -> int:
        if value:
            await self._give_pulse()
        return 0

    async def _on_width(self, pv: Any, value: float) -> float:
        return max(value, SHORTEST_PULSE_S) if math.isfinite(value) else pv.value

    async def _on_motor(self, pv: Any, value: str) -> str:
        """A record there is; any other leaves it as it was."""
        name = value.removeprefix(self._prefix)
        return name if name in self._motors else pv.value

    async def _on_count(self, pv: Any, value: int) -> int:
        return max(value, 1)

    async def _on_arm(self, pv: Any, value: int) -> int:
        self._disarm()
        motor = self._motors.get(self.motor.value)
        if not value or motor is None:
            return 0
        await self.pulses.write(0, verify_value=False)
        await self.missed.write(0, verify_value=False)
        self._watched = motor
        self._positions = deque(self.start.value + self.step.value * i for i in range(self.count.value))
        motor.watchers.append(self._look)
        if motor.motion is not None:
            self._look()
        return 1

    def _disarm(self) -> None:
        self._positions.clear()
        if self._watched is not None:
            self._watched.watchers.remove(self._look)
            self._watched = None

    async def _give_pulse(self) -> None:
        taken = self._pulse(self.width.value)
        await self.pulses.write(self.pulses.value + 1, verify_value=False)
        if not taken:
            await self.missed.write(self.missed.value + 1, verify_value=False)

    def _look(self) -> None:
        """The motor sets out, or for another target."""
        if self._activity is not None:
            self._activity.rouse()
        elif self._watched is not None:
            self._activity = Activity(self._clock)
            self._watch = asyncio.create_task(self._follow(self._watched, self._activity))

    async def _follow(self, motor: Motor, activity: Activity) -> None:
        """Give a pulse at each position in turn while the motor moves."""
        with activity:
            while self._positions and (motion := motor.motion) is not None:
                passes = motion.when(self._positions[0])
                if not self._clock.now() <= passes <= motion.end:
                    await activity.sleep_until(motion.end)
                    continue
                await activity.sleep_until(passes)
                if self._clock.now() >= passes and self._positions:
                    self._positions.popleft()
                    await self._give_pulse()
        self._activity = None
        if not self._positions and self._watched is motor:
            self._disarm()
            await self.arm.write(0, verify_value=False)
