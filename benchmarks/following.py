"""How long after a frame is in the detector's file it is folded into the crystal.

    bcmi simulate rocking --preset paper-ls --modulator modulator.cxi -o rocking.cxi
    python benchmarks/following.py rocking.cxi modulator.cxi --rate 1 5

A process writes the frames of the scan into whole detector frames (bitshuffle-LZ4, SWMR) and their documents
into a log, so many a second; `data.watch` takes them from there and hands them to the chain of
`modulation.follow`, without its previews. Elapsed times need a machine that is idle otherwise: the load is
printed, and processor times beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import cast

import h5py
import hdf5plugin
import numpy as np

from bcmi_beamline import data
from bcmi_beamline.reconstruction.modulation.follow import Follower
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, RockingScan

DATASET = "/entry/data/data"


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
            whole[row : row + size, column : column + size] = frame
            time.sleep(max(0.0, begun + (j + 1) / rate - time.monotonic()))
            frames.resize(j + 1, axis=0)
            frames[j] = whole
            frames.flush()
            arrived[j] = time.time()
            reading = {"diffractometer_phi": float(scan.angles_deg[j]), "eiger_frame": j}
            log("event", {"descriptor": described, "data": reading, "seq_num": j + 1})
    log("stop", {"run_start": run, "uid": str(uuid.uuid4()), "exit_status": "success"})


def measure(scan: RockingScan, modulator: Modulator, detector: tuple[int, int], rate: float) -> np.ndarray:
    """One row for each time that frames were given.

    The columns: frames by then, solved ones by then; when the chain was free, when the last frame was in the
    file, when it was given, when it was folded in (s); processor time for reading and for folding in (s).
    """
    context, rows = multiprocessing.get_context("spawn"), []
    arrived = context.Array("d", len(scan.frames))
    with tempfile.TemporaryDirectory() as folder:
        start = start_document(scan, detector)
        writer = context.Process(target=write, args=(scan, detector, rate, Path(folder), start, arrived))
        writer.start()
        log = data.DocumentLog(folder)
        while not log.paths():
            time.sleep(0.01)
        follower, free, idle = Follower(modulator), time.time(), time.process_time()
        for found in data.watch(start["uid"], log=log):
            given, read = time.time(), time.process_time()
            with one_thread_per_product():
                follower.add(cast(RockingScan, found))
            folded, done = time.time(), time.process_time()
            count = len(found.frames)
            times = free, arrived[count - 1], given, folded, read - idle, done - read
            rows.append((count, len(follower.solved), *times))
            free, idle = folded, done
        writer.join()
    return np.array(rows[:-1])  # the last tells only that the run has ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("modulator", type=Path)
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0], help="frames a second")
    parser.add_argument("--detector", type=int, nargs=2, default=(2164, 1030), help="rows and columns")
    parser.add_argument("--frames", type=int, default=61, help="so many, from shortly before the peak")
    options = parser.parse_args()
    scan = cast(RockingScan, data.read_rocking(options.scan))
    first = max(0, len(scan.frames) // 2 - 10)
    cut = slice(first, first + options.frames)
    scan.frames, scan.angles_deg = scan.frames[cut], scan.angles_deg[cut]
    scan.flux = scan.sentinels = scan.sentinel_after = None
    modulator = data.read_modulator(options.modulator)
    for rate in options.rate:
        load = os.getloadavg()[0]
        rows = measure(scan, modulator, tuple(options.detector), rate)
        _, solved, free, arrived, given, folded, reading, folding = rows.T
        begin = int(np.argmax(solved > 0))
        print(f"{len(scan.frames)} frames, {rate:g} a second, load {load:.1f}; {int(solved[-1])} solved")
        print(f"  the first one solved in {folding[begin]:.1f} s of processor time")
        waited = arrived >= free  # else it lay there while the chain was busy
        later = waited & (np.arange(len(rows)) > begin)
        tell("in the file to read", (given - arrived)[waited])
        tell("in the file to folded in, once the first is solved", (folded - arrived)[later])
        tell("processor time of reading", reading[waited])
        tell("processor time of folding in, once the first is solved", folding[later])


def tell(name: str, seconds: np.ndarray) -> None:
    """Print a line."""
    if len(seconds):
        median, high = np.percentile(seconds, [50, 95]) * 1e3
        print(f"  {name}: {len(seconds)} frames, median {median:.0f} ms, 95 % {high:.0f} ms")


if __name__ == "__main__":
    main()
