"""A scan that is followed while it is taken: when is a frame folded in, when is there a crystal?

    bcmi simulate rocking --preset paper-ls -o rocking.cxi --truth truth.cxi
    python benchmarks/following.py rocking.cxi modulator.cxi --truth truth.cxi --rate 2

A process writes the frames of the scan into whole detector frames (bitshuffle-LZ4, SWMR) and their documents
into a log, so many a second; `data.watch` takes them from there and hands them to `modulation.follow`, which
draws the crystal as it grows. Elapsed times need a machine that is idle otherwise: the load is printed, and
processor times beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import h5py
import hdf5plugin
import numpy as np

from bcmi_beamline import data
from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

DATASET = "/entry/data/data"

INVALID = np.uint32(np.iinfo(np.uint32).max)
"""What the detector writes where it has no pixels."""


def start_document(scan: RockingScan, detector: tuple[int, int]) -> dict:
    """Of a run with the window in the middle of the detector."""
    place = scan.modulator_position or (0.0, 0.0)
    return {
        "uid": str(uuid.uuid4()),
        "time": time.time(),
        "scan_kind": "rocking",
        "geometry": asdict(scan.geometry),
        "window": {"size": scan.frames.shape[1], "row": detector[0] // 2, "column": detector[1] // 2},
        "detector": {"masked_rows": [], "masked_columns": [], "count_cutoff": scan.count_cutoff},
        "modulator": "in",
        "modulator_position_um": {"x": place[0] * 1e6, "y": place[1] * 1e6},
        "rocking": {"circle": "phi", "peak_deg": 0.0, "sense": 1},
    }


def write(
    scan: RockingScan, detector: tuple[int, int], rate: float, folder: Path, start: dict, arrived
) -> None:
    """Write frames and documents, `rate` a second; `arrived` gets the time at which each was in the file."""
    log, path = data.DocumentLog(folder), folder / "a_data_000001.h5"
    size, (row, column) = scan.frames.shape[1], (n // 2 - scan.frames.shape[1] // 2 for n in detector)
    log("start", start)
    run, described, resource = start["uid"], str(uuid.uuid4()), str(uuid.uuid4())
    scalar = {"dtype": "number", "dtype_numpy": "<f8", "shape": [], "source": "script"}
    image = {"dtype": "array", "dtype_numpy": "<u4", "shape": list(detector), "source": "script"}
    keys = {"diffractometer_phi": scalar, "eiger_frame": scalar, "eiger_image": image}
    log("descriptor", {"uid": described, "run_start": run, "name": "primary", "data_keys": keys})
    with h5py.File(path, "w", libver="latest") as file:
        shape, chunks = (0, *detector), (1, *detector)
        filters = dict(hdf5plugin.Bitshuffle(cname="lz4"))
        frames = file.create_dataset(
            DATASET, shape, "u4", maxshape=(None, *detector), chunks=chunks, **filters
        )
        file.swmr_mode = True
        parameters = {"dataset": DATASET, "swmr": True}
        found = {"uid": resource, "run_start": run, "data_key": "eiger_image", "parameters": parameters}
        log("stream_resource", {**found, "uri": f"file://localhost{path}"})
        begun = time.monotonic()
        for j, frame in enumerate(scan.frames):
            whole = np.zeros(detector, np.uint32)
            counts = np.where(scan.mask, INVALID, frame.astype(np.uint32))
            whole[row : row + size, column : column + size] = counts
            time.sleep(max(0.0, begun + (j + 1) / rate - time.monotonic()))
            frames.resize(j + 1, axis=0)
            frames[j] = whole
            frames.flush()
            arrived[j] = time.time()
            reading = {"diffractometer_phi": float(scan.angles_deg[j]), "eiger_frame": j}
            log("event", {"descriptor": described, "data": reading, "seq_num": j + 1})
    log("stop", {"run_start": run, "uid": str(uuid.uuid4()), "exit_status": "success"})


@dataclass
class Look:
    """One time that frames were given.

    Attributes
    ----------
    frames, solved : int
        By then.
    free, arrived, given, folded : float
        When the chain was free, the last frame was in its file, it was given, it was folded in; s.
    reading, folding : float
        Processor time of the following thread, s.
    """

    frames: int
    solved: int
    free: float
    arrived: float
    given: float
    folded: float
    reading: float
    folding: float


def measure(
    scan: RockingScan, modulator: Modulator, detector: tuple[int, int], rate: float
) -> tuple[list[Look], list[tuple[float, Reconstruction]], np.ndarray]:
    """Every look at the scan, every crystal and when it was there, and when each frame was in its file."""
    context, looks, crystals, solved = multiprocessing.get_context("spawn"), [], [], [0]
    arrived = context.Array("d", len(scan.frames))

    def given(scans: Iterator) -> Iterator[RockingScan]:
        free, idle = time.time(), time.thread_time()
        for found in scans:
            begun, read = time.time(), time.thread_time()
            yield found  # and be asked again when its frames are folded in
            now, done = time.time(), time.thread_time()
            count = len(found.frames)
            times = free, arrived[count - 1], begun, now, read - idle, done - read
            looks.append(Look(count, solved[0], *times))
            free, idle = now, done

    def progress(fraction: float, line: str) -> None:
        if line.endswith("solved"):
            solved[0] = int(line.split()[-2])

    with tempfile.TemporaryDirectory() as folder:
        start = start_document(scan, detector)
        writer = context.Process(target=write, args=(scan, detector, rate, Path(folder), start, arrived))
        writer.start()
        log = data.DocumentLog(folder)
        while not log.paths():
            time.sleep(0.01)
        modulation.follow(
            given(data.watch(start["uid"], log=log)),
            modulator,
            progress=progress,
            show=lambda crystal: crystals.append((time.time(), crystal)),
        )
        writer.join()
    return looks[:-1], crystals, np.array(arrived)  # the last look tells only that the run has ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("modulator", type=Path)
    parser.add_argument("--truth", type=Path, help="what was simulated: the crystals are compared with it")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="frames a second")
    parser.add_argument("--detector", type=int, nargs=2, default=(2164, 1030), help="rows and columns")
    parser.add_argument("--first", type=int, default=0, help="frame to begin with")
    options = parser.parse_args()
    scan = cast(RockingScan, data.read_rocking(options.scan))
    scan.frames, scan.angles_deg = scan.frames[options.first :], scan.angles_deg[options.first :]
    scan.flux = scan.sentinels = scan.sentinel_after = None
    modulator = data.read_modulator(options.modulator)
    truth = None if options.truth is None else data.read_reconstruction(options.truth)
    for rate in options.rate:
        load = os.getloadavg()[0]
        looks, crystals, arrived = measure(scan, modulator, tuple(options.detector), rate)
        print(f"{len(scan.frames)} frames, {rate:g} a second, load {load:.1f}; {looks[-1].solved} solved")
        begin = next(n for n, look in enumerate(looks) if look.solved)
        first = looks[begin]
        spent = f"{first.folded - first.given:.2f} s, {first.folding:.2f} s of processor time of its thread"
        print(f"  the first frame solved in {spent}")
        waited = [look for look in looks if look.arrived >= look.free]  # else it lay there meanwhile
        tell("in the file to read", [look.given - look.arrived for look in waited])
        tell("processor time of reading", [look.reading for look in waited])
        for name, some in ("before light", looks[:begin]), ("once the first is solved", looks[begin + 1 :]):
            tell(f"in the file to folded in, {name}", [look.folded - look.arrived for look in some])
            tell(f"processor time of folding in, {name}", [look.folding for look in some])
        for when, crystal in crystals:
            frames = crystal.configuration["frames"]
            last = max(n for n, there in enumerate(arrived) if there < when)
            close = "" if truth is None else f", correlation {compare(crystal, truth).correlation:.4f}"
            late = when - arrived[-1]
            since = f"{late:.1f} s after the last frame" if late > 0 else f"at frame {last + 1}"
            print(f"  crystal from {frames} frames {since}{close}", flush=True)


def tell(name: str, seconds: list[float]) -> None:
    """Print a line."""
    if seconds:
        median, high, most = np.percentile(seconds, [50, 95, 100]) * 1e3
        print(f"  {name}: {len(seconds)} looks, median {median:.0f}, 95 % {high:.0f}, longest {most:.0f} ms")


if __name__ == "__main__":
    main()
