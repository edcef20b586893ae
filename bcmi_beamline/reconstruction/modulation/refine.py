"""All frames together: descent on the crystal itself."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.free_pixels import expected_log_likelihood
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    slow_transform,
)
from bcmi_beamline.reconstruction.modulation.slices import (
    ANSCOMBE,
    descend,
    descend_together,
    frame_counts,
    frame_norms,
)
from bcmi_beamline.reconstruction.modulation.support import shrink_wrap
from bcmi_beamline.reconstruction.threads import each

Update = Callable[
    [FrameOperator, np.ndarray, np.ndarray, int, np.ndarray | None], tuple[np.ndarray, float, float]
]


LARGEST_CHANGE = 0.05
"""Of the brightness of a frame in one step."""


DARK, BLOCK, SPARSE = 0.05, 16, 4
"""A background is looked for in this part of all blocks of so many pixels a side, of every fourth frame."""


class Source(NamedTuple):
    """A point of the source of the light.

    `ramp` (ny, nx), complex64, is what its tilt and its share put on the exit waves of the crystal, `matrix`
    (J, n_zeta) the slow axis in its light.
    """

    ramp: np.ndarray
    matrix: np.ndarray


@dataclass
class Problem:
    """A rocking curve made ready: operators, packed counts and where the crystal can be.

    Parameters
    ----------
    operator : FrameOperator
    rocking : RockingOperator
    targets : ndarray, (J, Ny, Nx)
        From `make_targets`.
    amplitude : ndarray, (J,)
        Square root of the relative incident flux.
    weight : ndarray, (J,)
        Trust in a frame: the part of its light that meets the calibrated map.
    region : ndarray, (n_zeta, ny, nx), bool
        Largest support allowed.
    thickness : float
        Longest chord along z', m.
    tighten : bool
        Whether the support may shrink within `region`.
    sentinels : (targets, after), optional
        Sentinel frames (S, Ny, Nx), from `make_targets`, and the frame after which each was taken, (S,).
    beam : (wave, frame), optional
        Exit wave (ny, nx) of the frame that the calibrated beam fits, where it fits.
    sources : tuple of Source
        Where the light is not coherent: points of the source, whose intensities add up.
    """

    operator: FrameOperator
    rocking: RockingOperator
    targets: np.ndarray
    amplitude: np.ndarray
    weight: np.ndarray
    region: np.ndarray
    thickness: float
    tighten: bool = True
    sentinels: tuple[np.ndarray, np.ndarray] | None = None
    beam: tuple[np.ndarray, int] | None = None
    sources: tuple[Source, ...] = ()
    matrix: np.ndarray = field(init=False)
    frames: np.ndarray = field(init=False)
    norm: float = field(init=False)
    free_count: int = field(init=False)
    counts: np.ndarray = field(init=False)
    _norms: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = self.rocking.matrix(len(self.region))
        self.counts = frame_counts(self.targets)
        self._norms = frame_norms(self.targets)
        self._trust(self.weight)

    def _trust(self, weight: np.ndarray) -> None:
        self.weight = weight
        self.frames = np.flatnonzero(weight > 0)
        self.norm = float(np.dot(self._norms[:, 0], weight))
        self.free_count = int(self._norms[self.frames, 1].sum())

    @property
    def metres_per_pixel(self) -> np.ndarray:
        """(x', y') in metres of a step along (columns, rows)."""
        py, px = self.operator.pixel
        return np.array([px, -py])

    def only(self, frames: np.ndarray) -> Problem:
        """The same problem with the weight of all other frames set to 0."""
        weight = np.zeros_like(self.weight)
        weight[frames] = self.weight[frames]
        part = copy(self)
        part._trust(weight)
        return part

    def brightest(self, count: int) -> Problem:
        """The same problem with the weight of all but the `count` brightest trusted frames set to 0."""
        counts = self.counts * (self.weight > 0)
        return self.only(np.sort(np.argsort(counts)[-count:]))

    def in_light(self, amplitude: np.ndarray) -> Problem:
        """The same problem with other amplitudes (J,) of the incident light."""
        other = copy(self)
        other.amplitude = amplitude
        return other

    def lit_by(self, sources: tuple[Source, ...]) -> Problem:
        """The same problem in the light of these points of a source; coherent where there are none."""
        other = copy(self)
        other.sources = sources
        return other

    def through(self, operator: FrameOperator) -> Problem:
        """The same problem with another operator for the same frames and window."""
        other = copy(self)
        other.operator = operator
        return other

    def over(self, background: float) -> Problem:
        """The same problem with so many counts per pixel that no wave makes."""
        return self.through(self.operator.over(background))

    def tightened(self, image: np.ndarray, threshold: float, support: np.ndarray) -> np.ndarray:
        """Shrink-wrap of `image` within the region; `support` as it is where the support is known."""
        return shrink_wrap(image, self.region, threshold) if self.tighten else support

    def waves(self, image: np.ndarray) -> np.ndarray:
        """Exit waves (J, ny, nx) of a crystal, in the light of each frame; (J, n, ny, nx) of n sources."""
        if self.sources:
            waves = np.stack([slow_transform(s.matrix, image) * s.ramp for s in self.sources], axis=1)
            return self.amplitude[:, None, None, None] * waves
        return self.amplitude[:, None, None] * slow_transform(self.matrix, image)

    def descent(
        self,
        waves: np.ndarray,
        shifts: np.ndarray | None,
        update: Update | None = None,
        frames: np.ndarray | None = None,
        poisson: bool = False,
    ) -> tuple[np.ndarray, float, float]:
        """`update`, by default `descend`, for `frames`, by default all trusted ones, of `waves`.

        Parameters
        ----------
        waves : ndarray, (J, ny, nx) or (J, n, ny, nx)
            As `Problem.waves`; those of several sources are updated by `descend_together`.
        poisson : bool
            Of these two: step down Poisson's likelihood.

        Returns
        -------
        directions : ndarray, as waves
            0 for all other frames.
        misfit : float
            Weighted.
        free : float
            Free log-likelihood, summed.
        """
        directions = np.zeros_like(waves)
        update = update or partial(descend_together if self.sources else descend, poisson=poisson)

        def one(j: int) -> tuple[float, float]:
            moved = None if shifts is None else shifts[j]
            directions[j], misfit, free = update(self.operator, waves[j], self.targets[j], j, moved)
            return misfit * self.weight[j], free

        misfit, free = np.sum(each(one, self.frames if frames is None else frames), axis=0)
        return directions, float(misfit), float(free)

    def back(self, directions: np.ndarray) -> np.ndarray:
        """Descent direction of the crystal from those of the exit waves."""
        scale = (self.weight * self.amplitude)[:, None, None]
        if self.sources:
            ways = [scale * directions[:, n] * s.ramp.conj() for n, s in enumerate(self.sources)]
            parts = [
                slow_transform(s.matrix.conj().T, way) for s, way in zip(self.sources, ways, strict=True)
            ]
            return np.sum(parts, axis=0)
        return slow_transform(self.matrix.conj().T, scale * directions)


@dataclass
class Solution:
    """Where a trial stands: crystal, support, drift (J, 2) in m, its history.

    `brightness` (J,) says by how much the light of each frame differs from what the monitor told, as a factor
    of its amplitude, where that was fitted; `background` the counts per pixel that no wave makes.
    """

    image: np.ndarray
    support: np.ndarray
    shifts: np.ndarray | None = None
    brightness: np.ndarray | None = None
    background: float = 0.0
    error: list[float] = field(default_factory=list)
    free_llk: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Free log-likelihood of the last pass, or its error where no pixels are free: lower is better."""
        return self.free_llk[-1] if np.isfinite(self.free_llk[-1]) else self.error[-1]

    def record(self, problem: Problem, misfit: float, free: float) -> None:
        """Append the relative misfit and the mean free log-likelihood of one pass over the data."""
        self.error.append(float(np.sqrt(misfit / problem.norm)))
        self.free_llk.append(free / problem.free_count if problem.free_count else float("nan"))


def copy_of(solution: Solution) -> Solution:
    """Image, support, drift, brightness and background of a solution, with a new history."""
    return replace(solution, error=[], free_llk=[])


def refine(
    problem: Problem,
    solution: Solution,
    iterations: int,
    after: Callable[[int, Solution], None] | None = None,
    subsets: int = 1,
    fit_brightness: bool = False,
    poisson: bool = False,
) -> Solution:
    """Nesterov-accelerated descent of the crystal within its support, restarted when the misfit rises.

    Down the gradient of ``sum_j w_j sum (sqrt(I_c + 3/8) - sqrt(I_o + 3/8))^2``; restart after
    B. O'Donoghue and E. Candes, Found. Comput. Math. 15, 715 (2015).

    Parameters
    ----------
    problem : Problem
    solution : Solution
        Changed in place, and returned.
    iterations : int
        Passes over all frames.
    after : callable, optional
        Called with (iteration, solution) after each pass; may tighten the support.
    subsets : int
        Steps per pass, each on every `subsets`-th frame: faster as long as the crystal fills less than one
        part in `subsets` of the field along zeta, since it is then sampled well enough by these alone.
    fit_brightness : bool
        Also fit how much light each frame had, by Newton steps from the same derivatives.
    poisson : bool
        Step down Poisson's likelihood instead, from a crystal that is nearly right (`modulus_step`).
    """
    told = problem.amplitude
    if solution.brightness is not None:
        problem = problem.in_light(told * solution.brightness)
    ahead, age = solution.image, 0
    parts = [problem.frames[n::subsets] for n in range(subsets)]
    for iteration in range(iterations):
        misfit = free = 0.0
        for frames in parts:
            waves = problem.waves(ahead)
            directions, seen, unseen = problem.descent(waves, solution.shifts, frames=frames, poisson=poisson)
            misfit, free = misfit + seen, free + unseen
            following = (ahead + np.float32(subsets) * problem.back(directions)) * solution.support
            age += 1
            ahead = following + np.float32((age - 1) / (age + 2)) * (following - solution.image)
            solution.image = following
            if fit_brightness:
                problem = problem.in_light(brightened(problem, waves, directions, frames))
                solution.brightness = problem.amplitude / told
        solution.record(problem, misfit, free)
        if len(solution.error) > 1 and solution.error[-1] > solution.error[-2]:
            ahead, age = solution.image, 0
        if after is not None:
            after(iteration, solution)
            ahead = ahead * solution.support
    return solution


def brightened(problem: Problem, waves: np.ndarray, directions: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Amplitudes (J,) of the light that fit the counts of `frames` better; their mean over the light is kept.

    What changes from frame to frame is found; what changes slowly is a blur of the crystal along zeta and is
    not told from it.

    The misfit changes by ``-2 Re <P, d> da`` when a wave P with descent direction d grows by the factor
    ``1 + da``, and curves by ``2 sum I^2 / (I + 3/8)``, which is less than twice the counts.
    """
    pairs = (a[frames].reshape(len(frames), -1) for a in (waves.conj(), directions))
    asked = np.einsum("ji,ji->j", *pairs).real
    change = asked / float(problem.operator.step) / np.maximum(problem.counts[frames], 1.0)
    change = np.clip(change, -LARGEST_CHANGE, LARGEST_CHANGE)
    change -= np.average(change, weights=problem.counts[frames] + 1e-30)
    amplitude = problem.amplitude.copy()
    amplitude[frames] *= (1 + change).astype(np.float32)
    return amplitude


def noise_score(problem: Problem, solution: Solution) -> float:
    """Free log-likelihood that counting noise alone would leave, were the solution right.

    What its own is to be held against: half as much again says that something does not fit. nan where no
    pixels are free. From every `SPARSE`-th frame.
    """
    waves, shifts = problem.waves(solution.image), solution.shifts
    several = waves if problem.sources else waves[:, None]
    if solution.brightness is not None:
        several = solution.brightness[:, None, None, None] * several

    def expected(j: int) -> np.ndarray:
        moved, light = None if shifts is None else shifts[j], problem.operator.over(0.0)
        counts = np.sum([light.intensity(light.forward(w, j, moved)) for w in several[j]], axis=0)
        return counts[problem.targets[j] <= -2] + solution.background

    free = [j for j in problem.frames[::SPARSE] if (problem.targets[j] <= -2).any()]
    return expected_log_likelihood(np.concatenate(each(expected, free))) if free else float("nan")


def dark_counts(problem: Problem, solution: Solution) -> float:
    """Counts per pixel that the crystal does not make: those where it sends least light, less what it sends.

    Over the darkest `DARK` of all blocks of pixels of every `SPARSE`-th frame. No fit of all pixels:
    sqrt(I + 3/8) underrates few counts, a third of them at I = 0.02, and would call that a background.
    """
    amplitude = 1 if solution.brightness is None else solution.brightness[:, None, None]
    waves, shifts = amplitude * problem.waves(solution.image), solution.shifts
    frames = problem.frames[::SPARSE]

    def sums(j: int) -> np.ndarray:
        psi = problem.operator.forward(waves[j], j, None if shifts is None else shifts[j])
        target, light = problem.targets[j], problem.operator.over(0.0).intensity(psi)
        used = target >= 0
        seen = np.where(used, np.square(target) - np.float32(ANSCOMBE), 0)
        return np.stack([_blocks(a) for a in (seen, np.where(used, light, 0), used)])

    seen, light, used = np.concatenate(each(sums, frames), axis=1)
    seen, light, used = (a[used > BLOCK**2 / 2] for a in (seen, light, used))
    dark = np.argsort(light / used)[: max(1, int(DARK * len(used)))]
    return max(float((seen[dark] - light[dark]).sum() / used[dark].sum()), 0.0)


def _blocks(a: np.ndarray) -> np.ndarray:
    """Sums over squares of `BLOCK` pixels; what is left over at the ends is left out."""
    ny, nx = (n // BLOCK for n in a.shape)
    squares = a[: ny * BLOCK, : nx * BLOCK].reshape(ny, BLOCK, nx, BLOCK)
    return squares.sum(axis=(1, 3), dtype=float).ravel()


def gradients(waves: np.ndarray) -> np.ndarray:
    """Derivatives (2, frames, ny, nx) per pixel along (columns, rows), by Fourier transform."""
    spectrum = fft2(waves)
    fy, fx = (np.fft.fftfreq(n).astype(np.float32) for n in waves.shape[1:])
    factor = np.complex64(2j * np.pi)
    return np.stack([ifft2(spectrum * (factor * fx)), ifft2(spectrum * (factor * fy[:, None]))])


def move(spectra: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Waves of 2D `spectra` moved by `shifts` (frames, 2) pixels along (columns, rows)."""
    fy, fx = (np.fft.fftfreq(n) for n in spectra.shape[1:])
    rows = np.exp(-2j * np.pi * np.multiply.outer(shifts[:, 1], fy)).astype(np.complex64)
    columns = np.exp(-2j * np.pi * np.multiply.outer(shifts[:, 0], fx)).astype(np.complex64)
    return ifft2(spectra * rows[:, :, None] * columns[:, None, :])


def centre_shifts(shifts: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Take off the mean over the light: a common shift of all frames is the place of the crystal."""
    return shifts - np.average(shifts, axis=0, weights=light)
