"""Seconds per pass of ptychography: this package, the transforms alone, and whichever peers are installed.

    python benchmarks/ptychography.py [--frames 200] [--size 256] [--passes 5] [--threads 2] [--only ...]

All work on the same frames in one run, in turns, and the fastest of the passes counts, in wall-clock
and in processor seconds (on a busy machine only the latter mean anything); peers that are not
installed are left out. Peers: cdtools (pip install cdtools-py), PtyLab (ptylab), pty-chi (ptychi). They run
their own ePIE, or what comes nearest (cdtools: automatic differentiation, one frame at a time is not its way;
it gets batches of 10), without position refinement.

    python benchmarks/ptychography.py --scan scan.cxi [--modes 2] [--iterations 6] [--threads 2]
    python benchmarks/ptychography.py --preset paper-ls [--seed S] [--extent X Y] [--variations 1] ...

The first times a whole calibration of a file and tells its peak memory. The second simulates the calibration
of a preset, with 20 nm position error, a drift of 1 nm/s and two modes of coherence, and compares what comes
out with the truth; its peak memory holds the simulation as well.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
import warnings
from collections.abc import Callable


def scene(frames: int, size: int):
    """Counts, whole-pixel corners, probe and object of a scan with 80 % overlap."""
    import numpy as np

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - size // 2
    radius = size / 8
    probe = 100 * np.exp(-(x**2 + y**2) / radius**2 + 1j * (x**2 + y**2) / (3 * radius**2))
    index = np.arange(frames)
    place = (
        0.4 * radius * np.sqrt(index)[:, None] * np.column_stack([np.cos(2.4 * index), np.sin(2.4 * index)])
    )
    corners = np.rint(place - place.min(axis=0)).astype(int) + 2
    shape = corners.max(axis=0) + size + 2
    smooth = np.fft.ifft2(
        np.fft.fft2(rng.standard_normal(shape))
        * np.exp(-300 * (np.fft.fftfreq(shape[0])[:, None] ** 2 + np.fft.fftfreq(shape[1]) ** 2))
    ).real
    image = np.exp(1j * np.where(smooth > 0, 2.4, 0.0))
    data = np.empty((frames, size, size), np.float32)
    for j, (r, c) in enumerate(corners):
        wave = np.fft.fft2(probe * image[r : r + size, c : c + size], norm="ortho")
        data[j] = rng.poisson(np.abs(wave) ** 2)
    return data, corners, (0.9 * probe).astype(np.complex64), image.shape


def timed(step: Callable[[], object], passes: int) -> tuple[float, float]:
    """Least wall-clock and least processor seconds of a pass; the first, which compiles, does not count."""
    step()
    wall, used = [], []
    for _ in range(passes):
        begun = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begun[0])
        used.append(time.process_time() - begun[1])
    return min(wall), min(used)


def floor(data, corners, probe, shape):
    """Two transforms per frame and nothing else."""
    from bcmi_beamline.reconstruction.fourier import fft2, ifft2

    waves = data.astype("complex64")
    threads = int(os.environ["OMP_NUM_THREADS"])
    return lambda: ifft2(fft2(waves, workers=threads), workers=threads)


def ours_epie(data, corners, probe, shape):
    """One frame after the other."""
    import numpy as np

    from bcmi_beamline.reconstruction.ptychography import epie

    image = np.ones(shape, np.complex64)
    return lambda: epie(data, corners, probe, image, iterations=1)


def ours_engine(data, corners, probe, shape):
    """What `calibrate` does in a pass: rPIE in batches of 8, sub-pixel positions refined."""
    import numpy as np

    from bcmi_beamline.reconstruction.ptychography._detector import PIXEL_SPREAD
    from bcmi_beamline.reconstruction.ptychography._devices import Processors
    from bcmi_beamline.reconstruction.ptychography._engine import Engine

    engine = Engine(
        np.fft.fftshift(data, axes=(1, 2)), np.zeros((1, *data.shape[1:]), np.uint8), corners + 0.3,
        probe[None], np.ones(shape, np.complex64), np.ones(len(data)), np.random.default_rng(0),
        spread=PIXEL_SPREAD, device=Processors(int(os.environ["OMP_NUM_THREADS"])),
    )  # fmt: skip
    return lambda: engine.sweep(locate=True)


def cdtools(data, corners, probe, shape):
    """Simple ptychography by automatic differentiation, Adam, batches of 10."""
    import numpy as np
    import torch
    from cdtools.datasets import Ptycho2DDataset
    from cdtools.models import SimplePtycho

    size, pixel, wavelength = data.shape[1], 75e-6, 1e-10
    step = wavelength * 1.0 / (size * pixel)
    places = np.column_stack([-corners[:, 1] * step, -corners[:, 0] * step, np.zeros(len(corners))])
    dataset = Ptycho2DDataset(
        torch.tensor(places, dtype=torch.float32), torch.tensor(np.fft.fftshift(data, axes=(1, 2))),
        wavelength=wavelength,
        detector_geometry={
            "distance": 1.0, "basis": np.array([[0, -pixel], [-pixel, 0], [0, 0]]), "corner": None,
        },
    )  # fmt: skip
    model = SimplePtycho.from_dataset(dataset)
    return lambda: list(model.Adam_optimize(1, dataset, lr=0.01, batch_size=10))


def ptylab(data, corners, probe, shape):
    """PtyLab's ePIE."""
    import numpy as np
    import PtyLab
    from PtyLab import Engines, ExperimentalData, Params, Reconstruction
    from PtyLab.Monitor.Monitor import DummyMonitor

    del PtyLab
    size, pixel, wavelength = data.shape[1], 75e-6, 1e-10
    step = wavelength * 1.0 / (size * pixel)
    experiment = ExperimentalData(operationMode="CPM")
    experiment.ptychogram = np.fft.fftshift(data, axes=(1, 2))
    experiment.wavelength, experiment.dxd, experiment.zo = wavelength, pixel, 1.0
    experiment.encoder = (corners - corners.mean(axis=0)) * step
    experiment.entrancePupilDiameter = size / 4 * step
    experiment._setData()
    experiment.theta = None
    params = Params()
    params.propagatorType, params.gpuSwitch = "Fraunhofer", False
    reconstruction = Reconstruction(experiment, params)
    reconstruction.initializeObjectProbe()
    engine = Engines.ePIE(reconstruction, experiment, params, DummyMonitor())
    engine.numIterations = 1
    return lambda: engine.reconstruct()


def ptychi(data, corners, probe, shape):
    """pty-chi's ePIE, one frame at a time."""
    import torch
    from ptychi.api import EPIEOptions
    from ptychi.api.task import PtychographyTask

    torch.set_default_device("cpu")
    options = EPIEOptions()
    options.data_options.data = data
    options.object_options.initial_guess = torch.ones(
        (1, *[int(n) + 20 for n in shape]), dtype=torch.complex64
    )
    options.object_options.pixel_size_m = 1e-8
    options.probe_options.initial_guess = torch.tensor(probe[None, None])
    places = corners - corners.mean(axis=0)
    options.probe_position_options.position_y_px = places[:, 0]
    options.probe_position_options.position_x_px = places[:, 1]
    options.reconstructor_options.batch_size = 1
    options.reconstructor_options.num_epochs = 10**6
    options.reconstructor_options.default_device = "cpu"
    task = PtychographyTask(options)
    return lambda: task.run(1)


def whole(scan, **options):
    """Calibrate from the first sweep to the finish; tell elapsed and processor seconds and memory."""
    from bcmi_beamline.reconstruction.ptychography import calibrate

    begun = time.perf_counter(), time.process_time()
    found = calibrate(scan, **options)
    wall, used = time.perf_counter() - begun[0], time.process_time() - begun[1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count, ny, nx = scan.frames.shape
    told = ", ".join(f"{name} {value}" for name, value in options.items())
    print(f"{count} frames of {ny} x {nx}, {told}: R2 {found.r2[-1]:.4f}")
    print(f"{wall:.0f} s elapsed, {used:.0f} s of processors, {memory:.2f} GiB at most")
    return found


def simulated(preset: str, seed: int | None, extent: list[float] | None):
    """Scan of a preset's calibration with everything that is in the way switched on, its twin, and states."""
    from bcmi_beamline.config import load_beamline, load_preset
    from bcmi_beamline.scans import PtychographyScan
    from bcmi_beamline.sim import Twin, simulate_ptychography

    chosen = load_preset(preset)
    changed = {"position_error_nm": 20.0, "drift_nm_per_s": (0.6, 0.8, 0.0), "coherence_modes": 2}
    if seed is not None:
        changed["seed"] = seed
    sim = chosen.sim.model_copy(update={"nuisances": chosen.sim.nuisances.model_copy(update=changed)})
    plan = chosen.plan.model_copy(update={"spiral_extent_um": tuple(extent)} if extent else {})
    chosen = chosen.model_copy(update={"sim": sim, "plan": plan})
    twin = Twin(load_beamline(), chosen)
    made = simulate_ptychography(twin.beamline, chosen, twin=twin)
    optics = made.geometry
    scan = PtychographyScan(
        made.frames, made.positions, made.mask, optics.wavelength, optics.propagation_distance,
        optics.pixel_size, optics.modulator_distance, flux=made.flux,
    )  # fmt: skip
    return scan, twin, made


def judge(found, twin, made) -> None:
    """Print how far a calibration is from the truth; a shift of the whole map, and a factor, are free."""
    import numpy as np
    from scipy import ndimage
    from scipy.optimize import minimize

    fine, size = 10e-9, 2 * round(found.transmission.shape[0] * found.pixel_size / 10e-9 / 2)
    truth = np.fft.fft2(twin.truth_modulator(fine, (size, size)))
    band = np.abs(np.fft.fftfreq(size, fine)) < 0.5 / found.pixel_size
    truth = np.fft.ifft2(truth * band[:, None] * band)
    parts = [ndimage.spline_filter(p) for p in (truth.real, truth.imag)]
    lit, pixel = found.trusted, found.pixel_size
    rows, columns = (np.nonzero(np.ones_like(lit))[a].reshape(lit.shape) for a in (0, 1))
    x, y = np.subtract(found.centre, made.modulator_position)

    def there(shift, where):
        """The true map on pixels `where` of the found one, moved by (row, column) metres."""
        at = [
            size // 2 + ((rows[where] - lit.shape[0] // 2) * pixel + y - shift[0]) / fine,
            size // 2 + ((columns[where] - lit.shape[1] // 2) * pixel - x - shift[1]) / fine,
        ]
        real, imaginary = (ndimage.map_coordinates(p, at, prefilter=False) for p in parts)
        return real + 1j * imaginary

    def alike(shift, where) -> float:
        a, b = there(shift, where), found.transmission[where]
        return float(np.abs(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b))

    whole_map = np.fft.fft2(there((0, 0), np.ones_like(lit)).reshape(lit.shape) * lit)
    product = np.fft.ifft2(np.fft.fft2(np.where(lit, found.transmission, 0)) * whole_map.conj())
    peak = np.unravel_index(np.abs(product).argmax(), lit.shape)
    start = [(k if k < n / 2 else k - n) * pixel * 1e9 for k, n in zip(peak, lit.shape, strict=True)]
    sparse = lit & (rows % 3 == 0) & (columns % 3 == 0)
    simplex = np.add(start, [[0, 0], [15, 0], [0, 15]])
    best = minimize(
        lambda nm: -alike(nm * 1e-9, sparse), start, method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 0.3, "fatol": 1e-6},
    )  # fmt: skip
    true = np.array([state.position for state in made.states])
    true -= (np.array([state.crystal for state in made.states]) @ twin.geometry.detector_frame.T)[:, :2]
    off = found.positions - true
    away = (found.sample_distance - twin.truth_distance()) * 1e6
    print(
        f"correlation {alike(best.x * 1e-9, lit):.4f}, phase step {found.metadata['phase_step_rad']:.4f} rad"
    )
    print(f"d1 - truth {away:+.2f} +- {found.sample_distance_error * 1e6:.2f} um")
    print(f"positions {(off - off.mean(axis=0)).std() * 1e9:.2f} nm rms")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("frames", 200), ("size", 256), ("passes", 5), ("threads", 2)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument(
        "--only", nargs="+", help="of floor, ours_epie, ours_engine, cdtools, ptylab, ptychi"
    )
    arguments.add_argument("--scan", help="a CXI file to calibrate as a whole")
    arguments.add_argument("--preset", help="simulate the calibration of a preset and judge it by the truth")
    arguments.add_argument("--seed", type=int, help="of the noise and the errors of the simulation")
    arguments.add_argument("--extent", type=float, nargs=2, metavar=("X", "Y"), help="of the spiral, um")
    for name, default in (("modes", 2), ("iterations", 6), ("variations", 0)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    asked = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    if hasattr(os, "sched_setaffinity"):  # before anything counts processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked.threads])
    warnings.simplefilter("ignore")
    options = {name: getattr(asked, name) for name in ("modes", "iterations", "variations")}
    if asked.scan:
        from bcmi_beamline.data import read_cxi
        from bcmi_beamline.scans import PtychographyScan

        scan = read_cxi(asked.scan)
        if not isinstance(scan, PtychographyScan):
            raise SystemExit(f"{asked.scan} holds no ptychographic scan")
        whole(scan, **options)
        return
    if asked.preset:
        scan, *truth = simulated(asked.preset, asked.seed, asked.extent)
        judge(whole(scan, **options), *truth)
        return
    made = scene(asked.frames, asked.size)
    print(f"{asked.frames} frames of {asked.size} x {asked.size}, {asked.threads} threads")
    for make in (floor, ours_epie, ours_engine, cdtools, ptylab, ptychi):
        if asked.only and make.__name__ not in asked.only:
            continue
        try:
            wall, used = timed(make(*made), asked.passes)
        except ImportError as error:
            print(f"{make.__name__:12} not installed ({error.name})")
        except Exception as error:  # a peer that has changed must not hide the others
            print(f"{make.__name__:12} failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        else:
            told = f"{wall:.3f} s per pass, {used:.3f} s of processors"
            print(f"{make.__name__:12} {told}", flush=True)


if __name__ == "__main__":
    main()
