"""The digital twin: counts on the detector from the readings of the motors.

Everything is computed in the laboratory and detector frames of `bcmi_beamline.geometry` from rotations,
projections and Fresnel integrals; no grid, kernel or array convention is shared with the reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bcmi_beamline.config import Beamline, CircleConfig, Preset
from bcmi_beamline.geometry import rotation_matrix
from bcmi_beamline.sim.crystal import Crystal, make_crystal
from bcmi_beamline.sim.detector import EigerDetector
from bcmi_beamline.sim.modulator import MAP_PIXEL, ModulatorChip, Placement, place_chip
from bcmi_beamline.sim.nuisances import Drift, FluxNoise, PositionError
from bcmi_beamline.sim.optics import DetectorWindow

INCIDENT_FLUX = 1e10
"""Photons per second that the monitor sees on average."""

COHERENCE_LENGTH_PER_BEAM = 1.0
"""Horizontal coherence length at the crystal, in beam widths, where more than one mode is asked for."""

_PARAXIAL_COSINE = 0.5
"""A chip turned further than this from the beam is not in it: its frame is not modelled edge on."""


@dataclass(frozen=True)
class _ExitWave:
    """The diffracted wave just behind the crystal."""

    wave: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    depth: float
    """z' of the crystal, m."""


@dataclass(frozen=True)
class _Plane:
    """The plane of the modulator for one distance and one place of the crystal."""

    window: DetectorWindow
    coordinates: np.ndarray
    to_rows: np.ndarray
    to_columns: np.ndarray


class Twin:
    """One beamline with one experiment on it.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset

    Notes
    -----
    Frames come from one random generator, so that the same calls in the same order give the same counts.
    A twin serves one thread.
    """

    def __init__(self, beamline: Beamline, preset: Preset) -> None:
        sim = preset.sim
        self.beamline = beamline
        self.preset = preset
        self.geometry = beamline.geometry()
        self.crystal: Crystal = make_crystal(sim.crystal, sim.voxel_nm * 1e-9, self.geometry)
        self.chip = ModulatorChip(sim.modulator, beamline.energy_ev)
        self.detector = EigerDetector(
            beamline.eiger, sim.nuisances.background_per_pixel_s, sim.nuisances.seed
        )
        self.drift = Drift(sim.nuisances)
        self._flux_noise = FluxNoise(sim.nuisances)
        self._position_error = PositionError(sim.nuisances)
        self._rng = np.random.default_rng([sim.nuisances.seed, 5])
        self._pivot = (np.array(beamline.nanogoniometer.pivot_um) + sim.hidden.pivot_um) * 1e-6
        self._survey = self._survey_stage()
        self._bragg = self._circles(self.aligned_pose())
        self._modes = self._coherence_modes()
        self._window_pixels = 128 * -(-(preset.plan.window + 64) // 128)
        self._plane_cache: tuple[tuple, _Plane] | None = None

        self._scatterer = self.crystal.image() * self._illumination()
        cell = self.crystal.voxel_size[1] * self.crystal.voxel_size[2]
        power = float((np.abs(self._scatterer.sum(axis=0)) ** 2).sum(dtype=float)) * cell
        self._scatterer *= np.float32(np.sqrt(sim.peak_counts_per_s / power))

    # -- poses ------------------------------------------------------------------------------------
    def nominal_pose(self) -> dict[str, float]:
        """Readings the operator starts from: the expected Bragg peak, the modulator in and untilted."""
        beamline, two_theta = self.beamline, float(np.rad2deg(self.geometry.two_theta))
        place = beamline.nanogoniometer.positions.get("in", {})
        pose = dict.fromkeys(("mu", "eta", "phi", "nu", "delta", "mchi", "mphi"), 0.0)
        pose |= dict.fromkeys(("sample_x", "sample_y", "sample_z"), 0.0)
        pose |= {"x": place.get("x", 0.0), "y": place.get("y", 0.0), "z": self.preset.plan.modulator_z_um}
        pose["shutter"] = 1.0
        pose[beamline.rocking_circle] = beamline.reflection.rocking_nominal_deg
        if beamline.arm == "horizontal":
            pose["nu"] = beamline.diffractometer.nu.sense * beamline.arm_sign * two_theta
        else:
            pose["delta"] = -beamline.diffractometer.delta.sense * beamline.arm_sign * two_theta
        return pose

    def aligned_pose(self) -> dict[str, float]:
        """The nominal pose at the true peak, with the stage of the modulator along the diffracted beam."""
        hidden = self.preset.sim.hidden
        pose = self.nominal_pose()
        pose[self.beamline.rocking_circle] += hidden.bragg_offset_deg
        shift = dict(zip("xyz", -self._survey * 1e6, strict=True))
        pose |= {axis: pose[axis] + float(shift[axis]) for axis in "xyz"}
        return pose | {"mchi": hidden.mchi_deg, "mphi": hidden.mphi_deg}

    # -- what the beamline shows --------------------------------------------------------------------
    def flux(self, time_s: float = 0.0) -> float:
        """Incident flux that the monitor reads, photons/s."""
        return INCIDENT_FLUX * self._flux_noise(time_s)

    def frame(self, pose: Mapping[str, float], exposure_s: float, time_s: float = 0.0) -> np.ndarray:
        """Counts of one exposure.

        Parameters
        ----------
        pose : mapping of str to float
            Readings: `mu eta phi nu delta mchi mphi` (deg), `x y z sample_x sample_y sample_z` (um),
            `shutter` (0, 1). What is missing stands as in `nominal_pose`.
        exposure_s : float
        time_s : float
            Start of the exposure, for drift and flux.

        Returns
        -------
        ndarray, (rows, columns), uint32
            Pixels of the gaps read ``2^bit_depth - 1``.

        Raises
        ------
        ValueError
            When `pose` names an axis there is none of, or a reading is not finite.
        """
        pose = self._complete(pose)
        photons, corner = None, (0, 0)
        if pose["shutter"] and (beam := self._beam_pixel(pose)) is not None:
            whole = np.rint(beam).astype(int)
            rate = self._rate(pose, tuple(beam - whole), time_s)
            corner = tuple(int(i) for i in whole - self._window_pixels // 2)
            if rate is not None:
                photons = rate * (exposure_s * self._flux_noise(time_s + exposure_s / 2))
        return self.detector.expose(photons, corner, exposure_s, self._rng)  # pyright: ignore[reportArgumentType]

    # -- truth, for comparison only -----------------------------------------------------------------
    def truth_object(self) -> tuple[np.ndarray, tuple[float, float, float]]:
        """The crystal times the beam on it.

        Returns
        -------
        image : ndarray, (Nz, Ny, Nx), complex64
            On an orthogonal grid (z', y', x') of the detector frame, rows to -y', origin at ``n // 2``;
            the modulus is 1 deep inside where the beam is brightest.
        voxel_size : tuple of float
            m.
        """
        image = self.crystal.image() * self._illumination()
        return image.astype(np.complex64), self.crystal.voxel_size

    def truth_modulator(self, pixel_size: float, shape: tuple[int, int]) -> np.ndarray:
        """Transmission of the perpendicular modulator, band-limited to `pixel_size`.

        Parameters
        ----------
        pixel_size : float
            m.
        shape : tuple of int
            Index ``n // 2`` is the point that stands on the beam axis at `aligned_pose`.

        Returns
        -------
        ndarray, shape, complex64
            Bare membrane 1.
        """
        finer = max(1, int(np.ceil(pixel_size / MAP_PIXEL)))
        y, x = ((np.arange(n * finer) - n // 2 * finer) * (pixel_size / finer) for n in shape)
        aligned = Placement(np.eye(2), np.zeros(2), np.zeros(2), 1.0, 0.0)
        transmission = self.chip.transmission(aligned, x, y)
        if transmission is None:
            return np.zeros(shape, np.complex64)
        for axis, n in enumerate(shape):
            spectrum = np.moveaxis(np.fft.fft(transmission, axis=axis), axis, 0)
            kept = np.concatenate([spectrum[: (n + 1) // 2], spectrum[len(spectrum) - n // 2 :]])
            transmission = np.moveaxis(np.fft.ifft(kept, axis=0), 0, axis) / finer
        return transmission.astype(np.complex64)

    def truth_distance(self, pose: Mapping[str, float] | None = None) -> float:
        """Crystal to modulator along the beam at `pose` (`aligned_pose` by default), m."""
        return self._placement(self.aligned_pose() if pose is None else self._complete(pose)).distance

    def truth_spot(self, pose: Mapping[str, float]) -> tuple[float, float]:
        """(x, y) of the membrane point on the beam axis at `pose`, from that at `aligned_pose`, m."""
        placement = self._placement(self._complete(pose))
        column, row = placement.matrix @ -placement.origin
        return float(column), float(-row)

    # -- the way of the light -------------------------------------------------------------------------
    def _complete(self, pose: Mapping[str, float]) -> dict[str, float]:
        complete = self.nominal_pose()
        unknown = sorted(set(pose) - set(complete))
        if unknown:
            raise ValueError(f"the beamline has no axis {', '.join(unknown)}; axes are {', '.join(complete)}")
        complete |= pose
        bad = [name for name, value in complete.items() if not np.isfinite(value)]
        if bad:
            raise ValueError(f"the reading of {', '.join(bad)} is not a finite number")
        jitter = self.preset.sim.nuisances.angle_jitter_deg
        if jitter:
            complete[self.beamline.rocking_circle] += jitter * self._rng.normal()
        return complete

    def _rate(
        self, pose: Mapping[str, float], shift: tuple[float, float], time_s: float
    ) -> np.ndarray | None:
        """Photons per second and pixel on the window; None where no light arrives."""
        rate = None
        for weight, tilt in self._modes:
            exit_wave = self._exit_wave(pose, time_s, tilt)
            intensity = None if exit_wave is None else self._propagate(exit_wave, pose, shift)
            if intensity is not None:
                rate = weight * intensity if rate is None else rate + weight * intensity
        return rate

    def _exit_wave(self, pose: Mapping[str, float], time_s: float, tilt: float) -> _ExitWave | None:
        """Projection along z' of ``rho exp(i dQ.r)`` times the beam.

        The beam is a Gaussian, so moving it across the crystal multiplies by an exponential of the
        coordinates: like the phase of dQ it separates into one factor per axis. What turns with the crystal
        besides Q is its outline, by less than a voxel over a rocking curve, and is left out.

        `tilt` is the angular frequency that a tilt of the incident wave adds along x, rad/m.
        """
        frame = self.geometry.detector_frame
        place = np.array([pose[f"sample_{axis}"] for axis in "xyz"]) * 1e-6 + self.drift(time_s)
        waist = self._waist
        if np.hypot(*place[:2]) > 5 * waist:
            return None
        turned = self._circles(pose) @ self._bragg.T @ self.geometry.q_vector
        dq = frame @ (turned - self.geometry.q_vector)
        exponent = 1j * (dq + tilt * frame[:, 0]) - (2 / waist**2) * (frame[:, :2] @ place[:2])
        if (np.abs(dq[::-1]) * self.crystal.voxel_size > np.pi).any():
            return None
        z, y, x = self.crystal.axes
        factors = (np.exp(e * c).astype(np.complex64) for e, c in zip(exponent, (x, y, z), strict=True))
        along_x, along_y, along_z = factors
        flat = self._scatterer.reshape(len(z), -1)
        wave = (along_z @ flat).reshape(len(y), len(x))
        wave *= np.float32(np.exp(-(place[:2] @ place[:2]) / waist**2))
        wave *= along_y[:, None]
        wave *= along_x
        shift = frame @ place
        return _ExitWave(wave, -y - shift[1], x + shift[0], float(shift[2]))

    def _propagate(
        self, exit_wave: _ExitWave, pose: Mapping[str, float], shift: tuple[float, float]
    ) -> np.ndarray | None:
        placement = self._placement(pose)
        distance = placement.distance - exit_wave.depth
        in_reach = placement.cosine > _PARAXIAL_COSINE and 0 < distance < self.geometry.detector_distance / 2
        if in_reach:
            plane = self._plane(exit_wave, round(distance, 8), shift)
            x = plane.coordinates
            if not self.chip.is_clear(placement, x, x):
                transmission = self.chip.transmission(placement, x, x)
                if transmission is None:
                    return None
                transmission *= plane.to_rows @ exit_wave.wave @ plane.to_columns
                return plane.window.intensity(transmission)
        window = self._detector_window(2, shift, self.geometry.detector_distance - exit_wave.depth)
        return window.intensity_of_source(exit_wave.wave, exit_wave.rows, exit_wave.columns)

    def _plane(self, exit_wave: _ExitWave, distance: float, shift: tuple[float, float]) -> _Plane:
        key = (distance, shift, exit_wave.rows[0], exit_wave.columns[0])
        if self._plane_cache is not None and self._plane_cache[0] == key:
            return self._plane_cache[1]
        beyond = self.geometry.detector_distance - exit_wave.depth - distance
        pixel = self.geometry.pixel_size
        field = self.geometry.wavelength * beyond / pixel
        lit = self.preset.plan.window * pixel / self.geometry.detector_distance * distance
        window = self._detector_window(max(2, int(np.ceil(lit / field - 0.1))), shift, beyond)

        plane = _Plane(window, *window.arrival(exit_wave.rows, exit_wave.columns, distance))
        self._plane_cache = (key, plane)
        return plane

    def _detector_window(
        self, oversampling: int, shift: tuple[float, float], distance: float
    ) -> DetectorWindow:
        return DetectorWindow(
            pixels=self._window_pixels,
            oversampling=oversampling,
            shift=shift,
            wavelength=self.geometry.wavelength,
            distance=distance,
            pixel_size=self.geometry.pixel_size,
        )

    # -- where things stand -----------------------------------------------------------------------------
    def _circles(
        self, pose: Mapping[str, float], names: tuple[str, ...] = ("mu", "eta", "phi")
    ) -> np.ndarray:
        """Rotation of circles, outer to inner."""
        total = np.eye(3)
        for name in names:
            circle: CircleConfig = getattr(self.beamline.diffractometer, name)
            total = total @ rotation_matrix(circle.axis, circle.sense * np.deg2rad(pose[name]))
        return total

    def _beam_pixel(self, pose: Mapping[str, float]) -> np.ndarray | None:
        """(row, column) at which the k_out direction meets the detector; None where it does not."""
        across, up, along = self._circles(pose, ("nu", "delta")).T @ self.geometry.detector_frame[2]
        if along < 0.5:
            return None
        config = self.beamline.eiger
        per_tangent = self.geometry.detector_distance / self.geometry.pixel_size / along
        centre = np.array([config.beam_row, config.beam_column]) + self.preset.sim.hidden.beam_offset_px
        pixel = centre + per_tangent * np.array([-up, across])
        # rounded so that the noise of rotations does not spoil the cache
        return np.round(pixel, 6)

    def _placement(self, pose: Mapping[str, float]) -> Placement:
        hidden, stage = self.preset.sim.hidden, self.beamline.nanogoniometer
        carriers = ("mu", "eta")
        turned = self._circles(pose, carriers) @ self._circles(self.aligned_pose(), carriers).T
        frame = self.geometry.detector_frame
        x, y, z = (pose[axis] * 1e-6 for axis in "xyz")
        error = self._position_error(x, y)
        reading = np.array([x + error[0], y + error[1], z + hidden.distance_um * 1e-6])
        return place_chip(
            translation=reading + self._survey,
            tilts=(np.deg2rad(pose["mchi"] - hidden.mchi_deg), np.deg2rad(pose["mphi"] - hidden.mphi_deg)),
            pivot=self._pivot,
            squareness=(np.deg2rad(hidden.squareness_deg[0]), np.deg2rad(hidden.squareness_deg[1])),
            origin=np.array([0.0, 0.0, stage.distance_at_z0_um * 1e-6]),
            carrier=frame @ turned @ frame.T,
        )

    def _survey_stage(self) -> np.ndarray:
        """Zero of the translations, m: at the position "in", tilts reading 0, the pattern meets the beam.

        That is how the operator mounts it, whatever tilt the membrane then really has.
        """
        hidden, pose = self.preset.sim.hidden, self.nominal_pose()
        tilt = rotation_matrix("y", -np.deg2rad(hidden.mphi_deg)) @ rotation_matrix(
            "x", -np.deg2rad(hidden.mchi_deg)
        )
        seen = np.array([pose["x"], pose["y"], pose["z"] + hidden.distance_um]) * 1e-6
        return tilt.T @ (np.array([0, 0, seen[2]]) - self._pivot) + self._pivot - seen

    # -- the beam -----------------------------------------------------------------------------------------
    @property
    def _waist(self) -> float:
        """Radius at which the amplitude of the focused beam falls to 1/e, m."""
        return self.preset.sim.beam_fwhm_um * 1e-6 / float(np.sqrt(2 * np.log(2)))

    def _illumination(self) -> np.ndarray:
        """Amplitude of the centred beam on the crystal, (Nz, Ny, Nx), float32."""
        z, y, x = self.crystal.axes
        frame = self.geometry.detector_frame
        square = np.zeros((len(z), len(y), len(x)))
        for lab in range(2):
            across = frame[0, lab] * x + frame[1, lab] * y[:, None] + frame[2, lab] * z[:, None, None]
            square += across**2
        return np.exp(-square / self._waist**2).astype(np.float32)

    def _coherence_modes(self) -> list[tuple[float, float]]:
        """(weight, angular frequency along x in rad/m) of a Gaussian source, Gauss-Hermite quadrature.

        A source of Gaussian brightness makes a wave of the same coherence length everywhere (Schell).
        """
        count = self.preset.sim.nuisances.coherence_modes
        nodes, weights = np.polynomial.hermite.hermgauss(count)
        spread = 1 / (COHERENCE_LENGTH_PER_BEAM * self.preset.sim.beam_fwhm_um * 1e-6)
        tilts = np.sqrt(2) * spread * nodes
        return [(float(w), float(t)) for w, t in zip(weights / weights.sum(), tilts, strict=True)]
