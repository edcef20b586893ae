"""Positions that many frames share: drift in time, and what looks like a scale or a turn of the stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import LinearOperator, cg

DEGREE = 3
"""Of the polynomials in time that drift is told apart from the stage with."""
CELLS = 16
"""Of the map on which the object follows positions, across the beam."""
DARK = 1e-3
"""Rows and columns of the beam with less than this share of the brightest do not count there."""
STIFF = 0.005
"""Every frame is held to where it is by this share of what holds it to the object."""
SOLVES = 60
"""Iterations of conjugate gradients, at most."""
UNSTEADY = 0.3
"""Share of the variance of time that place must leave unexplained before time may explain a motion."""


def without_affine(offsets: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Offsets without what looks like a scale, rotation or shear of their start.

    In a diverging beam a scale of all positions and another distance of the source fit almost equally well:
    what the data hardly tell is left to the encoders. Drift in time is fitted beside it and kept, unless the
    scan went so steadily that it looks like a scale itself.

    Parameters
    ----------
    offsets, start : ndarray, (J, 2)
        In the order in which the frames were taken.

    Returns
    -------
    ndarray, (J, 2)
    """
    place = start - start.mean(axis=0)
    place /= max(np.abs(place).max(), 1e-9)
    time = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(start)), DEGREE)
    moved = offsets - start
    design = np.concatenate([place, time], axis=1)
    ridge = np.diag([0, 0, 0] + [UNSTEADY * len(start)] * DEGREE)
    fit = np.linalg.lstsq(design.T @ design + ridge, design.T @ moved, rcond=1e-6)[0]
    return offsets - place @ fit[:2]


def binned(values: np.ndarray, cell: int, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of values (H, W) over cells of `cell` x `cell` pixels, `shape` of them; those beyond are 0."""
    full = np.pad(values, [(0, cell * n - m) for n, m in zip(shape, values.shape, strict=True)])
    return full.reshape(shape[0], cell, shape[1], cell).sum(axis=(1, 3))


class Together:
    """How frames hold each other by the object that they share.

    A frame alone is held to the object as it is. When its neighbours move with it the object goes along, and
    hardly anything misfits: positions that are wrong by a smooth field creep home by a per cent or two a pass
    if every frame moves by itself. Here all move at once and the object follows them best: with the exit
    waves ``P_j (grad O . s_j + dO)`` the best ``dO`` is minus ``grad O`` times the mean ``U`` of the moves of
    all frames that light a pixel, weighted by their light, and what holds the frames is
    ``sum |P_j|**2 |grad O . (s_j - U)|**2``. Light and object are averaged over cells of some pixels.

    Parameters
    ----------
    image : ndarray, (H, W), complex
    power : ndarray, (N, N)
        Of the beam, all modes.
    corners : ndarray, (J, 2), int
    gains : ndarray, (J,)
        The beam of frame j has ``gains[j]**2 power``.
    """

    def __init__(self, image: np.ndarray, power: np.ndarray, corners: np.ndarray, gains: np.ndarray) -> None:
        bright = [np.nonzero(power.sum(axis=a) > DARK * power.sum(axis=a).max())[0][[0, -1]] for a in (1, 0)]
        q = self._cell = max(1, int(max(high - low for low, high in bright)) // CELLS)
        self._size = image.shape
        self._shape = h, w = tuple(-(-n // q) + 1 for n in image.shape)
        slope = [0.5 * (np.roll(image, -1, axis) - np.roll(image, 1, axis)) for axis in (0, 1)]
        pairs = (slope[0], slope[0]), (slope[0], slope[1]), (slope[1], slope[1])
        self._steep = [binned((a.conj() * b).real, q, (h, w)).ravel() / q**2 for a, b in pairs]
        (top, bottom), (left, right) = bright
        beam = power[top : bottom + 1, left : right + 1]
        light = binned(beam, q, tuple(-(-n // q) for n in beam.shape))
        first = (corners + np.array([top, left])) // q
        y, x = np.indices(light.shape)
        cells = (first[:, :1] + y.ravel()) * w + first[:, 1:] + x.ravel()
        self._light = sparse.csr_array(
            (
                (gains[:, None] ** 2 * light.ravel()).ravel().astype(np.float32),
                cells.ravel(),
                np.arange(len(corners) + 1) * light.size,
            ),
            shape=(len(corners), h * w),
        )
        self._lit = self._light.sum(axis=0) + 1e-30

    @cached_property
    def _spread(self) -> sparse.csr_array:
        return sparse.csr_array(self._light.T)

    def _pull(self, moves: np.ndarray) -> np.ndarray:
        """The gradient of the object times moves (cells, 2), and the slope that is felt along either axis."""
        yy, yx, xx = self._steep
        y, x = moves.T
        return np.stack([yy * y + yx * x, yx * y + xx * x], axis=1)

    def common(self, moves: np.ndarray) -> np.ndarray:
        """Mean of the moves (J, 2) of the frames that light a cell, (cells, 2)."""
        return (self._spread @ moves) / self._lit[:, None]

    @cached_property
    def _own(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normal equations (yy, yx, xx) of every frame, (J,) each, with the object as it is."""
        yy, yx, xx = (self._light @ s for s in self._steep)
        stiff = STIFF * (yy + xx) + 1e-30
        return yy + stiff, yx, xx + stiff

    def hold(self, moves: np.ndarray, shared: bool = True) -> np.ndarray:
        """Gradient (J, 2) that would bring back frames that moved by (J, 2), the object with them or not."""
        yy, yx, xx = self._own
        y, x = moves.T
        own = np.stack([yy * y + yx * x, yx * y + xx * x], axis=1)
        return own - self._light @ self._pull(self.common(moves)) if shared else own

    def alone(self, asked: np.ndarray) -> np.ndarray:
        """Moves (J, 2) that every frame wants by its gradient (J, 2) with the object as it is."""
        yy, yx, xx = self._own
        y, x = asked.T
        return np.stack([xx * y - yx * x, yy * x - yx * y], axis=1) / (yy * xx - yx**2)[:, None]

    def solve(self, asked: np.ndarray) -> np.ndarray:
        """Moves (J, 2) that all frames want together by their gradients (J, 2)."""
        n = asked.size

        def flat(f: Callable[[np.ndarray], np.ndarray]) -> LinearOperator:
            # the stubs of scipy know the subclasses only
            return LinearOperator((n, n), lambda v: f(v.reshape(-1, 2)).ravel(), dtype=float)  # pyright: ignore[reportCallIssue]

        found, _ = cg(flat(self.hold), asked.ravel(), rtol=1e-2, maxiter=SOLVES, M=flat(self.alone))
        return found.reshape(-1, 2)

    def follow(self, image: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """The object (H, W) where moves (J, 2) of all frames take it."""
        at = np.indices(self._size, np.float32)
        place = [(a + 0.5) / self._cell - 0.5 for a in at]
        for axis, field in enumerate(self.common(moves).T):
            at[axis] -= ndimage.map_coordinates(
                field.reshape(self._shape), place, np.float32, order=1, mode="nearest"
            )
        parts = [
            ndimage.map_coordinates(p, at, np.float32, order=3, mode="nearest")
            for p in (np.real(image), np.imag(image))
        ]
        return (parts[0] + 1j * parts[1]).astype(np.complex64)


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
