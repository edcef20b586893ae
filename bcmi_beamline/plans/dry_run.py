"""What a plan will do, without doing it: duration, frames, disk, dose, limits, collisions and the path.

One mechanism for every plan: its messages are walked against stand-ins that know names, limits and speeds
from the configuration and nothing else. No device is made and no process variable is touched. Readings are
answered as an ideal beamline would (a Gaussian rocking curve at the nominal angle, a modulator that is
sharpest at zero tilt), so that plans that fit and decide run to their end. What the guards of the devices
would refuse is found by the same functions, for whatever way axes take that move at once.
"""

import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from bluesky.utils import Msg, MsgGenerator

from bcmi_beamline.config import AxisConfig, Beamline
from bcmi_beamline.devices import EigerPlan, carrier_turn, guards, nominal_setting
from bcmi_beamline.devices.pose_math import AXES, beam_on_membrane, carried, distance_along_beam
from bcmi_beamline.plans.dose import Dose, dose

RUN_OVERHEAD_S = 0.5
"""Opening a run, arming and disarming, what is read before and after it."""
FRAME_OVERHEAD_S = 0.03
"""Trigger, file and document of one frame, beside its exposure."""
MOVE_OVERHEAD_S = 0.02
"""A move, beside its way at full speed."""
ANOTHER_CRYSTAL_UM = 5.0
"""A step of the sample stage longer than this goes to another crystal, which is there."""
COMPRESSED = 0.03
"""Share of its raw size that a peaked frame takes on disk (bitshuffle-LZ4)."""


@dataclass(repr=False)
class DryRun:
    """What a plan would do."""

    plan: str
    duration_s: float
    overhead_s: float
    """Part of the duration that is neither exposure nor motion: what control and documents add."""
    frames: int
    exposure_s: float
    """Detector open, in all."""
    beam_s: float
    """Shutter open, in all."""
    dose: Dose
    """At the configured flux behind the filters."""
    disk_bytes: float
    disk_free_bytes: float | None
    """Where the frames go; None when nobody looked."""
    runs: int
    path: dict[str, np.ndarray]
    """Position of every axis that moves at each frame, (frames,), by device name."""
    problems: tuple[str, ...]
    """What would be refused, in order; empty when the plan may run."""
    result: Any = None
    """What the plan returned on the ideal beamline."""

    def __repr__(self) -> str:
        lines = [
            f"{self.plan}: {self.duration_s:.0f} s, {self.frames} frames in {self.runs} runs, "
            f"{self.disk_bytes / 1e6:.0f} MB, {self.dose}"
        ]
        moving = {name: (path.min(), path.max()) for name, path in self.path.items() if np.ptp(path)}
        lines += [f"  {name}: {low:g} to {high:g}" for name, (low, high) in moving.items()]
        lines += [f"  problem: {problem}" for problem in self.problems] or ["  nothing speaks against it"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and problems without the path; JSON-serialisable."""
        return {
            "plan": self.plan,
            "duration_s": round(self.duration_s, 1),
            "overhead_s": round(self.overhead_s, 1),
            "frames": self.frames,
            "exposure_s": round(self.exposure_s, 3),
            "beam_s": round(self.beam_s, 1),
            "dose_mgy": float(f"{self.dose.gray * 1e-6:.3g}"),
            "disk_mb": round(self.disk_bytes / 1e6, 1),
            "disk_free_mb": None if self.disk_free_bytes is None else round(self.disk_free_bytes / 1e6),
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
    circles = _axes("diffractometer", beamline.diffractometer, guards.CIRCLES)
    rock = circles[beamline.rocking_circle]
    carries = beamline.rocking_circle in guards.CARRIES_MODULATOR
    mono, focus = beamline.monochromator, beamline.focus
    gaps = ("horizontal", "vertical", "horizontal_centre", "vertical_centre")
    return _StandIn(
        "devices",
        beamline=beamline,
        nanogoniometer=_StandIn(
            "nanogoniometer",
            pivot=_StandIn("nanogoniometer_pivot"),
            **_axes("nanogoniometer", beamline.nanogoniometer, AXES),
        ),
        diffractometer=_StandIn("diffractometer", rock=rock, **circles),
        rock_with_modulator=_StandIn("rock_with_modulator") if carries else rock,
        sample_stage=_StandIn(
            "sample_stage", **_axes("sample_stage", beamline.sample_stage, ("x", "y", "z"))
        ),
        eiger=_StandIn("eiger", cam=_StandIn("eiger_cam", count_cutoff=_StandIn("eiger_cam_count_cutoff"))),
        shutter=_StandIn("shutter"),
        monitor=_StandIn("monitor"),
        ring_current=_StandIn("ring_current"),
        sentinel=_StandIn("sentinel"),
        slits=_StandIn("slits", **_axes("slits", beamline.slits, gaps)) if beamline.slits else None,
        energy=_StandIn("energy", mono.energy) if mono else None,
        focus=_StandIn("focus", focus.z) if focus else None,
        filters=(
            _StandIn("filters", transmission=_StandIn("filters_transmission")) if beamline.filters else None
        ),
        temperatures=_StandIn("temperatures") if beamline.temperatures else None,
    )


class Rehearsal:
    """Follows messages, keeping time and positions; answers like an ideal beamline.

    Parameters
    ----------
    beamline : Beamline
    start : mapping, optional
        Positions to begin from by device name, in place of the nominal Bragg setting, modulator out.
    """

    def __init__(self, beamline: Beamline, start: Mapping[str, float] | None = None) -> None:
        self.beamline = beamline
        self.at: dict[str, Any] = {f"diffractometer_{k}": v for k, v in nominal_setting(beamline).items()}
        out = {"mchi": 0.0, "mphi": 0.0, **beamline.nanogoniometer.positions["out"]}
        self.at |= {f"nanogoniometer_{axis}": value for axis, value in out.items()}
        self.at |= {f"sample_stage_{axis}": 0.0 for axis in "xyz"}
        self.at |= {"shutter": 0.0, "sentinel": 0.0, "ring_current": 100.0, "filters_transmission": 1.0}
        self.at |= {"eiger_cam_count_cutoff": 2.0**31, "energy": beamline.energy_ev * 1e-3}
        self.at["nanogoniometer_pivot"] = beamline.nanogoniometer.pivot_um
        if beamline.slits:
            gaps = zip(("horizontal", "vertical"), beamline.slits.nominal_um, strict=True)
            self.at |= {f"slits_{name}": gap for name, gap in gaps}
            self.at |= {"slits_horizontal_centre": 0.0, "slits_vertical_centre": 0.0}
        if beamline.focus:
            self.at["focus"] = beamline.focus.nominal_mm
        unknown = set(start or {}) - set(self.at)
        if unknown:
            raise ValueError(
                f"start: no axis named {', '.join(sorted(unknown))}; choose from {', '.join(self.at)}"
            )
        self.at |= dict(start or {})
        self.time = self.overhead = self.exposure = self.beam = self.photons = 0.0
        self.frames = self.runs = 0
        self.eiger = EigerPlan()
        self.pending: dict[Any, float] = defaultdict(float)
        self.pending_overhead: dict[Any, float] = defaultdict(float)
        self.spans: dict[str, tuple[float, float]] = {}
        """Ways of the moves that are not waited for yet."""
        self.moved: set[str] = set()
        self.path: list[dict[str, float]] = []
        self.problems: list[str] = []
        self._held: tuple[float, dict[str, float]] | None = None
        self._home: dict[str, float] | None = None
        self._crystal = {"sample_stage_x": 0.0, "sample_stage_y": 0.0}

    # -- time -------------------------------------------------------------------------------------
    def spend(self, seconds: float, overhead: float = 0.0) -> None:
        """Let time pass, and after it what control adds."""
        seconds += overhead
        self.overhead += overhead
        self.time += seconds
        self.beam += seconds * self.at["shutter"]
        self.photons += (
            seconds * self.at["shutter"] * self.beamline.nominal_flux * self.at["filters_transmission"]
        )

    # -- messages ---------------------------------------------------------------------------------
    def __call__(self, msg: Msg) -> Any:
        """Take one message and answer it."""
        handler = getattr(self, f"do_{msg.command}", None)
        return handler(msg) if handler else None

    def do_set(self, msg: Msg) -> None:
        """A move, timed by the distance and the velocity of the configuration."""
        device, value = msg.obj, msg.args[0]
        if device.name == "rock_with_modulator":
            seconds = self.rock_compensated(float(value))
        elif device.limits is not None:
            seconds = self.travel(device.name, float(value), device.limits)
        else:
            self.at[device.name] = value if np.ndim(value) else float(value)
            seconds = 0.0
        self.later(msg, seconds, MOVE_OVERHEAD_S)

    def later(self, msg: Msg, seconds: float, overhead: float) -> None:
        """Put what a message begins into its group."""
        group = msg.kwargs.get("group")
        self.pending[group] = max(self.pending[group], seconds)
        self.pending_overhead[group] = max(self.pending_overhead[group], overhead)

    def travel(self, name: str, target: float, axis: AxisConfig, compensated: bool = False) -> float:
        """Send one axis to `target`; note what would refuse it, and return the seconds it takes."""
        if not axis.low <= target <= axis.high:
            self.problem(f"{name}: {target:g} {axis.unit} lies outside [{axis.low:g}, {axis.high:g}]")
        else:
            self.guard(name, target, compensated)
        here = self.at[name]
        if name in self._crystal and abs(target - here) > ANOTHER_CRYSTAL_UM:
            self._crystal[name] = target
        ends = (here, target, *self.spans.get(name, ()))
        self.spans[name] = (min(ends), max(ends))
        self.moved.add(name)
        self.at[name] = target
        return abs(target - here) / axis.velocity

    def rock_compensated(self, angle_deg: float) -> float:
        """As `bcmi_beamline.devices.CompensatedRock` does it."""
        beamline, circle = self.beamline, f"diffractometer_{self.beamline.rocking_circle}"
        pose = {axis: self.at[f"nanogoniometer_{axis}"] for axis in AXES}
        if self._held is None or self._sent != pose:
            self._held = (self.at[circle], pose)
        nano = beamline.nanogoniometer
        turn = carrier_turn(beamline, self._held[0], angle_deg)
        self._sent = carried(self._held[1], turn, self.at["nanogoniometer_pivot"], nano.distance_at_z0_um)
        config = getattr(beamline.diffractometer, beamline.rocking_circle)
        seconds = [self.travel(circle, angle_deg, config, compensated=True)]
        for axis, value in self._sent.items():
            seconds.append(self.travel(f"nanogoniometer_{axis}", value, getattr(nano, axis)))
        return max(seconds)

    def do_wait(self, msg: Msg) -> None:
        """The slowest of a group decides."""
        group = msg.kwargs.get("group")
        self.spend(self.pending.pop(group, 0.0), self.pending_overhead.pop(group, 0.0))
        if not self.pending:
            self.spans.clear()

    def do_trigger(self, msg: Msg) -> None:
        """One frame."""
        self.frames += 1
        self.exposure += self.eiger.exposure_s
        self.later(msg, self.eiger.exposure_s, FRAME_OVERHEAD_S)
        self.path.append({name: self.at[name] for name in self.at if np.ndim(self.at[name]) == 0})

    def do_prepare(self, msg: Msg) -> None:
        """What the next frames are like."""
        self.eiger = msg.args[0]

    def do_stage(self, msg: Msg) -> None:
        """Arming."""
        self.spend(0.0, RUN_OVERHEAD_S)

    def do_sleep(self, msg: Msg) -> None:
        """Waiting."""
        self.spend(float(msg.args[0]))

    def do_open_run(self, msg: Msg) -> str:
        """A run begins; its uid."""
        self.runs += 1
        return str(uuid.uuid4())

    def do_read(self, msg: Msg) -> dict[str, dict[str, Any]]:
        """A reading of any device."""
        name = msg.obj.name
        if name == "rock_with_modulator":
            moved = (self.beamline.rocking_circle,)
            values = {f"diffractometer_{c}": self.at[f"diffractometer_{c}"] for c in moved}
            values |= {f"nanogoniometer_{axis}": self.at[f"nanogoniometer_{axis}"] for axis in AXES}
        elif name == "eiger":
            values = self.frame()
        elif name == "monitor":
            values = {"monitor_flux": self.beamline.nominal_flux}
        else:
            values = {name: self.at[name]}
        return {key: {"value": value, "timestamp": self.time} for key, value in values.items()}

    # -- what the devices refuse ------------------------------------------------------------------
    def span(self, device: str, axis: str) -> tuple[float, float]:
        """Extremes between which an axis is or is about to be."""
        name = f"{device}_{axis}"
        return self.spans.get(name, (self.at[name], self.at[name]))

    def guard(self, name: str, target: float, compensated: bool) -> None:
        """Note what the guard of the device that `name` belongs to would say."""
        device, _, axis = name.rpartition("_")
        check = getattr(self, f"guard_{device}", None)
        reason = check(axis, target, compensated) if check else None
        if reason:
            self.problem(f"{name}: {reason}")

    def _nano_spans(self) -> dict[str, tuple[float, float]]:
        return {axis: self.span("nanogoniometer", axis) for axis in AXES}

    def guard_nanogoniometer(self, axis: str, target: float, compensated: bool) -> str | None:
        """Stand-off, and no insertion away from the Bragg setting."""
        config, spans = self.beamline.nanogoniometer, self._nano_spans()
        now = {name: self.at[f"nanogoniometer_{name}"] for name in AXES}
        pivot = self.at["nanogoniometer_pivot"]
        reason = guards.refuse_modulator(config, tuple(pivot), spans, now, axis, target)
        leaves = abs(target - now[axis]) > guards.AT_PLACE * getattr(config, axis).tolerance
        if reason is None and leaves and guards.is_out(config, spans):
            circles = {name: self.span("diffractometer", name) for name in guards.CIRCLES}
            strays = guards.strays(self.beamline.diffractometer, self.nominal(), circles)
            reason = guards.refuse_insertion(strays)
        return reason

    def guard_diffractometer(self, circle: str, target: float, compensated: bool) -> str | None:
        """The cone, and no sweep of the modulator through the beam."""
        config = self.beamline.diffractometer
        if guards.is_out(self.beamline.nanogoniometer, self._nano_spans()):
            return None
        if compensated:
            return guards.refuse_cone(config, self.nominal(), circle, target)
        nano = self.beamline.nanogoniometer
        return guards.refuse_circle(
            config,
            self.nominal(),
            circle,
            target,
            self.at[f"diffractometer_{circle}"],
            rocks=circle == self.beamline.rocking_circle,
            distance_um=distance_along_beam(
                *self.pose(), self.at["nanogoniometer_pivot"], nano.distance_at_z0_um
            ),
        )

    def guard_sample_stage(self, axis: str, target: float, compensated: bool) -> str | None:
        """No other crystal with the modulator in."""
        if guards.is_out(self.beamline.nanogoniometer, self._nano_spans()):
            self._home = None
            return None
        if self._home is None:
            self._home = {name: self.at[f"sample_stage_{name}"] for name in "xyz"}
        reach = self.beamline.sample_stage.modulator_reach_um
        return guards.refuse_exchange(reach, axis, target, self._home[axis])

    def nominal(self) -> dict[str, float]:
        """Bragg setting at the energy as it is."""
        return nominal_setting(self.beamline, 1e3 * self.at["energy"])

    # -- the ideal beamline -------------------------------------------------------------------------
    def frame(self) -> dict[str, float]:
        """Statistics of a frame at the present positions."""
        rock = self.at[f"diffractometer_{self.beamline.rocking_circle}"]
        off_peak = (rock - self.nominal()[self.beamline.rocking_circle]) / 0.02
        off_beam = math.hypot(*(self.at[name] - self._crystal[name] for name in self._crystal)) / 0.6
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
        spot, _ = beam_on_membrane(*self.pose(), self.at["nanogoniometer_pivot"])
        return float(spot[0]), float(spot[1])

    def problem(self, text: str) -> None:
        """Note once."""
        if text not in self.problems:
            self.problems.append(text)


def dry_run(
    plan: Callable[..., MsgGenerator[Any]],
    beamline: Beamline,
    start: Mapping[str, float] | None = None,
    disk_free_bytes: float | None = None,
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
    disk_free_bytes : float, optional
        Free where the frames go; too little is a problem.
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
    rehearsal = Rehearsal(beamline, start)
    result = None
    try:
        messages = plan(stand_in_devices(beamline), **arguments)
        answer = None
        while True:
            answer = rehearsal(messages.send(answer))
    except StopIteration as end:
        result = end.value
    except (ValueError, RuntimeError) as error:
        rehearsal.problem(str(error))
    rehearsal.spend(sum(rehearsal.pending.values()))
    eiger = beamline.eiger
    disk_bytes = rehearsal.frames * eiger.rows * eiger.columns * eiger.bit_depth / 8 * COMPRESSED
    if disk_free_bytes is not None and disk_bytes > disk_free_bytes:
        rehearsal.problem(
            f"disk: {disk_bytes / 1e9:.2f} GB of frames do not fit into the {disk_free_bytes / 1e9:.2f} GB "
            "that are free: make room or choose another folder"
        )
    names = sorted(rehearsal.moved)
    path = rehearsal.path
    return DryRun(
        plan=plan.__name__,
        duration_s=rehearsal.time,
        overhead_s=rehearsal.overhead,
        frames=rehearsal.frames,
        exposure_s=rehearsal.exposure,
        beam_s=rehearsal.beam,
        dose=dose(beamline, rehearsal.photons, rehearsal.beam),
        disk_bytes=disk_bytes,
        disk_free_bytes=disk_free_bytes,
        runs=rehearsal.runs,
        path={name: np.array([point[name] for point in path]) for name in names if path},
        problems=tuple(rehearsal.problems),
        result=result,
    )
