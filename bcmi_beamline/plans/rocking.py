"""Act three: the rocking scan, with the modulator in (BCMI) or out (BCDI)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import move, take_point
from bcmi_beamline.plans.modulator import ensure_modulator
from bcmi_beamline.plans.preprocessors import check_exposure, check_target, check_window, measure
from bcmi_beamline.plans.trajectories import rocking_angles

CALIBRATION_DISTANCE_UM = 50.0
"""A calibration taken this much nearer or farther does not describe the modulator where it stands."""
CALIBRATION_TILT_DEG = 0.1


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


def check_calibration(calibration: Mapping[str, Any], pose: Mapping[str, float]) -> dict[str, Any]:
    """Provenance of a calibration for a start document; refuses one that was taken in another pose.

    Parameters
    ----------
    calibration : mapping
        ``uid``, and where known ``sha256`` and ``modulator_position_um``.
    pose : mapping
        Where the nanogoniometer is now.

    Raises
    ------
    ValueError
        Says which axis has moved and how far.
    """
    if not calibration.get("uid"):
        raise ValueError("calibration: give the uid of the calibration run, {'uid': ..., 'sha256': ...}")
    there = calibration.get("modulator_position_um") or {}
    for axis, reach in (
        ("z", CALIBRATION_DISTANCE_UM),
        ("mchi", CALIBRATION_TILT_DEG),
        ("mphi", CALIBRATION_TILT_DEG),
    ):
        if axis in there and abs(there[axis] - pose[axis]) > reach:
            raise ValueError(
                f"calibration {str(calibration['uid'])[:8]} was taken at {axis} = {there[axis]:.3f}, the "
                f"modulator is at {pose[axis]:.3f}: calibrate again"
            )
    return {key: calibration[key] for key in ("uid", "sha256") if calibration.get(key)}


def check_rocking(
    beamline: Beamline, centre_deg: float, half_range_deg: float, modulator: Literal["in", "out"]
) -> None:
    """Refuse a scan that leaves the circle's limits or would sweep the modulator through the beam."""
    name = beamline.rocking_circle
    circle = getattr(beamline.diffractometer, name)
    for end in (centre_deg - half_range_deg, centre_deg + half_range_deg):
        check_target(name, end, circle.low, circle.high)
    if modulator == "in" and name != "phi":
        raise ValueError(
            f"rocking {name} carries the modulator through the beam: rock with modulator='out', or a circle "
            "inside eta"
        )
    cone, nominal = beamline.diffractometer.modulator_cone_deg, beamline.reflection.rocking_nominal_deg
    if modulator == "in" and abs(centre_deg - nominal) + half_range_deg > cone:
        raise ValueError(
            f"{name}: {centre_deg:g} +- {half_range_deg:g} deg leaves {nominal:g} +- {cone:g} deg "
            "as allowed with the modulator in: narrow the range or rock with modulator='out'"
        )


def rocking_scan(
    devices: Devices,
    half_range_deg: float = 0.5,
    step_deg: float = 0.005,
    exposure_s: float = 1.0,
    modulator: Literal["in", "out"] = "in",
    peak_deg: float | None = None,
    window: int = 432,
    calibration: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[RockingResult]:
    """Rock the crystal through its Bragg peak, one frame per angle, and go back to the peak.

    The modulator is brought in or taken out first, unless it is so already. Angles rise, so that backlash is
    the same for all.

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
    calibration : dict, optional
        ``uid`` and ``sha256`` of the calibration this scan relies on; goes into the start document.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    RockingResult

    Raises
    ------
    ValueError
        Before anything moves: an angle beyond the limits, a circle that carries the modulator, a calibration
        taken elsewhere.
    """
    beamline = devices.beamline
    rock: Any = devices.diffractometer.rock
    angles = rocking_angles(half_range_deg, step_deg)
    check_exposure(exposure_s)
    check_window(beamline, window)
    peak = float((yield from bps.rd(rock))) if peak_deg is None else peak_deg
    check_rocking(beamline, peak, half_range_deg, modulator)
    pose = yield from ensure_modulator(devices, modulator)
    circle = getattr(beamline.diffractometer, beamline.rocking_circle)
    more = {
        "rocking": {"circle": beamline.rocking_circle, "peak_deg": peak, "sense": circle.sense},
        "motors": [rock.name],
    }
    if calibration is not None:
        more["calibration"] = check_calibration(calibration, pose)

    def points() -> MsgGenerator[list[dict[str, float]]]:
        taken = []
        for angle in angles:
            yield from move(rock, peak + circle.sense * angle)
            taken.append((yield from take_point(devices, rock)))
        return taken

    uid, taken = yield from measure(
        devices,
        points,
        plan_name="rocking_scan",
        scan_kind="rocking",
        modulator=modulator,
        frames=len(angles),
        exposure_s=exposure_s,
        window=window,
        more=more,
        metadata=metadata,
    )
    yield from bps.mv(rock, peak)
    return RockingResult(
        uid=uid,
        modulator=modulator,
        points=len(taken),
        peak_deg=peak,
        brightest_counts=int(max(point.get("eiger_total", 0) for point in taken)),
        saturated_frames=sum(point.get("eiger_saturated", 0) > 0 for point in taken),
    )
