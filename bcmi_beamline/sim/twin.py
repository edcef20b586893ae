"""The digital twin: counts on the detector from the readings of the motors.

Everything is computed in the laboratory and detector frames of `bcmi_beamline.geometry` from rotations,
projections and Fresnel integrals; no grid, kernel or array convention is shared with the reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bcmi_beamline.config import Beamline, CircleConfig, Preset
from bcmi_beamline.geometry import rotation_matrix, wavelength_from_energy
from bcmi_beamline.sim.crystal import Crystal, make_crystal
from bcmi_beamline.sim.detector import EigerDetector
from bcmi_beamline.sim.incident import FULL_CURRENT_MA, IncidentBeam, Section
from bcmi_beamline.sim.modulator import MAP_PIXEL, ModulatorChip, Placement, place_chip
from bcmi_beamline.sim.nuisances import (
    AngleError,
    Drift,
    FluxNoise,
    ModulatorDrift,
    PositionError,
    RingCurrent,
    Temperatures,
)
from bcmi_beamline.sim.optics import DetectorWindow, centred, fresnel_matrix

_PARAXIAL_COSINE = 0.5
"""A chip turned further than this from the beam is not in it: its frame is not modelled edge on."""

_PLACE_STEP = 0.5e-6
"""Grid of crystal places for which the way to the modulator is worked out; the rest is exact phases, m."""

_DISTANCE_STEP = 1e-7
"""Grid of distances for the same, m: 0.01 rad at the finest detail that the detector sees."""


@dataclass(frozen=True)
class TrueState:
    """Where things truly stand in one exposure, for comparison only.

    Parameters
    ----------
    angle_deg : float
        Of the crystal from its Bragg peak, right-handed about the rocking axis.
    position : tuple of float
        (x, y) of the modulator's pattern from where the aligned modulator stands, m.
    distance : float
        Crystal to modulator along the beam axis, m.
    crystal : tuple of float
        Displacement of the crystal by drift in the laboratory (x, y, z), m.
    energy_ev : float
    flux : float
        Incident flux behind slits and filters relative to the nominal one.
    """

    angle_deg: float
    position: tuple[float, float]
    distance: float
    crystal: tuple[float, float, float]
    energy_ev: float
    flux: float


@dataclass(frozen=True)
class _Light:
    """The beam that meets the crystal."""

    energy_ev: float
    sections: tuple[Section, Section]
    """Along laboratory x and y."""

    @property
    def wavelength(self) -> float:
        """Wavelength for the way from crystal to detector, m: to 0.1 eV, so that warmth spoils no cache."""
        return wavelength_from_energy(round(self.energy_ev, 1))

    def modes(self, counts: tuple[int, int]) -> list[tuple[float, np.ndarray]]:
        """(weight, angular frequencies along x, y in rad/m), Gauss-Hermite quadrature over the source.

        A tilt of the incident wave for every point of a Gaussian source makes a wave of the same coherence
        length everywhere (Schell).
        """
        weights, tilts = [], []
        for section, count in zip(self.sections, counts, strict=True):
            nodes, parts = np.polynomial.hermite.hermgauss(count)
            weights.append(parts / parts.sum())
            tilts.append(section.tilt + np.sqrt(2) / section.coherence * nodes)
        return [
            (float(wx * wy), np.array([tx, ty]))
            for wx, tx in zip(weights[0], tilts[0], strict=True)
            for wy, ty in zip(weights[1], tilts[1], strict=True)
        ]


@dataclass(frozen=True)
class _ExitWave:
    """The diffracted wave just behind the crystal; `rows` and `columns` begin at the crystal's centre."""

    wave: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    place: np.ndarray
    """Of the crystal's centre in row sense (rows, columns) and along z', m."""
    wavelength: float


@dataclass(frozen=True)
class _Plane:
    """The plane of the modulator for one distance and one place of the crystal."""

    window: DetectorWindow
    coordinates: np.ndarray
    to_rows: np.ndarray
    to_columns: np.ndarray
    place: np.ndarray
    distance: float

    def arrive(self, exit_wave: _ExitWave) -> np.ndarray:
        """The wave in this plane.

        A source beside the place that the matrices stand for costs a phase ramp on either side:
        ``(X - x - s)^2 = (X - x)^2 - 2 (X - x) s + s^2``.
        """
        wave, rows, columns = exit_wave.wave, self.to_rows, self.to_columns
        beside = exit_wave.place[:2] - self.place
        if np.abs(beside).max() > 1e-12:
            factor = 2j * np.pi / (exit_wave.wavelength * self.distance)
            on_rows, on_columns = (
                np.exp(factor * s * x).astype(np.complex64)
                for s, x in zip(beside, (exit_wave.rows, exit_wave.columns), strict=True)
            )
            wave = wave * on_rows[:, None] * on_columns
            far_rows, far_columns = (
                np.exp(-factor * s * (self.coordinates - p)).astype(np.complex64)
                for s, p in zip(beside, self.place, strict=True)
            )
            rows, columns = rows * far_rows[:, None], columns * far_columns
        return rows @ wave @ columns


class Twin:
    """One beamline with one experiment on it.

    Parameters
    ----------
    beamline : Beamline
    preset : Preset

    crystal : Crystal, optional
        Instead of the one that the preset describes.

    Notes
    -----
    Frames come from one random generator, so that the same calls in the same order give the same counts.
    A twin serves one thread.
    """

    def __init__(self, beamline: Beamline, preset: Preset, crystal: Crystal | None = None) -> None:
        sim, nuisances = preset.sim, preset.sim.nuisances
        self.beamline = beamline
        self.preset = preset
        self.geometry = beamline.geometry()
        self.crystal: Crystal = crystal or make_crystal(sim.crystal, sim.voxel_nm * 1e-9, self.geometry)
        self.chip = ModulatorChip(sim.modulator, beamline.energy_ev)
        self.detector = EigerDetector(
            beamline.eiger,
            nuisances.background_per_pixel_s,
            nuisances.seed,
            nuisances.hot_pixels,
            nuisances.dead_pixels,
        )
        self.temperatures = Temperatures(nuisances, beamline.temperatures)
        self.ring_current = RingCurrent(nuisances, FULL_CURRENT_MA)
        self._drift = Drift(nuisances)
        self._modulator_drift = ModulatorDrift(nuisances)
        self._flux_noise = FluxNoise(nuisances)
        self._position_error = PositionError(nuisances)
        self._angle_error = AngleError(nuisances)
        self._rng = np.random.default_rng([nuisances.seed, 5])
        self._incident = IncidentBeam(beamline, sim)
        self._nominal = self._nominal_pose()
        self._pivot = (np.array(beamline.nanogoniometer.pivot_um) + sim.hidden.pivot_um) * 1e-6
        self._survey = self._survey_stage()
        self._bragg = self._circles(self.aligned_pose())
        self._window_pixels = 128 * -(-(preset.plan.window + 64) // 128)
        self._plane_cache: tuple[tuple, _Plane] | None = None

        self._image = self.crystal.image()
        self._amplitude = np.float32(1)
        light = self._light(self._nominal)
        self._lit_by, self._scatterer = light.sections, self._light_up(light.sections)
        cell = self.crystal.voxel_size[1] * self.crystal.voxel_size[2]
        power = float((np.abs(self._scatterer.sum(axis=0)) ** 2).sum(dtype=float)) * cell
        self._amplitude = np.float32(np.sqrt(sim.peak_counts_per_s * self._polarisation() / power))
        self._scatterer *= self._amplitude

    # -- poses ------------------------------------------------------------------------------------
    def nominal_pose(self) -> dict[str, float]:
        """Readings the operator starts from: the expected Bragg peak, the modulator in and untilted.

        The incident beam is as the experiment wants it: slits at their gaps, no filter in, a full ring.
        """
        return dict(self._nominal)

    def _nominal_pose(self) -> dict[str, float]:
        beamline, two_theta = self.beamline, float(np.rad2deg(self.geometry.two_theta))
        place = beamline.nanogoniometer.positions.get("in", {})
        pose = dict.fromkeys(("mu", "eta", "phi", "nu", "delta", "mchi", "mphi"), 0.0)
        pose |= dict.fromkeys(("sample_x", "sample_y", "sample_z"), 0.0)
        pose |= {"x": place.get("x", 0.0), "y": place.get("y", 0.0), "z": self.preset.plan.modulator_z_um}
        pose["shutter"] = 1.0
        pose |= self._incident.nominal()
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

    def hold_modulator(self, pose: Mapping[str, float]) -> dict[str, float]:
        """`pose` with the stage moved so that circles which carry the modulator leave it aligned.

        Two tilts cannot undo a turn about the beam: a product of two small angles stays.
        """
        hidden, aligned = self.preset.sim.hidden, self.aligned_pose()
        carrier = self._carrier(self._complete(pose))
        tilt_x = float(np.arctan2(-carrier[2, 1], carrier[1, 1]))
        tilt_y = float(np.arctan2(-carrier[0, 2], carrier[0, 0]))
        turn = rotation_matrix("y", tilt_y) @ rotation_matrix("x", tilt_x)
        origin = self._stage_origin
        known = self._survey + np.array([0, 0, hidden.distance_um * 1e-6])
        base = np.array([aligned[axis] for axis in "xyz"]) * 1e-6 + known + origin
        stage = turn.T @ (carrier.T @ base - self._pivot - origin) + self._pivot - known
        held = dict(zip("xyz", (float(v) * 1e6 for v in stage), strict=True))
        held["mchi"] = aligned["mchi"] + float(np.rad2deg(tilt_x))
        held["mphi"] = aligned["mphi"] + float(np.rad2deg(tilt_y))
        return {**pose, **held}

    # -- what the beamline shows --------------------------------------------------------------------
    def flux(self, time_s: float = 0.0, pose: Mapping[str, float] | None = None) -> float:
        """What the beam monitor reads, photons/s: `Beamline.nominal_flux` at the nominal setting, full ring.

        It stands behind slits and filters and before the shutter, so that it watches the beam between
        exposures too. Where `pose` says nothing everything is nominal and the ring as at `time_s`.
        """
        return self.beamline.nominal_flux * self._relative_flux(self._complete(pose or {}, time_s), time_s)

    def frame(
        self,
        pose: Mapping[str, float],
        exposure_s: float,
        time_s: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Counts of one exposure.

        Parameters
        ----------
        pose : mapping of str to float
            Readings by the names of `nominal_pose`: circles, tilts (deg), `x y z`, `sample_x sample_y
            sample_z` (um), `slits_...` (um), `energy` (keV), `focus` (mm), `ring_current` (mA) and `shutter`,
            `beam`, `filter_...` (0, 1). What is missing stands as there, the ring current as at `time_s`.
        exposure_s : float
        time_s : float
            Start of the exposure; what drifts stands as in its middle.
        rng : Generator, optional
            Of the counting noise, instead of the twin's own.

        Returns
        -------
        ndarray, (rows, columns), uint32
            Pixels of the gaps read ``2^bits - 1`` with the bits of that exposure.

        Raises
        ------
        ValueError
            When `pose` names an axis there is none of, or a reading is not finite.
        """
        middle = time_s + exposure_s / 2
        pose = self._complete(pose, middle)
        photons, corner = None, (0, 0)
        if pose["shutter"] and (beam := self._beam_pixel(pose)) is not None:
            whole = np.rint(beam).astype(int)
            flux = self._flux_noise(middle)
            rate = self._rate(self._true_pose(pose, time_s), tuple(beam - whole), middle)
            corner = tuple(int(i) for i in whole - self._window_pixels // 2)
            if rate is not None:
                photons = rate * np.float32(exposure_s * flux)
        return self.detector.expose(photons, corner, exposure_s, rng or self._rng)  # pyright: ignore[reportArgumentType]

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
        return self._image * self._illumination(self._light(self._nominal).sections), self.crystal.voxel_size

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

    def truth_probe(self, pixel_size: float, size: int) -> np.ndarray:
        """The Bragg beam where the modulator stands at `aligned_pose`, its first coherence mode.

        Parameters
        ----------
        pixel_size : float
            m.
        size : int
            Index ``size // 2`` is the beam axis.

        Returns
        -------
        ndarray, (size, size), complex64
            Square root of photons per second and pixel.
        """
        pose = self.aligned_pose()
        light = self._light(pose)
        _, tilt = max(light.modes(self._incident.modes), key=lambda mode: mode[0])
        wave = self._exit_wave(pose, 0.0, light, tilt)
        if wave is None:
            raise ValueError("the reflection is out of reach at the nominal pose")
        distance = self.truth_distance() - float(wave.place[2])
        target = centred(size, pixel_size)
        rows, columns = (
            fresnel_matrix(target, source + place, light.wavelength, distance)
            for source, place in zip((wave.rows, wave.columns), wave.place[:2], strict=True)
        )
        return (rows @ wave.wave @ columns.T) * np.float32(pixel_size)

    def truth_distance(self, pose: Mapping[str, float] | None = None) -> float:
        """Crystal to modulator along the beam at `pose` (`aligned_pose` by default), m."""
        return self._placement(self.aligned_pose() if pose is None else self._complete(pose)).distance

    def truth_spot(self, pose: Mapping[str, float]) -> tuple[float, float]:
        """(x, y) of the membrane point on the beam axis at `pose`, from that at `aligned_pose`, m."""
        placement = self._placement(self._complete(pose))
        column, row = placement.matrix @ -placement.origin
        return float(column), float(-row)

    def truth_state(self, pose: Mapping[str, float], exposure_s: float, time_s: float = 0.0) -> TrueState:
        """What `frame` with the same arguments was made from."""
        middle = time_s + exposure_s / 2
        pose = self._complete(pose, middle)
        true = self._true_pose(pose, time_s)
        turned = self._circles(true) @ self._bragg.T
        axis = self.geometry.rocking_axis
        sine = axis @ np.array([turned[2, 1] - turned[1, 2], turned[0, 2] - turned[2, 0],
                                turned[1, 0] - turned[0, 1]]) / 2  # fmt: skip
        placement = self._placement(true, middle)
        column, row = placement.matrix @ -placement.origin
        return TrueState(
            angle_deg=float(np.rad2deg(np.arcsin(sine))),
            position=(-float(column), float(row)),
            distance=placement.distance,
            crystal=tuple(float(v) for v in self.drift(middle)),  # pyright: ignore[reportArgumentType]
            energy_ev=self._energy_ev(true, middle),
            flux=self._relative_flux(pose, middle),
        )

    def drift(self, time_s: float) -> np.ndarray:
        """Displacement of the crystal in the laboratory (x, y, z) by drift and warmth, m."""
        warmth = self.temperatures.change("hutch", time_s)
        return self._drift(time_s) + warmth * 1e-9 * np.array(self.preset.sim.nuisances.crystal_nm_per_k)

    # -- the way of the light -------------------------------------------------------------------------
    def _complete(self, pose: Mapping[str, float], time_s: float = 0.0) -> dict[str, float]:
        unknown = sorted(set(pose) - set(self._nominal))
        if unknown:
            raise ValueError(
                f"the beamline has no axis {', '.join(unknown)}; axes are {', '.join(self._nominal)}"
            )
        complete = {**self._nominal, "ring_current": self.ring_current(time_s), **pose}
        bad = [name for name, value in complete.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"the reading of {', '.join(bad)} is not a finite number")
        if complete.get("energy", 1.0) <= 0:
            raise ValueError(f"energy must be above 0 keV, not {complete['energy']:g}")
        return complete

    def _true_pose(self, pose: Mapping[str, float], time_s: float) -> dict[str, float]:
        """`pose` with the error of the rocking circle."""
        circle = self.beamline.rocking_circle
        return {**pose, circle: pose[circle] + self._angle_error(pose[circle], time_s)}

    def _relative_flux(self, pose: Mapping[str, float], time_s: float) -> float:
        return self._incident.intensity(pose) * self._flux_noise(time_s)

    def _energy_ev(self, pose: Mapping[str, float], time_s: float) -> float:
        return self._incident.energy_ev(pose, self.temperatures.change("monochromator", time_s))

    def _light(self, pose: Mapping[str, float], time_s: float = 0.0) -> _Light:
        energy_ev = self._energy_ev(pose, time_s)
        return _Light(energy_ev, self._incident.sections(pose, round(energy_ev, 1)))

    def _rate(
        self, pose: Mapping[str, float], shift: tuple[float, float], time_s: float
    ) -> np.ndarray | None:
        """Photons per second and pixel on the window; None where no light arrives."""
        intensity = self._incident.intensity(pose)
        if intensity == 0:
            return None
        light = self._light(pose, time_s)
        waves = []
        for weight, tilt in light.modes(self._incident.modes):
            wave = self._exit_wave(pose, time_s, light, tilt)
            if wave is not None:
                waves.append(replace(wave, wave=wave.wave * np.float32(np.sqrt(weight * intensity))))
        return self._propagate(waves, pose, light, shift, time_s) if waves else None

    def _exit_wave(
        self, pose: Mapping[str, float], time_s: float, light: _Light, tilt: np.ndarray
    ) -> _ExitWave | None:
        """Projection along z' of ``rho exp(i (k_in + Q - k_out).r)`` times the beam.

        The beam is a Gaussian, so moving it across the crystal multiplies by an exponential of the
        coordinates: like the phase of dQ it separates into one factor per axis. What turns with the crystal
        besides Q is its outline, by less than a voxel over a rocking curve, and is left out.

        `tilt` holds the angular frequencies that a tilt of the incident wave adds along x and y, rad/m.
        """
        frame = self.geometry.detector_frame
        place = np.array([pose[f"sample_{axis}"] for axis in "xyz"]) * 1e-6 + self.drift(time_s)
        widths = np.array([section.waist for section in light.sections])
        if np.hypot(*(place[:2] / widths)) > 5:
            return None
        turned = self._circles(pose) @ self._bragg.T @ self.geometry.q_vector
        wavenumber = 2 * np.pi / wavelength_from_energy(light.energy_ev)
        dq = frame @ (turned - wavenumber * (frame[2] - [0, 0, 1]))
        if (np.abs(dq[::-1]) * self.crystal.voxel_size > np.pi).any():
            return None
        inverse = np.array([section.inverse for section in light.sections])
        exponent = 1j * (dq + frame[:, :2] @ tilt) - 2 * frame[:, :2] @ (inverse * place[:2])
        z, y, x = self.crystal.axes
        factors = (np.exp(e * c).astype(np.complex64) for e, c in zip(exponent, (x, y, z), strict=True))
        along_x, along_y, along_z = factors
        flat = self._lit(light.sections).reshape(len(z), -1)
        wave = (along_z @ flat).reshape(len(y), len(x))
        wave *= np.float32(np.exp(-(np.real(inverse) @ place[:2] ** 2)))
        wave *= along_y[:, None]
        wave *= along_x
        shift = frame @ place
        return _ExitWave(wave, -y, x, np.array([-shift[1], shift[0], shift[2]]), light.wavelength)

    def _propagate(
        self,
        waves: list[_ExitWave],
        pose: Mapping[str, float],
        light: _Light,
        shift: tuple[float, float],
        time_s: float,
    ) -> np.ndarray | None:
        """Rate of waves that do not interfere with each other."""
        placement = self._placement(pose, time_s)
        depth = float(waves[0].place[2])
        distance = placement.distance - depth
        in_reach = placement.cosine > _PARAXIAL_COSINE and 0 < distance < self.geometry.detector_distance / 2
        if in_reach:
            plane = self._plane(waves[0], _DISTANCE_STEP * round(distance / _DISTANCE_STEP), shift)
            x = plane.coordinates
            if not self.chip.is_clear(placement, x, x):
                energy_ev = round(light.energy_ev, 1)
                transmission = self.chip.transmission(placement, x, x, energy_ev)
                if transmission is None:
                    return None
                return _total(plane.window.intensity(transmission * plane.arrive(wave)) for wave in waves)
        beyond = self.geometry.detector_distance - depth
        window = self._detector_window(2, shift, beyond, light.wavelength)
        return _total(
            window.intensity_of_source(wave.wave, wave.rows + wave.place[0], wave.columns + wave.place[1])
            for wave in waves
        )

    def _plane(self, wave: _ExitWave, distance: float, shift: tuple[float, float]) -> _Plane:
        place = _PLACE_STEP * np.rint(wave.place[:2] / _PLACE_STEP)
        key = (distance, shift, wave.wavelength, *place)
        if self._plane_cache is not None and self._plane_cache[0] == key:
            return self._plane_cache[1]
        beyond = self.geometry.detector_distance - float(wave.place[2]) - distance
        pixel = self.geometry.pixel_size
        field = wave.wavelength * beyond / pixel
        lit = self.preset.plan.window * pixel / self.geometry.detector_distance * distance
        oversampling = max(2, int(np.ceil(lit / field - 0.1)))
        window = self._detector_window(oversampling, shift, beyond, wave.wavelength)
        arrival = window.arrival(wave.rows + place[0], wave.columns + place[1], distance)
        plane = _Plane(window, *arrival, place, distance)
        self._plane_cache = (key, plane)
        return plane

    def _detector_window(
        self, oversampling: int, shift: tuple[float, float], distance: float, wavelength: float
    ) -> DetectorWindow:
        return DetectorWindow(
            pixels=self._window_pixels,
            oversampling=oversampling,
            shift=shift,
            wavelength=wavelength,
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

    def _carrier(self, pose: Mapping[str, float]) -> np.ndarray:
        """Rotation of the circles that carry the stage from their aligned setting, in the detector frame."""
        carriers, frame = ("mu", "eta"), self.geometry.detector_frame
        turned = self._circles(pose, carriers) @ self._circles(self.aligned_pose(), carriers).T
        return frame @ turned @ frame.T

    @property
    def _stage_origin(self) -> np.ndarray:
        return np.array([0.0, 0.0, self.beamline.nanogoniometer.distance_at_z0_um * 1e-6])

    def _placement(self, pose: Mapping[str, float], time_s: float = 0.0) -> Placement:
        hidden, nuisances = self.preset.sim.hidden, self.preset.sim.nuisances
        x, y, z = (pose[axis] * 1e-6 for axis in "xyz")
        warmth = self.temperatures.change("nanogoniometer", time_s) * 1e-9
        error = self._position_error(x, y) + self._modulator_drift(time_s)
        error = error + warmth * np.array(nuisances.modulator_nm_per_k)
        reading = np.array([x + error[0], y + error[1], z + hidden.distance_um * 1e-6])
        return place_chip(
            translation=reading + self._survey,
            tilts=(np.deg2rad(pose["mchi"] - hidden.mchi_deg), np.deg2rad(pose["mphi"] - hidden.mphi_deg)),
            pivot=self._pivot,
            squareness=(np.deg2rad(hidden.squareness_deg[0]), np.deg2rad(hidden.squareness_deg[1])),
            origin=self._stage_origin,
            carrier=self._carrier(pose),
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

    # -- the beam on the crystal ----------------------------------------------------------------------
    def _polarisation(self) -> float:
        """Scattered intensity in this arm's plane over that in the horizontal plane at the same angle."""
        out, horizontal = self.geometry.detector_frame[2], np.cos(self.geometry.two_theta) ** 2
        degree = self.preset.sim.polarisation
        along_x, along_y = (1 + degree) / 2, (1 - degree) / 2
        here = along_x * (1 - out[0] ** 2) + along_y * (1 - out[1] ** 2)
        return float(here / (along_x * horizontal + along_y))

    def _lit(self, sections: tuple[Section, Section]) -> np.ndarray:
        """The crystal under a beam at its centre, (Nz, Ny, Nx), complex64; power in photons per second."""
        if not all(a.inverse == b.inverse for a, b in zip(sections, self._lit_by, strict=True)):
            self._lit_by, self._scatterer = sections, self._light_up(sections)
        return self._scatterer

    def _light_up(self, sections: tuple[Section, Section]) -> np.ndarray:
        focus = self._light(self._nominal).sections
        narrowing = np.sqrt(np.prod([a.waist / b.waist for a, b in zip(focus, sections, strict=True)]))
        return self._image * (self._illumination(sections) * (self._amplitude * np.float32(narrowing)))

    def _illumination(self, sections: tuple[Section, Section]) -> np.ndarray:
        """Amplitude of the centred beam on the crystal, 1 on its axis; broadcasts to (Nz, Ny, Nx)."""
        z, y, x = self.crystal.axes
        amplitude = np.ones((1, 1, 1), np.complex64)
        for section, (a, b, c) in zip(sections, self.geometry.detector_frame.T, strict=False):
            shares = ((a, x), (b, y[:, None]), (c, z[:, None, None]))
            across = sum((share * axis for share, axis in shares if abs(share) > 1e-12), np.zeros(1))
            amplitude = amplitude * np.exp(-section.inverse * across**2).astype(np.complex64)
        return amplitude


def _total(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Sum of arrays, into the first."""
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        total += part
    return total
