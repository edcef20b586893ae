"""What is to be done a little later, by one thread for all devices: a thread for each move slows a scan."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable
from functools import cache
from threading import Condition, Thread

log = logging.getLogger(__name__)


class _Agenda(Thread):
    """Functions by the time at which they are to be called."""

    def __init__(self) -> None:
        super().__init__(name="devices, later", daemon=True)
        self._entries: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._changed = Condition()

    def add(self, when: float, function: Callable[[], object]) -> None:
        """Have `function` called at `when` (`time.monotonic`)."""
        with self._changed:
            heapq.heappush(self._entries, (when, next(self._order), function))
            if self._entries[0][0] == when:
                self._changed.notify()

    def _next(self) -> Callable[[], object]:
        with self._changed:
            while not self._entries or self._entries[0][0] > time.monotonic():
                self._changed.wait(self._entries[0][0] - time.monotonic() if self._entries else None)
            return heapq.heappop(self._entries)[2]

    def run(self) -> None:
        while True:
            function = self._next()
            try:
                function()
            except Exception:
                log.exception("what was left for later failed")


@cache
def _agenda() -> _Agenda:
    agenda = _Agenda()
    agenda.start()
    return agenda


def call_later(seconds: float, function: Callable[[], object]) -> None:
    """Call `function` after so many seconds, in a thread that must not be kept long."""
    _agenda().add(time.monotonic() + seconds, function)
