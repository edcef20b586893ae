"""Positions that many frames share: drift in time, and what looks like a scale or a turn of the stage."""

from __future__ import annotations

import numpy as np

DEGREE = 3
"""Of the polynomials in time that drift is told apart from the stage with."""
MOMENTUM = 0.9
"""Of the drift."""
UNSTEADY = 0.3
"""Share of the variance of time that place must leave unexplained before time may explain a motion."""


def without_affine(offsets: np.ndarray, start: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Offsets of the active frames without what looks like a scale, rotation or shear of their start.

    In a diverging beam a scale of all positions and another distance of the source fit almost equally well:
    what the data hardly tell is left to the encoders. Drift in time is fitted beside it and kept, unless the
    scan went so steadily that it looks like a scale itself.

    Parameters
    ----------
    offsets, start : ndarray, (J, 2)
        In the order in which the frames were taken.
    active : ndarray, (n,), int

    Returns
    -------
    ndarray, (n, 2)
    """
    place = start[active] - start[active].mean(axis=0)
    place /= max(np.abs(place).max(), 1e-9)
    time = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(active)), DEGREE)
    moved = offsets[active] - start[active]
    design = np.concatenate([place, time], axis=1)
    ridge = np.diag([0, 0, 0] + [UNSTEADY * len(active)] * DEGREE)
    fit = np.linalg.lstsq(design.T @ design + ridge, design.T @ moved, rcond=1e-6)[0]
    return offsets[active] - place @ fit[:2]


def carried_on(moved: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let what all frames have in common go on as it went: a heavy ball for the drift.

    A wrong drift stretches the object with the positions and hardly misfits under a beam that is small
    against the scan: it creeps home by a per cent or two a pass. What turns round starts anew.

    Parameters
    ----------
    moved : ndarray, (J, 2)
        By the last pass, in the order in which frames were taken.
    velocity : ndarray, (DEGREE + 1, 2)
        Of the passes before, as Legendre polynomials in time.

    Returns
    -------
    moved : ndarray, (J, 2)
    velocity : ndarray, (DEGREE + 1, 2)
    """
    time = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(moved)), DEGREE)
    common = np.linalg.lstsq(time, moved, rcond=None)[0]
    onward = np.where(common * velocity > 0, MOMENTUM * velocity, 0)
    return moved + time @ onward, common + onward


def extrapolate(offsets: np.ndarray, start: np.ndarray, known: int, more: int) -> np.ndarray:
    """Where the `more` frames after the first `known` stand if the drift of those goes on, linear in time."""
    time = np.arange(known + more) - (known - 1) / 2
    moved = (offsets - start)[:known]
    slope = time[:known] @ moved / (time[:known] @ time[:known])
    return start[known : known + more] + moved.mean(axis=0) + time[known:, None] * slope


def affine_numbers(offsets: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Scale and rotation (rad) by which `offsets` differ from `start`, both (J, 2)."""
    a, b = ((p - p.mean(axis=0)) @ [1, 1j] for p in (start, offsets))
    ratio = np.vdot(a, b) / np.vdot(a, a)
    return float(np.abs(ratio)), float(np.angle(ratio))


def scale_error(positions: np.ndarray, read: np.ndarray) -> float:
    """How well encoders that err by what was found for single frames know the scale of all positions (J, 2).

    In a diverging beam d1 errs by the same share. What is slow in time is drift and no error of theirs.
    """
    time = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(read)), DEGREE)
    moved = positions - read
    single = moved - time @ np.linalg.lstsq(time, moved, rcond=None)[0]
    return float(np.sqrt((single**2).mean() / ((read - read.mean(axis=0)) ** 2).sum()))


def turned(points: np.ndarray, ratio: complex) -> np.ndarray:
    """Points (J, 2) turned about their mean by the angle of `ratio`, from the first axis to the second."""
    middle = points.mean(axis=0)
    away = ((points - middle) @ [1, 1j]) * ratio
    return middle + np.stack([away.real, away.imag], axis=1)
