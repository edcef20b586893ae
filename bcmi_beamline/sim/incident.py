"""The incident beam: what slits, filters, lenses, monochromator and storage ring make of it.

The beam at the crystal is a Gaussian Schell-model beam: Gaussian in intensity and in coherence (Mandel and
Wolf, Optical Coherence and Quantum Optics, section 5.6). Its width, curvature and coherence follow in closed
form from slits and lens; the degree of coherence (coherence length over beam width) is kept in free space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xraydb

from bcmi_beamline.config import Beamline, SimulationSettings
from bcmi_beamline.geometry import wavelength_from_energy

FULL_CURRENT_MA = 200.0
"""Ring current at which the flux is nominal."""

SLITS = ("slits_horizontal", "slits_vertical")
"""Keys of the gaps in a pose."""

CLOSED_UM = 1.0
"""A slit narrower than this lets nothing through."""

SILICON_EXPANSION_PER_K = 2.6e-6
"""Thermal expansion of the monochromator's crystals: their planes, and so the wavelength, grow with it."""


@dataclass(frozen=True)
class Section:
    """The beam at the crystal along one transverse direction.

    Parameters
    ----------
    waist : float
        Radius at which the amplitude falls to 1/e, m.
    inverse : complex
        The amplitude is ``exp(-inverse x^2)``: width and curvature in one, 1/m^2.
    coherence : float
        Coherence length (rms of the Gaussian degree of coherence), m; inf: fully coherent.
    tilt : float
        Angular frequency along this direction of a beam that comes in at an angle, rad/m.
    """

    waist: float
    inverse: complex
    coherence: float
    tilt: float


def filter_key(name: str) -> str:
    """Key of a filter in a pose."""
    return f"filter_{name}"


class IncidentBeam:
    """The beam on its way to the crystal.

    Parameters
    ----------
    beamline : Beamline
    sim : SimulationSettings
    """

    def __init__(self, beamline: Beamline, sim: SimulationSettings) -> None:
        self._beamline = beamline
        self._sim = sim
        self._focus_waist = sim.beam_fwhm_um * 1e-6 / float(np.sqrt(2 * np.log(2)))
        self.modes = (sim.nuisances.coherence_modes, sim.nuisances.coherence_modes_vertical)
        """Coherence modes along x and y."""
        self._filters = {filter_key(name): plate for name, plate in beamline.filters.items()}
        self._gaps = beamline.slits.nominal_um if beamline.slits else (1.0, 1.0)
        self._nominally_passed = [self._passed(axis, gap, 0.0) for axis, gap in enumerate(self._gaps)]
        self._degrees = [
            2 * length * 1e-6 / self._focus_waist if count > 1 else np.inf
            for length, count in zip(sim.nuisances.coherence_length_um, self.modes, strict=True)
        ]

    def nominal(self) -> dict[str, float]:
        """Readings at which the beam is as the experiment wants it, of everything that the beamline has."""
        beamline = self._beamline
        pose = {"ring_current": FULL_CURRENT_MA, "beam": 1.0}
        if beamline.slits:
            for name, gap in zip(SLITS, beamline.slits.nominal_um, strict=True):
                pose |= {name: gap, f"{name}_centre": 0.0}
        if beamline.monochromator:
            pose["energy"] = beamline.energy_ev * 1e-3
        if beamline.focus:
            pose["focus"] = beamline.focus.nominal_mm
        return pose | dict.fromkeys(self._filters, 0.0)

    # -- how much -----------------------------------------------------------------------------------
    def intensity(self, pose: Mapping[str, float]) -> float:
        """Flux behind slits and filters relative to the nominal flux."""
        if not pose["beam"]:
            return 0.0
        flux = max(pose["ring_current"], 0.0) / FULL_CURRENT_MA
        for axis, nominal in enumerate(self._nominally_passed):
            flux *= self._passed(axis, *self._slit(axis, pose)) / nominal
        for key, plate in self._filters.items():
            if pose[key]:
                energy_ev = round(self.energy_ev(pose), 3)
                flux *= _transmission(plate.material, plate.thickness_um, energy_ev)
        return flux

    def _slit(self, axis: int, pose: Mapping[str, float]) -> tuple[float, float]:
        """(gap, centre), um."""
        name = SLITS[axis]
        return pose.get(name, self._gaps[axis]), pose.get(f"{name}_centre", 0.0)

    def _passed(self, axis: int, gap: float, centre: float) -> float:
        """Fraction of the beam that a slit lets through, um."""
        if gap < CLOSED_UM:
            return 0.0
        scale = 2 * math.sqrt(math.log(2)) / self._sim.slit_beam_um[axis]
        return (math.erf(scale * (centre + gap / 2)) - math.erf(scale * (centre - gap / 2))) / 2

    # -- what shape ---------------------------------------------------------------------------------
    def energy_ev(self, pose: Mapping[str, float], monochromator_rise_k: float = 0.0) -> float:
        """Photon energy, eV, of a monochromator that has warmed up by so much."""
        energy_ev = pose["energy"] * 1e3 if "energy" in pose else self._beamline.energy_ev
        return energy_ev * (1 - SILICON_EXPANSION_PER_K * monochromator_rise_k)

    def sections(self, pose: Mapping[str, float], energy_ev: float) -> tuple[Section, Section]:
        """The beam at the crystal along laboratory x and y; the slits must be open."""
        return self._section(0, pose, energy_ev), self._section(1, pose, energy_ev)

    def _section(self, axis: int, pose: Mapping[str, float], energy_ev: float) -> Section:
        """Focus of a slit-limited beam, then free space to the crystal.

        Of a Schell-model beam of rms width s and coherence length c behind the slit the divergence is
        ``sqrt(1 + 4 s^2 / c^2) lambda / (4 pi s)``, and the lens turns divergence into width. So a narrower
        slit makes a wider but more coherent focus. Lenses focus at a distance that grows as the energy
        squared; a slit off the axis sends the beam in at an angle.
        """
        gap, centre = self._slit(axis, pose)
        narrowing = self._gaps[axis] / gap
        nominal = self._degrees[axis]
        degree = nominal * narrowing
        quality = np.sqrt(1 + 4 / degree**2)
        waist = self._focus_waist * narrowing * quality / np.sqrt(1 + 4 / nominal**2)

        lens = self._beamline.focus
        length = lens.focal_length_m if lens else 1.0
        downstream = (pose["focus"] - lens.nominal_mm) * 1e-3 if lens else 0.0
        downstream += length * ((energy_ev / self._beamline.energy_ev) ** 2 - 1)
        wavelength = wavelength_from_energy(energy_ev)
        beyond = -downstream / (np.pi * waist**2 / (wavelength * quality))
        spread = waist * np.sqrt(1 + beyond**2)
        curvature = quality / waist**2 * beyond / (1 + beyond**2)
        return Section(
            waist=float(spread),
            inverse=complex(1 / spread**2, -curvature),
            coherence=float(degree * spread / 2),
            tilt=-2 * np.pi / wavelength * centre * 1e-6 / length,
        )


@lru_cache(maxsize=64)
def _transmission(material: str, thickness_um: float, energy_ev: float) -> float:
    """Of a plate of `material` (xraydb)."""
    per_cm = xraydb.material_mu(material, energy_ev)
    return float(np.exp(-per_cm * thickness_um * 1e-4))
