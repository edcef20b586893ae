"""Tomorrow's plan file, tried tonight: dry run, then the whole of it on the simulated beamline, headless.

What `bcmi rehearse` and a beamline's continuous integration call. Exit status and a short report say whether
the file may go to the beamline.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bcmi_beamline.config import Beamline

Plan = Callable[..., Generator[Any, Any, Any]]


@dataclass
class PlanReport:
    """What became of one plan of the file."""

    plan: str
    dry_run: dict[str, Any]
    """Numbers of the dry run: duration, frames, disk, problems."""
    problems: list[str] = field(default_factory=list)
    """Everything that speaks against it, in words; empty when it may run at the beamline."""
    runs: int = 0
    documents: int = 0
    frames: int = 0
    seconds: float = 0.0
    """Wall clock on the simulated beamline."""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**asdict(self), "passed": self.passed}


def plans_of_file(path: Path) -> dict[str, Plan]:
    """The plans that a Python file defines: its public generator functions that take ``devices`` first.

    Raises
    ------
    ValueError
        When the file cannot be imported or defines none, in one line that says why.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from None
    plans = {
        name: value
        for name, value in vars(module).items()
        if inspect.isgeneratorfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and next(iter(inspect.signature(value).parameters), None) == "devices"
    }
    if not plans:
        raise ValueError(f"{path}: defines no plan; write e.g. def tomorrow(devices): yield from ...")
    return plans


class DocumentCheck:
    """A callback that counts documents and holds each against its event-model schema."""

    def __init__(self) -> None:
        from event_model import DocumentNames, schema_validators

        self._validators = {name.name: schema_validators[name] for name in DocumentNames}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.frames = 0

    def __call__(self, name: str, doc: dict[str, Any]) -> None:
        """Take one document."""
        self.counts[name] += 1
        for error in self._validators[name].iter_errors(doc):
            self.problems.append(f"a {name} document is not valid: {error.message}")
        if name == "stop" and doc["exit_status"] != "success":
            run, reason = doc["run_start"][:8], doc.get("reason", "")
            self.problems.append(f"run {run} ended with {doc['exit_status']}: {reason}")
        if name == "event":
            self.frames += "eiger_total" in doc["data"]


def rehearse(
    plans: dict[str, Plan],
    beamline: Beamline,
    *,
    simulate: str = "small",
    arguments: dict[str, Any] | None = None,
    time_scale: float = 0.002,
    directory: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> list[PlanReport]:
    """Dry run of every plan; those without a problem then run on the simulated beamline.

    Parameters
    ----------
    plans : dict
        As from `plans_of_file`.
    beamline : Beamline
        The configuration that the plans are meant for; the simulated beamline is made of it.
    simulate : str
        Preset of the simulated experiment.
    arguments : dict, optional
        For every plan.
    time_scale : float
        Wall-clock seconds per second of exposure and motion.
    directory : path, optional
        Keeps frames and documents; a temporary folder, removed, where absent.
    progress : callable, optional
        Takes (fraction, message).

    Returns
    -------
    list of PlanReport
        In the order of the file.
    """
    from bcmi_beamline.plans import dry_run

    reports = []
    for name, plan in plans.items():
        dry = dry_run(plan, beamline, **(arguments or {}))
        reports.append(PlanReport(name, dry.to_dict(), [f"dry run: {problem}" for problem in dry.problems]))
    fit = [report for report in reports if report.passed]
    if not fit:
        return reports
    folder = Path(tempfile.mkdtemp(prefix="bcmi-rehearsal-")) if directory is None else directory
    try:
        _run_on_twin(fit, plans, arguments or {}, beamline, simulate, time_scale, folder, progress)
    finally:
        if directory is None:
            shutil.rmtree(folder, ignore_errors=True)
    return reports


def _run_on_twin(reports, plans, arguments, beamline, simulate, time_scale, folder, progress) -> None:
    from bcmi_beamline.session import open_session

    with open_session(beamline, folder, simulate=simulate, time_scale=time_scale) as session:
        for i, report in enumerate(reports):
            if progress is not None:
                progress(i / len(reports), report.plan)
            check = DocumentCheck()
            token = session.RE.subscribe(check)
            began = time.monotonic()
            try:
                session.run(plans[report.plan](session.devices, **arguments))
            except Exception as error:
                report.problems.append(f"{type(error).__name__}: {_one_line(error)}")
            session.RE.unsubscribe(token)
            report.seconds = round(time.monotonic() - began, 2)
            report.runs, report.documents = check.counts["start"], check.counts.total()
            report.frames = check.frames
            report.problems += check.problems
            if session.devices.shutter.is_open:
                report.problems.append("the shutter is open after the plan")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
