"""Frames through Channel Access into HDF5: rate, answers meanwhile, memory, and where the time goes.

    python benchmarks/ioc.py [PRESET ...] [--frames N]

Rates and answers are wall clock and need a quiet machine; CPU per frame does not. Judge the stages by the
ratio to the bare FFT of a frame's grid in the same run. Server, the process that makes frames and this
client share this machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import fft

from bcmi_beamline.config import list_presets
from bcmi_beamline.sim.launch import SimulatedBeamline, claim_ports

claim_ports()

import epics  # noqa: E402  libca reads its environment once

TIMEOUT_S = 120.0


class Client:
    """Process variables by name."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pvs: dict[str, epics.PV] = {}

    def pv(self, name: str) -> epics.PV:
        if name not in self._pvs:
            self._pvs[name] = epics.PV(self._prefix + name, auto_monitor=False)
            assert self._pvs[name].wait_for_connection(TIMEOUT_S), name
        return self._pvs[name]

    def put(self, **values) -> None:
        for name, value in values.items():
            self.pv(f"eiger:cam1:{name}").put(value, wait=True, timeout=TIMEOUT_S)

    def get(self, name: str):
        return self.pv(name).get(timeout=TIMEOUT_S)

    def arm(self, **settings) -> None:
        self.put(**settings)
        self.pv("eiger:cam1:Acquire").put(1, wait=False)
        while not self.get("eiger:cam1:Armed"):
            time.sleep(0.001)


def answer_ms(client: Client) -> float:
    """How long a get takes, ms."""
    time.sleep(0.005)
    start = time.perf_counter()
    client.get("huber:phi.RBV")
    return (time.perf_counter() - start) * 1e3


def self_triggered(client: Client, frames: int) -> tuple[float, np.ndarray]:
    """Frames per second of a series that triggers itself, and how long gets took meanwhile, ms."""
    answers = []
    client.arm(ManualTrigger=0, NumTriggers=frames)
    began = time.perf_counter()
    while client.get("eiger:cam1:Armed"):
        answers.append(answer_ms(client))
    return frames / (time.perf_counter() - began), np.array(answers)


def in_words(answers: np.ndarray) -> str:
    """Median, 95th percentile and worst."""
    return (
        f"{len(answers)} gets: median {np.median(answers):.2f} ms, 95 % below "
        f"{np.percentile(answers, 95):.2f} ms, worst {answers.max():.1f} ms"
    )


def step_scan(client: Client, frames: int) -> float:
    """Points per second of a scan that moves phi and triggers by Channel Access."""
    client.arm(ManualTrigger=1, NumTriggers=frames)
    began = time.perf_counter()
    for number in range(frames):
        client.pv("huber:phi.VAL").put(17.7 + 0.001 * (number % 40), wait=True, timeout=TIMEOUT_S)
        client.put(Trigger=1)
    return frames / (time.perf_counter() - began)


def processes(pid: int) -> list[int]:
    """The server and the process that makes frames."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def peak_mib(pid: int) -> float:
    """Most memory a process has held."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1024


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stages(preset: str, repeats: int = 20) -> dict[str, float]:
    """CPU ms per frame: the bare FFT of its grid, making it, writing it."""
    from bcmi_beamline.config import load_beamline, load_preset
    from bcmi_beamline.sim import Twin
    from bcmi_beamline.sim.ioc.series import Series, SeriesSettings

    twin = Twin(load_beamline(), load_preset(preset))
    pose = twin.aligned_pose()
    frame = twin.frame(pose, 1.0)
    size = 2 * (twin.preset.plan.window + 64)
    grid = np.ones((size, size), np.complex64)
    settings = SeriesSettings(
        images=1, triggers=repeats, images_per_file=repeats + 1, exposure_s=1.0, period_s=1.0,
        wavelength=1.4e-10, photon_energy_ev=9e3, threshold_energy_ev=4.5e3, distance=5.35,
        beam_center=(640, 1340), pixel_size=75e-6, bit_depth=32, count_cutoff=2_500_000, compression="BS LZ4",
    )  # fmt: skip
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        series = Series(Path(folder) / "bench", settings, twin.detector.pixel_mask)
        works = {
            f"bare FFT {size}^2": lambda number: fft.fft2(grid, workers=1),
            "make the frame": lambda number: twin.frame(pose, 1.0, float(number)),
            "write it": lambda number: series.write(frame),
        }
        for name, work in works.items():
            work(0)
            start = time.process_time()
            for number in range(repeats):
                work(number)
            costs[name] = (time.process_time() - start) / repeats * 1e3
        series.close()
    return costs


def measure(preset: str, frames: int) -> None:
    """Print everything about one preset."""
    print(f"\n{preset}")
    with (
        tempfile.TemporaryDirectory() as folder,
        SimulatedBeamline(preset, data_dir=folder, time_scale=1e-4) as beamline,
    ):
        client = Client(beamline.beamline.prefix)
        for axis, value in beamline.beamline.nanogoniometer.positions["in"].items():
            client.pv(f"nano:{axis}.VAL").put(value, wait=True, timeout=TIMEOUT_S)
        client.pv("shutter:open").put("Open", wait=True)
        client.put(AcquireTime=0.5, FWNImagesPerFile=100)
        self_triggered(client, 5)
        pids = processes(beamline.pid or 0)
        before = [cpu_s(pid) for pid in pids]
        rate, answers = self_triggered(client, frames)
        used = [(cpu_s(pid) - start) / frames * 1e3 for pid, start in zip(pids, before, strict=True)]
        print(f"  self-triggered {rate:.1f} frames/s into HDF5; meanwhile {in_words(answers)}")
        print(f"  without frames {in_words(np.array([answer_ms(client) for _ in answers]))}")
        print(f"  move, trigger, wait: {step_scan(client, frames):.1f} points/s")
        print(f"  CPU per frame: server {used[0]:.1f} ms, frames {used[1]:.1f} ms, each on a core of its own")
        peaks = [peak_mib(pid) for pid in pids]
        print(f"  peak memory: server {peaks[0]:.0f} MiB, frames {peaks[1]:.0f} MiB")
        for pv in client._pvs.values():
            pv.disconnect()
    costs = stages(preset)
    floor = next(iter(costs.values()))
    for name, cost in costs.items():
        print(f"  {name:20} {cost:7.2f} ms CPU {cost / floor:6.1f} of FFT")


def main() -> None:
    """Measure the presets asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=["small", "paper-ls"], metavar="PRESET")
    parser.add_argument("--frames", type=int, default=100)
    options = parser.parse_args()
    unknown = set(options.presets) - set(list_presets())
    if unknown:
        parser.error(f"no preset {', '.join(unknown)}")
    for preset in options.presets:
        measure(preset, options.frames)


if __name__ == "__main__":
    main()
