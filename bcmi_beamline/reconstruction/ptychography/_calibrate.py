"""Calibration of a modulator by far-field ptychography in the Bragg beam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography._engine import Engine
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


@dataclass
class Settings:
    """How `calibrate` spends its iterations.

    Parameters
    ----------
    whole_pixels : float
        First share of the iterations, with windows on whole pixels: half the transforms.
    positions_from : float
        Share after which positions are refined.
    batch : int
        Frames per update.
    free_fraction : float
        Of the pixels kept from the fit to judge it.
    """

    whole_pixels: float = 0.15
    positions_from: float = 0.2
    batch: int = 8
    free_fraction: float = 0.05


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
        `mode_powers`, `position_correction_rms_m` and the configuration. `sample_distance_error` is a standard
        uncertainty, nan where no distance was sought.

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
    settings = Settings()
    mean = check_scan(scan)
    rng = np.random.default_rng(seed)
    grid = Grid.around(scan)
    engine = Engine(
        frames=scan.frames,
        states=pixel_states(scan.mask, settings.free_fraction, seed),
        offsets=grid.offsets(scan.positions),
        probe=first_probe(scan, mean, modes, rng),
        image=np.ones(grid.shape, np.complex64),
        flux=np.ones(len(scan.frames)) if scan.flux is None else scan.flux / scan.flux.mean(),
        rng=rng,
        batch=settings.batch,
    )
    scores = _iterate(engine, grid, iterations, refine_positions, settings, progress)
    return _finish(scan, grid, engine, scores, iterations, modes, refine_positions, seed)


def _iterate(engine, grid, iterations, refine_positions, settings, progress):
    """Run the passes; return their scores."""
    scores = []
    for i in range(iterations):
        engine.subpixel = i >= settings.whole_pixels * iterations
        moving = refine_positions and i >= settings.positions_from * iterations
        score = engine.sweep(update_probe=i > 0, positions=moving)
        if moving:
            engine.move(grid.limit)
        scores.append(score)
        if progress is not None:
            progress(
                (i + 1) / iterations,
                f"iteration {i + 1} of {iterations}: R2 {score.r2:.5f}, free LLK {score.free_llk:.3f}",
            )
    engine.orthogonalise()
    return scores


def _finish(scan, grid, engine, scores, iterations, modes, refine_positions, seed) -> Modulator:
    illumination = engine.illumination()
    trusted = illumination > TRUSTED_ILLUMINATION * np.percentile(illumination[illumination > 0], 95)
    image, probe = engine.image, engine.probe
    quality = {}
    if scan.sample_distance > 0:
        ramp, flat, levels = flatten(image, trusted)
        # the constant: whatever takes the object to its flat form must be given back to the probe
        gain = np.vdot(flat[trusted], (image * phase_ramp(image.shape, -ramp))[trusted])
        gain /= np.vdot(flat[trusted], flat[trusted])
        image, probe = flat, probe * phase_ramp(probe.shape[1:], ramp) * gain
    else:
        level = np.median(np.abs(image[trusted])) * np.exp(1j * np.angle(image[trusted].sum()))
        image, probe = image / level, probe * level
        levels = find_levels(image[trusted])
    quality |= {
        "phase_step_rad": levels.phase_step,
        "transmission_modulus": levels.modulus,
        "two_valuedness": levels.two_valuedness,
    }
    centre, distance, error = grid.centre, 0.0, float("nan")
    if scan.sample_distance > 0:
        args = (scan.object_pixel, scan.wavelength)
        distance = focus(probe[0], *args, scan.sample_distance)
        error = abs(distance - focus(probe[0], *args, scan.sample_distance, power=0.5))
        row, column = centre_of_mass(propagate(probe, *args, -distance))
        probe = shift_wave(probe, np.array([-row, -column]))
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
            **quality,
            "mode_powers": (powers / powers.sum()).tolist(),
            "position_correction_rms_m": float(np.sqrt(((positions - scan.positions) ** 2).mean())),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_uid": scan.metadata.get("run_uid", scan.metadata.get("uid", "")),
            "configuration": {
                "method": "ptychography",
                "iterations": iterations,
                "modes": modes,
                "refine_positions": refine_positions,
                "seed": seed,
            },
        },
    )
