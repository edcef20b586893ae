"""The stage that carries the modulator, and the crystal it must never touch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from ophyd import Device
from ophyd import FormattedComponent as FCpt
from ophyd.utils import LimitError

from bcmi_beamline.config import NanogoniometerConfig
from bcmi_beamline.devices import pose_math
from bcmi_beamline.devices.motor import Motor

if TYPE_CHECKING:
    from bcmi_beamline.devices.diffractometer import Diffractometer

Place = Literal["in", "out", "park"]


class Nanogoniometer(Device):
    """Modulator stage: x, y, z (um) riding on the tilts mchi, mphi (deg).

    No axis takes a target that could bring the modulator closer to the crystal than the stand-off, whatever
    the other axes are doing: they are counted at their readbacks, their setpoints and all between.

    Parameters
    ----------
    prefix : str
        Put before the record names of the configuration.
    config : NanogoniometerConfig
        Axes, pivot, stand-off and named positions.
    """

    x = FCpt(Motor, "{self.prefix}{self.config.x.pv}")
    y = FCpt(Motor, "{self.prefix}{self.config.y.pv}")
    z = FCpt(Motor, "{self.prefix}{self.config.z.pv}")
    mchi = FCpt(Motor, "{self.prefix}{self.config.mchi.pv}")
    mphi = FCpt(Motor, "{self.prefix}{self.config.mphi.pv}")

    def __init__(self, prefix: str, *, name: str, config: NanogoniometerConfig, **kwargs) -> None:
        self.config = config
        self.diffractometer: Diffractometer | None = None
        """Kept at the Bragg setting while the modulator is inserted; set where both are made."""
        super().__init__(prefix, name=name, **kwargs)

    # -- where it is ------------------------------------------------------------------------------
    def where(self) -> dict[str, float]:
        """Readback of every axis, um and deg."""
        return {axis: float(getattr(self, axis).position) for axis in pose_math.AXES}

    def distance_um(self, **axes: float) -> float:
        """Crystal to modulator along the diffracted beam (d1), um; `axes` override readbacks."""
        at = {**self.where(), **axes}
        return pose_math.distance_along_beam(
            (at["x"], at["y"], at["z"]),
            at["mchi"],
            at["mphi"],
            self.config.pivot_um,
            self.config.distance_at_z0_um,
        )

    def is_at(self, place: Place) -> bool:
        """Whether every axis of a named position is there, by readback and by setpoint."""
        for axis, value in self.config.positions[place].items():
            motor: Motor = getattr(self, axis)
            low, high = motor.span
            if max(abs(low - value), abs(high - value)) > 10 * motor.axis.tolerance:
                return False
        return True

    def is_out(self) -> bool:
        """Whether it rests at the position "out" or "park": anywhere else it may be in the way."""
        return any(self.is_at(place) for place in ("out", "park") if place in self.config.positions)

    def is_in(self) -> bool:
        """Whether the beam meets the membrane nearer to where it does at "in" than to where at "out"."""
        t = self.where()
        spot, _ = pose_math.beam_on_membrane(
            (t["x"], t["y"], t["z"]), t["mchi"], t["mphi"], self.config.pivot_um
        )
        near, far = (self.place(place) for place in ("in", "out"))

        def miss(place: dict[str, float]) -> float:
            return math.hypot(spot[0] + place.get("x", 0.0), spot[1] + place.get("y", 0.0))

        return miss(near) < miss(far) and not self.is_out()

    # -- where it may go --------------------------------------------------------------------------
    def check_move(self, axis: str, position: float) -> None:
        """Refuse a target of one axis that could bring the modulator inside the stand-off.

        Where it is inside already, only moves that take it away pass.

        Raises
        ------
        LimitError
            Says how close it would come and what to do first.
        """
        spans = {name: getattr(self, name).span for name in ("z", "mchi", "mphi")}
        if axis in spans:
            spans[axis] = (*spans[axis], position)
        model = (self.config.pivot_um, self.config.distance_at_z0_um)
        closest = pose_math.least_clearance(spans["z"], spans["mchi"], spans["mphi"], *model)
        missing = self.config.stand_off_um - closest
        if missing > 0:
            now = self.where()
            if closest < pose_math.clearance(now["z"], now["mchi"], now["mphi"], *model) - 1e-3:
                raise LimitError(self._refusal(axis, position, closest, min(spans["z"]) + missing))
        if self.is_out():
            self._check_insertion(axis, position)

    def _refusal(self, axis: str, position: float, closest: float, z_needed: float) -> str:
        unit = getattr(self.config, axis).unit
        if axis == "z":
            mend = f"at these tilts z must stay at or above {z_needed:.1f} um"
        else:
            mend = f"move z to at least {z_needed:.1f} um first, and wait for it"
        return (
            f"{self.name}_{axis}: {position:g} {unit} could bring the modulator to {closest:.0f} um from the "
            f"crystal, inside the stand-off of {self.config.stand_off_um:g} um: {mend}"
        )

    def _check_insertion(self, axis: str, position: float) -> None:
        """Refuse to leave "out" while the circles are away from the Bragg setting."""
        motor: Motor = getattr(self, axis)
        strays = self.diffractometer.strays() if self.diffractometer is not None else []
        if strays and abs(position - motor.position) > 10 * motor.axis.tolerance:
            raise LimitError(
                f"{self.name}_{axis}: the modulator stays out while {', '.join(strays)}: "
                "bring the diffractometer to the Bragg setting first"
            )

    # -- how to get there -------------------------------------------------------------------------
    def pivot_compensation(
        self,
        mchi: float,
        mphi: float,
        x: float,
        y: float,
        z: float,
        from_tilt: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[float, float, float]:
        """x, y, z (um) that keep the spot in the beam, at its distance, at the tilts (deg) given.

        `x`, `y`, `z` hold at the tilts `from_tilt`; see `pose_math.pivot_compensation`. Moves nothing.
        """
        return pose_math.pivot_compensation(mchi, mphi, x, y, z, self.config.pivot_um, from_tilt)

    def place(self, name: Place) -> dict[str, float]:
        """Axes and targets of a named position.

        Raises
        ------
        KeyError
            When the configuration has no such position.
        """
        return dict[str, float](self.config.positions[name].items())

    def move_order(self, target: Place | Mapping[str, float]) -> list[list]:
        """Arguments for one ``mv`` after another that take the stage to `target` the safe way.

        Away from the crystal z goes first, alone; towards it z goes last, alone.

        Examples
        --------
        >>> for step in nanogoniometer.move_order("out"):  # doctest: +SKIP
        ...     yield from bps.mv(*step)
        """
        axes = self.place(target) if isinstance(target, str) else dict(target)
        z = {name: axes.pop(name) for name in ("z",) if name in axes}
        retracts = bool(z) and z["z"] > self.z.position
        steps = [z, axes] if retracts else [axes, z]
        return [
            [item for name, value in step.items() for item in (getattr(self, name), value)]
            for step in steps
            if step
        ]

    def __repr__(self) -> str:
        if not self.connected:
            return f"{self.name}: not connected ({self.prefix})"
        state = "out" if self.is_out() else "in" if self.is_in() else "neither in nor out"
        lines = [f"{self.name}: {state}, {self.distance_um():.1f} um from the crystal"]
        return "\n  ".join(lines + [repr(getattr(self, axis)) for axis in pose_math.AXES])
