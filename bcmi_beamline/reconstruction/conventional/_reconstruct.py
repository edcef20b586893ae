"""Conventional Bragg coherent diffraction imaging: trials, ranking, combination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bcmi_beamline.reconstruction.alignment import resample_support
from bcmi_beamline.reconstruction.conventional._coherence import Coherence
from bcmi_beamline.reconstruction.conventional._guided import breed, common_box, middle, score
from bcmi_beamline.reconstruction.conventional._prepare import Pattern, prepare
from bcmi_beamline.reconstruction.conventional._support import autocorrelation_support
from bcmi_beamline.reconstruction.conventional._trial import Job, Recipe, Trial
from bcmi_beamline.reconstruction.conventional._updates import pack
from bcmi_beamline.reconstruction.fourier import to_centre, to_corner
from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modes import align_trials, eigen_modes, spread
from bcmi_beamline.reconstruction.trials import run_trials
from bcmi_beamline.scans import Reconstruction, RockingScan

_AXES = (0, 1, 2)
REJECT = 0.1
"""A trial this far above the best free log-likelihood is another solution."""


def reconstruct(
    scan: RockingScan,
    *,
    trials: int = 5,
    seed: int = 0,
    iterations: int = 500,
    support: Reconstruction | np.ndarray | None = None,
    progress: Callable[[float, str], None] | None = None,
    recipe: Recipe | None = None,
    binning: int | None = None,
    combine: int = 3,
    workers: int = 1,
    scheduler: str | None = None,
    folder: Path | None = None,
    show: Callable[[Reconstruction], None] | None = None,
) -> Reconstruction:
    """Phase a rocking scan taken without the modulator.

    Several trials from random starts; the free log-likelihood ranks them; the best are aligned (shift, phase,
    twin) and their first common mode is the answer.

    Parameters
    ----------
    scan : RockingScan
        With the modulator out.
    trials : int
    seed : int
    iterations : int
        Per trial, over all generations.
    support : Reconstruction or ndarray of bool, optional
        A known support: of any reconstruction of the same crystal, or on the grid of `prepare`, origin at
        ``n // 2``. It is then kept as it is.
    progress : callable, optional
        Given the fraction done and a line with the present error.
    recipe : Recipe, optional
    binning : int, optional
        Detector pixels per side to sum; chosen from the fringes by default.
    combine : int
        At most this many of the best trials make the answer, and none whose free log-likelihood is more
        than a tenth above the best: it is another solution, not the same one with other noise.
    workers, scheduler, folder
        Where the trials run and are kept, as in `run_trials`.
    show : callable, optional
        Given what the trials so far make together, whenever one ends.

    Returns
    -------
    result : Reconstruction
        In the sheared frame, cropped around the crystal, which stands at the centre. `free_llk` and `error`
        are (trials, iterations); `metadata["trial_free_llk"]` has the final value of every trial and
        `metadata["ranking"]` their order.

    Raises
    ------
    ValueError
        When the scan cannot be used (`prepare`) or the support does not fit.
    """
    recipe = recipe or Recipe()
    if trials < 1 or recipe.generations < 1 or iterations < recipe.generations:
        raise ValueError(
            f"at least one trial, and one iteration in each of one or more generations are needed, not "
            f"{trials}, {iterations} and {recipe.generations}"
        )
    task = Task.of(scan, support, recipe, seed=seed, iterations=iterations, binning=binning)
    task.settings |= {"trials": trials, "combine": combine}

    before: list[Trial] = []
    for generation in range(recipe.generations):
        done = run_trials(
            task.job(generation, breed(before, recipe, task.known) if before else None),
            trials,
            workers=workers,
            scheduler=scheduler,
            folder=folder / f"generation-{generation}" if folder and recipe.generations > 1 else folder,
            progress=_within(progress, generation, recipe.generations),
            found=(lambda some: show(task.combine(some, combine))) if show is not None else None,
        )
        before = [now.after(old) for old, now in zip(before, done, strict=True)] if before else done
    return task.combine(before, combine)


@dataclass
class Task:
    """A scan made ready: what all trials share.

    Parameters
    ----------
    pattern : Pattern
    free : ndarray, (J, Ny, Nx), bool
        Free pixels, origin at ``n // 2``.
    start : ndarray, (J, Ny, Nx), bool
        First support, corner origin.
    known : bool
        Whether it stays.
    recipe : Recipe
    iterations, seed : int
    settings, metadata : dict
        For the result.
    """

    pattern: Pattern
    free: np.ndarray
    start: np.ndarray
    known: bool
    recipe: Recipe
    iterations: int
    seed: int
    settings: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def of(
        cls,
        scan: RockingScan,
        support: Reconstruction | np.ndarray | None,
        recipe: Recipe,
        *,
        seed: int,
        iterations: int,
        binning: int | None = None,
    ) -> Task:
        """Make a scan ready; the parameters and errors are those of `reconstruct`."""
        pattern = prepare(scan, binning)
        free = free_pixels(pattern.counts.shape, pattern.mask, seed=seed) & ~pattern.mask
        if support is not None:
            start = _known_support(support, pattern)
        else:
            start = autocorrelation_support(pattern, recipe.start_threshold)
        settings = {
            "method": "bcdi",
            "seed": seed,
            "iterations": iterations,
            "support": "shrink-wrap" if support is None else "known",
            "binning": pattern.binning,
            **asdict(recipe),
        }
        known, metadata = support is not None, dict(scan.metadata)
        return cls(pattern, free, start, known, recipe, iterations, seed, settings, metadata)

    def job(self, generation: int = 0, parents: list[Trial] | None = None) -> Job:
        """The trials of one generation."""
        pattern, recipe = self.pattern, self.recipe
        counts = _seen(pattern.counts, recipe.width(generation))
        part = _shares(self.iterations, recipe.generations)[generation]
        pixels = pattern.binning > 1 if recipe.pixels is None else recipe.pixels
        packed = to_corner(pack(counts, pattern.mask, self.free), _AXES)
        return Job(packed, self.start, recipe, part, self.seed, self.known, pixels, generation, parents)

    def combine(self, done: list[Trial], number: int) -> Reconstruction:
        """First mode of the best `number` trials, in the crystal's frame, centred and cropped."""
        return _combine(done, self.pattern, number, self.settings, self.metadata)


def _shares(iterations: int, generations: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(iterations), generations)]


def _seen(counts: np.ndarray, width: float | None) -> np.ndarray:
    """Counts through a Gaussian about the origin, `width` relative to the edge; all where it is None."""
    if width is None:
        return counts
    seen = counts.copy()
    for axis, n in enumerate(counts.shape):
        gauss = np.exp(-0.5 * ((np.arange(n) - n // 2) / (width * n / 2)) ** 2).astype(np.float32)
        seen *= gauss.reshape([-1 if a == axis else 1 for a in _AXES])
    return seen


def _within(
    progress: Callable[[float, str], None] | None, generation: int, generations: int
) -> Callable[[float, str], None] | None:
    """Progress of one generation as a part of the whole."""
    if progress is None or generations == 1:
        return progress
    name = f"generation {generation + 1} of {generations}, "
    return lambda part, line: progress((generation + part) / generations, name + line)


def _known_support(support: Reconstruction | np.ndarray, pattern: Pattern) -> np.ndarray:
    shape = pattern.counts.shape
    if isinstance(support, Reconstruction):
        nz, ny, nx = shape
        support = resample_support(support, pattern.voxel_size, (nz, ny, nx), pattern.geometry.shear)
    if support.shape != shape or not support.any():
        raise ValueError(
            f"support {support.shape} must not be empty and must fit the grid {shape} of the binned scan; "
            f"give it as a Reconstruction to have it resampled"
        )
    return to_corner(support.astype(bool), _AXES)


def _combine(
    done: list[Trial], pattern: Pattern, combine: int, settings: dict, metadata: dict
) -> Reconstruction:
    """First mode of the best trials, in the crystal's frame, centred and cropped."""
    scores = np.array([score(trial, "free_llk") for trial in done])
    ranking = np.argsort(scores)
    good = scores <= (1 + REJECT) * scores[ranking[0]]
    best = [int(i) for i in ranking[: max(1, combine)] if good[i]]
    pieces = [middle(pattern.to_object(done[i].rho), to_centre(done[i].support, _AXES)) for i in best]
    box = common_box([support for _, support in pieces])
    images = align_trials([image[box] for image, _ in pieces])
    modes, weights = eigen_modes(images)
    support = pieces[0][1][box]
    kernel = done[best[0]].kernel
    blur = {} if kernel is None else {"blur_px": Coherence(pattern.counts.shape, kernel).widths}
    return Reconstruction(
        modes[0],
        support,
        pattern.voxel_size,
        pattern.geometry,
        pattern.geometry.shear,
        free_llk=np.array([trial.free_llk for trial in done]),
        error=np.array([trial.error for trial in done]),
        mode_weights=weights,
        configuration=settings,
        metadata={
            **metadata,
            "trial_free_llk": [float(t.free_llk[-1]) for t in done],
            "ranking": [int(i) for i in ranking],
            "trials_rejected": int(np.count_nonzero(~good)),
            "field_of_view": list(pattern.counts.shape),
            **blur,
            **spread(images, support),
        },
    )
