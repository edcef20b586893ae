"""The digital twin: physics in the laboratory frame and the IOC that serves it.

Names are imported when they are used: the server of Channel Access, which leaves the physics to another
process, starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcmi_beamline.sim.simulate import SimulatedScan, simulate_ptychography, simulate_rocking
    from bcmi_beamline.sim.twin import Twin

__all__ = ["SimulatedScan", "Twin", "simulate_ptychography", "simulate_rocking"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "twin" if name == "Twin" else "simulate"
    return getattr(import_module(f"{__name__}.{module}"), name)
