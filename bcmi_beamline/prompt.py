"""What makes an IPython session pleasant: live table and plots, a line of progress, dry runs.

Nothing here is needed to measure; the queue server's worker takes the live table only.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from bcmi_beamline.devices import Devices
    from bcmi_beamline.session import Session

_REDRAW_S = 0.1
_CLEAR = "\r\x1b[2K"


class ProgressLine:
    """One line at the bottom of the terminal: how far the scan is, what moves and where it is.

    Give it to a RunEngine as ``waiting_hook``; it is drawn while the engine waits and gone when it does not,
    so that tables print undisturbed. Give `scan` to `bcmi_beamline.session.RunProgress`.

    Parameters
    ----------
    stream : text stream
        A terminal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._lock = threading.Lock()
        self._scan = ""
        self._moves: dict[str, str] = {}
        self._waiting = False
        self._drawn = 0.0

    def scan(self, fraction: float, message: str) -> None:
        """Take the progress of a scan."""
        done = round(20 * fraction)
        self._scan = f"[{'=' * done}{' ' * (20 - done)}] {message}" if 0 < fraction < 1 else ""

    def __call__(self, statuses: Iterable[Any] | None) -> None:
        """Take what the engine waits for; None when it waits no longer."""
        with self._lock:
            self._waiting = statuses is not None
            self._moves.clear()
            if statuses is None:
                self._erase()
                return
        for status in statuses:
            if hasattr(status, "watch"):
                status.watch(self._follow)

    def _follow(self, *, name=None, current=None, target=None, unit="", **_: Any) -> None:
        """Take news of one move; ophyd calls this from its own threads."""
        if current is None or target is None:
            return
        with self._lock:
            if not self._waiting:
                return
            self._moves[str(name)] = f"{name} {current:.5g} -> {target:.5g} {unit}"
            if time.monotonic() - self._drawn > _REDRAW_S:
                self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        parts = [part for part in (self._scan, *self._moves.values()) if part]
        self._stream.write(_CLEAR + "   ".join(parts)[:150])
        self._stream.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = 0.0
            self._stream.write(_CLEAR)
            self._stream.flush()


def install_displays(session: Session) -> None:
    """Give a session its live table and, at a prompt, plots and the line of progress.

    In the queue server's worker nobody looks: there is the table alone, in the console that it publishes.
    """
    from bluesky.callbacks.best_effort import BestEffortCallback
    from bluesky_queueserver import is_re_worker_active

    from bcmi_beamline.session import RunProgress

    best_effort = BestEffortCallback()
    best_effort.disable_baseline()  # stored with every run; two dozen lines a scan are no help at a prompt
    if is_re_worker_active() or not _has_window():
        best_effort.disable_plots()
    session.RE.subscribe(best_effort)
    if not is_re_worker_active() and sys.stdout.isatty():
        line = ProgressLine()
        session.RE.waiting_hook = line  # pyright: ignore[reportAttributeAccessIssue]
        session.RE.subscribe(RunProgress(line.scan))


def _has_window() -> bool:
    """Whether matplotlib can open one."""
    import matplotlib

    return matplotlib.get_backend().lower() not in ("agg", "pdf", "svg", "ps", "template")


def bound_dry_run(session: Session) -> Callable[..., Any]:
    """``dry_run(plan, **arguments)`` for the prompt: from where the beamline stands now, moving nothing."""
    from bcmi_beamline.plans import dry_run
    from bcmi_beamline.session import list_plans

    plans = list_plans()

    def rehearse(plan: Callable[..., Any] | str, **arguments: Any) -> Any:
        """Tell duration, frames, disk, dose and problems of a plan without doing any of it.

        Parameters
        ----------
        plan : callable or str
            A plan of the package or its name: ``dry_run(rocking_scan, exposure_s=0.5)``.
        **arguments
            Of the plan.
        """
        name = plan if isinstance(plan, str) else plan.__name__
        if name not in plans:
            raise ValueError(f"no plan named {name!r}: choose from {', '.join(sorted(plans))}")
        return dry_run(plans[name], session.beamline, start=_positions(session.devices), **arguments)

    return rehearse


def _positions(devices: Devices) -> dict[str, float]:
    """Where every motor of the stages and circles stands, by name."""
    stages = (devices.diffractometer, devices.nanogoniometer, devices.sample_stage)
    parts = [getattr(stage, name) for stage in stages for name in stage.component_names]
    return {part.name: float(part.position) for part in parts if hasattr(part, "position")}
