"""From a rocking curve and a calibrated modulator to a crystal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from bcmi_beamline.reconstruction.modes import align_trials, eigen_modes, spread
from bcmi_beamline.reconstruction.modulation.chain import chain, combine, even_out, weighed
from bcmi_beamline.reconstruction.modulation.coherence import IncidentLight, Lengths, find_coherence
from bcmi_beamline.reconstruction.modulation.distance import DISTANCE_PILOTS, Focus, refocused
from bcmi_beamline.reconstruction.modulation.drift import DriftFollower, sentinel_shifts, usual_step
from bcmi_beamline.reconstruction.modulation.operators import (
    Window,
)
from bcmi_beamline.reconstruction.modulation.prepare import prepare
from bcmi_beamline.reconstruction.modulation.refine import (
    Problem,
    Solution,
    Source,
    copy_of,
    dark_counts,
    noise_score,
    refine,
)
from bcmi_beamline.reconstruction.modulation.scale import SCALE_PILOTS, Scale, rescale
from bcmi_beamline.reconstruction.modulation.slices import (
    solve_from_noise,
)
from bcmi_beamline.reconstruction.modulation.slicewise import iterate_slices, random_crystal
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.reconstruction.trials import fingerprint, run_trials
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

Progress = Callable[[float, str], None]
Start = Literal["random", "probe"]
Drift = Literal["free", "none"]
Method = Literal["chain", "paper"]
Likelihood = Literal["anscombe", "poisson"]

SHARED = 0.9
"""Weight of the first mode from which on the best trials are one solution."""

SUBSETS = 3
"""Steps per pass over all frames, except in the last passes, which settle."""

SETTLE = 2
"""Passes of one step at the end."""

LOOK = 2
"""Passes between two looks at the drift."""

EVEN_ROUNDS, EVENED = 4, 0.03
"""A fitted crystal is made more even, and fitted again, so many times, as long as so much of the unevenness
goes at a time."""

GAIN = 0.01
"""Part by which a fit of each frame's brightness, or of a background, must lower the misfit of the free
pixels, which no step has seen."""

NOTICED = 0.005
"""Part of all counts that a background must be to be fitted: less does no harm."""

REJECT = 0.1
"""A trial whose free log-likelihood lies by this part above the best one's is another solution: a bad one."""


class Ending(NamedTuple):
    """What is taken account of when the drift is known, and one wave a frame has brought the crystal near.

    `sources`, of light that is not coherent, for as many passes again (light of a few coherence lengths
    spoils little of what comes before), and `poisson`, for the last passes: step down Poisson's likelihood.
    """

    sources: tuple[Source, ...] = ()
    poisson: bool = False


PLAIN = Ending()


def central_wave(
    problem: Problem, rng: np.random.Generator, start: Start = "random"
) -> tuple[np.ndarray, int]:
    """Exit wave of the frame the chain begins with, and that frame.

    From the calibrated beam, where it fits; else the brightest frame from noise.
    """
    if start == "probe" and problem.beam is not None:
        return problem.beam
    frame = int(np.argmax(problem.counts))
    inside = np.any(problem.region, axis=0)
    return solve_from_noise(problem.operator, problem.targets[frame], frame, rng, inside)[0], frame


def solve(
    problem: Problem,
    iterations: int,
    rng: np.random.Generator,
    start: Start = "random",
    drift: Drift = "free",
    method: Method = "chain",
    report: Progress | None = None,
    ending: Ending = PLAIN,
) -> Solution:
    """One trial: central wave, chain, phases and drift, all frames together.

    Parameters
    ----------
    problem : Problem
    iterations : int
        Passes over all frames at the end.
    rng : Generator
    start : {"random", "probe"}
        As in `reconstruct`.
    drift : {"free", "none"}
        Whether the crystal may have drifted.
    method : {"chain", "paper"}
        As in `reconstruct`.
    report : callable, optional
        Given the fraction of the trial done and a line.
    ending : Ending
        As for `finish`.
    """
    if method == "paper":
        after = _progress(problem, iterations, report, tighten=False)
        return iterate_slices(problem, random_crystal(problem, rng), iterations, after, drift == "free")
    say = report or (lambda *_: None)
    say(0.0, "central frame")
    central, frame = central_wave(problem, rng, start)
    waves, reached = chain(problem, central, frame, lambda done: say(0.1 + 0.2 * done, "frame by frame"))
    return conclude(problem, waves, reached, iterations, drift, report, ending)


def conclude(
    problem: Problem,
    waves: np.ndarray,
    reached: np.ndarray,
    iterations: int,
    drift: Drift = "free",
    report: Progress | None = None,
    ending: Ending = PLAIN,
) -> Solution:
    """From solved exit waves to the crystal: phases and drift, all frames together.

    Parameters
    ----------
    problem : Problem
    waves, reached
        As `chain` returns them.
    iterations, drift, report, ending
        As for `solve`.
    """
    say = report or (lambda *_: None)
    sentinels = places_shown(problem, waves, reached) if drift == "free" else None
    say(0.31, "phases and places of the frames")
    solution = combine(problem, waves, reached, drift == "free", sentinels)
    return finish(problem, solution, iterations, drift, sentinels, report, ending)


def places_shown(
    problem: Problem, waves: np.ndarray, reached: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """What the sentinels tell, as `sentinel_shifts`; None without them, or where the peak was not solved."""
    peak = int(np.argmin(np.abs(problem.rocking.kappa)))
    if problem.sentinels is None or peak not in reached:
        return None
    return sentinel_shifts(problem, waves[peak], peak, *problem.sentinels)


def finish(
    problem: Problem,
    solution: Solution,
    iterations: int,
    drift: Drift = "free",
    sentinels: tuple[np.ndarray, np.ndarray] | None = None,
    report: Progress | None = None,
    ending: Ending = PLAIN,
) -> Solution:
    """All frames together, from a crystal that is nearly right.

    Parameters
    ----------
    problem : Problem
    solution : Solution
        With the drift so far.
    iterations, drift, report
        As for `solve`.
    sentinels : (shifts, after), optional
        From `places_shown`.
    ending : Ending
        Of the last passes.
    """
    after, moving = _progress(problem, iterations, report, tighten=True), drift == "free"
    pixels = np.zeros((2, 2)) if solution.shifts is None else solution.shifts / problem.metres_per_pixel
    settle = min(SETTLE, iterations)

    def together(problem: Problem, solution: Solution, passes: int = iterations - settle) -> Solution:
        look = DriftFollower(problem, usual_step(pixels), sentinels)

        def follow(passed: int, state: Solution) -> None:
            after(passed, state)
            if moving and (passed + 1) % LOOK == 0:
                look(state)

        return refine(problem, solution, passes, follow, SUBSETS)

    solution = together(problem, solution)
    if moving and problem.tighten and iterations > settle:
        solution = evened_out(problem, solution, sentinels, together)
    if iterations > settle:
        problem, solution = over_background(problem, solution, together)
    if ending.sources:
        problem = problem.lit_by(ending.sources)
        solution = joined(solution, refine(problem, copy_of(solution), iterations, subsets=SUBSETS))
    settled = partial(refine, iterations=settle, poisson=ending.poisson)
    held = settled(problem, copy_of(solution), after=after)
    if settle < SETTLE or not problem.free_count:
        return joined(solution, held)
    freed = settled(problem, copy_of(solution), fit_brightness=True)
    return joined(solution, freed if freed.score < (1 - GAIN) * held.score else held)


def evened_out(
    problem: Problem,
    solution: Solution,
    sentinels: tuple[np.ndarray, np.ndarray] | None,
    together: Callable[[Problem, Solution, int], Solution],
) -> Solution:
    """The solution, made more even and fitted again as long as it gains by it.

    Descent on the counts leaves a smooth aberration of the frames' phases and places where the chain left a
    large one: most crystals have none by now, and stay as they are.
    """
    for _ in range(EVEN_ROUNDS):
        evened, gain = even_out(problem, solution, sentinels)
        if gain < EVENED:
            break
        evened = together(problem, evened, LOOK)
        if not weighed(evened) < weighed(solution):
            break
        solution = joined(solution, evened)
    return solution


def over_background(
    problem: Problem, solution: Solution, together: Callable[[Problem, Solution], Solution]
) -> tuple[Problem, Solution]:
    """Problem and solution with the counts that no wave makes, where there are enough and the data say so.

    Found from a crystal that was fitted without them, and once more from one that was fitted with them.
    """
    dark = dark_counts(problem, solution)
    if dark * float((problem.targets[0] >= 0).sum()) < NOTICED * problem.counts.mean():
        return problem, solution
    over = problem.over(dark)
    again = together(over, copy_of(solution))
    if not again.score < (1 - GAIN) * solution.score:
        return problem, solution
    again.background = dark_counts(over, again)
    return problem.over(again.background), again


def joined(before: Solution, after: Solution) -> Solution:
    """`after` with the whole history."""
    return replace(after, error=before.error + after.error, free_llk=before.free_llk + after.free_llk)


def _progress(
    problem: Problem, iterations: int, report: Progress | None, tighten: bool
) -> Callable[[int, Solution], None]:
    """What follows each pass over all frames: the support is drawn anew at first, and the pass is told."""
    done = 0

    def after(_: int, state: Solution) -> None:
        nonlocal done
        done += 1
        if tighten and done <= 2 * iterations // 3:
            state.support = problem.tightened(state.image, 0.2, state.support)
            state.image = state.image * state.support
        if report is not None:
            report(
                0.5 + 0.5 * min(done / iterations, 1),
                f"all frames, error {state.error[-1]:.4f}, free log-likelihood {state.free_llk[-1]:.3f}",
            )

    return after


@dataclass
class Trial:
    """One random start of a problem, for `run_trials`."""

    problem: Problem
    iterations: int
    seed: int
    start: Start
    drift: Drift
    method: Method
    ending: Ending = PLAIN
    outcome: ClassVar[type] = Solution

    def settings(self) -> dict[str, Any]:
        """Every option, and a hash of the data as they are used."""
        problem = self.problem
        data = fingerprint(problem.targets, problem.region, problem.operator.modulator, problem.rocking.kappa)
        return {
            "data": data,
            "iterations": self.iterations,
            "seed": self.seed,
            "start": self.start,
            "drift": self.drift,
            "method": self.method,
            "sources": fingerprint(*(array for source in self.ending.sources for array in source)),
            "poisson": self.ending.poisson,
        }

    def __call__(self, number: int, report: Progress | None) -> Solution:
        """Solve it from ``default_rng((seed, number))``."""
        rng = np.random.default_rng((self.seed, number))
        with one_thread_per_product():
            return solve(
                self.problem, self.iterations, rng, self.start, self.drift, self.method, report, self.ending
            )


def reconstruct(
    scan: RockingScan,
    modulator: Modulator,
    *,
    trials: int = 1,
    seed: int = 0,
    iterations: int = 10,
    support: Reconstruction | np.ndarray | None = None,
    progress: Progress | None = None,
    method: Method = "chain",
    start: Start = "random",
    drift: Drift = "free",
    refine_scale: bool = False,
    refine_distance: bool = False,
    coherence: bool | tuple[float, float] = False,
    likelihood: Likelihood = "anscombe",
    free_fraction: float = 0.05,
    workers: int = 1,
    scheduler: str | None = None,
    folder: Path | None = None,
    show: Callable[[Reconstruction], None] | None = None,
) -> Reconstruction:
    """Reconstruct a crystal from a rocking curve taken through a calibrated modulator.

    Parameters
    ----------
    scan : RockingScan
    modulator : Modulator
    trials : int
        Independent starts; the three of lowest free log-likelihood make the result.
    seed : int
        Trial n draws from ``default_rng((seed, n))``.
    iterations : int
        Passes over all frames after the chain.
    support : Reconstruction, or ndarray, (n_zeta, ny, nx), bool, optional
        Another result of the crystal, whose support, grown by three voxels, is the largest allowed; or the
        known support on the grid of a result (`RockingOperator.voxel` and the object pixel). Else it is
        found. Without a known one, pixels are finer where the light leaves the window of the detector
        (`border`).
    progress : callable, optional
        Given the fraction done and a line.
    method : {"chain", "paper"}
        Frames one by one, then together; or the published iteration from noise (no shrink-wrap; `start` does
        not apply), which needs hundreds of `iterations`.
    start : {"random", "probe"}
        Begin the first frame from noise, or from the beam of the calibration, wherever the crystal stands
        now; from noise where that beam does not fit.
    drift : {"free", "none"}
        Whether the crystal may have drifted across the beam: then it is followed frame by frame.
    refine_scale : bool
        Find the scale of the map, and of d1 with it, from a crystal that is reconstructed for it before the
        trials; they go through the corrected map where the scale is told (`find_scale`).
    refine_distance : bool
        Find d1, the map being right, where crystals that are reconstructed for it before the trials are most
        even (`refocused`): for crystals of one density.
    coherence : bool, or (x, y)
        Coherence lengths of the light at the crystal across the incident beam, m, inf where it is coherent;
        True: find them from a crystal that is reconstructed for it before the trials (`find_coherence`).
    likelihood : {"anscombe", "poisson"}
        What the last two passes step down: the variance-stabilised misfit of those before, or Poisson's
        negative log-likelihood.
    free_fraction : float
        Part of the pixels kept free to judge by.
    workers, scheduler, folder
        Where the trials run and are kept, as in `run_trials`.
    show : callable, optional
        Given what the trials so far make together, whenever one ends.

    Returns
    -------
    Reconstruction
        In the sheared frame.

    Raises
    ------
    ValueError
        In one line, when scan and modulator cannot be reconciled or an option is out of range.
    """
    if trials < 1 or iterations < 1:
        raise ValueError(f"trials and iterations must be 1 at least, not {trials} and {iterations}")
    if method == "paper" and coherence:
        raise ValueError("the published iteration takes coherent light: leave coherence, or method='paper'")
    if not isinstance(coherence, bool) and not all(length > 0 for length in coherence):
        raise ValueError(f"coherence lengths must be positive, inf for coherent light, not {coherence}")
    if start == "probe" and not modulator.probe.any():
        raise ValueError("start='probe' needs the calibrated beam, and this modulator has none: use 'random'")
    options = {"free_fraction": free_fraction, "seed": seed}
    with one_thread_per_product():
        problem = prepare(scan, modulator, support=support, **options)

    def solve_first(problem: Problem, n: int, report: Progress | None) -> Solution:
        return Trial(problem, iterations, seed, start, drift, "chain")(trials + n, report)

    wanted = {
        "scale of the map": SCALE_PILOTS * refine_scale,
        "distance of the map": DISTANCE_PILOTS * refine_distance,
        "coherence": int(coherence is True),
    }
    pilots = Pilots(wanted, trials, solve_first, progress)
    lengths: Lengths = (np.inf, np.inf)
    scale, focus, sources = Scale(1.0, np.inf), Focus(0.0, np.inf), ()
    if refine_scale:
        problem, modulator, scale = rescale(scan, modulator, problem, pilots("scale of the map"))
    if refine_distance:
        problem, modulator, focus = refocused(scan, modulator, problem, pilots("distance of the map"))
    if coherence is True:
        lengths, sources = found_light(scan, problem, pilots("coherence"))
    elif coherence:
        lengths = coherence
        sources = IncidentLight(problem, scan.geometry, problem.region).sources(lengths)
    ending = Ending(sources, poisson=likelihood == "poisson")
    trial = Trial(problem, iterations, seed, start, drift, method, ending)
    configuration = {
        "method": "bcmi" if method == "chain" else "bcmi-paper",
        "trials": trials,
        "iterations": iterations,
        "start": start,
        "drift": drift,
        "refine_scale": refine_scale,
        "refine_distance": refine_distance,
        **options,
        "modulator_distance": modulator.sample_distance,
        "modulator_distance_error": focus.error if np.isfinite(focus.error) else None,
        "modulator_run_uid": modulator.metadata.get("run_uid"),
        "modulator_scale": scale.factor,
        "modulator_scale_error": scale.error if np.isfinite(scale.error) else None,
        "likelihood": likelihood,
        "coherence": coherence if isinstance(coherence, bool) else list(coherence),
        "coherence_length": [length if np.isfinite(length) else None for length in lengths],
        "thickness": problem.thickness,
        "support_given": support is not None,
    }

    def combined(solutions: list[Solution]) -> Reconstruction:
        return make_result(scan, problem.lit_by(sources), solutions, configuration)

    solutions = run_trials(
        trial,
        trials,
        workers=workers,
        scheduler=scheduler,
        folder=folder,
        progress=between(progress, pilots.part, 1.0),
        found=(lambda some: show(combined(some))) if show is not None else None,
    )
    return combined(solutions)


class Pilots:
    """Crystals that are solved before the trials, from noise of their own, to find something from.

    Parameters
    ----------
    wanted : dict
        How many at most for each purpose, in order.
    trials : int
        That follow.
    solve : callable
        Makes the n-th crystal of a problem, n and a report.
    progress : callable, optional
        Given the fraction of pilots and trials that is done, and a line.
    """

    def __init__(
        self,
        wanted: dict[str, int],
        trials: int,
        solve: Callable[[Problem, int, Progress | None], Solution],
        progress: Progress | None,
    ):
        self._names = [name for name, count in wanted.items() for _ in range(count)]
        self._share = 1 / (trials + len(self._names))
        self._solve, self._progress = solve, progress
        self.part = len(self._names) * self._share
        """Of pilots and trials together."""

    def __call__(self, purpose: str) -> Callable[[Problem, int], Solution]:
        """Makes the n-th crystal for a purpose."""
        first = self._names.index(purpose)

        def solve(problem: Problem, n: int) -> Solution:
            begun = (first + n) * self._share
            report = between(self._progress, begun, begun + self._share, f"{purpose}: ")
            return self._solve(problem, first + n, report)

        return solve


def found_light(
    scan: RockingScan, problem: Problem, solve: Callable[[Problem, int], Solution]
) -> tuple[Lengths, tuple[Source, ...]]:
    """Coherence lengths of the light, from a crystal that `solve` makes for it, and points of its source."""
    with one_thread_per_product():
        solution = solve(problem, 0)
        light = IncidentLight(problem, scan.geometry, solution.support)
        found = find_coherence(problem, solution, light)
    return found, light.sources(found)


def between(report: Progress | None, begun: float, end: float, name: str = "") -> Progress | None:
    """A report for the part of the work between two fractions of the whole; its lines begin with `name`."""
    if report is None:
        return None
    return lambda done, line: report(begun + (end - begun) * done, name + line)


def make_result(
    scan: RockingScan, problem: Problem, solutions: list[Solution], configuration: dict
) -> Reconstruction:
    """Rank trials by free log-likelihood and put what the best three share on a grid about the origin."""
    ranked = sorted(solutions, key=lambda s: s.score)
    best = ranked[0]
    kept = [s for s in ranked if s.score <= (1 + REJECT) * best.score]
    images = align_trials([s.image for s in kept[:3]], with_twin=False, free_axes=(0,))
    modes, weights = eigen_modes(images)
    shared = modes[0] if weights[0] > SHARED else best.image  # nothing to share where a trial failed
    window = problem.operator.window
    image = centre_on_axis(shared * best.support, window)
    return Reconstruction(
        image=image,
        support=centre_on_axis(best.support, window),
        voxel_size=(problem.rocking.voxel, *problem.operator.pixel),
        geometry=scan.geometry.with_modulator(configuration["modulator_distance"]),
        shear=scan.geometry.shear,
        free_llk=np.array([s.free_llk for s in solutions]),
        error=np.array([s.error for s in solutions]),
        drift=best.shifts,
        mode_weights=weights,
        configuration=configuration,
        metadata={
            **scan.metadata,
            "trial_scores": [float(s.score) for s in solutions],
            "noise_score": noise_score(problem, best),
            "trials_rejected": len(ranked) - len(kept),
            "background_counts": float(best.background),
            "border": [
                (n - m) // 2
                for n, m in zip(problem.operator.detector_shape, scan.frames.shape[1:], strict=True)
            ],
            **spread(images, best.support),
        },
    )


def centre_on_axis(image: np.ndarray, window: Window) -> np.ndarray:
    """Pad an image on `window` so that the beam axis stands at ``n // 2`` of rows and columns."""
    sizes = [n + 2 * abs(c) for n, c in zip(window.shape, window.centre, strict=True)]
    padded = np.zeros((len(image), *sizes), image.dtype)
    first = [size // 2 - n // 2 + c for size, n, c in zip(sizes, window.shape, window.centre, strict=True)]
    (row, column), (ny, nx) = first, window.shape
    padded[:, row : row + ny, column : column + nx] = image
    return padded
