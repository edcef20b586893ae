"""What the beam does to the crystal: photons on it, and the energy they leave in it."""

from dataclasses import dataclass

import numpy as np

from bcmi_beamline.config import Beamline

ELECTRON_VOLT = 1.602176634e-19


@dataclass(frozen=True)
class Dose:
    """Exposure of a crystal to the beam."""

    beam_s: float
    """Shutter open."""
    photons: float
    """Through the focus."""
    gray: float
    """Absorbed where the beam is brightest, J/kg, photoelectrons stopped where they start: an upper limit,
    since a crystal smaller than their range keeps less."""

    def __repr__(self) -> str:
        return f"{self.beam_s:.0f} s of beam, {self.photons:.2g} photons, up to {self.gray * 1e-6:.3g} MGy"


def dose(beamline: Beamline, photons: float, beam_s: float) -> Dose:
    """Dose of `photons` through the focus of the configuration (a Gaussian) on the configured material.

    Mass absorption is the photoelectric part of xraydb's tables (Elam) at the beamline's energy.
    """
    import xraydb

    material = beamline.reflection.material
    parts = xraydb.chemparse(material)
    weights = {element: count * xraydb.atomic_mass(element) for element, count in parts.items()}
    absorption = sum(
        weight * float(xraydb.mu_elam(element, beamline.energy_ev, kind="photo"))
        for element, weight in weights.items()
    ) / sum(weights.values())  # cm2/g
    width, height = beamline.focus.beam_um if beamline.focus else (1.5, 1.5)
    fluence = photons * 4 * np.log(2) / (np.pi * width * height * 1e-12)  # 1/m2 in the middle
    gray = fluence * beamline.energy_ev * ELECTRON_VOLT * absorption * 0.1
    return Dose(beam_s=beam_s, photons=photons, gray=float(gray))
