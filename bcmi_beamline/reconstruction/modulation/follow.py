"""A rocking scan while it runs: frames are solved as they come, and the crystal grows in the picture.

A scan rocks from one side of the peak to the other. Frames wait until the peak has passed; from the brightest
one the chain then grows outward, to frames that come and back to those that came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modulation.chain import BRIGHT, STEPS, extend
from bcmi_beamline.reconstruction.modulation.driver import (
    Drift,
    Progress,
    central_wave,
    conclude,
    light_centres,
    make_result,
    prepare,
)
from bcmi_beamline.reconstruction.modulation.operators import FrameOperator, RockingOperator, Window
from bcmi_beamline.reconstruction.modulation.refine import Problem
from bcmi_beamline.reconstruction.modulation.slices import frame_counts, make_targets
from bcmi_beamline.reconstruction.modulation.support import thickness_from_counts
from bcmi_beamline.reconstruction.threads import each, in_this_thread, one_thread_per_product
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

LIGHT = 1e5
"""Counts of a frame that can be solved from noise: some tens for each point of a wave."""

PASSED = 0.7
"""The peak has passed when a frame has fewer counts than this part of the brightest one."""

BACKWARD = 3
"""Earlier frames solved for each one that comes."""

GROWTH = 1.6
"""Factor by which the solved frames grow until the crystal is shown again."""

PREVIEW_PASSES = 2
"""Over all solved frames, for a picture."""

FREE_BLOCK = 16
"""Frames for which free pixels are drawn together: how many will come is not known."""

LARGEST_GAP = 0.7
"""Of kappa between a frame and the nearest solved one, over 2 pi / thickness: further apart, slices of the
crystal tell nothing of each other."""


@dataclass
class _Frames:
    """The part of a `Problem` that solving single frames needs."""

    operator: FrameOperator
    rocking: RockingOperator
    targets: list[np.ndarray]
    thickness: float


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
        self._covered = 0.0
        self._waves = np.zeros((0, 0, 0), np.complex64)
        self.begun = -1
        """Frame from which the chain grows; -1 before there is one."""
        self.solved: list[int] = []

    def add(self, scan: RockingScan, ended: bool = False) -> None:
        """Fold in the frames of `scan` beyond those that it had before.

        `ended`: no more will come, so that all must be solved that have light.
        """
        first = len(self._targets)
        if len(scan.frames) > first:
            new = _part(scan, np.arange(first, len(scan.frames)))
            targets = make_targets(new, self.free(scan, first))
            self._targets.extend(targets)
            self._counts = np.concatenate([self._counts, frame_counts(targets)])
        if self.begun < 0 and not self._begin(scan, ended):
            return
        self._make_room(scan)
        self._solve(len(scan.frames) if ended else 2 * (len(scan.frames) - first) + BACKWARD, ended)

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

    def _begin(self, scan: RockingScan, ended: bool) -> bool:
        """Solve the brightest frame, once it is known to be the brightest; False while it is not."""
        counts, brightest = self._counts, int(np.argmax(self._counts))
        passed = counts[brightest] > LIGHT and counts[-1] < PASSED * counts[brightest]
        if len(counts) < 2 or not (passed or ended):
            return False
        problem = self._prepared(scan, None)
        # the calibrated beam, where it fits: wherever the crystal stands now
        wave, self.begun = central_wave(problem, np.random.default_rng((self._seed, 0)), "probe")
        self._frames = _Frames(problem.operator, problem.rocking, self._targets, problem.thickness)
        self._waves = np.zeros((len(counts), *wave.shape), np.complex64)
        self._waves[self.begun] = wave
        self.solved = [self.begun]
        return True

    def _prepared(self, scan: RockingScan, window: Window | None) -> Problem:
        """A problem that has room for as many angles beyond the peak as before it."""
        self._covered = 1.05 * float(np.abs(scan.angles_deg).max())
        blank = np.zeros((2, *scan.frames.shape[1:]), scan.frames.dtype)
        wide = replace(
            _part(scan, np.arange(len(scan.frames))),
            frames=np.concatenate([scan.frames, blank]),
            angles_deg=np.concatenate([scan.angles_deg, [-self._covered, self._covered]]),
            flux=None,
        )
        free = np.concatenate([self.free(scan), blank.astype(bool)])
        return prepare(wide, self.modulator, seed=self._seed, free=free, window=window)

    def _make_room(self, scan: RockingScan) -> None:
        """For all frames that `scan` has by now."""
        frames = self._frames
        assert frames is not None
        window, pixel = frames.operator.window, frames.operator.pixel
        geometry = scan.geometry.with_modulator(self.modulator.sample_distance)
        if np.abs(scan.angles_deg).max() > self._covered:
            frames.operator = self._prepared(scan, window).operator
        frames.operator = frames.operator.for_frames(light_centres(geometry, scan.angles_deg, pixel))
        frames.rocking = RockingOperator(geometry, scan.angles_deg, pixel, window)
        frames.thickness = 1.25 * thickness_from_counts(self._counts, frames.rocking.kappa)
        more = len(scan.frames) - len(self._waves)
        self._waves = np.concatenate([self._waves, np.zeros((more, *window.shape), np.complex64)])

    def _solve(self, count: int, ended: bool) -> None:
        """Up to `count` frames, one on either side at a time, outward from the first, where there is light.

        A frame that lies too far from all solved ones waits for those between, unless the scan has `ended`.
        """
        frames = self._frames
        assert frames is not None
        from_first = frames.rocking.kappa - frames.rocking.kappa[self.begun]
        bright = from_first[self._counts >= BRIGHT * self._counts.max()]
        wanted = np.flatnonzero((from_first >= bright.min()) & (from_first <= bright.max()))
        for _ in range(0, count, 2):
            left = np.setdiff1d(wanted, self.solved)
            sides = [left[from_first[left] < 0], left[from_first[left] >= 0]]
            nearest = [int(side[np.argmin(np.abs(from_first[side]))]) for side in sides if len(side)]
            ready = [j for j in nearest if ended or self._gap(j) < LARGEST_GAP]
            if not ready:
                return
            self._extend(ready)

    def _extend(self, frames: list[int]) -> None:
        """Solve `frames` from those that are solved."""
        known, problem = list(self.solved), cast(Problem, self._frames)  # it has what `extend` needs of one
        waves = each(lambda j: extend(problem, self._waves, j, known, STEPS), frames)
        for j, wave in zip(frames, waves, strict=True):
            self._waves[j] = wave
        self.solved += frames

    def _gap(self, frame: int) -> float:
        """Distance in kappa of `frame` from the nearest solved one, as `LARGEST_GAP`."""
        assert self._frames is not None
        kappa = self._frames.rocking.kappa
        nearest = np.abs(kappa[self.solved] - kappa[frame]).min()
        return float(nearest * self._frames.thickness / (2 * np.pi))

    def crystal(self, scan: RockingScan, whole: bool, **finish: Any) -> Callable[[], Reconstruction]:
        """What is solved by now makes together, as a function to be called at leisure.

        `whole`: all frames of the scan are fitted in the end, not only the solved ones. `finish` goes to
        `conclude`.
        """
        assert self._frames is not None
        window, free = self._frames.operator.window, self.free(scan)
        frames = np.arange(len(scan.frames)) if whole else np.sort(self.solved)
        waves = self._waves[frames].copy()
        reached = np.flatnonzero(np.isin(frames, self.solved))
        part = scan if whole else _part(scan, frames)

        def make() -> Reconstruction:
            with one_thread_per_product():
                problem = prepare(part, self.modulator, free=free[frames], window=window)
                order = reached[np.argsort(problem.rocking.kappa[reached])]
                solution = conclude(problem, waves, order, **finish)
            configuration = {
                "method": "bcmi",
                "trials": 1,
                "followed": True,
                "frames": len(part.frames),
                "seed": self._seed,
                "free_fraction": self._fraction,
                "modulator_distance": self.modulator.sample_distance,
                "modulator_run_uid": self.modulator.metadata.get("run_uid"),
                "thickness": problem.thickness,
                **{name: value for name, value in finish.items() if name != "report"},
            }
            return make_result(part, problem, [solution], configuration)

        return make


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
        Its calibrated beam, where it has one, tells the window of the crystal; the start is noise.
    iterations : int
        Passes over all frames in the end.
    seed, drift, free_fraction
        As for `reconstruct`.
    preview : int
        Frames solved when the crystal is shown for the first time.
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
    follower, scan, next_size = Follower(modulator, seed, free_fraction), None, preview
    shown: Future | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="preview") as beside:

        def draw(make: Callable[[], Reconstruction], show: Callable[[Reconstruction], None]) -> None:
            with in_this_thread():
                show(make())

        for scan in scans:
            with one_thread_per_product():
                follower.add(scan)
            solved = len(follower.solved)
            say(0.5 * solved / len(scan.frames), f"{len(scan.frames)} frames, {solved} solved")
            if show is not None and solved >= next_size and (shown is None or shown.done()):
                if shown is not None:
                    shown.result()
                make = follower.crystal(scan, False, iterations=PREVIEW_PASSES, drift="none")
                shown, next_size = beside.submit(draw, make, show), int(np.ceil(GROWTH * solved))
        if scan is None:
            raise ValueError("the run ended before its first frame: there is nothing to reconstruct")
        with one_thread_per_product():
            follower.add(scan, ended=True)
        if shown is not None:
            shown.result()
    result = follower.crystal(scan, True, iterations=iterations, drift=drift, report=progress)()
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
