"""The circles that carry crystal, modulator and detector."""

from __future__ import annotations

import math

from ophyd import Device
from ophyd import FormattedComponent as FCpt
from ophyd.utils import LimitError

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices.motor import Motor
from bcmi_beamline.devices.nanogoniometer import Nanogoniometer

CIRCLES: tuple[str, ...] = ("mu", "eta", "phi", "nu", "delta")
CARRIES_MODULATOR = ("mu", "eta")
"""The nanogoniometer rides on eta, eta on mu."""


def nominal_setting(beamline: Beamline) -> dict[str, float]:
    """Readings of the circles at the Bragg peak as configured, deg.

    The arm stands at two theta, the rocking circle at its nominal reading, everything else at zero.
    """
    geometry = beamline.geometry()
    setting = dict.fromkeys(CIRCLES, 0.0)
    setting[beamline.rocking_circle] = beamline.reflection.rocking_nominal_deg
    circles = beamline.diffractometer
    if beamline.arm == "horizontal":  # z turns to +x about +y
        setting["nu"] = circles.nu.sense * geometry.arm_sign * math.degrees(geometry.two_theta)
    else:  # z turns to +y about -x
        setting["delta"] = -circles.delta.sense * geometry.arm_sign * math.degrees(geometry.two_theta)
    return setting


class Diffractometer(Device):
    """Circles mu, eta, phi (crystal; mu and eta also carry the modulator), nu, delta (detector), all deg.

    Unless the modulator is out, each circle stays within ``modulator_cone_deg`` of the Bragg setting, and the
    rocking circle does not move at all where it would sweep the modulator through the beam.

    Parameters
    ----------
    prefix : str
        Put before the record names of the configuration.
    beamline : Beamline
        Circles and Bragg geometry.
    nanogoniometer : Nanogoniometer
        Whose modulator is to be protected.

    Attributes
    ----------
    nominal_deg : dict
        Readings at the Bragg peak as configured.
    """

    mu = FCpt(Motor, "{self.prefix}{self.config.mu.pv}")
    eta = FCpt(Motor, "{self.prefix}{self.config.eta.pv}")
    phi = FCpt(Motor, "{self.prefix}{self.config.phi.pv}")
    nu = FCpt(Motor, "{self.prefix}{self.config.nu.pv}")
    delta = FCpt(Motor, "{self.prefix}{self.config.delta.pv}")

    def __init__(
        self, prefix: str, *, name: str, beamline: Beamline, nanogoniometer: Nanogoniometer, **kwargs
    ) -> None:
        self.config = beamline.diffractometer
        self.rocking_circle = beamline.rocking_circle
        self.nominal_deg = nominal_setting(beamline)
        self.nanogoniometer = nanogoniometer
        super().__init__(prefix, name=name, **kwargs)

    @property
    def rock(self) -> Motor:
        """The circle that rocks the crystal."""
        return getattr(self, self.rocking_circle)

    def strays(self) -> list[str]:
        """Circles that are, or are about to be, further from the Bragg setting than a modulator allows."""
        cone = self.config.modulator_cone_deg
        found = []
        for name in CIRCLES:
            low, high = getattr(self, name).span
            nominal = self.nominal_deg[name]
            if max(abs(low - nominal), abs(high - nominal)) > cone:
                found.append(f"{name} is not within {cone:g} deg of {nominal:.3f}")
        return found

    def check_move(self, circle: str, position: float) -> None:
        """Refuse a target that is not safe, or of no use, with the modulator in.

        Raises
        ------
        LimitError
            Says which circle, why, and what to do.
        """
        if self.nanogoniometer.is_out():
            return
        motor: Motor = getattr(self, circle)
        step = abs(position - motor.position)
        if circle == self.rocking_circle and circle in CARRIES_MODULATOR and step > motor.axis.tolerance:
            sweep = math.radians(step) * self.nanogoniometer.distance_um()
            raise LimitError(
                f"{motor.name}: {circle} carries the modulator; rocking it by {step:.4g} deg would sweep it "
                f"{sweep:.2f} um through the beam: take the modulator out first"
            )
        nominal, cone = self.nominal_deg[circle], self.config.modulator_cone_deg
        if abs(position - nominal) > cone:
            raise LimitError(
                f"{motor.name}: {position:g} deg lies outside [{nominal - cone:.4g}, {nominal + cone:.4g}], "
                "the Bragg setting allowed with the modulator in: take the modulator out first"
            )

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        return "\n  ".join(
            [f"{self.name}: rocks {self.rocking_circle}"] + [repr(getattr(self, c)) for c in CIRCLES]
        )
