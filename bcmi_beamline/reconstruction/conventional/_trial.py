"""One random start, or one child of the last generation, carried through a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.conventional._coherence import Coherence
from bcmi_beamline.reconstruction.conventional._engine import Engine
from bcmi_beamline.reconstruction.conventional._support import half_of, shrink_wrap
from bcmi_beamline.reconstruction.fourier import fftn, ifftn, to_centre, to_corner
from bcmi_beamline.reconstruction.trials import fingerprint

_AXES = (0, 1, 2)

Criterion = Literal["free_llk", "error", "sharpness"]
DETWIN = 10
"""Iterations with half of the support."""
LIGHT = 0.97
"""The central half of a pattern has to hold this part of the counts for a coarse start."""
COHERENCE_FROM, COHERENCE_STEPS = 0.3, 20
"""The kernel of partial coherence is fitted from this share of the iterations on, so many steps a time."""


@dataclass(frozen=True)
class Recipe:
    """What one trial does; the defaults follow common practice at BCDI beamlines.

    Parameters
    ----------
    schedule : tuple of (str, float)
        Algorithms (``"hio"``, ``"raar"``, ``"dm"``, ``"er"``, ``"ml"``, ``"poisson"``) in order, each with
        its share of the iterations that start from noise.
    fine : tuple of (str, float)
        The same for iterations that start from an object: after a coarse start, and in later generations.
        HIO would throw a good one over, where pixels are many and photons few.
    beta : float
        Relaxation of HIO, RAAR and the difference map.
    support_period : int
        Iterations between updates of the support, and of the kernel of partial coherence.
    smoothing : tuple of float
        First and last sigma of shrink-wrap, voxels.
    threshold : tuple of float
        Range from which every trial draws its shrink-wrap threshold: the right one is not known beforehand,
        and the free log-likelihood judges.
    start_threshold : float
        Of the autocorrelation, relative to its peak; half the size of its hull is the first support.
    hold : float
        The first support stays for this share of the first generation: shrink-wrap needs a shape to find.
    coarse : float
        Share of the first generation's iterations that a trial does on the central half of the pattern, a
        whole recipe on an eighth of the voxels, where nearly all the light is there (`LIGHT`).
    detwin : bool
        Once, for ten iterations, allow only half of the support, so that an object and its twin part.
    pixels : bool, optional
        Allow for the blur of the pixels' area; where pixels are summed by default, where it matters.
    partial_coherence : bool
        Fit a kernel that blurs the intensities. Twice the time.
    generations : int
        Guided search (C.-C. Chen et al., Phys. Rev. B 76, 064113 (2007)): the iterations are shared among so
        many generations, and after each every trial is crossed with the best one.
    criterion : {"free_llk", "error", "sharpness"}
        Which is the best. Sharpness, ``sum |rho|^4``, is least for an even modulus (J. N. Clark et al.,
        PNAS 112, 7444 (2015)).
    start_width : float
        The first generations see the pattern through a Gaussian of this width, relative to the edge of the
        window, which widens until the second half of the generations sees all of it; 0 for no such Gaussian.
    """

    schedule: tuple[tuple[str, float], ...] = (("hio", 0.8), ("er", 0.1), ("ml", 0.1))
    fine: tuple[tuple[str, float], ...] = (("raar", 0.7), ("er", 0.15), ("ml", 0.15))
    beta: float = 0.9
    support_period: int = 20
    smoothing: tuple[float, float] = (2.0, 0.6)
    threshold: tuple[float, float] = (0.25, 0.4)
    start_threshold: float = 0.002
    hold: float = 0.5
    coarse: float = 0.8
    detwin: bool = False
    pixels: bool | None = None
    partial_coherence: bool = False
    generations: int = 1
    criterion: Criterion = "free_llk"
    start_width: float = 0.0

    def steps(self, iterations: int, from_noise: bool = True) -> list[str]:
        """The algorithm of every iteration."""
        schedule = self.schedule if from_noise else self.fine
        ends = np.rint(np.cumsum([share for _, share in schedule]) * iterations).astype(int)
        counts = np.diff(ends, prepend=0)
        names = [name for (name, _), n in zip(schedule, counts, strict=True) for _ in range(n)]
        return names[:iterations] + [schedule[-1][0]] * (iterations - len(names))

    def width(self, generation: int) -> float | None:
        """Of the Gaussian on the pattern in a generation; None for the whole pattern."""
        half = self.generations // 2
        if not self.start_width or generation >= half:
            return None
        return float(self.start_width ** (1 - generation / half))


@dataclass
class Trial:
    """What a trial found: object (corner origin) and support, and its figures after every iteration.

    The free log-likelihood of iterations on the central half of a pattern is that of fewer, brighter pixels.
    """

    rho: np.ndarray
    support: np.ndarray
    free_llk: np.ndarray
    error: np.ndarray
    kernel: np.ndarray | None = None

    def after(self, before: Trial) -> Trial:
        """Add the history of what came before."""
        return replace(
            self,
            free_llk=np.concatenate([before.free_llk, self.free_llk]),
            error=np.concatenate([before.error, self.error]),
        )


@dataclass
class Job:
    """The trials of one generation, for `run_trials`.

    Parameters
    ----------
    packed : ndarray, (J, Ny, Nx), float32
        `pack`, corner origin.
    start : ndarray, (J, Ny, Nx), bool
        First support.
    recipe : Recipe
    iterations : int
        Of this generation.
    seed, generation : int
    known : bool
        Whether the support stays as it is.
    pixels : bool
    parents : list of Trial, optional
        Where each trial starts; from noise without.
    """

    packed: np.ndarray
    start: np.ndarray
    recipe: Recipe
    iterations: int
    seed: int
    known: bool
    pixels: bool
    generation: int = 0
    parents: list[Trial] | None = None
    outcome: ClassVar[type] = Trial

    def settings(self) -> dict[str, Any]:
        """Every option, and a hash of the data as they are used."""
        data = fingerprint(self.packed, self.start, *(p.rho for p in self.parents or ()))
        return {
            "data": data,
            "iterations": self.iterations,
            "seed": self.seed,
            "known": self.known,
            "pixels_allowed_for": self.pixels,
            "generation": self.generation,
            **asdict(self.recipe),
        }

    def __call__(self, number: int, report: Callable[[float, str], None]) -> Trial:
        """Perform trial `number` from ``default_rng([seed, number])``."""

        def after(iteration: int, engine: Engine) -> None:
            if iteration % 10 == 0 or iteration == self.iterations:
                report(
                    iteration / self.iterations,
                    f"iteration {iteration}: error {engine.error:.4f}, free LLK {engine.free_llk:.3f}",
                )

        if self.parents is not None:
            rng = np.random.default_rng([self.seed, number, self.generation])
            return self._run(self.parents[number], rng, after)
        rng = np.random.default_rng([self.seed, number])
        coarse = self._on_central_half()
        if coarse is None:
            return self._run(self._from_noise(rng), rng, after)
        first = coarse._run(coarse._from_noise(rng), rng, after)
        rho, support = finer(first.rho, first.support, self.packed.shape)
        parent = replace(first, rho=rho, support=self.start if self.known else support)
        rest = replace(self, iterations=self.iterations - coarse.iterations, parents=[parent])
        return rest._run(parent, rng, lambda i, engine: after(i + coarse.iterations, engine)).after(first)

    def _from_noise(self, rng: np.random.Generator) -> Trial:
        return Trial(random_start(self.packed, self.start, rng), self.start, *([np.empty(0)] * 2))

    def _on_central_half(self) -> Job | None:
        """What a trial does first, on half as many pixels along each axis; None where it would miss light."""
        iterations = round(self.recipe.coarse * self.iterations)
        packed = self.packed[central_half(self.packed.shape)]
        light = [np.maximum(p, 0).sum(dtype=float) for p in (packed, self.packed)]
        if iterations < 1 or iterations == self.iterations or light[0] < LIGHT * light[1]:
            return None
        start = resampled(self.start, packed.shape)
        return replace(self, packed=packed, start=start, iterations=iterations)

    def _run(self, parent: Trial, rng: np.random.Generator, report: Callable[[int, Engine], None]) -> Trial:
        recipe, steps = self.recipe, self.recipe.steps(self.iterations, self.parents is None)
        coherence = self._coherence(parent)
        engine = Engine(
            self.packed, parent.rho, parent.support.copy(), pixels=self.pixels, coherence=coherence
        )
        threshold = rng.uniform(*recipe.threshold)
        moving = sum(step != steps[-1] for step in steps)  # the support stays as it is during the polish
        held = round(recipe.hold * len(steps)) if self.parents is None else 0
        halved, whole = range(0), engine.support
        if recipe.detwin and self.parents is None and moving > 2 * DETWIN:
            halved = range(int(0.4 * moving), int(0.4 * moving) + DETWIN)
        free_llk, error = np.empty(len(steps)), np.empty(len(steps))
        try:
            for i, algorithm in enumerate(steps):
                if halved and i == halved.start:
                    whole = engine.support
                    engine.support = half_of(whole, int(rng.integers(3)))
                elif halved and i == halved.stop:
                    engine.support = whole
                engine.step(algorithm, recipe.beta)
                free_llk[i], error[i] = engine.free_llk, engine.error
                if (i + 1) % recipe.support_period == 0 and i not in halved:
                    if held <= i < moving and not self.known:
                        sigma = self._sigma((i - held) / max(1, 0.8 * (moving - held)))
                        engine.support = shrink_wrap(engine.look, engine.support, sigma, threshold)
                    if recipe.partial_coherence and i >= COHERENCE_FROM * len(steps):
                        engine.refine_coherence(COHERENCE_STEPS)
                report(i + 1, engine)
            engine.finish()
            free_llk[-1], error[-1] = engine.free_llk, engine.error
            kernel = coherence.kernel if coherence is not None else None
            return Trial(engine.rho, engine.support, free_llk, error, kernel)
        finally:
            engine.close()

    def _sigma(self, part: float) -> float:
        """Smoothing of shrink-wrap at a `part` of this generation."""
        first, last = self.recipe.smoothing
        done = (self.generation + min(1.0, part)) / self.recipe.generations
        return first + (last - first) * done

    def _coherence(self, parent: Trial) -> Coherence | None:
        return Coherence(self.packed.shape, parent.kernel) if self.recipe.partial_coherence else None


def central_half(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices (``np.ix_``) of the low half of the frequencies of each axis, corner origin."""
    return np.ix_(*(np.r_[: (n + 2) // 4, n - n // 4 : n] for n in shape))


def finer(rho: np.ndarray, support: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An object and its support (corner origin) on a grid of smaller voxels; the wave beyond is zero."""
    wave = np.zeros(shape, np.complex64)
    wave[central_half(shape)] = fftn(rho)
    return ifftn(wave, overwrite=True), resampled(support, shape)


def resampled(support: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A support (corner origin) on a grid of other voxels and the same field of view."""
    ratio = np.array(support.shape) / shape
    offset: Any = np.array(support.shape) // 2 - ratio * (np.array(shape) // 2)
    whole = to_centre(support, _AXES).astype(np.float32)
    new = np.asarray(ndimage.affine_transform(whole, ratio, offset, shape, order=1, mode="grid-wrap"))
    return to_corner(new >= 0.5, _AXES)


def random_start(packed: np.ndarray, support: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random modulus and phase within the support, with the measured power."""
    rho = np.zeros(packed.shape, np.complex64)
    n = int(support.sum())
    rho[support] = rng.uniform(0.5, 1, n) * np.exp(2j * np.pi * rng.random(n))
    power = float(packed[packed > 0].sum(dtype=float)) / float(np.sum(np.abs(rho) ** 2, dtype=float))
    rho *= np.float32(np.sqrt(power))
    return rho
