"""The digital twin: physics in the laboratory frame and the IOC that serves it."""

from bcmi_beamline.sim.simulate import SimulatedScan, simulate_ptychography, simulate_rocking
from bcmi_beamline.sim.twin import Twin

__all__ = ["SimulatedScan", "Twin", "simulate_ptychography", "simulate_rocking"]
