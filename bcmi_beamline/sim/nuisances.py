"""What goes wrong at a beamline, as deterministic functions of time and position."""

from __future__ import annotations

import numpy as np

from bcmi_beamline.config import Nuisances

DAY = 86400
"""Length of the path of random drift, s; it rests afterwards."""

SHORTEST_PERIOD, LONGEST_PERIOD = 10.0, 600.0
"""Of the fluctuations of the incident flux, s."""


class Drift:
    """Slow motion of the crystal: a random walk plus a steady creep.

    Parameters
    ----------
    settings : Nuisances
    """

    def __init__(self, settings: Nuisances) -> None:
        self._velocity = np.array(settings.drift_nm_per_s) * 1e-9
        self._path: np.ndarray | None = None
        if settings.drift_nm_per_sqrt_s > 0:
            rng = np.random.default_rng([settings.seed, 2])
            steps = rng.normal(scale=settings.drift_nm_per_sqrt_s * 1e-9, size=(DAY, 3))
            steps[0] = 0
            self._path = np.cumsum(steps, axis=0)

    def __call__(self, time_s: float) -> np.ndarray:
        """Displacement of the crystal in the laboratory (x, y, z), m."""
        displacement = self._velocity * time_s
        if self._path is not None:
            second = min(max(time_s, 0.0), DAY - 1.001)
            i = int(second)
            displacement = displacement + self._path[i] + (second - i) * (self._path[i + 1] - self._path[i])
        return displacement


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
