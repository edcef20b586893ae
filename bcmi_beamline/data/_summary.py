"""A scan in a few lines: what was measured, where, and how much of it can be used."""

from __future__ import annotations

import numpy as np

from bcmi_beamline.geometry import HC_EV_M
from bcmi_beamline.scans import PtychographyScan, RockingScan


def summary(scan: RockingScan | PtychographyScan) -> str:
    """Several lines about a scan, to be printed.

    Examples
    --------
    >>> print(summary(load("bcmi.cxi")))  # doctest: +SKIP
    rocking scan  201 frames of 432 x 432, modulator in
    sample        Pt 111 (run 3f2a9c11, success)
    energy        9000.0 eV, detector at 5.350 m, pixels of 75.0 um
    ...
    """
    j, rows, columns = scan.frames.shape
    rocking = isinstance(scan, RockingScan)
    kind = f"modulator {'in' if scan.modulator_in else 'out'}" if rocking else "far field"
    lines = {"rocking scan" if rocking else "ptychography": f"{j} frames of {rows} x {columns}, {kind}"}
    metadata = scan.metadata
    if metadata.get("sample") or metadata.get("run_uid"):
        run = (
            f" (run {metadata['run_uid'][:8]}, {metadata.get('exit_status')})"
            if "run_uid" in metadata
            else ""
        )
        lines["sample"] = f"{metadata.get('sample', 'unnamed')}{run}"
    lines |= _rocking(scan) if isinstance(scan, RockingScan) else _ptychography(scan)
    per_frame = np.asarray(scan.frames).sum(axis=(1, 2), dtype=float)
    lines["counts"] = f"{per_frame.sum():.3g}, {per_frame.min():.3g} to {per_frame.max():.3g} a frame"
    bad = int(scan.mask.sum())
    lines["mask"] = f"{bad} of {scan.mask.size} pixels ({100 * bad / scan.mask.size:.1f} %)"
    if rocking and scan.count_cutoff is not None:
        saturated = int((np.asarray(scan.frames) >= scan.count_cutoff).sum())
        lines["mask"] += f"; {saturated} counts at the cutoff of {scan.count_cutoff:.3g}"
    if scan.flux is not None:
        lines["monitor"] = f"varies by {100 * np.std(scan.flux) / np.mean(scan.flux):.2f} %"
    if calibration := metadata.get("calibration"):
        lines["calibration"] = f"run {str(calibration.get('uid'))[:8]}"
    return "\n".join(f"{name:<13} {text}" for name, text in lines.items())


def _rocking(scan: RockingScan) -> dict[str, str]:
    geometry, angles = scan.geometry, np.sort(scan.angles_deg)
    step = float(np.median(np.diff(angles))) if len(angles) > 1 else 0.0
    return {
        "energy": f"{geometry.energy_ev:.1f} eV, detector at {geometry.detector_distance:.3f} m, "
        f"pixels of {geometry.pixel_size * 1e6:.1f} um",
        "reflection": f"d = {geometry.plane_spacing * 1e10:.4f} A, two theta "
        f"{np.rad2deg(geometry.two_theta):.3f} deg, {geometry.arm}",
        "angles": f"{angles[0]:+.4f} to {angles[-1]:+.4f} deg in steps of {step:.4f}",
    }


def _ptychography(scan: PtychographyScan) -> dict[str, str]:
    extent = np.ptp(scan.positions, axis=0) * 1e6
    distance = scan.propagation_distance
    return {
        "energy": f"{HC_EV_M / scan.wavelength:.1f} eV, detector {distance:.3f} m behind the object, "
        f"pixels of {scan.pixel_size * 1e6:.1f} um",
        "positions": f"{extent[0]:.2f} x {extent[1]:.2f} um, object pixels of "
        f"{scan.object_pixel[1] * 1e9:.2f} nm",
    }
