"""Compare what a configuration says with what answers: the first thing to do on a new beamline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bcmi_beamline.config import AxisConfig
from bcmi_beamline.devices.build import Devices, signals_of
from bcmi_beamline.devices.motor import Motor

Verdict = Literal["ok", "differs", "silent"]

_UNITS = {
    "um": {"um", "µm", "micron", "microns", "micrometer", "micrometers"},
    "mm": {"mm", "millimeter", "millimeters"},
    "deg": {"deg", "degree", "degrees", "°"},
    "keV": {"kev"},
}
"""How records spell the units of a configuration, in lower case."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    device: str
    pv: str
    verdict: Verdict
    value: str
    """What it reads, with its unit."""
    remarks: tuple[str, ...] = ()
    """What differs from the configuration, one short sentence each."""


def check_devices(devices: Devices, timeout_s: float = 5.0) -> list[Finding]:
    """Look at everything the configuration names: does it answer, and is it what is expected?

    A motor is one line: its record is compared with the configured unit, limits, velocity and direction.
    What else a device has is one line where all of it answers, and one line for each process variable that
    does not. Nothing is written and nothing moves.

    Parameters
    ----------
    devices : Devices
        Need not be connected.
    timeout_s : float
        How long to wait for answers, all at once.

    Returns
    -------
    list of Finding
        In the order of `Devices.all`.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [signal for device in devices.all() for signal in signals_of(device)]
    while time.monotonic() < deadline and (waiting := [s for s in waiting if not s.connected]):
        time.sleep(0.05)
    return [finding for device in devices.all() for finding in _look_at(device)]


def _look_at(device) -> Iterator[Finding]:
    motors = [m for m in _descend(device) if isinstance(m, Motor)]
    of_motors = {signal for motor in motors for signal in signals_of(motor)}
    for motor in motors:
        yield _look_at_motor(motor)
    others = [s for s in signals_of(device) if s not in of_motors and hasattr(s, "pvname")]  # not soft ones
    answering = [signal for signal in others if signal.connected]
    if answering:
        value = "" if len(answering) > 1 else str(answering[0].get())
        pvs = answering[0].pvname if len(answering) == 1 else f"{device.prefix}... ({len(answering)})"
        yield Finding(device.name, pvs, "ok", value)
    for signal in others:
        if not signal.connected:
            yield Finding(signal.name, signal.pvname, "silent", "")


def _descend(device) -> Iterator:
    yield device
    for name in getattr(device, "component_names", ()):
        yield from _descend(getattr(device, name))


def _look_at_motor(motor: Motor) -> Finding:
    silent = [signal.pvname for signal in signals_of(motor) if not signal.connected]
    if silent:
        shown = f"no answer from {len(silent)} of its fields: {', '.join(silent[:3])}"
        return Finding(motor.name, motor.prefix, "silent", "", (shown,))
    remarks = tuple(_differences(motor, motor.axis))
    value = f"{motor.position:.5g} {motor.motor_egu.get()}"
    return Finding(motor.name, motor.prefix, "differs" if remarks else "ok", value, remarks)


def _differences(motor: Motor, axis: AxisConfig) -> Iterator[str]:
    """What the record and the configuration do not agree on."""
    unit = str(motor.motor_egu.get())
    if unit.strip().lower() not in _UNITS[axis.unit]:
        yield f"unit is {unit!r}, configured {axis.unit}"
    low, high = float(motor.low_limit_travel.get()), float(motor.high_limit_travel.get())
    if not low < high:
        yield f"the record has no limits; only the configured [{axis.low:g}, {axis.high:g}] hold"
    elif low > axis.low or high < axis.high:
        yield f"limits [{low:g}, {high:g}] are tighter than the configured [{axis.low:g}, {axis.high:g}]"
    velocity = float(motor.velocity.get())
    if not math.isclose(velocity, axis.velocity, rel_tol=0.01):
        yield f"velocity is {velocity:g} {axis.unit}/s, configured {axis.velocity:g}"
    if motor.user_offset_dir.get(as_string=True) not in ("Pos", "0"):
        yield "direction is Neg: check the sense that the configuration takes it to have"
    if not axis.low <= motor.position <= axis.high:
        yield f"stands at {motor.position:g}, outside the configured [{axis.low:g}, {axis.high:g}]"
