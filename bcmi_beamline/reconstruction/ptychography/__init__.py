"""Ptychographic calibration of the modulator, and far-field ptychography in general."""

from bcmi_beamline.reconstruction.ptychography._calibrate import calibrate
from bcmi_beamline.reconstruction.ptychography._classic import difference_map, epie

__all__ = ["calibrate", "difference_map", "epie"]
