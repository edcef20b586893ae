"""What storage adds to a scan, and what an export needs: ``python benchmarks/storage.py``.

The first part runs the same scan (one small frame and three readings an event, 20 ms of exposure) without a
writer, with the document log, and with log and catalogue, in turns in one process, and prints the median time
an event takes. The second exports a ptychography scan in blocks and prints memory and rate; ``--frames`` sets
its size (5000 frames of 1024 x 1024 uint32 are 21 GB).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import numpy as np
from bluesky import RunEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))
from fake_beamline import FakeEiger, Reading, poisson

from bcmi_beamline import data
from bcmi_beamline.scans import PtychographyScan


def scan_ms(folder: Path, events: int, callbacks: list, exposure_s: float) -> tuple[float, float]:
    """Wall time (beside the exposure) and CPU time of one event of a scan, ms."""
    eiger = FakeEiger(folder, poisson((events, 16, 16)), images_per_file=100)
    values = {key: np.arange(float(events)) for key in ("x", "y", "monitor_flux")}
    reading, times = Reading("readings", **values), []

    @bpp.stage_decorator([eiger])
    @bpp.run_decorator()
    def plan():
        for _ in range(events):
            times.append(time.perf_counter())
            yield from bps.sleep(exposure_s)
            yield from bps.trigger_and_read([eiger, reading])

    RE = RunEngine({}, context_managers=[])
    for callback in callbacks:
        RE.subscribe(callback)
    before = time.process_time()
    RE(plan())
    for callback in callbacks:
        if isinstance(callback, data.BackgroundTiledWriter):
            callback.flush()
    cpu = (time.process_time() - before) / events
    return 1e3 * (statistics.median(np.diff(times)) - exposure_s), 1e3 * cpu


def added_time(events: int, rounds: int, exposure_s: float) -> None:
    """Print what log and catalogue add to an event."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = data.DocumentLog(folder / "log")
        with data.open_catalog(folder / "catalog", readable=[folder], log=log) as catalog:
            len(catalog)  # the server is up
            ways = {"no writer": [], "log": [log], "log and catalogue": [log, catalog.writer]}
            found = {way: [] for way in ways}
            for _ in range(rounds):
                for way, callbacks in ways.items():
                    found[way].append(scan_ms(folder, events, callbacks, exposure_s))
            assert not catalog.writer.failures
    bare = np.median(found["no writer"], axis=0)
    for way, times in found.items():
        wall, cpu = np.median(times, axis=0)
        print(
            f"{way:16s} {wall:6.2f} ms an event ({wall - bare[0]:+.2f}), CPU {cpu:.2f} ({cpu - bare[1]:+.2f})"
        )


class Frames:
    """Frames that cost no memory: one pattern, shifted; sliced along the first axis."""

    dtype, ndim = np.dtype(np.uint32), 3

    def __init__(self, count: int, size: int) -> None:
        self.shape = (count, size, size)
        self._one = np.random.default_rng(0).poisson(0.05, (size, size)).astype(np.uint32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice) -> np.ndarray:
        return np.stack([np.roll(self._one, j, axis=1) for j in range(*key.indices(len(self)))])


def export_memory(frames: int, size: int) -> None:
    """Print memory and rate of an export."""
    source = Frames(frames, size)
    scan = PtychographyScan(
        frames=source,  # pyright: ignore[reportArgumentType]
        positions=np.random.default_rng(1).normal(size=(frames, 2)) * 1e-6,
        mask=np.zeros((size, size), bool),
        wavelength=1.3776e-10,
        propagation_distance=5.35,
        pixel_size=75e-6,
    )
    gigabytes = np.prod(source.shape) * 4 / 1e9
    with tempfile.TemporaryDirectory() as name:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        data.write_cxi(Path(name) / "a.cxi", scan)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stored = (Path(name) / "a.cxi").stat().st_size / 1e9
    print(
        f"export of {gigabytes:.1f} GB to {stored:.2f} GB: {(peak - before) / 1e3:.0f} MB more memory "
        f"({peak / 1e3:.0f} MB in all), {seconds:.0f} s of CPU, {gigabytes * 1e3 / seconds:.0f} MB/s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exposure", type=float, default=0.02, help="of each event, s")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--size", type=int, default=1024)
    options = parser.parse_args()
    export_memory(options.frames, options.size)
    added_time(options.events, options.rounds, options.exposure)
