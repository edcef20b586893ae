"""Conventional Bragg coherent diffraction imaging (BCDI): the method that BCMI is compared with."""

from bcmi_beamline.reconstruction.conventional._prepare import Pattern, prepare
from bcmi_beamline.reconstruction.conventional._reconstruct import reconstruct
from bcmi_beamline.reconstruction.conventional._trial import Recipe

__all__ = ["Pattern", "Recipe", "prepare", "reconstruct"]
