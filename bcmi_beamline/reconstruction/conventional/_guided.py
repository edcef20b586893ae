"""Guided search: which trial is the best, and what the next generation starts from."""

from __future__ import annotations

import numpy as np

from bcmi_beamline.reconstruction.conventional._support import shrink_wrap, wrapped_box
from bcmi_beamline.reconstruction.conventional._trial import Criterion, Recipe, Trial
from bcmi_beamline.reconstruction.fourier import to_centre, to_corner
from bcmi_beamline.reconstruction.modes import align_trials

_AXES = (0, 1, 2)


def score(trial: Trial, criterion: Criterion) -> float:
    """What a trial is worth; the lower, the better."""
    if criterion == "sharpness":
        power = np.abs(trial.rho[trial.support]).astype(float) ** 2
        return float(power.size * np.sum(power**2) / np.sum(power) ** 2)
    if criterion == "free_llk" and np.isfinite(trial.free_llk[-1]):
        return float(trial.free_llk[-1])
    return float(trial.error[-1])  # without free pixels the error has to do


def middle(image: np.ndarray, support: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and support, origin at ``n // 2``, moved so that the support's box is in the middle."""
    move = []
    for axis, index in enumerate(wrapped_box(support)):
        line = index.ravel()
        n = support.shape[axis]
        move.append(n // 2 - (int(line[0]) + len(line) // 2))
    return np.roll(image, move, _AXES), np.roll(support, move, _AXES)


def common_box(supports: list[np.ndarray]) -> tuple[slice, ...]:
    """A box about the origin, half as large again as the largest support."""
    box = []
    shape = supports[0].shape
    for axis, n in enumerate(shape):
        widest = max(len(wrapped_box(s)[axis].ravel()) for s in supports)
        half = min(n // 2, int(np.ceil(0.75 * widest)) + 4)
        box.append(slice(n // 2 - half, n // 2 + half))
    return tuple(box)


def breed(done: list[Trial], recipe: Recipe, known: bool) -> list[Trial]:
    """Children of each trial and the best one; the best passes on unchanged.

    The child of a and b is ``sqrt(a b)``, the root with the phase between the two, after b (or its twin) was
    brought onto a (Chen et al. 2007). With a known support everything stays where it is.

    Parameters
    ----------
    done : list of Trial
    recipe : Recipe
    known : bool
        Whether the support is known.

    Returns
    -------
    children : list of Trial
        Only object, support and kernel mean anything.
    """
    best = done[int(np.argmin([score(trial, recipe.criterion) for trial in done]))]
    pieces = [(to_centre(t.rho, _AXES), to_centre(t.support, _AXES)) for t in done]
    if not known:
        pieces = [middle(*piece) for piece in pieces]
    box = (slice(None),) * 3 if known else common_box([support for _, support in pieces])
    number = next(k for k, t in enumerate(done) if t is best)
    reference, inside = (piece[box] for piece in pieces[number])
    children = []
    for trial, (image, _) in zip(done, pieces, strict=True):
        child, support = reference, inside
        if trial is not best:
            other = align_trials(
                [reference, image[box]], with_twin=not known, free_axes=() if known else None
            )[1]
            child = _geometric_mean(reference, other)
            if not known:
                sigma, threshold = recipe.smoothing[1], float(np.mean(recipe.threshold))
                support = shrink_wrap(child.__getitem__, inside, max(1.0, sigma), threshold)
        children.append(
            Trial(
                to_corner(_place(np.where(support, child, 0), box, best.rho.shape), _AXES),
                to_corner(_place(support, box, best.rho.shape), _AXES),
                trial.free_llk,
                trial.error,
                trial.kernel,
            )
        )
    return children


def _geometric_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    between = np.exp(0.5j * np.angle(b * np.conj(a)))
    return (np.sqrt(np.abs(a) * np.abs(b)) * np.exp(1j * np.angle(a)) * between).astype(np.complex64)


def _place(image: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    whole = np.zeros(shape, image.dtype)
    whole[box] = image
    return whole
