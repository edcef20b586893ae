"""BCDI: seconds per iteration beside cohere, and how often simulated crystals come out right.

    python benchmarks/bcdi.py --speed [--cohere PYTHON]
    python benchmarks/bcdi.py --success paper-ls --crystals 11 22 [--known-support] [--cohere PYTHON]
    python benchmarks/bcdi.py --success paper-ls --strain 0.25 [--coherence]
    python benchmarks/bcdi.py --success paper-ls --generations 4 --trials 6 --repeat 5

PYTHON is the interpreter of an environment with cohere-core (and torch, for its second library). Prints JSON,
one object a line. On a busy machine only processor seconds mean anything.

--success takes a preset of the simulator with its nuisances, the modulator out, as `bcmi reconstruct` takes
it: pixels are summed until the crystal fills a third of the field. Each trial starts from its own noise. It
is correct or conjugated where its correlation with the truth or with the truth's twin exceeds 0.9. What a
user gets, the first mode of the three best by free log-likelihood, is told beside the rates. --crystals are
other crystals of the preset, grown from other seeds, with other noise; --strain scales the displacement. A
known support is the truth's, one voxel larger: a measured one is no better. cohere gets the same summed
pattern, masked pixels bridged, and as many iterations of HIO and ER (4 to 1), its own shrink-wrap and twin
removal; its best is chosen by its own error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from bcmi import with_crystal
from scipy import fft, ndimage

from bcmi_beamline.config import Preset, load_beamline, load_preset
from bcmi_beamline.reconstruction.alignment import resample_support, twin
from bcmi_beamline.reconstruction.conventional import Pattern, Recipe, prepare, reconstruct
from bcmi_beamline.reconstruction.conventional._engine import Engine
from bcmi_beamline.reconstruction.conventional._guided import score
from bcmi_beamline.reconstruction.conventional._prepare import bridge
from bcmi_beamline.reconstruction.conventional._reconstruct import Task
from bcmi_beamline.reconstruction.conventional._updates import pack
from bcmi_beamline.reconstruction.metrics import Comparison, compare
from bcmi_beamline.scans import Reconstruction, RockingScan
from bcmi_beamline.sim import Twin, simulate_rocking

SHAPE = 128, 256, 256
COHERE = Path(__file__).with_name("bcdi_cohere.py")


# -- speed -----------------------------------------------------------------------------------------------
def speed(cohere: str | None, repeats: int = 6) -> None:
    """Best of some iterations at 128 x 256^2; the object fills a third of every axis."""
    rng = np.random.default_rng(0)
    support = np.zeros(SHAPE, bool)
    support[tuple(slice(n // 3) for n in SHAPE)] = True
    rho = np.where(support, rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE), 0).astype(np.complex64)
    counts = rng.poisson(np.abs(fft.fftn(rho, norm="ortho")) ** 2).astype(np.float32)
    nowhere = np.zeros(SHAPE, bool)
    pair = lambda: fft.ifftn(fft.fftn(rho, workers=2), workers=2)  # noqa: E731
    tell("two transforms alone, scipy", "-", *best_of(pair, repeats))
    for name, pixels in (("this", False), ("this, area of the pixels allowed for", True)):
        engine = Engine(pack(counts, nowhere, nowhere), rho, support, pixels=pixels)
        for algorithm in ("er",) if pixels else ("er", "hio", "raar"):
            tell(name, algorithm, *best_of(partial(engine.step, algorithm, 0.9), repeats))
        engine.close()
    if cohere is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "amplitudes.npy"
        np.save(data, np.fft.fftshift(np.sqrt(counts)))
        for library in ("np", "torch"):
            for algorithm in ("ER", "HIO", "RAAR"):
                found = run_cohere(cohere, data, library, f"{repeats}*{algorithm}")
                if found is None:
                    tell(f"cohere {library}: not installed", algorithm, None, None)
                    break
                tell(f"cohere {library}", algorithm, found["wall_s"] / repeats, found["cpu_s"] / repeats)


def best_of(work, repeats: int) -> tuple[float, float]:
    """Shortest wall and processor time of one call, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(w for w, _ in times), min(c for _, c in times)


def tell(who: str, algorithm: str, wall: float | None, cpu: float | None) -> None:
    row = {"who": who, "algorithm": algorithm}
    print(json.dumps(row | {k: v and round(v, 3) for k, v in (("wall_s", wall), ("cpu_s", cpu))}), flush=True)


def run_cohere(python: str, data: Path, library: str, sequence: str, image: str = "-") -> dict | None:
    command = [python, str(COHERE), str(data), library, sequence, image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


# -- success ---------------------------------------------------------------------------------------------
def preset_of(name: str, crystal: int | None, strain: float) -> Preset:
    """A preset, with another crystal and with its displacement scaled."""
    preset = load_preset(name)
    preset = preset if crystal is None else with_crystal(preset, crystal)
    grown = preset.sim.crystal.model_copy(update={"strain": strain * preset.sim.crystal.strain})
    return preset.model_copy(update={"sim": preset.sim.model_copy(update={"crystal": grown})})


def measure(preset: Preset) -> tuple[RockingScan, Reconstruction, float]:
    """A rocking scan with the modulator out, the crystal, and the span of its phase, rad (98 % of it)."""
    world = Twin(load_beamline(), preset)
    scan = simulate_rocking(world.beamline, preset, modulator_in=False, twin=world)
    rocking = RockingScan(
        np.where(scan.mask, 0, scan.frames).astype(np.float32),
        np.asarray(scan.angles_deg),
        scan.mask,
        scan.geometry,
        scan.flux,
        count_cutoff=scan.count_cutoff,
    )
    image, voxel = world.truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    phase = world.crystal.q_norm * world.crystal.displacement[world.crystal.interior()]
    span = float(np.ptp(np.percentile(phase, [1, 99])))
    return rocking, Reconstruction(image, support, voxel, world.geometry, (0.0, 0.0)), span


def larger(truth: Reconstruction, pattern: Pattern) -> np.ndarray:
    nz, ny, nx = pattern.counts.shape
    support = resample_support(truth, pattern.voxel_size, (nz, ny, nx), pattern.geometry.shear)
    return np.asarray(ndimage.binary_dilation(support), bool)


def success(arguments: argparse.Namespace) -> None:
    for crystal in arguments.crystals or [None]:
        preset = preset_of(arguments.success, crystal, arguments.strain)
        scan, truth, span = measure(preset)
        pattern = prepare(scan, arguments.binning)
        head = {
            "preset": arguments.success,
            "crystal": preset.sim.crystal.seed,
            "strain": arguments.strain,
            "phase_span_rad": round(span, 1),
            "grid": list(pattern.counts.shape),
            "binning": pattern.binning,
            "support": "known" if arguments.known_support else "shrink-wrap",
            "iterations": arguments.iterations,
        }
        known = larger(truth, pattern) if arguments.known_support else None
        recipe = Recipe(generations=arguments.generations, partial_coherence=arguments.coherence)
        if arguments.generations > 1:
            guided(arguments, scan, truth, known, recipe, head)
        else:
            task = Task.of(
                scan, known, recipe, seed=0, iterations=arguments.iterations, binning=arguments.binning
            )
            single(task, arguments.trials, truth, head)
        if arguments.cohere is not None:
            with_cohere(arguments, pattern, truth, head)


def single(task: Task, trials: int, truth: Reconstruction, head: dict) -> None:
    """Trials one by one, and what they make together."""
    done, found, job = [], [], task.job()
    for number in range(trials):
        cpu = time.process_time()
        done.append(job(number, lambda *_: None))
        cpu = time.process_time() - cpu
        llk = {"free_llk": round(score(done[-1], "free_llk"), 3)}
        found.append(judged(compare(task.combine(done[-1:], 1), truth), number, cpu, llk))
    together = compare(task.combine(done, 3), truth)
    summarise(head | {"who": "single trials"}, found, together)


def guided(
    arguments: argparse.Namespace,
    scan: RockingScan,
    truth: Reconstruction,
    known: np.ndarray | None,
    recipe: Recipe,
    head: dict,
) -> None:
    found = []
    for seed in range(arguments.repeat):
        cpu = time.process_time()
        result = reconstruct(
            scan,
            trials=arguments.trials,
            seed=seed,
            iterations=arguments.iterations,
            support=known,
            recipe=recipe,
            binning=arguments.binning,
            combine=1,
        )
        cpu = time.process_time() - cpu
        llk = {"free_llk": round(min(result.metadata["trial_free_llk"]), 3)}
        found.append(judged(compare(result, truth), seed, cpu, llk))
    summarise(head | {"who": f"guided, {arguments.generations} generations of {arguments.trials}"}, found)


def judged(found: Comparison, number: int, cpu: float, more: dict) -> Comparison:
    """Tell of one result what it is worth."""
    row = {"trial": number, "class": found.verdict, "correlation": round(rightness(found), 3), **more}
    print(json.dumps(row | {"cpu_s": round(cpu, 1)}), flush=True)
    return found


def rightness(found: Comparison) -> float:
    return max(found.correlation, found.correlation_twin)


def with_cohere(arguments: argparse.Namespace, pattern: Pattern, truth: Reconstruction, head: dict) -> None:
    found, errors, last = [], [], arguments.iterations // 5
    with tempfile.TemporaryDirectory() as folder:
        data, image = Path(folder) / "amplitudes.npy", Path(folder) / "image.npy"
        np.save(data, np.sqrt(bridge(pattern)).astype(np.float32))
        for number in range(arguments.trials):
            sequence = f"{arguments.iterations - last}*HIO+{last}*ER"
            told = run_cohere(arguments.cohere, data, "np", sequence, str(image))
            if told is None:
                raise SystemExit(f"{arguments.cohere} cannot run cohere; pip install cohere-core there")
            object_, support = np.load(image)
            # it takes the inverse transform to the detector: its object is mirrored
            result = Reconstruction(
                np.conj(twin(object_)).astype(np.complex64),
                np.real(twin(support)) > 0.5,
                pattern.voxel_size,
                pattern.geometry,
                pattern.geometry.shear,
            )
            errors.append(told["error"])
            more = {"who": "cohere", "error": round(told["error"], 4)}
            found.append(judged(compare(result, truth), number, told["cpu_s"], more))
    best = found[int(np.argmin(errors))]
    summarise(head | {"who": "cohere np", "support": "shrink-wrap"}, found, best)


def summarise(head: dict, found: list[Comparison], best: Comparison | None = None) -> None:
    """Counts of the classes, and what a user gets: `best`, of all trials."""
    verdicts = Counter(f.verdict for f in found)
    row = head | {"trials": len(found)}
    row |= {name: verdicts[name] for name in ("correct", "conjugated", "incorrect")}
    row["median_correlation"] = round(float(np.median([rightness(f) for f in found])), 3)
    if best is not None:
        row["best"] = {"class": best.verdict, "correlation": round(rightness(best), 3)}
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--success", metavar="PRESET")
    parser.add_argument("--crystals", type=int, nargs="+", help="seeds; the preset's own without")
    parser.add_argument("--strain", type=float, default=1.0, help="factor on the displacement")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--binning", type=int)
    parser.add_argument("--known-support", action="store_true")
    parser.add_argument("--coherence", action="store_true", help="fit how coherent the light was")
    parser.add_argument("--generations", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="guided searches")
    parser.add_argument("--cohere", metavar="PYTHON")
    arguments = parser.parse_args()
    if not arguments.speed and not arguments.success:
        parser.error("choose --speed or --success PRESET")
    if arguments.speed:
        speed(arguments.cohere)
    if arguments.success:
        success(arguments)


if __name__ == "__main__":
    main()
