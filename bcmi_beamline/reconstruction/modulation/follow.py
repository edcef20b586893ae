"""A rocking scan while it runs: frames are solved as they come, and the crystal grows in the picture.

A scan rocks from one side of the peak to the other. Frames wait until the peak has passed; from the brightest
one the chain then grows outward, to frames that come and, while none comes, back to those that came before.
Beside this the crystal is drawn, first from few frames. When no more light comes it is fitted to all frames
there are by then, so that little is left to do when the scan ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event, Lock
from typing import cast

import numpy as np

from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modulation.border import border_for, with_border
from bcmi_beamline.reconstruction.modulation.chain import BRIGHT, STEPS, extend
from bcmi_beamline.reconstruction.modulation.driver import (
    Drift,
    Progress,
    conclude,
    finish,
    make_result,
    places_shown,
)
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    Window,
    sinc_matrix,
    slow_transform,
)
from bcmi_beamline.reconstruction.modulation.prepare import Optics, light_centres, optics, prepare
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution
from bcmi_beamline.reconstruction.modulation.slices import frame_counts, make_targets, solve_from_noise
from bcmi_beamline.reconstruction.modulation.start import find_crystal, warm_up
from bcmi_beamline.reconstruction.modulation.support import thickness_from_counts
from bcmi_beamline.reconstruction.threads import each, in_this_thread, one_thread_per_product
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

LIGHT = 1e5
"""Counts of a frame that can be solved from noise: some tens for each point of a wave."""

PASSED = 0.7
"""The peak has passed when a frame has fewer counts than this part of the brightest one."""

DARK = 3
"""The light is over when so many frames in a row have too little to be solved."""

GROWTH, FULL_GROWTH = 1.6, 1.12
"""Factors by which the frames grow until the crystal is drawn again: while light comes, and after it."""

SKETCH_PASSES = 2
"""Over the frames of a picture that is drawn while light comes."""

AGAIN_PASSES, LAST_PASSES = 4, 2
"""Over all frames, from a crystal that was fitted to fewer of them: by `FULL_GROWTH` and more, or by less."""

WORSE = 1.03
"""A crystal is wrong that foretells unseen pixels worse by this factor than frames that were solved alone do.
It is 0.90 to 1.00 for crystals that correlate above 0.99 with the truth, 1.06 for one of 0.77."""

FREE_BLOCK = 16
"""Frames for which free pixels are drawn together: how many will come is not known."""

TURN_S = 0.0005
"""Longest time for which one thread keeps Python from the others."""

LARGEST_GAP = 0.7
"""Of kappa between a frame and the nearest solved one, over 2 pi / thickness: further apart, slices of the
crystal tell nothing of each other."""

ROOM = 1.2
"""The optics are made for angles beyond those that came, by this factor."""


@dataclass
class _Frames:
    """The part of a `Problem` that solving single frames needs."""

    operator: FrameOperator
    rocking: RockingOperator
    targets: list[np.ndarray]
    thickness: float


@dataclass
class Draft:
    """A crystal from the frames there were by then.

    Parameters
    ----------
    scan : RockingScan
        Those frames alone.
    frames : ndarray of int
        Which of the whole scan they are.
    solved : frozenset of int
        Frames that were solved alone.
    problem : Problem
    solution : Solution
    """

    scan: RockingScan
    frames: np.ndarray
    solved: frozenset[int]
    problem: Problem
    solution: Solution


class Follower:
    """Takes a scan as it grows, and solves its frames.

    Parameters
    ----------
    modulator : Modulator
    seed : int
        Of the first frame's start and of the free pixels.
    free_fraction : float
    """

    def __init__(self, modulator: Modulator, seed: int = 0, free_fraction: float = 0.05):
        self.modulator, self._seed, self._fraction = modulator, seed, free_fraction
        self._targets: list[np.ndarray] = []
        self._counts = np.zeros(0)
        self._free: list[np.ndarray] = []
        self._frames: _Frames | None = None
        self._optics: Optics | None = None
        self._border = 0, 0
        self._covered = -1.0
        self._waves = np.zeros((0, 0, 0), np.complex64)
        self.begun = -1
        """Frame from which the chain grows; -1 before there is one."""
        self.solved: list[int] = []

    def add(self, scan: RockingScan, ended: bool = False) -> None:
        """Fold in the frames of `scan` beyond those that it had before.

        `ended`: no more will come, so that all must be solved that have light.
        """
        first, count = len(self._targets), len(scan.frames)
        if count > first:
            new = _part(scan, np.arange(first, count))
            targets = with_border(make_targets(new, self.free(scan, first)), self._border)
            self._targets.extend(targets)
            self._counts = np.concatenate([self._counts, frame_counts(targets)])
            self._make_room(scan)
        if self.begun < 0 and not self._begin(scan, ended):
            return
        for _ in range(first, count):
            self._solve(self._ready(ended, beyond=first))
        while ended and self._solve(self._ready(ended)):
            pass

    def catch_up(self) -> bool:
        """Solve one frame on either side that was left behind; False if there was none."""
        return self.begun >= 0 and self._solve(self._ready())

    def free(self, scan: RockingScan, first: int = 0) -> np.ndarray:
        """Free pixels (J, Ny, Nx) of the frames from `first` on: the same however many will come."""
        shape = FREE_BLOCK, *scan.frames.shape[1:]
        for n in range(len(self._free), -(-len(scan.frames) // FREE_BLOCK)):
            rng = np.random.default_rng([self._seed, n])
            self._free.append(free_pixels(shape, None, self._fraction, seed=rng))
        block = first // FREE_BLOCK
        return np.concatenate(self._free[block:])[
            first - block * FREE_BLOCK : len(scan.frames) - block * FREE_BLOCK
        ]

    def _make_room(self, scan: RockingScan) -> None:
        """For all frames that `scan` has by now: the optics before there is light, the rest for the chain."""
        angles, frames = scan.angles_deg, self._frames
        largest = float(np.abs(angles).max())
        widened = largest > self._covered
        if widened or self._optics is None:
            self._covered = ROOM * largest
            self._optics = self._optics_of(scan)
            if frames is None:
                warm_up(self._optics.operator_on(Window((16, 16))), self._targets[0])
        if frames is None:
            return
        geometry = scan.geometry.with_modulator(self.modulator.sample_distance)
        window = frames.operator.window
        operator = self._optics.operator_on(window) if widened else frames.operator
        frames.operator = operator.for_frames(light_centres(geometry, angles, self._optics.pixel))
        frames.rocking = RockingOperator(geometry, angles, self._optics.pixel, window)
        frames.thickness = 1.25 * thickness_from_counts(self._counts, frames.rocking.kappa)
        more = len(angles) - len(self._waves)
        self._waves = np.concatenate([self._waves, np.zeros((more, *window.shape), np.complex64)])

    def _optics_of(self, scan: RockingScan) -> Optics:
        return optics(scan, self.modulator, np.array([-self._covered, self._covered]), self._border)

    def _begin(self, scan: RockingScan, ended: bool) -> bool:
        """Solve the brightest frame, once it is known to be the brightest; False while it is not."""
        counts, brightest = self._counts, int(np.argmax(self._counts))
        passed = counts[brightest] > LIGHT and counts[-1] < PASSED * counts[brightest]
        if len(counts) < 2 or not (passed or ended):
            return False
        geometry = scan.geometry.with_modulator(self.modulator.sample_distance)
        assert self._optics is not None
        bright = np.flatnonzero(counts >= BRIGHT * counts[brightest])
        self._border = border_for(np.array([self._targets[j] for j in bright]))
        if self._border != (0, 0):
            self._targets = list(with_border(np.array(self._targets), self._border))
            self._optics = self._optics_of(scan)
        (plain, pixel, _), angles = self._optics, scan.angles_deg
        walk = light_centres(geometry, angles, pixel)

        def operator_on(window: Window) -> FrameOperator:
            return plain(window).for_frames(walk)

        # the calibrated beam, where it fits: wherever the crystal stands now
        rng = np.random.default_rng((self._seed, 0))
        window, beam = find_crystal(operator_on, pixel, self._targets, angles, self.modulator, rng)
        operator, rocking = operator_on(window), RockingOperator(geometry, angles, pixel, window)
        if beam is None:
            beam = solve_from_noise(operator, self._targets[brightest], brightest, rng)[0], brightest
        wave, self.begun = beam
        self._frames = _Frames(operator, rocking, self._targets, 0.0)
        self._waves = np.zeros((0, *window.shape), np.complex64)
        self._make_room(scan)
        self._waves[self.begun] = wave
        self.solved = [self.begun]
        return True

    def _left(self) -> np.ndarray:
        """Frames that have light, between others that have, and are not solved."""
        bright = np.flatnonzero(self._counts >= BRIGHT * self._counts.max())
        kappa = self._kappa
        inside = (kappa >= kappa[bright].min()) & (kappa <= kappa[bright].max())
        return np.setdiff1d(np.flatnonzero(inside), self.solved)

    @property
    def _kappa(self) -> np.ndarray:
        """Of all frames, from the first that was solved."""
        assert self._frames is not None
        kappa = self._frames.rocking.kappa
        return kappa - kappa[self.begun]

    def _ready(self, ended: bool = False, beyond: int = 0) -> list[int]:
        """Of the frames from `beyond` on, the nearest to be solved on either side of the first.

        One that lies too far from all solved ones waits for those between, unless the scan has `ended`.
        """
        left, kappa = self._left(), self._kappa
        left = left[left >= beyond]
        sides = [left[kappa[left] < 0], left[kappa[left] >= 0]]
        nearest = [int(side[np.argmin(np.abs(kappa[side]))]) for side in sides if len(side)]
        return [j for j in nearest if ended or self._gap(j) < LARGEST_GAP]

    def _solve(self, frames: list[int]) -> bool:
        """Solve `frames` from those that are solved; False where there are none."""
        known, problem = list(self.solved), cast(Problem, self._frames)  # it has what `extend` needs of one
        waves = each(lambda j: extend(problem, self._waves, j, known, STEPS), frames)
        for j, wave in zip(frames, waves, strict=True):
            self._waves[j] = wave
        self.solved += frames
        return bool(frames)

    def _gap(self, frame: int) -> float:
        """Distance in kappa of `frame` from the nearest solved one, as `LARGEST_GAP`."""
        assert self._frames is not None
        kappa = self._frames.rocking.kappa
        nearest = np.abs(kappa[self.solved] - kappa[frame]).min()
        return float(nearest * self._frames.thickness / (2 * np.pi))

    def around(self) -> np.ndarray:
        """Frames no farther from the first solved one than the last that came, as far as all are solved."""
        if self.begun < 0:
            return np.zeros(0, int)
        kappa, left = self._kappa, self._left()
        same_side = kappa * np.sign(kappa[-1])
        near = np.abs(kappa) <= same_side.max()
        if len(left):
            near &= np.abs(kappa) < np.abs(kappa[left]).min()
        return np.flatnonzero(near)

    def light_is_over(self) -> bool:
        """Whether all frames are solved that have light, and the last ones have none."""
        counts = self._counts
        dark = self.begun >= 0 and (counts[-DARK:] < BRIGHT * counts.max()).all()
        return bool(dark) and not len(self._left())

    def draft(
        self,
        scan: RockingScan,
        frames: np.ndarray,
        before: Draft | None,
        iterations: int,
        drift: Drift,
        report: Progress | None = None,
    ) -> Callable[[], Draft]:
        """What some frames make together, as a function to be called at leisure.

        Parameters
        ----------
        scan : RockingScan
            As last given to `add`.
        frames : ndarray of int
            To be fitted, rising.
        before : Draft, optional
            Fitted with the same `drift` to nearly all of them. From it the way is shorter; it is gone only
            where no other frame was solved since, and kept only where it ends well (`holds`).
        iterations, drift, report
            As for `conclude`.
        """
        assert self._frames is not None
        window, border = self._frames.operator.window, self._border
        waves, solved = self._waves[frames].copy(), frozenset(self.solved)
        reached = np.flatnonzero(np.isin(frames, self.solved))

        def make() -> Draft:
            part = scan if len(frames) == len(scan.frames) else _part(scan, frames)
            free = self.free(scan)[frames]
            problem = prepare(part, self.modulator, free=free, window=window, border=border)
            order = reached[np.argsort(problem.rocking.kappa[reached])]
            if before is not None and before.solved == solved:
                start = carried(before, part, frames, problem)
                shown = places_shown(problem, waves, order) if drift == "free" else None
                few = len(frames) < FULL_GROWTH * len(before.frames)
                passes = min(iterations, LAST_PASSES if few else AGAIN_PASSES)
                solution = finish(problem, start, passes, drift, shown, report)
                if holds(problem, solution, waves, order):
                    return Draft(part, frames, solved, problem, solution)
            solution = conclude(problem, waves, order, iterations, drift, report)
            return Draft(part, frames, solved, problem, solution)

        return make

    def result(self, draft: Draft, **options: object) -> Reconstruction:
        """A draft as a result; `options` are those that it was made with."""
        configuration = {
            "method": "bcmi",
            "trials": 1,
            "followed": True,
            "frames": len(draft.frames),
            "seed": self._seed,
            "free_fraction": self._fraction,
            "modulator_distance": self.modulator.sample_distance,
            "modulator_run_uid": self.modulator.metadata.get("run_uid"),
            "thickness": draft.problem.thickness,
            **options,
        }
        return make_result(draft.scan, draft.problem, [draft.solution], configuration)


def carried(before: Draft, scan: RockingScan, frames: np.ndarray, problem: Problem) -> Solution:
    """The crystal of a draft on the voxels of a scan that has grown since.

    Parameters
    ----------
    before : Draft
    scan : RockingScan
        Of `frames` alone.
    frames : ndarray of int
        Those of the draft and others.
    problem : Problem
        Of `scan`.
    """
    was, solution = before.problem, before.solution
    fewer, more = len(before.frames), len(frames)
    scale = np.sqrt(more / fewer) * problem.rocking.voxel / was.rocking.voxel
    if scan.flux is not None and before.scan.flux is not None:
        scale *= np.sqrt(scan.flux.mean() / before.scan.flux.mean())
    finer = sinc_matrix(problem.rocking.zeta(len(problem.region)), was.rocking.zeta(len(was.region)))
    image = slow_transform((scale * finer).astype(np.float32), solution.image)
    support = problem.tightened(image, 0.2, problem.region)
    shifts = brightness = None
    if solution.shifts is not None:  # a frame that is new stood where the last one did
        shifts = np.stack([np.interp(frames, before.frames, line) for line in solution.shifts.T], axis=1)
    if solution.brightness is not None:
        brightness = np.ones(more, np.float32)
        brightness[np.isin(frames, before.frames)] = solution.brightness
    return Solution(image * support, support, shifts, brightness)


def holds(problem: Problem, solution: Solution, waves: np.ndarray, reached: np.ndarray) -> bool:
    """Whether a crystal foretells the frames that were solved alone as well as their own waves do (`WORSE`).

    On the pixels that neither has seen, where there are any: there one crystal for all frames is as close as
    waves that follow the noise of one frame each, unless it is the wrong crystal.
    """
    part = problem.only(reached).over(solution.background)
    amplitude = 1 if solution.brightness is None else solution.brightness[:, None, None]
    _, *crystal = part.descent(amplitude * part.waves(solution.image), solution.shifts)
    _, *alone = part.descent(waves, None)
    which = 1 if part.free_count else 0
    return crystal[which] <= WORSE * alone[which]


class _Left(Exception):
    """A drawing was given up."""


class _Beside:
    """What goes on beside the frames that come: those left behind are solved, and the crystal is drawn."""

    def __init__(
        self,
        follower: Follower,
        preview: int,
        iterations: int,
        drift: Drift,
        show: Callable[[Reconstruction], None] | None,
    ):
        self._follower, self._size, self._show = follower, preview, show
        self._iterations = iterations
        self._drift: Drift = drift
        self.lock = Lock()
        """To be held while the follower is changed or looked at."""
        self.full: Draft | None = None
        """The crystal fitted to all frames there were once the light was over."""
        self._leave = Event()
        self._solver = ThreadPoolExecutor(1, "left behind")
        self._painter = ThreadPoolExecutor(1, "preview")
        self._solving: Future | None = None
        self._drawing: Future | None = None
        self._drawn: frozenset[int] = frozenset()

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for pool in (self._solver, self._painter):
            pool.shutdown()

    def go_on(self, scan: RockingScan) -> None:
        """After frames were added: begin what can be begun."""
        if self._follower.begun < 0:
            return
        if _idle(self._solving):
            self._solving = self._solver.submit(self._catch_up)
        if _idle(self._drawing):
            with self.lock:
                self._draw_next(scan)

    def end(self) -> Draft | None:
        """Leave off; return what the end can begin with: a full draft, the first of which is waited for."""
        solved = frozenset(self._follower.solved)
        if self._drawn != solved or (self.full is not None and self.full.solved == solved):
            self._leave.set()
        if self._drawing is not None:
            self._drawing.result()
        return self.full

    def _catch_up(self) -> None:
        more = True
        while more and not self._leave.is_set():
            with self.lock:
                more = self._follower.catch_up()
            time.sleep(0.002)  # so that a frame that has come gets the lock

    def _draw_next(self, scan: RockingScan) -> None:
        follower, before = self._follower, self.full
        if follower.light_is_over():
            solved, count = frozenset(follower.solved), len(scan.frames)
            if before is None or before.solved != solved or count >= FULL_GROWTH * len(before.frames):
                self._begin(scan, np.arange(count), self._iterations, self._drift, True)
        elif self._show is not None and len(frames := follower.around()) >= self._size:
            self._size = int(np.ceil(GROWTH * len(frames)))
            self._begin(scan, frames, SKETCH_PASSES, "none", False)

    def _begin(
        self, scan: RockingScan, frames: np.ndarray, iterations: int, drift: Drift, whole: bool
    ) -> None:
        make = self._follower.draft(
            scan, frames, self.full if whole else None, iterations, drift, self._look_up
        )
        self._drawn = frozenset(self._follower.solved) if whole else frozenset()

        def draw() -> None:
            with in_this_thread():
                try:
                    draft = make()
                except _Left:
                    return
                if whole:
                    self.full = draft
                if self._show is not None:
                    self._show(self._follower.result(draft, iterations=iterations, drift=drift))

        self._drawing = self._painter.submit(draw)

    def _look_up(self, *_: object) -> None:
        if self._leave.is_set():
            raise _Left


@contextmanager
def _turns() -> Iterator[None]:
    """Let threads take turns often: else a frame that has come waits long for what is drawn beside."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _idle(work: Future | None) -> bool:
    """Whether there is no such work, or it is done; raises what it raised."""
    if work is None:
        return True
    if work.done():
        work.result()
    return work.done()


def follow(
    scans: Iterable[RockingScan],
    modulator: Modulator,
    *,
    iterations: int = 6,
    seed: int = 0,
    drift: Drift = "free",
    free_fraction: float = 0.05,
    preview: int = 33,
    progress: Progress | None = None,
    show: Callable[[Reconstruction], None] | None = None,
) -> Reconstruction:
    """Reconstruct a crystal while its rocking curve is taken.

    Parameters
    ----------
    scans : iterable of RockingScan
        The same scan again and again, each time with all the frames there are by then.
    modulator : Modulator
        Where it has its calibrated beam, the first frame is solved from that; else from noise.
    iterations : int
        Passes over all frames.
    seed, drift, free_fraction
        As for `reconstruct`.
    preview : int
        Frames about the peak with which the crystal is drawn for the first time.
    progress : callable, optional
        Given the fraction done and a line. How many frames will come is not known: the fraction is that of
        the frames there are.
    show : callable, optional
        Given the crystal as far as it is known, in a thread of its own, and in the end.

    Returns
    -------
    Reconstruction
        Of all frames.

    Raises
    ------
    ValueError
        In one line, when no frame came, or scan and modulator cannot be reconciled.
    """
    say = progress or (lambda *_: None)
    follower, scan = Follower(modulator, seed, free_fraction), None
    with one_thread_per_product(), _turns(), _Beside(follower, preview, iterations, drift, show) as beside:
        for scan in scans:
            with beside.lock:
                follower.add(scan)
            solved = len(follower.solved)
            say(0.5 * solved / len(scan.frames), f"{len(scan.frames)} frames, {solved} solved")
            beside.go_on(scan)
        if scan is None:
            raise ValueError("the run ended before its first frame: there is nothing to reconstruct")
        with beside.lock:
            follower.add(scan, ended=True)
        before, frames = beside.end(), np.arange(len(scan.frames))
        draft = follower.draft(scan, frames, before, iterations, drift, progress)()
    result = follower.result(draft, iterations=iterations, drift=drift)
    if show is not None:
        show(result)
    return result


def _part(scan: RockingScan, frames: np.ndarray) -> RockingScan:
    """Some frames of a scan, without sentinels."""
    flux = None if scan.flux is None else scan.flux[frames]
    return replace(
        scan,
        frames=scan.frames[frames],
        angles_deg=scan.angles_deg[frames],
        flux=flux,
        sentinels=None,
        sentinel_after=None,
    )
