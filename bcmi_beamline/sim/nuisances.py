"""What goes wrong at a beamline, as deterministic functions of time, reading and seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

from bcmi_beamline.config import Nuisances

DAY = 86400
"""Length of the path of random drift and jumps, s; it rests afterwards."""

SHORTEST_PERIOD, LONGEST_PERIOD = 10.0, 600.0
"""Of the fluctuations of the incident flux, s."""

TEMPERATURES = {"hutch": 22.5, "nanogoniometer": 24.0, "monochromator": 25.0}
"""Mean temperatures by name, deg C; any other is `OTHER_TEMPERATURE`."""

OTHER_TEMPERATURE = 23.0


class RandomWalk:
    """A path of independent steps, one each second.

    Parameters
    ----------
    rms_per_sqrt_s : float
        m.
    axes : int
    key : list of int
        Seed.
    """

    def __init__(self, rms_per_sqrt_s: float, axes: int, key: list[int]) -> None:
        self._rest = np.zeros(axes)
        self._path: np.ndarray | None = None
        if rms_per_sqrt_s > 0:
            steps = np.random.default_rng(key).normal(scale=rms_per_sqrt_s, size=(DAY, axes))
            steps[0] = 0
            self._path = np.cumsum(steps, axis=0)

    def __call__(self, time_s: float) -> np.ndarray:
        """Displacement, (axes,), m."""
        if self._path is None:
            return self._rest
        second = min(max(time_s, 0.0), DAY - 1.001)
        i = int(second)
        return self._path[i] + (second - i) * (self._path[i + 1] - self._path[i])


class Drift:
    """Motion of the crystal: random walk, steady drift, creep that dies away, and sudden jumps.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances) -> None:
        self._walk = RandomWalk(settings.drift_nm_per_sqrt_s * 1e-9, 3, [settings.seed, 2])
        self._velocity = np.array(settings.drift_nm_per_s) * 1e-9
        self._creep = np.array(settings.creep_nm) * 1e-9
        self._creep_time = settings.creep_time_s
        self.jump_times = np.empty(0)
        """When the crystal jumps, s."""
        self._jumped = np.zeros((1, 3))
        if settings.jump_nm > 0:
            rng = np.random.default_rng([settings.seed, 6])
            expected = DAY / settings.jump_every_s
            waits = rng.exponential(settings.jump_every_s, int(expected + 10 * np.sqrt(expected) + 10))
            self.jump_times = np.cumsum(waits)
            jumps = rng.normal(size=(len(waits), 3))
            jumps *= settings.jump_nm * 1e-9 / np.linalg.norm(jumps, axis=1, keepdims=True)
            self._jumped = np.vstack([np.zeros(3), np.cumsum(jumps, axis=0)])

    def __call__(self, time_s: float) -> np.ndarray:
        """Displacement of the crystal in the laboratory (x, y, z), m."""
        crept = -np.expm1(-max(time_s, 0.0) / self._creep_time)
        jumped = self._jumped[np.searchsorted(self.jump_times, time_s, side="right")]
        return self._walk(time_s) + self._velocity * time_s + self._creep * crept + jumped


class ModulatorDrift:
    """Motion of the modulator against its stage: random walk and steady drift.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances) -> None:
        self._walk = RandomWalk(settings.modulator_drift_nm_per_sqrt_s * 1e-9, 2, [settings.seed, 7])
        self._velocity = np.array(settings.modulator_drift_nm_per_s) * 1e-9

    def __call__(self, time_s: float) -> np.ndarray:
        """Displacement (x, y) in the frame of the stage, m."""
        return self._walk(time_s) + self._velocity * time_s


class FluxNoise:
    """Relative fluctuations of the incident flux: a few slow waves.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances, waves: int = 8) -> None:
        rng = np.random.default_rng([settings.seed, 3])
        self._rms = settings.flux_noise
        self._omega = 2 * np.pi / np.geomspace(SHORTEST_PERIOD, LONGEST_PERIOD, waves)
        self._phase = rng.uniform(0, 2 * np.pi, waves)

    def __call__(self, time_s: float) -> float:
        """Flux over its mean."""
        waves = np.sin(self._omega * time_s + self._phase)
        return float(1 + self._rms * np.sqrt(2 / len(waves)) * waves.sum())


class PositionError:
    """The error of a stage that comes back to the same wrong place.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances) -> None:
        self._rms = settings.position_error_nm * 1e-9
        self._seed = settings.seed

    def __call__(self, x: float, y: float) -> np.ndarray:
        """True minus read position (x, y), m, at a reading (m): the same for the same reading to 1 nm."""
        if self._rms == 0:
            return np.zeros(2)
        key = [round(value * 1e9) % 2**32 for value in (x, y)]
        return np.random.default_rng([self._seed, 4, *key]).normal(scale=self._rms, size=2)


class AngleError:
    """The error of the rocking circle: jitter, new in every exposure, and the encoder's periodic error.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances) -> None:
        self._settings = settings
        self._phase = np.random.default_rng([settings.seed, 8]).uniform(0, 2 * np.pi)

    def __call__(self, reading_deg: float, time_s: float) -> float:
        """True minus read angle, deg; `time_s` (to 1 us) tells one exposure from another."""
        settings = self._settings
        turn = 2 * np.pi * reading_deg / settings.encoder_period_deg
        error = settings.encoder_error_deg * float(np.sin(turn + self._phase))
        if settings.angle_jitter_deg:
            moment = round(time_s * 1e6) % 2**63
            error += float(np.random.default_rng([settings.seed, 9, moment]).normal()) * (
                settings.angle_jitter_deg
            )
        return error


class RingCurrent:
    """Current of a storage ring that decays between top-ups and may lose its beam.

    Parameters
    ----------
    settings : Nuisances
    full_ma : float
        Current after a top-up.
    """

    def __init__(self, settings: Nuisances, full_ma: float) -> None:
        self._settings = settings
        self._full = full_ma

    def __call__(self, time_s: float) -> float:
        """Stored current, mA."""
        settings = self._settings
        since = time_s
        for start, duration in settings.beam_dumps:
            if start <= time_s < start + duration:
                return 0.0
            if time_s >= start + duration:
                since = min(since, time_s - start - duration)
        if settings.ring_lifetime_h is None:
            return self._full
        age = max(since, 0.0) % settings.top_up_every_s
        return self._full * float(np.exp(-age / (3600 * settings.ring_lifetime_h)))


class Temperatures:
    """Temperatures that swing slowly about their means, each with its own phase.

    Parameters
    ----------
    settings : Nuisances
    names : iterable of str
        Of the beamline's sensors; those of `TEMPERATURES` that matter exist with or without a sensor.
    """

    def __init__(self, settings: Nuisances, names: Iterable[str]) -> None:
        self._swing = settings.temperature_swing_k
        self._omega = 2 * np.pi / settings.temperature_period_s
        self._means = {name: TEMPERATURES.get(name, OTHER_TEMPERATURE) for name in names}
        self._phases = {
            name: np.random.default_rng([settings.seed, 10, zlib.crc32(name.encode())]).uniform(0, 2 * np.pi)
            for name in {**TEMPERATURES, **self._means}
        }

    def __call__(self, time_s: float) -> Mapping[str, float]:
        """Reading of every sensor, deg C."""
        return {name: mean + self._swing * self._wave(name, time_s) for name, mean in self._means.items()}

    def change(self, name: str, time_s: float) -> float:
        """Rise of a temperature since time 0, K."""
        return self._swing * (self._wave(name, time_s) - self._wave(name, 0.0))

    def _wave(self, name: str, time_s: float) -> float:
        return float(np.sin(self._omega * time_s + self._phases[name]))
