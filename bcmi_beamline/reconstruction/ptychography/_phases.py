"""Slow phases of the object, which a diverging beam hardly shows."""

from __future__ import annotations

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from bcmi_beamline.reconstruction.ptychography._positions import binned

STIFF = 1e-4
"""Share of the light, there and where there is most, by which every phase is held where it is."""
GAIN = 0.7
"""Of a step: less than 1, since what goes too far shakes what is stiff."""
FARTHEST = 0.5
"""Radians, rms where there is light: a larger step is shortened to this."""


def slow_phase(
    image: np.ndarray, asked: np.ndarray, light: np.ndarray, edges: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """Phase that, put on the object together with the move that hides it, fits the frames best.

    A phase that is slow against ``sqrt(lambda d1)`` deflects the light behind the object by
    ``reach grad phase``; in a beam that diverges from a point d1 before, an object whose features are
    moved by as much the other way casts the same shadow. What is left to see is the beam's own light moved
    against the features, ``(grad |P| . reach grad phase)**2``, and what that makes brighter where it runs
    together, ``(|P| div(reach grad phase) / 2)**2``: per cents, or less, of what a phase alone would change.
    By steps along the gradient such a phase comes home by two per cent a pass. Here the step is the
    solution of the elliptic equation that these two terms make, on cells of ``sqrt(lambda d1)``, with
    ``(grad |P|)**2 (reach grad phase)**2``, which is no less, for the first.

    Parameters
    ----------
    image : ndarray, (H, W), complex
    asked : ndarray, (H, W), complex
        Sum over frames of ``conj(probe) residual``.
    light : ndarray, (H, W)
        Sum over frames of ``|probe|**2``.
    edges : ndarray, (H, W)
        Sum over frames of ``(grad |probe|)**2``.
    reach : ndarray, (2,)
        ``lambda d1 / (2 pi pixel**2)``, along rows and columns.

    Returns
    -------
    ndarray, (H, W), float32
    """
    cell = max(1, round(np.sqrt(2 * np.pi * reach.max())))
    h, w = shape = -(-image.shape[0] // cell) + 1, -(-image.shape[1] // cell) + 1
    pull = np.imag(image.conj() * asked)
    for axis, r in enumerate(reach):
        slope = 0.5 * (np.roll(image, -1, axis) - np.roll(image, 1, axis))
        pull = pull - r * np.gradient(np.real(asked.conj() * slope), axis=axis)
    lit, sharp = (binned(values, cell, shape).ravel() for values in (light, edges))
    steps = (
        sparse.kron(_difference(h, cell), sparse.eye_array(w)),
        sparse.kron(sparse.eye_array(h), _difference(w, cell)),
    )
    bends = -reach[0] * steps[0].T @ steps[0] - reach[1] * steps[1].T @ steps[1]
    hold = 0.25 * bends.T @ sparse.diags_array(lit) @ bends + sparse.diags_array(STIFF * (lit + lit.max()))
    for r, step in zip(reach, steps, strict=True):
        between = 0.5 * cell * abs(step) @ sharp
        hold = hold + r**2 * step.T @ sparse.diags_array(between) @ step
    found = spsolve(sparse.csc_array(hold), binned(pull, cell, shape).ravel())
    # a ramp over everything is one of the probe
    ramps = np.sqrt(lit)[:, None] * np.stack([np.ones(h * w), *np.indices(shape).reshape(2, -1)], axis=1)
    found = found * np.sqrt(lit)
    found -= ramps @ np.linalg.lstsq(ramps, found, rcond=None)[0]
    found *= min(1.0, FARTHEST * np.sqrt(lit.sum()) / max(float(np.linalg.norm(found)), 1e-30))
    found *= GAIN / np.sqrt(lit + 1e-6 * lit.max())
    at = [(a + 0.5) / cell - 0.5 for a in np.indices(image.shape, np.float32)]
    return ndimage.map_coordinates(found.reshape(shape), at, np.float32, order=3, mode="nearest")


def put_on(image: np.ndarray, phase: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The object (H, W) with a slow phase, and its features moved by ``-reach grad phase``."""
    at = np.indices(image.shape, np.float32)
    for axis, r in enumerate(reach):
        at[axis] += r * np.gradient(phase, axis=axis)
    parts = [
        ndimage.map_coordinates(p, at, np.float32, order=3, mode="nearest")
        for p in (np.real(image), np.imag(image))
    ]
    return ((parts[0] + 1j * parts[1]) * np.exp(1j * phase)).astype(np.complex64)


def _difference(n: int, cell: int) -> sparse.csr_array:
    """Derivative between neighbours of n cells, (n - 1, n), per pixel."""
    return sparse.csr_array((np.eye(n, k=1) - np.eye(n))[:-1] / cell)
