"""Conventional Bragg coherent diffraction imaging: trials, ranking, combination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bcmi_beamline.reconstruction.alignment import resample_support
from bcmi_beamline.reconstruction.conventional._engine import Engine
from bcmi_beamline.reconstruction.conventional._prepare import Pattern, prepare
from bcmi_beamline.reconstruction.conventional._support import (
    autocorrelation_support,
    half_of,
    shrink_wrap,
    wrapped_box,
)
from bcmi_beamline.reconstruction.conventional._updates import pack
from bcmi_beamline.reconstruction.fourier import to_centre, to_corner
from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modes import align_trials, eigen_modes
from bcmi_beamline.reconstruction.trials import fingerprint, run_trials
from bcmi_beamline.scans import Reconstruction, RockingScan

_AXES = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """What one trial does; the defaults follow common practice at BCDI beamlines.

    Parameters
    ----------
    schedule : tuple of (str, float)
        Algorithms (``"hio"``, ``"raar"``, ``"dm"``, ``"er"``, ``"ml"``) in order, each with its share of the
        iterations.
    beta : float
        Relaxation of HIO, RAAR and the difference map.
    support_period : int
        Iterations between updates of the support.
    smoothing : tuple of float
        First and last sigma of shrink-wrap, voxels.
    threshold : tuple of float
        Range from which every trial draws its shrink-wrap threshold: the right one is not known beforehand,
        and the free log-likelihood judges.
    start_threshold : float
        Of the autocorrelation, relative to its peak.
    detwin : bool
        Once, for ten iterations, allow only half of the support, so that an object and its twin part.
    """

    schedule: tuple[tuple[str, float], ...] = (("hio", 0.2), ("raar", 0.6), ("er", 0.1), ("ml", 0.1))
    beta: float = 0.9
    support_period: int = 10
    smoothing: tuple[float, float] = (2.0, 0.6)
    threshold: tuple[float, float] = (0.25, 0.4)
    start_threshold: float = 0.1
    detwin: bool = False

    def steps(self, iterations: int) -> list[str]:
        """The algorithm of every iteration."""
        ends = np.rint(np.cumsum([share for _, share in self.schedule]) * iterations).astype(int)
        counts = np.diff(ends, prepend=0)
        names = [name for (name, _), n in zip(self.schedule, counts, strict=True) for _ in range(n)]
        return names[:iterations] + [self.schedule[-1][0]] * (iterations - len(names))


@dataclass
class _Trial:
    rho: np.ndarray
    support: np.ndarray
    free_llk: np.ndarray
    error: np.ndarray


@dataclass
class _Job:
    """Random starts of one pattern, for `run_trials`."""

    packed: np.ndarray
    start: np.ndarray
    recipe: Recipe
    iterations: int
    seed: int
    known: bool
    outcome: ClassVar[type] = _Trial

    def settings(self) -> dict[str, Any]:
        data = fingerprint(self.packed, self.start)
        return {"data": data, "iterations": self.iterations, "seed": self.seed, **asdict(self.recipe)}

    def __call__(self, number: int, report: Callable[[float, str], None]) -> _Trial:
        def after(iteration: int, engine: Engine) -> None:
            if iteration % 10 == 0 or iteration == self.iterations:
                report(
                    iteration / self.iterations,
                    f"iteration {iteration}: error {engine.error:.4f}, free LLK {engine.free_llk:.3f}",
                )

        rng = np.random.default_rng([self.seed, number])
        steps = self.recipe.steps(self.iterations)
        return _run_trial(self.packed, self.start, steps, self.recipe, rng, self.known, after)


def reconstruct(
    scan: RockingScan,
    *,
    trials: int = 5,
    seed: int = 0,
    iterations: int = 400,
    support: Reconstruction | np.ndarray | None = None,
    progress: Callable[[float, str], None] | None = None,
    recipe: Recipe | None = None,
    binning: int | None = None,
    combine: int = 3,
    workers: int = 1,
    scheduler: str | None = None,
    folder: Path | None = None,
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
        Per trial.
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
    if trials < 1 or iterations < 1:
        raise ValueError(f"at least one trial and one iteration are needed, not {trials} and {iterations}")
    recipe = recipe or Recipe()
    pattern = prepare(scan, binning)
    free = free_pixels(pattern.counts.shape, pattern.mask, seed=seed) & ~pattern.mask
    packed = to_corner(pack(pattern.counts, pattern.mask, free), _AXES)
    known = support is not None
    start = (
        _known_support(support, pattern)
        if known
        else autocorrelation_support(pattern, recipe.start_threshold)
    )

    job = _Job(packed, start, recipe, iterations, seed, known)
    done = run_trials(job, trials, workers=workers, scheduler=scheduler, folder=folder, progress=progress)
    settings = {
        "method": "bcdi",
        "trials": trials,
        "seed": seed,
        "iterations": iterations,
        "support": "known" if known else "shrink-wrap",
        "combine": combine,
        "binning": pattern.binning,
        **asdict(recipe),
    }
    return _combine(done, pattern, combine, settings, dict(scan.metadata))


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


def _run_trial(
    packed: np.ndarray,
    start: np.ndarray,
    steps: list[str],
    recipe: Recipe,
    rng: np.random.Generator,
    known_support: bool,
    report: Callable[[int, Engine], None],
) -> _Trial:
    """One random start carried through `steps`."""
    engine = Engine(packed, _random_start(packed, start, rng), start.copy())
    threshold = rng.uniform(*recipe.threshold)
    last = steps[-1]
    moving = sum(step != last for step in steps)  # the support stays as it is during the polish
    detwin_at = int(0.4 * moving) if recipe.detwin else -1
    halves: np.ndarray | None = None
    free_llk, error = np.empty(len(steps)), np.empty(len(steps))
    try:
        for i, algorithm in enumerate(steps):
            if i == detwin_at and moving > 10:
                whole, halves = engine.support, half_of(engine.support, int(rng.integers(3)))
                engine.support = halves
            elif halves is not None and i == detwin_at + 10:
                engine.support, halves = whole, None
            engine.step(algorithm, recipe.beta)
            free_llk[i], error[i] = engine.free_llk, engine.error
            due = (i + 1) % recipe.support_period == 0 and i < moving and halves is None
            if due and not known_support:
                first, final = recipe.smoothing
                sigma = first + (final - first) * min(1.0, i / max(1, 0.8 * moving))
                engine.support = shrink_wrap(engine.look, engine.support, sigma, threshold)
            report(i + 1, engine)
        if halves is not None:
            engine.support = whole
        engine.finish()
        free_llk[-1], error[-1] = engine.free_llk, engine.error
        return _Trial(engine.rho, engine.support, free_llk, error)
    finally:
        engine.close()


def _random_start(packed: np.ndarray, support: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random modulus and phase within the support, with the measured power."""
    rho = np.zeros(packed.shape, np.complex64)
    n = int(support.sum())
    rho[support] = rng.uniform(0.5, 1, n) * np.exp(2j * np.pi * rng.random(n))
    power = float(packed[packed > 0].sum(dtype=float)) / float(np.sum(np.abs(rho) ** 2, dtype=float))
    rho *= np.float32(np.sqrt(power))
    return rho


def _combine(
    done: list[_Trial], pattern: Pattern, combine: int, settings: dict, metadata: dict
) -> Reconstruction:
    """First mode of the best trials, in the crystal's frame, centred and cropped."""
    scores = np.array([trial.free_llk[-1] for trial in done])
    if not np.isfinite(scores).all():  # no free pixels: the error has to do
        scores = np.array([trial.error[-1] for trial in done])
    ranking = np.argsort(scores)
    best = [int(i) for i in ranking[: max(1, combine)] if scores[i] <= 1.1 * scores[ranking[0]]]
    pieces = [_centred(done[i], pattern) for i in best]
    box = _common_box([support for _, support in pieces])
    images = align_trials([image[box] for image, _ in pieces])
    modes, weights = eigen_modes(images)
    support = pieces[0][1][box]
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
            "field_of_view": list(pattern.counts.shape),
        },
    )


def _centred(trial: _Trial, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Solution and support with the support's box in the middle of the array."""
    support = to_centre(trial.support, _AXES)
    move = []
    for axis, index in enumerate(wrapped_box(support)):
        line = index.ravel()
        n = support.shape[axis]
        move.append(n // 2 - (int(line[0]) + len(line) // 2))
    image = pattern.to_object(trial.rho)
    return np.roll(image, move, _AXES), np.roll(support, move, _AXES)


def _common_box(supports: list[np.ndarray]) -> tuple[slice, ...]:
    """A box about the origin, half as large again as the largest support."""
    box = []
    shape = supports[0].shape
    for axis, n in enumerate(shape):
        widest = max(len(wrapped_box(s)[axis].ravel()) for s in supports)
        half = min(n // 2, int(np.ceil(0.75 * widest)) + 4)
        box.append(slice(n // 2 - half, n // 2 + half))
    return tuple(box)
