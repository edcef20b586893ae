"""Act two: scan the modulator through the Bragg beam, so that ptychography can say what it is."""

from dataclasses import dataclass
from typing import Any

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import move, take_point
from bcmi_beamline.plans.modulator import Pose, check_pose, ensure_modulator
from bcmi_beamline.plans.preprocessors import check_exposure, check_window, measure
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

    @property
    def reference(self) -> dict[str, Any]:
        """Provenance for `rocking_scan`'s ``calibration``."""
        return {"uid": self.uid, "modulator_position_um": self.modulator_position_um}


def calibrate_modulator(
    devices: Devices,
    extent_um: tuple[float, float] = (6.0, 6.0),
    step_um: float = 0.12,
    exposure_s: float = 0.2,
    shape: Shape = "rectangle",
    window: int = 432,
    beam_um: float = 1.5,
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
    beamline, nano = devices.beamline, devices.nanogoniometer
    offsets = spiral(extent_um, step_um, shape)
    if len(offsets) < 10:
        raise ValueError(f"calibration: {len(offsets)} points; reduce step_um ({step_um}) or widen extent_um")
    check_exposure(exposure_s)
    check_window(beamline, window)
    pose = yield from ensure_modulator(devices, "in")
    for corner in (offsets.min(axis=0), offsets.max(axis=0)):
        check_pose(beamline, {**pose, "x": pose["x"] + corner[0], "y": pose["y"] + corner[1]})
    path = report_path(offsets, beam_um)

    def points() -> MsgGenerator[int]:
        saturated = 0
        for dx, dy in offsets:
            yield from move(nano.x, pose["x"] + dx, nano.y, pose["y"] + dy)
            point = yield from take_point(devices, nano.x, nano.y)
            saturated += point.get("eiger_saturated", 0) > 0
        return saturated

    def centre() -> MsgGenerator[None]:
        yield from bps.mv(nano.x, pose["x"], nano.y, pose["y"])

    uid, saturated = yield from measure(
        devices,
        points,
        plan_name="calibrate_modulator",
        scan_kind="ptychography",
        modulator="in",
        frames=len(offsets),
        exposure_s=exposure_s,
        window=window,
        more={
            "motors": [nano.x.name, nano.y.name],
            "spiral": {
                "extent_um": [float(v) for v in extent_um],
                "step_um": step_um,
                "shape": shape,
                "overlap": path.overlap,
                "path_um": path.path_length,
            },
        },
        metadata=metadata,
    )
    yield from centre()
    return CalibrationResult(
        uid=uid, points=len(offsets), path=path, modulator_position_um=pose, saturated_frames=saturated
    )
