"""The whole experiment on the simulated beamline, from motors to a picture of the crystal.

`run_demo` performs the paper's three acts over Channel Access, reconstructs from the catalogue with the
modulator and distance that the calibration found, and only then opens the truth to compare.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcmi_beamline.config import Beamline, Preset, load_beamline, load_preset
from bcmi_beamline.scans import Modulator, PtychographyScan, Reconstruction, RockingScan

if TYPE_CHECKING:
    from bcmi_beamline.plans import ExperimentResult
    from bcmi_beamline.reconstruction.metrics import Comparison

Progress = Callable[[float, str], None]
Stage = Callable[[str], AbstractContextManager[Progress]]
"""Opens a named stage of work and yields its progress callback."""

TITLES = {
    "bragg_peak": "Finding the Bragg peak",
    "alignment": "Aligning the modulator",
    "ptychography": "Scanning the modulator (spiral)",
    "rocking": "Rocking the crystal",
}

ALIGNMENT_TITLES = {
    "search": "Aligning: looking for the pattern",
    "edges": "Aligning: centring the pattern in {}",
    "z_walk": "Aligning: following its edges over z",
    "sharpness": "Aligning: sharpness over {}",
}


@dataclass
class Measured:
    """What the beamline gave: the plan's result and the three scans from the catalogue."""

    experiment: ExperimentResult
    calibration: PtychographyScan
    rocking_in: RockingScan
    rocking_out: RockingScan


@dataclass
class Found:
    """What the reconstruction made of it."""

    modulator: Modulator
    bcmi: Reconstruction
    bcdi: Reconstruction


@dataclass
class Truth:
    """What was hidden, and how what was found compares with it."""

    crystal: Reconstruction
    d1_um: float
    hidden: dict[str, Any]
    bcmi: Comparison
    bcdi: Comparison


class _Clock:
    """Seconds spent per part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - begin, 2)


class _RunStages:
    """Document callback: one stage of the display per run."""

    def __init__(self, stage: Stage) -> None:
        from bcmi_beamline.session import RunProgress

        self._stage = stage
        self._open: AbstractContextManager[Progress] | None = None
        self._report: Progress = lambda fraction, message: None
        self._points = RunProgress(lambda fraction, message: self._report(fraction, message))

    def __call__(self, name: str, doc: dict[str, Any]) -> None:
        if name == "start":
            kind = doc["scan_kind"]
            title: str = TITLES.get(kind, str(kind))
            if kind == "alignment":
                method, axis = doc["alignment"]["method"], doc["alignment"]["axis"]
                title = ALIGNMENT_TITLES.get(method, title).format(axis)
            if kind == "rocking":
                title += f", modulator {doc['modulator']}"
            self._open = self._stage(title)
            self._report = self._open.__enter__()
        self._points(name, doc)
        if name == "stop" and self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def run_demo(preset_name: str, out: Path, stage: Stage, seed: int = 0) -> dict[str, Any]:
    """Measure, reconstruct, compare and report one preset on the simulated beamline.

    Parameters
    ----------
    preset_name : str
        Name of a shipped preset, or a TOML file.
    out : path
        Folder for ``report.html``, ``summary.json``, figures and CXI files; made if absent. The session's
        catalogue, documents and frames go to ``out/session``.
    stage : callable
        ``stage(title)`` is a context manager that yields a progress callback.
    seed : int
        Of every random start.

    Returns
    -------
    dict
        What ``summary.json`` holds.
    """
    preset, beamline = load_preset(preset_name), load_beamline()
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    measured = _measure(beamline, preset, out / "session", stage, clock)
    found = _reconstruct(measured, preset, stage, clock, seed)
    with clock("compare"), stage("Comparing with truth"):
        truth = _compare(beamline, preset, measured, found)
    with clock("write"), stage("Writing files and the report"):
        summary = _summarise(preset, measured, found, truth, seed)
        summary["seconds"] = clock.seconds
        _write(out, measured, found, truth, summary)
    summary["seconds"] = clock.seconds | {"total": round(sum(clock.seconds.values()), 2)}
    _write_json(out / "summary.json", summary)
    return summary


def _measure(beamline: Beamline, preset: Preset, directory: Path, stage: Stage, clock: _Clock) -> Measured:
    """The three acts over Channel Access, and the scans back from the catalogue."""
    with clock("start"), stage("Starting the simulated beamline"):
        from bcmi_beamline.session import open_session

        session = open_session(beamline, directory, simulate=preset)
    with session:
        from bcmi_beamline.data import load
        from bcmi_beamline.plans import bcmi_experiment

        session.RE.subscribe(_RunStages(stage))
        with clock("measure"):
            experiment = session.run(bcmi_experiment(session.devices, preset.plan))
        with clock("load"), stage("Reading the runs from the catalogue") as progress:
            session.flush()
            scans = []
            results = (experiment.calibration, experiment.rocking_in, experiment.rocking_out)
            for number, result in enumerate(results):
                progress(number / 3, f"run {result.uid[:8]}")
                scans.append(load(result.uid, session.catalog))
    return Measured(experiment, *scans)


def _reconstruct(measured: Measured, preset: Preset, stage: Stage, clock: _Clock, seed: int) -> Found:
    """Modulator first, then the crystal with it and without it."""
    from bcmi_beamline.reconstruction import conventional, modulation, ptychography

    plan = preset.plan
    with clock("calibrate"), stage("Calibrating the modulator (ptychography)") as progress:
        modulator = ptychography.calibrate(
            measured.calibration, iterations=plan.calibration_iterations, seed=seed, progress=progress
        )
    with clock("bcmi"), stage(f"Reconstructing, BCMI ({plan.bcmi_trials} random starts)") as progress:
        bcmi = modulation.reconstruct(
            measured.rocking_in, modulator, trials=plan.bcmi_trials, seed=seed, progress=progress
        )
    with clock("bcdi"), stage(f"Reconstructing, BCDI ({plan.bcdi_trials} random starts)") as progress:
        bcdi = conventional.reconstruct(
            measured.rocking_out, trials=plan.bcdi_trials, seed=seed, progress=progress
        )
    return Found(modulator, bcmi, bcdi)


def _compare(beamline: Beamline, preset: Preset, measured: Measured, found: Found) -> Truth:
    from bcmi_beamline.reconstruction.metrics import compare
    from bcmi_beamline.truth import true_distance, true_object

    crystal = true_object(beamline, preset)
    pose = measured.experiment.calibration.modulator_position_um
    return Truth(
        crystal=crystal,
        d1_um=true_distance(beamline, preset, pose) * 1e6,
        hidden=preset.sim.hidden.model_dump(),
        bcmi=compare(found.bcmi, crystal),
        bcdi=compare(found.bcdi, crystal),
    )


def _summarise(preset: Preset, measured: Measured, found: Found, truth: Truth, seed: int) -> dict[str, Any]:
    """Every number a reader asks for first; JSON-serialisable."""
    experiment = measured.experiment
    alignment, bragg = experiment.alignment, experiment.bragg
    quality = found.modulator.metadata

    def trials(result: Reconstruction) -> dict[str, Any]:
        final = [] if result.free_llk is None else np.atleast_2d(result.free_llk)[:, -1].tolist()
        weights = [] if result.mode_weights is None else result.mode_weights.tolist()
        return {"trial_free_llk": final, "mode_weights": weights}

    return {
        "preset": preset.name,
        "description": preset.description,
        "seed": seed,
        "bragg": {"peak_deg": bragg.peak_deg, "error_deg": bragg.peak_error_deg},
        "alignment": {
            key: getattr(alignment, key)
            for key in ("mchi_deg", "mchi_error_deg", "mphi_deg", "mphi_error_deg")
        },
        "calibration": {
            "points": len(measured.calibration.frames),
            "d1_um": found.modulator.sample_distance * 1e6,
            "d1_error_um": found.modulator.sample_distance_error * 1e6,
            **{k: v for k, v in quality.items() if isinstance(v, float | int)},
        },
        "bcmi": truth.bcmi.to_json() | trials(found.bcmi),
        "bcdi": truth.bcdi.to_json() | trials(found.bcdi),
        "truth": {"d1_um": truth.d1_um, "hidden": truth.hidden},
        "counts": {
            "rocking_in": float(measured.rocking_in.frames.sum(dtype=float)),
            "rocking_out": float(measured.rocking_out.frames.sum(dtype=float)),
        },
        "runs": {act: list(uids) for act, uids in experiment.uids.items()},
    }


def _write(out: Path, measured: Measured, found: Found, truth: Truth, summary: dict[str, Any]) -> None:
    from bcmi_beamline import data
    from bcmi_beamline.reconstruction.crystal_frame import crystal_frame
    from bcmi_beamline.report import experiment_page

    data.write_modulator(out / "modulator.cxi", found.modulator)
    data.write_reconstruction(out / "bcmi.cxi", found.bcmi, crystal_frame(found.bcmi))
    data.write_reconstruction(out / "bcdi.cxi", found.bcdi, crystal_frame(found.bcdi))
    data.write_reconstruction(out / "truth.cxi", truth.crystal)
    experiment_page(
        out / "report.html",
        summary,
        alignment={str(tilt): curve for tilt, curve in measured.experiment.alignment.curves.items()},
        scans={"modulator in": measured.rocking_in, "modulator out": measured.rocking_out},
        modulator=found.modulator,
        results={"BCMI": found.bcmi, "BCDI": found.bcdi},
        comparisons={"BCMI": truth.bcmi, "BCDI": truth.bcdi},
        truth=truth.crystal,
        figures_dir=out / "figures",
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    beside.replace(path)


def headline(summary: dict[str, Any]) -> dict[str, str]:
    """The few lines of a summary that go to a terminal."""
    alignment, calibration = summary["alignment"], summary["calibration"]
    lines = {
        "modulator tilt found": "Mchi {mchi_deg:+.2f} +- {mchi_error_deg:.2f}, "
        "Mphi {mphi_deg:+.2f} +- {mphi_error_deg:.2f} deg".format(**alignment),
        "d1 found": f"{calibration['d1_um']:.1f} +- {calibration['d1_error_um']:.1f} um "
        f"(truth {summary['truth']['d1_um']:.1f})",
    }
    if "phase_step_rad" in calibration:
        lines["tungsten phase step"] = f"{calibration['phase_step_rad']:.3f} rad"
    for method in ("bcmi", "bcdi"):
        result = summary[method]
        resolution = result["fsc_half_bit_half_period_nm"]
        shown = f"{resolution:.1f} nm" if resolution else "none"
        lines[method.upper()] = (
            f"{result['class']}, correlation with truth {result['correlation']:.4f}, with its twin "
            f"{result['correlation_twin']:.4f}, resolution {shown} (half period)"
        )
    lines["time"] = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in summary["seconds"].items())
    return lines
