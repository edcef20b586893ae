"""Bragg coherent modulation imaging: phase retrieval through a known modulator."""

from bcmi_beamline.reconstruction.modulation.driver import reconstruct

__all__ = ["reconstruct"]
