"""Act one: turn the modulator perpendicular to the diffracted beam.

A tilt by ``alpha`` smears the tall side walls of the pattern over ``t tan(alpha)``. Three measurements:

*centre*: the pattern is searched and its middle brought into the beam, so that everything after sees it.

*z-walk* (signed, linear): edges of the pattern are looked up at several z; seen from the beam they walk by
``tan(alpha)`` per unit of z. It measures the stage's axes, to which the membrane is mounted square up to a
constant (squareness) that it cannot see.

*pivot*: how far the pattern walks aside when it is tilted says how far the pivot lies from where the survey
has it. A tilt that reads 1.5 deg too much turns a lever of 5 mm by as much: the spot would leave the pattern.

*sharpness* (the membrane itself): the share of counts scattered far out along x (y) is highest where the
walls are parallel to the beam and falls equally to either side when mphi (mchi) tilts them. Interference of
the walls under the small beam makes it differ from place to place, so many places are averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator
from scipy import optimize

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices
from bcmi_beamline.devices.pose_math import beam_on_membrane
from bcmi_beamline.plans._stubs import take_point
from bcmi_beamline.plans.fits import (
    EdgeFit,
    LineFit,
    PoorFit,
    SharpnessFit,
    SlabFit,
    fit_edge,
    fit_line,
    fit_sharpness,
    fit_slab,
)
from bcmi_beamline.plans.modulator import (
    Pose,
    as_it_stands,
    check_pose,
    ensure_modulator,
    move_modulator,
    read_pose,
    tilted,
)
from bcmi_beamline.plans.preprocessors import check_exposure, check_window, measure
from bcmi_beamline.plans.trajectories import spiral

Tilt = Literal["mchi", "mphi"]
TILTS: tuple[Tilt, Tilt] = ("mphi", "mchi")

FAR_FROM_START = 1 / 3
"""Share of the half range beyond which an optimum is scanned again, from where it was found."""

WALK_Z = (0.0, 0.15, 0.4, 1.0)
"""Where along its z range an edge is looked up; close ones first, so that it is not lost."""

FAR_PX = 100.0
"""Pixels from the beam beyond which the walls scatter most of what arrives: 3 deg halve it."""

PATTERN_ERROR_UM = 0.3
"""The middle of a ragged pattern is found no better than this across its edges."""

DISAGREEMENT = 4.0
"""z-walk and sharpness may differ by this many standard uncertainties."""


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
class Pattern:
    """The patterned field of the modulator; its middle is in the beam now."""

    uids: tuple[str, ...]
    x_um: float
    y_um: float
    width_um: tuple[float, float]
    """Along x and y."""
    fits: tuple[SlabFit, SlabFit]
    scans: tuple[np.ndarray, np.ndarray]
    """(position, logarithm of the high-q fraction) along x and along y, (points, 2)."""


@dataclass(frozen=True)
class ZWalk:
    """Position of one edge over z."""

    uid: str
    z_um: np.ndarray
    edges: tuple[EdgeFit, ...]
    line: LineFit
    angle_deg: float
    """Reading of the tilt at which the edge would not walk."""
    angle_error_deg: float


@dataclass(frozen=True)
class PivotCalibration:
    """Point about which the tilts turn, as the pattern walks; the nanogoniometer stands by it now."""

    uid: str
    pivot_um: tuple[float, float, float]
    pivot_error_um: tuple[float, float, float]
    """Standard uncertainties; x and y, which move the pattern in the second order only, hardly improve on the
    survey."""
    walk_um: float
    """Largest step aside that the earlier pivot left."""
    residual_um: float
    """What is left of it, rms."""

    def __repr__(self) -> str:
        numbers = zip("xyz", self.pivot_um, self.pivot_error_um, strict=True)
        return (
            "pivot "
            + ", ".join(f"{a} = {v:.1f} +- {e:.1f} um" for a, v, e in numbers)
            + (f"; the pattern walked {self.walk_um:.1f} um, {self.residual_um:.2f} um are left")
        )


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
    """Empty when none was asked for."""
    pattern: Pattern | None
    """None when the pattern was not searched."""
    pivot: PivotCalibration | None
    """None when it was not asked for."""
    uids: tuple[str, ...]
    """Every run, in order."""

    def __repr__(self) -> str:
        lines = [
            f"modulator perpendicular at mchi = {self.mchi_deg:.3f} +- {self.mchi_error_deg:.3f} deg, "
            f"mphi = {self.mphi_deg:.3f} +- {self.mphi_error_deg:.3f} deg"
        ]
        for tilt, curve in self.curves.items():
            fit, walk = curve.fit, self.z_walks.get(tilt)
            lines.append(
                f"{tilt}: sharpness {fit.angle_deg:.3f} +- {fit.angle_error_deg:.3f} deg"
                + (f", z-walk {walk.angle_deg:.3f} +- {walk.angle_error_deg:.3f} deg" if walk else "")
            )
        return "\n".join(lines + ([str(self.pivot)] if self.pivot else []))


# -- the pieces of a scan ------------------------------------------------------------------------------


def _run(
    devices: Devices,
    points: Any,
    frames: int,
    exposure_s: float,
    window: int,
    axes: list[str],
    alignment: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    plan_name: str = "align_modulator",
) -> MsgGenerator[tuple[str, Any]]:
    """One run of kind "alignment" over axes of the nanogoniometer."""
    nano = devices.nanogoniometer
    return (
        yield from measure(
            devices,
            points,
            plan_name=plan_name,
            scan_kind="alignment",
            modulator="in",
            frames=frames,
            exposure_s=exposure_s,
            window=window,
            high_q_px=min(FAR_PX, 0.4 * window),
            more={"motors": [getattr(nano, axis).name for axis in axes], "alignment": dict(alignment)},
            metadata=metadata,
        )
    )


def _walk_poses(devices: Devices, poses: list[Pose]) -> MsgGenerator[list[dict[str, float]]]:
    """A frame at each pose."""
    nano = devices.nanogoniometer
    now: Mapping[str, float] = yield from read_pose(devices)
    taken = []
    for pose in poses:
        yield from move_modulator(devices, now, pose)
        now = pose
        taken.append((yield from take_point(devices, nano.x, nano.y, nano.z, nano.mchi, nano.mphi)))
    return taken


def _contrast(points: list[dict[str, float]]) -> np.ndarray:
    """Logarithm of the share of counts far out in any direction: higher where the beam meets the pattern.

    The logarithm, because on the pattern it varies from place to place by a factor.
    """
    share = [p.get("eiger_high_q_x", 0.0) + p.get("eiger_high_q_y", 0.0) for p in points]
    return np.log(np.maximum(share, 1e-9))


def _go(devices: Devices, target: Mapping[str, float]) -> MsgGenerator[None]:
    """From wherever it is to `target`."""
    now = yield from read_pose(devices)
    yield from move_modulator(devices, now, target)


def _back_on_poor_fit(
    devices: Devices, plan: MsgGenerator[Any], start: Mapping[str, float]
) -> MsgGenerator[Any]:
    """Run `plan`; where it cannot believe a fit, go back to the pose `start` before saying so.

    A pivot that the plan has calibrated is forgotten with it.
    """
    nano: Any = devices.nanogoniometer
    known = yield from bps.rd(nano.pivot)
    try:
        return (yield from plan)
    except PoorFit:
        yield from bps.mv(nano.pivot, known)
        yield from _go(devices, start)
        raise


# -- find the pattern ----------------------------------------------------------------------------------


def centre_pattern(
    devices: Devices,
    pattern_um: float = 40.0,
    search_um: float = 160.0,
    points: int = 31,
    exposure_s: float = 0.2,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[Pattern]:
    """Search the patterned field of the modulator and bring its middle into the beam.

    A spiral of half the field's width finds it; a scan along x and one along y across both edges centre it.

    Parameters
    ----------
    devices : Devices
        The beamline.
    pattern_um : float
        Width of the field as designed, um.
    search_um : float
        Diameter of the search, um.
    points : int
        Frames of each scan across the field.
    exposure_s : float
        Per frame, s.
    window : int
        Edge in pixels of the square around the beam that is analysed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    Pattern

    Raises
    ------
    PoorFit
        When there is no pattern within the search; the modulator is back where it was.
    """
    if not (pattern_um > 0 and search_um >= pattern_um and points >= 9):
        raise ValueError("pattern: pattern_um positive, search_um at least pattern_um, points 9 or more")
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    start = yield from ensure_modulator(devices, "in")
    beamline = yield from as_it_stands(devices)
    offsets = spiral((search_um, search_um), pattern_um / 2, "ellipse")
    reach = search_um / 2 + pattern_um
    for sign in (-1, 1):
        check_pose(beamline, {**start, "x": start["x"] + sign * reach, "y": start["y"] + sign * reach})

    def scan(poses: list[Pose], axes: list[str], method: str) -> MsgGenerator[tuple[str, np.ndarray]]:
        uid, taken = yield from _run(
            devices,
            lambda: _walk_poses(devices, poses),
            len(poses),
            exposure_s,
            window,
            axes,
            {"axis": "".join(axes), "method": method},
            metadata,
            plan_name="centre_pattern",
        )
        return uid, _contrast(taken)

    def search() -> MsgGenerator[Pattern]:
        poses = [{**start, "x": start["x"] + dx, "y": start["y"] + dy} for dx, dy in offsets]
        uid, signal = yield from scan(poses, ["x", "y"], "search")
        middle = {**start, **_brightest(poses, signal)}
        uids, fits, scans = [uid], [], []
        for axis in ("x", "y"):
            places = middle[axis] + np.linspace(-pattern_um, pattern_um, points)
            uid, signal = yield from scan([{**middle, axis: p} for p in places], [axis], "edges")
            fits.append(fit_slab(places, signal))
            middle[axis] = fits[-1].centre
            uids.append(uid)
            scans.append(np.stack([places, signal], axis=1))
        yield from _go(devices, middle)
        return Pattern(
            uids=tuple(uids),
            x_um=middle["x"],
            y_um=middle["y"],
            width_um=(fits[0].width, fits[1].width),
            fits=(fits[0], fits[1]),
            scans=(scans[0], scans[1]),
        )

    return (yield from _back_on_poor_fit(devices, search(), start))


def _brightest(poses: list[Pose], signal: np.ndarray) -> dict[str, float]:
    """Middle of the places where the signal stands out; refuses where nothing does.

    The membrane around the pattern is featureless: what is not pattern agrees to within counting statistics.
    """
    low, high = float(signal.min()), float(signal.max())
    inside = signal > (low + high) / 2
    bare = signal[~inside]
    if high - low < 10 * float(np.std(bare)) or len(bare) < 3:
        raise PoorFit(
            f"pattern: high-q fraction from {np.exp(low):.4f} to {np.exp(high):.4f} shows no field within "
            f"the search (lower half scatters by {np.std(bare):.1%}): search wider, or is the modulator out?"
        )
    return {
        axis: float(np.mean([p[axis] for p, lit in zip(poses, inside, strict=True) if lit])) for axis in "xy"
    }


# -- z-walk --------------------------------------------------------------------------------------------


def z_walk(
    devices: Devices,
    width_um: tuple[float, float] = (40.0, 40.0),
    z_range_um: float = 1500.0,
    half_scan_um: float = 15.0,
    points: int = 15,
    exposure_s: float = 0.2,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[dict[Tilt, ZWalk]]:
    """Look up two edges of the pattern at several z and fit the lines along which they walk.

    An edge crossed along x tells of mphi, one crossed along y of mchi. The middle of the pattern is in the
    beam as it starts. z goes away from the crystal only, and each search is centred where the lines through
    the earlier ones say. The modulator ends where it began.

    Parameters
    ----------
    devices : Devices
        The beamline.
    width_um : tuple of float
        Width of the pattern along x and y, um.
    z_range_um : float
        From the nearest to the farthest z, um.
    half_scan_um : float
        To either side of the expected edge, um.
    points : int
        Frames per edge and z.
    exposure_s : float
        Per frame, s.
    window : int
        Edge in pixels of the square around the beam that is analysed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    dict
        A `ZWalk` for "mphi" and for "mchi".

    Raises
    ------
    PoorFit
        When an edge is not found; the modulator is back where it was.
    """
    if not (min(width_um) > 0 and z_range_um > 0 and half_scan_um > 0 and points >= 9):
        raise ValueError("z walk: width_um, z_range_um, half_scan_um must be positive, points 9 or more")
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    start = yield from ensure_modulator(devices, "in")
    beamline = yield from as_it_stands(devices)
    half = {"x": width_um[0] / 2, "y": width_um[1] / 2}
    offsets = np.linspace(-half_scan_um, half_scan_um, points)
    heights = start["z"] + z_range_um * np.array(WALK_Z)
    for axis in ("x", "y"):
        check_pose(
            beamline,
            {**start, axis: start[axis] + half[axis] + half_scan_um, "z": float(heights[-1])},
        )

    def walk() -> MsgGenerator[dict[str, list[EdgeFit]]]:
        edges: dict[str, list[EdgeFit]] = {"x": [], "y": []}
        for z in heights:
            expected = {a: _expected(heights, edges[a], z, start[a] + half[a]) for a in ("x", "y")}
            middle = {**start, "z": float(z), **{a: expected[a] - half[a] for a in ("x", "y")}}
            for axis in ("x", "y"):
                places = expected[axis] + offsets
                taken = yield from _walk_poses(devices, [{**middle, axis: float(p)} for p in places])
                edges[axis].append(fit_edge(places, _contrast(taken)))
        return edges

    scan = _run(
        devices,
        walk,
        2 * len(heights) * points,
        exposure_s,
        window,
        ["x", "y", "z"],
        {"axis": "mphi, mchi", "method": "z_walk", "z_um": heights.tolist()},
        metadata,
        plan_name="z_walk",
    )
    uid, edges = yield from _back_on_poor_fit(devices, scan, start)
    yield from _go(devices, start)
    return {
        "mphi": _walked(uid, heights, edges["x"], start["mphi"], 1),
        "mchi": _walked(uid, heights, edges["y"], start["mchi"], -1),
    }


def _walked(uid: str, heights: np.ndarray, edges: list[EdgeFit], now_deg: float, sign: int) -> ZWalk:
    """Line through the edges and the reading at which they would not walk.

    A stage turned by mphi carries x down as z rises (``R_y^T z``), turned by mchi it carries y up
    (``R_x^T z``): hence `sign`.
    """
    errors = np.array([edge.position_error for edge in edges])
    line = fit_line(heights, np.array([edge.position for edge in edges]), errors)
    return ZWalk(
        uid=uid,
        z_um=heights,
        edges=tuple(edges),
        line=line,
        angle_deg=now_deg + sign * line.angle_deg,
        angle_error_deg=line.angle_error_deg,
    )


def _expected(heights: np.ndarray, edges: list[EdgeFit], z: float, first: float) -> float:
    """Where the line through the edges so far puts the next one."""
    if len(edges) < 2:
        return edges[0].position if edges else first
    found = [edge.position for edge in edges]
    return float(np.polynomial.Polynomial.fit(heights[: len(found)], found, 1)(z))


# -- pivot ---------------------------------------------------------------------------------------------


def calibrate_pivot(
    devices: Devices,
    pattern_um: float = 40.0,
    tilt_deg: float = 4.0,
    points: int = 21,
    exposure_s: float = 0.2,
    survey_error_um: float = 200.0,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[PivotCalibration]:
    """Tilt the modulator both ways, see how far the pattern walks, and tell the nanogoniometer its pivot.

    The middle of the pattern is in the beam as it starts. It is looked up along x at mphi +- `tilt_deg` and
    along y at mchi +- `tilt_deg`, compensated by the pivot known so far; what is left gives the true one. The
    modulator ends where it began.

    Parameters
    ----------
    devices : Devices
        The beamline.
    pattern_um : float
        Width of the patterned field, um.
    tilt_deg : float
        To either side of where it stands, degrees.
    points : int
        Frames of each scan across the field.
    exposure_s : float
        Per frame, s.
    survey_error_um : float
        How well the pivot was known before, um (standard uncertainty).
    window : int
        Edge in pixels of the square around the beam that is analysed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    PivotCalibration

    Raises
    ------
    ValueError
        Before anything moves: a pose beyond the limits or too near to the crystal.
    PoorFit
        When the pattern is not found at a tilt; the pivot is as before, the modulator where it was.
    """
    if not (pattern_um > 0 and tilt_deg > 0 and points >= 9 and survey_error_um > 0):
        raise ValueError("pivot: pattern_um, tilt_deg and survey_error_um must be positive, points 9 or more")
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    start = yield from ensure_modulator(devices, "in")
    beamline = yield from as_it_stands(devices)
    steps = 1.2 * pattern_um * np.linspace(-1, 1, points)
    scans: list[tuple[str, list[Pose]]] = []
    for axis, tilt, sign in ((a, t, s) for a, t in zip("xy", TILTS, strict=True) for s in (-1, 1)):
        tilts = {"mchi": start["mchi"], "mphi": start["mphi"], tilt: start[tilt] + sign * tilt_deg}
        middle = tilted(beamline, start, **tilts)
        scans.append((axis, [{**middle, axis: middle[axis] + float(step)} for step in steps]))
        for pose in (scans[-1][1][0], scans[-1][1][-1]):
            check_pose(beamline, pose)

    def look() -> MsgGenerator[list[SlabFit]]:
        found = []
        for axis, poses in scans:
            taken = yield from _walk_poses(devices, poses)
            found.append(fit_slab(np.array([pose[axis] for pose in poses]), _contrast(taken)))
        return found

    scan = _run(
        devices,
        look,
        len(scans) * points,
        exposure_s,
        window,
        ["x", "y", "mchi", "mphi"],
        {"axis": "mphi, mchi", "method": "pivot", "tilt_deg": tilt_deg},
        metadata,
        plan_name="calibrate_pivot",
    )
    uid, slabs = yield from _back_on_poor_fit(devices, scan, start)
    seen = [{**poses[0], axis: slab.centre} for (axis, poses), slab in zip(scans, slabs, strict=True)]
    errors = np.array([max(slab.centre_error, PATTERN_ERROR_UM) for slab in slabs])
    axes = [axis for axis, _ in scans]
    known = beamline.nanogoniometer.pivot_um
    pivot, pivot_errors, walk, residual = _fit_pivot(start, seen, axes, errors, known, survey_error_um)
    yield from _go(devices, start)
    yield from bps.mv(devices.nanogoniometer.pivot, np.array([*pivot, *known[3:]]))
    return PivotCalibration(uid, pivot, pivot_errors, walk, residual)


def _fit_pivot(
    start: Mapping[str, float],
    seen: list[Pose],
    axes: list[str],
    errors: np.ndarray,
    known: Sequence[float],
    survey_error_um: float,
) -> tuple[tuple[float, float, float], tuple[float, float, float], float, float]:
    """Pivot that puts the same spot of the membrane into the beam at every pose `seen`.

    Gauss-Newton on where the beam meets the membrane, one coordinate per pose, with the survey as prior. The
    middle of the pattern, one parameter along each axis, is free.
    """

    def spots(pivot: np.ndarray) -> np.ndarray:
        found = []
        for pose, axis in zip(seen, axes, strict=True):
            place = pose["x"], pose["y"], pose["z"]
            spot, _ = beam_on_membrane(place, pose["mchi"], pose["mphi"], (*pivot, *known[3:]))
            found.append(spot["xy".index(axis)])
        return np.array(found)

    middle = np.array([[axis == "x", axis == "y"] for axis in axes], float)
    prior = np.diag([1 / survey_error_um] * 3)
    known_pivot = np.array(known[:3])

    def misses(parameters: np.ndarray) -> np.ndarray:
        pivot, spot = parameters[:3], parameters[3:]
        return np.concatenate([(spots(pivot) - middle @ spot) / errors, prior @ (pivot - known_pivot)])

    first = np.concatenate([known_pivot, np.linalg.lstsq(middle, spots(known_pivot), rcond=None)[0]])
    fit = optimize.least_squares(misses, first, x_scale=[100.0] * 3 + [1.0] * 2)
    deviations = np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))
    walk = float(np.abs(spots(known_pivot) - middle @ first[3:]).max())
    left = spots(fit.x[:3]) - middle @ fit.x[3:]
    x, y, z = (float(v) for v in fit.x[:3])
    ex, ey, ez = (float(v) for v in deviations[:3])
    return (x, y, z), (ex, ey, ez), walk, float(np.sqrt(np.mean(left**2)))


# -- sharpness -----------------------------------------------------------------------------------------


def _tilt_poses(
    beamline: Beamline,
    centre: Mapping[str, float],
    tilt: Tilt,
    angles_deg: np.ndarray,
    positions: int,
    field_um: float,
) -> list[Pose]:
    """Poses angle by angle, `positions` places each, no place twice; all checked.

    The places fill a disc of diameter `field_um` around the spot evenly: a sunflower, shuffled, so that no
    trend across the field looks like one over the angles.
    """
    count = len(angles_deg)
    shuffled = np.random.default_rng(0).permutation(count * positions)
    poses = []
    for k, angle in enumerate(angles_deg):
        tilts = {"mchi": centre["mchi"], "mphi": centre["mphi"], tilt: float(angle)}
        pose = tilted(beamline, centre, **tilts)
        for p in range(positions):
            n = shuffled[p * count + k]
            radius = field_um / 2 * np.sqrt(n / (count * positions))
            turn = n * np.pi * (3 - np.sqrt(5))
            poses.append(
                {**pose, "x": pose["x"] + radius * np.cos(turn), "y": pose["y"] + radius * np.sin(turn)}
            )
            check_pose(beamline, poses[-1])
    return poses


def _sharpness_scan(
    devices: Devices,
    tilt: Tilt,
    centre: Mapping[str, float],
    angles_deg: np.ndarray,
    positions: int,
    field_um: float,
    exposure_s: float,
    window: int,
    metadata: dict[str, Any] | None,
) -> MsgGenerator[TiltCurve]:
    """One run over `angles_deg`, and its fit."""
    beamline = yield from as_it_stands(devices)
    poses = _tilt_poses(beamline, centre, tilt, angles_deg, positions, field_um)
    uid, taken = yield from _run(
        devices,
        lambda: _walk_poses(devices, poses),
        len(poses),
        exposure_s,
        window,
        [tilt],
        {"axis": tilt, "method": "sharpness", "positions": positions, "field_um": field_um},
        metadata,
    )
    key = "eiger_high_q_x" if tilt == "mphi" else "eiger_high_q_y"
    values = np.array([point.get(key, 0.0) for point in taken]).reshape(len(angles_deg), positions).T
    return TiltCurve(uid, angles_deg, values, fit_sharpness(angles_deg, values))


def _together(
    tilt: Tilt, fit: SharpnessFit, walk: ZWalk | None, squareness_error_deg: float
) -> tuple[float, float]:
    """Weighted mean of sharpness and z-walk, the latter no better than the squareness is known.

    Raises
    ------
    PoorFit
        When the two contradict each other.
    """
    if walk is None:
        return fit.angle_deg, fit.angle_error_deg
    errors = np.array([fit.angle_error_deg, np.hypot(walk.angle_error_deg, squareness_error_deg)])
    if abs(fit.angle_deg - walk.angle_deg) > DISAGREEMENT * np.hypot(*errors):
        raise PoorFit(
            f"{tilt}: sharpness says {fit.angle_deg:.2f} +- {errors[0]:.2f} deg, the z-walk "
            f"{walk.angle_deg:.2f} +- {errors[1]:.2f} deg: is the membrane mounted square?"
        )
    weights = errors**-2
    mean = (weights @ [fit.angle_deg, walk.angle_deg]) / weights.sum()
    return float(mean), float(weights.sum() ** -0.5)


# -- the plan ------------------------------------------------------------------------------------------


def align_modulator(
    devices: Devices,
    half_range_deg: float = 5.0,
    points: int = 25,
    positions: int = 3,
    exposure_s: float = 1.0,
    pattern_um: float | None = 40.0,
    walk: bool = True,
    pivot: bool = True,
    squareness_error_deg: float = 0.1,
    max_error_deg: float = 0.4,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[AlignmentResult]:
    """Find the tilts at which the modulator is perpendicular to the diffracted beam, and go there.

    The pattern is centred, a z-walk turns each tilt near to its place, the pivot is calibrated there, then
    the sharpness is scanned over mphi and over mchi, x, y and z following so that the spot stays in the beam
    at the same distance. Where the optimum lies far from the start, both are scanned once more around it.

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
        Per frame of the sharpness scans, s; a fifth of it per frame of the others.
    pattern_um : float, optional
        Width of the patterned field as designed, um; None to take the beam to be on it, near its middle.
    walk : bool
        Whether to do z-walks; they need `pattern_um`.
    pivot : bool
        Whether to calibrate the pivot before the sharpness is scanned; it needs `pattern_um`.
    squareness_error_deg : float
        How well the membrane is known to be square to the stage, deg: limits the weight of the z-walks.
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
    if not (half_range_deg > 0 and points >= 7 and positions >= 1 and squareness_error_deg >= 0):
        raise ValueError("alignment: half_range_deg must be positive, points 7 or more, positions 1 or more")
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    start = yield from ensure_modulator(devices, "in")
    beamline = yield from as_it_stands(devices)
    field_um = 0.6 * (40.0 if pattern_um is None else pattern_um)
    steps = np.linspace(-half_range_deg, half_range_deg, points)
    for tilt in TILTS:
        _tilt_poses(beamline, start, tilt, start[tilt] + steps, positions, field_um)
    quick = {"exposure_s": exposure_s / 5, "window": window, "metadata": metadata}

    def search() -> MsgGenerator[AlignmentResult]:
        uids: list[str] = []
        walks: dict[Tilt, ZWalk] = {}
        curves: dict[Tilt, TiltCurve] = {}
        pattern: Pattern | None = None
        if pattern_um is not None:
            pattern = yield from centre_pattern(devices, pattern_um, 4 * pattern_um, **quick)
            uids += pattern.uids
        pose = yield from read_pose(devices)
        if pattern is not None and walk:
            walks = yield from z_walk(devices, pattern.width_um, **quick)
            uids.append(walks["mphi"].uid)
            for tilt in TILTS:
                pose = yield from _turn(devices, pose, tilt, walks[tilt].angle_deg)
            yield from _level(devices, walks)
        calibrated: PivotCalibration | None = None
        if pattern is not None and pivot:
            calibrated = yield from calibrate_pivot(devices, pattern_um=pattern.width_um[0], **quick)
            uids.append(calibrated.uid)
            pose = yield from read_pose(devices)
        found: dict[Tilt, tuple[float, float]] = {}
        for _ in range(2):
            centre = pose
            for tilt in TILTS:
                curves[tilt] = yield from _sharpness_scan(
                    devices,
                    tilt,
                    pose,
                    centre[tilt] + steps,
                    positions,
                    field_um,
                    exposure_s,
                    window,
                    metadata,
                )
                uids.append(curves[tilt].uid)
                found[tilt] = _together(tilt, curves[tilt].fit, walks.get(tilt), squareness_error_deg)
                angle, error = found[tilt]
                if error > max_error_deg:
                    raise PoorFit(
                        f"{tilt}: {angle:.2f} +- {error:.2f} deg, wanted within {max_error_deg:g} deg: "
                        "expose longer or use more positions"
                    )
                pose = yield from _turn(devices, pose, tilt, angle)
            if max(abs(pose[tilt] - centre[tilt]) for tilt in TILTS) <= FAR_FROM_START * half_range_deg:
                break
        return AlignmentResult(
            mchi_deg=found["mchi"][0],
            mchi_error_deg=found["mchi"][1],
            mphi_deg=found["mphi"][0],
            mphi_error_deg=found["mphi"][1],
            modulator_position_um=pose,
            curves=curves,
            z_walks=walks,
            pattern=pattern,
            pivot=calibrated,
            uids=tuple(uids),
        )

    return (yield from _back_on_poor_fit(devices, search(), start))


def _level(devices: Devices, walks: Mapping[Tilt, ZWalk]) -> MsgGenerator[None]:
    """Tell the nanogoniometer at which readings it is level, which is what a z-walk measures."""
    nano: Any = devices.nanogoniometer
    known = yield from bps.rd(nano.pivot)
    level = [walks[tilt].angle_deg for tilt in ("mchi", "mphi")]
    yield from bps.mv(nano.pivot, np.array([*known[:3], *level]))


def _turn(devices: Devices, pose: Mapping[str, float], tilt: Tilt, angle_deg: float) -> MsgGenerator[Pose]:
    """To the spot of `pose` with one tilt at `angle_deg`; the new pose."""
    tilts = {"mchi": pose["mchi"], "mphi": pose["mphi"], tilt: angle_deg}
    target = tilted((yield from as_it_stands(devices)), pose, **tilts)
    yield from _go(devices, target)
    return target
