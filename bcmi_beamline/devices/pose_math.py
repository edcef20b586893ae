"""Where the modulator is, from what the nanogoniometer reads: pure functions, no EPICS.

A point at stage coordinates p stands at ``R (p + t - c) + c``: t the translations (x, y, z), c the pivot,
``R = R_y(mphi) R_x(mchi)``, all in micrometres in the frame (x', y', z') whose origin lies on the beam axis
`distance_at_z0_um` behind the crystal. The membrane is the plane p_z = 0, its centre p = 0.

A `pivot` is c, (3,), or c followed by the readings (mchi, mphi), deg, at which the translations run along the
frame, (5,): tilts count from there. A stage that reads 1.5 deg there turns a lever of 5 mm by 131 um.
Distances were surveyed with the tilts reading zero, and stay what they were there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bcmi_beamline.geometry import rotation_matrix

AXES = ("x", "y", "z", "mchi", "mphi")
"""Nanogoniometer axes: translations in um, tilts in deg."""


def split_pivot(pivot) -> tuple[np.ndarray, tuple[float, float], float]:
    """Pivot (3,), um; readings (mchi, mphi) at which the stage is level, deg; what z reads too little, um."""
    values = np.asarray(pivot, float)
    if len(values) == 3:
        return values, (0.0, 0.0), 0.0
    c, level = values[:3], (float(values[3]), float(values[4]))
    lever = np.array([-c[0], -c[1], 0.0])
    return c, level, float((tilt_matrix(-level[0], -level[1]).T @ lever)[2])


def tilt_matrix(mchi: float, mphi: float) -> np.ndarray:
    """``R_y(mphi) R_x(mchi)`` of tilts in degrees, shape (3, 3)."""
    return rotation_matrix("y", np.deg2rad(mphi)) @ rotation_matrix("x", np.deg2rad(mchi))


def position(point, translation, mchi: float, mphi: float, pivot) -> np.ndarray:
    """Where a point of the stage stands, um, shape (3,): ``R (p + t - c) + c``."""
    p, t = (np.asarray(vector, float) for vector in (point, translation))
    c, level, raised = split_pivot(pivot)
    return tilt_matrix(mchi - level[0], mphi - level[1]) @ (p + t + [0, 0, raised] - c) + c


def beam_on_membrane(translation, mchi: float, mphi: float, pivot) -> tuple[np.ndarray, float]:
    """Spot of the membrane that the diffracted beam passes through.

    Returns
    -------
    spot : ndarray, shape (3,)
        Its stage coordinates, um; the last is 0, the membrane.
    z : float
        Its place on the beam axis, um from the frame's origin.

    Raises
    ------
    ValueError
        When the membrane is edge-on to the beam.
    """
    c, level, raised = split_pivot(pivot)
    t = np.asarray(translation, float) + np.array([0.0, 0.0, raised])
    turn = tilt_matrix(mchi - level[0], mphi - level[1])
    normal = turn[:, 2]
    if normal[2] < 0.01:
        raise ValueError(f"the membrane is edge-on to the beam at mchi {mchi:g}, mphi {mphi:g} deg")
    z = float((t[2] - c[2] + c @ normal) / normal[2])
    spot = turn.T @ (np.array([0, 0, z]) - c) + c - t
    spot[2] = 0.0
    return spot, z


def distance_along_beam(
    translation, mchi: float, mphi: float, pivot, distance_at_z0_um: float = 0.0
) -> float:
    """Crystal to membrane along the diffracted beam (d1), um."""
    return beam_on_membrane(translation, mchi, mphi, pivot)[1] + distance_at_z0_um


def pivot_compensation(
    mchi: float,
    mphi: float,
    x: float,
    y: float,
    z: float,
    pivot,
    from_tilt: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, float, float]:
    """Translations that keep the modulator's spot in the beam, at its distance, when tilted.

    Parameters
    ----------
    mchi, mphi : float
        Tilts to go to, deg.
    x, y, z : float
        Translations at the tilts `from_tilt`, um.
    pivot : array_like, shape (3,)
        Point about which the tilts turn, um.
    from_tilt : tuple of float, optional
        (mchi, mphi) at which `x`, `y`, `z` hold, deg.

    Returns
    -------
    tuple of float
        x, y, z at the new tilts, um: ``t + (R1^T - R0^T)(b - c)``, b the beam's point on the membrane.
    """
    c, level, _ = split_pivot(pivot)
    _, height = beam_on_membrane((x, y, z), *from_tilt, pivot)
    lever = np.array([0, 0, height]) - c
    before = tilt_matrix(from_tilt[0] - level[0], from_tilt[1] - level[1])
    after = tilt_matrix(mchi - level[0], mphi - level[1])
    x, y, z = np.array([x, y, z]) + (after.T - before.T) @ lever
    return float(x), float(y), float(z)


def carried(
    pose: Mapping[str, float], turn: np.ndarray, pivot, distance_at_z0_um: float = 0.0
) -> dict[str, float]:
    """Pose that keeps the modulator where it is while what carries it turns about the crystal.

    With ``C`` the turn of the carrier, a point of the stage stands at ``C (R (p + t - c) + c + d)``, ``d``
    the origin seen from the crystal. The membrane's normal and its point on the beam are kept; a turn in its
    own plane, of the product of the turns about x' and y', is left. Where the level of the stage is not
    known (a pivot (3,)), the pose held is taken for it.

    Parameters
    ----------
    pose : mapping
        x, y, z (um), mchi, mphi (deg) before the carrier turns.
    turn : ndarray, (3, 3)
        Rotation of the carrier about the crystal in the frame (x', y', z').
    pivot : array_like, (3,) or (5,)

    Returns
    -------
    dict
        The five readings that keep it there.
    """
    if len(pivot) == 3:
        pivot = (*pivot, pose["mchi"], pose["mphi"])
    c, level, _ = split_pivot(pivot)
    translation = np.array([pose[axis] for axis in AXES[:3]])
    d = np.array([0.0, 0.0, distance_at_z0_um])
    before = tilt_matrix(pose["mchi"] - level[0], pose["mphi"] - level[1])
    _, height = beam_on_membrane(translation, pose["mchi"], pose["mphi"], pivot)
    on_beam = np.array([0.0, 0.0, height])
    normal = turn.T @ before[:, 2]
    mchi = float(np.rad2deg(-np.arcsin(normal[1])))
    mphi = float(np.rad2deg(np.arctan2(normal[0], normal[2])))
    stands = turn.T @ (on_beam + d) - d
    moved = translation + tilt_matrix(mchi, mphi).T @ (stands - c) - before.T @ (on_beam - c)
    x, y, z = (float(value) for value in moved)
    return {"x": x, "y": y, "z": z, "mchi": mchi + level[0], "mphi": mphi + level[1]}


def clearance(z, mchi, mphi, pivot, distance_at_z0_um: float = 0.0):
    """Shortest distance from the crystal to the plane of the membrane, um (broadcasts; tilts in deg).

    The membrane is taken as boundless, so a clearance kept is kept wherever x and y are.
    """
    (cx, cy, cz), level, raised = split_pivot(pivot)
    chi, phi = np.deg2rad(mchi - level[0]), np.deg2rad(mphi - level[1])
    along_normal = cx * np.sin(phi) * np.cos(chi) - cy * np.sin(chi)
    along_normal = along_normal + (cz + distance_at_z0_um) * np.cos(phi) * np.cos(chi)
    return z + raised - cz + along_normal


def least_clearance(
    z: Sequence[float],
    mchi: Sequence[float],
    mphi: Sequence[float],
    pivot,
    distance_at_z0_um: float = 0.0,
) -> float:
    """Least `clearance` of any pose between the extremes given of each axis, um.

    Axes that move together may pass through any such pose. Clearance rises with z alone; the tilts are
    searched in 17 steps each, which over 16 deg misses less than 1e-4 of the distance to the pivot.
    """
    chi = np.linspace(min(mchi), max(mchi), 17)[:, None]
    phi = np.linspace(min(mphi), max(mphi), 17)[None, :]
    return float(np.min(clearance(min(z), chi, phi, pivot, distance_at_z0_um)))
