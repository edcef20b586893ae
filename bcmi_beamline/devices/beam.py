"""What makes and measures the beam: shutter, flux monitor, slits, filters, temperatures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache

from ophyd import Component as Cpt
from ophyd import Device, EpicsSignal, EpicsSignalRO, Signal
from ophyd import FormattedComponent as FCpt
from ophyd.status import AndStatus, DeviceStatus, StatusBase
from ophyd.utils import LimitError

from bcmi_beamline.config import FilterConfig, SlitsConfig
from bcmi_beamline.devices.motor import Motor

SHUTTER_TIMEOUT_S = 10.0
FILTER_TIMEOUT_S = 10.0

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
        self._reopen = False
        status = DeviceStatus(self, timeout=SHUTTER_TIMEOUT_S)

        def completed(**_) -> None:
            if int(self.state.get(use_monitor=False)) == wanted:  # pyright: ignore[reportArgumentType]
                status.set_finished()
            else:
                status.set_exception(ShutterError(f"{self!r}, though asked to be {_NAMES[wanted]}"))

        self.state.put(wanted, wait=False, use_complete=True, callback=completed)
        return status

    def pause(self) -> None:
        """Close while the RunEngine pauses: a crystal is not exposed while nobody measures.

        A pause within a pause (two suspenders) does not forget that it was open before the first.
        """
        reopen = self._reopen or self.is_open
        self.set(0).wait(SHUTTER_TIMEOUT_S)
        self._reopen = reopen

    def resume(self) -> None:
        """Open again if `pause` closed it."""
        if self._reopen:
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

    flux = Cpt(EpicsSignalRO, "", kind="hinted", auto_monitor=False)

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        return f"{self.name}: {self.flux.get():.4g} photons/s"


class Slits(Device):
    """Slits before the focusing optics that let the coherent part of the beam through: gaps, centres, um."""

    horizontal = FCpt(Motor, "{self.prefix}{self.config.horizontal.pv}")
    vertical = FCpt(Motor, "{self.prefix}{self.config.vertical.pv}")
    horizontal_centre = FCpt(Motor, "{self.prefix}{self.config.horizontal_centre.pv}")
    vertical_centre = FCpt(Motor, "{self.prefix}{self.config.vertical_centre.pv}")

    def __init__(self, prefix: str, *, name: str, config: SlitsConfig, **kwargs) -> None:
        self.config = config
        super().__init__(prefix, name=name, **kwargs)

    def are_nominal(self) -> bool:
        """Whether both gaps are as the experiment wants them."""
        gaps = (self.horizontal, self.vertical)
        return all(
            abs(gap.position - nominal) <= gap.axis.tolerance
            for gap, nominal in zip(gaps, self.config.nominal_um, strict=True)
        )

    def __repr__(self) -> str:
        return "\n  ".join([f"{self.name}:", *(repr(getattr(self, axis)) for axis in self.component_names)])


class Transmission(Signal):
    """What the filters that are in let through; set it, and the combination that comes nearest goes in."""

    def get(self, **kwargs) -> float:
        """Share of the beam, 0 to 1, at the energy as read."""
        assert isinstance(self.parent, Filters)
        return self.parent.transmits(self.parent.inserted())

    def set(self, value: float, *, timeout=None, settle_time=None) -> StatusBase:
        """Put in the combination whose transmission is nearest to `value` in the logarithm.

        Raises
        ------
        LimitError
            When `value` is no share of the beam.
        """
        assert isinstance(self.parent, Filters)
        return self.parent.insert(self.parent.combination(float(value)))


class Filters(Device):
    """Absorbers in the incident beam; make one with `make_filters`.

    Each filter is a signal under its own name (1: in), `transmission` what they let through together.
    """

    transmission = Cpt(Transmission, kind="hinted")
    config: Mapping[str, FilterConfig] = {}
    energy_ev: Callable[[], float]

    def inserted(self) -> tuple[str, ...]:
        """Names of the filters that are in."""
        return tuple(name for name in self.config if int(getattr(self, name).get()))

    def transmits(self, names: tuple[str, ...]) -> float:
        """Transmission of a combination at the energy as read (xraydb, tabulated densities)."""
        energy_ev = self.energy_ev()
        depth = sum(
            self.config[name].thickness_um * 1e-4 * _absorption_per_cm(self.config[name].material, energy_ev)
            for name in names
        )
        return math.exp(-depth)

    def combination(self, transmission: float) -> tuple[str, ...]:
        """Filters that come nearest to `transmission`.

        Raises
        ------
        LimitError
            When it is not within (0, 1].
        """
        if not 0 < transmission <= 1:
            raise LimitError(f"{self.name}: a transmission lies within (0, 1], not {transmission:g}")
        choices = (c for n in range(len(self.config) + 1) for c in itertools.combinations(self.config, n))
        return min(choices, key=lambda names: abs(math.log(self.transmits(names) / transmission)))

    def insert(self, names: tuple[str, ...]) -> StatusBase:
        """Have exactly these filters in; those that come in move at once with those that leave."""
        status: StatusBase | None = None
        for name in self.config:
            moved = getattr(self, name).set(int(name in names), timeout=FILTER_TIMEOUT_S)
            status = moved if status is None else AndStatus(status, moved)
        assert status is not None
        return status

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        inserted = ", ".join(self.inserted()) or "none in"
        return f"{self.name}: {inserted}, transmission {self.transmission.get():.3g}"


@cache
def _absorption_per_cm(material: str, energy_ev: float) -> float:
    """Linear attenuation coefficient, 1/cm; elements at their tabulated density."""
    import xraydb

    try:
        density = xraydb.atomic_density(material)
    except ValueError:  # no element: a compound that the tables know
        density = None
    return float(xraydb.material_mu(material, energy_ev, density=density))


def make_filters(
    prefix: str, *, name: str, config: Mapping[str, FilterConfig], energy_ev: Callable[[], float]
) -> Filters:
    """Filters of the configuration.

    Parameters
    ----------
    config : mapping
        By name; a name must not be one of an attribute of `Filters`.
    energy_ev : callable
        Reads the energy.
    """
    parts = {key: Cpt(EpicsSignal, item.pv, kind="config") for key, item in config.items()}
    filters = type("Filters", (Filters,), {**parts, "config": dict(config)})(prefix, name=name)
    filters.energy_ev = energy_ev
    return filters


def make_temperatures(prefix: str, *, name: str, config: Mapping[str, str]) -> Device:
    """Read-only temperatures, deg C, each under its own name."""
    parts = {key: Cpt(EpicsSignalRO, pv, kind="hinted") for key, pv in config.items()}
    return type("Temperatures", (_Readings,), parts)(prefix, name=name)


class _Readings(Device):
    """Values of one unit that are only read."""

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        return f"{self.name}: " + ", ".join(f"{k} {getattr(self, k).get():.2f}" for k in self.component_names)
