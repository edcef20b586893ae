"""Beamline time: how many of its seconds fit into one on the wall."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Beamline time in seconds since the start; the scale may change while it runs.

    Parameters
    ----------
    scale : float
        Wall-clock seconds per second of beamline time, positive.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._began = time.monotonic()
        self._elapsed = 0.0

    @property
    def scale(self) -> float:
        """Wall-clock seconds per second of beamline time."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"the time scale must be positive, not {value}")
        self._elapsed, self._began = self.now(), time.monotonic()
        self._scale = value

    def now(self) -> float:
        """Beamline time, s."""
        return self._elapsed + (time.monotonic() - self._began) / self._scale

    async def sleep(self, seconds: float) -> None:
        """Wait `seconds` of beamline time."""
        await asyncio.sleep(max(seconds, 0.0) * self._scale)
