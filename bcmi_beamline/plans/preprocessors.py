"""Safety and provenance around every scan: what the hardware is left in, what the start document says."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from bluesky import plan_stubs as bps
from bluesky import preprocessors as bpp
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices import Devices, EigerPlan
from bcmi_beamline.devices.pose_math import AXES
from bcmi_beamline.plans.bounds import EXPOSURE_S, window_bounds
from bcmi_beamline.plans.modulator import as_it_stands, distance_m, read_pose, retract_modulator

ScanKind = Literal["rocking", "ptychography", "alignment", "bragg_peak"]
Metadata = Mapping[str, Any]


def safe_state_wrapper(plan: MsgGenerator, devices: Devices, retract: bool = False) -> MsgGenerator[Any]:
    """Run `plan`; whatever happens to it, close the shutter; on failure stop what may move first.

    Failure is an error as well as an abort or stop by the operator. The detector is disarmed by the unstage
    that belongs to its stage (`measure`).

    Parameters
    ----------
    plan : generator
    devices : Devices
    retract : bool
        On failure also take the modulator out. Off by default: after an interruption the modulator is
        where the operator left it, calibrated.
    """

    def stop(_error: Exception) -> MsgGenerator[None]:
        yield from bps.mv(devices.shutter, 0)
        for motor in _movers(devices):
            yield from bps.stop(motor)
        if retract:
            yield from retract_modulator(devices)

    def close() -> MsgGenerator[None]:
        yield from bps.mv(devices.shutter, 0)

    return (yield from bpp.contingency_wrapper(plan, except_plan=stop, final_plan=close))


def make_safe(devices: Devices, retract: bool = False) -> MsgGenerator[None]:
    """Close the shutter, stop every motor and disarm the detector, whatever was going on.

    For after a process that was killed in the middle of a plan: it could not clean up behind itself.

    Parameters
    ----------
    devices : Devices
        The beamline.
    retract : bool
        Take the modulator out as well.
    """
    yield from bps.mv(devices.shutter, 0)
    stoppable: list[Any] = [*_movers(devices), devices.eiger]
    for device in stoppable:
        yield from bps.stop(device)
    if retract:
        yield from retract_modulator(devices)


def _movers(devices: Devices) -> list[Any]:
    """The motors that plans move, those of the modulator first."""
    nano, sample = devices.nanogoniometer, devices.sample_stage
    motors = [getattr(nano, axis) for axis in AXES]
    return [*motors, devices.diffractometer.rock, sample.x, sample.y, sample.z]


def scan_metadata(
    beamline: Beamline,
    *,
    plan_name: str,
    scan_kind: ScanKind,
    pose: Mapping[str, float],
    modulator: Literal["in", "out"],
    window: int,
    frames: int,
    exposure_s: float,
    count_cutoff: float,
) -> dict[str, Any]:
    """Start-document keys from which a run is understood without anything else.

    Parameters
    ----------
    beamline : Beamline
        As it stands: the geometry is that of the energy as read.
    pose : mapping
        Nanogoniometer readings x, y, z (um), mchi, mphi (deg) as the run starts.
    window : int
        Edge in pixels of the square around the configured beam that is analysed.
    """
    eiger = beamline.eiger
    pivot = beamline.nanogoniometer.pivot_um
    geometry = beamline.geometry(distance_m(beamline, pose) if modulator == "in" else 0.0)
    return {
        "plan_name": plan_name,
        "scan_kind": scan_kind,
        "num_points": frames,
        "exposure_s": exposure_s,
        "geometry": dataclasses.asdict(geometry),
        "window": {"size": window, "row": eiger.beam_row, "column": eiger.beam_column},
        "detector": {
            "masked_rows": [list(span) for span in eiger.masked_rows],
            "masked_columns": [list(span) for span in eiger.masked_columns],
            "count_cutoff": count_cutoff,
        },
        "modulator": modulator,
        "modulator_position_um": {axis: float(value) for axis, value in pose.items()},
        "pivot_um": list(pivot),
    }


def check_window(beamline: Beamline, window: int) -> None:
    """Refuse a window that does not lie on the detector.

    Raises
    ------
    ValueError
        With the largest one that does.
    """
    smallest, largest = window_bounds(beamline)
    if not smallest <= window <= largest:
        raise ValueError(f"window: {window} pixels around the beam; choose {smallest} to {largest}")


def check_exposure(exposure_s: float) -> None:
    """Refuse an exposure that the detector cannot do or nobody means."""
    shortest, longest = EXPOSURE_S
    if not shortest <= exposure_s <= longest:
        raise ValueError(f"exposure_s: {exposure_s} s; choose {shortest:g} to {longest:g}")


def check_target(name: str, value: float, low: float, high: float) -> None:
    """Refuse a target beyond the limits of its axis, before anything moves."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value:g} lies outside its limits [{low:g}, {high:g}]")


def measure(
    devices: Devices,
    points: Callable[[], MsgGenerator[Any]],
    *,
    plan_name: str,
    scan_kind: ScanKind,
    modulator: Literal["in", "out"],
    frames: int,
    exposure_s: float,
    window: int,
    high_q_px: float | None = None,
    more: Metadata | None = None,
    metadata: Metadata | None = None,
) -> MsgGenerator[tuple[str, Any]]:
    """One run: arm once, open the shutter, do `points`, leave everything safe.

    Parameters
    ----------
    points : callable
        Returns the plan that takes all points.
    high_q_px : float, optional
        Pixels from the beam beyond which the high-q fractions count.
    more : mapping, optional
        Further start-document keys of the plan.
    metadata : mapping, optional
        Start-document keys of the user; they do not replace those that data reduction depends on.

    Returns
    -------
    uid : str
        Of the run.
    result
        What `points` returned.
    """
    eiger: Any = devices.eiger  # bluesky's protocols are typed more narrowly than ophyd's devices
    outcome: list[Any] = []

    def lit() -> MsgGenerator[Any]:
        yield from bps.mv(devices.shutter, 1)
        outcome.append((yield from points()))

    def run() -> MsgGenerator[str]:
        count_cutoff = yield from bps.rd(eiger.cam.count_cutoff)
        beamline = yield from as_it_stands(devices)
        pose = yield from read_pose(devices)
        start = scan_metadata(
            beamline,
            plan_name=plan_name,
            scan_kind=scan_kind,
            pose=pose,
            modulator=modulator,
            window=window,
            frames=frames,
            exposure_s=exposure_s,
            count_cutoff=float(count_cutoff),
        )
        start = {**(metadata or {}), **start, **(more or {})}
        return (yield from bpp.run_wrapper(safe_state_wrapper(lit(), devices), md=start))

    plan = EigerPlan(frames=frames, exposure_s=exposure_s, window=window, high_q_px=high_q_px)
    yield from bps.prepare(eiger, plan, wait=True)
    uid = yield from bpp.stage_wrapper(run(), [eiger])
    return uid, outcome[0]
