"""What a plan will do, without doing it: duration, frames, disk, dose, limits and the path.

One mechanism for every plan: its messages are walked against stand-ins that know names and limits from the
configuration and nothing else. No device is made and no process variable is touched. Readings are answered
as an ideal beamline would (a Gaussian rocking curve at the nominal angle, a modulator that is sharpest at
zero tilt), so that plans that fit and decide run to their end.
"""

import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bluesky.utils import Msg, MsgGenerator

from bcmi_beamline.config import AxisConfig, Beamline
from bcmi_beamline.devices import EigerPlan, nominal_setting
from bcmi_beamline.devices.pose_math import AXES, beam_on_membrane, clearance

ARMING_S = 1.0
FRAME_OVERHEAD_S = 0.03
"""Trigger, file and document of one frame, beside its exposure."""
MOVE_OVERHEAD_S = 0.02
COMPRESSED = 0.03
"""Share of its raw size that a peaked frame takes on disk (bitshuffle-LZ4)."""


@dataclass
class DryRun:
    """What a plan would do."""

    plan: str
    duration_s: float
    frames: int
    exposure_s: float
    """Detector open, in all."""
    beam_s: float
    """Shutter open, in all: the dose in seconds of full beam."""
    disk_bytes: float
    runs: int
    path: dict[str, np.ndarray]
    """Position of every axis that moves at each frame, (frames,), by device name."""
    problems: tuple[str, ...]
    """What would be refused, in order; empty when the plan may run."""
    result: Any = field(repr=False, default=None)
    """What the plan returned on the ideal beamline."""

    def to_dict(self) -> dict[str, Any]:
        """Numbers and problems without the path; JSON-serialisable."""
        return {
            "plan": self.plan,
            "duration_s": round(self.duration_s, 1),
            "frames": self.frames,
            "exposure_s": round(self.exposure_s, 3),
            "beam_s": round(self.beam_s, 1),
            "disk_mb": round(self.disk_bytes / 1e6, 1),
            "runs": self.runs,
            "ranges": {name: [float(p.min()), float(p.max())] for name, p in self.path.items()},
            "problems": list(self.problems),
        }


class _StandIn:
    """Has the name and hints of a device, and its parts as attributes; can do nothing."""

    def __init__(self, name: str, limits: AxisConfig | None = None, **parts: Any) -> None:
        self.name = name
        self.limits = limits
        self.parent = None
        self.hints = {"fields": [name]}
        self.__dict__.update(parts)

    def __repr__(self) -> str:
        return self.name


def _axes(device: str, config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _StandIn(f"{device}_{name}", getattr(config, name)) for name in names}


def stand_in_devices(beamline: Beamline) -> Any:
    """Stand-ins with the structure and names of `bcmi_beamline.devices.Devices`."""
    circles = _axes("diffractometer", beamline.diffractometer, ("mu", "eta", "phi", "nu", "delta"))
    return _StandIn(
        "devices",
        beamline=beamline,
        nanogoniometer=_StandIn("nanogoniometer", **_axes("nanogoniometer", beamline.nanogoniometer, AXES)),
        diffractometer=_StandIn("diffractometer", rock=circles[beamline.rocking_circle], **circles),
        sample_stage=_StandIn(
            "sample_stage", **_axes("sample_stage", beamline.sample_stage, ("x", "y", "z"))
        ),
        eiger=_StandIn("eiger", cam=_StandIn("eiger_cam", count_cutoff=_StandIn("eiger_cam_count_cutoff"))),
        shutter=_StandIn("shutter"),
        monitor=_StandIn("monitor"),
        ring_current=_StandIn("ring_current"),
    )


class Rehearsal:
    """Follows messages, keeping time and positions; answers like an ideal beamline."""

    def __init__(self, beamline: Beamline, start: Mapping[str, float] | None) -> None:
        self.beamline = beamline
        self.at: dict[str, float] = {f"diffractometer_{k}": v for k, v in nominal_setting(beamline).items()}
        out = {"mchi": 0.0, "mphi": 0.0, **beamline.nanogoniometer.positions["out"]}
        self.at |= {f"nanogoniometer_{axis}": value for axis, value in out.items()}
        self.at |= {f"sample_stage_{axis}": 0.0 for axis in "xyz"}
        self.at |= {"shutter": 0.0, "ring_current": 100.0, "eiger_cam_count_cutoff": 2.0**31}
        unknown = set(start or {}) - set(self.at)
        if unknown:
            raise ValueError(
                f"start: no axis named {', '.join(sorted(unknown))}; choose from {', '.join(self.at)}"
            )
        self.at |= dict(start or {})
        self.time = self.exposure = self.beam = 0.0
        self.frames = self.runs = 0
        self.eiger = EigerPlan()
        self.pending: dict[Any, float] = defaultdict(float)
        self.moved: set[str] = set()
        self.path: list[dict[str, float]] = []
        self.problems: list[str] = []

    # -- time -------------------------------------------------------------------------------------
    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self.time += seconds
        self.beam += seconds * self.at["shutter"]

    # -- messages ---------------------------------------------------------------------------------
    def __call__(self, msg: Msg) -> Any:
        """Take one message and answer it."""
        handler = getattr(self, f"do_{msg.command}", None)
        return handler(msg) if handler else None

    def do_set(self, msg: Msg) -> None:
        """A move, timed by the distance and the velocity of the configuration."""
        name, value = msg.obj.name, float(msg.args[0])
        axis: AxisConfig | None = msg.obj.limits
        seconds = MOVE_OVERHEAD_S
        if axis is not None:
            if not axis.low <= value <= axis.high:
                self.problem(f"{name}: {value:g} {axis.unit} lies outside [{axis.low:g}, {axis.high:g}]")
            seconds += abs(value - self.at[name]) / axis.velocity
            self.moved.add(name)
        self.at[name] = value
        if name.startswith("nanogoniometer"):
            self.check_clearance()
        group = msg.kwargs.get("group")
        self.pending[group] = max(self.pending[group], seconds)

    def do_wait(self, msg: Msg) -> None:
        """The slowest of a group decides."""
        self.spend(self.pending.pop(msg.kwargs.get("group"), 0.0))

    def do_trigger(self, msg: Msg) -> None:
        """One frame."""
        self.frames += 1
        self.exposure += self.eiger.exposure_s
        group = msg.kwargs.get("group")
        self.pending[group] = max(self.pending[group], self.eiger.exposure_s + FRAME_OVERHEAD_S)
        self.path.append(dict(self.at))

    def do_prepare(self, msg: Msg) -> None:
        """What the next frames are like."""
        self.eiger = msg.args[0]

    def do_stage(self, msg: Msg) -> None:
        """Arming."""
        self.spend(ARMING_S)

    def do_sleep(self, msg: Msg) -> None:
        """Waiting."""
        self.spend(float(msg.args[0]))

    def do_open_run(self, msg: Msg) -> str:
        """A run begins; its uid."""
        self.runs += 1
        return str(uuid.uuid4())

    def do_read(self, msg: Msg) -> dict[str, dict[str, Any]]:
        """A reading of any device."""
        values = {"eiger": self.frame, "monitor": lambda: {"monitor_flux": 1e9}}.get(
            msg.obj.name, lambda: {msg.obj.name: self.at[msg.obj.name]}
        )()
        return {key: {"value": value, "timestamp": self.time} for key, value in values.items()}

    # -- the ideal beamline -------------------------------------------------------------------------
    def frame(self) -> dict[str, float]:
        """Statistics of a frame at the present positions."""
        rock = self.at[f"diffractometer_{self.beamline.rocking_circle}"]
        off_peak = (rock - self.beamline.reflection.rocking_nominal_deg) / 0.02
        off_beam = math.hypot(self.at["sample_stage_x"], self.at["sample_stage_y"]) / 0.6
        total = 1e6 * self.eiger.exposure_s * math.exp(-(off_peak**2 + off_beam**2) / 2)
        x, y = self.spot()
        ripple = 1 + 1e-3 * math.sin(12.9898 * self.frames)  # no fit is perfect
        patterned = (1 + math.tanh((20 - abs(x)) / 2)) * (1 + math.tanh((20 - abs(y)) / 2)) / 4
        sharp = {
            axis: 0.02 * ripple * (1 + patterned / (1 + (self.at[f"nanogoniometer_{tilt}"] / 2.5) ** 2))
            for axis, tilt in (("x", "mphi"), ("y", "mchi"))
        }
        return {
            "eiger_total": round(total) + 100,
            "eiger_max": round(total / 1000),
            "eiger_high_q_x": sharp["x"],
            "eiger_high_q_y": sharp["y"],
            "eiger_saturated": 0,
            "eiger_frame": self.frames - 1,
        }

    def pose(self) -> tuple[tuple[float, float, float], float, float]:
        """Translation and tilts of the nanogoniometer."""
        x, y, z, mchi, mphi = (self.at[f"nanogoniometer_{axis}"] for axis in AXES)
        return (x, y, z), mchi, mphi

    def spot(self) -> tuple[float, float]:
        """Where the beam meets the membrane, um."""
        spot, _ = beam_on_membrane(*self.pose(), self.beamline.nanogoniometer.pivot_um)
        return float(spot[0]), float(spot[1])

    def check_clearance(self) -> None:
        """Note when the modulator would come inside the stand-off."""
        nano = self.beamline.nanogoniometer
        (_, _, z), mchi, mphi = self.pose()
        gap = float(clearance(z, mchi, mphi, nano.pivot_um, nano.distance_at_z0_um))
        if gap < nano.stand_off_um:
            self.problem(
                f"nanogoniometer: {gap:.0f} um from the crystal at z {z:.0f} um, mchi {mchi:.2f}, mphi "
                f"{mphi:.2f} deg, inside the stand-off of {nano.stand_off_um:g} um"
            )

    def problem(self, text: str) -> None:
        """Note once."""
        if text not in self.problems:
            self.problems.append(text)


def dry_run(
    plan: Callable[..., MsgGenerator[Any]],
    beamline: Beamline,
    start: Mapping[str, float] | None = None,
    **arguments: Any,
) -> DryRun:
    """Rehearse `plan` from the configuration alone.

    Parameters
    ----------
    plan : callable
        A plan of this package, or any that takes devices first.
    beamline : Beamline
        Limits, velocities and named positions.
    start : mapping, optional
        Positions to begin from by device name (``nanogoniometer_z``); by default the nominal Bragg setting
        with the modulator out.
    **arguments
        Of the plan.

    Returns
    -------
    DryRun
        `problems` holds what the plan itself refused as well as limits met on the way.

    Examples
    --------
    >>> from bcmi_beamline.config import load_beamline
    >>> from bcmi_beamline.plans import dry_run, rocking_scan
    >>> dry_run(rocking_scan, load_beamline(), exposure_s=1.0).frames
    201
    """
    walker = Rehearsal(beamline, start)
    result = None
    try:
        messages = plan(stand_in_devices(beamline), **arguments)
        answer = None
        while True:
            answer = walker(messages.send(answer))
    except StopIteration as end:
        result = end.value
    except (ValueError, RuntimeError) as error:
        walker.problem(str(error))
    walker.spend(sum(walker.pending.values()))
    eiger = beamline.eiger
    names = sorted(walker.moved)
    return DryRun(
        plan=plan.__name__,
        duration_s=walker.time,
        frames=walker.frames,
        exposure_s=walker.exposure,
        beam_s=walker.beam,
        disk_bytes=walker.frames * eiger.rows * eiger.columns * eiger.bit_depth / 8 * COMPRESSED,
        runs=walker.runs,
        path={name: np.array([point[name] for point in walker.path]) for name in names if walker.path},
        problems=tuple(walker.problems),
        result=result,
    )
