"""Where to measure: pure functions of numbers, nothing moves.

A ptychographic scan wants every point equally far from its nearest neighbour (even overlap), no lattice
(a raster leaves periodic artefacts in the reconstruction [1]_) and a path without long jumps.

References
----------
.. [1] M. Dierolf et al., New J. Phys. 12, 035017 (2010), doi 10.1088/1367-2630/12/3/035017.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial import KDTree

Shape = Literal["rectangle", "ellipse"]

MAX_POINTS = 100_000
"""More points than this in one scan are taken for a slip of the pen."""


def _archimedean(step: float, radius: float) -> np.ndarray:
    """Points (J, 2) of ``r = step theta / 2 pi`` a chord of `step` apart, from the centre to `radius`."""
    pitch = step / (2 * math.pi)
    angles = [0.0]
    while pitch * angles[-1] < radius:
        last = angles[-1]
        x0, y0 = pitch * last * math.cos(last), pitch * last * math.sin(last)
        angle = last + step / math.hypot(pitch, pitch * last + 0.5 * step)
        for _ in range(20):  # Newton on |p(angle) - p(last)| = step
            c, s = math.cos(angle), math.sin(angle)
            dx, dy = pitch * angle * c - x0, pitch * angle * s - y0
            chord = math.hypot(dx, dy)
            slope = pitch * (dx * (c - angle * s) + dy * (s + angle * c)) / chord
            change = (step - chord) / slope
            angle += change
            if abs(change) < 1e-12 * angle:
                break
        angles.append(angle)
    theta = np.array(angles[:-1])
    return pitch * theta[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=1)


def _zigzag(points: np.ndarray, start_angle: float, width: float) -> np.ndarray:
    """Order of `points` (outside a disc): round by angle in sectors, out in one and in again in the next."""
    radius, angle = np.hypot(*points.T), np.arctan2(points[:, 1], points[:, 0])
    angle = np.mod(angle - start_angle, 2 * np.pi)
    sectors = max(2, 2 * round(np.pi * np.median(radius) / width))  # even: ends where it began, at the rim
    sector = np.minimum((angle / (2 * np.pi) * sectors).astype(int), sectors - 1)
    return np.lexsort((np.where(sector % 2, -radius, radius), sector))


def _strips(points: np.ndarray, width: float) -> np.ndarray:
    """Order of `points` up and down strips of `width` across the longer edge of their field."""
    long = int(np.argmax(np.ptp(points, axis=0)))
    strip = np.floor(points[:, long] / width).astype(int)
    across = points[:, 1 - long]
    return np.lexsort((np.where(strip % 2, -across, across), strip))


def _longest_jump(points: np.ndarray) -> float:
    return float(np.hypot(*np.diff(points, axis=0).T).max())


def _ordered(points: np.ndarray, inside: np.ndarray, step: float) -> np.ndarray:
    """Path through the points inside: the spiral, then its cut-off part by sectors; strips if that jumps."""
    points_inside = points[inside]
    if inside.all() or len(points_inside) < 3:
        return points_inside
    radius = np.hypot(*points.T)
    # The last whole turns go with the corners, so that no sector is empty.
    last = int(np.argmax(radius > radius[np.argmin(inside)] - 1.5 * step))
    core, rest = points[:last], points[last:][inside[last:]]
    start = math.atan2(points[last, 1], points[last, 0])
    best = np.concatenate([core, rest[_zigzag(rest, start, 1.7 * step)]])
    if _longest_jump(best) > 4 * step:
        best = _untangled(points_inside[_strips(points_inside, 1.7 * step)], 3 * step)
    return best


def _untangled(points: np.ndarray, long: float, rounds: int = 500) -> np.ndarray:
    """The path with its jumps beyond `long` traded for shorter ones by reversing stretches of it (2-opt)."""
    path = points.copy()
    for _ in range(rounds):
        jumps = np.hypot(*np.diff(path, axis=0).T)
        gains = []
        for i in np.flatnonzero(jumps > long):
            # reversing i+1..j joins i to j and i+1 to j+1; the far end of the path joins to nothing
            to_i, to_next = np.hypot(*(path - path[i]).T), np.hypot(*(path - path[i + 1]).T)
            forward = jumps[i] + np.append(jumps, 0) - to_i - np.append(to_next[1:], 0)
            backward = jumps[i] + np.append(0, jumps) - to_next - np.append(0, to_i[:-1])
            j, k = i + 1 + int(np.argmax(forward[i + 1 :])), int(np.argmax(backward[: i + 1]))
            gains += [(forward[j], i + 1, j), (backward[k], k, i)]
        gain, first, last = max(gains, default=(0.0, 0, 0))
        if gain <= 1e-9 * long:
            break
        path[first : last + 1] = path[first : last + 1][::-1].copy()
    return path


def spiral(extent: tuple[float, float], step: float, shape: Shape = "rectangle") -> np.ndarray:
    """Spiral whose points all have a neighbour at `step` and none nearer (to 0.5 %).

    The points lie on an Archimedean spiral with turns and chords of `step`; there is no lattice. The path
    starts at the centre and follows the spiral until it is about to leave the field; what is left follows
    sector by sector, out and in. A field so long that this would jump is walked in strips instead.

    Parameters
    ----------
    extent : tuple of float
        Full widths (x, y) of the field, in the unit of `step`.
    step : float
        Distance between nearest neighbours.
    shape : {"rectangle", "ellipse"}
        Outline that clips the spiral.

    Returns
    -------
    ndarray, (J, 2)
        (x, y) relative to the centre, which is one of the points (the first, but for strips).

    Raises
    ------
    ValueError
        When the field is smaller than a step or holds more than `MAX_POINTS` points.

    Examples
    --------
    >>> len(spiral((6.0, 6.0), 0.12))  # the paper's scan
    2497
    """
    width, height = extent
    if not (step > 0 and min(width, height) >= step):
        raise ValueError(f"spiral: extent {width} x {height} must be at least one step ({step}) wide")
    if width * height / step**2 > MAX_POINTS:
        raise ValueError(f"spiral: {width * height / step**2:.0f} points; enlarge step or narrow extent")
    if shape not in ("rectangle", "ellipse"):
        raise ValueError(f"spiral: shape must be 'rectangle' or 'ellipse', not {shape!r}")
    half = np.array([width, height]) / 2
    points = _archimedean(step, float(np.hypot(*half) if shape == "rectangle" else half.max()))
    scaled = np.abs(points) / half
    inside = (scaled.max(axis=1) if shape == "rectangle" else np.hypot(*scaled.T)) <= 1 + 1e-9
    points = _ordered(points, inside, step)
    if len(points) < 2:
        return points
    neighbour = KDTree(points).query(points, k=2)[0][:, 1]
    return points[neighbour <= 1.04 * step]  # the clip leaves a few in the corners without company


@dataclass(frozen=True)
class PathReport:
    """What a scan path costs and gives, told before it runs; lengths in the unit of the points."""

    points: int
    path_length: float
    longest_jump: float
    nearest_neighbour: tuple[float, float]
    """Smallest and largest distance to a nearest neighbour."""
    overlap: float
    """Linear overlap of neighbouring beams, 1 - distance / beam width; 0 where they do not touch."""


def report_path(points: np.ndarray, beam_width: float) -> PathReport:
    """Length, jumps and overlap of a path of `points` (J, 2) with a beam `beam_width` wide (FWHM)."""
    if len(points) < 2 or not beam_width > 0:
        raise ValueError("report_path: two or more points and a positive beam width are needed")
    nearest = KDTree(points).query(points, k=2)[0][:, 1]
    jumps = np.hypot(*np.diff(points, axis=0).T)
    return PathReport(
        points=len(points),
        path_length=float(jumps.sum()),
        longest_jump=float(jumps.max()),
        nearest_neighbour=(float(nearest.min()), float(nearest.max())),
        overlap=float(max(0.0, 1 - nearest.mean() / beam_width)),
    )


def rocking_angles(half_range_deg: float, step_deg: float) -> np.ndarray:
    """Equidistant angles from ``-half_range_deg`` to ``+half_range_deg``, zero among them.

    Parameters
    ----------
    half_range_deg, step_deg : float
        Degrees, both positive; the step is rounded so that it divides the half range.

    Returns
    -------
    ndarray, (2 round(half_range_deg / step_deg) + 1,)
        Rising, degrees relative to the Bragg peak.
    """
    if not 0 < step_deg <= half_range_deg:
        raise ValueError(f"rocking: step {step_deg} deg must lie within (0, half range {half_range_deg} deg]")
    half = round(half_range_deg / step_deg)
    if 2 * half + 1 > MAX_POINTS:
        raise ValueError(f"rocking: {2 * half + 1} angles; enlarge the step or narrow the range")
    return np.arange(-half, half + 1) * (half_range_deg / half)
