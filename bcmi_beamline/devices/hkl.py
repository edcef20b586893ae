"""Circles to Miller indices and back, by xrayutilities (the extra ``hkl``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from bcmi_beamline.config import Beamline
from bcmi_beamline.devices.diffractometer import nominal_setting
from bcmi_beamline.devices.guards import CIRCLES

SAMPLE_CIRCLES = ("mu", "eta", "phi")
_CLOSE_PER_NM = 1e-4
"""Largest miss of a scattering vector that counts as reached, 1/nm."""


class HklError(ValueError):
    """A reflection that the circles cannot reach, or an orientation that is not known."""


class Orientation:
    """How a cubic crystal sits on the circles: Miller indices from angles and angles from Miller indices.

    The configured reflection stands at the Bragg setting of the configuration. It leaves the turn of the
    crystal about that normal open: a second reflection fixes it, without one only multiples of the first
    have angles.

    Parameters
    ----------
    beamline : Beamline
        Circles, senses, limits, energy, reflection.
    energy_ev : float, optional
        In place of the configured one.
    second : tuple, optional
        Miller indices and circle readings (deg, by name) of a reflection that is not parallel to the first.

    Raises
    ------
    HklError
        When the two reflections are parallel, or xrayutilities is not installed.
    """

    def __init__(
        self,
        beamline: Beamline,
        energy_ev: float | None = None,
        second: tuple[Sequence[float], Mapping[str, float]] | None = None,
    ) -> None:
        self._beamline = beamline
        self._energy_ev = beamline.energy_ev if energy_ev is None else energy_ev
        self._nominal = nominal_setting(beamline, self._energy_ev)
        self._first = np.array(beamline.reflection.hkl, float)
        self._oriented = second is not None
        hkls, readings = [self._first], [self._nominal]
        if second is not None:
            hkls.append(np.array(second[0], float))
            readings.append({**self._nominal, **second[1]})
            if np.linalg.norm(np.cross(hkls[0], hkls[1])) < 1e-6:
                raise HklError(f"reflections {hkls[0].tolist()} and {hkls[1].tolist()} are parallel")
        seen = [self._q(angles) for angles in readings]
        weights = [np.inf, 1.0][: len(hkls)]
        self._turn = Rotation.align_vectors(
            [q / np.linalg.norm(q) for q in seen], [h / np.linalg.norm(h) for h in hkls], weights=weights
        )[0]

    @cached_property
    def _converter(self) -> Any:
        try:
            import xrayutilities
        except ImportError:
            raise HklError("Miller indices need xrayutilities: pip install 'bcmi-beamline[hkl]'") from None
        circles = self._beamline.diffractometer
        signed = [
            f"{getattr(circles, c).axis}{'+' if getattr(circles, c).sense > 0 else '-'}" for c in CIRCLES
        ]
        conversion = xrayutilities.QConversion(signed[:3], signed[3:], (0, 0, 1), en=self._energy_ev)
        return xrayutilities, xrayutilities.HXRD((1, 0, 0), (0, 1, 0), qconv=conversion, en=self._energy_ev)

    def _q(self, angles: Mapping[str, float]) -> np.ndarray:
        """Scattering vector in the frame of the innermost circle, 1/nm."""
        _, experiment = self._converter
        return 10 * np.array(experiment.Ang2Q.point(*(angles[c] for c in CIRCLES)), float)

    @property
    def _per_index(self) -> float:
        return 2 * np.pi / self._beamline.reflection.lattice_parameter_nm

    def hkl(self, angles: Mapping[str, float]) -> tuple[float, float, float]:
        """Miller indices at circle readings (deg, by name; those absent at the Bragg setting)."""
        q = self._turn.inv().apply(self._q({**self._nominal, **angles})) / self._per_index
        return float(q[0]), float(q[1]), float(q[2])

    def angles(self, hkl: Sequence[float]) -> dict[str, float]:
        """Circle readings (deg) at which `hkl` diffracts: rocking circle and arm turn, the others stay.

        Raises
        ------
        HklError
            When the limits of the circles, or an unknown orientation, stand in the way.
        """
        wanted = np.array(hkl, float)
        if not self._oriented and np.linalg.norm(np.cross(wanted, self._first)) > 1e-6:
            raise HklError(
                f"the turn of the crystal about {self._first.tolist()} is not known: give a second reflection"
            )
        q = self._turn.apply(wanted) * self._per_index
        free = (self._beamline.rocking_circle, "nu", "delta")
        circles = self._beamline.diffractometer
        bounds = [
            (getattr(circles, c).low, getattr(circles, c).high) if c in free else self._nominal[c]
            for c in CIRCLES
        ]
        xrayutilities, experiment = self._converter
        start = [self._nominal[c] for c in CIRCLES]
        found, _, _ = xrayutilities.Q2AngFit(q / 10, experiment, bounds, startvalues=start)
        readings = dict(zip(CIRCLES, (float(a) for a in found), strict=True))
        miss = float(np.linalg.norm(self._q(readings) - q))
        if miss > _CLOSE_PER_NM:
            raise HklError(
                f"{list(hkl)} is out of reach of {', '.join(free)} within their limits at "
                f"{self._energy_ev:.0f} eV (best misses by {miss:.3g} /nm)"
            )
        return readings
