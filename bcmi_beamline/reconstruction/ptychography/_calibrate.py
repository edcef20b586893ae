"""Calibration of a modulator by far-field ptychography in the Bragg beam."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography._engine import Engine, Score
from bcmi_beamline.reconstruction.ptychography._finish import (
    centre_of_mass,
    find_levels,
    flatten,
    focus,
    phase_ramp,
    shift_wave,
)
from bcmi_beamline.reconstruction.ptychography._start import Grid, check_scan, first_probe, pixel_states
from bcmi_beamline.scans import Modulator, PtychographyScan

Progress = Callable[[float, str], None]

TRUSTED_ILLUMINATION = 0.1
"""A pixel is trusted that got this share of the light of a well-lit one (the 95th percentile)."""


SWEEPS = 0.7
"""Share of the iterations spent on random batches, before the accelerated finish on all frames."""
MOMENTUM, MOMENTUM_FROM = 0.7, 3
"""Of the sweeps but the last, once the first few have found the way."""
POSITIONS_FROM = 0.2
"""Share of the iterations after which positions are refined."""
BATCH = 8
FREE_FRACTION = 0.05


def calibrate(
    scan: PtychographyScan,
    *,
    iterations: int = 60,
    modes: int = 1,
    refine_positions: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Modulator:
    """Reconstruct the modulator and the Bragg beam on it from a ptychographic scan, and nothing else.

    Parameters
    ----------
    scan : PtychographyScan
        With `sample_distance` 0 any far-field ptychography: no distance is then sought and nothing
        is assumed about the object's levels.
    iterations : int
        Passes over all frames.
    modes : int, 1 to 8
        Mutually incoherent probe modes.
    refine_positions : bool
    seed : int
        Fixes the order of frames and the free pixels: same seed, same result on the same machine.
    progress : callable, optional
        Called as ``progress(fraction, message)`` after every iteration.

    Returns
    -------
    Modulator
        ``frames[j] = sum over modes |FFT2(probe(r) transmission(r - X_j))|**2`` in counts with a unitary
        transform. Bare membrane 1; the wave at the crystal has its centre of mass on the beam axis.
        `metadata` holds `phase_step_rad`, `transmission_modulus` and `two_valuedness` of the modulator,
        `mode_powers`, `position_correction_rms_m` and the configuration. `sample_distance_error` is a
        standard uncertainty; where no distance was sought `sample_distance` is 0 and its error nan.

    Raises
    ------
    ValueError
        In one line, when the scan cannot be reconstructed (`check_scan`) or a parameter is out of range.

    References
    ----------
    A. Maiden, D. Johnson, P. Li, Optica 4, 736 (2017): rPIE.
    P. Thibault, A. Menzel, Nature 494, 68 (2013): mixed modes.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, not {iterations}")
    if not 1 <= modes <= 8:
        raise ValueError(f"modes must be 1 to 8, not {modes}")
    mean = check_scan(scan)
    rng = np.random.default_rng(seed)
    grid = Grid.around(scan)
    engine = Engine(
        frames=scan.frames,
        states=pixel_states(scan.mask, FREE_FRACTION, seed),
        offsets=grid.offsets(scan.positions),
        probe=first_probe(scan, mean, modes, rng),
        image=np.ones(grid.shape, np.complex64),
        flux=np.ones(len(scan.frames)) if scan.flux is None else scan.flux / scan.flux.mean(),
        rng=rng,
        batch=BATCH,
    )
    scores = _iterate(engine, grid, iterations, refine_positions, progress)
    configuration = {
        "method": "ptychography",
        "iterations": iterations,
        "modes": modes,
        "refine_positions": refine_positions,
        "seed": seed,
        "batch": BATCH,
        "free_fraction": FREE_FRACTION,
    }
    return _finish(scan, grid, engine, scores, configuration)


def _iterate(
    engine: Engine, grid: Grid, iterations: int, refine_positions: bool, progress: Progress | None
) -> list[Score]:
    """Run the passes; return their scores."""
    scores = []
    sweeps = round(SWEEPS * iterations)
    for i in range(iterations):
        moving = refine_positions and i >= POSITIONS_FROM * iterations
        sweeping = i < sweeps
        if sweeping:
            momentum = MOMENTUM if MOMENTUM_FROM <= i < sweeps - 1 else 0.0
            score = engine.sweep(momentum=momentum, locate=moving)
        else:
            score = engine.descend(locate=moving)
        if moving:
            engine.move(grid.limit, gain=1.5 if sweeping else 1.0)
        scores.append(score)
        if progress is not None:
            progress(
                (i + 1) / iterations,
                f"iteration {i + 1} of {iterations}: R2 {score.r2:.5f}, free LLK {score.free_llk:.3f}",
            )
    engine.orthogonalise()
    return scores


def _finish(
    scan: PtychographyScan, grid: Grid, engine: Engine, scores: list[Score], configuration
) -> Modulator:
    """Remove the ambiguities, find the distance, and put everything in its container."""
    illumination = engine.illumination()
    trusted = illumination > TRUSTED_ILLUMINATION * np.percentile(illumination[illumination > 0], 95)
    bragg = scan.sample_distance > 0
    if bragg:
        ramp, scale, levels = flatten(engine.image, trusted)
    else:
        inside = engine.image[trusted]
        ramp, scale = np.zeros(2), np.median(np.abs(inside)) * np.exp(1j * np.angle(inside.sum()))
        levels = find_levels(inside / scale)
    image = engine.image * phase_ramp(engine.image.shape, -ramp) / scale
    probe = engine.probe * phase_ramp(engine.probe.shape[1:], ramp) * scale
    centre, distance, error = grid.centre, 0.0, float("nan")
    if bragg:
        distance, error = _distance(scan, engine, probe[0], ramp)
        row, column = centre_of_mass(propagate(probe, scan.object_pixel, scan.wavelength, -distance))
        probe = shift_wave(probe, (-row, -column))
        centre = (centre[0] + column * grid.pixel[1], centre[1] - row * grid.pixel[0])
    positions = grid.positions(engine.offsets)
    powers = (np.abs(probe) ** 2).sum(axis=(1, 2), dtype=float)
    return Modulator(
        transmission=image.astype(np.complex64),
        pixel_size=grid.pixel[1],
        sample_distance=distance,
        sample_distance_error=error,
        centre=centre,
        probe=probe.astype(np.complex64),
        trusted=trusted,
        positions=positions,
        positions_start=scan.positions.copy(),
        r2=np.array([s.r2 for s in scores]),
        free_llk=np.array([s.free_llk for s in scores]),
        metadata={
            "phase_step_rad": levels.phase_step,
            "transmission_modulus": levels.modulus,
            "two_valuedness": levels.two_valuedness,
            "mode_powers": (powers / powers.sum()).tolist(),
            "position_correction_rms_m": float(np.sqrt(((positions - scan.positions) ** 2).mean())),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_uid": str(scan.metadata.get("run_uid", "")),
            "configuration": configuration,
        },
    )


def _distance(
    scan: PtychographyScan, engine: Engine, probe: np.ndarray, ramp: np.ndarray
) -> tuple[float, float]:
    """d1 and its standard uncertainty, m.

    The uncertainty joins the scatter between quarters of the scan with the disagreement of two measures of
    compactness: the first is noise, the second shows a crystal whose edges are not sharp.
    """
    args = (scan.object_pixel, scan.wavelength)
    distance = focus(probe, *args, scan.sample_distance)
    measure = focus(probe, *args, distance, power=1.0) - distance
    back = phase_ramp(probe.shape, ramp)
    parts = np.array_split(np.random.default_rng(0).permutation(len(scan.frames)), 4)
    scatter = np.std([focus(engine.probe_from(p)[0] * back, *args, distance) for p in parts], ddof=1) / 2
    return distance, float(np.hypot(measure / 2, scatter))
