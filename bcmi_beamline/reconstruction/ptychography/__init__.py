"""Ptychographic calibration of the modulator, and far-field ptychography in general."""

from bcmi_beamline.reconstruction.ptychography._calibrate import calibrate

__all__ = ["calibrate"]
