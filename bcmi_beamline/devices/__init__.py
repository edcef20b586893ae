"""The beamline's devices over Channel Access (ophyd, pyepics): motion, detector, beam.

`make_devices` builds everything a `Beamline` configuration describes and `connect` waits for it. A device
cannot tell a simulated beamline from a real one. What must never happen, a modulator driven into the
crystal or swept out of the diffracted beam, is refused here, where neither a plan nor an interactive
``mv`` gets round it.
"""

from bcmi_beamline.devices.beam import Filters, Monitor, Shutter, ShutterError, Slits
from bcmi_beamline.devices.build import Devices, NotConnectedError, SampleStage, connect, make_devices
from bcmi_beamline.devices.diffractometer import (
    CompensatedRock,
    Diffractometer,
    carrier_turn,
    nominal_setting,
)
from bcmi_beamline.devices.eiger import Eiger, EigerError, EigerPlan
from bcmi_beamline.devices.motor import Motor, MoveError, MoveTimeout
from bcmi_beamline.devices.nanogoniometer import Nanogoniometer

__all__ = [
    "CompensatedRock",
    "Devices",
    "Diffractometer",
    "Eiger",
    "EigerError",
    "EigerPlan",
    "Filters",
    "Monitor",
    "Motor",
    "MoveError",
    "MoveTimeout",
    "Nanogoniometer",
    "NotConnectedError",
    "SampleStage",
    "Shutter",
    "ShutterError",
    "Slits",
    "carrier_turn",
    "connect",
    "make_devices",
    "nominal_setting",
]
