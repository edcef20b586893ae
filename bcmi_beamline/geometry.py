"""The numbers of a Bragg coherent modulation imaging experiment.

Everything here is a pure function of a few measured quantities, in SI units.

Conventions, used everywhere in this package
--------------------------------------------
*Waves* are ``exp(+i k z - i omega t)``; a numpy *forward* FFT carries a wave to the detector, the
near-field kernel over a distance ``d`` is ``exp(-i pi lambda d f**2)`` and matter retards: a tungsten
film of thickness ``t`` transmits ``exp(-k (i delta + beta) t)``.

*Laboratory frame* (CXI): x outboard, y up, z downstream along the incident beam.

*Detector frame* (x', y', z'): z' along the diffracted beam at the Bragg peak, x' and y' across it. In the
horizontal geometry y' = y, in the vertical geometry x' = x.

*Arrays* of frames, modulator, probe and object share one sense: columns run to +x', rows run to -y'.
Zero frequency, and the origin of real space, lies at index ``n // 2`` of every axis in files and
containers. A modulator moved by +x shifts its pattern by + columns, moved by +y by - rows.

*Crystal*: ``rho(r) = |rho| exp(-i Q . u)`` with ``u`` the displacement. Turned by a right-handed angle
``Theta`` about the rocking axis the crystal scatters ``rho exp(+i dQ . r)`` with
``dQ = Theta * rocking_gradient``, and its exit wave is the projection of that along z'.

*Sheared frame*: with ``z' = zeta + shear_x x' + shear_y y'`` the phase depends on zeta alone,
``dQ . r = Theta * rocking_gradient[2] * zeta``. Reconstructions live in (zeta, y', x').
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import constants

Arm = Literal["horizontal", "vertical"]

HC_EV_M = constants.h * constants.c / constants.e
"""Planck's constant times the speed of light, eV m."""


def wavelength_from_energy(energy_ev: float) -> float:
    """Wavelength in metres of a photon of `energy_ev`."""
    return HC_EV_M / energy_ev


def rotation_matrix(axis: str | np.ndarray, angle: float) -> np.ndarray:
    """Right-handed rotation by `angle` (rad) about ``"x"``, ``"y"``, ``"z"`` or a unit vector.

    Examples
    --------
    >>> rotation_matrix("y", np.pi / 2) @ [0, 0, 1]  # z turns to x
    array([1., 0., 0.])
    """
    n = np.eye(3)["xyz".index(axis)] if isinstance(axis, str) else np.asarray(axis, float)
    cross = np.array([[0, -n[2], n[1]], [n[2], 0, -n[0]], [-n[1], n[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


@dataclass(frozen=True)
class Geometry:
    """One Bragg geometry: a reflection, an energy, a detector and, if it is in, a modulator.

    Parameters
    ----------
    energy_ev : float
        Photon energy, eV.
    plane_spacing : float
        Spacing of the reflecting planes, m.
    detector_distance : float
        Crystal to detector along the diffracted beam, m (``d1 + d2``).
    pixel_size : float
        Detector pixel, m.
    modulator_distance : float
        Crystal to modulator, m (``d1``); 0 with the modulator out.
    arm : {"horizontal", "vertical"}
        Plane of scattering.
    arm_sign : {+1, -1}
        +1 when the horizontal arm swings to +x, or the vertical arm to +y.

    Raises
    ------
    ValueError
        When the reflection cannot be reached at this energy or a length is not positive.
    """

    energy_ev: float = 9000.0
    plane_spacing: float = 0.226530e-9
    detector_distance: float = 5.35
    pixel_size: float = 75e-6
    modulator_distance: float = 0.0
    arm: Arm = "horizontal"
    arm_sign: int = 1

    def __post_init__(self) -> None:
        for name in ("energy_ev", "plane_spacing", "detector_distance", "pixel_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.modulator_distance < self.detector_distance:
            raise ValueError("modulator_distance must lie between crystal and detector")
        if self.arm not in ("horizontal", "vertical") or self.arm_sign not in (1, -1):
            raise ValueError("arm is 'horizontal' or 'vertical', arm_sign +1 or -1")
        if self.wavelength >= 2 * self.plane_spacing:
            raise ValueError(
                f"planes {self.plane_spacing * 1e9:.4f} nm apart do not diffract at {self.energy_ev:.0f} eV"
            )

    # -- waves and angles -------------------------------------------------------------------------
    @property
    def wavelength(self) -> float:
        """Wavelength, m."""
        return wavelength_from_energy(self.energy_ev)

    @property
    def wavenumber(self) -> float:
        """``2 pi / wavelength``, rad/m."""
        return 2 * np.pi / self.wavelength

    @property
    def bragg_angle(self) -> float:
        """Theta_B, rad (Bragg's law)."""
        return float(np.arcsin(self.wavelength / (2 * self.plane_spacing)))

    @property
    def two_theta(self) -> float:
        """Scattering angle, rad."""
        return 2 * self.bragg_angle

    @property
    def q_norm(self) -> float:
        """``|Q| = 2 pi / d``, rad/m."""
        return 2 * np.pi / self.plane_spacing

    # -- frames -----------------------------------------------------------------------------------
    @cached_property
    def rocking_axis(self) -> np.ndarray:
        """Laboratory unit vector about which a positive rocking angle turns the crystal, right-handed."""
        return np.array([0.0, 1.0, 0.0]) if self.arm == "horizontal" else np.array([1.0, 0.0, 0.0])

    @cached_property
    def detector_frame(self) -> np.ndarray:
        """Rows are x', y', z' in laboratory coordinates, shape (3, 3)."""
        if self.arm == "horizontal":
            turn = rotation_matrix("y", self.arm_sign * self.two_theta)
        else:
            turn = rotation_matrix("x", -self.arm_sign * self.two_theta)
        return turn.T.copy()

    @property
    def k_in(self) -> np.ndarray:
        """Incident wave vector in the laboratory, rad/m."""
        return np.array([0.0, 0.0, self.wavenumber])

    @property
    def k_out(self) -> np.ndarray:
        """Diffracted wave vector at the Bragg peak in the laboratory, rad/m."""
        return self.wavenumber * self.detector_frame[2]

    @property
    def q_vector(self) -> np.ndarray:
        """``Q = k_out - k_in`` in the laboratory, rad/m."""
        return self.k_out - self.k_in

    @cached_property
    def rocking_gradient(self) -> np.ndarray:
        """``dQ / dTheta`` in the detector frame (x', y', z'), 1/m per rad, shape (3,)."""
        return self.detector_frame @ np.cross(self.rocking_axis, self.q_vector)

    @property
    def shear(self) -> tuple[float, float]:
        """(shear_x, shear_y) of ``z' = zeta + shear_x x' + shear_y y'``; dimensionless."""
        g = self.rocking_gradient
        return float(-g[0] / g[2]), float(-g[1] / g[2])

    # -- sampling ---------------------------------------------------------------------------------
    @property
    def propagation_distance(self) -> float:
        """From the last plane before the detector (modulator, or crystal when it is out), m."""
        return self.detector_distance - self.modulator_distance

    def object_pixel(self, n_pixels: int) -> float:
        """Pixel in metres of the plane that `n_pixels` detector pixels are the far field of."""
        return self.wavelength * self.propagation_distance / (n_pixels * self.pixel_size)

    def rocking_voxel(self, n_angles: int, step_deg: float) -> float:
        """Voxel along zeta in metres of `n_angles` frames `step_deg` degrees apart."""
        return float(2 * np.pi / (n_angles * abs(self.slow_frequency_step(step_deg))))

    def slow_frequency_step(self, step_deg: float) -> float:
        """Angular frequency kappa per rocking step, rad/m.

        A slice is ``P_j = sum_zeta rho exp(-i kappa_j zeta)`` with ``kappa = -Theta rocking_gradient[2]``.
        """
        return float(-np.deg2rad(step_deg) * self.rocking_gradient[2])

    @property
    def walk_per_radian(self) -> tuple[float, float]:
        """Tilt (x', y') of the diffracted beam per rad of rocking, rad/rad.

        The beam at the modulator walks by this times ``modulator_distance`` (paper: 16.1 urad per 0.005 deg).
        """
        gx, gy, _ = self.rocking_gradient / self.wavenumber
        return float(gx), float(gy)

    def with_modulator(self, distance: float) -> Geometry:
        """Return the same geometry with the modulator `distance` metres behind the crystal (0: out)."""
        return replace(self, modulator_distance=distance)
