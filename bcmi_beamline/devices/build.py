"""From a configuration to connected devices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ophyd import Device, EpicsSignalRO, Signal
from ophyd import FormattedComponent as FCpt
from ophyd.utils import LimitError

from bcmi_beamline.config import Beamline, SampleStageConfig
from bcmi_beamline.devices import guards
from bcmi_beamline.devices.beam import Filters, Monitor, Shutter, Slits, make_filters, make_temperatures
from bcmi_beamline.devices.diffractometer import CompensatedRock, Diffractometer
from bcmi_beamline.devices.eiger import Eiger
from bcmi_beamline.devices.motor import Motor
from bcmi_beamline.devices.nanogoniometer import Nanogoniometer


class NotConnectedError(ConnectionError):
    """Process variables that did not answer, grouped by device."""


class SampleStage(Device):
    """Piezo stage that puts the crystal in the beam: x, y, z (laboratory frame), um.

    Unless the modulator is out, it stays within ``modulator_reach_um`` of where it was as that came in.
    """

    x = FCpt(Motor, "{self.prefix}{self.config.x.pv}")
    y = FCpt(Motor, "{self.prefix}{self.config.y.pv}")
    z = FCpt(Motor, "{self.prefix}{self.config.z.pv}")

    def __init__(
        self,
        prefix: str,
        *,
        name: str,
        config: SampleStageConfig,
        nanogoniometer: Nanogoniometer | None = None,
        **kwargs,
    ) -> None:
        self.config = config
        self.nanogoniometer = nanogoniometer
        self._home: dict[str, float] | None = None
        super().__init__(prefix, name=name, **kwargs)

    def check_move(self, axis: str, position: float) -> None:
        """Refuse to go to another crystal with the modulator in.

        Raises
        ------
        LimitError
            Says how far it would be and what to do first.
        """
        if self.nanogoniometer is None or self.nanogoniometer.is_out():
            self._home = None
            return
        if self._home is None:
            self._home = {name: float(getattr(self, name).position) for name in ("x", "y", "z")}
        reason = guards.refuse_exchange(self.config.modulator_reach_um, axis, position, self._home[axis])
        if reason:
            raise LimitError(f"{getattr(self, axis).name}: {reason}")

    def __repr__(self) -> str:
        return "\n  ".join([f"{self.name}:", repr(self.x), repr(self.y), repr(self.z)])


@dataclass(frozen=True)
class Devices:
    """Everything a plan may touch, and the configuration it was made from."""

    beamline: Beamline
    nanogoniometer: Nanogoniometer
    diffractometer: Diffractometer
    sample_stage: SampleStage
    eiger: Eiger
    shutter: Shutter
    monitor: Monitor
    ring_current: EpicsSignalRO
    sentinel: Signal
    """1 while a frame is taken that belongs to no point of the scan."""
    rock_with_modulator: Any
    """Rocks the crystal with the modulator in: the circle itself where it leaves the modulator still, else a
    `CompensatedRock`."""
    slits: Slits | None = None
    energy: Motor | None = None
    """Of the monochromator, keV."""
    focus: Motor | None = None
    """Place of the lenses along the beam, mm."""
    filters: Filters | None = None
    temperatures: Device | None = None

    def all(self) -> tuple:
        """Every device, detectors and shutter last."""
        return (
            self.nanogoniometer,
            self.diffractometer,
            self.sample_stage,
            *self.conditions(),
            self.monitor,
            self.eiger,
            self.shutter,
        )

    def conditions(self) -> tuple:
        """What is recorded before and after every run."""
        chosen = (self.ring_current, self.energy, self.slits, self.focus, self.filters, self.temperatures)
        return tuple(device for device in chosen if device is not None)

    def __repr__(self) -> str:
        lines = [f"{self.beamline.name}:"]
        for device in self.all():
            plain = device is self.ring_current
            lines.append(f"ring_current: {self.ring_current.get():.4g} mA" if plain else repr(device))
        return "\n".join(lines)


def make_devices(beamline: Beamline, prefix: str | None = None) -> Devices:
    """Make every device of `beamline`; nothing waits for a connection yet.

    Parameters
    ----------
    beamline : Beamline
        Its process variables.
    prefix : str, optional
        In place of ``beamline.prefix``.
    """
    pre = beamline.prefix if prefix is None else prefix
    nanogoniometer = Nanogoniometer(pre, name="nanogoniometer", config=beamline.nanogoniometer)
    mono, focus = beamline.monochromator, beamline.focus
    energy = Motor(pre + mono.energy.pv, axis=mono.energy, name="energy") if mono else None

    def energy_ev() -> float:
        return beamline.energy_ev if energy is None else energy.position * 1e3

    diffractometer = Diffractometer(
        pre, name="diffractometer", beamline=beamline, nanogoniometer=nanogoniometer, energy_ev=energy_ev
    )
    nanogoniometer.diffractometer = diffractometer
    carries = beamline.rocking_circle in guards.CARRIES_MODULATOR
    return Devices(
        beamline=beamline,
        nanogoniometer=nanogoniometer,
        diffractometer=diffractometer,
        sample_stage=SampleStage(
            pre, name="sample_stage", config=beamline.sample_stage, nanogoniometer=nanogoniometer
        ),
        eiger=Eiger(pre + beamline.eiger.prefix, name="eiger", config=beamline.eiger),
        shutter=Shutter(pre + beamline.shutter_pv, name="shutter"),
        monitor=Monitor(pre + beamline.monitor_pv, name="monitor"),
        ring_current=EpicsSignalRO(pre + beamline.ring_current_pv, name="ring_current", auto_monitor=True),
        sentinel=Signal(name="sentinel", value=0),
        rock_with_modulator=(
            CompensatedRock("rock_with_modulator", diffractometer) if carries else diffractometer.rock
        ),
        slits=Slits(pre, name="slits", config=beamline.slits) if beamline.slits else None,
        energy=energy,
        focus=Motor(pre + focus.z.pv, axis=focus.z, name="focus") if focus else None,
        filters=(
            make_filters(pre, name="filters", config=beamline.filters, energy_ev=energy_ev)
            if beamline.filters
            else None
        ),
        temperatures=(
            make_temperatures(pre, name="temperatures", config=beamline.temperatures)
            if beamline.temperatures
            else None
        ),
    )


def signals_of(device) -> Iterator:
    """Every signal of a device, or the device itself where it is one."""
    if isinstance(device, Device):
        for walk in device.walk_signals():
            yield walk.item
    else:
        yield device


def _silent_pvs(device) -> list[str]:
    """Process variables of a device that are not connected."""
    pvs = [
        pv
        for signal in signals_of(device)
        if not signal.connected and hasattr(signal, "_read_pv")
        for pv in (signal._read_pv, getattr(signal, "_write_pv", None))
        if pv is not None and not pv.connected
    ]
    return list(dict.fromkeys(pv.pvname for pv in pvs))


def _by_record(pvs: list[str]) -> list[str]:
    """The same with the fields of one record, where there are several, as one entry."""
    fields: dict[str, list[str]] = {}
    for pv in pvs:
        record, _, field = pv.partition(".")
        fields.setdefault(record, []).append(field)
    return [
        f"{record} ({len(names)} fields)" if len(names) > 1 else f"{record}.{names[0]}".rstrip(".")
        for record, names in fields.items()
    ]


def connect(devices: Devices, timeout: float = 5.0) -> Devices:
    """Wait for every process variable of every device, all at once.

    A busy IOC is given time: what is waited for is `timeout` seconds in which none has answered.

    Returns
    -------
    Devices
        The same, connected.

    Raises
    ------
    NotConnectedError
        One message that names each process variable without an answer.
    """
    waiting = [signal for device in devices.all() for signal in signals_of(device)]
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        still = [signal for signal in waiting if not signal.connected]
        if len(still) < len(waiting):
            waiting, deadline = still, time.monotonic() + timeout
        time.sleep(0.02)
    silent = {device.name: pvs for device in devices.all() if (pvs := _silent_pvs(device))}
    if silent:
        lines = "\n".join(f"  {name}: {', '.join(_by_record(pvs))}" for name, pvs in silent.items())
        total = sum(map(len, silent.values()))
        raise NotConnectedError(
            f"{total} process variables of {devices.beamline.name} did not answer within {timeout:g} s; "
            f"is the IOC running and EPICS_CA_ADDR_LIST right? (bcmi check looks at each)\n{lines}"
        )
    for device in devices.all():
        device.wait_for_connection(timeout=timeout)
    return devices
