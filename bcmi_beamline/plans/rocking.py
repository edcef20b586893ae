"""Act three: the rocking scan, with the modulator in (BCMI) or out (BCDI)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import move, take_point, take_sentinel
from bcmi_beamline.plans.dose import Dose, dose
from bcmi_beamline.plans.modulator import as_it_stands, distance_m, ensure_modulator
from bcmi_beamline.plans.preprocessors import check_exposure, check_target, check_window, measure
from bcmi_beamline.plans.trajectories import rocking_angles

Doubt = Literal["crystal", "energy", "distance", "tilt"]

CALIBRATION_ENERGY = 2e-4
"""Relative: 1.8 eV at 9 keV, where the far corner of a 432 pixel window has moved by 0.06 pixels."""
CALIBRATION_DISTANCE_UM = 50.0
"""A calibration taken this much nearer or farther does not describe the modulator where it stands."""
CALIBRATION_TILT_DEG = 0.1


class StaleCalibration(ValueError):
    """A calibration that does not describe what is about to be measured; it says what has changed."""


@dataclass(frozen=True)
class RockingResult:
    """One rocking scan."""

    uid: str
    modulator: Literal["in", "out"]
    points: int
    peak_deg: float
    """Reading of the rocking circle that the angles are relative to."""
    brightest_counts: int
    """Counts in the window of the brightest frame."""
    saturated_frames: int
    sentinels: int
    """Frames at the peak between the points."""
    peak_change: float
    """Largest relative change of counts from the first sentinel to another; 0 without sentinels."""
    dose: Dose

    def __repr__(self) -> str:
        lines = [
            f"rocking scan {self.uid[:8]}, modulator {self.modulator}: {self.points} frames around "
            f"{self.peak_deg:.4f} deg",
            f"brightest frame {self.brightest_counts} counts, {self.saturated_frames} frames saturated",
            f"dose: {self.dose}",
        ]
        if self.sentinels:
            lines.append(
                f"{self.sentinels} sentinels; counts at the peak changed by up to {self.peak_change:.1%}"
            )
        return "\n".join(lines)


def calibration_facts(
    beamline: Beamline, pose: Mapping[str, float], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a calibration holds for: crystal, energy, distance, pose."""
    return {
        "crystal": (metadata or {}).get("sample"),
        "hkl": list(beamline.reflection.hkl),
        "energy_ev": beamline.energy_ev,
        "distance_um": distance_m(beamline, pose) * 1e6,
        "modulator_position_um": {axis: float(value) for axis, value in pose.items()},
    }


def check_calibration(
    calibration: Mapping[str, Any], facts: Mapping[str, Any], allow_stale: Collection[str] = ()
) -> dict[str, Any]:
    """Provenance of a calibration for a start document; refuses one that was taken of something else.

    Parameters
    ----------
    calibration : mapping
        ``uid``, and where known ``sha256`` of the modulator's file and what `calibration_facts` gives.
    facts : mapping
        `calibration_facts` as they are now.
    allow_stale : collection of str
        What may have changed all the same: "crystal", "energy", "distance", "tilt".

    Raises
    ------
    StaleCalibration
        Says what has changed, by how much, and the name that overrides it.
    """
    if not calibration.get("uid"):
        raise ValueError("calibration: give the uid of the calibration run, {'uid': ..., 'sha256': ...}")
    doubts = _doubts(calibration, facts)
    for doubt, words in doubts.items():
        if doubt not in allow_stale:
            raise StaleCalibration(
                f"calibration {str(calibration['uid'])[:8]} was taken {words}: calibrate again, "
                f'or use it all the same with allow_stale=["{doubt}"]'
            )
    kept = {key: calibration[key] for key in ("uid", "sha256") if calibration.get(key)}
    return {**kept, "stale": sorted(doubts)} if doubts else kept


def _doubts(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[Doubt, str]:
    """What has changed beyond tolerance, in words; what the calibration does not tell is not doubted."""
    found: dict[Doubt, str] = {}
    for key, name in (("crystal", "of crystal"), ("hkl", "at")):
        before, after = then.get(key), now.get(key)
        if before is not None and after is not None and before != after:
            found["crystal"] = f"{name} {before}, this is {after}"
    energy = then.get("energy_ev")
    if energy is not None and abs(energy / now["energy_ev"] - 1) > CALIBRATION_ENERGY:
        found["energy"] = f"at {energy:.1f} eV, the energy is {now['energy_ev']:.1f} eV"
    pose, here = then.get("modulator_position_um") or {}, now["modulator_position_um"]
    distance = then.get("distance_um")
    if distance is None and "z" in pose:
        distance = now["distance_um"] + pose["z"] - here["z"]
    if distance is not None and abs(distance - now["distance_um"]) > CALIBRATION_DISTANCE_UM:
        found["distance"] = (
            f"{distance:.0f} um from the crystal, the modulator is {now['distance_um']:.0f} um from it"
        )
    for tilt in ("mchi", "mphi"):
        if tilt in pose and abs(pose[tilt] - here[tilt]) > CALIBRATION_TILT_DEG:
            found["tilt"] = f"at {tilt} = {pose[tilt]:.3f} deg, the modulator is at {here[tilt]:.3f}"
    return found


def check_rocking(
    beamline: Beamline, centre_deg: float, half_range_deg: float, modulator: Literal["in", "out"]
) -> None:
    """Refuse a scan that leaves the circle's limits, or with the modulator in its safe cone."""
    name = beamline.rocking_circle
    circle = getattr(beamline.diffractometer, name)
    for end in (centre_deg - half_range_deg, centre_deg + half_range_deg):
        check_target(name, end, circle.low, circle.high)
    cone, nominal = beamline.diffractometer.modulator_cone_deg, beamline.reflection.rocking_nominal_deg
    if modulator == "in" and abs(centre_deg - nominal) + half_range_deg > cone:
        raise ValueError(
            f"{name}: {centre_deg:g} +- {half_range_deg:g} deg leaves {nominal:g} +- {cone:g} deg "
            "as allowed with the modulator in: narrow the range or rock with modulator='out'"
        )


def readables(devices: Devices, rocker: Any) -> tuple[Any, ...]:
    """What is read at each point of a scan with `rocker`: the circle, and what moves with it."""
    rock: Any = devices.diffractometer.rock
    return (rock,) if rocker is rock else (rocker,)


def choose_rocker(devices: Devices, modulator: Literal["in", "out"]) -> Any:
    """What to set to a rocking angle: a circle that carries the modulator is compensated with it in."""
    return devices.rock_with_modulator if modulator == "in" else devices.diffractometer.rock


def rocking_scan(
    devices: Devices,
    half_range_deg: float = 0.5,
    step_deg: float = 0.005,
    exposure_s: float = 1.0,
    modulator: Literal["in", "out"] = "in",
    peak_deg: float | None = None,
    window: int = 432,
    sentinel_every: int = 0,
    calibration: dict[str, Any] | None = None,
    allow_stale: list[Literal["crystal", "energy", "distance", "tilt"]] | None = None,
    continues: str | None = None,
    points_done: int = 0,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[RockingResult]:
    """Rock the crystal through its Bragg peak, one frame per angle, and go back to the peak.

    The modulator is brought in or taken out first, unless it is so already. Angles rise, so that backlash is
    the same for all. A circle that carries the modulator is compensated by the nanogoniometer.

    Parameters
    ----------
    devices : Devices
        The beamline.
    half_range_deg : float
        From the peak to either end, degrees.
    step_deg : float
        Between frames, degrees.
    exposure_s : float
        Per frame, s.
    modulator : {"in", "out"}
        With the modulator (BCMI) or without (BCDI).
    peak_deg : float, optional
        Reading of the rocking circle at the peak, as `find_bragg_peak` found it; by default where it stands.
    window : int
        Edge in pixels of the square around the beam that is analysed.
    sentinel_every : int
        A frame at the peak before the first point and after each so many; none with 0. Their events carry
        ``sentinel`` 1.
    calibration : dict, optional
        The calibration this scan relies on (`CalibrationResult.reference`); its uid and hash go into the
        start document.
    allow_stale : list of {"crystal", "energy", "distance", "tilt"}, optional
        What may have changed since the calibration.
    continues : str, optional
        Uid of an interrupted run that this one completes.
    points_done : int
        Points that the interrupted run, and those that it continues, have taken.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    RockingResult

    Raises
    ------
    ValueError
        Before anything moves: an angle beyond the limits, a parameter out of bounds.
    StaleCalibration
        Before the first frame, when the calibration was taken of something else.
    """
    angles = rocking_angles(half_range_deg, step_deg)
    check_exposure(exposure_s)
    if not 0 <= points_done < len(angles) or sentinel_every < 0:
        raise ValueError(
            f"rocking: points_done {points_done} must lie within 0 and {len(angles) - 1}, sentinel_every "
            f"{sentinel_every} must not be negative"
        )
    beamline = yield from as_it_stands(devices)
    check_window(beamline, window)
    rock: Any = devices.diffractometer.rock
    peak = float((yield from bps.rd(rock))) if peak_deg is None else peak_deg
    check_rocking(beamline, peak, half_range_deg, modulator)
    pose = yield from ensure_modulator(devices, modulator)
    circle = getattr(beamline.diffractometer, beamline.rocking_circle)
    arguments = {
        "half_range_deg": half_range_deg,
        "step_deg": step_deg,
        "exposure_s": exposure_s,
        "modulator": modulator,
        "peak_deg": peak,
        "window": window,
        "sentinel_every": sentinel_every,
        "calibration": calibration,
        "allow_stale": allow_stale,
        "metadata": metadata,
    }
    more: dict[str, Any] = {
        "rocking": {"circle": beamline.rocking_circle, "peak_deg": peak, "sense": circle.sense},
        "motors": [rock.name],
        "plan_arguments": arguments,
        "points_before": points_done,
        "points_total": len(angles),
    }
    if calibration is not None:
        facts = calibration_facts(beamline, pose, metadata)
        more["calibration"] = check_calibration(calibration, facts, allow_stale or ())
    if sentinel_every:
        more["sentinels"] = {"every": sentinel_every, "at_deg": peak}
    if continues:
        more["continues"] = continues
    rocker = choose_rocker(devices, modulator)
    read = readables(devices, rocker)
    left = angles[points_done:]

    def points() -> MsgGenerator[tuple[list[dict[str, float]], list[dict[str, float]]]]:
        taken, watched = [], []
        extra = (devices.sentinel,) if sentinel_every else ()
        for done, angle in enumerate(left):
            if sentinel_every and done % sentinel_every == 0:
                yield from move(rocker, peak)
                watched.append((yield from take_sentinel(devices, *read)))
            yield from move(rocker, peak + circle.sense * angle)
            taken.append((yield from take_point(devices, *read, *extra)))
        return taken, watched

    sentinels = -(-len(left) // sentinel_every) if sentinel_every else 0
    uid, (taken, watched) = yield from measure(
        devices,
        points,
        plan_name="rocking_scan",
        scan_kind="rocking",
        modulator=modulator,
        frames=len(left) + sentinels,
        exposure_s=exposure_s,
        window=window,
        more=more,
        metadata=metadata,
    )
    yield from move(rocker, peak)
    return RockingResult(
        uid=uid,
        modulator=modulator,
        points=len(taken),
        peak_deg=peak,
        brightest_counts=int(max(point.get("eiger_total", 0) for point in taken)),
        saturated_frames=sum(point.get("eiger_saturated", 0) > 0 for point in taken),
        sentinels=len(watched),
        peak_change=largest_change([point.get("eiger_total", 0) for point in watched]),
        dose=measured_dose(beamline, taken + watched, exposure_s),
    )


def largest_change(counts: list[float]) -> float:
    """Largest relative change from the first value to another."""
    first = np.asarray(counts[:1], float)
    if len(counts) < 2 or first[0] <= 0:
        return 0.0
    return float(np.max(np.abs(np.asarray(counts) / first - 1)))


def measured_dose(beamline: Beamline, points: list[dict[str, float]], exposure_s: float) -> Dose:
    """Dose of frames from the flux that the monitor read at each."""
    flux = sum(point.get("monitor_flux", 0.0) for point in points)
    return dose(beamline, flux * exposure_s, len(points) * exposure_s)
