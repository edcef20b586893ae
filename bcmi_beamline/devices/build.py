"""From a configuration to connected devices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ophyd import Device, EpicsSignalRO
from ophyd import FormattedComponent as FCpt

from bcmi_beamline.config import Beamline, SampleStageConfig
from bcmi_beamline.devices.beam import Monitor, Shutter
from bcmi_beamline.devices.diffractometer import Diffractometer
from bcmi_beamline.devices.eiger import Eiger
from bcmi_beamline.devices.motor import Motor
from bcmi_beamline.devices.nanogoniometer import Nanogoniometer


class NotConnectedError(ConnectionError):
    """Process variables that did not answer, grouped by device."""


class SampleStage(Device):
    """Piezo stage that puts the crystal in the beam: x, y, z (laboratory frame), um."""

    x = FCpt(Motor, "{self.prefix}{self.config.x.pv}")
    y = FCpt(Motor, "{self.prefix}{self.config.y.pv}")
    z = FCpt(Motor, "{self.prefix}{self.config.z.pv}")

    def __init__(self, prefix: str, *, name: str, config: SampleStageConfig, **kwargs) -> None:
        self.config = config
        super().__init__(prefix, name=name, **kwargs)


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

    def all(self) -> tuple:
        """Every device, detectors and shutter last."""
        return (
            self.nanogoniometer,
            self.diffractometer,
            self.sample_stage,
            self.ring_current,
            self.monitor,
            self.eiger,
            self.shutter,
        )


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
    diffractometer = Diffractometer(
        pre, name="diffractometer", beamline=beamline, nanogoniometer=nanogoniometer
    )
    nanogoniometer.diffractometer = diffractometer
    return Devices(
        beamline=beamline,
        nanogoniometer=nanogoniometer,
        diffractometer=diffractometer,
        sample_stage=SampleStage(pre, name="sample_stage", config=beamline.sample_stage),
        eiger=Eiger(pre + beamline.eiger.prefix, name="eiger", config=beamline.eiger),
        shutter=Shutter(pre + beamline.shutter_pv, name="shutter"),
        monitor=Monitor(pre + beamline.monitor_pv, name="monitor"),
        ring_current=EpicsSignalRO(pre + beamline.ring_current_pv, name="ring_current", auto_monitor=True),
    )


def _signals(device) -> Iterator:
    if isinstance(device, Device):
        for walk in device.walk_signals():
            yield walk.item
    else:
        yield device


def _silent_pvs(device) -> list[str]:
    """Process variables of a device that are not connected."""
    pvs = [
        pv
        for signal in _signals(device)
        if not signal.connected
        for pv in (signal._read_pv, getattr(signal, "_write_pv", None))
        if pv is not None and not pv.connected
    ]
    return list(dict.fromkeys(pv.pvname for pv in pvs))


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
    waiting = [signal for device in devices.all() for signal in _signals(device)]
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        still = [signal for signal in waiting if not signal.connected]
        if len(still) < len(waiting):
            waiting, deadline = still, time.monotonic() + timeout
        time.sleep(0.02)
    silent = {device.name: pvs for device in devices.all() if (pvs := _silent_pvs(device))}
    if silent:
        lines = "\n".join(f"  {name}: {', '.join(pvs)}" for name, pvs in silent.items())
        total = sum(map(len, silent.values()))
        raise NotConnectedError(
            f"{total} process variables of {devices.beamline.name} did not answer within {timeout:g} s; "
            f"is the IOC running and EPICS_CA_ADDR_LIST right?\n{lines}"
        )
    for device in devices.all():
        device.wait_for_connection(timeout=timeout)
    return devices
