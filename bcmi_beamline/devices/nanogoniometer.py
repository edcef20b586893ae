"""The stage that carries the modulator, and the crystal it must never touch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ophyd import Component as Cpt
from ophyd import Device, Signal
from ophyd import FormattedComponent as FCpt
from ophyd.utils import LimitError

from bcmi_beamline.config import NanogoniometerConfig
from bcmi_beamline.devices import guards, pose_math
from bcmi_beamline.devices.motor import Motor

if TYPE_CHECKING:
    from bcmi_beamline.devices.diffractometer import Diffractometer

Place = Literal["in", "out", "park"]


PIVOT_REACH_UM = 1000.0
"""A pivot further from the survey than this is a mistake; the guard stands on it."""


class Pivot(Signal):
    """Point about which the tilts turn, (3,), um; starts as surveyed.

    With two more numbers, (5,), the readings (mchi, mphi), deg, at which the translations run along the beam.
    """

    def __init__(self, *args, parent: Nanogoniometer, **kwargs) -> None:
        kwargs["value"] = np.array(parent.config.pivot_um, float)
        super().__init__(*args, parent=parent, **kwargs)

    def check_value(self, value) -> None:
        """Refuse what is no point, or lies far from the survey.

        Raises
        ------
        LimitError
            With both points.
        """
        assert isinstance(self.parent, Nanogoniometer)
        surveyed, new = np.array(self.parent.config.pivot_um), np.asarray(value, float)
        known = new.shape in ((3,), (5,)) and np.isfinite(new).all()
        if not known or np.abs(new[:3] - surveyed).max() > PIVOT_REACH_UM:
            raise LimitError(
                f"{self.name}: {new.tolist()} um is not within {PIVOT_REACH_UM:g} um of the surveyed "
                f"{surveyed.tolist()}: survey it again and correct nanogoniometer.pivot_um"
            )


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
    pivot = Cpt(Pivot, kind="config")

    def __init__(self, prefix: str, *, name: str, config: NanogoniometerConfig, **kwargs) -> None:
        self.config = config
        self.diffractometer: Diffractometer | None = None
        """Kept at the Bragg setting while the modulator is inserted; set where both are made."""
        super().__init__(prefix, name=name, **kwargs)

    @property
    def pivot_um(self) -> tuple[float, ...]:
        """What the tilts turn about (`pose_math`): as surveyed, until `pivot` is set to a calibrated one."""
        point: Any = self.pivot.get()
        return tuple(float(value) for value in point)

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
            self.pivot_um,
            self.config.distance_at_z0_um,
        )

    def spans(self) -> dict[str, tuple[float, float]]:
        """Extremes between which each axis is or is about to be."""
        return {axis: getattr(self, axis).span for axis in pose_math.AXES}

    def is_at(self, place: Place) -> bool:
        """Whether every axis of a named position is there, by readback and by setpoint."""
        return guards.is_at(self.config, self.config.positions[place], self.spans())

    def is_out(self) -> bool:
        """Whether it rests at the position "out" or "park": anywhere else it may be in the way."""
        return guards.is_out(self.config, self.spans())

    def is_in(self) -> bool:
        """Whether the beam meets the membrane nearer to where it does at "in" than to where at "out"."""
        t = self.where()
        spot, _ = pose_math.beam_on_membrane((t["x"], t["y"], t["z"]), t["mchi"], t["mphi"], self.pivot_um)
        near, far = (self.place(place) for place in ("in", "out"))

        def miss(place: dict[str, float]) -> float:
            return math.hypot(spot[0] + place.get("x", 0.0), spot[1] + place.get("y", 0.0))

        return miss(near) < miss(far) and not self.is_out()

    # -- where it may go --------------------------------------------------------------------------
    def check_move(self, axis: str, position: float) -> None:
        """Refuse a target that could bring the modulator inside the stand-off, or in at the wrong time.

        Where it is inside already, only moves that take it away pass. It stays "out" while the circles are
        away from the Bragg setting.

        Raises
        ------
        LimitError
            Says how close it would come and what to do first.
        """
        motor: Motor = getattr(self, axis)
        spans = self.spans()
        reason = guards.refuse_modulator(self.config, self.pivot_um, spans, self.where(), axis, position)
        leaves = abs(position - motor.position) > guards.AT_PLACE * motor.axis.tolerance
        if reason is None and leaves and self.diffractometer and guards.is_out(self.config, spans):
            reason = guards.refuse_insertion(self.diffractometer.strays())
        if reason:
            raise LimitError(f"{motor.name}: {reason}")

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
        return pose_math.pivot_compensation(mchi, mphi, x, y, z, self.pivot_um, from_tilt)

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
