"""Act two: scan the modulator through the Bragg beam, so that ptychography can say what it is."""

from dataclasses import dataclass
from typing import Any

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import move, take_point, take_sentinel
from bcmi_beamline.plans.dose import Dose
from bcmi_beamline.plans.modulator import Pose, as_it_stands, check_pose, ensure_modulator
from bcmi_beamline.plans.preprocessors import check_exposure, check_window, measure
from bcmi_beamline.plans.rocking import calibration_facts, largest_change, measured_dose
from bcmi_beamline.plans.trajectories import PathReport, Shape, report_path, spiral


@dataclass(frozen=True)
class CalibrationResult:
    """One calibration run; `reference` is what a rocking scan takes."""

    uid: str
    points: int
    path: PathReport
    modulator_position_um: Pose
    """Pose at the centre of the spiral; the modulator stands there now."""
    saturated_frames: int
    centre_change: float
    """Largest relative change of counts at the centre from its first visit; 0 when it was not revisited."""
    facts: dict[str, Any]
    """Crystal, energy, distance and pose that it holds for."""
    dose: Dose

    @property
    def reference(self) -> dict[str, Any]:
        """Provenance for `rocking_scan`'s ``calibration``; add ``sha256`` of the modulator's file."""
        return {"uid": self.uid, **self.facts}

    def __repr__(self) -> str:
        change = f"\ncounts at the centre changed by up to {self.centre_change:.1%}"
        return (
            f"calibration {self.uid[:8]}: {self.points} points over {self.path.path_length:.0f} um, overlap "
            f"{self.path.overlap:.0%}, {self.saturated_frames} frames saturated\ndose: {self.dose}"
            + (change if self.centre_change else "")
        )


def calibrate_modulator(
    devices: Devices,
    extent_um: tuple[float, float] = (6.0, 6.0),
    step_um: float = 0.12,
    exposure_s: float = 0.2,
    shape: Shape = "rectangle",
    window: int = 432,
    beam_um: float = 1.5,
    revisit_every: int = 0,
    centre_um: tuple[float, float] | None = None,
    continues: str | None = None,
    points_done: int = 0,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[CalibrationResult]:
    """Scan the modulator through the beam on a spiral around where it stands, and go back there.

    The crystal is left at the peak of its rocking curve. x and y ride on the tilts, so that the scan stays in
    the plane of the membrane.

    Parameters
    ----------
    devices : Devices
        The beamline.
    extent_um : tuple of float
        Full widths (x, y) of the field, um.
    step_um : float
        Between nearest neighbours, um.
    exposure_s : float
        Per frame, s.
    shape : {"rectangle", "ellipse"}
        Outline of the field.
    window : int
        Edge in pixels of the square around the beam that is analysed.
    beam_um : float
        Width (FWHM) of the beam on the modulator, for the overlap reported.
    revisit_every : int
        A frame at the centre before the first point and after each so many, which shows drift; none with 0.
        Their events carry ``sentinel`` 1.
    centre_um : tuple of float, optional
        (x, y) of the nanogoniometer at the centre; by default where it stands.
    continues : str, optional
        Uid of an interrupted run that this one completes.
    points_done : int
        Points that the interrupted run, and those that it continues, have taken.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    CalibrationResult

    Raises
    ------
    ValueError
        Before anything moves: a field beyond the limits, too few points.
    """
    nano = devices.nanogoniometer
    offsets = spiral(extent_um, step_um, shape)
    if len(offsets) < 10:
        raise ValueError(f"calibration: {len(offsets)} points; reduce step_um ({step_um}) or widen extent_um")
    if not 0 <= points_done < len(offsets) or revisit_every < 0:
        raise ValueError(
            f"calibration: points_done {points_done} must lie within 0 and {len(offsets) - 1}, revisit_every "
            f"{revisit_every} must not be negative"
        )
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    path = report_path(offsets, beam_um)
    pose = yield from ensure_modulator(devices, "in")
    if centre_um is not None:
        pose = {**pose, "x": centre_um[0], "y": centre_um[1]}
    beamline = yield from as_it_stands(devices)
    for corner in (offsets.min(axis=0), offsets.max(axis=0)):
        check_pose(beamline, {**pose, "x": pose["x"] + corner[0], "y": pose["y"] + corner[1]})
    left = offsets[points_done:]

    def points() -> MsgGenerator[tuple[list[dict[str, float]], list[dict[str, float]]]]:
        taken, watched = [], []
        extra = (devices.sentinel,) if revisit_every else ()
        for done, (dx, dy) in enumerate(left):
            if revisit_every and done % revisit_every == 0:
                yield from move(nano.x, pose["x"], nano.y, pose["y"])
                watched.append((yield from take_sentinel(devices, nano.x, nano.y)))
            yield from move(nano.x, pose["x"] + dx, nano.y, pose["y"] + dy)
            taken.append((yield from take_point(devices, nano.x, nano.y, *extra)))
        return taken, watched

    arguments = {
        "extent_um": [float(v) for v in extent_um],
        "step_um": step_um,
        "exposure_s": exposure_s,
        "shape": shape,
        "window": window,
        "beam_um": beam_um,
        "revisit_every": revisit_every,
        "centre_um": [pose["x"], pose["y"]],
        "metadata": metadata,
    }
    more: dict[str, Any] = {
        "motors": [nano.x.name, nano.y.name],
        "spiral": {
            "extent_um": [float(v) for v in extent_um],
            "step_um": step_um,
            "shape": shape,
            "centre_um": [pose["x"], pose["y"]],
            "overlap": path.overlap,
            "path_um": path.path_length,
        },
        "plan_arguments": arguments,
        "points_before": points_done,
        "points_total": len(offsets),
    }
    if revisit_every:
        more["sentinels"] = {"every": revisit_every, "at_um": [pose["x"], pose["y"]]}
    if continues:
        more["continues"] = continues
    uid, (taken, watched) = yield from measure(
        devices,
        points,
        plan_name="calibrate_modulator",
        scan_kind="ptychography",
        modulator="in",
        frames=len(left) + (-(-len(left) // revisit_every) if revisit_every else 0),
        exposure_s=exposure_s,
        window=window,
        more=more,
        metadata=metadata,
    )
    yield from bps.mv(nano.x, pose["x"], nano.y, pose["y"])
    return CalibrationResult(
        uid=uid,
        points=len(taken),
        path=path,
        modulator_position_um=pose,
        saturated_frames=sum(point.get("eiger_saturated", 0) > 0 for point in taken),
        centre_change=largest_change([point.get("eiger_total", 0) for point in watched]),
        facts=calibration_facts(beamline, pose, metadata),
        dose=measured_dose(beamline, taken + watched, exposure_s),
    )
