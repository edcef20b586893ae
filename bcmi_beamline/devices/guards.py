"""What must never happen, as pure functions: the devices ask them before a move, rehearsals along a path.

Each takes the spans of the axes, the extremes between which each is or is about to be, and returns why a
target is refused, or None. Nothing orders axes that move at once, so every pose within the spans counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bcmi_beamline.config import DiffractometerConfig, NanogoniometerConfig
from bcmi_beamline.devices import pose_math

Span = tuple[float, float]

CIRCLES: tuple[str, ...] = ("mu", "eta", "phi", "nu", "delta")
CARRIES_MODULATOR = ("mu", "eta")
"""The nanogoniometer rides on eta, eta on mu."""

AT_PLACE = 10
"""An axis within this many tolerances of a named position is there."""


def is_at(config: NanogoniometerConfig, place: Mapping[Any, float], spans: Mapping[str, Span]) -> bool:
    """Whether every axis of a named position is there and is going nowhere else."""
    return all(
        max(abs(end - value) for end in spans[axis]) <= AT_PLACE * getattr(config, axis).tolerance
        for axis, value in place.items()
    )


def is_out(config: NanogoniometerConfig, spans: Mapping[str, Span]) -> bool:
    """Whether the modulator rests at the position "out" or "park": anywhere else it may be in the way."""
    places = (config.positions.get(name) for name in ("out", "park"))
    return any(is_at(config, place, spans) for place in places if place)


def refuse_modulator(
    config: NanogoniometerConfig,
    pivot: Sequence[float],
    spans: Mapping[str, Span],
    now: Mapping[str, float],
    axis: str,
    target: float,
) -> str | None:
    """Why the modulator may not go there: it could come inside the stand-off.

    Where it is inside already, only moves that take it away pass.

    Parameters
    ----------
    pivot : sequence of float
        What the tilts turn about (`pose_math`).
    spans, now : mapping
        Of x, y, z (um), mchi, mphi (deg): spans, and readbacks.
    axis, target : str, float
        The move asked for.
    """
    reach = {name: spans[name] for name in ("z", "mchi", "mphi")}
    if axis not in reach:
        return None
    low, high = reach[axis]
    reach[axis] = (min(low, target), max(high, target))
    model = (pivot, config.distance_at_z0_um)
    closest = pose_math.least_clearance(reach["z"], reach["mchi"], reach["mphi"], *model)
    missing = config.stand_off_um - closest
    if missing <= 0 or closest >= pose_math.clearance(now["z"], now["mchi"], now["mphi"], *model) - 1e-3:
        return None
    z_needed = reach["z"][0] + missing
    if axis == "z":
        mend = f"at these tilts z must stay at or above {z_needed:.1f} um"
    else:
        mend = f"move z to at least {z_needed:.1f} um first, and wait for it"
    return (
        f"{target:g} {getattr(config, axis).unit} could bring the modulator to {closest:.0f} um from the "
        f"crystal, inside the stand-off of {config.stand_off_um:g} um: {mend}"
    )


def strays(
    config: DiffractometerConfig, nominal_deg: Mapping[str, float], spans: Mapping[str, Span]
) -> list[str]:
    """Circles that are, or are about to be, further from the Bragg setting than a modulator allows."""
    cone = config.modulator_cone_deg
    return [
        f"{name} is not within {cone:g} deg of {nominal_deg[name]:.3f}"
        for name in CIRCLES
        if max(abs(end - nominal_deg[name]) for end in spans[name]) > cone
    ]


def refuse_insertion(strays: Iterable[str]) -> str | None:
    """Why the modulator may not leave its position "out": circles are away from the Bragg setting."""
    away = ", ".join(strays)
    if not away:
        return None
    return f"the modulator stays out while {away}: bring the diffractometer to the Bragg setting first"


def refuse_circle(
    config: DiffractometerConfig,
    nominal_deg: Mapping[str, float],
    circle: str,
    target: float,
    here: float,
    *,
    rocks: bool,
    distance_um: float,
) -> str | None:
    """Why a circle may not go there while the modulator is not out.

    Parameters
    ----------
    circle, target, here : str, float, float
        The move asked for, deg, and the readback.
    rocks : bool
        Whether it is the circle that rocks the crystal.
    distance_um : float
        Crystal to modulator.
    """
    step = abs(target - here)
    if rocks and circle in CARRIES_MODULATOR and step > getattr(config, circle).tolerance:
        sweep = math.radians(step) * distance_um
        return (
            f"{circle} carries the modulator; rocking it by {step:.4g} deg would sweep it {sweep:.2f} um "
            "through the beam: take the modulator out first, or rock it compensated"
        )
    return refuse_cone(config, nominal_deg, circle, target)


def refuse_cone(
    config: DiffractometerConfig, nominal_deg: Mapping[str, float], circle: str, target: float
) -> str | None:
    """Why a circle may not go further from the Bragg setting while the modulator is not out."""
    nominal, cone = nominal_deg[circle], config.modulator_cone_deg
    if abs(target - nominal) <= cone:
        return None
    return (
        f"{target:g} deg lies outside [{nominal - cone:.4g}, {nominal + cone:.4g}], the Bragg setting "
        "allowed with the modulator in: take the modulator out first"
    )


def refuse_exchange(reach_um: float, axis: str, target: float, home: float) -> str | None:
    """Why the sample stage may not travel that far while the modulator is not out."""
    if abs(target - home) <= reach_um:
        return None
    return (
        f"{target:g} um is {abs(target - home):.3g} um from where the sample was as the modulator came in "
        f"(with it in: {reach_um:g} um): take the modulator out before going to another crystal"
    )
