"""Bragg coherent modulation imaging: phase retrieval through a known modulator."""

from bcmi_beamline.reconstruction.modulation.driver import reconstruct
from bcmi_beamline.reconstruction.modulation.follow import follow

__all__ = ["follow", "reconstruct"]
