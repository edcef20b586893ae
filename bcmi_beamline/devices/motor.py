"""A motor record that is safe to move thousands of times and honest about where it ended."""

from __future__ import annotations

import math
from threading import Lock

from ophyd import Component as Cpt
from ophyd import EpicsMotor, EpicsSignal
from ophyd.status import MoveStatus
from ophyd.utils import LimitError

from bcmi_beamline.config import AxisConfig

LEAST_TIMEOUT_S = 10.0
"""No move is given less time than this."""


class MoveError(RuntimeError):
    """A move that did not end where it was sent."""


class Setpoint(EpicsSignal):
    """The VAL field; checks what the motor checks, so that writing to it directly gets round nothing."""

    def check_value(self, value) -> None:
        """Ask the motor."""
        self.parent.check_value(value)


class Motor(EpicsMotor):
    """An EPICS motor within configured limits whose moves always end, well or with a reason.

    It differs from `ophyd.EpicsMotor` in that

    - each move owns its status. ophyd keeps one list of callbacks for all moves and clears it after running
      it, which wipes a move that a callback's consumer has just begun, and that move never ends;
    - each move has a timeout, from its length and the record's own VELO and ACCL;
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

    def __init__(self, prefix: str = "", *, axis: AxisConfig | None = None, parent=None, **kwargs) -> None:
        self.axis: AxisConfig = axis or getattr(parent.config, kwargs["attr_name"])
        self._status: MoveStatus | None = None
        self._status_lock = Lock()
        self._stopped = False
        super().__init__(prefix, parent=parent, **kwargs)

    # -- limits -----------------------------------------------------------------------------------
    @property
    def limits(self) -> tuple[float, float]:
        """Tighter of the configured limits and the record's (none when its LLM is not below its HLM)."""
        low, high = self.low_limit_travel.get(), self.high_limit_travel.get()
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
        places = [self.position, self.user_setpoint.get()]
        move = self._status
        if move is not None:
            places.append(move.target)
        return min(places), max(places)

    # -- motion -----------------------------------------------------------------------------------
    def move_timeout(self, pos: float) -> float:
        """Seconds that a move to `pos` may take: three times what VELO and ACCL promise, and a floor."""
        velocity = self.velocity.get() or self.axis.velocity
        promised = abs(pos - self.position) / abs(velocity) + 2 * abs(self.acceleration.get())
        return LEAST_TIMEOUT_S + 3 * promised

    def move(self, position, wait=True, moved_cb=None, timeout=None) -> MoveStatus:
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
        status = MoveStatus(self, position, timeout=timeout, settle_time=self._settle_time)
        if moved_cb is not None:
            status.add_callback(lambda status: moved_cb(status, obj=self))
        self._started_moving = self._stopped = False
        earlier = self._exchange(status)
        if earlier is not None:
            _fail(
                earlier,
                f"{self.name}: sent to {position:g} {self.axis.unit} before it reached {earlier.target:g}",
            )
        self.user_setpoint.put(position, wait=False, force=True)
        if wait:
            try:
                status.wait()
            except KeyboardInterrupt:
                self.stop()
                raise
        return status

    def stop(self, *, success: bool = False) -> None:
        """Stop; a move under way ends when the record has come to rest, as a failure unless `success`."""
        self._stopped = not success
        if success:
            move = self._exchange(None)
            if move is not None:
                _finish(move)
        self.motor_stop.put(1, wait=False)

    def _exchange(self, status: MoveStatus | None) -> MoveStatus | None:
        """Put `status` in place of the move under way and return that one if it is not over."""
        with self._status_lock:
            earlier, self._status = self._status, status
        return earlier if earlier is not None and not earlier.done else None

    def _done_moving(self, success=True, timestamp=None, value=None, **kwargs) -> None:
        """End the move under way: the record says that it is at rest."""
        if success:
            self._run_subs(sub_type=self.SUB_DONE, timestamp=timestamp, value=value)
        move = self._exchange(None)
        if move is None:
            return
        problem = self._problem(move.target, success)
        if problem:
            _fail(move, problem)
        else:
            _finish(move)

    def _problem(self, target: float, success: bool) -> str | None:
        """Why a move to `target` that has come to rest has failed; None when it has not."""
        here, unit = self.user_readback.get(), self.axis.unit
        if abs(here - target) > self.axis.tolerance:
            here = self.user_readback.get(use_monitor=False)
        where = f"{self.name}: at {here:g} {unit}, sent to {target:g} {unit}"
        if self._stopped:
            return f"{where}: stopped"
        if abs(here - target) > self.axis.tolerance:
            return f"{where}: ended {abs(here - target):.3g} {unit} short (tolerance {self.axis.tolerance:g})"
        return None if success else f"{where}: a limit switch is on or the record is in alarm"

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        low, high = self.limits
        moving = f", moving to {self.user_setpoint.get():g}" if self._moving else ""
        return f"{self.name}: {self.position:.6g} {self.axis.unit}{moving}  [{low:g}, {high:g}]"


def _finish(status: MoveStatus) -> None:
    if not status.done:
        status.set_finished()


def _fail(status: MoveStatus, message: str) -> None:
    if not status.done:
        status.set_exception(MoveError(message))
