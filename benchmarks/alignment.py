"""How well `align_modulator` does: from 1.5 deg off in both tilts, seed by seed, on the twin's frames.

    python benchmarks/alignment.py [--seeds 20] [--first 0]

Each seed has its own modulator pattern, squareness (0.1 deg), pivot (50 um each way) and noise; counts
are those of the preset (2e6 a second in the whole pattern). Plans run in this process, message by message,
so the figures are exact and take about 25 s of one processor per seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "plans"))

from on_twin import TwinBench, tilted_preset

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.plans import PoorFit, align_modulator, insert_modulator

OFF_DEG = 1.5
PROMISED_DEG = 0.2


def align(seed: int, beamline, preset) -> dict:
    """One alignment; errors and stated uncertainties in degrees."""
    signs = np.random.default_rng(seed).choice([-1, 1], 2)
    truth = dict(zip(("mchi", "mphi"), (OFF_DEG * signs).tolist(), strict=True))
    hidden = tilted_preset(preset, truth["mchi"], truth["mphi"], seed)
    rocking = f"diffractometer_{beamline.rocking_circle}"
    peak = beamline.reflection.rocking_nominal_deg + hidden.sim.hidden.bragg_offset_deg
    bench = TwinBench(beamline, hidden, {rocking: peak})
    plan = preset.plan
    bench.run(insert_modulator(bench.devices, plan.modulator_z_um))
    start, began = dict(bench.at), time.process_time()
    try:
        found = bench.run(
            align_modulator(
                bench.devices,
                half_range_deg=plan.align_half_range_deg,
                points=plan.align_points,
                positions=plan.align_positions,
                exposure_s=plan.align_exposure_s,
                window=plan.window,
            )
        )
    except PoorFit as error:
        stayed = all(np.allclose(bench.at[k], v, atol=1e-6) for k, v in start.items() if "nano" in k)
        return {"seed": seed, "refused": str(error), "stayed": stayed}
    numbers = {"seed": seed, "frames": bench.frames, "cpu_s": round(time.process_time() - began, 1)}
    for tilt, true in truth.items():
        error, stated = getattr(found, f"{tilt}_deg") - true, getattr(found, f"{tilt}_error_deg")
        sharp = found.curves[tilt].fit
        numbers |= {
            f"{tilt}_miss": round(error, 4),
            f"{tilt}_stated": round(stated, 4),
            f"{tilt}_sharpness_pull": round((sharp.angle_deg - true) / sharp.angle_error_deg, 2),
        }
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--beamline", default="sim-id01")
    parser.add_argument("--preset", default="small")
    options = parser.parse_args()
    beamline, preset = load_beamline(options.beamline), load_preset(options.preset)
    found = []
    for seed in range(options.first, options.first + options.seeds):
        found.append(align(seed, beamline, preset))
        print(json.dumps(found[-1]), flush=True)
    summarise(found)


def summarise(found: list[dict]) -> None:
    """Promise kept, and whether the stated uncertainties are honest."""
    done = [one for one in found if "refused" not in one]
    tilts = ("mchi", "mphi")
    good = sum(all(abs(one[f"{tilt}_miss"]) <= PROMISED_DEG for tilt in tilts) for one in done)
    pulls = np.array([one[f"{tilt}_miss"] / one[f"{tilt}_stated"] for one in done for tilt in tilts])
    misses = np.array([one[f"{tilt}_miss"] for one in done for tilt in tilts])
    sharp = np.array([one[f"{tilt}_sharpness_pull"] for one in done for tilt in tilts])
    print(f"{good} of {len(found)} within {PROMISED_DEG} deg in both tilts, {len(found) - len(done)} refused")
    print(f"misses: rms {np.sqrt(np.mean(misses**2)):.3f} deg, largest {np.abs(misses).max():.3f} deg")
    alone = np.sqrt(np.mean(sharp**2))
    print(f"pulls: rms {np.sqrt(np.mean(pulls**2)):.2f}; of the sharpness alone {alone:.2f}")


if __name__ == "__main__":
    main()
