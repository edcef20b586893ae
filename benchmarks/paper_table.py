"""The table of the paper, from the simulated beamline.

    bcmi simulate ptychography --preset paper-ls -o scan.cxi
    bcmi calibrate scan.cxi --modes 2 -o modulator.cxi
    python benchmarks/paper_table.py paper-ls --modulator modulator.cxi --bcmi 100 --bcdi 20 --known 0

Trials of BCMI with the modulator in, of BCDI with it out, and of BCDI with the support known (the truth's,
one voxel larger), each from noise of its own, nuisances on. A trial is correct, or conjugated, where its
correlation with the truth, or with its twin, exceeds 0.9. Free log-likelihood: median of all trials, and from
the least to the largest. First weight: of the eigenmodes of the three trials of least free log-likelihood.
Modulus: peaks of its histogram within the support, as parts of its largest value. Resolution: where the shell
correlation of these three together with the truth falls below the half-bit curve, half period.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bcdi
import bcmi
import numpy as np

from bcmi_beamline.config import Preset, load_preset
from bcmi_beamline.data import read_modulator
from bcmi_beamline.reconstruction.conventional import Recipe, prepare
from bcmi_beamline.reconstruction.conventional._guided import score
from bcmi_beamline.reconstruction.conventional._reconstruct import Task
from bcmi_beamline.reconstruction.metrics import Comparison, compare
from bcmi_beamline.reconstruction.modulation import driver
from bcmi_beamline.reconstruction.modulation import prepare as modulation
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Reconstruction


@dataclass
class Column:
    """What all trials of one method come to."""

    verdicts: list[str]
    free_llk: list[float]
    seconds: list[float]
    result: Reconstruction
    best: Comparison

    def cells(self) -> list[str]:
        count, found, best = len(self.verdicts), Counter(self.verdicts), self.best
        success = f"{found['correct']} of {count}"
        if found["correct"] < count:
            success += f" ({found['conjugated']} conjugated, {found['incorrect']} wrong)"
        llk, weights = np.array(self.free_llk), self.result.mode_weights
        half = best.fsc.resolution_half_period
        return [
            success,
            f"{np.median(llk):.4g} ({llk.min():.4g} to {llk.max():.4g})",
            "-" if weights is None or count < 3 else f"{100 * weights[0]:.2f} %",
            f"{best.modulus.peaks} at {best.modulus.mode:.2f}, width {best.modulus.width:.2f}",
            f"{1e9 * half:.1f} nm" if np.isfinite(half) else "none",
            f"{max(best.correlation, best.correlation_twin):.4f}",
            f"{best.strain_error:.1e}",
            f"{np.median(self.seconds):.1f} s",
        ]


ROWS = (
    "correct",
    "free log-likelihood",
    "first weight",
    "peaks of the modulus",
    "resolution",
    "correlation",
    "strain error, rms",
    "processor time of a trial",
)


def timed(work: Iterable) -> Iterator[tuple]:
    """Each item with the processor seconds that it took."""
    items = iter(work)
    while True:
        cpu = time.process_time()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.process_time() - cpu


def bcmi_column(preset: Preset, modulator: Path | None, trials: int) -> Column:
    still = argparse.Namespace(drift=0.0, jump=0.0, sentinels=0)
    scan, truth, _ = bcmi.measure(preset, still)
    known = bcmi.true_modulator(preset, scan, False) if modulator is None else read_modulator(modulator)
    with one_thread_per_product():
        problem = modulation.prepare(scan, known)
    trial = driver.Trial(problem, 10, 0, "random", "free", "chain")
    options = {"modulator_distance": known.sample_distance}
    verdicts, solutions, seconds = [], [], []
    for solution, cpu in timed(trial(n, None) for n in range(trials)):
        one = driver.make_result(scan, problem, [solution], options)
        verdicts.append(compare(one, truth).verdict)
        solutions.append(solution)
        seconds.append(cpu)
        print(f"bcmi {len(solutions)}: {verdicts[-1]}, {solution.score:.4f}", flush=True)
    result = driver.make_result(scan, problem, solutions, options)
    return Column(verdicts, [s.score for s in solutions], seconds, result, compare(result, truth))


def bcdi_column(preset: Preset, trials: int, with_support: bool) -> Column:
    scan, truth, _ = bcdi.measure(preset)
    support = bcdi.larger(truth, prepare(scan)) if with_support else None
    task = Task.of(scan, support, Recipe(), seed=0, iterations=500)
    job, done, verdicts, seconds = task.job(), [], [], []
    for trial, cpu in timed(job(n, lambda *_: None) for n in range(trials)):
        done.append(trial)
        verdicts.append(compare(task.combine([trial], 1), truth).verdict)
        seconds.append(cpu)
        print(f"bcdi {len(done)}: {verdicts[-1]}, {score(trial, 'free_llk'):.4f}", flush=True)
    result = task.combine(done, 3)
    return Column(verdicts, [score(t, "free_llk") for t in done], seconds, result, compare(result, truth))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="paper-ls")
    parser.add_argument("--modulator", type=Path, help="a calibrated map instead of the true one")
    parser.add_argument("--bcmi", type=int, default=3, help="trials")
    parser.add_argument("--bcdi", type=int, default=3, help="trials; 0 leaves the column out")
    parser.add_argument("--known", type=int, default=3, help="trials; 0 leaves the column out")
    asked = parser.parse_args()
    preset = load_preset(asked.preset)
    columns = {"BCMI": bcmi_column(preset, asked.modulator, asked.bcmi)}
    if asked.bcdi:
        columns["BCDI"] = bcdi_column(preset, asked.bcdi, False)
    if asked.known:
        columns["BCDI, support known"] = bcdi_column(preset, asked.known, True)
    print("\n| `" + " | ".join([asked.preset + "`", *columns]) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in zip(ROWS, *(column.cells() for column in columns.values()), strict=True):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
