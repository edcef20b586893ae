"""Motor records that behave: limits, speed, stop, retarget, offsets and put-completion.

A move travels at constant velocity in dial coordinates, ``user = direction * dial + offset``. The dial is
the physical truth: the twin and the interlock look at it, so redefining a user position moves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from caproto import SkipWrite
from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyDouble

from bcmi_beamline.config import AxisConfig
from bcmi_beamline.sim.ioc.clock import Clock

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Wall-clock seconds between two readbacks of a moving motor."""

SHORTEST_MOVE_S = 0.002
"""Even a move to where the motor stands takes this long, so that DMOV always toggles."""

STEP = 1e-4
"""Motor and encoder step (MRES), axis units."""

_DIRECTION, _DONE, _PRESENT, _MOVING, _HOMED = 0x1, 0x2, 0x100, 0x400, 0x4000
"""Bits of MSTA."""

Guard = Callable[[float], Awaitable[str | None]]
"""Says why a dial target is refused, or None."""


@dataclass(frozen=True)
class Motion:
    """Travel at constant velocity; positions in dial units, times in wall-clock seconds."""

    start: float
    target: float
    began: float
    duration: float

    @property
    def end(self) -> float:
        """When the target is reached."""
        return self.began + self.duration

    def position(self, now: float) -> float:
        """Dial position at `now`."""
        if now >= self.end:
            return self.target
        return self.start + (self.target - self.start) * (now - self.began) / self.duration


class Setpoint(PvpropertyDouble):
    """VAL: the record judges a target, where caproto would answer with an exception of its own."""

    async def verify_value(self, value: Any) -> Any:
        """Hand the value to the record."""
        assert self.putter is not None
        return await self.putter(self, value)


class Motor(PVGroup):
    """One motor record.

    Parameters
    ----------
    pv : str
        Name of the record.
    axis : AxisConfig
        Limits, speed and unit.
    clock : Clock
        Scales the duration of moves.
    position : float
        Dial position at the start.
    """

    setpoint = pvproperty(value=0.0, name="", dtype=Setpoint, record="motor", precision=5)

    def __init__(self, pv: str, axis: AxisConfig, clock: Clock, position: float = 0.0) -> None:
        super().__init__(pv)
        self.pv = pv
        self.axis = axis
        self.guard: Guard | None = None
        self._clock = clock
        self._rest = position
        self._motion: Motion | None = None
        self._dial_limits = (axis.low, axis.high)
        self._transition = asyncio.Lock()
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._traveller: asyncio.Task[None] | None = None
        record: Any = self.setpoint
        record.putter = self._on_val
        for name in (
            "DVAL", "RLV", "TWF", "TWR", "HOMF", "HOMR", "STOP", "SPMG", "VELO", "OFF", "DIR",
            "HLM", "LLM", "DHLM", "DLLM",
        ):  # fmt: skip
            self._field(name).putter = getattr(self, f"_on_{name.lower()}")

    # -- where it is ------------------------------------------------------------------------------
    @property
    def dial(self) -> float:
        """Physical position now, between two readbacks too."""
        motion = self._motion
        return self._rest if motion is None else motion.position(time.monotonic())

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest dial position between here and the target."""
        here = self.dial
        target = here if self._motion is None else self._motion.target
        return min(here, target), max(here, target)

    def _field(self, name: str) -> Any:
        return self.setpoint.get_field(name)

    async def _write(self, **values: Any) -> None:
        """Publish the record fields that change, without running their putters."""
        for name, value in values.items():
            field = self._field(name)
            if field.value != value:
                await field.write(value, verify_value=False)

    @property
    def _sign(self) -> int:
        return 1 if self._field("DIR").value == "Pos" else -1

    def _user(self, dial: float) -> float:
        return self._sign * dial + self._field("OFF").value

    def _to_dial(self, user: float) -> float:
        return self._sign * (user - self._field("OFF").value)

    # -- publishing -------------------------------------------------------------------------------
    async def _publish_readback(self, dial: float) -> None:
        await self._write(RBV=self._user(dial), DRBV=dial, RRBV=round(dial / STEP))

    async def _publish_target(self, dial: float) -> None:
        await self.setpoint.write(self._user(dial), verify_value=False)
        await self._write(DVAL=dial, RVAL=round(dial / STEP))

    async def _publish_limits(self) -> None:
        """Dial limits are the truth; the user's follow offset and direction, and VAL carries them."""
        low, high = [self._user(limit) for limit in self._dial_limits][:: self._sign]
        limits: dict[str, Any] = {
            f"{end}_{kind}_limit": value
            for kind in ("ctrl", "disp")
            for end, value in (("lower", low), ("upper", high))
        }
        await self.setpoint.write_metadata(**limits)
        await self._field("RBV").write_metadata(**limits)
        await self._write(LLM=low, HLM=high, DLLM=self._dial_limits[0], DHLM=self._dial_limits[1])

    async def _publish_frame(self) -> None:
        """Everything in user coordinates, after the offset or the direction has changed."""
        await self._publish_limits()
        await self._publish_target(self._rest if self._motion is None else self._motion.target)
        await self._publish_readback(self.dial)

    async def _publish_status(self, moving: bool) -> None:
        direction = _DIRECTION if self._field("TDIR").value else 0
        homed = _HOMED if self._field("ATHM").value else 0
        await self._write(MSTA=direction | homed | _PRESENT | (_MOVING if moving else _DONE))

    async def initialise(self) -> None:
        """Fill the record from the configuration."""
        for field in (self.setpoint, *(self._field(name) for name in ("RBV", "DVAL", "DRBV", "TWV"))):
            await field.write_metadata(units=self.axis.unit, precision=5)
        await self._write(
            EGU=self.axis.unit, PREC=5, MRES=STEP, ERES=STEP, TWV=1.0, ACCL=0.0, LVIO=0,
            VELO=self.axis.velocity, VMAX=self.axis.velocity, HVEL=self.axis.velocity,
            DIR="Pos", SET="Use", SPMG="Go",
        )  # fmt: skip
        await self._publish_frame()
        await self._publish_status(moving=False)

    # -- commands ---------------------------------------------------------------------------------
    async def _refusal(self, target: float) -> str | None:
        low, high = self._dial_limits
        if not math.isfinite(target):
            return "not a number"
        if (low, high) != (0.0, 0.0) and not low <= target <= high:
            return f"{target:.5g} lies outside the dial limits [{low:g}, {high:g}] {self.axis.unit}"
        return None if self.guard is None else await self.guard(target)

    async def move(self, target: float) -> None:
        """Go to a dial position and return when the motor has stopped.

        A target outside the limits, or one the guard refuses, raises LVIO and moves nothing; DMOV still
        toggles, so that no client waits for a move that will not come.
        """
        reason = await self._refusal(target)
        await self._write(LVIO=int(reason is not None))
        if reason is not None:
            log.warning("%s: refused: %s", self.pv, reason)
            await self._publish_target(self._rest if self._motion is None else self._motion.target)
            if self._motion is None:
                await self._write(DMOV=0)
                await self._write(DMOV=1)
            return
        await self._publish_target(target)
        if self._field("SPMG").value in ("Move", "Go"):
            await self._start(target)
            await self._idle.wait()

    async def _start(self, target: float) -> None:
        """Begin a motion, or give the running one a new target."""
        async with self._transition:
            here = self.dial
            seconds = abs(target - here) / self._field("VELO").value * self._clock.scale
            running = self._motion is not None
            self._motion = Motion(here, target, time.monotonic(), max(seconds, SHORTEST_MOVE_S))
            self._changed.set()
            if running:
                return
            self._idle.clear()
            await self._write(DMOV=0, MOVN=1, MIP=0x20, TDIR=int(target >= here), ATHM=0)
            await self._publish_status(moving=True)
            self._traveller = asyncio.create_task(self._travel())

    async def _travel(self) -> None:
        """Publish the readback until the target of the latest motion is reached."""
        while (motion := self._motion) is not None:
            self._changed.clear()
            left = motion.end - time.monotonic()
            if left > 0:
                try:
                    await asyncio.wait_for(self._changed.wait(), min(TICK_S, left))
                except TimeoutError:
                    await self._publish_readback(self.dial)
            else:
                await self._finish(motion)

    async def _finish(self, motion: Motion) -> None:
        """Come to rest, unless a new target has arrived meanwhile."""
        async with self._transition:
            if self._motion is not motion:
                return
            self._rest, self._motion = motion.target, None
            await self._publish_readback(self._rest)
            await self._publish_status(moving=False)
            await self._write(MIP=0, MOVN=0, DMOV=1)
            self._idle.set()

    async def stop(self) -> None:
        """Stop where the motor stands; the setpoint becomes that position."""
        async with self._transition:
            if self._motion is None:
                return
            here = self.dial
            self._motion = Motion(here, here, time.monotonic(), 0.0)
            self._changed.set()
        await self._publish_target(here)
        await self._idle.wait()

    # -- what clients may write: one handler per field, given the field and the value --------------
    async def _on_val(self, field: Any, user: float) -> None:
        """Move, or with SET redefine; put-completion comes at rest."""
        if self._field("SET").value == "Set":
            await self._write(OFF=user - self._sign * self.dial)
            await self._publish_frame()
        else:
            await self.move(self._to_dial(user))
        raise SkipWrite

    async def _on_dval(self, field: Any, dial: float) -> None:
        await self.move(dial)
        raise SkipWrite

    async def _on_rlv(self, field: Any, step: float) -> float:
        await self.move(self._to_dial(self.setpoint.value + step))
        return 0.0

    async def _on_twf(self, field: Any, pressed: int) -> int:
        if pressed:
            await self._on_rlv(field, self._field("TWV").value)
        return 0

    async def _on_twr(self, field: Any, pressed: int) -> int:
        if pressed:
            await self._on_rlv(field, -self._field("TWV").value)
        return 0

    async def _on_homf(self, field: Any, pressed: int) -> int:
        """Go to dial zero, or as near as the limits allow."""
        if pressed:
            low, high = self._dial_limits
            await self.move(min(max(0.0, low), high))
            await self._write(ATHM=1)
            await self._publish_status(moving=False)
        return 0

    _on_homr = _on_homf

    async def _on_stop(self, field: Any, pressed: int) -> int:
        if pressed:
            await self.stop()
        return 0

    async def _on_spmg(self, field: Any, mode: str) -> str:
        """Stop and Pause halt and hold; Move and Go resume towards the setpoint that was held."""
        held = self.setpoint.value
        await self._write(SPMG=mode)
        if mode in ("Stop", "Pause"):
            await self.stop()
            if mode == "Pause":
                await self._publish_target(self._to_dial(held))
        elif self._motion is None and self._to_dial(held) != self._rest:
            await self.move(self._to_dial(held))
        return mode

    async def _on_velo(self, field: Any, velocity: float) -> float:
        """Up to VMAX; what is not positive changes nothing."""
        return min(velocity, self.axis.velocity) if velocity > 0 else field.value

    async def _on_off(self, field: Any, offset: float) -> None:
        await self._write(OFF=offset)
        await self._publish_frame()
        raise SkipWrite

    async def _on_dir(self, field: Any, direction: str) -> None:
        await self._write(DIR=direction)
        await self._publish_frame()
        raise SkipWrite

    async def _on_hlm(self, field: Any, user: float) -> None:
        await self._set_user_limits(self._field("LLM").value, user)

    async def _on_llm(self, field: Any, user: float) -> None:
        await self._set_user_limits(user, self._field("HLM").value)

    async def _on_dhlm(self, field: Any, dial: float) -> None:
        await self._set_dial_limits(self._dial_limits[0], dial)

    async def _on_dllm(self, field: Any, dial: float) -> None:
        await self._set_dial_limits(dial, self._dial_limits[1])

    async def _set_user_limits(self, low: float, high: float) -> None:
        await self._set_dial_limits(*[self._to_dial(low), self._to_dial(high)][:: self._sign])

    async def _set_dial_limits(self, low: float, high: float) -> None:
        self._dial_limits = (low, high)
        await self._publish_limits()
        raise SkipWrite
