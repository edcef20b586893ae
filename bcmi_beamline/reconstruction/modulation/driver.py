"""From a rocking curve and a calibrated modulator to a crystal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from bcmi_beamline.reconstruction.free_pixels import free_pixels
from bcmi_beamline.reconstruction.modes import align_trials, eigen_modes
from bcmi_beamline.reconstruction.modulation.chain import extend, walk_outward
from bcmi_beamline.reconstruction.modulation.drift import SIGNIFICANT, drift_significance, find_drift
from bcmi_beamline.reconstruction.modulation.operators import (
    FrameOperator,
    RockingOperator,
    Window,
    place_modulator,
)
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution, refine
from bcmi_beamline.reconstruction.modulation.slices import (
    frame_counts,
    make_targets,
    scale_to_counts,
    solve_from_noise,
    solve_waves,
)
from bcmi_beamline.reconstruction.modulation.slicewise import iterate_slices, random_crystal
from bcmi_beamline.reconstruction.modulation.support import (
    beam_at_crystal,
    sheared_box,
    shrink_wrap,
    thickness_from_counts,
    window_around,
)
from bcmi_beamline.reconstruction.modulation.synchronise import synchronise
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

Progress = Callable[[float, str], None]
Start = Literal["random", "probe"]
Drift = Literal["auto", "free", "none"]
Method = Literal["chain", "paper"]

SYNCHRONISE_AT = (5, 8, 12, 16, 24, 32, 45, 60, 80, 100, 130, 160)
"""Steps along the chain after which the phases are synchronised."""

TRUST_NONE, TRUST_FULL = 0.7, 0.95
"""A frame is left out where less of its light than the first meets the trusted map, and counts fully above
the second."""

SHARED = 0.9
"""Weight of the first mode from which on the best trials are one solution."""

PILOT = 8
"""Passes over all frames before a drift is looked for."""

LOOSE_SIZES = (0.8e-6, 1.2e-6, 1.6e-6)
"""Edges, m, of the windows in which a crystal is looked for when no beam was calibrated."""


def prepare(
    scan: RockingScan,
    modulator: Modulator,
    *,
    support: np.ndarray | None = None,
    oversampling: int = 1,
    free_fraction: float = 0.05,
    seed: int = 0,
) -> Problem:
    """Check that scan and modulator belong together, and make everything the steps need.

    Parameters
    ----------
    scan : RockingScan
    modulator : Modulator
    support : ndarray, (n_zeta, ny, nx), bool, optional
        On the grid of a result: `RockingOperator.voxel` and the object pixel, origin at ``n // 2``.
    oversampling : int
        Detector samples per pixel and axis.
    free_fraction : float
        Part of the pixels kept free.
    seed : int
        For the search of a crystal whose beam was not calibrated.

    Raises
    ------
    ValueError
        In one line, when the two cannot be reconciled.
    """
    geometry = scan.geometry.with_modulator(modulator.sample_distance)
    shape = scan.frames.shape[1:]
    pixel = (geometry.object_pixel(shape[0]), geometry.object_pixel(shape[1]))
    patch, trusted = place_modulator(
        modulator, scan, (shape[0] * oversampling, shape[1] * oversampling), pixel
    )
    targets = make_targets(scan, free_pixels(scan.frames.shape, scan.mask, free_fraction))
    flux = np.ones(len(targets)) if scan.flux is None else scan.flux / scan.flux.mean()

    def operator_on(window: Window) -> FrameOperator:
        distances = geometry.wavelength, modulator.sample_distance, geometry.propagation_distance
        return FrameOperator(patch, window, pixel, *distances, oversampling)

    if support is not None:
        window = Window((support.shape[1], support.shape[2]))
    else:
        window = find_window(operator_on, targets, modulator, np.random.default_rng(seed))
    operator = operator_on(window)
    rocking = RockingOperator(geometry, scan.angles_deg, pixel, window)
    trust = frame_trust(operator, trusted, rocking)
    if not (trust > TRUST_NONE).any():
        raise ValueError(
            "no frame's light falls on the trusted part of the modulator: calibrate a wider field"
        )
    thickness = 1.25 * thickness_from_counts(frame_counts(targets) / flux, rocking.kappa)
    if support is None:
        reach = thickness + 2 * np.abs(rocking.shear_offset).max()
        region = sheared_box(rocking, 2 * int(np.ceil(reach / rocking.voxel / 2)), thickness)
    else:
        region = np.asarray(support, bool)
    return Problem(
        operator=operator,
        rocking=rocking,
        targets=targets,
        amplitude=np.sqrt(flux).astype(np.float32),
        weight=np.clip((trust - TRUST_NONE) / (TRUST_FULL - TRUST_NONE), 0, 1).astype(np.float32),
        region=region,
        thickness=thickness,
        tighten=support is None,
    )


def needed_oversampling(scan: RockingScan) -> int:
    """2 where the walking beam, half a micrometre wide, leaves the field that the pixels allow; else 1."""
    geometry = scan.geometry
    field = geometry.wavelength * geometry.propagation_distance / geometry.pixel_size
    turn = np.deg2rad(np.abs(scan.angles_deg).max()) * geometry.modulator_distance
    walk = max(abs(turn * w) for w in geometry.walk_per_radian)
    return 2 if walk + 0.5e-6 > 0.45 * field else 1


def frame_trust(operator: FrameOperator, trusted: np.ndarray, rocking: RockingOperator) -> np.ndarray:
    """Part of each frame's light that meets the trusted map, (J,), were the crystal unstrained.

    The light of a uniform crystal that fills the middle of the window, walking over the modulator as the
    crystal rocks.
    """
    ny, nx = operator.window.shape
    disc = np.multiply.outer(np.hanning(ny + 2)[1:-1], np.hanning(nx + 2)[1:-1])
    parts = []
    for j in range(len(rocking.kappa)):
        light = np.abs(operator.to_modulator(disc * rocking.tilt(slice(j, j + 1))[0])) ** 2
        parts.append(light[trusted].sum() / light.sum())
    return np.array(parts)


def find_window(
    operator_on: Callable[[Window], FrameOperator],
    targets: np.ndarray,
    modulator: Modulator,
    rng: np.random.Generator,
) -> Window:
    """Window of the exit wave: from the calibrated beam, or by solving the brightest frame from noise.

    From noise in ever larger windows, until what is found does not reach the edge of the window: the
    crystal is cut in a window that is too small, and noise fills all of it where the phases failed.
    """
    brightest = targets[np.argmax(frame_counts(targets))]
    pixel = operator_on(Window((2, 2))).pixel
    window = Window((2, 2))
    for size in LOOSE_SIZES:
        half = [
            min(int(np.ceil(size / p / 2)), n // 4) for p, n in zip(pixel, targets.shape[1:], strict=True)
        ]
        loose = Window((2 * half[0], 2 * half[1]))
        if not modulator.probe.any():
            wave, _ = solve_from_noise(operator_on(loose), brightest, rng)
        elif size < LOOSE_SIZES[-1]:
            continue
        else:
            wave = beam_at_crystal(modulator, operator_on(loose))
        window, whole = window_around(wave, loose)
        if whole:
            break
    return window


def central_wave(
    problem: Problem, frame: int, rng: np.random.Generator, modulator: Modulator | None = None
) -> np.ndarray:
    """Exit wave of the frame the chain begins with: from the calibrated beam, or from noise."""
    target = problem.targets[frame]
    if modulator is None:
        return solve_from_noise(problem.operator, target, rng, np.any(problem.region, axis=0))[0]
    beam = beam_at_crystal(modulator, problem.operator)[None]
    start = scale_to_counts(problem.operator, beam, target[None])
    return solve_waves(problem.operator, start, target[None], 10)[0][0]


def chain(
    problem: Problem, central: np.ndarray, frame: int, step: Callable[[float], None] | None = None
) -> Solution:
    """Solve all frames from the `central` exit wave of one outward, synchronising on the way.

    Returns
    -------
    Solution
        Crystal and support at the resolution of the waves; nothing has been refined together yet.
    """
    rocking, light = problem.rocking, problem.amplitude[:, None, None]
    waves = np.zeros((len(problem.targets), *central.shape), np.complex64)
    waves[frame] = central
    total = len(waves)
    support = problem.region
    reached = [frame]
    for k, (new, before) in enumerate(walk_outward(np.argsort(rocking.kappa), frame), 1):
        extend(problem.operator, rocking, waves, problem.targets, new, before, problem.thickness)
        reached = before + new
        if k in SYNCHRONISE_AT:
            turned, image = synchronise(waves[reached] / light[reached], problem.matrix[reached], support)
            waves[reached] = turned * light[reached]
            if problem.tighten:
                support = shrink_wrap(image, problem.region, 0.12 + 0.13 * len(reached) / total)
        if step is not None:
            step(len(reached) / total)
    waves /= light
    image = waves
    for _ in range(3):
        waves, image = synchronise(waves, problem.matrix, support)
        if problem.tighten:
            support = shrink_wrap(image, problem.region, 0.25)
    return Solution(image * support, support, waves=waves)


def solve(
    problem: Problem,
    iterations: int,
    rng: np.random.Generator,
    modulator: Modulator | None = None,
    drift: Drift = "auto",
    method: Method = "chain",
    report: Progress | None = None,
) -> Solution:
    """One trial: central wave, chain, all frames together; and where it shows, the drift.

    Parameters
    ----------
    problem : Problem
    iterations : int
        Passes over all frames at the end.
    rng : Generator
    modulator : Modulator, optional
        Start from its calibrated beam rather than from noise.
    drift : {"auto", "free", "none"}
        Follow the drift of the crystal where the data ask for it, always, or never.
    method : {"chain", "paper"}
        As in `reconstruct`.
    report : callable, optional
        Given the fraction of the trial done and a line.
    """
    frame = int(np.argmax(problem.counts) if modulator is None else np.argmin(np.abs(problem.rocking.kappa)))

    def say(fraction: float, line: str) -> None:
        if report is not None:
            report(fraction, line)

    def after(_: int, state: Solution) -> None:
        done = len(state.error)
        if problem.tighten and method == "chain" and done in (iterations // 4, iterations // 2):
            state.support = shrink_wrap(state.image, problem.region, 0.2)
            state.image = state.image * state.support
        say(
            0.5 + 0.5 * min(done / iterations, 1),
            f"all frames, error {state.error[-1]:.4f}, free log-likelihood {state.free_llk[-1]:.3f}",
        )

    if method == "paper":
        free_drift = drift == "free"
        return iterate_slices(problem, random_crystal(problem, rng), iterations, after, free_drift)
    say(0.0, "central frame")
    central = central_wave(problem, frame, rng, modulator)
    solution = chain(problem, central, frame, lambda done: say(0.05 + 0.45 * done, "frame by frame"))
    pilot = min(PILOT, iterations)
    solution = refine(problem, solution, pilot, after)
    free_drift = drift == "free" or (drift == "auto" and drift_significance(problem, solution) > SIGNIFICANT)
    if free_drift:
        say(0.5 + 0.5 * pilot / iterations, "drift, from the exit waves")
        moving = refine(problem, find_drift(problem, solution), pilot)
        solution = min(solution, moving, key=lambda s: s.error[-1])
    return refine(problem, solution, iterations - pilot, after, free_drift)


def reconstruct(
    scan: RockingScan,
    modulator: Modulator,
    *,
    trials: int = 1,
    seed: int = 0,
    iterations: int = 40,
    support: np.ndarray | None = None,
    progress: Progress | None = None,
    method: Method = "chain",
    start: Start = "random",
    drift: Drift = "auto",
    oversampling: int | None = None,
    free_fraction: float = 0.05,
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
    support : ndarray, (n_zeta, ny, nx), bool, optional
        Known support on the grid of a result; else it is found.
    progress : callable, optional
        Given the fraction done and a line.
    method : {"chain", "paper"}
        Frames one by one, then together; or the published iteration from noise (no shrink-wrap; `start` does
        not apply and drift="auto" means "none"), which needs hundreds of `iterations`.
    start : {"random", "probe"}
        Begin the first frame from noise, or from the beam of the calibration.
    drift : {"auto", "free", "none"}
        Follow the drift of the crystal across the beam where the data ask for it, always, or never.
    oversampling : int, optional
        Detector samples per pixel and axis; else 2 where the beam walks out of ``lambda d2 / p``, 1 where
        it stays inside.
    free_fraction : float
        Part of the pixels kept free to judge by.

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
    if start == "probe" and not modulator.probe.any():
        raise ValueError("start='probe' needs the calibrated beam, and this modulator has none: use 'random'")
    fine = oversampling or needed_oversampling(scan)
    options = {"oversampling": fine, "free_fraction": free_fraction, "seed": seed}
    problem = prepare(scan, modulator, support=support, **options)
    solutions = []
    for trial in range(trials):

        def report(fraction: float, line: str, trial: int = trial) -> None:
            if progress is not None:
                progress((trial + fraction) / trials, f"trial {trial + 1} of {trials}: {line}")

        rng = np.random.default_rng((seed, trial))
        solutions.append(
            solve(problem, iterations, rng, modulator if start == "probe" else None, drift, method, report)
        )
    configuration = {
        "method": "bcmi" if method == "chain" else "bcmi-paper",
        "trials": trials,
        "iterations": iterations,
        "start": start,
        "drift": drift,
        **options,
        "modulator_distance": modulator.sample_distance,
        "modulator_run_uid": modulator.metadata.get("run_uid"),
        "thickness": problem.thickness,
        "support_given": support is not None,
    }
    return make_result(scan, problem, solutions, configuration)


def make_result(
    scan: RockingScan, problem: Problem, solutions: list[Solution], configuration: dict
) -> Reconstruction:
    """Rank trials by free log-likelihood and put what the best three share on a grid about the origin."""
    ranked = sorted(solutions, key=lambda s: s.free_llk[-1] if np.isfinite(s.free_llk[-1]) else s.error[-1])
    best = ranked[0]
    modes, weights = eigen_modes(align_trials([s.image for s in ranked[:3]], with_twin=False, free_axes=(0,)))
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
        metadata=dict(scan.metadata),
    )


def centre_on_axis(image: np.ndarray, window: Window) -> np.ndarray:
    """Pad an image on `window` so that the beam axis stands at ``n // 2`` of rows and columns."""
    sizes = [n + 2 * abs(c) for n, c in zip(window.shape, window.centre, strict=True)]
    padded = np.zeros((len(image), *sizes), image.dtype)
    first = [size // 2 - n // 2 + c for size, n, c in zip(sizes, window.shape, window.centre, strict=True)]
    (row, column), (ny, nx) = first, window.shape
    padded[:, row : row + ny, column : column + nx] = image
    return padded
