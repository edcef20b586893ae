"""Beamline time, which only what happens on the beamline makes pass.

Moves, exposures and trains of triggers are *activities*. While one is asleep time passes at the pace of the
scale; while one is awake, computing a frame or writing it, time stands still, so that no computer is too slow
for a scan. Between activities it stands too: what Channel Access and the client add is not counted, and the
frames of a scan do not depend on the scale. A beamline left alone for `IDLE_S` goes on at the wall's pace.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from types import TracebackType

TOGETHER_S = 0.003
"""Wall-clock seconds that time waits for a second command when the first asks it to: moves of several motors
are sent one by one, but meant to begin together. They are made up for once no other command has come."""

IDLE_S = 5.0
"""Wall-clock seconds without activity after which time passes by itself, second by second."""


class Clock:
    """Beamline time in seconds since the start; the scale may change while it runs.

    Parameters
    ----------
    scale : float
        Wall-clock seconds per second of beamline time, positive.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.begin()
        self._stands_until = 0.0
        self._awake = 0
        self._naps: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def scale(self) -> float:
        """Wall-clock seconds per second of beamline time.

        Raises
        ------
        ValueError
            When set to what is not positive.
        """
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"the time scale must be positive, not {value}")
        self._settle()
        self._scale = value
        self._plan_next()

    def begin(self) -> None:
        """Let time begin, at 0."""
        self._time, self._wall = 0.0, time.monotonic()

    def now(self) -> float:
        """Beamline time, s."""
        wall = time.monotonic()
        if self._awake or wall < self._stands_until:
            return self._time
        elapsed = wall - self._wall
        if not self._naps:
            return self._time + max(elapsed - IDLE_S, 0.0)
        return min(self._time + elapsed / self._scale, max(self._time, self._naps[0][0]))

    def release(self) -> None:
        """No other command is to come together with the last: the time held back for it has passed."""
        self._stands_until = min(self._stands_until, time.monotonic())
        self._plan_next()

    def _settle(self) -> None:
        """Count from now on."""
        self._time, self._wall = self.now(), time.monotonic()

    def _wake_up(self) -> None:
        self._settle()
        self._awake += 1
        self._plan_next()

    def _fall_asleep(self) -> None:
        self._awake -= 1
        self._wall = time.monotonic()
        self._plan_next()

    def _plan_next(self) -> None:
        """Have the earliest sleeper woken in time, if all sleep."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._naps and not self._awake:
            due = max(self._wall + (self._naps[0][0] - self._time) * self._scale, self._stands_until)
            delay = max(due - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._wake_first)

    def _wake_first(self) -> None:
        self._settle()  # at most to the time of this nap, while it is there
        when, _, nap = heapq.heappop(self._naps)
        if nap.done():  # its task was cancelled
            self._plan_next()
            return
        self._time = max(self._time, when)
        self._awake += 1
        nap.set_result(None)

    def _lie_down(self, when: float) -> asyncio.Future[None]:
        nap = asyncio.get_running_loop().create_future()
        heapq.heappush(self._naps, (when, next(self._order), nap))
        self._fall_asleep()
        return nap

    def _withdraw(self, nap: asyncio.Future[None]) -> None:
        """Forget a nap and be awake."""
        self._settle()  # while it still bounds the time
        self._naps = [entry for entry in self._naps if entry[2] is not nap]
        heapq.heapify(self._naps)
        self._wake_up()


class Activity:
    """Something that takes beamline time; awake, and holding time, from its making to the end of ``with``.

    Parameters
    ----------
    clock : Clock
    together : bool
        Others may be about to begin at the same time: let it not run on for `TOGETHER_S`.
    """

    def __init__(self, clock: Clock, together: bool = False) -> None:
        self._clock = clock
        self._nap: asyncio.Future[None] | None = None
        clock._wake_up()
        if together:
            clock._stands_until = time.monotonic() + TOGETHER_S

    def __enter__(self) -> Activity:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._fall_asleep()

    def nap(self, when: float) -> asyncio.Future[None]:
        """Let time pass until `when`, s of beamline time, or until `rouse`; done then, and time stands."""
        self._nap = self._clock._lie_down(when)
        return self._nap

    async def sleep_until(self, when: float) -> None:
        """Await a nap; a task that is cancelled meanwhile is awake too."""
        nap = self.nap(when)
        try:
            await nap
        except asyncio.CancelledError:
            if nap.cancelled():
                self._clock._withdraw(nap)
            raise

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` of beamline time pass."""
        await self.sleep_until(self._clock.now() + max(seconds, 0.0))

    def rouse(self) -> None:
        """End the sleep now."""
        nap = self._nap
        if nap is not None and not nap.done():
            self._clock._withdraw(nap)
            nap.set_result(None)
