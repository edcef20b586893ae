"""Motor records that behave: limits, speed, stop, jog, retries, offsets and put-completion.

A move travels in dial coordinates, ``user = direction * dial + offset``. The dial is an absolute encoder and
the physical truth: the twin and the interlock look at it, so redefining a user position moves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

from caproto import AlarmSeverity, AlarmStatus, SkipWrite
from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyDouble

from bcmi_beamline.config import AxisConfig
from bcmi_beamline.sim.ioc.clock import Activity, Clock
from bcmi_beamline.sim.ioc.motion import Motion

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Wall-clock seconds between two readbacks of a moving motor."""

STEP = 1e-4
"""Motor and encoder step (MRES), axis units."""

RAMP_S = 0.1
"""Seconds to full speed (ACCL) at the start."""

RETRIES = 3
"""Further tries of a move that ends beyond the retry deadband (RTRY) at the start."""

SLOWEST = 1e-6
"""Least velocity, of VMAX."""

SWITCH_MARGIN = 0.01
"""A limit switch stands this share of the travel behind the soft limit that is configured."""

_DIRECTION, _DONE, _PLUS, _STALL, _PRESENT, _PROBLEM = 0x1, 0x2, 0x4, 0x40, 0x100, 0x200
_MOVING, _MINUS, _HOMED = 0x400, 0x2000, 0x4000
"""Bits of MSTA."""

Guard = Callable[[float], str | None]
"""Says why a dial target is refused, or None."""

Switch = Literal["None", "Low", "High"]


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
        self.watchers: list[Callable[[], None]] = []
        """Called whenever the motor sets out, or for another target."""
        self._clock = clock
        self._rest = self._target = position
        self._motion: Motion | None = None
        self._retries = 0
        self._dial_limits = (axis.low, axis.high)
        self._switches = self._end_switches()
        self._stalled = False
        self.lost = 0.0
        """Every start of the motor loses this much, axis units: the encoder shows where it really is."""
        self._activity: Activity | None = None
        self._traveller: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        record: Any = self.setpoint
        record.putter = self._on_val
        for name in (
            "DVAL", "RVAL", "RLV", "TWF", "TWR", "HOMF", "HOMR", "JOGF", "JOGR", "STOP", "SPMG", "VELO",
            "JVEL", "ACCL", "RDBD", "OFF", "DIR", "HLM", "LLM", "DHLM", "DLLM", "EGU", "PREC",
        ):  # fmt: skip
            self._field(name).putter = getattr(self, f"_on_{name.lower()}")

    def _end_switches(self) -> tuple[float, float]:
        margin = SWITCH_MARGIN * (self.axis.high - self.axis.low)
        return self.axis.low - margin, self.axis.high + margin

    # -- where it is ------------------------------------------------------------------------------
    @property
    def dial(self) -> float:
        """Physical position now, between two readbacks too."""
        motion = self._motion
        return self._rest if motion is None else motion.position(self._clock.now())

    @property
    def motion(self) -> Motion | None:
        """The motion under way."""
        return self._motion

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest dial position between here and the target."""
        here = self.dial
        target = here if self._motion is None else self._target
        return min(here, target), max(here, target)

    def place(self, dial: float) -> None:
        """Stand at `dial`; before `initialise` only."""
        self._rest = self._target = dial

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
    async def _publish_readback(self) -> None:
        dial = self.dial
        user = self._user(dial)
        await self._write(RBV=user, DRBV=dial, RRBV=round(dial / STEP), DIFF=self.setpoint.value - user)

    async def _publish_target(self, dial: float) -> None:
        await self.setpoint.write(self._user(dial), verify_value=False)
        await self._write(
            DVAL=dial, RVAL=round(dial / STEP), DIFF=self._user(dial) - self._field("RBV").value
        )

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
        await self._publish_target(self._rest if self._motion is None else self._target)
        await self._publish_readback()
        await self._publish_status()

    async def _publish_status(self) -> None:
        """MSTA, the limit switches, and the alarm of a motor that does not follow."""
        here = self.dial
        minus, plus = (here <= self._switches[0], here >= self._switches[1])
        bits = _PRESENT | (_DONE if self._motion is None else _MOVING)
        for is_on, bit in (
            (self._field("TDIR").value, _DIRECTION), (self._field("ATHM").value, _HOMED), (plus, _PLUS),
            (minus, _MINUS), (self._stalled, _STALL | _PROBLEM),
        ):  # fmt: skip
            bits |= bit if is_on else 0
        await self._write(
            MSTA=bits, HLS=int((minus, plus)[self._sign > 0]), LLS=int((plus, minus)[self._sign > 0])
        )
        alarm: dict[str, Any] = {"status": AlarmStatus.NO_ALARM, "severity": AlarmSeverity.NO_ALARM}
        if self._stalled:
            alarm = {"status": AlarmStatus.STATE, "severity": AlarmSeverity.MAJOR_ALARM}
        setpoint: Any = self.setpoint
        for field in (setpoint, self._field("RBV")):
            if field.alarm.severity != alarm["severity"]:
                await field.write(field.value, verify_value=False, **alarm)

    async def _publish_units(self, unit: str, precision: int) -> None:
        for field in (self.setpoint, *(self._field(name) for name in ("RBV", "DVAL", "DRBV", "TWV", "VELO"))):
            await field.write_metadata(units=unit, precision=precision)

    async def initialise(self) -> None:
        """Fill the record from the configuration."""
        axis = self.axis
        await self._publish_units(axis.unit, 5)
        await self._write(
            EGU=axis.unit, PREC=5, MRES=STEP, ERES=STEP, TWV=1.0, ACCL=RAMP_S, LVIO=0, VELO=axis.velocity,
            VMAX=axis.velocity, HVEL=axis.velocity, JVEL=axis.velocity / 2, RDBD=axis.tolerance / 2,
            RTRY=RETRIES, UEIP="Yes", FOFF="Variable", DIR="Pos", SET="Use", SPMG="Go", DMOV=1,
        )  # fmt: skip
        await self._publish_frame()

    # -- what goes wrong ----------------------------------------------------------------------------
    async def stall(self, stalled: bool) -> None:
        """Stick where it stands, until it is freed; the controller sees that the encoder does not follow."""
        self._stalled = stalled
        await self._reconsider()

    async def press_switch(self, which: Switch) -> None:
        """Press a limit switch where the motor stands, or put it back to the end of the travel."""
        low, high = self._end_switches()
        self._switches = (self.dial if which == "Low" else low, self.dial if which == "High" else high)
        await self._reconsider()

    async def _reconsider(self) -> None:
        if self._motion is not None:
            self._set_out(self._target, self._motion.velocity)
        await self._publish_status()

    # -- motion ---------------------------------------------------------------------------------------
    def _refusal(self, target: float) -> str | None:
        low, high = self._dial_limits
        if not math.isfinite(target):
            return "not a number"
        if (low, high) != (0.0, 0.0) and not low <= target <= high:
            return f"{target:.5g} lies outside the dial limits [{low:g}, {high:g}] {self.axis.unit}"
        return None if self.guard is None else self.guard(target)

    async def move(self, target: float, velocity: float | None = None) -> None:
        """Go to a dial position and return when the motor has stopped.

        A target outside the limits, or one the guard refuses, raises LVIO and moves nothing; DMOV still
        toggles, so that no client waits for a move that will not come.
        """
        reason = self._refusal(target)
        if reason is not None:
            await self._refuse(reason)
        elif self._field("SPMG").value in ("Move", "Go"):
            self._retries = 0
            self._set_out(target, self._field("VELO").value if velocity is None else velocity)
            await self._write(LVIO=0, MISS=0, RCNT=0)
            if velocity is None:
                await self._publish_target(target)
            await self._idle.wait()
        else:
            await self._write(LVIO=0)
            await self._publish_target(target)

    async def _refuse(self, reason: str) -> None:
        log.warning("%s: refused: %s", self.pv, reason)
        await self._write(LVIO=1)
        await self._publish_target(self._rest if self._motion is None else self._target)
        if self._motion is None:
            await self._write(DMOV=0)
            await self._write(DMOV=1)

    def _set_out(self, target: float, velocity: float) -> None:
        """Begin a motion, or give the running one a new target; nothing is awaited after the guard's yes."""
        if self._traveller is not None:
            self._clock.release()
        here = self.dial
        self._target = target
        self._motion = Motion(
            here, self._reachable(here, target), self._clock.now(), velocity, self._field("ACCL").value
        )
        if self._traveller is None:
            self._idle.clear()
            self._activity = Activity(self._clock, together=True)
            self._traveller = asyncio.create_task(self._travel(self._activity))
        elif self._activity is not None:
            self._activity.rouse()
        for watcher in self.watchers:
            watcher()

    def _reachable(self, here: float, target: float) -> float:
        """Where a motion towards `target` ends: short of it with lost steps, at a switch, or here."""
        if self._stalled:
            return here
        low, high = self._switches
        if target > here:
            return max(here, min(target - self.lost, high))
        return min(here, max(target + self.lost, low))

    async def _travel(self, activity: Activity) -> None:
        """Publish what happens until there is no motion left."""
        with activity:
            while (motion := self._motion) is not None:
                await self._write(DMOV=0, MOVN=1, MIP=0x20, TDIR=int(self._target >= motion.start), ATHM=0)
                await self._publish_status()
                await self._follow(activity)
                await self._publish_readback()
                await self._publish_status()
                await self._write(MISS=int(self._is_short()), MIP=0, MOVN=0, DMOV=1)
                if self._field("SPMG").value == "Move":
                    await self._write(SPMG="Pause")
        self._traveller = self._activity = None
        self._idle.set()

    async def _follow(self, activity: Activity) -> None:
        """Publish the readback until the target of the latest motion is reached, or given up."""
        while (motion := self._motion) is not None:
            nap = activity.nap(motion.end)
            while not nap.done():
                await asyncio.wait([nap], timeout=TICK_S)
                await self._publish_readback()
            if self._motion is not motion:
                continue
            self._rest, self._motion = motion.target, None
            if self._may_retry():
                self._retries += 1
                self._set_out(self._target, motion.velocity)
                await self._write(RCNT=self._retries)

    def _is_short(self) -> bool:
        return abs(self._target - self.dial) > self._field("RDBD").value

    def _may_retry(self) -> bool:
        low, high = self._switches
        blocked = self._stalled or not low < self._rest < high
        return self._is_short() and not blocked and self._retries < self._field("RTRY").value

    async def stop(self) -> None:
        """Stop where the motor stands; the setpoint becomes that position."""
        if self._motion is None:
            return
        self._clock.release()
        here = self.dial
        self._set_out(here, self._motion.velocity)
        await self._publish_target(here)
        await self._idle.wait()

    # -- what clients may write: one handler per field, given the field and the value --------------
    async def _on_val(self, field: Any, user: float) -> None:
        """Move, or with SET redefine (unless FOFF is frozen); put-completion comes at rest."""
        if self._field("SET").value == "Set":
            if self._field("FOFF").value == "Variable" and math.isfinite(user):
                await self._write(OFF=user - self._sign * self.dial)
            await self._publish_frame()
        else:
            await self.move(self._to_dial(user))
        raise SkipWrite

    async def _on_dval(self, field: Any, dial: float) -> None:
        if self._field("SET").value == "Use":
            await self.move(dial)
        else:
            await self._publish_frame()  # an absolute encoder is not redefined
        raise SkipWrite

    async def _on_rval(self, field: Any, steps: int) -> None:
        await self._on_dval(field, steps * STEP)

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
            await self._publish_status()
        return 0

    _on_homr = _on_homf

    async def _on_jogf(self, field: Any, pressed: int) -> int:
        return await self._jog(field, 1, pressed)

    async def _on_jogr(self, field: Any, pressed: int) -> int:
        return await self._jog(field, -1, pressed)

    async def _jog(self, field: Any, direction: int, pressed: int) -> int:
        """Run at JVEL while pressed, at most to the soft limit or, without one, to the switch."""
        if not pressed:
            await self.stop()
            return 0
        await field.write(1, verify_value=False)
        ends = self._switches if self._dial_limits == (0.0, 0.0) else self._dial_limits
        await self.move(ends[direction * self._sign > 0], self._field("JVEL").value)
        if self._motion is None:
            await self._publish_target(self._rest)
        return 0

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
        return self._field("SPMG").value  # Move has become Pause

    async def _on_velo(self, field: Any, velocity: float) -> float:
        """Up to VMAX and no slower than `SLOWEST`; what is not positive changes nothing."""
        fastest = self.axis.velocity
        return min(max(velocity, SLOWEST * fastest), fastest) if velocity > 0 else field.value

    _on_jvel = _on_velo

    async def _on_accl(self, field: Any, seconds: float) -> float:
        return seconds if 0 < seconds < math.inf else field.value

    async def _on_rdbd(self, field: Any, deadband: float) -> float:
        """No less than a step."""
        return max(deadband, STEP) if math.isfinite(deadband) else field.value

    async def _on_egu(self, field: Any, unit: str) -> str:
        await self._publish_units(unit, self._field("PREC").value)
        return unit

    async def _on_prec(self, field: Any, precision: int) -> int:
        precision = min(max(precision, 0), 15)
        await self._publish_units(self._field("EGU").value, precision)
        return precision

    async def _on_off(self, field: Any, offset: float) -> None:
        if math.isfinite(offset):
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
        if math.isfinite(low) and math.isfinite(high):
            self._dial_limits = (low, high)
            await self._publish_limits()
        raise SkipWrite
