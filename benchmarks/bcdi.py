"""BCDI: seconds per iteration beside cohere, and how often simulated crystals come out right.

    python benchmarks/bcdi.py --speed [--cohere PYTHON]
    python benchmarks/bcdi.py --success paper-ls [--trials 20] [--known-support] [--cohere PYTHON]
    python benchmarks/bcdi.py --success paper-ls --generations 4 --trials 6 --repeat 5

PYTHON is the interpreter of an environment with cohere-core (and torch, for its second library). Prints JSON,
one object a line. On a busy machine only processor seconds mean anything.

--success takes a preset of the simulator with its nuisances, the modulator out, as `bcmi reconstruct` takes
it: pixels are summed until the crystal fills a quarter of the field. Each trial starts from its own noise. It
is correct or conjugated where its correlation with the truth or with the truth's twin exceeds 0.9. A known
support is the truth's, one voxel larger: a measured one is no better. cohere gets the same summed pattern,
masked pixels bridged, and as many iterations of HIO and ER (4 to 1), its own shrink-wrap and twin removal.
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
from scipy import fft, ndimage

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.reconstruction.alignment import resample_support, twin
from bcmi_beamline.reconstruction.conventional import Pattern, Recipe, prepare, reconstruct
from bcmi_beamline.reconstruction.conventional._engine import Engine
from bcmi_beamline.reconstruction.conventional._prepare import fill_gaps
from bcmi_beamline.reconstruction.conventional._updates import pack
from bcmi_beamline.reconstruction.metrics import compare
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
        for algorithm in ("er", "hio", "raar"):
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
def measure(name: str) -> tuple[RockingScan, Reconstruction]:
    """A rocking scan of a preset with the modulator out, and the crystal."""
    preset = load_preset(name)
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
    return rocking, Reconstruction(image, support, voxel, world.geometry, (0.0, 0.0))


def larger(truth: Reconstruction, pattern: Pattern) -> np.ndarray:
    nz, ny, nx = pattern.counts.shape
    support = resample_support(truth, pattern.voxel_size, (nz, ny, nx), pattern.geometry.shear)
    return np.asarray(ndimage.binary_dilation(support), bool)


def success(arguments: argparse.Namespace) -> None:
    scan, truth = measure(arguments.success)
    pattern = prepare(scan, arguments.binning)
    known = larger(truth, pattern) if arguments.known_support else None
    head = {
        "preset": arguments.success,
        "grid": list(pattern.counts.shape),
        "binning": pattern.binning,
        "support": "known" if arguments.known_support else "shrink-wrap",
        "iterations": arguments.iterations,
    }
    recipe = Recipe(generations=arguments.generations)
    guided = arguments.generations > 1
    results = []
    for seed in range(arguments.repeat if guided else arguments.trials):
        cpu = time.process_time()
        result = reconstruct(
            scan,
            trials=arguments.trials if guided else 1,
            seed=seed,
            iterations=arguments.iterations,
            support=known,
            recipe=recipe,
            binning=arguments.binning,
            combine=1,
        )
        cpu = time.process_time() - cpu
        found = compare(result, truth)
        results.append((found.verdict, max(found.correlation, found.correlation_twin)))
        row = {"seed": seed, "class": found.verdict, "correlation": round(results[-1][1], 3)}
        llk = min(result.metadata["trial_free_llk"])
        print(json.dumps(row | {"free_llk": round(llk, 3), "cpu_s": round(cpu, 1)}), flush=True)
    name = f"guided, {arguments.generations} generations of {arguments.trials}" if guided else "single trials"
    summarise(head | {"who": name}, results)
    if arguments.cohere is not None:
        summarise(
            head | {"who": "cohere np", "support": "shrink-wrap"}, with_cohere(arguments, pattern, truth)
        )


def with_cohere(
    arguments: argparse.Namespace, pattern: Pattern, truth: Reconstruction
) -> list[tuple[str, float]]:
    results = []
    last = arguments.iterations // 5
    with tempfile.TemporaryDirectory() as folder:
        data, image = Path(folder) / "amplitudes.npy", Path(folder) / "image.npy"
        np.save(data, np.sqrt(np.maximum(fill_gaps(pattern.counts, pattern.mask), 0)).astype(np.float32))
        for seed in range(arguments.trials):
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
            found = compare(result, truth)
            results.append((found.verdict, max(found.correlation, found.correlation_twin)))
            row = {"seed": seed, "class": found.verdict, "correlation": round(results[-1][1], 3)}
            print(json.dumps(row | {"who": "cohere", "cpu_s": round(told["cpu_s"], 1)}), flush=True)
    return results


def summarise(head: dict, results: list[tuple[str, float]]) -> None:
    found = Counter(verdict for verdict, _ in results)
    classes = {name: found[name] for name in ("correct", "conjugated", "incorrect")}
    median = round(float(np.median([c for _, c in results])), 3)
    print(json.dumps(head | {"trials": len(results)} | classes | {"median_correlation": median}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--success", metavar="PRESET")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--binning", type=int)
    parser.add_argument("--known-support", action="store_true")
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
