"""BCMI on simulated crystals: correlation with the truth, class and processor time of single trials.

    python benchmarks/bcmi.py paper-hs --crystals 11 22 --seeds 0 1

The modulator and its distance are the true ones, as a stand-in for a calibration of a wide field. Prints one
JSON object per trial.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from bcmi_beamline.config import Preset, load_beamline, load_preset
from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan
from bcmi_beamline.sim import Twin, simulate_rocking

FIELD = 900
"""Pixels along an edge of the modulator's map: 20 um."""


def with_crystal(preset: Preset, seed: int) -> Preset:
    """The preset with another crystal and other noise; its own where `seed` is its own."""
    if seed == preset.sim.crystal.seed:
        return preset
    crystal = preset.sim.crystal.model_copy(update={"seed": seed})
    nuisances = preset.sim.nuisances.model_copy(update={"seed": seed + 100})
    sim = preset.sim.model_copy(update={"crystal": crystal, "nuisances": nuisances})
    return preset.model_copy(update={"sim": sim})


def measure(preset: Preset) -> tuple[RockingScan, Modulator, Reconstruction]:
    twin = Twin(load_beamline(), preset)
    scan = simulate_rocking(twin.beamline, preset, twin=twin)
    frames = np.where(scan.mask, 0, scan.frames).astype(np.float32)
    d1 = twin.truth_distance()
    pixel = scan.geometry.with_modulator(d1).object_pixel(preset.plan.window)
    modulator = Modulator(
        twin.truth_modulator(pixel, (FIELD, FIELD)),
        pixel,
        d1,
        1e-6,
        scan.modulator_position,
        np.zeros((1, 8, 8), np.complex64),
    )
    rocking = RockingScan(
        frames,
        np.asarray(scan.angles_deg),
        scan.mask,
        scan.geometry,
        scan.flux,
        scan.modulator_position,
        scan.count_cutoff,
    )
    image, voxel = twin.truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    return rocking, modulator, Reconstruction(image, support, voxel, twin.geometry, (0.0, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="paper-ls")
    parser.add_argument("--crystals", type=int, nargs="+", default=[11])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for crystal in arguments.crystals:
        scan, modulator, truth = measure(with_crystal(load_preset(arguments.preset), crystal))
        for seed in arguments.seeds:
            wall, cpu = time.perf_counter(), time.process_time()
            result = modulation.reconstruct(scan, modulator, seed=seed)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found = compare(result, truth)
            row = {"preset": arguments.preset, "crystal": crystal, "seed": seed, "class": found.verdict}
            row |= {"correlation": round(found.correlation, 4), "strain_error": found.strain_error}
            row |= {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "drift": result.drift is not None}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
