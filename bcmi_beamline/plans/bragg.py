"""Put the crystal into the beam and onto its Bragg peak."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.devices import Devices
from bcmi_beamline.plans._stubs import move, take_point
from bcmi_beamline.plans.fits import PeakFit, PoorFit, find_peak
from bcmi_beamline.plans.modulator import as_it_stands, modulator_state
from bcmi_beamline.plans.preprocessors import check_exposure, check_target, check_window, measure
from bcmi_beamline.plans.rocking import check_rocking, choose_rocker


@dataclass(frozen=True)
class BraggPeak:
    """Where the crystal diffracts most."""

    uid: str
    circle: str
    peak_deg: float
    """Reading of the rocking circle at the maximum; it stands there now."""
    peak_error_deg: float
    fit: PeakFit
    angles_deg: np.ndarray
    counts: np.ndarray
    """Per frame in the window, normalised to the mean incident flux."""

    def __repr__(self) -> str:
        return (
            f"Bragg peak {self.uid[:8]}: {self.circle} = {self.peak_deg:.4f} +- {self.peak_error_deg:.4f} "
            f"deg, {self.fit.height:.3g} counts on {self.fit.background:.3g}, {self.fit.fwhm:.4f} deg wide"
            + (f"; centroid {self.fit.centroid:.4f}" if self.fit.is_split else "")
        )


@dataclass(frozen=True)
class CrystalPosition:
    """Where the crystal is in the beam; the stage stands there now."""

    uids: tuple[str, ...]
    x_um: float
    y_um: float
    fits: dict[str, PeakFit]

    def __repr__(self) -> str:
        return "crystal at " + ", ".join(
            f"{axis} = {fit.position:.3f} +- {fit.position_error:.3f} um" for axis, fit in self.fits.items()
        )


def _normalised(points: list[dict[str, float]]) -> np.ndarray:
    """Counts per frame divided by the incident flux relative to its mean."""
    counts = np.array([point.get("eiger_total", 0.0) for point in points], float)
    flux = np.array([point.get("monitor_flux", 0.0) for point in points], float)
    if len(points) == 0 or not (np.isfinite(flux).all() and (flux > 0).all()):
        return counts
    return counts * flux.mean() / flux


def _line_scan(
    devices: Devices,
    motor: Any,
    name: str,
    modulator: Literal["in", "out"],
    places: np.ndarray,
    exposure_s: float,
    window: int,
    names: dict[str, Any],
    metadata: dict[str, Any] | None,
) -> MsgGenerator[tuple[str, np.ndarray, np.ndarray]]:
    """Step `motor` through `places`; run uid, readbacks of `name` and normalised counts."""

    def points() -> MsgGenerator[list[dict[str, float]]]:
        taken = []
        for place in places:
            yield from move(motor, place)
            taken.append((yield from take_point(devices, motor)))
        return taken

    uid, taken = yield from measure(
        devices,
        points,
        modulator=modulator,
        frames=len(places),
        exposure_s=exposure_s,
        window=window,
        metadata=metadata,
        **names,
    )
    read = np.array([point.get(name, place) for point, place in zip(taken, places, strict=True)])
    return uid, read, _normalised(taken)


def find_bragg_peak(
    devices: Devices,
    half_range_deg: float = 0.15,
    points: int = 31,
    exposure_s: float = 0.1,
    centre_deg: float | None = None,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[BraggPeak]:
    """Rock the crystal, find the maximum of the rocking curve and go there.

    The modulator stays where it is, in or out.

    Parameters
    ----------
    devices : Devices
        The beamline.
    half_range_deg : float
        Degrees to either side of the centre.
    points : int
        Frames.
    exposure_s : float
        Per frame, s.
    centre_deg : float, optional
        Reading of the rocking circle to search around; by default the nominal one of the configuration.
    window : int
        Edge in pixels of the square around the beam whose counts are followed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    BraggPeak

    Raises
    ------
    PoorFit
        When there is no peak in the range or its maximum lies at the end; the circle is back where it was.
    """
    beamline = yield from as_it_stands(devices)
    rock: Any = devices.diffractometer.rock
    circle = getattr(beamline.diffractometer, beamline.rocking_circle)
    centre = beamline.reflection.rocking_nominal_deg if centre_deg is None else centre_deg
    if not (half_range_deg > 0 and 5 <= points <= 10_000):
        raise ValueError(
            f"bragg peak: half range {half_range_deg} deg must be positive, points {points} 5 or more"
        )
    check_exposure(exposure_s)
    check_window(beamline, window)
    state = yield from modulator_state(devices)
    check_rocking(beamline, centre, half_range_deg, state)
    rocker = choose_rocker(devices, state)
    before = float((yield from bps.rd(rock)))
    places = centre + np.linspace(-half_range_deg, half_range_deg, points)
    names = {
        "plan_name": "find_bragg_peak",
        "scan_kind": "bragg_peak",
        "more": {
            "rocking": {"circle": beamline.rocking_circle, "peak_deg": centre, "sense": circle.sense},
            "motors": [rock.name],
        },
    }
    uid, angles, counts = yield from _line_scan(
        devices, rocker, rock.name, state, places, exposure_s, window, names, metadata
    )
    try:
        fit = find_peak(angles, counts)
    except PoorFit:
        yield from move(rocker, before)
        raise
    yield from move(rocker, fit.position)
    return BraggPeak(
        uid=uid,
        circle=beamline.rocking_circle,
        peak_deg=fit.position,
        peak_error_deg=fit.position_error,
        fit=fit,
        angles_deg=angles,
        counts=counts,
    )


def centre_crystal(
    devices: Devices,
    half_range_um: float = 2.0,
    points: int = 21,
    exposure_s: float = 0.1,
    window: int = 432,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[CrystalPosition]:
    """Scan the sample stage across the beam in x, then y, and stop at the maximum of each.

    Parameters
    ----------
    devices : Devices
        The beamline.
    half_range_um : float
        To either side of where the stage stands, um.
    points : int
        Frames per axis.
    exposure_s : float
        Per frame, s.
    window : int
        Edge in pixels of the square around the beam whose counts are followed.
    metadata : dict, optional
        More keys for the start document.

    Returns
    -------
    CrystalPosition

    Raises
    ------
    PoorFit
        When an axis shows no maximum; that axis is back where it was.
    """
    if not (half_range_um > 0 and 5 <= points <= 10_000):
        raise ValueError(
            f"crystal: half range {half_range_um} um must be positive, points {points} 5 or more"
        )
    check_exposure(exposure_s)
    check_window(devices.beamline, window)
    state = yield from modulator_state(devices)
    uids, fits = [], {}
    for axis in ("x", "y"):
        motor, limits = getattr(devices.sample_stage, axis), getattr(devices.beamline.sample_stage, axis)
        before = float((yield from bps.rd(motor)))
        places = before + np.linspace(-half_range_um, half_range_um, points)
        check_target(f"sample_stage {axis}", places[0], limits.low, limits.high)
        check_target(f"sample_stage {axis}", places[-1], limits.low, limits.high)
        names = {
            "plan_name": "centre_crystal",
            "scan_kind": "alignment",
            "more": {"motors": [motor.name], "alignment": {"axis": f"sample_{axis}", "method": "counts"}},
        }
        uid, read, counts = yield from _line_scan(
            devices, motor, motor.name, state, places, exposure_s, window, names, metadata
        )
        uids.append(uid)
        try:
            fits[axis] = find_peak(read, counts, what=f"sample {axis}")
        except PoorFit:
            yield from bps.mv(motor, before)
            raise
        yield from bps.mv(motor, fits[axis].position)
    return CrystalPosition(tuple(uids), fits["x"].position, fits["y"].position, fits)
