"""The circles that carry crystal, modulator and detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from ophyd import Device
from ophyd import FormattedComponent as FCpt
from ophyd.status import StatusBase
from ophyd.utils import LimitError

from bcmi_beamline.config import Beamline, CircleConfig
from bcmi_beamline.devices import guards, pose_math
from bcmi_beamline.devices.guards import CIRCLES
from bcmi_beamline.devices.motor import Motor
from bcmi_beamline.devices.nanogoniometer import Nanogoniometer
from bcmi_beamline.geometry import rotation_matrix


def nominal_setting(beamline: Beamline, energy_ev: float | None = None) -> dict[str, float]:
    """Readings of the circles at the Bragg peak as configured, deg.

    The arm stands at two theta, the rocking circle at its nominal reading, everything else at zero. Both
    follow the Bragg angle to another energy.

    Parameters
    ----------
    beamline : Beamline
    energy_ev : float, optional
        In place of the configured one, at which ``rocking_nominal_deg`` holds.
    """
    configured = beamline.geometry()
    geometry = configured if energy_ev is None else replace(configured, energy_ev=energy_ev)
    circles, sign = beamline.diffractometer, geometry.arm_sign
    change = sign * math.degrees(geometry.bragg_angle - configured.bragg_angle)
    arm = sign * math.degrees(geometry.two_theta)
    setting = dict.fromkeys(CIRCLES, 0.0)
    rocking: CircleConfig = getattr(circles, beamline.rocking_circle)
    if beamline.arm == "horizontal":  # z turns to +x about +y
        setting["nu"] = circles.nu.sense * arm
    else:  # z turns to +y about -x
        setting["delta"], change = -circles.delta.sense * arm, -change
    setting[beamline.rocking_circle] = beamline.reflection.rocking_nominal_deg + rocking.sense * change
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
    energy_ev : callable, optional
        Reads the energy; that of the configuration where it says None.
    """

    mu = FCpt(Motor, "{self.prefix}{self.config.mu.pv}")
    eta = FCpt(Motor, "{self.prefix}{self.config.eta.pv}")
    phi = FCpt(Motor, "{self.prefix}{self.config.phi.pv}")
    nu = FCpt(Motor, "{self.prefix}{self.config.nu.pv}")
    delta = FCpt(Motor, "{self.prefix}{self.config.delta.pv}")

    def __init__(
        self,
        prefix: str,
        *,
        name: str,
        beamline: Beamline,
        nanogoniometer: Nanogoniometer,
        energy_ev: Callable[[], float | None] = lambda: None,
        **kwargs,
    ) -> None:
        self.config = beamline.diffractometer
        self.rocking_circle = beamline.rocking_circle
        self.beamline = beamline
        self.nanogoniometer = nanogoniometer
        self.energy_ev = energy_ev
        self._compensated: tuple[str, float] | None = None
        super().__init__(prefix, name=name, **kwargs)

    @property
    def rock(self) -> Motor:
        """The circle that rocks the crystal."""
        return getattr(self, self.rocking_circle)

    @property
    def nominal_deg(self) -> dict[str, float]:
        """Readings at the Bragg peak as configured, at the energy as read."""
        return nominal_setting(self.beamline, self.energy_ev())

    def strays(self) -> list[str]:
        """Circles that are, or are about to be, further from the Bragg setting than a modulator allows."""
        spans = {name: getattr(self, name).span for name in CIRCLES}
        return guards.strays(self.config, self.nominal_deg, spans)

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
        if self._compensated == (circle, position):
            reason = guards.refuse_cone(self.config, self.nominal_deg, circle, position)
        else:
            reason = guards.refuse_circle(
                self.config,
                self.nominal_deg,
                circle,
                position,
                motor.position,
                rocks=circle == self.rocking_circle,
                distance_um=self.nanogoniometer.distance_um(),
            )
        if reason:
            raise LimitError(f"{motor.name}: {reason}")

    @contextmanager
    def compensating(self, circle: str, position: float) -> Iterator[None]:
        """Let a circle that carries the modulator go to `position`: who asks moves the modulator too."""
        self._compensated = (circle, position)
        try:
            yield
        finally:
            self._compensated = None

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        return "\n  ".join(
            [f"{self.name}: rocks {self.rocking_circle}"] + [repr(getattr(self, c)) for c in CIRCLES]
        )


def carrier_turn(beamline: Beamline, from_deg: float, to_deg: float) -> np.ndarray:
    """Rotation of the stage that the rocking circle carries, in the detector frame, shape (3, 3)."""
    circle: CircleConfig = getattr(beamline.diffractometer, beamline.rocking_circle)
    frame = beamline.geometry().detector_frame
    turn = rotation_matrix(circle.axis, circle.sense * math.radians(to_deg - from_deg))
    return frame @ turn @ frame.T


class CompensatedRock:
    """Rocks a circle that carries the modulator while the nanogoniometer holds the modulator in the beam.

    Set it to an angle: circle and nanogoniometer go there together, so that the membrane stands still against
    the diffracted beam. What it holds is the pose in which it finds the nanogoniometer; tilt or shift that,
    and from then on it holds the new one. It may go where the guard of the circles lets the modulator go.

    Parameters
    ----------
    name : str
    diffractometer : Diffractometer
    """

    def __init__(self, name: str, diffractometer: Diffractometer) -> None:
        self.name, self.parent = name, None
        self._diffractometer = diffractometer
        self._held: tuple[float, dict[str, float]] | None = None
        self._sent: dict[str, float] = {}

    @property
    def circle(self) -> Motor:
        """The circle that rocks."""
        return self._diffractometer.rock

    @property
    def position(self) -> float:
        """Readback of the circle, deg."""
        return self.circle.position

    def pose(self, angle_deg: float) -> dict[str, float]:
        """Where the nanogoniometer has to be with the circle at `angle_deg`."""
        nano = self._diffractometer.nanogoniometer
        now = {axis: float(getattr(nano, axis).user_setpoint.get()) for axis in pose_math.AXES}
        if self._held is None or any(abs(now[a] - self._sent.get(a, math.inf)) > 1e-6 for a in now):
            self._held, self._sent = (self.position, now), now
        from_deg, pose = self._held
        turn = carrier_turn(self._diffractometer.beamline, from_deg, angle_deg)
        return pose_math.carried(pose, turn, nano.pivot_um, nano.config.distance_at_z0_um)

    def set(self, angle_deg: float) -> StatusBase:
        """Go to `angle_deg`, the modulator with it; done when all six axes are.

        Raises
        ------
        LimitError
            When one of them may not; none has moved then.
        """
        diffractometer = self._diffractometer
        nano = diffractometer.nanogoniometer
        pose = self.pose(float(angle_deg))
        with diffractometer.compensating(diffractometer.rocking_circle, float(angle_deg)):
            self.circle.check_value(float(angle_deg))
            for axis, value in pose.items():
                getattr(nano, axis).check_value(value)
            statuses: list[StatusBase] = [self.circle.set(float(angle_deg))]
        statuses += [getattr(nano, axis).set(value) for axis, value in pose.items()]
        self._sent = pose
        together: StatusBase = statuses[0]
        for status in statuses[1:]:
            together = together & status
        return together

    def stop(self, *, success: bool = False) -> None:
        """Stop all six."""
        nano = self._diffractometer.nanogoniometer
        for motor in (self.circle, *(getattr(nano, axis) for axis in pose_math.AXES)):
            motor.stop(success=success)

    def read(self) -> dict:
        """Readings of the circle and of the nanogoniometer."""
        return {**self.circle.read(), **self._diffractometer.nanogoniometer.read()}

    def describe(self) -> dict:
        """What `read` returns."""
        return {**self.circle.describe(), **self._diffractometer.nanogoniometer.describe()}

    def read_configuration(self) -> dict:
        """That of the circle."""
        return self.circle.read_configuration()

    def describe_configuration(self) -> dict:
        """That of the circle."""
        return self.circle.describe_configuration()

    @property
    def hints(self) -> dict:
        """The circle is what is plotted against."""
        return self.circle.hints

    def __repr__(self) -> str:
        return f"{self.name}: {self.circle!r}, the modulator held in the beam"
