"""What makes and measures the beam: shutter, flux monitor."""

from __future__ import annotations

from ophyd import Component as Cpt
from ophyd import Device, EpicsSignal, EpicsSignalRO
from ophyd.status import DeviceStatus

SHUTTER_TIMEOUT_S = 10.0

_STATES = {"open": 1, "1": 1, "true": 1, "closed": 0, "close": 0, "0": 0, "false": 0}
_NAMES = ("closed", "open")


class ShutterError(RuntimeError):
    """The shutter did not do as told."""


class Shutter(Device):
    """Fast shutter: set it to 1, ``"open"``, 0 or ``"closed"``; reads 1 when open."""

    state = Cpt(EpicsSignal, "", kind="hinted", auto_monitor=True)

    def __init__(self, prefix: str, *, name: str, **kwargs) -> None:
        super().__init__(prefix, name=name, **kwargs)
        self.state.name = name
        self._reopen = False

    def check_value(self, value) -> int:
        """1 for open, 0 for closed.

        Raises
        ------
        ValueError
            For anything else.
        """
        wanted = _STATES.get(str(int(value) if isinstance(value, (bool, float)) else value).lower())
        if wanted is None:
            raise ValueError(f"{self.name}: set it to 'open' or 'closed' (1 or 0), not {value!r}")
        return wanted

    def set(self, value) -> DeviceStatus:
        """Open or close; done when the shutter has, within 10 s.

        Raises
        ------
        ValueError
            For anything but open or closed; the status holds a `ShutterError` when it does not move.
        """
        wanted = self.check_value(value)
        status = DeviceStatus(self, timeout=SHUTTER_TIMEOUT_S)

        def completed(**_) -> None:
            if int(self.state.get(use_monitor=False)) == wanted:  # pyright: ignore[reportArgumentType]
                status.set_finished()
            else:
                status.set_exception(ShutterError(f"{self!r}, though asked to be {_NAMES[wanted]}"))

        self.state.put(wanted, wait=False, use_complete=True, callback=completed)
        return status

    def pause(self) -> None:
        """Close while the RunEngine pauses: a crystal is not exposed while nobody measures."""
        self._reopen = self.is_open
        if self._reopen:
            self.set(0).wait(SHUTTER_TIMEOUT_S)

    def resume(self) -> None:
        """Open again if `pause` closed it."""
        if self._reopen:
            self._reopen = False
            self.set(1).wait(SHUTTER_TIMEOUT_S)

    @property
    def is_open(self) -> bool:
        """Whether the shutter reports that it is open."""
        return bool(self.state.get(use_monitor=False))

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        return f"{self.name}: {_NAMES[self.is_open]}"


class Monitor(Device):
    """Incident beam monitor, photons per second."""

    flux = Cpt(EpicsSignalRO, "", kind="hinted")
