"""What a point of a scan costs beside its exposure, over Channel Access with every document stored.

    python benchmarks/scan_overhead.py

It opens the simulated beamline, takes a rocking scan (0.1 s exposures) and a spiral (5 ms), and times
each message of the RunEngine. Events are a point apart; what is beyond the exposure is overhead. Motion is
included. Wall-clock figures: say how busy the machine was. Where others compute as well,

    chrt --rr 1 python benchmarks/scan_overhead.py

goes before them (all its processes do) and comes near to a machine of its own. Of a slow machine the bare FFT
of a frame's grid tells, taken before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import fft

from bcmi_beamline.session import open_session

GRID = 768
"""Samples along an edge of the frames of the preset `small`."""


class Stopwatch:
    """Seconds between messages, by what the earlier message asked for; times of events."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)
        self.points: list[float] = []
        self._last: tuple[str, float] | None = None

    def message(self, msg) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.spent[self._last[0]].append(now - self._last[1])
        name = getattr(msg.obj, "name", "") or msg.kwargs.get("group") or ""
        self._last = (f"{msg.command} {name}".strip(), now)

    def document(self, name, doc) -> None:
        if name == "event" and "eiger_total" in doc["data"]:
            self.points.append(time.perf_counter())


def bare_fft_ms(repeats: int = 30) -> float:
    """Median wall-clock time of the transform that every frame needs."""
    grid, took = np.ones((GRID, GRID), np.complex64), []
    for _ in range(repeats):
        began = time.perf_counter()
        fft.fft2(grid, workers=1)
        took.append(time.perf_counter() - began)
    return round(1e3 * float(np.median(took)), 2)


def cpu_of(pid: int) -> float:
    """Processor seconds of a process and its children, from /proc; 0 where there is none."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if pid in (int(stat.parent.name), int(fields[1])):
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(session, plan, exposure_s: float) -> dict:
    watch = Stopwatch()
    beamline_cpu = cpu_of(session.twin.pid)
    session.RE.msg_hook = watch.message
    token = session.RE.subscribe(watch.document)
    cpu, wall = time.process_time(), time.perf_counter()
    session.run(plan)
    session.RE.unsubscribe(token)
    session.RE.msg_hook = None
    apart = np.diff(watch.points)
    points = len(watch.points)
    per_point = {
        what: round(1e3 * sum(spent) / points, 2)
        for what, spent in sorted(watch.spent.items(), key=lambda item: -sum(item[1]))
        if sum(spent) / points > 2e-4
    }
    return {
        "points": points,
        "exposure_ms": 1e3 * exposure_s,
        "overhead_ms_median": round(1e3 * (float(np.median(apart)) - exposure_s), 1),
        "overhead_ms_p95": round(1e3 * (float(np.percentile(apart, 95)) - exposure_s), 1),
        "points_per_s": round(1 / float(np.mean(apart)), 1),
        "client_cpu_ms_per_point": round(1e3 * (time.process_time() - cpu) / points, 1),
        "beamline_cpu_ms_per_point": round(1e3 * (cpu_of(session.twin.pid) - beamline_cpu) / points, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "ms_per_point_by_message": per_point,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {"load_before": os.getloadavg()[0], "processors": os.cpu_count(), "fft_ms_before": bare_fft_ms()}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(directory=folder, simulate=options.preset, time_scale=1.0) as session,
    ):
        from bcmi_beamline.plans import calibrate_modulator, insert_modulator, rocking_scan

        devices, window = session.devices, 256
        rocking = rocking_scan(devices, 0.25, 0.005, 0.1, modulator="out", peak_deg=17.721, window=window)
        found["rocking scan"] = measure(session, rocking, 0.1)
        session.run(insert_modulator(devices))
        spiral = calibrate_modulator(devices, (3.0, 3.0), 0.2, exposure_s=0.005, window=window)
        found["spiral"] = measure(session, spiral, 0.005)
        session.flush()
    found |= {"load_after": os.getloadavg()[0], "fft_ms_after": bare_fft_ms()}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, numbers in found.items():
        if not isinstance(numbers, dict):
            print(f"{name}: {numbers}")
            continue
        print(name)
        for key, value in numbers.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
