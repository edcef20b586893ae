"""BCMI on simulated crystals: correlation with the truth, class, drift and time of single trials.

    python benchmarks/bcmi.py paper-hs --crystals 11 22 --seeds 10
    python benchmarks/bcmi.py paper-hs --crystals 11 22 --drift 4 --jump 30 --sentinels 20
    python benchmarks/bcmi.py paper-ls --modulator modulator.cxi --seeds 100
    python benchmarks/bcmi.py paper-ls --modulator modulator.cxi --start probe --iterations 2 10
    python benchmarks/bcmi.py paper-hs --scale 1.002 --refine-scale
    python benchmarks/bcmi.py paper-hs --distance 10 --refine-distance
    python benchmarks/bcmi.py paper-ls --nuisance angle_jitter_deg=0.001
    python benchmarks/bcmi.py paper-ls --nuisance coherence_modes=5 'coherence_length_um=[0.35,6]' --coherence
    python benchmarks/bcmi.py paper-ls --method paper --iterations 300
    python benchmarks/bcmi.py paper-ls --stages

Without `--modulator` the map, its distance and the beam are the true ones. Prints one JSON object per trial;
each starts from noise of its own, or from the beam (`--start probe`). Times are those of a trial; making
ready, once per crystal, is told apart (`ready_s`: elapsed and processor time; the beam is looked for in it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bcmi_beamline.config import Nuisances, Preset, load_beamline, load_preset
from bcmi_beamline.data import read_modulator
from bcmi_beamline.reconstruction.fourier import fft2, ifft2
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.reconstruction.modulation import driver
from bcmi_beamline.reconstruction.modulation.distance import refocused
from bcmi_beamline.reconstruction.modulation.prepare import prepare
from bcmi_beamline.reconstruction.modulation.refine import Problem, Solution
from bcmi_beamline.reconstruction.modulation.scale import rescale, scaled
from bcmi_beamline.reconstruction.threads import each, one_thread_per_product
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan
from bcmi_beamline.sim import Twin, simulate_rocking
from bcmi_beamline.sim.simulate import OVERHEAD_S

FIELD = 900
"""Pixels along an edge of the modulator's map: 20 um."""

PILOT_SEED = 99
"""Of the trials that scale or distance of the map, or the coherence of the light, is found from."""


def with_nuisances(preset: Preset, changes: list[str]) -> Preset:
    """The preset with nuisances changed, each change ``name=value`` with a JSON value."""
    told = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
    nuisances = Nuisances.model_validate(preset.sim.nuisances.model_dump() | told)
    return preset.model_copy(update={"sim": preset.sim.model_copy(update={"nuisances": nuisances})})


def with_crystal(preset: Preset, seed: int) -> Preset:
    """The preset with another crystal and other noise; its own where `seed` is its own."""
    if seed == preset.sim.crystal.seed:
        return preset
    crystal = preset.sim.crystal.model_copy(update={"seed": seed})
    nuisances = preset.sim.nuisances.model_copy(update={"seed": seed + 100})
    sim = preset.sim.model_copy(update={"crystal": crystal, "nuisances": nuisances})
    return preset.model_copy(update={"sim": sim})


def walk_off(twin: Twin, step_nm: float, jump_nm: float, frames: int, frame_s: float, seed: int) -> None:
    """Let the crystal walk by `step_nm` (rms along x' and y') a frame, and jump once in the middle half."""
    rng = np.random.default_rng([77, seed])
    steps = rng.normal(scale=step_nm * 1e-9, size=(frames, 2))
    angle = rng.uniform(0, 2 * np.pi)
    steps[rng.integers(frames // 4, 3 * frames // 4)] += (
        jump_nm * 1e-9 * np.array([np.cos(angle), np.sin(angle)])
    )
    path = np.cumsum(steps, axis=0) @ twin.geometry.detector_frame[:2]
    twin.drift = lambda time_s: path[min(frames - 1, int(time_s / frame_s))]


def measure(preset: Preset, arguments: argparse.Namespace) -> tuple[RockingScan, Reconstruction, np.ndarray]:
    """A rocking scan, the crystal's truth, and where the crystal stood, (J, 2) m along (x', y')."""
    twin = Twin(load_beamline(), preset)
    plan, count = preset.plan, preset.plan.rocking_points
    frame_s = plan.rocking_exposure_s + OVERHEAD_S
    if arguments.drift or arguments.jump:
        walk_off(twin, arguments.drift, arguments.jump, count, frame_s, preset.sim.crystal.seed)
    scan = simulate_rocking(twin.beamline, preset, twin=twin)
    sentinels = after = None
    if arguments.sentinels:
        after = np.arange(0, count, arguments.sentinels)
        eiger, n = twin.beamline.eiger, plan.window
        rows, columns = (slice(c - n // 2, c - n // 2 + n) for c in (eiger.beam_row, eiger.beam_column))
        pose = twin.aligned_pose()
        shots = [twin.frame(pose, plan.rocking_exposure_s, j * frame_s)[rows, columns] for j in after]
        sentinels = np.where(scan.mask, 0, np.stack(shots)).astype(np.float32)
    rocking = RockingScan(
        np.where(scan.mask, 0, scan.frames).astype(np.float32),
        np.asarray(scan.angles_deg),
        scan.mask,
        scan.geometry,
        scan.flux,
        scan.modulator_position,
        scan.count_cutoff,
        sentinels=sentinels,
        sentinel_after=after,
    )
    image, voxel = twin.truth_object()
    support = np.abs(image) > 0.5 * np.abs(image).max()
    truth = Reconstruction(image, support, voxel, twin.geometry, (0.0, 0.0))
    stood = np.array([state.crystal for state in scan.states]) @ twin.geometry.detector_frame[:2].T
    return rocking, truth, stood


def true_modulator(preset: Preset, scan: RockingScan, with_beam: bool) -> Modulator:
    """The map and its distance; the beam, too, or none."""
    twin = Twin(load_beamline(), preset)
    d1 = twin.truth_distance()
    pixel = scan.geometry.with_modulator(d1).object_pixel(preset.plan.window)
    transmission = twin.truth_modulator(pixel, (FIELD, FIELD))
    probe = twin.truth_probe(pixel, preset.plan.window)[None] if with_beam else np.zeros((1, 8, 8))
    probe = probe.astype(np.complex64)
    return Modulator(transmission, pixel, d1, 1e-6, scan.modulator_position or (0.0, 0.0), probe)


def rms_nm(shifts: np.ndarray, light: np.ndarray) -> float:
    """Root mean square over the light of shifts (J, 2) m, their mean taken off."""
    beside = shifts - np.average(shifts, axis=0, weights=light)
    return round(1e9 * float(np.sqrt(np.average(np.square(beside).sum(axis=1), weights=light))), 2)


class Stages:
    """Elapsed and processor time of each stage of a trial, as its report names them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._stage, self._since = "", (0.0, 0.0)

    def __call__(self, _: float, line: str) -> None:
        now = time.perf_counter(), time.process_time()
        if self._stage:
            spent = self.seconds.setdefault(self._stage, [0.0, 0.0])
            for i in (0, 1):
                spent[i] = round(spent[i] + now[i] - self._since[i], 2)
        self._stage, self._since = line.partition(",")[0], now


def pass_over_floor(problem: Problem, rounds: int = 5) -> tuple[float, float]:
    """Processor seconds of a forward and adjoint pass over all frames, and of its transforms; the best.

    In turn, so that both meet what else the machine does.
    """
    waves = problem.waves(problem.region.astype(np.complex64))

    def transforms(j: int) -> None:
        a = np.zeros(problem.operator.detector_shape, np.complex64)
        ifft2(fft2(a, overwrite=True, workers=1), overwrite=True, workers=1)

    def timed(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    with one_thread_per_product():
        problem.descent(waves, None)
        whole = floor = np.inf
        for _ in range(rounds):
            whole = min(whole, timed(lambda: problem.descent(waves, None)))
            floor = min(floor, timed(lambda: each(transforms, problem.frames)))
    return whole, floor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="paper-ls")
    parser.add_argument("--crystals", type=int, nargs="+", default=[11], help="seeds; 11 is the preset's own")
    parser.add_argument("--seeds", type=int, default=1, help="trials of each crystal")
    parser.add_argument("--modulator", type=Path, help="a calibrated map instead of the true one")
    parser.add_argument("--start", choices=("random", "probe"), default="random", help="noise or the beam")
    parser.add_argument("--method", choices=("chain", "paper"), default="chain", help="paper: as published")
    parser.add_argument(
        "--likelihood", choices=("anscombe", "poisson"), default="anscombe", help="last passes"
    )
    parser.add_argument("--iterations", type=int, nargs="+", default=[10], help="passes over all frames")
    parser.add_argument("--drift", type=float, default=0.0, help="nm per frame, along x' and along y'")
    parser.add_argument("--jump", type=float, default=0.0, help="nm, once")
    parser.add_argument("--sentinels", type=int, default=0, help="a frame at the peak after every so many")
    parser.add_argument("--scale", type=float, default=1.0, help="factor by which map and d1 are made wrong")
    parser.add_argument("--refine-scale", action="store_true", help="correct it from the frames")
    parser.add_argument("--distance", type=float, default=0.0, help="um by which d1 is made wrong")
    parser.add_argument("--refine-distance", action="store_true", help="correct it from the crystal")
    parser.add_argument("--coherence", action="store_true", help="find how coherent the light was")
    parser.add_argument(
        "--nuisance", nargs="+", default=[], metavar="NAME=JSON", help="of the preset, changed"
    )
    parser.add_argument("--hold", action="store_true", help="take the crystal to stand still")
    parser.add_argument("--stages", action="store_true", help="time of each stage, and of a pass")
    arguments = parser.parse_args()
    drift = "none" if arguments.hold else "free"
    for crystal in arguments.crystals:
        preset = with_crystal(with_nuisances(load_preset(arguments.preset), arguments.nuisance), crystal)
        scan, truth, stood = measure(preset, arguments)
        light = np.asarray(scan.frames).sum(axis=(1, 2))
        path = arguments.modulator
        if path is None:
            modulator = true_modulator(preset, scan, with_beam=arguments.start == "probe")
        else:
            modulator = read_modulator(path)
        modulator = scaled(modulator, arguments.scale)
        wrong = modulator.sample_distance + 1e-6 * arguments.distance
        modulator = replace(modulator, sample_distance=wrong)
        wall, cpu = time.perf_counter(), time.process_time()
        with one_thread_per_product():
            problem = prepare(scan, modulator)
        ready = round(time.perf_counter() - wall, 1), round(time.process_time() - cpu, 1)
        scale = {}

        def pilot(problem: Problem, n: int) -> Solution:
            return driver.Trial(problem, 10, PILOT_SEED, arguments.start, drift, "chain")(n, Stages())

        if arguments.refine_scale:
            cpu = time.process_time()
            with one_thread_per_product():
                problem, modulator, told = rescale(scan, modulator, problem, pilot)
            scale = {"scale": round(told.factor, 5), "scale_error": round(told.error, 5)}
            scale["scale_cpu_s"] = round(time.process_time() - cpu, 1)
        if arguments.refine_distance:
            cpu = time.process_time()
            problem, modulator, focus = refocused(scan, modulator, problem, pilot)
            scale["d1_um"] = [round(1e6 * d, 2) for d in (modulator.sample_distance, focus.error)]
            scale["d1_cpu_s"] = round(time.process_time() - cpu, 1)
        sources, lengths = (), {}
        if arguments.coherence:
            cpu = time.process_time()
            found, sources = driver.found_light(scan, problem, pilot)
            lengths = {"coherence_um": [round(1e6 * length, 3) for length in found]}
            lengths["coherence_cpu_s"] = round(time.process_time() - cpu, 1)
        for seed, iterations in itertools.product(range(arguments.seeds), arguments.iterations):
            stages = Stages()
            ending = driver.Ending(sources, arguments.likelihood == "poisson")
            trial = driver.Trial(problem, iterations, seed, arguments.start, drift, arguments.method, ending)
            wall, cpu = time.perf_counter(), time.process_time()
            solution = trial(0, stages)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            settings = {"modulator_distance": modulator.sample_distance}
            result = driver.make_result(scan, problem, [solution], settings)
            found = compare(result, truth)
            row = {"preset": arguments.preset, "crystal": crystal, "seed": seed, "class": found.verdict}
            row |= {"method": arguments.method, "start": arguments.start, "iterations": iterations}
            row |= {"correlation": round(found.correlation, 4), "strain_error": found.strain_error}
            row |= {"score": round(solution.score, 4), "ready_s": ready}
            row |= scale | lengths
            row |= {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "drifted_nm": rms_nm(stood, light)}
            if result.drift is not None:
                row["drift_error_nm"] = rms_nm(result.drift - stood, light)
            if arguments.stages:
                stages(1.0, "")
                row["stages_wall_cpu_s"] = stages.seconds
                whole, floor = pass_over_floor(problem)
                row |= {"pass_cpu_s": round(whole, 2), "pass_over_transforms": round(whole / floor, 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
