"""Act one: turn the modulator perpendicular to the diffracted beam.

A tilt by ``alpha`` smears the tall side walls of the pattern over ``t tan(alpha)``. Two measurements find it:

*z-walk* (coarse, signed, linear): an edge of the pattern is looked up at several z; seen from the beam it
walks by ``tan(alpha)`` per unit of z. It measures the stage's axes, to which the membrane is mounted square
up to a constant.

*sharpness* (fine, the membrane itself): the share of counts scattered far out along x (y) is highest where
the walls are parallel to the beam, and falls equally to either side when mphi (mchi) tilts them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import take_point
from bcmi_beamline.plans.fits import (
    EdgeFit,
    LineFit,
    PoorFit,
    SharpnessFit,
    fit_edge,
    fit_line,
    fit_sharpness,
)
from bcmi_beamline.plans.modulator import (
    Pose,
    check_pose,
    ensure_modulator,
    move_modulator,
    read_pose,
    tilted,
)
from bcmi_beamline.plans.preprocessors import check_exposure, check_window, measure

Tilt = Literal["mchi", "mphi"]

FAR_FROM_START = 1 / 3
"""Share of the half range beyond which an optimum is scanned again, from where it was found."""

WALK_Z = (0.0, 0.15, 0.4, 1.0)
"""Where along its z range an edge is looked up; close ones first, so that it is not lost."""


@dataclass(frozen=True)
class TiltCurve:
    """Sharpness over one tilt, and the fit that says where it is best."""

    uid: str
    angles_deg: np.ndarray
    """Readings, (K,)."""
    sharpness: np.ndarray
    """High-q fraction per place on the modulator and angle, (P, K)."""
    fit: SharpnessFit


@dataclass(frozen=True)
class ZWalk:
    """Position of one edge over z."""

    uid: str
    z_um: np.ndarray
    edges: tuple[EdgeFit, ...]
    line: LineFit


@dataclass(frozen=True)
class AlignmentResult:
    """The pose at which the modulator is perpendicular; it stands there now."""

    mchi_deg: float
    mchi_error_deg: float
    mphi_deg: float
    mphi_error_deg: float
    modulator_position_um: Pose
    curves: dict[Tilt, TiltCurve]
    """Of the last pass."""
    z_walks: dict[Tilt, ZWalk]
    """Empty when no edge was given."""
    uids: tuple[str, ...]
    """Every run, in order."""


def _places(count: int, spacing_um: float) -> np.ndarray:
    """Offsets (P, 2) from the spot, spread evenly (sunflower), the spot itself first."""
    n = np.arange(count)
    angle = n * np.pi * (3 - np.sqrt(5))
    return spacing_um * np.sqrt(n)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _tilt_poses(
    beamline: Beamline, centre: Mapping[str, float], tilt: Tilt, angles_deg: np.ndarray, places: np.ndarray
) -> list[list[Pose]]:
    """Poses per angle and place, each checked."""
    poses = []
    for angle in angles_deg:
        pose = tilted(
            beamline, centre, **{"mchi": centre["mchi"], "mphi": centre["mphi"], tilt: float(angle)}
        )
        poses.append([{**pose, "x": pose["x"] + dx, "y": pose["y"] + dy} for dx, dy in places])
        for place in poses[-1]:
            check_pose(beamline, place)
    return poses


def _sharpness_scan(
    devices: Devices,
    tilt: Tilt,
    centre: Mapping[str, float],
    angles_deg: np.ndarray,
    places: np.ndarray,
    exposure_s: float,
    window: int,
    metadata: dict[str, Any] | None,
) -> MsgGenerator[tuple[str, np.ndarray]]:
    """One run over `angles_deg` and `places`; its uid and the high-q fractions (P, K)."""
    poses = _tilt_poses(devices.beamline, centre, tilt, angles_deg, places)
    nano = devices.nanogoniometer
    key = "eiger_high_q_x" if tilt == "mphi" else "eiger_high_q_y"

    def points() -> MsgGenerator[np.ndarray]:
        values = np.zeros((len(places), len(angles_deg)))
        now = yield from read_pose(devices)
        for k, at_angle in enumerate(poses):
            for p, pose in enumerate(at_angle):
                yield from move_modulator(devices, now, pose)
                now = pose
                point = yield from take_point(devices, nano.x, nano.y, nano.z, nano.mchi, nano.mphi)
                values[p, k] = point.get(key, 0.0)
        return values

    return (
        yield from measure(
            devices,
            points,
            plan_name="align_modulator",
            scan_kind="alignment",
            modulator="in",
            frames=len(angles_deg) * len(places),
            exposure_s=exposure_s,
            window=window,
            more={
                "motors": [getattr(nano, tilt).name],
                "alignment": {"axis": tilt, "method": "sharpness", "places_um": places.tolist()},
            },
            metadata=metadata,
        )
    )


def z_walk(
    devices: Devices,
    tilt: Tilt,
    edge_um: float,
    z_range_um: float = 1500.0,
    half_scan_um: float = 30.0,
    points: int = 25,
    exposure_s: float = 0.2,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[ZWalk]:
    """Look up an edge of the pattern at several z and fit the line along which it walks.

    z goes away from the crystal only. Each search is centred where the line through the earlier ones says.
    The modulator ends where it began.

    Parameters
    ----------
    devices : Devices
        The beamline.
    tilt : {"mchi", "mphi"}
        The tilt to measure: mphi by an edge crossed along x, mchi by one crossed along y.
    edge_um : float
        How far to move x (mphi) or y (mchi) from where it stands for the edge to meet the beam, um.
    z_range_um : float
        From the nearest to the farthest z, um.
    half_scan_um : float
        To either side of the expected edge, um.
    points : int
        Frames per z.
    exposure_s : float
        Per frame, s.
    window : int
        Edge in pixels of the square around the beam that is analysed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    ZWalk

    Raises
    ------
    PoorFit
        When an edge is not found; the modulator is back where it was.
    """
    if not (z_range_um > 0 and half_scan_um > 0 and points >= 7):
        raise ValueError("z walk: z_range_um and half_scan_um must be positive, points 7 or more")
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    nano = devices.nanogoniometer
    start = yield from ensure_modulator(devices, "in")
    axis = "x" if tilt == "mphi" else "y"
    offsets = np.linspace(-half_scan_um, half_scan_um, points)
    heights = start["z"] + z_range_um * np.array(WALK_Z)
    for end in (edge_um - half_scan_um, edge_um + half_scan_um):
        check_pose(devices.beamline, {**start, axis: start[axis] + end, "z": float(heights[-1])})

    def walk() -> MsgGenerator[tuple[list[EdgeFit], LineFit]]:
        edges: list[EdgeFit] = []
        now: Mapping[str, float] = start
        for z in heights:
            places = _expected_edge(heights, edges, z, start[axis] + edge_um) + offsets
            signal = []
            for place in places:
                pose = {**start, axis: float(place), "z": float(z)}
                yield from move_modulator(devices, now, pose)
                now = pose
                point = yield from take_point(devices, nano.x, nano.y, nano.z)
                signal.append(point.get("eiger_high_q_x", 0.0) + point.get("eiger_high_q_y", 0.0))
            edges.append(fit_edge(places, np.array(signal)))
        errors = np.array([edge.position_error for edge in edges])
        return edges, fit_line(heights, np.array([edge.position for edge in edges]), errors)

    scan = measure(
        devices,
        walk,
        plan_name="z_walk",
        scan_kind="alignment",
        modulator="in",
        frames=len(heights) * points,
        exposure_s=exposure_s,
        window=window,
        more={
            "motors": [getattr(nano, axis).name],
            "alignment": {"axis": tilt, "method": "z_walk", "z_um": heights.tolist()},
        },
        metadata=metadata,
    )
    uid, (edges, line) = yield from _back_on_poor_fit(devices, scan, start)
    yield from move_modulator(devices, (yield from read_pose(devices)), start)
    return ZWalk(uid=uid, z_um=heights, edges=tuple(edges), line=line)


def _expected_edge(heights: np.ndarray, edges: list[EdgeFit], z: float, first: float) -> float:
    """Where the line through the edges so far puts the next one."""
    if len(edges) < 2:
        return edges[0].position if edges else first
    found = [edge.position for edge in edges]
    return float(np.polynomial.Polynomial.fit(heights[: len(found)], found, 1)(z))


def _back_on_poor_fit(
    devices: Devices, plan: MsgGenerator[Any], start: Mapping[str, float]
) -> MsgGenerator[Any]:
    """Run `plan`; where it cannot believe a fit, go back to the pose `start` before saying so."""
    try:
        return (yield from plan)
    except PoorFit:
        now = yield from read_pose(devices)
        yield from move_modulator(devices, now, start)
        raise


def _walked(tilt: Tilt, now_deg: float, line: LineFit) -> float:
    """Reading at which an edge no longer walks.

    A stage turned by mphi carries x down as z rises (``R_y^T z``), by mchi it carries y up (``R_x^T z``).
    """
    return now_deg + line.angle_deg if tilt == "mphi" else now_deg - line.angle_deg


def align_modulator(
    devices: Devices,
    half_range_deg: float = 5.0,
    points: int = 25,
    positions: int = 3,
    exposure_s: float = 1.0,
    edge_um: float | None = None,
    spacing_um: float = 3.0,
    max_error_deg: float = 0.4,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[AlignmentResult]:
    """Find the tilts at which the modulator is perpendicular to the diffracted beam, and go there.

    With `edge_um` a z-walk of each tilt comes first. Then the high-q sharpness is scanned over mphi and over
    mchi, x, y and z following so that the same spot stays in the beam at the same distance, at several places
    each. Where the optimum lies far from the start, both are scanned once more around it.

    Parameters
    ----------
    devices : Devices
        The beamline.
    half_range_deg : float
        Degrees to either side of the tilts where it stands.
    points : int
        Angles per tilt.
    positions : int
        Places on the modulator per angle, averaged.
    exposure_s : float
        Per frame, s.
    edge_um : float, optional
        From where it stands to the edge of the pattern, along x and along y, um; no z-walk where absent.
    spacing_um : float
        Between the places, um.
    max_error_deg : float
        A tilt known less well than this is not gone to (half a 23 nm pixel of smear: 0.44 deg).
    window : int
        Edge in pixels of the square around the beam that is analysed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    AlignmentResult

    Raises
    ------
    ValueError
        Before anything moves: a pose beyond the limits or too near to the crystal.
    PoorFit
        When a curve does not say where it is best; the modulator is back in the pose it started from.
    """
    if not (half_range_deg > 0 and points >= 7 and positions >= 1 and spacing_um > 0):
        raise ValueError(
            "alignment: half_range_deg and spacing_um must be positive, points 7 or more, positions 1 or more"
        )
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    start = yield from ensure_modulator(devices, "in")
    places = _places(positions, spacing_um)
    steps = np.linspace(-half_range_deg, half_range_deg, points)
    for tilt in ("mphi", "mchi"):
        _tilt_poses(devices.beamline, start, tilt, start[tilt] + steps, places)

    def search() -> MsgGenerator[AlignmentResult]:
        pose, uids, walks, curves = start, [], {}, {}
        if edge_um is not None:
            for tilt in ("mphi", "mchi"):
                walks[tilt] = yield from z_walk(devices, tilt, edge_um, window=window, metadata=metadata)
                uids.append(walks[tilt].uid)
                pose = yield from _turn(devices, pose, tilt, _walked(tilt, pose[tilt], walks[tilt].line))
        for _ in range(2):
            centre = pose
            for tilt in ("mphi", "mchi"):
                angles = centre[tilt] + steps
                uid, sharpness = yield from _sharpness_scan(
                    devices, tilt, pose, angles, places, exposure_s, window, metadata
                )
                uids.append(uid)
                fit = fit_sharpness(angles, sharpness)
                if fit.angle_error_deg > max_error_deg:
                    raise PoorFit(
                        f"{tilt}: {fit.angle_deg:.2f} +- {fit.angle_error_deg:.2f} deg, wanted within "
                        f"{max_error_deg:g} deg: expose longer or use more positions"
                    )
                curves[tilt] = TiltCurve(uid, angles, sharpness, fit)
                pose = yield from _turn(devices, pose, tilt, fit.angle_deg)
            moved = max(abs(pose[tilt] - centre[tilt]) for tilt in ("mphi", "mchi"))
            if moved <= FAR_FROM_START * half_range_deg:
                break
        mchi, mphi = curves["mchi"].fit, curves["mphi"].fit
        return AlignmentResult(
            mchi_deg=mchi.angle_deg,
            mchi_error_deg=mchi.angle_error_deg,
            mphi_deg=mphi.angle_deg,
            mphi_error_deg=mphi.angle_error_deg,
            modulator_position_um=pose,
            curves=curves,
            z_walks=walks,
            uids=tuple(uids),
        )

    return (yield from _back_on_poor_fit(devices, search(), start))


def _turn(devices: Devices, pose: Mapping[str, float], tilt: Tilt, angle_deg: float) -> MsgGenerator[Pose]:
    """From wherever it is to the spot of `pose` with one tilt at `angle_deg`; the new pose."""
    tilts = {"mchi": pose["mchi"], "mphi": pose["mphi"], tilt: angle_deg}
    target = tilted(devices.beamline, pose, **tilts)
    now = yield from read_pose(devices)
    yield from move_modulator(devices, now, target)
    return target
