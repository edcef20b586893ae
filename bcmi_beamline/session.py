"""The one place where RunEngine, devices, storage and callbacks are wired.

IPython, the queue server, the command line and the tests all open a `Session`::

    with open_session(simulate="small") as session:
        result = session.run(rocking_scan(session.devices, ...))
        scan = load(session.catalog.client[-1])

Channel Access reads its environment when pyepics is first imported, so everything that imports it is
imported inside the functions here, after the simulated beamline has claimed its ports.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
import threading
from collections import UserDict
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bcmi_beamline.config import Beamline, ConfigError, Preset, load_beamline, load_preset

if TYPE_CHECKING:
    from bluesky import RunEngine

    from bcmi_beamline.data import Catalog, DiskWatch, DocumentLog
    from bcmi_beamline.devices import Devices
    from bcmi_beamline.sim.launch import SimulatedBeamline

Progress = Callable[[float, str], None]

SWITCH_INTERVAL_S = 0.001
"""A thread hands the interpreter over this soon: what Channel Access brings does not wait Python's 5 ms for
the one that stores documents."""

_LONGEST_RESULT = 16
"""Sequences longer than this are curves, not numbers."""


class PlanInterrupted(RuntimeError):
    """The operator stopped the plan; the hardware was left in its safe state."""


class StoredMetadata(UserDict):
    """Metadata of every run to come (scan id, sample, proposal), kept in one JSON file between sessions.

    Parameters
    ----------
    path : path
        Read when it exists; rewritten, whole or not at all, at every change.

    Raises
    ------
    ConfigError
        When the file is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        if path.exists():
            try:
                self.data = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}: not a JSON object ({error}); mend or remove it") from None

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._store()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._store()

    def _store(self) -> None:
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=2) + "\n")
        beside.replace(self._path)


class RunProgress:
    """A document callback that reports the fraction of a run's points done.

    Parameters
    ----------
    report : callable
        Called with (fraction, one-line message) at the start, at most once per point, and at the end.
    """

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._points = 0
        self._done = 0
        self._name = ""
        self._primary = ""

    def __call__(self, name: str, doc: dict[str, Any]) -> None:
        """Take one document."""
        if name == "start":
            self._name = doc.get("scan_kind") or doc.get("plan_name", "run")
            self._points, self._done = doc.get("num_points") or 0, 0
            self._report(0.0, self._name)
        elif name == "descriptor" and doc["name"] == "primary":
            self._primary = doc["uid"]
        elif name == "event" and doc["descriptor"] == self._primary:
            self._done += 1
            counts = doc["data"].get("eiger_total")
            message = f"{self._name}: point {self._done}" + (f" of {self._points}" if self._points else "")
            if counts is not None:
                message += f", {counts:.3g} counts"
            self._report(min(1.0, self._done / self._points) if self._points else 0.0, message)
        elif name == "stop":
            self._report(1.0, f"{self._name}: {doc['exit_status']}")


class Session:
    """An open beamline: RunEngine, devices, catalogue and document log. Made by `open_session`."""

    def __init__(
        self,
        beamline: Beamline,
        directory: Path,
        RE: RunEngine,
        devices: Devices,
        catalog: Catalog,
        log: DocumentLog,
        disk: DiskWatch,
        twin: SimulatedBeamline | None,
        stack: ExitStack,
    ) -> None:
        self.beamline = beamline
        self.directory = directory
        self.RE = RE
        self.devices = devices
        self.catalog = catalog
        self.log = log
        self.disk = disk
        self.twin = twin
        self._stack = stack

    def run(self, plan: Generator[Any, Any, Any], progress: Progress | None = None, **metadata: Any) -> Any:
        """Run `plan` to its end and return what it returns.

        Raises
        ------
        PlanInterrupted
            When the operator pressed Ctrl-C: the plan is aborted, which runs its safe-state clean-up.
        """
        from bluesky.utils import RunEngineInterrupted

        subscriptions: Any = [RunProgress(progress)] if progress else []
        try:
            result: Any = self.RE(plan, subscriptions, **metadata)
        except RunEngineInterrupted:
            if self.RE.state != "idle":
                self.RE.abort("interrupted by the operator")
            raise PlanInterrupted("stopped by the operator; shutter closed, detector disarmed") from None
        return result.plan_result

    def resume(self, uid: str) -> Generator[Any, Any, Any]:
        """Plan that takes what an interrupted rocking or calibration scan has left.

        Everything it needs is in the run's own documents: it arms again, takes the missing angles or
        positions, and ``load`` of the new run gives the whole scan.

        Parameters
        ----------
        uid : str
            Of the run, or its beginning; after a second interruption that of the last one.

        Raises
        ------
        ConfigError
            When that run is not one that can be resumed, or is complete.
        """
        from bcmi_beamline.data import read_log

        start: dict[str, Any] = {}
        primary, done = "", 0
        for name, doc in read_log(self.log.path(uid)):
            if name == "start":
                start = doc
            elif name == "descriptor" and doc["name"] == "primary":
                primary = doc["uid"]
            elif name == "event" and doc["descriptor"] == primary:
                done += not doc["data"].get("sentinel", 0)
        plan = list_plans().get(start.get("plan_name", ""))
        if plan is None or "plan_arguments" not in start:
            raise ConfigError(f"run {uid[:8]} of {start.get('plan_name')!r} cannot be resumed: take it again")
        done += start.get("points_before", 0)
        if done >= start["points_total"]:
            raise ConfigError(f"run {uid[:8]} has all its {done} points: there is nothing to resume")
        arguments = start["plan_arguments"]
        return plan(self.devices, **arguments, continues=start["uid"], points_done=done)

    def calibration(self, path: str | Path) -> dict[str, Any]:
        """Provenance of a modulator's file, for a scan's ``calibration``: uid, hash, and what it holds for.

        The crystal, energy, distance and pose are those of its run, where the document log has it.

        Raises
        ------
        FileError
            When the file cannot be used.
        ConfigError
            When it does not tell its run.
        """
        from bcmi_beamline.data import FileError, read_log, read_modulator, sha256

        uid = read_modulator(path).metadata.get("run_uid")
        if not uid:
            raise ConfigError(f"{path}: does not tell the run it comes from; calibrate from a run's uid")
        reference = {"uid": uid, "sha256": sha256(path)}
        try:
            _, start = next(read_log(self.log.path(uid)))
        except (FileError, StopIteration):
            return reference
        return reference | {
            "crystal": start.get("sample"),
            "energy_ev": start["geometry"]["energy_ev"],
            "distance_um": start["geometry"]["modulator_distance"] * 1e6,
            "modulator_position_um": start["modulator_position_um"],
        }

    def flush(self, timeout_s: float = 120.0) -> None:
        """Wait until every document so far is in the catalogue."""
        self.catalog.flush(timeout_s)

    def close(self) -> None:
        """Store what is pending, then stop everything this session started."""
        self._stack.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "simulated" if self.twin else "live"
        return f"Session({self.beamline.name}, {where}, data in {self.directory})"


def open_session(
    beamline: str | Path | Beamline = "sim-id01",
    directory: str | Path = "bcmi-data",
    *,
    simulate: str | Path | Preset | None = None,
    time_scale: float | None = None,
    connect_timeout_s: float = 15.0,
) -> Session:
    """Wire one beamline and return it ready to run plans.

    Parameters
    ----------
    beamline : str, path or Beamline
        Name of a shipped configuration, a TOML file, or one already loaded.
    directory : path
        Where the catalogue, the document log and, for the simulated beamline, the frames are kept.
    simulate : str, path or Preset, optional
        Start the simulated beamline with this preset and stop it with the session.
    time_scale : float, optional
        Wall-clock seconds per beamline second of the simulated beamline; the preset's where absent.
    connect_timeout_s : float
        How long devices may take to answer, s.

    Raises
    ------
    ConfigError
        When a configuration cannot be used.
    ConnectionError
        One error that lists every device that did not answer, with its process variables.
    """
    source = beamline
    beamline = beamline if isinstance(beamline, Beamline) else load_beamline(beamline)
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    stack = ExitStack()
    try:
        return _wire(source, beamline, directory, simulate, time_scale, connect_timeout_s, stack)
    except BaseException:
        stack.close()
        raise


def _wire(source, beamline, directory, simulate, time_scale, connect_timeout_s, stack) -> Session:
    from bcmi_beamline.data import DocumentLog, open_catalog

    stack.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    readable = [Path("/")] if simulate is None else [directory / "frames"]
    log = DocumentLog(directory / "documents")
    catalog = stack.enter_context(open_catalog(directory / "catalog", readable=readable, log=log))
    twin = None
    if simulate is not None:
        from bcmi_beamline.sim.launch import SimulatedBeamline, claim_ports

        preset = simulate if isinstance(simulate, Preset) else load_preset(simulate)
        if "EPICS_CA_SERVER_PORT" not in os.environ:
            claim_ports()
        frames = directory / "frames"
        frames.mkdir(exist_ok=True)
        twin = stack.enter_context(
            SimulatedBeamline(preset, beamline=source, data_dir=frames, time_scale=time_scale)
        )
        # entered after the twin, so left before it: its going is no news to anybody
        stack.callback(hush_channel_access)

    from bluesky import RunEngine
    from bluesky.preprocessors import SupplementalData

    from bcmi_beamline.devices import connect, make_devices

    devices = make_devices(beamline)
    connect(devices, connect_timeout_s)
    in_main_thread = threading.current_thread() is threading.main_thread()
    options: dict[str, Any] = {} if in_main_thread else {"context_managers": []}
    metadata: Any = StoredMetadata(directory / "metadata.json")
    RE = RunEngine(metadata, call_returns_result=True, **options)
    RE.md["beamline"] = beamline.name
    RE.subscribe(log)  # first: what is on disk can always be replayed
    RE.subscribe(catalog.writer)
    RE.preprocessors.append(SupplementalData(baseline=list(devices.conditions())))
    for suspender in make_suspenders(devices):
        RE.install_suspender(suspender)
    disk = _watch_disk(directory, devices)
    RE.preprocessors.append(disk)
    return Session(beamline, directory, RE, devices, catalog, log, disk, twin, stack)


def make_suspenders(devices: Devices) -> list[Any]:
    """What holds the RunEngine while there is no beam: floors of ring current and monitor, as configured.

    A plan that is held goes on by itself from the point it was at, once the beam has been back (5 % above the
    floor) for the time configured.
    """
    from bluesky.suspenders import SuspendFloor

    config = devices.beamline.suspend
    if config is None:
        return []
    watched = (
        (devices.ring_current, config.ring_current_ma, "ring current", "mA"),
        (devices.monitor.flux, config.monitor_flux, "flux", "photons/s"),
    )
    return [
        SuspendFloor(
            signal,
            floor,
            resume_thresh=1.05 * floor,
            sleep=config.settle_s,
            tripped_message=f"{what} below {floor:g} {unit}",
        )
        for signal, floor, what, unit in watched
        if floor is not None
    ]


def _watch_disk(directory: Path, devices: Devices) -> DiskWatch:
    """Watch the session's folder and the one that the detector writes into."""
    from bcmi_beamline.data import DiskWatch
    from bcmi_beamline.plans.dry_run import COMPRESSED

    def folders() -> list[Path]:
        return [directory, Path(str(devices.eiger.cam.file_path.get()))]

    eiger = devices.beamline.eiger
    frame_bytes = eiger.rows * eiger.columns * eiger.bit_depth / 8 * COMPRESSED
    return DiskWatch(folders, frame_bytes, shutter=devices.shutter)


def hush_channel_access() -> None:
    """Keep libca from printing that its server is gone while we stop that server ourselves."""
    import epics

    epics.ca.replace_printf_handler()


def session_from_environment() -> Session:
    """Open the session that the environment describes; what the startup files and the queue server call.

    ``BCMI_BEAMLINE`` names the configuration (default ``sim-id01``), ``BCMI_DIRECTORY`` the data folder
    (default ``bcmi-data``), and ``BCMI_SIM`` a preset: then the simulated beamline is started with the
    session.
    """
    return open_session(
        os.environ.get("BCMI_BEAMLINE", "sim-id01"),
        os.environ.get("BCMI_DIRECTORY", "bcmi-data"),
        simulate=os.environ.get("BCMI_SIM") or None,
    )


def result_numbers(result: Any) -> Any:
    """A plan's result as JSON: its fields without arrays, None where nothing is left.

    The curves behind a fit stay in the runs.
    """
    if isinstance(result, bool | int | str):
        return result
    if isinstance(result, float | np.floating):
        return float(result) if np.isfinite(result) else None
    if isinstance(result, np.integer):
        return int(result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        found = {str(key): result_numbers(value) for key, value in result.items()}
        return {key: value for key, value in found.items() if value is not None} or None
    if isinstance(result, tuple | list) and len(result) <= _LONGEST_RESULT:
        found = [result_numbers(value) for value in result]
        return found if found and None not in found else None
    return None


def list_plans() -> dict[str, Callable[..., Generator]]:
    """Every plan that takes the beamline's devices first, by name."""
    from bcmi_beamline import plans

    found = {}
    for name in plans.__all__:
        plan = getattr(plans, name)
        if inspect.isgeneratorfunction(plan) and next(iter(inspect.signature(plan).parameters)) == "devices":
            found[name] = plan
    return found


def bind_plans(
    devices: Devices, metadata: MutableMapping[str, Any] | None = None
) -> dict[str, Callable[..., Generator]]:
    """Every plan of the package with `devices` filled in, as one types it at the prompt.

    The queue server learns the bounds of their parameters from them and refuses what lies outside.

    Parameters
    ----------
    devices : Devices
    metadata : mutable mapping, optional
        A RunEngine's. What a plan has found goes under its name into ``results`` there, and with that into
        the start document of every later run.
    """
    from bluesky_queueserver import parameter_annotation_decorator

    from bcmi_beamline.plans.bounds import parameter_bounds

    bounds = parameter_bounds(devices.beamline)

    def bind(plan: Callable[..., Generator]) -> Callable[..., Generator]:
        @functools.wraps(plan)
        def bound(*args: Any, **kwargs: Any) -> Generator:
            result = yield from plan(devices, *args, **kwargs)
            if metadata is not None and (found := result_numbers(result)) is not None:
                metadata["results"] = {**metadata.get("results", {}), plan.__name__: found}
            return result

        signature = inspect.signature(plan)
        without = [p for name, p in signature.parameters.items() if name != "devices"]
        bound.__signature__ = signature.replace(parameters=without)  # pyright: ignore[reportAttributeAccessIssue]
        limited = {p.name: bounds[p.name] for p in without if p.name in bounds}
        ranges = {name: {"min": low, "max": high} for name, (low, high) in limited.items()}
        return parameter_annotation_decorator({"parameters": ranges})(bound)

    return {name: bind(plan) for name, plan in list_plans().items()}
