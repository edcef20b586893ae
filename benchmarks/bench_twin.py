"""What a frame of the simulated beamline costs, stage by stage, beside the FFT that no way gets round.

    OMP_NUM_THREADS=1 python benchmarks/bench_twin.py [PRESET ...] [--frames N] [--workers N]

CPU milliseconds of this process: judge by the column "of FFT", the ratio to the bare FFT of the
frame's grid in the same run. The last lines give whole scans in several processes (wall clock) and memory.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import fft

from bcmi_beamline.config import list_presets, load_beamline, load_preset
from bcmi_beamline.sim import Twin, simulate_ptychography
from bcmi_beamline.sim.detector import draw_poisson


def cpu_ms(function: Callable[[int], Any], repeats: int) -> float:
    """CPU time of one call, ms, after one that fills the caches."""
    function(0)
    start = time.process_time()
    for number in range(repeats):
        function(number)
    return (time.process_time() - start) / repeats * 1e3


def stages(twin: Twin, repeats: int) -> dict[str, float]:
    """CPU ms by stage, in the order of the light."""
    pose = twin.aligned_pose()
    circle, step = twin.beamline.rocking_circle, twin.preset.plan.rocking_step_deg
    light, shift = twin._light(pose), (0.3, -0.2)
    wave = twin._exit_wave(pose, 0.0, light, np.zeros(2))
    assert wave is not None
    placement = twin._placement(pose)
    plane = twin._plane(wave, round(placement.distance, 7), shift)
    x = plane.coordinates
    film = twin.chip.transmission(placement, x, x)
    assert film is not None
    arrived = plane.arrive(wave)
    rate = plane.window.intensity(film * arrived)
    grid = np.ones((plane.window.samples,) * 2, np.complex64)
    corner = (twin.beamline.eiger.beam_row - len(rate) // 2, twin.beamline.eiger.beam_column - len(rate) // 2)
    rng = np.random.default_rng(0)

    def rocked(number: int) -> dict[str, float]:
        return pose | {circle: pose[circle] + step * (number - repeats / 2)}

    return {
        f"bare FFT, {plane.window.samples}^2": cpu_ms(lambda _: fft.fft2(grid), repeats),
        "exit wave": cpu_ms(lambda _: twin._exit_wave(pose, 0.0, light, np.zeros(2)), repeats),
        f"Fresnel to {len(x)}^2": cpu_ms(lambda _: plane.arrive(wave), repeats),
        "modulator": cpu_ms(lambda _: twin.chip.transmission(placement, x, x), repeats),
        "FFT and pixels": cpu_ms(lambda _: plane.window.intensity(film * arrived), repeats),
        "Poisson": cpu_ms(lambda _: draw_poisson(rate, rng), repeats),
        "detector with Poisson": cpu_ms(lambda _: twin.detector.expose(rate, corner, 1.0, rng), repeats),
        "frame at the peak": cpu_ms(lambda i: twin.frame(pose, 1.0, float(i)), repeats),
        "frame while rocking": cpu_ms(lambda i: twin.frame(rocked(i), 1.0, float(i)), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list_presets())
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0, help="also scan in so many processes; wall clock")
    options = parser.parse_args()
    beamline = load_beamline()
    for name in options.presets:
        start = time.process_time()
        twin = Twin(beamline, load_preset(name))
        twin.frame({}, 1.0)
        rows, columns = twin.detector.pixel_mask.shape
        print(f"\n{name}: ready after {time.process_time() - start:.1f} s CPU; frames of {rows} x {columns}")
        costs = stages(twin, options.frames)
        floor = next(iter(costs.values()))
        print(f"  {'stage':<24}{'ms':>8}{'of FFT':>8}")
        for stage, cost in costs.items():
            print(f"  {stage:<24}{cost:8.2f}{cost / floor:8.2f}")
        for workers in (options.workers,) if options.workers else ():
            start = time.perf_counter()
            count = len(simulate_ptychography(beamline, twin.preset, twin=twin, workers=workers).frames)
            wall = time.perf_counter() - start
            print(
                f"  ptychography, {workers} process(es): {count} frames in {wall:.1f} s, {count / wall:.0f}/s"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of this process, all of the above: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
