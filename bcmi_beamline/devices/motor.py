"""A motor record that is safe to move thousands of times and honest about where it ended."""

from __future__ import annotations

import math
from contextlib import suppress
from threading import RLock
from typing import Any

from ophyd import Component as Cpt
from ophyd import EpicsMotor, EpicsSignal, EpicsSignalRO
from ophyd.status import MoveStatus
from ophyd.utils import DisconnectedError, InvalidState, LimitError

from bcmi_beamline.config import AxisConfig
from bcmi_beamline.devices._later import call_later

LEAST_TIMEOUT_S = 10.0
"""No move is given less time than this."""

DMOV_GRACE_S = 0.5
"""How long DMOV may lag behind the completion of a put."""


class MoveError(RuntimeError):
    """A move that did not end where it was sent."""


class MoveTimeout(MoveError, TimeoutError):
    """A move that did not end in time; its motor has been stopped."""


class Move(MoveStatus):
    """A move under way; one that takes too long stops its motor, one that has ended elsewhere does not."""

    def _handle_failure(self) -> None:
        if isinstance(self.exception(), MoveTimeout):
            super()._handle_failure()


class Switch(EpicsSignalRO):
    """A limit switch as the record last told, which it does before it ends a move: it is not asked again."""

    def get(self, **kwargs: Any) -> Any:
        """1 when it is on."""
        kwargs["use_monitor"] = True
        return super().get(**kwargs)


class Setpoint(EpicsSignal):
    """The VAL field; checks what the motor checks, so that writing to it directly gets round nothing."""

    def check_value(self, value) -> None:
        """Ask the motor."""
        assert isinstance(self.parent, Motor)
        self.parent.check_value(value)


class Motor(EpicsMotor):
    """An EPICS motor within configured limits whose moves always end, well or with a reason.

    It differs from `ophyd.EpicsMotor` in that

    - each move owns its status. ophyd keeps one list of callbacks for all moves and clears it after running
      it, which wipes a move that a callback's consumer has just begun, and that move never ends;
    - each move has a timeout, from its length and the record's own VELO and ACCL, and is stopped then;
    - a move that ends beyond the axis' tolerance of its target, or was stopped, fails and says where it is;
    - limits are those of the configuration and of the record, whichever is tighter, and the device that
      holds the motor may refuse a target through its ``check_move(axis, position)``.

    Parameters
    ----------
    prefix : str
        The record.
    axis : AxisConfig, optional
        Limits, unit, velocity, tolerance; by default those of the same name in the parent's ``config``.
    """

    user_setpoint = Cpt(Setpoint, ".VAL", limits=True, auto_monitor=True)
    limit_violation = Cpt(EpicsSignalRO, ".LVIO", kind="omitted")
    high_limit_switch = Cpt(Switch, ".HLS", kind="omitted", auto_monitor=True)
    low_limit_switch = Cpt(Switch, ".LLS", kind="omitted", auto_monitor=True)

    def __init__(self, prefix: str = "", *, axis: AxisConfig | None = None, parent=None, **kwargs) -> None:
        self.axis: AxisConfig = axis or getattr(parent.config, kwargs["attr_name"])  # type: ignore[union-attr]
        self._status: Move | None = None
        self._next: Move | None = None
        self._halting = False
        self._status_lock = RLock()
        super().__init__(prefix, parent=parent, **kwargs)

    # -- where it is, where it may go -------------------------------------------------------------
    @property
    def position(self) -> float:
        """Readback, in the axis' unit.

        Raises
        ------
        DisconnectedError
            When the record does not tell any more.
        """
        if not self.user_readback.connected:
            raise DisconnectedError(f"{self.name} is not connected")
        return float(self._position)  # pyright: ignore[reportArgumentType]

    @property
    def limits(self) -> tuple[float, float]:
        """Tighter of the configured limits and the record's (none when its LLM is not below its HLM)."""
        low, high = _number(self.low_limit_travel), _number(self.high_limit_travel)
        if not low < high:
            return self.axis.low, self.axis.high
        return max(low, self.axis.low), min(high, self.axis.high)

    def check_value(self, pos: float) -> None:
        """Refuse a target that is no number, beyond the limits, or that the parent device refuses.

        Raises
        ------
        LimitError
            Names the axis, the target and what forbids it.
        """
        if not math.isfinite(pos):
            raise LimitError(f"{self.name}: cannot move to {pos}")
        low, high = self.limits
        if not low <= pos <= high:
            raise LimitError(f"{self.name}: {pos:g} {self.axis.unit} lies outside [{low:g}, {high:g}]")
        check = getattr(self.parent, "check_move", None)
        if check is not None:
            check(self.attr_name, float(pos))

    @property
    def span(self) -> tuple[float, float]:
        """Extremes between which the axis is or is about to be: readback, setpoint, target of the move."""
        places = [self.position, _number(self.user_setpoint)]
        places += [move.target for move in (self._status, self._next) if move is not None]
        return min(places), max(places)

    # -- motion -----------------------------------------------------------------------------------
    def move_timeout(self, pos: float) -> float:
        """Seconds that a move to `pos` may take: three times what VELO and ACCL promise, and a floor."""
        velocity = abs(_number(self.velocity)) or self.axis.velocity
        promised = abs(pos - self.position) / velocity + 2 * abs(_number(self.acceleration))
        return LEAST_TIMEOUT_S + 3 * promised

    def move(self, position, wait=True, moved_cb=None, timeout=None) -> Move:
        """Begin a move and, with `wait`, see it through.

        Raises
        ------
        LimitError
            Before anything moves.
        MoveError
            With `wait`, when it ends elsewhere; otherwise the returned status holds it.
        """
        position = float(position)
        self.check_value(position)
        if timeout is None:
            timeout = self._timeout or self.move_timeout(position)
        status = Move(self, position, settle_time=self._settle_time)
        call_later(timeout + self._settle_time, lambda: status.done or self._give_up(status, timeout))
        if moved_cb is not None:
            status.add_callback(lambda status: moved_cb(status, obj=self))
        with self._status_lock:
            if self._halting:
                earlier, self._next = self._next, status
            else:
                earlier, self._status = self._status, status
                self._send(status, overtakes=earlier is not None)
        if earlier is not None:
            _fail(earlier, f"{self.name}: sent to {position:g} before it reached {earlier.target:g}")
        if wait:
            try:
                status.wait()
            except KeyboardInterrupt:
                self.stop()
                raise
        return status

    def _send(self, move: Move, overtakes: bool = False) -> None:
        """Write the target. Put-completion stands in for DMOV where a record refuses without toggling it.

        A record at work would hold back a second put with completion, so one that overtakes goes without.
        """
        self._started_moving = self._moving
        if overtakes:
            self.user_setpoint.put(move.target, wait=False, force=True)
        else:
            self.user_setpoint.put(
                move.target,
                wait=False,
                force=True,
                use_complete=True,
                callback=lambda **_: move.done or call_later(DMOV_GRACE_S, lambda: self._put_completed(move)),
            )

    def _put_completed(self, move: Move) -> None:
        """End `move` if DMOV, which comes before put-completion, has not."""
        if self._status is move and not move.done and _number(self.motor_done_move, use_monitor=False):
            self._done_moving()

    def _give_up(self, move: Move, timeout: float) -> None:
        """Fail a move that has taken too long, which stops the motor."""
        unit, here = self.axis.unit, self._position  # as last told: the record may be gone
        where = f"{self.name}: at {here:g} {unit}, sent to {move.target:g} {unit}"
        with suppress(InvalidState):  # it has just ended
            move.set_exception(MoveTimeout(f"{where}: stopped after {timeout:g} s"))

    def stop(self, *, success: bool = False) -> None:
        """Stop; a move under way fails when the record has come to rest, or with `success` ends well at once.

        A move asked for in the meantime begins when the record is at rest.
        """
        with self._status_lock:
            move = self._status
            self._halting = move is not None or self._moving
            if success:
                self._status = None
        if success and move is not None:
            _finish(move)
        self.motor_stop.put(1, wait=False)

    def _done_moving(self, success=True, timestamp=None, value=None, **kwargs) -> None:
        """End the move under way: the record says that it is at rest."""
        if success:
            self._run_subs(sub_type=self.SUB_DONE, timestamp=timestamp, value=value)
        with self._status_lock:
            move, halted = self._status, self._halting
            problem = self._problem(move.target, success, halted) if move is not None else None
            if problem and not halted and not _number(self.motor_done_move, use_monitor=False):
                return  # what has ended is the move that this one overtook
            self._status, self._next, self._halting = self._next, None, False
            if self._status is not None:
                self._send(self._status)
        if move is None:
            return
        if problem:
            _fail(move, problem)
        else:
            _finish(move)

    def _problem(self, target: float, success: bool, halted: bool) -> str | None:
        """Why a move to `target` that has come to rest has failed; None when it has not."""
        here, unit = _number(self.user_readback), self.axis.unit
        if abs(here - target) > self.axis.tolerance:
            here = _number(self.user_readback, use_monitor=False)
        where = f"{self.name}: at {here:g} {unit}, sent to {target:g} {unit}"
        if halted:
            return f"{where}: stopped"
        if abs(here - target) > self.axis.tolerance:
            if not self._started_moving or _number(self.limit_violation):
                return f"{where}: the record refused to move (limit or interlock)"
            return f"{where}: ended {abs(here - target):.3g} {unit} short (tolerance {self.axis.tolerance:g})"
        return None if success else f"{where}: a limit switch is on or the record is in alarm"

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        low, high = self.limits
        moving = f", moving to {self.user_setpoint.get():g}" if self._moving else ""
        return f"{self.name}: {self.position:.6g} {self.axis.unit}{moving}  [{low:g}, {high:g}]"


def _number(signal: EpicsSignalRO | EpicsSignal, **kwargs) -> float:
    return float(signal.get(**kwargs))  # pyright: ignore[reportArgumentType]


def _finish(status: Move) -> None:
    with suppress(InvalidState):  # it was given up
        status.set_finished()


def _fail(status: Move, message: str) -> None:
    with suppress(InvalidState):
        status.set_exception(MoveError(message))
