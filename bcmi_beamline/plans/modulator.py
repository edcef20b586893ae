"""Bring the modulator in, take it out, tilt it about its spot: always the safe way round.

Away from the crystal z goes first and alone, towards it z goes last and alone, in steps that are verified.
The devices refuse what would be dangerous; the plans here are made so that they never have to.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices, nominal_setting
from bcmi_beamline.devices.guards import is_at, is_out
from bcmi_beamline.devices.pose_math import AXES, beam_on_membrane, clearance, pivot_compensation
from bcmi_beamline.plans._stubs import move

Pose = dict[str, float]
"""Nanogoniometer: x, y, z in um, mchi, mphi in deg."""

APPROACH_STEP_UM = 1000.0


PlaceName = Literal["out", "park"]


class ModulatorError(RuntimeError):
    """The modulator is not where it was sent, or cannot go there safely."""


def as_it_stands(devices: Devices) -> MsgGenerator[Beamline]:
    """The configuration with what is read in place of what was surveyed: energy and pivot.

    The nominal Bragg setting follows the energy; all that a plan computes from the configuration does too.
    """
    beamline: Beamline = devices.beamline
    changes: dict[str, Any] = {}
    nano: Any = devices.nanogoniometer
    pivot = yield from bps.rd(nano.pivot)
    known = tuple(float(value) for value in pivot)
    changes["nanogoniometer"] = beamline.nanogoniometer.model_copy(update={"pivot_um": known})
    energy: Any = devices.energy
    if energy is not None:
        energy_ev = 1e3 * float((yield from bps.rd(energy)))
        nominal = nominal_setting(beamline, energy_ev)[beamline.rocking_circle]
        changes["energy_ev"] = energy_ev
        changes["reflection"] = beamline.reflection.model_copy(update={"rocking_nominal_deg": nominal})
    return beamline.model_copy(update=changes)


def read_pose(devices: Devices) -> MsgGenerator[Pose]:
    """Readings of the five axes of the nanogoniometer."""
    pose = {}
    for axis in AXES:
        pose[axis] = float((yield from bps.rd(getattr(devices.nanogoniometer, axis))))
    return pose


def _translation(pose: Mapping[str, float]) -> tuple[float, float, float]:
    return pose["x"], pose["y"], pose["z"]


def distance_m(beamline: Beamline, pose: Mapping[str, float]) -> float:
    """Crystal to modulator along the diffracted beam (d1) at `pose`, m."""
    nano = beamline.nanogoniometer
    _, z = beam_on_membrane(_translation(pose), pose["mchi"], pose["mphi"], nano.pivot_um)
    return (z + nano.distance_at_z0_um) * 1e-6


def where_is(beamline: Beamline, pose: Mapping[str, float]) -> Literal["in", "out", "elsewhere"]:
    """Whether `pose` has the modulator in the beam, out of it, or neither.

    "out" is what the devices call out: at the named position "out" or "park". "in" means that the beam meets
    the membrane nearer to where it does at "in" than at "out", and z is nearer to its value there.
    """
    nano = beamline.nanogoniometer
    if is_out(nano, {axis: (value, value) for axis, value in pose.items()}):
        return "out"
    spot, _ = beam_on_membrane(_translation(pose), pose["mchi"], pose["mphi"], nano.pivot_um)
    inside, outside = nano.positions["in"], nano.positions["out"]

    def sideways(place: Mapping[Any, float]) -> float:
        return float((spot[0] + place["x"]) ** 2 + (spot[1] + place["y"]) ** 2)

    near = abs(pose["z"] - inside["z"]) < abs(pose["z"] - outside["z"])
    return "in" if near and sideways(inside) < sideways(outside) else "elsewhere"


def tilted(beamline: Beamline, pose: Mapping[str, float], mchi: float, mphi: float) -> Pose:
    """Pose at other tilts with the same spot of the membrane in the beam, at the same distance."""
    x, y, z = pivot_compensation(
        mchi,
        mphi,
        *_translation(pose),
        beamline.nanogoniometer.pivot_um,
        from_tilt=(pose["mchi"], pose["mphi"]),
    )
    return {"x": x, "y": y, "z": z, "mchi": mchi, "mphi": mphi}


def check_pose(beamline: Beamline, pose: Mapping[str, float]) -> None:
    """Refuse a pose beyond the limits or too near to the crystal, before anything moves.

    Raises
    ------
    ValueError
        Names the axis and what forbids it.
    """
    nano = beamline.nanogoniometer
    for axis, value in pose.items():
        limits = getattr(nano, axis)
        if not limits.low <= value <= limits.high:
            raise ValueError(
                f"modulator {axis}: {value:.6g} {limits.unit} lies outside [{limits.low:g}, {limits.high:g}]"
            )
    gap = float(clearance(pose["z"], pose["mchi"], pose["mphi"], nano.pivot_um, nano.distance_at_z0_um))
    if gap < nano.stand_off_um:
        raise ValueError(
            f"modulator: z {pose['z']:.0f} um at mchi {pose['mchi']:.2f}, mphi {pose['mphi']:.2f} deg is "
            f"{gap:.0f} um from the crystal, inside the stand-off of {nano.stand_off_um:g} um"
        )


def move_modulator(
    devices: Devices, now: Mapping[str, float], target: Mapping[str, float]
) -> MsgGenerator[None]:
    """From the pose `now` to `target`: z first when it retracts, last when it approaches."""
    nano = devices.nanogoniometer
    sideways = [item for a, v in target.items() if a != "z" and v != now[a] for item in (getattr(nano, a), v)]
    z = [nano.z, target["z"]] if target.get("z", now["z"]) != now["z"] else []
    retracts = target.get("z", now["z"]) > now["z"]
    for step in (z, sideways) if retracts else (sideways, z):
        if step:
            yield from move(*step)


def retract_modulator(devices: Devices, place: PlaceName = "out") -> MsgGenerator[Pose]:
    """Take the modulator out of the beam: z away from the crystal first, then aside.

    Parameters
    ----------
    devices : Devices
        The beamline.
    place : {"out", "park"}
        Named position to go to; "park" for an exchange of samples.

    Returns
    -------
    dict
        The pose it ends in.
    """
    now = yield from read_pose(devices)
    config = devices.beamline.nanogoniometer
    if place not in config.positions:
        raise ValueError(
            f"modulator: no position {place!r}, the configuration has {', '.join(config.positions)}"
        )
    out: dict[Any, float] = dict(config.positions[place])
    if not is_at(config, out, {axis: (value, value) for axis, value in now.items()}):
        nano = devices.nanogoniometer
        if out["z"] > now["z"]:
            yield from bps.mv(nano.z, out["z"])
        rest = [item for a, v in out.items() if a != "z" for item in (getattr(nano, a), v)]
        yield from bps.mv(*rest)
        yield from bps.mv(nano.z, out["z"])
    return (yield from read_pose(devices))


def _approach(devices: Devices, beamline: Beamline, z_now: float, z_target: float) -> MsgGenerator[None]:
    """Move z in steps, each checked by its readback and by the distance that all five readings imply."""
    nano, config = devices.nanogoniometer, beamline.nanogoniometer
    steps = max(1, math.ceil(abs(z_now - z_target) / APPROACH_STEP_UM))
    for step in range(1, steps + 1):
        wanted = z_target + (z_now - z_target) * (1 - step / steps)
        yield from bps.mv(nano.z, wanted)
        here = yield from read_pose(devices)
        gap = float(
            clearance(here["z"], here["mchi"], here["mphi"], config.pivot_um, config.distance_at_z0_um)
        )
        if abs(here["z"] - wanted) > 2 * config.z.tolerance or gap < config.stand_off_um:
            raise ModulatorError(
                f"insertion stopped: z reads {here['z']:.1f} um, sent to {wanted:.1f} um; {gap:.0f} um from "
                f"the crystal (stand-off {config.stand_off_um:g} um)"
            )


def insert_modulator(devices: Devices, z_um: float | None = None) -> MsgGenerator[Pose]:
    """Bring the modulator into the beam: aside first, far from the crystal, then z in verified steps.

    The tilts stay as they are; x, y and z are those of the position "in" turned with them, so that the same
    spot of the membrane meets the beam at the same distance at any tilt.

    Parameters
    ----------
    devices : Devices
        The beamline.
    z_um : float, optional
        Nanogoniometer z at zero tilt, in place of that of the position "in".

    Returns
    -------
    dict
        The pose it ends in.

    Raises
    ------
    ValueError
        When the target is beyond the limits or inside the stand-off; nothing has moved.
    ModulatorError
        When a step of the approach did not end where it should; z stays there.
    """
    nano = devices.nanogoniometer
    beamline = yield from as_it_stands(devices)
    now = yield from read_pose(devices)
    flat = {"mchi": 0.0, "mphi": 0.0, **beamline.nanogoniometer.positions["in"]}
    if z_um is not None:
        flat["z"] = z_um
    target = tilted(beamline, flat, now["mchi"], now["mphi"])
    check_pose(beamline, target)
    aside = [item for axis in "xy" for item in (getattr(nano, axis), target[axis])]
    if where_is(beamline, now) != "in":
        far = beamline.nanogoniometer.positions["out"]["z"]
        if far > now["z"]:
            yield from bps.mv(nano.z, far)
            now["z"] = far
    yield from bps.mv(*aside)
    yield from _approach(devices, beamline, now["z"], target["z"])
    return (yield from read_pose(devices))


def modulator_state(devices: Devices) -> MsgGenerator[Literal["in", "out"]]:
    """Whether the modulator is in; anywhere else it counts as out."""
    beamline = yield from as_it_stands(devices)
    pose = yield from read_pose(devices)
    return "in" if where_is(beamline, pose) == "in" else "out"


def ensure_modulator(
    devices: Devices, state: Literal["in", "out"], z_um: float | None = None
) -> MsgGenerator[Pose]:
    """Have the modulator in or out; where it is so already, touch nothing (an alignment is kept).

    Returns
    -------
    dict
        The pose it is in.
    """
    if state not in ("in", "out"):
        raise ValueError(f"modulator: 'in' or 'out', not {state!r}")
    beamline = yield from as_it_stands(devices)
    now = yield from read_pose(devices)
    if where_is(beamline, now) == state:
        return now
    if state == "out":
        return (yield from retract_modulator(devices))
    return (yield from insert_modulator(devices, z_um))
