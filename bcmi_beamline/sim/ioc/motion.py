"""How a motor travels: it speeds up, runs and slows down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

SHORTEST_MOVE_S = 0.02
"""Beamline seconds; even a move to where the motor stands takes this long."""

NOWHERE = 1e-12
"""Dial units; a shorter way is none."""


@dataclass(frozen=True)
class Motion:
    """Travel with a trapezoidal velocity; positions in dial units, times in seconds of beamline time."""

    start: float
    target: float
    began: float
    velocity: float
    ramp_s: float
    """Time to reach `velocity` (ACCL)."""

    @property
    def _distance(self) -> float:
        return abs(self.target - self.start)

    @cached_property
    def _ramp(self) -> float:
        """Seconds of speeding up, shorter where `velocity` is not reached."""
        return min(self.ramp_s, math.sqrt(self._distance * self.ramp_s / self.velocity))

    @cached_property
    def _travel(self) -> float:
        """Seconds that the trapezoid takes."""
        return self._distance / self._top_speed + self._ramp if self._top_speed else 0.0

    @cached_property
    def _top_speed(self) -> float:
        """Velocity of the run; zero where there is nowhere to go."""
        if self._distance < NOWHERE:
            return 0.0
        return self.velocity * self._ramp / self.ramp_s if self.ramp_s else self.velocity

    @property
    def duration(self) -> float:
        """Seconds from start to target."""
        return max(self._travel, SHORTEST_MOVE_S)

    @property
    def end(self) -> float:
        """When the target is reached."""
        return self.began + self.duration

    def position(self, now: float) -> float:
        """Dial position at `now`."""
        if now >= self.end:
            return self.target
        time = max(now - self.began, 0.0) * (self._travel / self.duration)
        left = self._travel - time
        if not self._travel:
            return self.start
        if min(time, left) >= self._ramp:
            travelled = self._top_speed * (time - self._ramp / 2)
        else:
            ramped = self._top_speed * min(time, left) ** 2 / (2 * self._ramp)
            travelled = ramped if time < left else self._distance - ramped
        return self.start + math.copysign(min(travelled, self._distance), self.target - self.start)

    def when(self, position: float) -> float:
        """Time at which it passes `position`; before `began` or after `end` for one off the way."""
        travelled = math.copysign(1.0, self.target - self.start) * (position - self.start)
        left = self._distance - travelled
        if travelled < 0:
            return -math.inf
        if left < 0:
            return math.inf
        ramped = self._top_speed * self._ramp / 2
        if not self._travel:
            return self.began
        if min(travelled, left) >= ramped:
            time = self._ramp / 2 + travelled / self._top_speed
        else:
            root = math.sqrt(2 * self._ramp * min(travelled, left) / self._top_speed)
            time = root if travelled < left else self._travel - root
        return self.began + time * (self.duration / self._travel)
