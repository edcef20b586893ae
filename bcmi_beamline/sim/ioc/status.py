"""One live line about the running beamline, for whoever looks at its terminal."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bcmi_beamline.sim.ioc.beamline import NANO_AXES, SimulatedBeamlineIOC

REFRESH_S = 0.5
"""Wall-clock seconds between two states of the line."""


def describe(ioc: SimulatedBeamlineIOC, frames_per_s: float) -> Text:
    """Time, frames and their rate, detector, shutter, pose and faults in one line."""
    pose, clock, rocking = ioc.pose(), ioc.clock, ioc.beamline.rocking_circle
    axes = "  ".join(f"{name} {pose[name]:.6g}" for name in (rocking, *NANO_AXES))
    line = Text(f"{clock.now():.1f} s (x{clock.scale:g})  ", no_wrap=True, overflow="ellipsis")
    line.append(f"{ioc.eiger.frames} frames, {frames_per_s:.1f}/s  ", "bold")
    line.append(f"eiger {ioc.eiger.state}  shutter {'open' if pose['shutter'] else 'closed'}  {axes}")
    if ioc.faults:
        line.append("  " + ", ".join(ioc.faults), "bold red")
    return line


async def show_status(ioc: SimulatedBeamlineIOC) -> None:
    """Keep the line up to date on a terminal; says nothing in a pipe."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return
    frames, since = ioc.eiger.frames, time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            await asyncio.sleep(REFRESH_S)
            now = time.monotonic()
            rate = max(ioc.eiger.frames - frames, 0) / (now - since)
            frames, since = ioc.eiger.frames, now
            live.update(describe(ioc, rate), refresh=True)
